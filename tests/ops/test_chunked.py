"""The chunked backend against the definition, and what must hold whatever the backend."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import BOX, OUTPUTS, Case, errors, run, worst

import osdn
from osdn.ops import scans

FREE = (0.0, math.inf)
properties = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

AWKWARD = [
    # Every combination of the rule at one length that is no multiple of the chunk.
    *(
        Case(T=70, decay=decay, feedback=feedback, forget=forget, box=box, normalize_step=normalize)
        for decay, feedback, forget, box, normalize in product(
            (None, "scalar", "channel"), ("beta_free", "beta_aware"), (False, True), (FREE, BOX), (False, True)
        )
        if not normalize or decay is None
    ),
    # Lengths around the chunk, with everything on.
    *(
        Case(T=T, decay=decay, forget=True, box=BOX, feedback="beta_aware")
        for T in (1, 2, 3, 15, 63, 64, 65, 127, 200)
        for decay in (None, "scalar", "channel")
    ),
    # Head sizes, K != V, grouped value heads.
    Case(T=130, K=60, V=100, box=BOX, forget=True, decay="channel"),
    Case(T=130, K=100, V=60, box=(0.5, 1.5), decay="scalar"),
    Case(T=80, K=256, V=16, B=1, H=1, box=(0.8, 1.1)),
    Case(T=80, K=1, V=1, forget=True, eta=1.0),
    Case(T=80, qk_l2norm=True, forget=True, box=BOX),
    Case(T=80, qk_l2norm=True, decay="channel"),
    Case(T=90, H=2, HV=6, box=BOX, decay="channel", forget=True),
    # Packed: ragged, with empty and one-token sequences.
    *(
        Case(lengths=lengths, decay=decay, forget=True, box=BOX, feedback=feedback)
        for lengths in ((0, 70, 1, 79, 0), (128, 64), (1, 2, 3, 63, 65), (33,))
        for decay, feedback in ((None, "beta_free"), ("scalar", "beta_aware"), ("channel", "beta_free"))
    ),
    # A step so large that the solve overflows where the box holds d.
    Case(T=130, eta=1e6, box=BOX, forget=True),
    # The chunk length is speed and memory, not the result.
    *(Case(T=150, decay="channel", forget=True, box=BOX, chunk_size=C) for C in (1, 8, 32, 128, 256)),
    Case(lengths=(40, 0, 90), H=1, HV=3, box=BOX, forget=True),
    Case(T=100, eta=0.0, forget=True),
    Case(T=100, eta=1.0, feedback="beta_aware", box=BOX),
]


@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_matches_the_definition(case):
    x = case.tensors()
    error, name = worst(errors(case, run(case, x, "chunked"), run(case, x, "reference")))
    assert error < 1e-12, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_matches_the_definition_on_cuda(case):
    x = case.tensors()
    got = run(case, {n: t if t is None else t.cuda() for n, t in x.items()}, "chunked")
    error, name = worst(errors(case, {n: y.cpu() for n, y in got.items()}, run(case, x, "reference")))
    assert error < 1e-12, name


@pytest.mark.parametrize("box", [FREE, BOX])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_error_at_most_twice_that_of_the_definition_in_the_same_dtype(decay, dtype, box):
    """Against float64 on the very inputs that the low precision run sees (bf16 values are exact in float64).

    Floor: 4 ulp of the dtype of the result, for results that the token loop happens to hit nearly exactly.
    With the clip active, gradients may differ by whole tokens where rounding decides whether a value clips, so the
    gradients' bar is for the open box.
    """
    case = Case(T=150, K=32, V=24, decay=decay, forget=True, box=box)
    x = case.tensors(dtype)
    exact = run(case, {n: t if t is None else t.double() for n, t in x.items()}, "reference")
    by_definition = errors(case, run(case, x, "reference"), exact)
    got = run(case, x, "chunked")
    for name, error in errors(case, got, exact).items():
        if name not in OUTPUTS and box == BOX:
            continue
        floor = 4 * torch.finfo(got[name].dtype).eps
        assert (error <= 2 * by_definition[name].max() + floor).all(), (name, error, by_definition[name])


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_sums_of_decays_do_not_cancel(decay):
    """One wipe of exp(-8e6) must not cost the mild decays around it any digit, as a difference of sums would."""
    case = Case(T=100, decay=decay, forget=True)
    x = case.tensors()
    x["g"][:, 5], x["forget"][:, 40] = -8e6, -8e6
    error, name = worst(errors(case, run(case, x, "chunked"), run(case, x, "reference")))
    assert error < 1e-12, name


@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_hard_inputs_stay_finite_and_right(decay):
    """Unnormalised keys, decays that wipe the state or hardly touch it, betas at 0 and 1, d pinned at both bounds."""
    case = Case(T=130, K=16, V=8, decay=decay, forget=True, box=(0.5, 0.50001), normalize_step=True)
    x = replace(case, box=FREE).tensors()
    x["beta"][:, ::3], x["beta"][:, 1::3] = 0, 1
    x["forget"][:, ::5] = -60.0
    if decay is not None:
        x["g"][:, ::7], x["g"][:, 1::7] = -800.0, -1e-9
    x["k"][:, ::4] *= 30
    x["k"][:, 5] = 0
    error, name = worst(errors(case, run(case, x, "chunked"), run(case, x, "reference")))
    assert error < 1e-12, name


def test_gradient_through_a_decay_that_underflows():
    """exp(-800) is 0 in every dtype; its gradient is 0 and not NaN."""
    case = Case(T=70, decay="channel", forget=True)
    x = case.tensors(torch.float32)
    x["g"][:, 10], x["forget"][:, 20] = -800.0, -800.0
    assert all(y.isfinite().all() for y in run(case, x, "chunked").values())


@pytest.mark.parametrize("feedback", ["beta_free", "beta_aware"])
def test_a_chunk_is_an_affine_map_of_d(feedback):
    """d -> P d + p with P = G I - eta A^T Z, from the triangular solve alone; two chunks compose."""
    case = Case(T=40, B=1, H=1, K=6, feedback=feedback, forget=True, box=(-math.inf, math.inf))
    x = case.tensors()
    s, beta, forget = x["k"][0, :, 0].square(), x["beta"][0, :, 0], x["forget"][0, :, 0]
    c1 = torch.ones_like(beta) if feedback == "beta_free" else beta
    whole = torch.eye(7, dtype=torch.float64)
    for part in (slice(0, 25), slice(25, 40)):
        s_, c1_, f = s[part], c1[part], forget[part]
        since = torch.stack([f[:t].sum() for t in range(len(f) + 1)]).exp()
        R = torch.stack([torch.stack([f[j + 1 : t].sum().exp() for j in range(len(f))]) for t in range(len(f) + 1)])
        L = (case.eta * c1_[:, None] ** 2 * R[:-1] * (s_ @ s_.T)).tril(-1)
        I, A = torch.eye(len(f)).double(), R[-1][:, None] * s_
        Z = torch.linalg.solve(I + L, (c1_**2 * since[:-1])[:, None] * s_)
        chunk = torch.eye(7, dtype=torch.float64)
        chunk[:6, :6] = since[-1] * torch.eye(6).double() - case.eta * A.T @ Z
        chunk[:6, 6] = case.eta * A.T @ torch.linalg.solve(I + L, c1_)
        whole = chunk @ whole
    want = whole[:6, :6] @ x["d"][0, 0] + whole[:6, 6]
    _, final = osdn.precondition(
        x["k"], x["beta"], preconditioner=case.preconditioner, forget=x["forget"], initial_d=x["d"], backend="chunked"
    )
    torch.testing.assert_close(final[0, 0], want, rtol=1e-12, atol=1e-12)


CLIPS = {
    "first of all": [(0, "down")],
    "first of a chunk": [(64, "up")],
    "last of a chunk": [(63, "up")],
    "both sides of a seam": [(63, "up"), (64, "down")],
    "twice at one bound": [(70, "up"), (75, "up")],
    "both bounds, inside in between": [(66, "up"), (80, "back"), (90, "down")],
    "last of all": [(129, "down")],
}
PUSHES = {"up": (1.0, 0.5), "down": (1.5, 1.0), "back": (0.8**0.5, 1.0)}
"""Length of the key and beta which take one feature over d_max, below d_min, and from d_max to well inside."""


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("rows", [slice(1, 2), slice(None)], ids=["one row", "all rows"])
@pytest.mark.parametrize("clips", CLIPS)
def test_clips_at_chosen_tokens(clips, rows, forget):
    """d moves at these tokens alone, since elsewhere beta is 0, and (with lambda) by forgetting."""
    gen = torch.Generator().manual_seed(0)
    k, beta, d = torch.randn(1, 130, 3, 6, generator=gen).double(), torch.zeros(1, 130, 3).double(), torch.ones(1, 3, 6)
    for t, push in CLIPS[clips]:
        length, beta[:, t, rows] = PUSHES[push]
        k[:, t, rows] = length * torch.eye(6)[2].double()
    leaves = [k, beta, d.double()] + [torch.full_like(beta, -0.002)] * forget
    got, want = _precondition(leaves, (0.4, 1.6), "chunked"), _precondition(leaves, (0.4, 1.6), "reference")
    after = torch.cat([want[0], want[1][:, None]], 1)[:, 1:, rows, 2]
    for t, push in CLIPS[clips]:
        assert ((after[:, t] == 1.6) == (push == "up")).all()
        assert ((after[:, t] == 0.4) == (push == "down")).all()
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _precondition(leaves, box, backend):
    """d as used, the last d, and the gradients for one cotangent of both."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    k, beta, d, *forget = leaves
    out = osdn.precondition(
        k,
        beta,
        preconditioner=osdn.Preconditioner(4.0, "beta_aware", *box),
        forget=forget[0] if forget else None,
        initial_d=d,
        backend=backend,
    )
    gen = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=gen, dtype=y.dtype)).sum() for y in out)
    return [*(y.detach() for y in out), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("scanned", [False, True])
def test_a_value_on_the_bound_passes_its_gradient(scanned):
    """1 + 4 * .5 * (1 - .5) = 2 = d_max, exactly in binary; a clip in the next row sends the chunk into the scan."""
    k, beta, d = torch.zeros(1, 3, 2, 4).double(), torch.full((1, 3, 2), 0.5).double(), torch.ones(1, 2, 4).double()
    k[..., 2] = 1
    d[:, 1, 2] = 1.9
    beta[:, :, 1] = 0.4 * scanned
    got, want = (_precondition([k, beta, d], (0.0, 2.0), backend) for backend in ("chunked", "reference"))
    assert (want[0][0, 1:, 0, 2] == 2).all()
    assert want[4][0, 0, 2] != want[4][0, 0, 3]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("box", [FREE, BOX])
def test_nan_stays_where_it_is_and_is_no_bound(box):
    case = Case(T=150, forget=True, box=box)
    x = case.tensors()
    x["k"][0, 70, 1, 3] = torch.nan
    args = [x["k"], x["beta"]]
    kwargs = {"preconditioner": case.preconditioner, "forget": x["forget"], "initial_d": x["d"]}
    got, want = (osdn.precondition(*args, **kwargs, backend=backend) for backend in ("chunked", "reference"))
    assert want[0].isnan().sum() == 79 * case.K
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_clip_elsewhere_leaves_the_bits_of_a_row_alone():
    case = Case(T=130, forget=True)
    x, p = case.tensors(torch.float32), replace(case, box=(-50.0, 50.0)).preconditioner
    args = {"preconditioner": p, "forget": x["forget"], "backend": "chunked"}
    used, _ = osdn.precondition(x["k"], x["beta"], **args, initial_d=x["d"])
    assert used.abs().max() < 50
    x["d"][0, 0] = 100
    other, _ = osdn.precondition(x["k"], x["beta"], **args, initial_d=x["d"])
    assert (other[0, 1:, 0].abs() == 50).any()
    assert torch.equal(used[1], other[1])
    assert torch.equal(used[0, :, 1], other[0, :, 1])


CASES = st.builds(
    Case,
    decay=st.sampled_from([None, "scalar", "channel"]),
    feedback=st.sampled_from(["beta_free", "beta_aware"]),
    forget=st.booleans(),
    box=st.sampled_from([FREE, BOX]),
    seed=st.integers(0, 9),
    T=st.sampled_from([20, 64, 65, 130]),
)


@properties
@given(CASES, st.data())
def test_any_split_equals_the_whole(case, data):
    x = case.tensors()
    whole = run(case, x, "chunked", grads=False)
    at = sorted(data.draw(st.sets(st.integers(1, case.T - 1), min_size=1, max_size=4)))
    state, outs = osdn.DeltaState(x["S"], x["d"]), []
    for a, b in zip([0, *at], [*at, case.T]):
        part = {n: None if t is None else t[:, a:b] for n, t in x.items() if n not in ("S", "d")}
        o, state = osdn.online_scaled_delta_rule(
            **part,
            qk_l2norm=False,
            preconditioner=case.preconditioner,
            initial_state=state,
            output_final_state=True,
            backend="chunked",
        )
        outs.append(o)
    got = dict(zip(OUTPUTS, (torch.cat(outs, 1), state.S, state.d)))
    error, name = worst(errors(case, got, whole))
    assert error < 1e-12, (name, at)


@properties
@given(CASES, st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(lambda n: max(n) >= 15))
def test_packed_equals_looped(case, lengths):
    # Inputs as for the open box: sequences this short need not clip at both ends, which the factory would demand.
    x = replace(case, lengths=tuple(lengths), box=FREE).tensors()
    case = replace(case, lengths=tuple(lengths), box=BOX)
    packed = run(case, x, "chunked", grads=False)
    start = 0
    for n, length in enumerate(lengths):
        if length:
            one = {
                name: t if t is None else t[n : n + 1] if name in ("S", "d") else t[:, start : start + length]
                for name, t in x.items()
            }
            alone = run(replace(case, lengths=None, B=1, T=length), one, "chunked", grads=False)
            together = {
                "o": packed["o"][:, start : start + length],
                **{s: packed[s][n : n + 1] for s in ("S_T", "d_T")},
            }
            error, name = worst(errors(replace(case, lengths=None), together, alone))
            assert error < 1e-12, name
        else:
            assert torch.equal(packed["S_T"][n], x["S"][n])
            assert torch.equal(packed["d_T"][n], x["d"][n])
        start += length


@properties
@given(CASES, st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
def test_a_changed_suffix_leaves_the_prefix_bitwise_alone(case, where, dtype):
    x = case.tensors(dtype)
    t = 1 + where % (case.T - 1)
    before = run(case, x, "chunked", grads=False)["o"]
    other = replace(case, seed=case.seed + 100).tensors(dtype)
    for name in ("q", "k", "v", "beta", "g", "forget"):
        if x[name] is not None:
            x[name][:, t:] = other[name][:, t:]
    after = run(case, x, "chunked", grads=False)["o"]
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_eta_0_and_d_1_is_the_plain_delta_rule_bitwise(decay):
    x = Case(T=100, decay=decay, eta=0.0).tensors(torch.float32)
    args = [x[n] for n in ("q", "k", "v", "beta")]
    kwargs = {"g": x["g"], "initial_state": osdn.DeltaState(x["S"]), "output_final_state": True, "backend": "chunked"}
    o, state = osdn.online_scaled_delta_rule(*args, **kwargs, preconditioner=osdn.Preconditioner(eta=0.0))
    plain, plain_state = osdn.online_scaled_delta_rule(*args, **kwargs, preconditioner=None)
    assert torch.equal(o, plain)
    assert torch.equal(state.S, plain_state.S)
    assert plain_state.d is None
    assert torch.equal(state.d, torch.ones_like(state.d))


@pytest.mark.parametrize("lengths", [None, (0, 70, 1, 79)])
def test_reads_no_uninitialised_memory(lengths):
    """`torch.empty` filled with NaN: the same bits come out."""
    case = Case(T=70, lengths=lengths, decay="channel", forget=True, box=BOX)
    x = case.tensors()
    plain = run(case, x, "chunked")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        poisoned = run(case, x, "chunked")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(plain[n], poisoned[n]) for n in plain)


def test_autocast_does_not_reach_the_state():
    case = Case(T=70, forget=True, decay="scalar")
    x = case.tensors(torch.float32)
    plain = run(case, x, "chunked")
    with torch.autocast("cpu", torch.bfloat16):
        under = run(case, x, "chunked", grads=False)
    assert all(torch.equal(plain[n], under[n]) for n in under)


def test_scans_are_registered_as_torch_library_expects():
    """Schema, fake shapes, autograd registration and dynamic shapes, by PyTorch's own checker."""
    gen = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=gen).requires_grad_()

    waves = [3, 2]
    for forget in (None, rand(5, 8)):
        args = (rand(5, 8, 4), rand(5, 8), rand(5, 8), forget, rand(3, 4), waves, 1.0, 0.4, 1.1)
        torch.library.opcheck(scans.precondition_scan, args)
    for kept in (None, rand(5, 1), rand(5, 4)):
        args = (rand(5, 8, 4), rand(5, 8, 4), rand(5, 8, 4), rand(5, 8, 3), rand(5, 8, 8), rand(5, 8, 8))
        torch.library.opcheck(scans.delta_scan, (*args, kept, rand(3, 4, 3), waves, 0.5, True))


@pytest.mark.parametrize("decay", [None, "channel"])
def test_compile_keeps_the_graph_whole_under_an_active_box(decay):
    case = Case(T=70, decay=decay, forget=True, box=BOX)
    x = case.tensors()
    p = case.preconditioner

    def f(q, k, v, beta, g, forget, S, d):
        o, state = osdn.online_scaled_delta_rule(
            q,
            k,
            v,
            beta,
            g=g,
            forget=forget,
            preconditioner=p,
            initial_state=osdn.DeltaState(S, d),
            output_final_state=True,
        )
        return o, state.S, state.d

    leaves = [t if t is None else t.requires_grad_() for t in x.values()]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager, whole = f(*leaves), compiled(*leaves)
    given_grads = [t for t in leaves if t is not None]
    for a, b in zip(eager, whole):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad([y.sum() for y in out], given_grads) for out in (eager, whole))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch 2.11's inductor
def test_one_compiled_graph_serves_many_lengths():
    """Whole chunks or not, and fewer tokens than a chunk: at most a graph for each, however many lengths."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def f(q, k, v, beta, d):
        p = osdn.Preconditioner(d_max=2.0)
        return osdn.online_scaled_delta_rule(q, k, v, beta, preconditioner=p, initial_state=osdn.DeltaState(d=d))[0]

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=count)
    for T in (100, 128, 131, 192, 200, 257, 300, 311, 320, 333, 345, 384):
        x = Case(T=T).tensors(torch.float32)
        args = [x[n] for n in ("q", "k", "v", "beta", "d")]
        torch.testing.assert_close(compiled(*args), f(*args))
    assert len(graphs) <= 3
