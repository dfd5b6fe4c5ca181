"""The checks that guard the operator fail on every mutant, and pass on the originals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from inputs import BOX, Case, as_backend, errors, run, worst
from mutants import MUTANTS, mutate
from oracles import delta_by_kda, preconditioner_by_products

import osdn
from osdn.ops import chunked, reference

DISCRIMINATING = [
    Case(T=70, forget=True, box=BOX),
    Case(T=70, forget=True, box=BOX, decay="channel", feedback="beta_aware"),
    Case(T=140, forget=True, decay="scalar", normalize_step=True, feedback="beta_aware"),
    Case(lengths=(20, 90, 33)),
]


def definition_holds(module) -> bool:
    """The definition against products of explicit matrices, with the box checked by its two bounds."""
    case = Case(T=24, B=1, H=1, K=7, V=3, decay="channel", feedback="beta_aware", forget=True)
    x = case.tensors()
    p, boxed = replace(case, box=(-math.inf, math.inf)).preconditioner, replace(case, box=BOX).preconditioner
    used, final = module.precondition(x["k"], x["beta"], x["forget"], x["d"], None, p)
    one = {n: t[0, :, 0] for n, t in x.items() if t is not None and n not in ("S", "d")}
    want_d = preconditioner_by_products(
        one["k"], one["beta"], one["forget"].exp(), x["d"][0, 0], torch.full((24,), p.eta, dtype=torch.float64)
    )
    inside, _ = module.precondition(x["k"], x["beta"], x["forget"], x["d"], None, boxed)
    o, _, _ = module.online_scaled_delta_rule(
        *(x[n] for n in ("q", "k", "v", "beta", "g", "forget", "S", "d")), None, boxed, 0.5, 64
    )
    want_o = 0.5 * delta_by_kda(one["q"], one["k"], one["v"], one["beta"], inside[0, :, 0], one["g"], x["S"][0, 0])
    return (
        torch.allclose(torch.cat([used[0, :, 0], final[0]]), want_d, rtol=1e-12, atol=1e-12)
        and torch.allclose(o[0, :, 0], want_o, rtol=1e-12, atol=1e-12)
        and bool(((inside[:, 1:] >= BOX[0]) & (inside[:, 1:] <= BOX[1])).all())
    )


def chunked_holds(module, monkeypatch) -> bool:
    as_backend(monkeypatch, "chunked", module)
    inputs = [(case, case.tensors()) for case in DISCRIMINATING]
    for case, x in list(inputs):
        if x["g"] is not None:
            wiped = {n: None if t is None else t.clone() for n, t in x.items()}
            wiped["g"][:, 5] = wiped["forget"][:, 40] = -8e6
            inputs.append((case, wiped))
    return all(worst(errors(case, run(case, x, "chunked"), run(case, x, "reference")))[0] < 1e-12 for case, x in inputs)


def test_originals_pass(monkeypatch):
    assert definition_holds(reference)
    assert chunked_holds(chunked, monkeypatch)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, monkeypatch):
    module, old, new = MUTANTS[name]
    mutant = mutate(module, old, new)
    if module is reference:
        assert not definition_holds(mutant)
    else:
        assert not chunked_holds(mutant, monkeypatch)


def test_the_trap_hides_mutants():
    """Why the inputs matter: with unit keys and d_0 = 1, dropping the preconditioner altogether changes nothing."""
    x = Case(T=70, qk_l2norm=True, feedback="beta_free").tensors()
    args = [x[n] for n in ("q", "k", "v", "beta")]
    state = osdn.DeltaState(d=torch.ones_like(x["d"]))
    o, _ = osdn.online_scaled_delta_rule(*args, preconditioner=osdn.Preconditioner(), initial_state=state)
    plain, _ = osdn.online_scaled_delta_rule(*args, preconditioner=None)
    # 1e-4: x = 1 up to the 1e-6 under the root of the norm, whose effect adds up over the tokens.
    torch.testing.assert_close(o, plain, rtol=1e-4, atol=1e-4)
