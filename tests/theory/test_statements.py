"""The numbered statements of docs/math.md that speak of one token, of d alone, or of products of transitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import osdn
from osdn.theory.preconditioner import aware_sides
from osdn.theory.stability import adversary, norm, transition
from osdn.theory.streams import F64, Draws, constant, learn, preconditioners, read, unit

properties = settings(max_examples=30, deadline=None, derandomize=True)


def stream(seed: int, T: int, K: int = 5, length: float = 1.0):
    """Keys with a common part, betas over all of (0, 1), d_0 in [.2, 2]."""
    draws = Draws([seed])
    k = length * unit(draws.randn(T, 1, K) + 0.7 * draws.randn(1, 1, K))
    return draws, k, draws.rand(T, 1), 0.2 + 1.8 * draws.rand(1, K)


def squares(k, beta, d):
    """w_t `[T, K]` and p_t `[T]` of one seed, aware."""
    w = (beta[..., None] * k.square())[0, :, 0]
    return w, 1 - (d[0, :, 0] * w).sum(-1)


def test_a_write_is_a_preconditioned_gradient_step():
    """S + beta (d * k) (v - S^T k)^T = S - beta Diag(d) grad ||S^T k - v||^2 / 2, by autograd."""
    draws, k, beta, d = stream(0, 1)
    v, S = draws.randn(1, 1, 3), draws.randn(1, 5, 3).requires_grad_()
    [gradient] = torch.autograd.grad((read(S, k) - v).square().sum() / 2, S)
    [after] = learn(k, v, beta, osdn.Preconditioner(), d=d, S=S.detach())
    torch.testing.assert_close(after, S.detach() - beta[..., None] * d[..., None] * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_what_a_write_leaves_of_the_residual(decay):
    """(1 - beta x) of the residual of the decayed state, vector for vector; of the undecayed one's, another multiple of
    another vector: its loss ratio has the factor ||alpha r - (1 - alpha) v||^2 / ||r||^2."""
    draws, k, beta, d = stream(2, 1)
    v, S = draws.randn(1, 1, 3), draws.randn(1, 5, 3)
    g = None if decay is None else draws.rand(*((1, 1) if decay == "scalar" else (1, 1, 5))).log()
    kept = S if g is None else S * g[:, 0].exp().view(1, 1, -1, 1)
    _, after = osdn.online_scaled_delta_rule(
        *(k, k, v, beta),
        g=g,
        preconditioner=osdn.Preconditioner(),
        initial_state=osdn.DeltaState(S, d),
        output_final_state=True,
        qk_l2norm=False,
        backend="reference",
    )
    left = 1 - beta * (d * k.square()).sum(-1)
    after, decayed, undecayed = (v - read(x, k) for x in (after.S, kept, S))
    torch.testing.assert_close(after, left[..., None] * decayed, rtol=1e-12, atol=1e-12)
    ratio = after.square().sum() / undecayed.square().sum()
    if decay is None:
        torch.testing.assert_close(ratio, left.square().sum(), rtol=1e-12, atol=0)
    else:
        assert abs(ratio / left.square().sum() - 1) > 0.1
    if decay == "scalar":
        alpha, r = g.exp().item(), -undecayed
        q = (alpha * r - (1 - alpha) * v).square().sum() / r.square().sum()
        torch.testing.assert_close(ratio, q * left.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [1.0, 1.7])
def test_feedback_descends_the_surrogate(length):
    """h(d) = (f(S_t) - f(S_{t-1})) / ||grad f||^2 does not depend on S or v, and its gradient, by autograd through the
    operator, is the update: exactly for unit keys, by normalize_step for others."""
    draws, k, beta, d = stream(0, 1, length=length)
    v, S = draws.randn(1, 1, 3), draws.randn(1, 5, 3)
    rule = osdn.Preconditioner(0.3, "beta_aware", -math.inf, normalize_step=length != 1)
    surrogates = []
    for other in (0.0, 1.0):
        d.requires_grad_()
        [after] = learn(k, v, beta, rule, d=d, S=S + other)
        before, left = ((v - read(x, k)).square().sum() for x in (S + other, after))
        h = (left - before) / 2 / (k.square().sum() * before)
        [gradient] = torch.autograd.grad(h, d)
        surrogates.append(h.detach())
        moved = preconditioners(k, beta, rule, d=d.detach())[1] - d.detach()
        # 1e-5: what normalize_step adds to the length. 1e-15: moved is a difference of numbers near 1.
        torch.testing.assert_close(moved, -0.3 * gradient, rtol=1e-12 if length == 1 else 1e-5, atol=1e-15)
    torch.testing.assert_close(*surrogates, rtol=1e-12, atol=0)


@pytest.mark.parametrize("feedback", ["beta_free", "beta_aware"])
def test_forgetting_descends_a_penalised_loss(feedback):
    """APF is a gradient step on (1 - <d, w>)^2 / 2 + (1 - lambda) / (2 eta) ||d||^2."""
    _, k, beta, d = stream(1, 1)
    eta, lam = 0.7, 0.9
    after = preconditioners(k, beta, osdn.Preconditioner(eta, feedback, -math.inf), forget=lam, d=d)[1]
    w = (k.square() if feedback == "beta_free" else beta[..., None] * k.square())[:, 0]
    d.requires_grad_()
    penalised = (1 - (d * w).sum()).square() / 2 + (1 - lam) / (2 * eta) * d.square().sum()
    [gradient] = torch.autograd.grad(penalised, d)
    torch.testing.assert_close(after, (d - eta * gradient).detach(), rtol=1e-12, atol=1e-15)


@properties
@given(st.integers(0, 999), st.integers(1, 80), st.floats(0.05, 1.9), st.sampled_from([math.inf, 1.2]))
def test_the_token_local_bound(seed, T, relative_step, d_max):
    """For every u of the box, with eta < 2 / Lambda; `aware_sides` evaluates it at the best u."""
    draws, k, beta, d0 = stream(seed, T)
    beta = 0.1 + 0.9 * beta
    w, _ = squares(k, beta, d0[:, None].expand_as(k))
    Lambda = float(w.square().sum(-1).max())
    eta = relative_step / Lambda
    low = -math.inf if d_max == math.inf else 0.0
    rule = osdn.Preconditioner(eta, "beta_aware", low, d_max)
    d0 = d0.clamp(max=d_max)
    d, _ = preconditioners(k, beta, rule, d=d0)
    _, p = squares(k, beta, d)
    a = 1 - eta * Lambda / 2
    online, bound, best, plain = (x[0] for x in aware_sides(k[0], beta[0], d[0], rule, [T]))
    torch.testing.assert_close(online, p.square().sum())
    assert online <= bound * (1 + 1e-9) + 1e-12
    assert best <= plain + 1e-9
    for u in (torch.ones(5, dtype=F64), d0[0, 0], d_max * draws.rand(5)[0] if d_max < 2 else 3 * draws.rand(5)[0]):
        left = (1 - w @ u).square().sum()
        at_u = (d0[0, 0] - u).square().sum() / (eta * a) + left / a**2
        assert bound <= at_u * (1 + 1e-9) + 1e-12
        assert best <= left + 1e-9


@properties
@given(st.integers(0, 999), st.integers(1, 80))
def test_the_realisable_bound(seed, T):
    """beta = 1, unit keys, eta = 1 / Lambda: prod (1 - x_t)^2 <= (Lambda ||d_1 - 1||^2 / T)^T, ||d_t - 1|| falls."""
    _, k, _, d0 = stream(seed, T)
    beta = constant(k, 1.0)
    Lambda = float(k.pow(4).sum(-1).max())
    d, end = preconditioners(k, beta, osdn.Preconditioner(1 / Lambda, d_min=-math.inf), d=d0)
    _, p = squares(k, beta, d)
    C = Lambda * (d0 - 1).square().sum()
    assert p.square().sum() <= C + 1e-12
    assert p.square().log().sum() <= T * (C / T).log() + 1e-9
    distances = torch.cat([d[0, :, 0], end[0]]).sub(1).norm(dim=-1)
    assert (distances.diff() <= 1e-12).all()


@properties
@given(st.integers(0, 999), st.integers(2, 60), st.floats(0.8, 0.999), st.booleans())
def test_the_forgetting_bound(seed, T, lam, moving):
    """APF without a box against any path u_t, which pays sum ||u_{t+1} - u_t||^2 / (1 - lambda) for moving."""
    draws, k, beta, d0 = stream(seed, T)
    w, _ = squares(k, beta, d0[:, None].expand_as(k))
    eta = 0.9 * lam / float(w.square().sum(-1).max())
    d, _ = preconditioners(k, beta, osdn.Preconditioner(eta, "beta_aware", -math.inf), forget=lam, d=d0)
    _, p = squares(k, beta, d)
    u = 1.5 + 0.5 * (draws.randn(T + 1, 5)[0].cumsum(0) / T**0.5 if moving else draws.randn(1, 5)[0].expand(T + 1, 5))
    of_u = (1 - (u[:-1] * w).sum(-1)).square()
    left = (eta / lam * (1 - eta * w.square().sum(-1) / lam) * p.square()).sum()
    drift = u.diff(dim=0).square().sum() / (1 - lam)
    penalty = (1 - lam) / lam * u[:-1].square().sum()
    right = (d0[0, 0] - u[0]).square().sum() + eta / lam * of_u.sum() + penalty + drift
    assert left <= right * (1 + 1e-9)


@properties
@given(st.integers(0, 999), st.integers(1, 80))
def test_the_beta_free_bound_is_delta_net_and_an_excess(seed, T):
    _, k, beta, d0 = stream(seed, T)
    Lambda = float(k.pow(4).sum(-1).max())
    d, _ = preconditioners(k, beta, osdn.Preconditioner(1 / Lambda), d=d0)
    x = (d * k.square()).sum(-1)
    assert (1 - x).square().sum() <= Lambda * (d0 - 1).square().sum() + 1e-12
    rms = [y.square().mean().sqrt() for y in (1 - beta * x, 1 - beta, 1 - x)]
    assert rms[0] <= rms[1] + beta.max() * rms[2] + 1e-12


def test_at_the_tie_no_gradient_reaches_k_or_eta_through_d():
    """Unit keys, beta_free, lambda = 1, d_0 = 1: d_t = 1; its derivatives by the keys vanish, by d_0 and lambda not."""
    draws = Draws([0])
    z, beta, weight = draws.randn(6, 1, 4).requires_grad_(), draws.rand(6, 1), draws.randn(6, 1, 4)
    d0, forget = torch.ones(1, 1, 4, dtype=F64).requires_grad_(), torch.zeros(1, 6, 1, dtype=F64).requires_grad_()
    used, _ = osdn.precondition(
        unit(z), beta, preconditioner=osdn.Preconditioner(), forget=forget, initial_d=d0, backend="reference"
    )
    torch.testing.assert_close(used, torch.ones_like(used), rtol=0, atol=1e-15)
    by_key, by_d0, by_forget = torch.autograd.grad((used * weight).sum(), [z, d0, forget])
    assert by_key.abs().max() < 1e-14
    assert min(by_d0.abs().max(), by_forget.abs().max()) > 0.1
    # No gradient by eta either: every eta gives the same d.
    other, _ = preconditioners(unit(z.detach()), beta, osdn.Preconditioner(0.3))
    torch.testing.assert_close(other, used.detach(), rtol=0, atol=1e-15)


def test_fixed_points_of_constant_beta_and_of_forgetting():
    """Aware: 1 / beta. Forgetting (E w w^T + (1 - lambda) / eta I)^-1 E w; isotropic 1 / (1 + K (1 - lambda) / eta)."""
    draws = Draws(range(8))
    K, T = 8, 4000
    k = unit(draws.randn(T, 1, K))
    _, end = preconditioners(k, constant(k, 0.8), osdn.Preconditioner(feedback="beta_aware"))
    torch.testing.assert_close(end, torch.full_like(end, 1.25), rtol=0, atol=1e-6)

    lam, eta = 0.97, 0.5
    d, _ = preconditioners(k, constant(k, 1.0), osdn.Preconditioner(eta), forget=lam)
    late = d[:, T // 2 :].mean((1, 2, 3))
    error = 3 * late.std() / len(late) ** 0.5
    assert error < 2e-3
    assert abs(late.mean() - 1 / (1 + K * (1 - lam) / eta)) < error
    # A common part in the keys: the mean-field formula with the moments of the very stream.
    s = unit(draws.randn(T, 1, K) + draws.randn(1, 1, K)).square()
    d, _ = preconditioners(s.sqrt(), constant(s, 1.0), osdn.Preconditioner(eta), forget=lam)
    s = s[:, T // 2 :, 0]
    second = s.mT @ s / s.shape[1] + (1 - lam) / eta * torch.eye(K, dtype=F64)
    want = torch.linalg.solve(second, s.mean(1))
    off = d[:, T // 2 :, 0].mean(1) - want
    # 1%: the noise of a mean over 2,000 tokens, which K (1 - lambda) / eta spoils by 1 / (1 + ...) = .68 against 1.
    assert off.norm() < 0.01 * want.norm()


@properties
@given(st.integers(0, 9999), st.floats(0.01, 2.0), st.floats(0.1, 3.0))
def test_the_norm_of_a_transition(seed, s, length):
    draws = Draws([seed])
    k, d = length * unit(draws.randn(6)), 0.3 + 2 * draws.rand(6)
    beta = s / (d * k * k).sum(-1)
    B = transition(k, d, beta)
    torch.testing.assert_close(torch.linalg.matrix_norm(B, 2), norm(k, d, beta), rtol=1e-10, atol=0)
    spread = d.amax(-1) / d.amin(-1)
    bound = (spread + 1) / (2 * spread.sqrt()) if s <= 1 else spread.sqrt()
    assert (norm(k, d, beta) <= bound * (1 + 1e-9)).all()
    # Its spectral radius is max(1, |1 - s|) = 1, however large the norm.
    assert abs(torch.linalg.eigvals(B).abs().max() - 1) < 1e-6


@properties
@given(st.integers(0, 9999), st.sampled_from([1.0, 2.0]))
def test_a_box_keeps_every_step_from_growing(seed, beta_max):
    """Unit keys, beta <= beta_max, d in [0, 2 / beta_max]: spectral radius 1; [0, 1 / beta_max]: no overshoot."""
    draws = Draws([seed])
    k, beta, d = unit(draws.randn(20, 4)), beta_max * draws.rand(20), 2 / beta_max * draws.rand(20, 4)
    radius = torch.linalg.eigvals(transition(k, d, beta)).abs().amax(-1)
    assert (radius <= 1 + 1e-7).all()
    left = 1 - beta * (d / 2 * k * k).sum(-1)
    assert ((left >= 0) & (left <= 1)).all()


def test_a_constant_d_bounds_products():
    """By sqrt(d_max / d_min), with s in [0, 2]; a step alone comes near it."""
    draws = Draws(range(5))
    T, K = 60, 4
    k, beta, d = unit(draws.randn(T, 1, K)), 2 * draws.rand(T, 1), torch.tensor([[[0.2, 0.5, 0.9, 1.0]]], dtype=F64)
    identity = torch.eye(K, dtype=F64).expand(5, 1, K, K).contiguous()
    states = learn(k, torch.zeros_like(k), beta, osdn.Preconditioner(0.0), d=d, S=identity, marks=range(1, T))
    norms = torch.stack([torch.linalg.matrix_norm(S, 2) for S in states])
    assert 1.05 < norms.max() <= 5**0.5


def test_a_box_does_not_bound_products():
    """Each step has spectral radius 1, the product of two does not; a d that does not change is harmless."""
    assert adversary(0.9, 1.1, 90) > 1.004
    assert adversary(1.0, 1.0, 90) == pytest.approx(1.0, abs=1e-6)
