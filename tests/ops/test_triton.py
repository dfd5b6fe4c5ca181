"""The Triton kernels against the definition: on a GPU, or in Triton's interpreter on CPU tensors (see conftest.py).

The interpreter takes about a second for each thousand tokens that a kernel walks through one by one, so what it runs is
small and dense; a GPU runs the same and more.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch
from bf16 import round_as_a_gpu
from inputs import BOX, OUTPUTS, Case, as_backend, errors, run, worst
from mutants import KERNEL_MUTANTS, mutate_kernels
from torch.utils.checkpoint import checkpoint

import osdn
from osdn.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LACKS = dispatch.why_not_triton(torch.empty(1, 1, 1, 4, device=DEVICE))
pytestmark = [
    pytest.mark.skipif(bool(LACKS), reason=LACKS or "nothing lacks"),
    # What a solve that overflows prints in the interpreter.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def bf16_as_on_a_gpu(monkeypatch):
    if DEVICE == "cpu" and not LACKS:
        round_as_a_gpu(monkeypatch)


FREE = (0.0, math.inf)
NONE = (-math.inf, math.inf)
SOME = (0.3, 1.8)

SMALL = [
    Case(T=50, B=1, H=1, feedback="beta_aware", forget=True, box=SOME, eta=2.0, chunk_size=16, seed=3),
    # Empty sequences, one whole chunk, one token; fewer chunks than programs; grouped heads; clips in every chunk.
    Case(lengths=(0, 16, 1, 0), H=1, HV=2, V=20, decay="scalar", box=BOX, chunk_size=16, qk_l2norm=True),
    Case(T=70, B=1, H=1, K=40, V=70, decay="channel", forget=True, feedback="beta_aware", qk_l2norm=True, box=NONE),
    Case(T=20, H=1, K=17, decay="channel", box=BOX, chunk_size=16, normalize_step=True, feedback="beta_aware"),
    Case(lengths=(20, 30), H=1, K=9, decay="scalar", forget=True, normalize_step=True, chunk_size=32, eta=1.0),
    Case(T=33, H=1, HV=2, K=16, V=16, decay="channel", plain=True, qk_l2norm=True, chunk_size=16),
    Case(T=70, B=1, H=1, plain=True),
]
DECAYS = (None, "scalar", "channel")
WIDE = Case(T=1000, H=2, HV=4, K=128, V=128, forget=True, qk_l2norm=True, eta=40.0)
PACKED = Case(lengths=(0, 300, 1, 64, 170, 0), K=100, V=60, decay="channel", forget=True, box=BOX, eta=30.0)
LARGE = [
    *(replace(WIDE, decay=decay) for decay in DECAYS),
    replace(WIDE, T=300, decay="scalar", box=(0.9, 1.1), chunk_size=32),
    replace(WIDE, T=127, decay="channel", chunk_size=16),
    *(replace(WIDE, T=500, decay=decay, forget=False, plain=True) for decay in DECAYS),
    *(
        Case(T=T, K=60, V=100, decay=decay, feedback="beta_aware", forget=True, box=BOX, eta=20.0)
        for T in (1, 2, 15, 63, 64, 65)
        for decay in DECAYS
    ),
    *(replace(PACKED, decay=decay) for decay in DECAYS),
    *(Case(T=200, B=1, K=256, V=256, decay=decay, eta=80.0, qk_l2norm=True) for decay in DECAYS),
    Case(T=200, K=128, V=64, normalize_step=True, decay="scalar", eta=40.0),
]
ON_GPU = [pytest.param(case, marks=gpu, id=str(case)) for case in LARGE]


def on_device(x):
    return {n: None if y is None else y.to(DEVICE) for n, y in x.items()}


def double(x):
    return {n: None if y is None else y.double() for n, y in x.items()}


def kernels(case, x, **kwargs):
    return {n: y.cpu() for n, y in run(case, on_device(x), "triton", **kwargs).items()}


def floor(case, dtype):
    """What an error may be where that of `chunked` happens to be small.

    fp32: 4 ulp; 16 with a state decay, whose gradient is a running sum of terms that cancel, most of all in short
    sequences, and whose factors exp(y) are relative to a token of the chunk and have an error of |y| ulp. A GPU is
    allowed three times that, since it makes a product of fp32 from three of tf32, drops the fourth, and truncates as it
    sums. fp16 is computed as fp32. bf16: 2 ulp, as the kernels round operands of products to 8 bits, several one after
    another, and `chunked` does not.
    """
    if dtype == torch.bfloat16:
        return 2 * torch.finfo(dtype).eps
    return (4 if case.decay is None else 16) * (3 if DEVICE == "cuda" else 1) * torch.finfo(torch.float32).eps


def bars(case, x):
    """The exact results, and what an error may be: twice that of `chunked`, and the floor.

    Results of a low precision are themselves rounded: 1 ulp more, since what `chunked` gets by luck is no bar. With a
    box, rounding decides whether a value next to a bound clips, which turns a gradient on or off: that happens to one
    in a million, and in large cases 1e-2 of the norm is allowed for it. There, float64 in chunks is exact enough.
    """
    large = case in LARGE
    exact, chunked = (
        {n: y.cpu() for n, y in run(case, on_device(y), backend).items()}
        for y, backend in ((double(x), "chunked" if large else "reference"), (x, "chunked"))
    )
    allowed = {}
    for n, error in errors(case, chunked, exact).items():
        ulp = torch.finfo(chunked[n].dtype).eps if chunked[n].dtype.itemsize == 2 else 0.0
        flips = 1e-2 if large and case.box != NONE and n.startswith("grad") else 0.0
        allowed[n] = 2 * error.max() + floor(case, x["q"].dtype) + ulp + flips
    return exact, allowed


def excess(case, got, exact, allowed):
    """The largest error, over all results, heads and sequences, in units of what is allowed; and whose it is."""
    return worst({n: e / allowed[n] for n, e in errors(case, got, exact).items()})


@pytest.mark.parametrize("case", [*SMALL, *ON_GPU], ids=str)
def test_matches_the_definition(case):
    x = case.tensors(torch.float32)
    over, name = excess(case, kernels(case, x), *bars(case, x))
    assert over <= 1, (name, over)


def in_segments(few, monkeypatch, module, tokens=1):
    """Have sequences of three chunks or more split, or none; into segments of that many tokens a channel."""
    calls = sys.modules[module.Call.__module__]
    for name, x in (("PROGRAMS", 64), ("CROWD", 1), ("SEGMENT", (tokens, tokens)), ("SEGMENTS", 3 if few else 1000)):
        monkeypatch.setattr(calls, name, x)
    return True


def chains(monkeypatch, module):
    """Filled whenever segments are composed."""
    found, chain = [], module.Call.chain
    monkeypatch.setattr(module.Call, "chain", lambda *args, **named: (found.append(1), chain(*args, **named))[1])
    return found


@pytest.mark.parametrize(
    ("B", "T", "H", "of_S", "of_d", "per_channel"),
    [
        *((8, 4096, 8, 1, 1, 0), (1, 4096, 8, 1, 1, 0), (1, 65536, 8, 16, 32, 0), (1, 8192, 16, 4, 5, 0)),
        *((1, 7616, 16, 4, 4, 0), (2, 8192, 16, 4, 5, 0), (2, 16384, 16, 4, 8, 0), (4, 8192, 16, 1, 1, 0)),
        *((4, 65536, 16, 1, 1, 0), (1, 4608, 16, 3, 3, 0), (1, 4544, 16, 1, 1, 0)),
        *((1, 8192, 16, 8, 8, 1), (1, 4096, 8, 4, 4, 1), (1, 3072, 16, 3, 3, 1), (1, 3040, 16, 1, 1, 1)),
    ],
)
def test_sequences_are_cut_into_segments_where_they_are_few_and_long(B, T, H, of_S, of_d, per_channel, monkeypatch):
    """Of 1,536 tokens at least, or 1,024 under a decay per channel, and at least three."""
    from osdn.ops.triton import call

    monkeypatch.setattr(call, "INTERPRETED", False)  # chunks as on a GPU
    k = torch.empty(B, T, H, 128, dtype=torch.bfloat16, device="meta")
    one = call.Call(k, H, 128, None, 64, bool(per_channel))
    segments = one.split, one.of_d().split
    assert segments == (of_S, of_d)


@pytest.mark.parametrize(("decay", "C"), [((), 64), ((128,), 32)])
def test_chunks_are_shorter_under_a_decay_per_channel(decay, C):
    from osdn.ops.triton import function

    x, gate = (torch.empty(1, 64, 2, *more, device="meta") for more in ((128,), ()))
    g = torch.empty(1, 64, 2, *decay, device="meta")
    parts = function._parts(*[x.bfloat16()] * 3, gate, g, None, None, False, [0.0] * 5, False, 1.0, 64)
    assert parts.call.C == C


# Of the second's sequences, some segments are empty.
SEGMENTED = [
    Case(T=41, B=1, H=1, K=8, forget=True, feedback="beta_aware", box=BOX, chunk_size=16),
    Case(lengths=(40, 0, 1, 100), H=1, HV=2, K=9, decay="channel", forget=True, chunk_size=16, qk_l2norm=True),
    Case(T=100, H=1, K=9, V=20, decay="scalar", box=BOX, chunk_size=32),
    Case(T=250, B=1, H=1, HV=2, K=72, V=4, forget=True, box=NONE, chunk_size=16, eta=30.0),  # maps in two blocks
]


WIDE_SEGMENTED = [
    *(replace(case, T=1000, K=60, eta=20.0) for case in (SEGMENTED[0], SEGMENTED[2])),
    *(replace(WIDE, decay=decay) for decay in DECAYS),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product(SEGMENTED, (torch.float32, torch.bfloat16)),
        *(pytest.param(case, x, marks=gpu) for case in WIDE_SEGMENTED for x in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_matches_the_definition_in_segments(case, dtype, monkeypatch):
    from osdn.ops.triton import function

    in_segments(True, monkeypatch, function)
    chained = chains(monkeypatch, function)
    x = case.tensors(dtype)
    over, name = excess(case, kernels(case, x), *bars(case, x))
    assert over <= 1, (name, over)
    assert chained


@pytest.mark.parametrize("kept", [1.0, 0.999, 0.7])
@pytest.mark.parametrize("down", [0.0, 0.5])
def test_no_clip_is_missed_by_the_bound_without_keys(kept, down):
    """Boxes a hundredth of what d runs through within all of it are never called roomy, and wide ones are."""
    from room import roomy_kernel

    N, K, C = 200, 8, 16
    gen = torch.Generator().manual_seed(0)
    d, s, step = (torch.rand(N, *n, generator=gen, dtype=torch.float64) for n in ((K,), (C, K), (C,)))
    step = torch.where(torch.rand(N, C, generator=gen) < down, -step, step) * 10 ** -torch.linspace(0, 3, N)[:, None]
    walk, decay = [d], kept ** (1 / C)
    for t in range(C):
        walk.append(decay * walk[-1] + step[:, t, None] * s[:, t])
    low, high = torch.stack(walk).amin((0, 2)), torch.stack(walk).amax((0, 2))
    for margin, least, most in ((-0.01, 0, 0), (1.0, 1, N)):
        wide = margin * (high - low)
        for bounds in ((low - wide, high + 1e9), (low - 1e9, high + wide)):
            x = (d, walk[-1], torch.full((N,), kept), step, s.amax(-1), torch.stack(bounds, 1))
            found = torch.zeros(N, dtype=torch.int32, device=DEVICE)
            roomy_kernel[(N,)](*(y.float().contiguous().to(DEVICE) for y in x), found, K=K, C=C)
            assert least <= found.sum() <= most


@pytest.mark.parametrize("alone", [False, True])
def test_second_derivatives_are_refused(alone):
    """Not taken for zero."""
    x = on_device(Case(T=5, B=1, H=1, K=4, V=3).tensors(torch.float32))
    k, p = x["k"].requires_grad_(), osdn.Preconditioner()
    if alone:
        y, _ = osdn.precondition(k, None, preconditioner=p, initial_d=x["d"], backend="triton")
    else:
        rest = {"preconditioner": p, "initial_state": osdn.DeltaState(None, x["d"]), "backend": "triton"}
        y, _ = osdn.online_scaled_delta_rule(x["q"], k, x["v"], x["beta"], **rest)
    (grad,) = torch.autograd.grad(y.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.square().sum().backward()


@pytest.mark.parametrize("decay", DECAYS)
def test_adjoint_of_the_state_may_be_held_transposed(decay, monkeypatch):
    from osdn.ops.triton import function, launch

    in_segments(True, monkeypatch, function)
    monkeypatch.setattr(launch, "_left", {})
    held = [{"BV": 16, "num_warps": 4, "STAGES": 2, "TURNED": 1}]
    for name in [n for n in launch.CONFIGS if n.startswith("delta_inter_bwd")]:
        monkeypatch.setitem(launch.CONFIGS, name, held)
    case = replace(SEGMENTED[0], decay=decay)
    x = case.tensors(torch.float32)
    over, name = excess(case, kernels(case, x), *bars(case, x))
    assert over <= 1, (name, over)


@pytest.mark.parametrize("of", ["S", "d"])
def test_gradients_reach_back_through_many_segments(of, monkeypatch):
    """In bf16, maps of segments are rounded. Of a slow channel nothing else tells how much comes through them all."""
    from osdn.ops.triton import function

    in_segments(True, monkeypatch, function)
    case = Case(T=256, B=1, H=1, K=8, V=4, forget=of == "d", plain=of == "S", chunk_size=16)
    x = case.tensors(torch.bfloat16) | {"beta": torch.full((1, 256, 1), 0.05)}
    x["k"][..., -1] *= 0.02
    if of == "d":
        x["forget"].fill_(math.log(0.999))
    found = {}
    for backend in ("triton", "chunked"):
        S, d = torch.ones(1, 1, 8, 4, device=DEVICE), torch.ones(1, 1, 8, device=DEVICE)
        start = (S if of == "S" else d).requires_grad_()
        _, state = osdn.online_scaled_delta_rule(
            **on_device({n: x[n] for n in ("q", "k", "v", "beta", "forget")}), chunk_size=16, backend=backend,
            preconditioner=None if of == "S" else osdn.Preconditioner(1e-3), output_final_state=True,
            initial_state=osdn.DeltaState(S, d if of == "d" else None),
        )  # fmt: skip
        (found[backend],) = torch.autograd.grad((state.S if of == "S" else state.d).sum(), start)
    # 2^-9 of what changes at all; as a map itself in bf16 it would be 5e-2.
    torch.testing.assert_close(found["triton"], found["chunked"], rtol=5e-3, atol=1e-3)


@pytest.fixture
def tails(monkeypatch):
    """By chunk, how many tokens were walked through: filled in by each pass over chunks."""
    from osdn.ops.triton import launch

    seen, plain = [], launch._run

    def spy(kernel, grid, arguments, config):
        plain(kernel, grid, arguments, config)
        if kernel.__name__ == "precondition_fwd_kernel":
            seen.append(arguments["tails"])

    monkeypatch.setattr(launch, "_run", spy)
    return lambda: seen[-1].flatten().tolist()


def tails_by_definition(case, x):
    """From the first token at which a clip fires to the end of its chunk, of one sequence and head."""
    k, beta, forget, d = (x[n].double() for n in ("k", "beta", "forget", "d"))
    p = case.preconditioner
    used, _ = osdn.precondition(k, beta, preconditioner=p, forget=forget, initial_d=d, backend="reference")
    s = k.square()
    e = beta * (1 - beta * (used * s).sum(-1))
    moved = forget.exp()[..., None] * used + p.eta * e[..., None] * s
    fired = ((moved < p.d_min) | (moved > p.d_max)).any(-1).flatten().split(case.chunk_size)
    return [case.chunk_size - int(x.nonzero()[0]) if x.any() else 0 for x in fired]


PARTLY = replace(SMALL[0], T=90, box=BOX, eta=4.0)
QUIET = 0.05


def partly(early, case=PARTLY, dtype=torch.float32):
    """Six chunks. No clip in the first two; or in the first by forgetting alone, and none behind the third."""
    x = case.tensors(dtype)
    x["d"].clamp_(0.9, 1.0)
    if early:
        x["k"][:, :16] = 0
        x["forget"][:, :16] = -0.1
        x["k"][:, 48:] = 0
        x["forget"][:, 48:] = 0
    else:
        x["forget"].mul_(1e-3)  # or d falls below the box by itself
        x["k"][:, :32] *= QUIET
    return x


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_walks_through_tokens_from_the_first_clip_on(few, early, monkeypatch, tails):
    from osdn.ops.triton import function

    in_segments(few, monkeypatch, function)
    x = partly(early)
    over, name = excess(PARTLY, kernels(PARTLY, x), *bars(PARTLY, x))
    assert over <= 1, (name, over)
    found = tails()
    assert found == tails_by_definition(PARTLY, x)
    assert [n > 0 for n in found] == ([True] * 3 + [False] * 3 if early else [False] * 2 + [True] * 4)
    assert any(0 < n < 16 for n in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [None, "scalar"])
@pytest.mark.parametrize(("t", "behind"), [(8, False), (24, False), (24, True)])
def test_a_suffix_that_clips_leaves_the_prefix_bitwise_alone(t, behind, decay, dtype, tails):
    """In the first chunk, in the first of those that are not sure to stay in the box, or behind one in which d clips.

    Not under a decay per channel: how a chunk is multiplied then depends on the strongest decay in it.
    """
    case = replace(PARTLY, decay=decay)
    x = partly(False, case, dtype)
    if behind:
        x["forget"][:, :16] = -0.1
        x["forget"][:, 16:32] = 0

    def results():
        k, beta, forget, d = (on_device(x)[n] for n in ("k", "beta", "forget", "d"))
        own = {"preconditioner": case.preconditioner, "forget": forget, "initial_d": d, "backend": "triton"}
        return osdn.precondition(k, beta, **own)[0].cpu(), kernels(case, x, grads=False)["o"], tails()

    d, o, before = results()
    x["k"][:, t : t + 8] /= QUIET
    other_d, other_o, after = results()
    chunk = t // 16
    assert (before[0] > 0, before[chunk] > 0, after[chunk] > 0) == (behind, False, True)
    assert torch.equal(o[:, :t], other_o[:, :t])
    assert torch.equal(d[:, : t + 1], other_d[:, : t + 1])
    assert not torch.equal(o[:, t:], other_o[:, t:])


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (SMALL[2], torch.float16),
        # Of one token, the gradient of beta is a number, in which v and S^T k may cancel.
        *((case, torch.bfloat16) for case in SMALL if 1 not in (case.lengths or ())),
        *(pytest.param(case, torch.bfloat16, marks=gpu) for case in LARGE if case.T > 1),
        *(pytest.param(case, torch.float16, marks=gpu) for case in LARGE[:3]),
    ],
    ids=str,
)
def test_matches_the_definition_in_low_precision(case, dtype):
    x = case.tensors(dtype)
    over, name = excess(case, kernels(case, x), *bars(case, x))
    assert over <= 1, (name, over)


def rule(case, x, backend, beta=True):
    """The preconditioner alone: d of each token, d at the end, and gradients."""
    names = [n for n in ("k", "beta", "forget", "d") if x[n] is not None and (beta or n != "beta")]
    leaves = {n: x[n].clone().requires_grad_() for n in names}
    d, d_T = osdn.precondition(
        leaves["k"],
        leaves.get("beta"),
        preconditioner=case.preconditioner,
        forget=leaves.get("forget"),
        initial_d=leaves["d"],
        cu_seqlens=case.cu_seqlens,
        backend=backend,
    )
    gen = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y)).sum() for y in (d, d_T))
    grads = dict(zip([f"grad {n}" for n in names], torch.autograd.grad(loss, list(leaves.values()))))
    return {n: y.detach().cpu() for n, y in {"d": d, "d_T": d_T, **grads}.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(T=66, B=1, H=1, feedback="beta_aware", forget=True, box=BOX, normalize_step=True),
        Case(lengths=(0, 23, 1, 64, 0), H=1, K=17, box=NONE, forget=True),
        *(
            pytest.param(Case(T=T, K=K, feedback=feedback, forget=True, box=BOX, eta=K / 4), marks=gpu)
            for T in (1, 65, 1000)
            for K in (60, 128, 256)
            for feedback in ("beta_free", "beta_aware")
        ),
    ],
    ids=str,
)
def test_precondition_alone(case):
    x = case.tensors(torch.float32)
    beta = case.feedback == "beta_aware"
    exact = rule(case, double(x), "reference", beta)
    chunked = errors(case, rule(case, x, "chunked", beta), exact)
    got = errors(case, rule(case, on_device(x), "triton", beta), exact)
    # As in `bars`: at K = 128, one value lies 4e-8 from a bound where T = 65, twelve up to 7e-7 where T = 1000. One of
    # these, 1.6e-7 away, turns beta's gradient by 1.93e-2, which a GPU shows; each of the others any gradient by 5e-3.
    flip = 0.0 if case.K < 60 else 1e-2 if case.T < 1000 else 2.5e-2
    flips = {n: flip if n.startswith("grad") else 0.0 for n in got}
    over, name = worst({n: e / (2 * chunked[n].max() + floor(case, torch.float32) + flips[n]) for n, e in got.items()})
    assert over <= 1, (name, over)


@pytest.mark.parametrize(
    ("decay", "wipe"), [*product(("scalar", "channel"), (-8e6, -1e30)), ("scalar", -math.inf)], ids=str
)
def test_sums_of_decays_do_not_cancel(decay, wipe):
    """A wipe must not cost the mild decays around it any digit; nor the gradients, which stay finite."""
    case = Case(T=40, B=1, H=1, decay=decay, forget=True, chunk_size=32, box=NONE, feedback="beta_aware")
    x = case.tensors(torch.float32)
    x["g"][:, 5], x["forget"][:, 20] = wipe, wipe
    over, name = excess(case, kernels(case, x), *bars(case, x))
    assert over <= 1, (name, over)


@pytest.mark.parametrize("factor", [1.0, 1e20])
def test_a_step_so_large_that_the_solve_overflows(factor):
    """There d is the box's doing alone, in each backend; also where a key is so large that its error is infinite."""
    case = Case(T=40, B=1, H=1, eta=1e20, box=BOX, forget=True)
    x = case.tensors(torch.float32)
    x["k"][:, 5] *= factor
    got, want = (rule(case, y, backend, beta=False)["d"] for y, backend in ((on_device(x), "triton"), (x, "reference")))
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("eta", "others", "large"), [(1e20, 0.0, 1e9), (0.1, 0.1, 1e20)])
def test_a_step_that_overflows_changes_nothing_before_it(eta, others, large, tokens):
    """By errors that are finite; of two such tokens, NaN as the solve has them, from their block of 16 tokens on."""
    case = Case(T=40, B=1, H=1, K=4, eta=eta, box=BOX)
    x = case.tensors(torch.float32)
    x["d"].clamp_(0.9, 1.0)
    x["k"] *= others
    x["k"][:, 20 : 20 + tokens] = large
    got, want = (rule(case, y, backend, beta=False)["d"] for y, backend in ((on_device(x), "triton"), (x, "reference")))
    # A sum over up to 20 tokens in another order.
    torch.testing.assert_close(got.cpu(), want, rtol=4e-6, atol=0)


def test_d_behind_a_chunk_is_not_out_of_the_box_by_a_rounding():
    """With K = 1, d comes to 1 from below, which is the bound here, and no update takes it any further."""
    k, d = torch.ones(1, 48, 4, 1), torch.rand(1, 4, 1, generator=torch.Generator().manual_seed(0))
    p = osdn.Preconditioner(0.7, d_max=1.0)
    _, d_T = osdn.precondition(k.to(DEVICE), None, preconditioner=p, initial_d=d.to(DEVICE), backend="triton")
    assert d_T.max() <= 1


def test_an_infinite_step_stays_among_the_channels_there_are():
    """K is no power of two: a step of inf times 0 in a lane beyond K is not to reach the products over K."""
    case = Case(T=20, B=1, H=1, eta=1e30, box=BOX, chunk_size=16)
    x = case.tensors(torch.float32)
    x["k"][:, 5] *= 1e5
    exact = run(case, double(x), "reference")
    # The gradient of k at that token is 0 times infinity in float32 by the definition, too.
    del exact["grad k"]
    got, plain = (errors(case, y, exact) for y in (kernels(case, x), run(case, x, "reference")))
    over, name = worst({n: e / (2 * plain[n].max() + floor(case, torch.float32)) for n, e in got.items()})
    assert over <= 1, (name, over)


def test_without_a_box_d_may_grow_by_more_than_fp16_holds():
    """M in fp16 would overflow, in chunks that nothing walks through."""
    case = Case(T=20, B=1, H=1, K=8, eta=40.0, box=NONE, forget=True, chunk_size=16)
    x = case.tensors(torch.bfloat16)
    exact, chunked = (run(case, y, b, grads=False) for y, b in ((double(x), "reference"), (x, "chunked")))
    assert exact["d_T"].abs().max() > 1e6
    got, bar = (errors(case, y, exact)["d_T"].max() for y in (kernels(case, x, grads=False), chunked))
    # On a GPU the solve is of tf32 products, whose error grows as d does: that it is a number is all to be seen there.
    assert got <= 2 * bar + (0.1 if DEVICE == "cuda" else floor(case, torch.float32))


def test_maps_of_segments_may_grow_by_more_than_fp16_holds(monkeypatch):
    """From d = 1 and with keys of length 1 d stays where it is, and no clip fires, however unstable the rule is."""
    from osdn.ops.triton import function

    in_segments(True, monkeypatch, function)
    x = Case(T=128, B=1, H=1, K=8, qk_l2norm=True, eta=0.0, seed=0).tensors(torch.bfloat16)
    gen = torch.Generator().manual_seed(1)
    x |= {n: torch.randn(1, 128, 1, 8, generator=gen).bfloat16() for n in ("q", "k")}
    x["d"].fill_(1.0)
    found = kernels(Case(eta=20.0, box=(0.0, 2.0), qk_l2norm=True, chunk_size=16), x)
    assert [n for n, y in found.items() if not y.isfinite().all()] == []


def test_ints_reach_the_kernels_as_floats(monkeypatch):
    """Triton compiles a kernel anew for an int that is 1 or a multiple of 16."""
    from osdn.ops.triton import launch

    seen = set()
    monkeypatch.setattr(launch, "_run", lambda _kernel, _grid, arguments, _config: seen.add(type(arguments.get("eta"))))
    x = Case(T=5).tensors(torch.float32)
    run(Case(T=5, eta=1), on_device(x), "triton")
    rule(Case(T=5, eta=1), on_device(x), "triton")
    assert seen - {type(None)} == {float}


@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_steps_are_the_recurrence(decay):
    """The kernel of decoding; test_step.py has more of it."""
    case = Case(T=5, K=20, V=24, B=2, H=1, HV=2, decay=decay, forget=True, box=BOX, feedback="beta_aware")
    x = case.tensors(torch.float32)
    want = run(case, double(x), "reference", grads=False)
    one = on_device(x)
    state = osdn.DeltaState(one.pop("S"), one.pop("d"))
    o = [
        osdn.online_scaled_delta_step(
            **{n: None if y is None else y[:, t] for n, y in one.items()},
            state=state,
            preconditioner=case.preconditioner,
            qk_l2norm=False,
            backend="triton",
        )
        for t in range(case.T)
    ]
    got = dict(zip(OUTPUTS, (torch.stack(o, 1).cpu(), state.S.cpu(), state.d.cpu())))
    # 4 ulp: five tokens, of one rounding each that counts.
    over, name = worst(errors(case, got, want))
    assert over < 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(0, 16, 1, 0), H=1, decay="channel", forget=True, box=BOX, chunk_size=16),
        pytest.param(PACKED, marks=gpu),
    ],
    ids=str,
)
def test_reads_no_uninitialised_memory(case):
    """`torch.empty` filled with NaN: the same bits come out."""
    x = case.tensors(torch.float32)
    plain = kernels(case, x)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3, device=DEVICE).isnan().all()
        poisoned = kernels(case, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(y.isfinite().all() for y in plain.values())
    assert [n for n in plain if not torch.equal(plain[n], poisoned[n])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "its kernels compute in float32 and the inputs are float64"),
        ({"K": 257}, "its kernels take head dimensions up to 256 and K = 257"),
    ],
    ids=str,
)
def test_refuses_what_the_kernels_do_not_take(change, message):
    size = {"K": 4, "V": 4, "dtype": torch.float32, **change}
    q, v = (torch.zeros(1, 2, 1, size[n], dtype=size["dtype"], device=DEVICE) for n in ("K", "V"))
    with pytest.raises(ValueError, match=f"'triton' is not available, since {message}; 'chunked' runs"):
        osdn.online_scaled_delta_rule(q, q, v, q[..., 0], preconditioner=None, backend="triton")


def test_refuses_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="since the tensors are on cpu and its kernels run on GPUs; 'chunked' runs"):
        osdn.online_scaled_delta_rule(q, q, q, q[..., 0], preconditioner=None, backend="triton")
    with pytest.raises(ValueError, match="since the tensors are on cpu and its kernels run on GPUs; 'chunked' runs"):
        osdn.precondition(q, None, preconditioner=osdn.Preconditioner(), initial_d=q[:, 0], backend="triton")


# Without a box, clipped at one end, at both, and early, all but one in segments; and a whole chunk, keys normalised.
# They run every line a mutant changes.
DISCRIMINATING = [
    Case(T=60, B=1, H=1, K=8, decay="scalar", forget=True, feedback="beta_aware", box=NONE, chunk_size=16),
    Case(T=16, B=1, H=1, K=8, decay="channel", forget=True, box=(-math.inf, 1.0), chunk_size=16),
    SEGMENTED[0],
    PARTLY,
    replace(PARTLY, seed=7),
    Case(T=50, B=1, H=1, K=8, forget=True, qk_l2norm=True, box=NONE, chunk_size=64, eta=4.0),
]


@cache
def discriminating(n):
    case = DISCRIMINATING[n]
    x = partly(case is PARTLY, case) if case.T == PARTLY.T else case.tensors(torch.float32)
    return case, x, *bars(case, x)


def holds(module, monkeypatch):
    as_backend(monkeypatch, "triton", module)
    # The fourth and fifth in segments of two chunks.
    cases = range(len(DISCRIMINATING))
    found = (discriminating(n) for n in cases if in_segments(n != 1, monkeypatch, module, 2 if n in (3, 4) else 1))
    torch.use_deterministic_algorithms(True)  # memory that was never written holds NaN, not what the last call left
    try:
        return all(excess(case, kernels(case, x), exact, allowed)[0] <= 1 for case, x, exact, allowed in found)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: there, an edit costs no compilation")
@pytest.mark.parametrize("name", [None, *KERNEL_MUTANTS])
def test_mutant_is_killed(name, tmp_path, monkeypatch):
    assert holds(mutate_kernels(KERNEL_MUTANTS.get(name), tmp_path), monkeypatch) == (name is None)


@pytest.mark.parametrize(("B", "T", "H"), [(2, 512, 2), (1, 16384, 2)], ids=["whole", "in segments"])
def test_saves_little_more_than_the_plain_delta_rule(B, T, H, monkeypatch):
    """Beside the inputs, which live on anyway, flash-linear-attention's `chunk_delta_rule` keeps T, and q and k again,
    normalised, with norms."""
    from osdn.ops.triton import call, launch

    monkeypatch.setattr(call, "INTERPRETED", False)  # chunks as on a GPU: nothing runs
    monkeypatch.setattr(launch, "_run", lambda *_: None)
    K = 128
    q, k, v = (torch.zeros(B, T, H, K, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(3))
    beta, forget = (torch.zeros(B, T, H, device=DEVICE, requires_grad=True) for _ in range(2))
    state = osdn.DeltaState(torch.zeros(B, H, K, K, device=DEVICE), torch.ones(B, H, K, device=DEVICE))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.setdefault(y.data_ptr(), y), lambda y: y):
        p = osdn.Preconditioner(d_max=2.0)
        osdn.online_scaled_delta_rule(
            q, k, v, beta, forget=forget, preconditioner=p, initial_state=state, backend="triton"
        )
    theirs = q.nbytes + k.nbytes + B * T * H * (2 * 4 + 64 * 2)
    inputs = {y.data_ptr() for y in (q, k, v, beta, forget, state.S, state.d)}
    assert sum(y.nbytes for at, y in kept.items() if at not in inputs) <= 1.15 * theirs


@pytest.mark.parametrize("few", [False, True])
def test_operators_are_what_pytorch_expects(few, monkeypatch):
    """Shapes, dtypes and layouts are told without running, as PyTorch's own checker finds."""
    from osdn.ops.triton import function

    in_segments(few, monkeypatch, function)
    lengths = (40 if few else 3,)
    case = Case(lengths=lengths, H=1, HV=2, decay="scalar", forget=True, feedback="beta_aware", box=NONE, chunk_size=16)
    x = on_device(case.tensors(torch.float32))
    calls, plain = {}, torch.library.CustomOpDef.__call__
    monkeypatch.setattr(
        torch.library.CustomOpDef, "__call__", lambda op, *args: (calls.setdefault(op, args), plain(op, *args))[1]
    )
    eager = run(case, x, "triton")
    # Operators are for compiled graphs. `is_compiling` itself stays: dynamo, maybe imported only now, knows it by
    # identity, and would refuse it in all later tests.
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    whole = run(case, x, "triton")
    assert all(torch.equal(eager[n], whole[n]) for n in eager)
    rule(case, x | {"k": x["k"].repeat_interleave(2, 2)}, "triton")
    monkeypatch.undo()
    in_segments(few, monkeypatch, function)
    assert len(calls) == 4
    for op, args in calls.items():
        torch.library.opcheck(op, args, test_utils="test_faketensor")


def test_activations_may_be_recomputed():
    """As `osdn train --checkpoint-activations` does, by checkpointing that is not reentrant."""
    case = Case(T=20, B=1, H=1, decay="scalar", forget=True, feedback="beta_aware", chunk_size=16)
    x = {n: y.requires_grad_() for n, y in on_device(case.tensors(torch.float32)).items()}

    def f(q, k, v, beta, g, forget, S, d):
        options = {"forget": forget, "preconditioner": case.preconditioner, "backend": "triton"}
        o, _ = osdn.online_scaled_delta_rule(q, k, v, beta, g=g, initial_state=osdn.DeltaState(S, d), **options)
        used, _ = osdn.precondition(k, beta, initial_d=d, **options)
        return o.sum() + used.sum()

    again = checkpoint(partial(f, **x), use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(loss, list(x.values())) for loss in (f(**x), again))):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch 2.11's inductor
def test_compile_keeps_the_graph_whole():
    case = Case(T=20, B=1, H=1, decay="scalar", forget=True, feedback="beta_aware", chunk_size=16)
    x = {n: y.requires_grad_() for n, y in on_device(case.tensors(torch.float32)).items()}

    def f(q, k, v, beta, g, forget, S, d):
        o, state = osdn.online_scaled_delta_rule(
            *(q, k, v, beta),
            g=g,
            forget=forget,
            preconditioner=case.preconditioner,
            initial_state=osdn.DeltaState(S, d),
            output_final_state=True,
            backend="triton",
        )
        return o.sum() + state.S.sum() + state.d.sum()

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for a, b in zip(*(torch.autograd.grad(call(**x), list(x.values())) for call in (f, compiled))):
        assert torch.equal(a, b)


# ---- what only a GPU shows


@gpu
@pytest.mark.parametrize("case", [LARGE[2], PACKED], ids=str)
def test_reruns_are_bitwise_equal(case):
    x = on_device(case.tensors(torch.bfloat16))
    first = run(case, x, "triton")
    for _ in range(100):
        again = run(case, x, "triton")
        assert [n for n in first if not torch.equal(first[n], again[n])] == []


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_config_gives_the_result(decay, dtype, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from osdn.ops.triton import function, launch

    case = replace(WIDE, T=400, decay=decay)
    x = case.tensors(dtype)
    chained = chains(monkeypatch, function)
    exact, allowed = bars(case, x)
    since = launch.capability(torch.device(DEVICE))
    for name, configs in launch.CONFIGS.items():
        segments = name.startswith(("chain", "precondition_map"))
        in_segments(segments, monkeypatch, function)
        chained.clear()
        for n, config in enumerate(configs):
            if dtype != torch.bfloat16 and not {"PROGRAMS", "BF16", "FULL"}.isdisjoint(config):
                continue  # not for fp32
            if not launch.serves(config, since):
                continue  # not for this GPU
            monkeypatch.setitem(launch.CONFIGS, name, [config])
            monkeypatch.setattr(launch, "_left", {})
            try:
                got = kernels(case, x)
            except OutOfResources:
                assert n < len(configs) - 1, (name, config)  # the last one is to fit everywhere
                continue
            over, what = excess(case, got, exact, allowed)
            assert over <= 1, (name, config, what, over)
            assert bool(chained) == segments
        monkeypatch.setitem(launch.CONFIGS, name, configs)


def test_every_config_is_of_a_kernel_there_is():
    from osdn.ops.triton import conv, delta, launch, precondition, recurrent, shared

    modules = (conv, delta, precondition, recurrent, shared)
    names = {n for module in modules for n in vars(module) if n.endswith("_kernel")}
    names |= {
        f"{n}, {constant}" for n in names for constant in ("V = 1", "WALK = True", *(f"DECAY = {d}" for d in range(3)))
    }
    assert set(launch.CONFIGS) <= names


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_products_and_sums_are_fused_whatever_the_default_of_triton(target, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from osdn.ops.triton.launch import CONFIGS, options

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    backend = make_backend(GPUTarget(*target))
    configs = [config for found in CONFIGS.values() for config in found]
    assert all(backend.parse_options(options(config)).enable_fp_fusion for config in configs)


def test_blocks_are_as_wide_as_what_they_split():
    from osdn.ops.triton.launch import configs

    maps = (configs("precondition_map_kernel", {"K": K, "BK": max(16, K)}, since=90)[0]["BV"] for K in (8, 128))
    assert list(maps) == [16, 64]


@pytest.mark.parametrize(
    ("K", "dtype", "since", "blocks"),
    [(128, "bfloat16", 90, (128, 64)), (100, "bfloat16", 90, (16, 64)), (128, "float32", 90, (16, 16)),
     (128, "bfloat16", 100, (128, 32)), (128, "bfloat16", 80, (32, 32))],
)  # fmt: skip
def test_what_takes_more_registers_has_narrower_blocks(K, dtype, since, blocks):
    import triton.language as tl

    from osdn.ops.triton.launch import configs

    arguments = {"K": K, "V": K, "BK": 128, "DT": getattr(tl, dtype), "DECAY": 0}
    intra, inter = (configs(f"delta_{n}_bwd_kernel", arguments, since) for n in ("intra", "inter"))
    few = next(config for config in inter if "PROGRAMS" not in config)
    assert (intra[0]["BB"], few["BV"]) == blocks


@pytest.mark.parametrize(
    ("K", "dtype", "capability", "chunk"),
    [(128, torch.bfloat16, 90, 64), (64, torch.float32, 90, 64), (128, torch.bfloat16, 80, 32),
     (256, torch.bfloat16, 90, 32), (65, torch.float32, 90, 16), (256, torch.float16, 90, 16)],
)  # fmt: skip
def test_what_takes_more_registers_has_shorter_chunks(K, dtype, capability, chunk, monkeypatch):
    from osdn.ops.triton import call

    monkeypatch.setattr(call, "INTERPRETED", False)
    monkeypatch.setattr(call, "capability", lambda _: capability)
    found = call.Call(torch.empty(1, 1, 1, K, dtype=dtype), HV=1, V=K, cu_seqlens=None, chunk_size=64)
    assert chunk == found.C


def test_configs_follow_the_number_of_programs_and_what_the_device_refuses(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from osdn.ops.triton import call, launch

    taken, refused = [], set()

    def run(kernel, _grid, _arguments, config):
        if kernel.__name__ == "delta_inter_fwd_kernel":
            taken.append(config["BV"])
            if config["BV"] in refused:
                raise OutOfResources(2, 1, "shared memory")

    def found(B, K=128):
        taken.clear()
        x = Case(T=16, B=B, H=2, K=K, V=128, plain=True).tensors(torch.bfloat16)
        x = {n: x[n].to(DEVICE) for n in ("q", "k", "v", "beta")}
        osdn.online_scaled_delta_rule(**x, preconditioner=None, backend="triton")
        return taken

    monkeypatch.setattr(call, "INTERPRETED", False)  # as on a GPU: nothing runs
    monkeypatch.setattr(launch, "_run", run)
    monkeypatch.setattr(launch, "capability", lambda _: 90)
    monkeypatch.setattr(launch, "_left", {})
    assert found(B=64) == [128]
    assert found(B=2) == [64]
    assert found(B=64, K=64) == [64]
    refused |= {128, 64}
    assert found(B=64) == [128, 64, 64, 32]
    assert found(B=64) == [32]


def test_bounds_of_sequences_may_be_a_view():
    case = Case(lengths=(7, 10, 20), H=1, K=8, chunk_size=16)
    k = on_device(case.tensors(torch.float32))["k"]
    apart = torch.stack([case.cu_seqlens, case.cu_seqlens + 99], 1)[:, 0]
    rule = {"preconditioner": osdn.Preconditioner(), "initial_d": k.new_zeros(3, 1, 8), "backend": "triton"}
    found = [osdn.precondition(k, None, cu_seqlens=bounds, **rule)[0] for bounds in (case.cu_seqlens, apart)]
    assert torch.equal(*found)


@gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("B", "T", "K", "V"), [(4097, 4096, 128, 16), (70_000, 16, 16, 16)])
def test_many_elements_and_many_programs(B, T, K, V, packed, monkeypatch):
    """Past 2^31 elements, and past the 65,535 programs of a grid's second axis: the last row is as it is alone."""
    from osdn.ops.triton import function

    in_segments(False, monkeypatch, function)  # alone it would be cut up, and rounded otherwise
    torch.cuda.empty_cache()
    gen = torch.Generator(DEVICE).manual_seed(0)
    shape = (1, B * T) if packed else (B, T)
    x = {
        n: torch.randn(*shape, 1, size, generator=gen, device=DEVICE, dtype=torch.bfloat16)
        for n, size in (("q", K), ("k", K), ("v", V))
    } | {"beta": torch.rand(*shape, 1, generator=gen, device=DEVICE)}
    assert x["k"].numel() > 2**31 or B > 65535

    def results(x, bounds):
        leaves = [y.requires_grad_() for y in x.values()]
        o, _ = osdn.online_scaled_delta_rule(
            *leaves,
            preconditioner=osdn.Preconditioner(20.0, "beta_aware", 0.5, 1.5),
            cu_seqlens=bounds,
            backend="triton",
        )
        grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
        return [y.flatten(0, 1)[-T:].clone() for y in (o, *grads)]

    bounds = torch.arange(0, B * T + 1, T) if packed else None
    alone = {n: y.detach().flatten(0, 1)[-T:].clone()[None] for n, y in x.items()}
    whole = results(x, bounds)
    assert all(torch.equal(a, b) for a, b in zip(whole, results(alone, None if bounds is None else bounds[:2])))


@gpu
def test_memory_is_given_back_and_the_same_each_time():
    x = on_device(WIDE.tensors(torch.bfloat16))
    seen = []
    gc.collect()  # what earlier tests left in cycles is not to be given back in between
    for _ in range(5):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(WIDE, x, "triton")
        for _ in range(100):  # autograd's own thread lets go of what was saved a moment later
            if torch.cuda.memory_allocated() == before:
                break
            time.sleep(0.01)
        seen.append((torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before))
    # The first call may be the one that loads libraries.
    assert {left for left, _ in seen[1:]} == {0}
    assert len({peak for _, peak in seen[1:]}) == 1
