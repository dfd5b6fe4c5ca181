"""Earning the oracle: a hand-worked case, independent closed forms, float64 gradcheck."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from inputs import BOX, Case
from oracles import delta_by_kda, preconditioner_by_products

import osdn

F64 = torch.float64


def head(*rows: list[float]) -> torch.Tensor:
    """Rows of one head, [1, T, 1, ...]."""
    return torch.tensor(rows, dtype=F64)[None, :, None]


@pytest.mark.parametrize("feedback", ["beta_free", "beta_aware"])
def test_two_tokens_by_hand(feedback):
    """K = 2, V = 1, eta = 2, box [0, 0.7], lambda = (1/2, 1), channel decay (1, 1) then (1/2, 1).

    t = 1: S = (1, -1), d = (.5, 1), k = (1, .5), v = 2, beta = .5, q = (2, 1)
        r = 2 - (1 - .5) = 1.5          w = (.5, .5)       S = (1, -1) + .5 * 1.5 * (.5, .5) = (1.375, -.625)
        o = 2.75 - .625 = 2.125         s = (1, .25)       x = .5 + .25 = .75
        free:  e = .25                  d = (.25 + .5, .5 + .125) = (.75, .625)            clipped to (.7, .625)
        aware: e = .5 * .625 = .3125    d = (.25 + .625, .5 + .15625) = (.875, .65625)     clipped to (.7, .65625)
    t = 2: k = (1, -1), v = 1, beta = 1, q = (1, 1)
        Sbar = (.6875, -.625)           r = 1 - 1.3125 = -.3125     S = Sbar - .3125 * (d_0, -d_1)
        free:  S = (.46875, -.4296875)  x = 1.325      e = -.325     d = (.7 - .65, .625 - .65)       -> (.05, 0)
        aware: S = (.46875, -.419921875)  x = 1.35625  e = -.35625   d = (-.0125, -.05625)            -> (0, 0)
    """
    o, state = osdn.online_scaled_delta_rule(
        head([2.0, 1.0], [1.0, 1.0]),
        head([1.0, 0.5], [1.0, -1.0]),
        head([2.0], [1.0]),
        torch.tensor([0.5, 1.0], dtype=F64)[None, :, None],
        g=head([0.0, 0.0], [math.log(0.5), 0.0]),
        forget=torch.tensor([math.log(0.5), 0.0], dtype=F64)[None, :, None],
        preconditioner=osdn.Preconditioner(2.0, feedback, 0.0, 0.7),
        initial_state=osdn.DeltaState(
            torch.tensor([[[[1.0], [-1.0]]]], dtype=F64), torch.tensor([[[0.5, 1.0]]], dtype=F64)
        ),
        output_final_state=True,
        scale=1.0,
        qk_l2norm=False,
        backend="reference",
    )
    s1, d = {"beta_free": (-0.4296875, [0.05, 0.0]), "beta_aware": (-0.419921875, [0.0, 0.0])}[feedback]
    # 1e-15: the hand-worked numbers are exact, log and exp of 1/2 are not.
    torch.testing.assert_close(o.flatten(), torch.tensor([2.125, 0.46875 + s1], dtype=F64), rtol=0, atol=1e-15)
    torch.testing.assert_close(state.S.flatten(), torch.tensor([0.46875, s1], dtype=F64), rtol=0, atol=1e-15)
    torch.testing.assert_close(state.d.flatten(), torch.tensor(d, dtype=F64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
@pytest.mark.parametrize("feedback", ["beta_free", "beta_aware"])
def test_outputs_follow_kda_with_symmetric_keys(decay, feedback):
    case = Case(T=24, B=1, H=1, K=7, V=3, decay=decay, feedback=feedback, forget=True, box=BOX)
    x = case.tensors()
    q, k = (torch.nn.functional.normalize(x[n], dim=-1) for n in ("q", "k"))
    used, _ = osdn.precondition(
        k, x["beta"], preconditioner=case.preconditioner, forget=x["forget"], initial_d=x["d"], backend="reference"
    )
    o, _ = osdn.online_scaled_delta_rule(
        q,
        k,
        x["v"],
        x["beta"],
        g=x["g"],
        forget=x["forget"],
        preconditioner=case.preconditioner,
        initial_state=osdn.DeltaState(x["S"], x["d"]),
        scale=1.0,
        qk_l2norm=False,
        backend="reference",
    )
    g = x["g"] if x["g"] is None or decay == "channel" else x["g"][..., None].expand_as(k)
    q, k, v, beta, used, g, o = (y if y is None else y[0, :, 0] for y in (q, k, x["v"], x["beta"], used, g, o))
    want = delta_by_kda(q, k, v, beta, used, g, x["S"][0, 0])
    assert (o - want).norm() / want.norm() < 1e-13


@pytest.mark.parametrize("feedback", ["beta_free", "beta_aware"])
@pytest.mark.parametrize("normalize_step", [False, True])
def test_preconditioner_is_a_product_of_affine_maps(feedback, normalize_step):
    no_box = (-math.inf, math.inf)
    case = Case(T=40, B=1, H=1, K=6, feedback=feedback, forget=True, normalize_step=normalize_step, box=no_box)
    x = case.tensors()
    k = 0.8 * torch.nn.functional.normalize(x["k"], dim=-1)  # not unit length, so that normalize_step matters
    used, final = osdn.precondition(
        k,
        x["beta"],
        preconditioner=case.preconditioner,
        forget=x["forget"],
        initial_d=x["d"],
        backend="reference",
    )
    b = x["beta"][0, :, 0] if feedback == "beta_aware" else torch.ones(40, dtype=F64)
    eta = case.eta / (0.64 + 1e-5) if normalize_step else case.eta
    want = preconditioner_by_products(
        k[0, :, 0], b, x["forget"][0, :, 0].exp(), x["d"][0, 0], torch.full((40,), eta, dtype=F64)
    )
    got = torch.cat([used[0, :, 0], final[0]])
    assert (got - want).norm() / want.norm() < 1e-13


@pytest.mark.parametrize(
    ("decay", "feedback", "box", "normalize_step"),
    [
        *product([None, "scalar", "channel"], ["beta_free", "beta_aware"], [(0.0, math.inf), BOX], [False]),
        (None, "beta_aware", BOX, True),
    ],
)
def test_gradcheck(decay, feedback, box, normalize_step):
    case = Case(T=12, B=1, H=1, K=3, V=2, decay=decay, feedback=feedback, forget=True, box=box, seed=2, qk_l2norm=True)
    case = Case(**{**case.__dict__, "normalize_step": normalize_step})
    x = case.tensors()
    names = [n for n, t in x.items() if t is not None]

    def f(*leaves):
        t = dict(zip(names, leaves))
        o, state = osdn.online_scaled_delta_rule(
            t["q"],
            t["k"],
            t["v"],
            t["beta"],
            g=t.get("g"),
            forget=t["forget"],
            preconditioner=case.preconditioner,
            initial_state=osdn.DeltaState(t["S"], t["d"]),
            output_final_state=True,
            backend="reference",
        )
        return o, state.S, state.d

    # Random projections of the Jacobian everywhere, its every entry for the case with everything on.
    everything = (decay, feedback, box) == ("channel", "beta_aware", BOX)
    assert torch.autograd.gradcheck(f, [x[n].requires_grad_() for n in names], fast_mode=not everything)


def test_the_step_size_limit():
    """One-hot keys, the worst case ||s||^2 = 1: d oscillates for eta c2 just below 2 and grows just above."""
    k = torch.zeros(1, 400, 1, 4, dtype=F64)
    k[..., 0] = 1

    def end(eta: float, feedback: str, beta: float) -> float:
        p = osdn.Preconditioner(eta, feedback, -math.inf, math.inf)
        d = torch.full((1, 1, 4), 1.1 / beta if feedback == "beta_aware" else 1.1, dtype=F64)
        b = torch.full((1, 400, 1), beta, dtype=F64)
        return osdn.precondition(k, b, preconditioner=p, initial_d=d, backend="reference")[1].abs().max()

    for feedback, beta, limit in (("beta_free", 0.5, 2.0), ("beta_aware", 0.8, 2 / 0.64), ("beta_aware", 2.0, 0.5)):
        assert end(0.98 * limit, feedback, beta) < 2
        assert end(1.02 * limit, feedback, beta) > 1e3
