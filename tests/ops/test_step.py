"""The decode step: token by token it is the operator, in place, on the slots it is given and on no others.

The kernel runs on a GPU, or in Triton's interpreter (tests/conftest.py imports it there), which takes some 10 ms a
program: its cases are few and small.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from inputs import BOX, Case, errors, run, worst
from torch import Tensor
from torch.autograd import forward_ad
from transformers.cache_utils import Cache, LinearAttentionLayer

import osdn
from osdn.ops import dispatch

FREE = (0.0, float("inf"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
with patch.dict(os.environ, ON_CPU):
    LACKS = dispatch.why_not_triton(torch.empty(1, 1, 4, device=DEVICE))
needs_kernel = pytest.mark.skipif(bool(LACKS), reason=LACKS or "nothing lacks")
needs_gpu = pytest.mark.skipif(bool(LACKS) or DEVICE != "cuda", reason="needs a GPU and Triton")

# In blocks of V: one, two of which the second is part full, one of a wide key, two of 16.
SHAPES = [
    {"HV": 4},
    {"K": 60, "V": 100, "H": 1, "HV": 2},
    {"K": 100, "V": 24, "H": 1, "HV": 3, "qk_l2norm": True},
    {"K": 200, "V": 20, "B": 1, "eta": 40.0},
    {"K": 16, "V": 16, "qk_l2norm": True, "eta": 8.0},
]
CASES = [
    Case(T=16, decay=decay, feedback=feedback, forget=forget, box=box, **{"B": 2, "eta": 4.0, **shape})
    for (decay, feedback, forget, box), shape in zip(
        product([None, "scalar", "channel"], ["beta_free", "beta_aware"], [False, True], [FREE, BOX]), cycle(SHAPES)
    )
] + [Case(T=16, normalize_step=True, feedback=feedback, decay="scalar") for feedback in ("beta_free", "beta_aware")]
SMALL = [
    Case(T=12, B=1, H=1, HV=2, K=60, V=100, feedback="beta_aware", forget=True, box=BOX),
    Case(T=12, B=1, H=1, K=200, V=20, decay="channel", eta=40.0),
    Case(T=12, B=1, HV=4, K=16, V=16, decay="scalar", forget=True, qk_l2norm=True, eta=8.0),
    Case(T=12, B=1, decay="channel", feedback="beta_aware", normalize_step=True, box=BOX),
    Case(T=12, B=1, H=1, HV=3, decay="scalar", normalize_step=True),
]


def on_gpu(*values):
    return [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=needs_gpu) for x in values]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """backend="auto" is not to take it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def kernel(no_interpreter, monkeypatch):  # noqa: ARG001 (the order)
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_kernel)])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("kernel")
    return request.param


TOKENS = ("q", "k", "v", "beta", "g", "forget")


def to(x: dict[str, Tensor | None], what: torch.dtype | str) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.to(what) for n, t in x.items()}


def step(case: Case, x: dict[str, Tensor | None], state: osdn.DeltaState, backend: str, **kwargs) -> Tensor:
    """x: one token's."""
    return osdn.online_scaled_delta_step(
        *(x[n] for n in ("q", "k", "v", "beta")),
        state,
        g=x["g"],
        forget=x["forget"],
        backend=backend,
        **{"preconditioner": case.preconditioner, "qk_l2norm": case.qk_l2norm, **kwargs},
    )


def token(x: dict[str, Tensor | None], t: int) -> dict[str, Tensor | None]:
    return {n: None if x[n] is None else x[n][:, t] for n in TOKENS}


def decode(case: Case, x: dict[str, Tensor | None], backend: str) -> dict[str, Tensor]:
    """As `inputs.run`, one step per token; where S and d are is where they stay."""
    x = to(x, DEVICE if backend == "triton" else "cpu")
    state = osdn.DeltaState(x["S"].clone(), x["d"].clone())
    places = state.S.data_ptr(), state.d.data_ptr()
    o = torch.stack([step(case, token(x, t), state, backend) for t in range(case.T)], 1)
    assert (state.S.data_ptr(), state.d.data_ptr()) == places
    return {"o": o.cpu(), "S_T": state.S.cpu(), "d_T": state.d.cpu()}


def assert_as_exact_as_the_definition(case, x, got):
    """At most twice the definition's own error in the same dtype, and a floor of 4 ulp."""
    exact = run(case, to(x, torch.float64), "reference", grads=False)
    by_definition = errors(case, run(case, x, "reference", grads=False), exact)
    for name, error in errors(case, got, exact).items():
        floor = 4 * torch.finfo(got[name].dtype).eps
        assert (error <= 2 * by_definition[name].max() + floor).all(), (name, error, by_definition[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_is_the_operator(case):
    x = case.tensors()
    error, name = worst(errors(case, decode(case, x, "reference"), run(case, x, "reference", grads=False)))
    assert error < 1e-13, name


@needs_kernel
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in SMALL),
        (SMALL[2], torch.bfloat16),
        *on_gpu(*product(CASES, [torch.float32, torch.bfloat16])),
    ],
    ids=str,
)
def test_kernel_token_by_token_is_the_operator(case, dtype):
    x = case.tensors(dtype)
    assert_as_exact_as_the_definition(case, x, decode(case, x, "triton"))


@pytest.mark.parametrize("decay", [None, "channel"])
def test_no_preconditioner_is_d_of_one(backend, decay):
    case = Case(T=3, B=1, H=1, HV=2, K=20, V=40, decay=decay, eta=0.0)
    x = to(case.tensors(torch.float32), DEVICE if backend == "triton" else "cpu")
    plain, ones = osdn.DeltaState(x["S"].clone()), osdn.DeltaState(x["S"], torch.ones_like(x["d"]))
    for t in range(case.T):
        one = token(x, t)
        o = step(case, one, plain, backend, preconditioner=None)
        torch.testing.assert_close(o, step(case, one, ones, backend), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain.S, ones.S, rtol=1e-6, atol=1e-6)


def bits(x: Tensor) -> Tensor:
    """NaN equals itself."""
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


SLOTS = Case(
    T=14, B=3, H=1, K=20, V=20, decay="scalar", forget=True, feedback="beta_aware", box=BOX, qk_l2norm=True, eta=8.0
)


def assert_slots(case, backend, slot_dtype=torch.int64):
    """Up to three sequences in a pool of six, in another order at each token, each left out of a third of the tokens.

    States that are no sequence's and inputs of whoever is left out are NaN. The tensor of slots is strided.
    """
    x, gen = case.tensors(torch.float64 if backend == "reference" else torch.float32), torch.Generator().manual_seed(2)
    device, places = DEVICE if backend == "triton" else "cpu", torch.tensor([5, 0, 2])
    served = torch.rand(case.T, case.B, generator=gen) < 0.67
    places = places[: case.B]
    # Slot 0 lies behind another state, where a slot of -1 must not write.
    memory = [torch.full((7, *x[n].shape[1:]), torch.nan, dtype=x[n].dtype) for n in ("S", "d")]
    for name, y in zip(("S", "d"), memory):
        y[1 + places] = x[name]
    memory = [y.to(device) for y in memory]
    pool = osdn.DeltaState(*(y[1:] for y in memory))
    o = torch.empty_like(x["v"])
    for t in range(case.T):
        order = torch.randperm(case.B, generator=gen)
        slots = torch.where(served[t], places, -1)[order]
        one = {n: None if y is None else y[order].clone() for n, y in token(x, t).items()}
        for y in one.values():
            if y is not None:
                y[slots < 0] = torch.nan
        before = [y.clone() for y in memory]
        strided = torch.stack([slots, torch.full_like(slots, 3)], 1).to(device, slot_dtype)[:, 0]
        out = step(case, to(one, device), pool, backend, slots=strided).cpu()
        assert (out[slots < 0] == 0).all()
        o[order, t] = out
        others = sorted(set(range(7)) - set((1 + slots[slots >= 0]).tolist()))
        assert all(torch.equal(bits(was[others]), bits(now[others])) for was, now in zip(before, memory))
    for b, place in enumerate(places.tolist()):
        its, at, own = slice(b, b + 1), served[:, b], slice(place, place + 1)
        alone = {n: None if y is None else y[its] if n in ("S", "d") else y[its, at] for n, y in x.items()}
        got = {"o": o[its, at], "S_T": pool.S[own].cpu(), "d_T": pool.d[own].cpu()}
        assert_as_exact_as_the_definition(case, alone, got)


@pytest.mark.parametrize(
    ("decay", "forget", "slot_dtype"), [("scalar", True, torch.int32), ("channel", False, torch.int64)]
)
def test_slots(backend, decay, forget, slot_dtype):
    assert_slots(replace(SLOTS, HV=2, decay=decay, forget=forget), backend, slot_dtype)


def test_all_slots_may_be_skipped(backend):
    x = to(SLOTS.tensors(torch.float32), device := DEVICE if backend == "triton" else "cpu")
    state, skipped = osdn.DeltaState(x["S"], x["d"]), torch.full((SLOTS.B,), -1, device=device)
    before = state.clone()
    assert (step(SLOTS, token(x, 0), state, backend, slots=skipped) == 0).all()
    assert torch.equal(state.S, before.S)
    assert torch.equal(state.d, before.d)


GROUPED = replace(SLOTS, T=12, B=2, H=2, HV=4)
CHANNEL = replace(SLOTS, T=12, B=2, decay="channel", normalize_step=True, qk_l2norm=False, K=200, V=30, eta=40.0)
MUTANTS = {
    "read with the write key": ("total(tile, kx[:, None])", "total(tile, w[:, None])", SLOTS),
    "write with the read key": ("tile += w[:, None]", "tile += kx[:, None]", SLOTS),
    "residual on the undecayed state": (
        "            tile *= decay\n        r = vx - total(tile, kx[:, None])",
        "            r = vx - total(tile, kx[:, None])\n            tile *= decay",
        SLOTS,
    ),
    "output before the write": ("scale * total(tile,", "scale * total(tile - w[:, None] * (step * r),", SLOTS),
    "no scale": ("(scale * total(", "(total(", SLOTS),
    "no beta in the write": ("(step * r)[None, :]", "r[None, :]", SLOTS),
    "d after its own update": ("if DECAY == 1:", "w = after * kx\n    if DECAY == 1:", SLOTS),
    "d not stored": ("tl.store(at, after, i < K)", "tl.store(at, used, i < K)", SLOTS),
    "lambda dropped": ("kept = tl.exp(", "kept = used  # ", SLOTS),
    "residual against the forgotten d": (
        "        x = total(used, s)",
        "        if FORGET:\n            used *= tl.exp(tl.load(forget + b * HV + h))\n        x = total(used, s)",
        SLOTS,
    ),
    "aware without the inner beta": ("(1.0 - step * x)", "(1.0 - x)", SLOTS),
    "no lower clip": ("e * s, d_min, d_max)", "e * s, -1e9, d_max)", SLOTS),
    "no upper clip": ("e * s, d_min, d_max)", "e * s, d_min, 1e9)", SLOTS),
    "q as it comes": ("qx *= tl.rsqrt", "qx *= 1.0 + 0.0 * tl.rsqrt", SLOTS),
    "key heads in turn": ("hk = h // (HV // H)", "hk = h % H", GROUPED),
    "slot -1 taken for the last": ("    if slot < 0:", "    if slot < -1:", SLOTS),
    "slots ignored": ("slot = tl.load(slots + b)", "slot = 0 * tl.load(slots + b) + b", SLOTS),
    "slots taken for contiguous": ("    o = torch.empty(", '    rest["slots"] = slots\n    o = torch.empty(', SLOTS),
    "d of another head": ("at = d + (slot * HV + h)", "at = d + (slot * HV + h // 2)", GROUPED),
    "no normalised step": ("e = e / (", "e = e / (1.0 + 0.0 * ", CHANNEL),
    "decay of another channel": ("g + (b * HV + h) * K + i", "g + (b * HV + h) * K + (i + 1) % K", CHANNEL),
    "first block for all": ("(block + 1) * BV, (i < K)", "0, (i < K)", CHANNEL),
}


@needs_kernel
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_kernel_are_killed(name, monkeypatch, tmp_path):
    old, new, case = MUTANTS[name]
    spec = importlib.util.find_spec("osdn.ops.triton.recurrent")
    source = Path(spec.origin).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {spec.name}"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("osdn.ops.triton.recurrent_mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr("osdn.ops.triton.recurrent.delta_step", mutant.delta_step)
    with pytest.raises(AssertionError, match="assert"):
        assert_slots(case, "triton")


DECAYS = (None, "scalar", "channel")


@pytest.mark.parametrize(
    ("backend", "decay", "dtype"),
    [
        *product(["reference"], DECAYS, [torch.float64, torch.float32, torch.bfloat16]),
        pytest.param("triton", "scalar", torch.float32, marks=needs_kernel),
        *on_gpu(*product(["triton"], DECAYS, [torch.float32, torch.bfloat16])),
    ],
    indirect=["backend"],
)
def test_prefill_then_steps_is_one_pass(backend, decay, dtype):
    case = Case(T=20, B=1, H=1, K=16, decay=decay, forget=True, box=BOX, feedback="beta_aware", chunk_size=16, eta=8.0)
    x, cut = case.tensors(dtype), 17
    there = to(x, DEVICE if backend == "triton" else "cpu")
    first = {n: y if y is None or n in ("S", "d") else y[:, :cut] for n, y in there.items()}
    common = {"preconditioner": case.preconditioner, "qk_l2norm": case.qk_l2norm}
    before, state = osdn.online_scaled_delta_rule(
        *(first[n] for n in ("q", "k", "v", "beta")),
        g=first["g"],
        forget=first["forget"],
        initial_state=osdn.DeltaState(first["S"], first["d"]),
        output_final_state=True,
        chunk_size=case.chunk_size,
        backend="chunked" if backend == "reference" else "triton",
        **common,
    )
    state = state.clone()
    o = [before] + [step(case, token(there, t), state, backend)[:, None] for t in range(cut, case.T)]
    got = {"o": torch.cat(o, 1).cpu(), "S_T": state.S.cpu(), "d_T": state.d.cpu()}
    if dtype == torch.bfloat16 and backend == "triton":
        # The kernels of the prefill multiply in bf16.
        exact = run(case, to(x, torch.float64), "reference", grads=False)
        error, name = worst(errors(case, got, exact))
        assert error < 0.02, name
    else:
        assert_as_exact_as_the_definition(case, x, got)


def test_rows_may_lie_apart(backend):
    """q, k and v as the layer has them: parts of one row."""
    case = Case(T=1, B=3, K=20, V=24, HV=4, decay="scalar", forget=True)
    x = to(case.tensors(torch.float32), DEVICE if backend == "triton" else "cpu")
    one, state = token(x, 0), osdn.DeltaState(x["S"], x["d"])
    again = state.clone()
    sizes = [one[n][0].numel() for n in ("q", "k", "v")]
    row = torch.cat([one[n].flatten(1) for n in ("q", "k", "v")], 1)
    apart = {n: y.unflatten(1, one[n].shape[1:]) for n, y in zip(("q", "k", "v"), row.split(sizes, 1))}
    transposed = {n: y.mT.contiguous().mT for n, y in apart.items()}
    expected = step(case, one, state, backend)
    heads_apart = {n: torch.cat([one[n], one[n]], -1)[..., : one[n].shape[-1]] for n in apart}
    for other in (apart, {"k": apart["k"]}, transposed, heads_apart):
        now = again.clone()
        assert torch.equal(step(case, {**one, **other}, now, backend), expected)
        assert torch.equal(now.S, state.S)
        assert torch.equal(now.d, state.d)


def test_autocast_changes_nothing(backend):
    case = Case(T=1, K=20, V=24)
    x = to(case.tensors(torch.float32), device := DEVICE if backend == "triton" else "cpu")
    states = [osdn.DeltaState(x["S"].clone(), x["d"].clone()) for _ in range(2)]
    expected = step(case, token(x, 0), states[0], backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(step(case, token(x, 0), states[1], backend), expected)
    assert torch.equal(states[0].S, states[1].S)


def test_a_step_goes_on_from_any_state_that_a_call_returned():
    x = Case(T=9, K=4).tensors(torch.float32)
    q, k, v, beta = (x[n] for n in ("q", "k", "v", "beta"))
    start = osdn.DeltaState(x["S"].mT.contiguous().mT, x["d"])
    _, state = osdn.online_scaled_delta_rule(
        *(q, k, v, beta),
        preconditioner=osdn.Preconditioner(),
        initial_state=start,
        output_final_state=True,
        backend="chunked",
    )
    step(Case(T=1, K=4), token(x, 0), state, "reference")


def test_slots_are_checked_in_compiled_graphs():
    case = Case(T=1, K=4)
    x = case.tensors(torch.float32)
    compiled = torch.compile(
        lambda slots: step(case, token(x, 0), osdn.DeltaState(x["S"], x["d"]), "reference", slots=slots),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(torch.tensor([1, -1]))
    with pytest.raises(ValueError, match="slots: got values from -2 to 0, takes -1"):
        compiled(torch.tensor([-2, 0]))


def test_the_operator_is_one_to_pytorch(backend):
    """Schema, mutation and fake tensors; a compiled graph stays whole and steps in place."""
    case = Case(T=3, K=20, V=24, HV=4, decay="scalar", forget=True)
    x = to(case.tensors(torch.float32), device := DEVICE if backend == "triton" else "cpu")
    one, state = token(x, 0), osdn.DeltaState(x["S"], x["d"])
    where = torch.tensor([1, -1], device=device)
    tensors = (*one.values(), state.S.clone(), state.d.clone(), where)
    torch.library.opcheck(
        torch.ops.osdn.delta_step, (*tensors, 4.0, "beta_free", 0.0, float("inf"), False, 0.5, True, backend)
    )

    def f(one, S, d):
        return 2 * step(case, one, osdn.DeltaState(S, d), backend, slots=where)

    eager, whole = state.clone(), state.clone()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for t in range(case.T):
        assert torch.equal(compiled(token(x, t), whole.S, whole.d), f(token(x, t), eager.S, eager.d))
    assert torch.equal(whole.S, eager.S)
    assert torch.equal(whole.d, eager.d)
    assert not torch.equal(whole.d, state.d)


P = osdn.Preconditioner(feedback="beta_aware")


def call(**changes):
    B, H, K, V = 2, 2, 4, 3
    state = osdn.DeltaState(torch.randn(B, H, K, V), torch.rand(B, H, K))
    args = {
        "q": torch.randn(B, H, K),
        "k": torch.randn(B, H, K),
        "v": torch.randn(B, H, V),
        "beta": torch.rand(B, H),
        "state": state,
        "preconditioner": P,
    } | changes
    return osdn.online_scaled_delta_step(**args)


def states(S=(2, 2, 4, 3), d=(2, 2, 4), **kwargs):
    return osdn.DeltaState(torch.zeros(S, **kwargs), None if d is None else torch.zeros(d, **kwargs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 1, 2, 4)}, r"k: got \(2, 1, 2, 4\), takes shape \[B, H, K\] with every size >= 1"),
        ({"k": torch.ones(2, 2, 4, dtype=torch.int64)}, "k: got torch.int64, takes a floating dtype"),
        ({"q": torch.randn(2, 2, 3)}, r"q: got \(2, 2, 3\), takes the shape of k, \(2, 2, 4\)"),
        ({"q": torch.randn(2, 2, 4).bfloat16()}, "q: got torch.bfloat16, takes the dtype of k, torch.float32"),
        ({"v": torch.randn(2, 3, 3)}, r"v: got \(2, 3, 3\), takes shape \[2, HV, V\] with HV a multiple of 2"),
        ({"v": torch.randn(2, 2, 3).double()}, "v: got torch.float64"),
        ({"beta": torch.rand(2, 1)}, r"beta: got \(2, 1\), takes shape \[2, 2\]"),
        ({"beta": None}, "beta: got None, takes a torch.Tensor"),
        ({"beta": torch.rand(2, 2, device="meta")}, "beta: got meta, takes the device of k, cpu"),
        ({"g": torch.zeros(2, 2, 3)}, r"g: got \(2, 2, 3\), takes shape \[2, 2\] or shape \[2, 2, 4\]"),
        ({"g": 0.5}, "g: got float, takes a torch.Tensor"),
        ({"forget": torch.zeros(2, 2, 1)}, r"forget: got \(2, 2, 1\), takes shape \[2, 2\]"),
        ({"scale": torch.ones(2)}, "scale: got tensor"),
        ({"qk_l2norm": None}, "qk_l2norm: got None, takes True or False"),
        ({"preconditioner": {"eta": 1.0}}, "preconditioner: got dict, takes an osdn.Preconditioner or None"),
        ({"preconditioner": None}, "state.d: got a tensor, takes None where preconditioner is None"),
        (
            {"preconditioner": None, "state": states(d=None), "forget": torch.zeros(2, 2)},
            "forget: got a tensor, takes None where preconditioner is None",
        ),
        ({"state": torch.zeros(2, 2, 4, 3)}, "state: got Tensor, takes an osdn.DeltaState"),
        ({"state": osdn.DeltaState()}, "state.S: got None, takes a torch.Tensor$"),
        ({"state": osdn.DeltaState(torch.zeros(2, 2, 4, 3), 1.0)}, "state.d: got float, takes a torch.Tensor$"),
        ({"slots": [0, 1]}, "slots: got list, takes a torch.Tensor"),
        ({"state": states(d=None)}, "state.d: got None, takes a torch.Tensor"),
        ({"state": states(dtype=torch.bfloat16)}, "state.S: got torch.bfloat16 .* takes torch.float32"),
        ({"state": states(S=(3, 2, 4, 3))}, r"state.S: got .*\(3, 2, 4, 3\) on cpu, takes .*\(2, 2, 4, 3\)"),
        ({"state": states(S=(2, 2, 3, 4))}, r"state.S: got .*\(2, 2, 3, 4\)"),
        ({"state": states(d=(3, 2, 4)), "slots": torch.tensor([0, 1])}, r"state.d: got .*\(3, 2, 4\)"),
        (
            {"state": osdn.DeltaState(torch.zeros(2, 2, 3, 4).mT, torch.zeros(2, 2, 4))},
            r"state.S: got strides \(24, 12, 1, 4\), takes a contiguous tensor, to be updated in place",
        ),
        ({"slots": torch.tensor([0, 1, 1])}, r"slots: got torch.int64 \(3,\)"),
        ({"slots": torch.tensor([0.0, 1.0])}, r"slots: got torch.float32 .* takes int32 or int64 \(2,\)"),
        ({"slots": torch.tensor([0, 2])}, r"slots: got values from 0 to 2, takes -1 \(skipped\) or a slot below 2"),
        ({"slots": torch.tensor([0, -2])}, "slots: got values from -2 to 0"),
        ({"backend": "cuda"}, "backend: got 'cuda', takes one of"),
        ({"beta": torch.rand(2, 2, requires_grad=True)}, "beta: got a tensor that requires grad, takes one that does"),
        ({"state": states(requires_grad=True)}, "state.S: got a tensor that requires grad"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_refuses_a_tangent():
    with forward_ad.dual_level():
        q = forward_ad.make_dual(torch.randn(2, 2, 4), torch.randn(2, 2, 4))
        with pytest.raises(ValueError, match="q: got a tensor with a tangent, takes one without"):
            call(q=q)


def test_refuses_an_inference_state_outside_inference_mode():
    with torch.inference_mode():
        state = states()
        call(state=state)
    with pytest.raises(ValueError, match=r"state.S: got an inference tensor outside inference mode"):
        call(state=state)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_kernels_are_refused_on_cpu():
    state = states()
    with pytest.raises(ValueError, match="backend: 'triton' is not available, since"):
        call(backend="triton", state=state)
    assert (state.S == 0).all()


def test_without_gradients_recorded_any_tensor_will_do(backend):
    device = DEVICE if backend == "triton" else "cpu"
    parameters = [torch.rand(2, 2, 4, device=device, requires_grad=True) for _ in range(3)]
    beta, state = torch.rand(2, 2, device=device), states(S=(2, 2, 4, 4), device=device)
    with torch.no_grad():
        o = osdn.online_scaled_delta_step(*parameters, beta, state, preconditioner=P, backend=backend)
    assert not o.requires_grad
    assert (state.d != 0).all()


@pytest.mark.parametrize("part", ["S", "d"])
def test_autograd_sees_that_a_state_was_written_to(part, backend):
    device = DEVICE if backend == "triton" else "cpu"
    x, state = torch.rand(2, 2, 4, device=device), states((2, 2, 4, 4), device=device)
    saved = getattr(state, part)
    y = saved * torch.ones_like(saved).requires_grad_()
    osdn.online_scaled_delta_step(x, x, x, x[..., 0], state, preconditioner=P, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fake_and_meta_tensors_have_only_shapes(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.rand(2, 2, 4)
        step = partial(osdn.online_scaled_delta_step, x, x, x, x[..., 0], states((2, 2, 4, 4)), preconditioner=P)
        assert step(backend=backend).shape == x.shape
    x, slots = torch.empty(2, 2, 4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    state = states((3, 2, 4, 4), (3, 2, 4), device="meta")
    o = osdn.online_scaled_delta_step(x, x, x, x[..., 0], state, slots=slots, preconditioner=P)
    assert (o.shape, o.device.type) == (x.shape, "meta")


def test_backends_of_one_token(monkeypatch):
    """One token makes no chunk, so that a process told to use `chunked` decodes too."""
    expected = call(q=(q := torch.randn(2, 2, 4)), k=q, v=q, beta=q[..., 0].abs(), state=states((2, 2, 4, 4)))
    for set_by in ({"backend": "chunked"}, {"backend": "reference"}, {}):
        if not set_by:
            monkeypatch.setenv("OSDN_BACKEND", "chunked")
        o = call(q=q, k=q, v=q, beta=q[..., 0].abs(), state=states((2, 2, 4, 4)), **set_by)
        torch.testing.assert_close(o, expected)
    monkeypatch.setenv("OSDN_BACKEND", "fast")
    with pytest.raises(ValueError, match="OSDN_BACKEND: got 'fast', takes one of"):
        call()


def test_runs_on_the_meta_device():
    x = {n: torch.randn(2, 2, 4, device="meta") for n in ("q", "k", "v")}
    o = call(**x, beta=torch.rand(2, 2, device="meta"), state=states((2, 2, 4, 4), device="meta"))
    assert (o.shape, o.device.type) == ((2, 2, 4), "meta")


# ---- in the layer


@pytest.fixture(params=[*DECAYS, "plain"])
def layer_and_calls(request, monkeypatch):
    """A layer, and a list to which every step it takes adds its (S, d)."""
    torch.manual_seed(0)
    plain, decay = request.param == "plain", request.param if request.param in DECAYS[1:] else "none"
    options = None if plain else {"d_init": 0.4, "d_max": 2.0, "forget_bias": 2.0}
    layer = osdn.OnlineScaledDeltaNet(
        24, 2, 8, num_v_heads=4, expand_v=1.5, state_decay=decay, preconditioner=options, layer_idx=0
    )
    calls = []

    def spy(q, k, v, beta, state, **kwargs):
        calls.append(state)
        return osdn.online_scaled_delta_step(q, k, v, beta, state, **kwargs)

    monkeypatch.setattr("osdn.nn.layer.online_scaled_delta_step", spy)
    return layer.to(DEVICE), calls


one_layer = pytest.mark.parametrize("layer_and_calls", ["scalar"], indirect=True)


def new_cache():
    return Cache(layers=[LinearAttentionLayer(number_of_states=2)])


def held_states(cache):
    return [y for y in cache.layers[0].recurrent_states.values() if y is not None]


def test_the_layer_steps_the_cached_state(layer_and_calls):
    layer, calls = layer_and_calls
    x, cache = torch.randn(3, 9, 24, device=DEVICE), new_cache()
    with torch.no_grad():
        whole = layer(x)
        out = [layer(x[:, :5], past_key_values=cache)]
        held = held_states(cache)
        values = [y.clone() for y in held]
        out += [layer(x[:, t : t + 1], past_key_values=cache) for t in range(5, 9)]
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4
    assert len(held) == (1 if layer.preconditioner is None else 2)
    for i, (y, was) in enumerate(zip(held, values)):
        assert cache.layers[0].recurrent_states[i] is y
        assert all((state.S, state.d)[i] is y for state in calls)
        assert y.dtype == torch.float32
        assert not torch.equal(y, was)


@needs_kernel
def test_the_layer_steps_by_the_kernel(layer_and_calls, request):
    layer, calls = layer_and_calls
    x, cache = torch.randn(2, 6, 24, device=DEVICE), new_cache()
    with torch.no_grad():
        whole = layer(x)
        layer(x[:, :5], past_key_values=cache)
        request.getfixturevalue("kernel")
        layer.backend = "triton"
        last = layer(x[:, 5:], past_key_values=cache)
    assert len(calls) == 1
    torch.testing.assert_close(last, whole[:, 5:], rtol=1e-4, atol=1e-5)


@one_layer
def test_the_layer_steps_states_of_any_layout(layer_and_calls, monkeypatch):
    """The step takes contiguous ones, and a cache makes its tensors in the image of the first."""
    layer, calls = layer_and_calls

    def prefill(*args, **kwargs):
        o, state = osdn.online_scaled_delta_rule(*args, **kwargs)
        return o, osdn.DeltaState(*(y.mT.contiguous().mT for y in (state.S, state.d)))

    x, cache = torch.randn(2, 6, 24, device=DEVICE), new_cache()
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr("osdn.nn.layer.online_scaled_delta_rule", prefill)
        layer(x[:, :5], past_key_values=cache)
        last = layer(x[:, 5:], past_key_values=cache)
    assert len(calls) == 1
    torch.testing.assert_close(last, whole[:, 5:], rtol=1e-4, atol=1e-5)


@one_layer
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch 2.11's inductor
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_decoding_layer_compiles_to_one_graph(layer_and_calls, mode, monkeypatch):
    layer, _ = layer_and_calls
    monkeypatch.setattr("osdn.nn.layer.online_scaled_delta_step", osdn.online_scaled_delta_step)
    x, cache = torch.randn(2, 8, 24, device=DEVICE), new_cache()
    torch._dynamo.reset()
    with mode():
        whole = layer(x)
        layer(x[:, :5], past_key_values=cache)
        compiled = torch.compile(lambda x: layer(x, past_key_values=cache), fullgraph=True, backend="aot_eager")
        first = compiled(x[:, 5:6])
        with torch.compiler.set_stance("fail_on_recompile"):
            out = [first, *(compiled(x[:, t : t + 1]) for t in (6, 7))]
    torch.testing.assert_close(torch.cat(out, 1), whole[:, 5:], rtol=1e-4, atol=1e-5)


@one_layer
def test_where_the_layer_does_not_step(layer_and_calls):
    """Gradients, several tokens, a first token, padding: the operator, as before."""
    layer, calls = layer_and_calls
    x = torch.randn(2, 6, 24, device=DEVICE)
    cache = new_cache()
    y = layer(x[:, :1], past_key_values=cache)
    y = layer(x[:, 1:2], past_key_values=cache)
    y.sum().backward()
    with torch.no_grad():
        layer(x[:, 2:4], past_key_values=cache)
        layer(x[:, :1], past_key_values=new_cache())
        layer(x[:, 4:5], torch.tensor([[1], [0]], device=DEVICE), past_key_values=cache)
        assert not calls
        layer(x[:, 5:], torch.ones(2, 1, device=DEVICE), past_key_values=cache)
    assert len(calls) == 1


def test_a_snapshot_and_beams_keep_their_own_states(layer_and_calls):
    layer, calls = layer_and_calls
    x = torch.randn(2, 7, 24, device=DEVICE)
    cache = new_cache()
    with torch.no_grad():
        layer(x[:, :5], past_key_values=cache)
        first = held_states(cache)
        kept = [y.clone() for y in first]
        cache.reorder_cache(torch.tensor([1, 1], device=DEVICE))
        layer(x[:, 5:6].flip(0), past_key_values=cache)
        beam = layer(x[:, 6:], past_key_values=cache)
        alone = layer(torch.cat([x[1:, :5], x[:1, 5:6], x[1:, 6:]], 1))[:, -1:]
    assert len(calls) == 2
    torch.testing.assert_close(beam[1:], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, kept))


# ---- on a GPU


@needs_gpu
@one_layer
def test_a_decoding_layer_can_be_captured(layer_and_calls):
    layer, calls = layer_and_calls
    x, caches = torch.randn(2, 9, 24, device="cuda"), []
    with torch.no_grad():
        for _ in range(3):
            caches.append(new_cache())
            layer(x[:, :4], past_key_values=caches[-1])
        held = x[:, 4:5].clone()
        layer(held, past_key_values=caches[2])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(held, past_key_values=caches[0])
        for t in range(4, 9):
            held.copy_(x[:, t : t + 1])
            graph.replay()
            torch.testing.assert_close(out, layer(x[:, t : t + 1], past_key_values=caches[1]), rtol=1e-4, atol=1e-5)
    assert len(calls) == 7


@needs_gpu
@pytest.mark.parametrize("slots", [False, True])
def test_replays_of_a_cuda_graph_are_eager_steps(slots):
    case = Case(T=16, B=4, K=128, V=128, decay="scalar", forget=True, box=BOX)
    x = to(case.tensors(torch.bfloat16), "cuda")
    served = torch.rand(case.T, case.B, device="cuda") < 0.7
    places = torch.where(served, torch.tensor([5, 0, 6, 2], device="cuda"), -1)
    pool = [torch.full((7, *x[n].shape[1:]), torch.nan, device="cuda") for n in ("S", "d")]
    for y, n in zip(pool, ("S", "d")):
        y[[5, 0, 6, 2]] = x[n]
    eager = osdn.DeltaState(*pool) if slots else osdn.DeltaState(x["S"], x["d"])
    graphed = eager.clone()
    held, where = {n: None if y is None else y.clone() for n, y in token(x, 0).items()}, places[0].clone()
    step(case, held, eager.clone(), "triton", slots=where if slots else None)  # compiles, which a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(case, held, graphed, "triton", slots=where if slots else None)
    for t in range(case.T):
        for n, y in token(x, t).items():
            if y is not None:
                held[n].copy_(y)
        where.copy_(places[t])
        graph.replay()
        expected = step(case, token(x, t), eager, "triton", slots=places[t] if slots else None)
        assert torch.equal(out, expected)
        assert torch.equal(bits(graphed.S), bits(eager.S))
        assert torch.equal(bits(graphed.d), bits(eager.d))


@needs_gpu
def test_more_programs_than_a_second_grid_axis_has():
    case = Case(T=1, B=70_000, H=1, K=4, V=2)
    x = case.tensors(torch.float32)
    assert_as_exact_as_the_definition(case, x, decode(case, x, "triton"))


@needs_gpu
def test_states_past_two_to_the_31():
    case = Case(T=4, B=2, H=16, K=128, V=128, decay="scalar")
    slots = 2**31 // (16 * 128 * 128) + 3
    if torch.cuda.mem_get_info()[0] < 5 * slots * 16 * 128 * 128:
        pytest.skip("needs 11 GB")
    x = case.tensors(torch.float32)
    pool = osdn.DeltaState(torch.zeros(slots, 16, 128, 128, device="cuda"), torch.zeros(slots, 16, 128, device="cuda"))
    where = torch.tensor([slots - 1, 1], device="cuda")
    pool.S[where], pool.d[where] = x["S"].cuda(), x["d"].cuda()
    o = [step(case, to(token(x, t), "cuda"), pool, "triton", slots=where) for t in range(case.T)]
    got = {"o": torch.stack(o, 1).cpu(), "S_T": pool.S[where].cpu(), "d_T": pool.d[where].cpu()}
    assert_as_exact_as_the_definition(case, x, got)
    assert pool.S.count_nonzero() <= 2 * 16 * 128 * 128


@needs_gpu
def test_reruns_are_bitwise_equal():
    case = Case(T=1, B=64, H=16, K=16, V=16, decay="channel", forget=True)
    x = to(case.tensors(torch.bfloat16), "cuda")
    start = osdn.DeltaState(x["S"], x["d"])
    first = start.clone()
    o = step(case, token(x, 0), first, "triton")
    for _ in range(200):
        again = start.clone()
        assert torch.equal(step(case, token(x, 0), again, "triton"), o)
        assert torch.equal(again.S, first.S)
        assert torch.equal(again.d, first.d)
