"""The population module against a plain loop with autograd, and the theorem as a property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.theory.outcome import Outcome
from osdn.theory.population import (
    Descent,
    box_truncation,
    descend,
    distance,
    first_below,
    gap_at_800,
    loss,
    product_bounds,
    rotation,
    smoothness,
)
from osdn.theory.streams import F64, Draws, spectrum

properties = settings(max_examples=25, deadline=None, derandomize=True)


def covariance_of(kappa: float, seed: int, K: int = 6, *, diagonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A covariance, rotated unless `diagonal`, and start errors of three runs."""
    draws = Draws([seed])
    R = torch.eye(K, dtype=F64) if diagonal else rotation(draws, K)[0]
    return R @ torch.diag(spectrum(kappa, K)) @ R.mT, draws.randn(3, K, 4)[0]


def plain_descent(covariance, E, steps, eta, *, diagonal, d_max=math.inf):
    """By the definition, one run: log10 gaps, h differentiated by autograd, nothing rescaled."""
    L = torch.linalg.eigvalsh(covariance)[-1]
    D = torch.full((len(E),), 1 / float(L), dtype=F64) if diagonal else torch.eye(len(E), dtype=F64) / L

    def F(E):
        return (E * (covariance @ E)).sum() / 2

    gaps = [F(E)]
    for _ in range(steps):
        D.requires_grad_()
        G = covariance @ E
        after = E - (D[:, None] * G if diagonal else D @ G)
        h = (F(after) - F(E)) / G.square().sum()
        [gradient] = torch.autograd.grad(h, D)
        E, D = after.detach(), (D.detach() - eta * gradient).clamp(max=d_max)
        gaps.append(F(E))
    return (torch.stack(gaps) / gaps[0]).log10()


@pytest.mark.parametrize(("diagonal", "d_max"), [(False, math.inf), (True, math.inf), (True, 3.0)])
@pytest.mark.parametrize("eta", [None, 0.7, 0.0])
def test_descent_is_its_definition(diagonal, d_max, eta):
    covariance, start = covariance_of(20.0, 1, diagonal=False)
    run = descend(covariance, start, 12, eta=eta, diagonal=diagonal, d_max=d_max)
    step = 1 / float(smoothness(covariance, diagonal)[1]) if eta is None else eta
    for n, E in enumerate(start):
        want = plain_descent(covariance, E, 12, step, diagonal=diagonal, d_max=d_max)
        torch.testing.assert_close(run.log_gap[:, n], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_surrogate_is_a_distance_to_newton(diagonal):
    """Lemma: h(D) - h(Sigma^-1) = tr((D - D*)^T Sigma (D - D*) M) / 2, and right-Newton is optimal in one step."""
    covariance, start = covariance_of(9.0, 2, diagonal=diagonal)
    newton = torch.linalg.inv(covariance)
    L = smoothness(covariance, diagonal)[0]
    run = descend(covariance, start, 1, diagonal=diagonal)
    for n, E in enumerate(start):
        G = covariance @ E
        M = G @ G.mT / G.square().sum()
        off = torch.eye(len(E), dtype=F64) / L - newton
        want = torch.trace(off.mT @ covariance @ off @ M) / 2
        torch.testing.assert_close(run.surrogate[0, n], want, rtol=1e-9, atol=0)
        torch.testing.assert_close(run.sigma[0, n], G.square().sum() / (E * G).sum())
        assert loss(covariance, (E - newton @ G)[None]) < 1e-28 * loss(covariance, E[None])


@properties
@given(st.floats(1.5, 300.0), st.integers(0, 99), st.booleans(), st.floats(0.1, 1.9), st.integers(1, 60))
def test_the_population_theorem(kappa, seed, diagonal, relative_step, steps):
    """Sum of the surrogate and product of the ratios within their bounds; the first for every step below 2 / L_h."""
    covariance, start = covariance_of(kappa, seed, diagonal=diagonal)
    _, L_h = smoothness(covariance, diagonal)
    eta = float(relative_step / L_h)
    run = descend(covariance, start, steps, eta=eta, diagonal=diagonal)
    bound = distance(covariance) / (2 * eta * (2 - eta * L_h))
    assert (run.surrogate.sum(0) <= bound * (1 + 1e-9)).all()

    run = descend(covariance, start, steps, diagonal=diagonal)
    C, C_traj = product_bounds(covariance, run, diagonal)
    t = torch.arange(1, steps + 1)[:, None]
    assert (C_traj <= C * (1 + 1e-9)).all()
    assert (10 ** (run.log_gap[1:] / t) <= C_traj / t * (1 + 1e-9)).all()


def test_singular_covariance_that_a_diagonal_fits():
    """Blocks of rank one with disjoint support: some diagonal d has A^T diag(d) A = I, and convergence is as fast."""
    a = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.1]], dtype=F64)
    start = Draws([0]).randn(2, 4, 3)[0]
    fits = descend(a.mT @ a, start, 60, diagonal=True)
    turned = rotation(Draws([1]), 4)[0] @ torch.diag(spectrum(13.0, 4))
    does_not = descend(turned @ turned.mT, start, 60, diagonal=True)
    assert (fits.log_gap[-1] < -15).all()
    assert (does_not.ratio[-10:] > 0.5).all()


def test_steps_to():
    run = Descent(torch.tensor([[0.0, 0.0], [-3.0, -1.0], [-7.0, -2.0]]), torch.ones(2, 2))
    assert run.steps_to(1e-5).tolist() == [2.0, math.inf]
    assert run.steps_to(1e-3).tolist() == [1.0, math.inf]


def test_where_a_bound_begins_to_say_something():
    C_traj, t = torch.tensor([[4.0, 9.0], [3.0, 9.0], [2.0, 9.0]]), torch.arange(1, 4)[:, None]
    assert first_below(C_traj, t).tolist() == [3.0, math.inf]


def test_an_error_of_zero_stays():
    run = descend(torch.eye(3, dtype=F64), torch.ones(1, 3, 2, dtype=F64), 3, diagonal=True)
    assert run.log_gap[1:, 0].tolist() == [-300.0, -600.0, -900.0]
    assert (run.surrogate < 1e-299).all()


@pytest.mark.parametrize("experiment", [gap_at_800, box_truncation])
def test_experiments_agree_with_the_expected_figures(experiment):
    outcome = experiment()
    assert isinstance(outcome, Outcome)
    assert [row.quantity for row in outcome.rows if not row.agrees] == []
