"""Refusals by their message, defaults, dispatch."""

from __future__ import annotations

import logging
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import osdn
from osdn.ops import api, dispatch, reference

P = osdn.Preconditioner(feedback="beta_aware")


def call(**changes):
    B, T, H, K, V = 2, 5, 2, 4, 3
    args = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "beta": torch.rand(B, T, H),
        "preconditioner": P,
    } | changes
    return osdn.online_scaled_delta_rule(**args)


def packed(bounds, T=5, dtype=torch.int64):
    return {
        "q": torch.randn(1, T, 2, 4),
        "k": torch.randn(1, T, 2, 4),
        "v": torch.randn(1, T, 2, 3),
        "beta": torch.rand(1, T, 2),
        "cu_seqlens": torch.tensor(bounds, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 5, 2)}, r"k: got \(2, 5, 2\), takes shape \[B, T, H, K\]"),
        ({"q": torch.randn(2, 0, 2, 4), "k": torch.randn(2, 0, 2, 4)}, r"k: got \(2, 0, 2, 4\)"),
        ({"k": torch.ones(2, 5, 2, 4, dtype=torch.int64)}, "k: got torch.int64, takes a floating dtype"),
        ({"q": torch.randn(2, 5, 2, 3)}, r"q: got \(2, 5, 2, 3\), takes the shape of k, \(2, 5, 2, 4\)"),
        ({"q": torch.randn(2, 5, 2, 4).bfloat16()}, "q: got torch.bfloat16, takes the dtype of k, torch.float32"),
        ({"v": torch.randn(2, 4, 2, 3)}, r"v: got \(2, 4, 2, 3\), takes shape \[2, 5, HV, V\]"),
        ({"v": torch.randn(2, 5, 3, 3)}, "HV a multiple of 2"),
        ({"v": torch.randn(2, 5, 2, 3).double()}, "v: got torch.float64"),
        ({"beta": None}, "beta: got None, takes a torch.Tensor"),
        ({"q": None}, "q: got None, takes a torch.Tensor"),
        ({"beta": 0.5}, "beta: got float, takes a torch.Tensor"),
        ({"scale": torch.ones(2)}, "scale: got tensor"),
        ({"scale": math.nan}, "scale: got nan, takes a float"),
        ({"scale": 10**400}, "scale: got an int of 1329 bits, takes a float, or None"),
        ({"qk_l2norm": "no"}, "qk_l2norm: got 'no', takes True or False"),
        ({"output_final_state": 1}, "output_final_state: got 1, takes True or False"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens: got list, takes a torch.Tensor"),
        ({"initial_state": osdn.DeltaState(d=1.0)}, "initial_state.d: got float, takes a torch.Tensor or None"),
        ({"v": [[1.0]]}, "v: got list, takes a torch.Tensor"),
        ({"v": torch.randn(2, 5, 2, 3, device="meta")}, "v: got meta, takes the device of k, cpu"),
        ({"beta": torch.rand(2, 5)}, r"beta: got \(2, 5\), takes shape \[2, 5, 2\]"),
        ({"beta": torch.rand(2, 5, 2).double()}, "beta: got torch.float64, takes torch.float32"),
        ({"g": torch.zeros(2, 5, 2, 3)}, r"g: got .* takes shape \[2, 5, 2\] or shape \[2, 5, 2, 4\]"),
        ({"forget": torch.zeros(2, 5, 2, 1)}, r"forget: got \(2, 5, 2, 1\), takes shape \[2, 5, 2\]"),
        ({"forget": torch.zeros(2, 5, 2), "preconditioner": None}, "forget: got a tensor, takes None"),
        ({"preconditioner": {"eta": 1.0}}, "preconditioner: got dict, takes an osdn.Preconditioner or None"),
        ({"initial_state": torch.zeros(2, 2, 4, 3)}, "initial_state: got Tensor, takes an osdn.DeltaState"),
        ({"initial_state": osdn.DeltaState(torch.zeros(2, 2, 3, 4))}, r"initial_state.S: got .*\(2, 2, 3, 4\)"),
        ({"initial_state": osdn.DeltaState(torch.zeros(2, 2, 4, 3).bfloat16())}, "initial_state.S: got torch.bfloat16"),
        ({"initial_state": osdn.DeltaState(d=torch.ones(1, 2, 4))}, r"initial_state.d: got .*\(1, 2, 4\)"),
        ({"initial_state": osdn.DeltaState(d=torch.ones(2, 2, 4)), "preconditioner": None}, "initial_state.d: got a"),
        ({"chunk_size": 48}, "chunk_size: got 48, takes an int, a power of two"),
        ({"chunk_size": 64.0}, "chunk_size: got 64.0, takes an int"),
        ({"chunk_size": True}, "chunk_size: got True, takes an int"),
        ({"backend": "cuda"}, "backend: got 'cuda', takes one of 'auto', 'reference', 'chunked', 'triton'"),
        ({"backend": "triton"}, "backend: 'triton' is not available, since .*; 'chunked' runs wherever PyTorch does"),
        ({"beta": torch.rand(2, 5, 2, device="meta")}, "beta: got meta, takes the device of k, cpu"),
        (packed([0, 5]) | {"q": torch.randn(2, 5, 2, 4)}, "q: got"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got B = 2, takes a packed batch, B = 1"),
        (packed([1, 5]), r"cu_seqlens: got \[1, 5\], takes offsets from 0 to T = 5"),
        (packed([0, 4]), r"cu_seqlens: got \[0, 4\]"),
        (packed([0, 3, 2, 5]), r"cu_seqlens: got \[0, 3, 2, 5\], takes offsets .* that do not decrease"),
        (packed([0, *range(1, 20), 3]), r"cu_seqlens: got \[0, 1, ..., 3\]"),
        (packed([0.0, 5.0], dtype=torch.float32), "cu_seqlens: got torch.float32"),
        (packed([5]), "cu_seqlens: got"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": -0.1}, "eta: got -0.1, takes a finite float >= 0"),
        ({"eta": math.nan}, "eta: got nan"),
        ({"eta": torch.tensor(1.0)}, "eta: got tensor"),
        ({"d_max": None}, "d_max: got None, takes a float"),
        ({"eta": 10**400}, "eta: got an int of 1329 bits, takes a float"),
        ({"normalize_step": "no"}, "normalize_step: got 'no', takes True or False"),
        ({"d_min": 1.0, "d_max": 0.5}, r"d_min, d_max: got \[1.0, 0.5\], takes d_min <= d_max"),
        ({"d_max": math.nan}, "d_min, d_max"),
        ({"feedback": "beta"}, "feedback: got 'beta', takes one of"),
    ],
)
def test_preconditioner_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        osdn.Preconditioner(**fields)


def test_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="forgets"):
        call(forgets=None)


def test_precondition_refuses():
    k = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"beta: got None, takes a tensor .* for beta_aware feedback"):
        osdn.precondition(k, None, preconditioner=P)
    with pytest.raises(ValueError, match="preconditioner: got NoneType"):
        osdn.precondition(k, None, preconditioner=None)
    with pytest.raises(ValueError, match="initial_d: got"):
        osdn.precondition(k, None, preconditioner=osdn.Preconditioner(), initial_d=torch.ones(2, 2, 4))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_precondition_is_what_the_operator_uses(backend):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 90, 2, 8, generator=gen, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, d0 = (torch.rand(s, generator=gen, dtype=torch.float64) for s in ((1, 90, 2), (1, 2, 8)))
    used, final = osdn.precondition(k, beta, preconditioner=P, initial_d=d0, backend=backend)
    o, state = osdn.online_scaled_delta_rule(
        q,
        k,
        v,
        beta,
        preconditioner=P,
        initial_state=osdn.DeltaState(d=d0),
        output_final_state=True,
        scale=1.0,
        qk_l2norm=False,
        backend=backend,
    )
    want_o, want_S = reference.delta_rule(q, k, used * k, v, beta, None, torch.zeros_like(state.S), 1.0, None)
    assert torch.equal(used[:, 0], d0)
    assert (final - d0).abs().mean() > 0.1
    # 1e-12: float64 sums in another order.
    for got, want in ((state.d, final), (o, want_o), (state.S, want_S)):
        assert (got - want).norm() / want.norm() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_defaults(dtype):
    x = {n: torch.randn(2, 5, 2, 4).to(dtype) for n in ("q", "k", "v")}
    beta = torch.rand(2, 5, 2).to(torch.float64 if dtype == torch.float64 else torch.float32)
    o, state = call(**x, beta=beta, output_final_state=True)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert (o.dtype, state.S.dtype, state.d.dtype) == (dtype, work, work)
    assert (state.S.shape, state.d.shape) == ((2, 2, 4, 4), (2, 2, 4))
    none, no_state = call(**x, beta=beta)
    assert torch.equal(none, o)
    assert no_state is None
    explicit, _ = call(**x, beta=beta, scale=0.5, initial_state=osdn.DeltaState())
    assert torch.equal(explicit, o)


def test_state_is_not_modified_in_place():
    S, d = torch.randn(2, 2, 4, 3), torch.rand(2, 2, 4)
    kept = S.clone(), d.clone()
    for backend in ("reference", "chunked"):
        call(initial_state=osdn.DeltaState(S, d), backend=backend)
        assert torch.equal(S, kept[0])
        assert torch.equal(d, kept[1])


def test_state_selects_clones_detaches():
    state = osdn.DeltaState(torch.randn(3, 1, 2, 2, requires_grad=True))
    picked = state.index_select(torch.tensor([2, 0]))
    assert torch.equal(picked.S, state.S[[2, 0]])
    assert picked.d is None
    assert not state.detach().S.requires_grad
    assert state.clone().S.data_ptr() != state.S.data_ptr()


def test_warns_once_where_d_would_never_move(monkeypatch):
    monkeypatch.setattr(api, "_warned_tie", False)
    with pytest.warns(UserWarning, match="d stays at 1, which is the plain delta rule"):
        call(preconditioner=osdn.Preconditioner())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(preconditioner=osdn.Preconditioner())
        monkeypatch.setattr(api, "_warned_tie", False)
        call(preconditioner=P)
        call(preconditioner=osdn.Preconditioner(eta=0.0))
        call(preconditioner=osdn.Preconditioner(), forget=torch.full((2, 5, 2), -0.1))
        call(preconditioner=osdn.Preconditioner(), initial_state=osdn.DeltaState(d=torch.rand(2, 2, 4)))


def test_dispatch_and_explain(monkeypatch, caplog):
    q = torch.randn(1, 3, 1, 4)
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, "osdn"):
        call()
        call()
    assert [r.message for r in caplog.records] == [f"backend=auto takes {osdn.explain(q)}"]
    assert osdn.explain(q).backend == "chunked"
    assert osdn.explain(q[:, :1]).backend == "reference"
    assert "asked for" in osdn.explain(q, backend="reference").reason
    monkeypatch.setenv("OSDN_BACKEND", "reference")
    assert osdn.explain(q).backend == "reference"
    assert osdn.explain(q, backend="chunked").backend == "chunked"
    monkeypatch.setenv("OSDN_BACKEND", "fast")
    with pytest.raises(ValueError, match="OSDN_BACKEND: got 'fast', takes one of"):
        osdn.explain(q)


@pytest.mark.parametrize(
    ("installed", "q", "why"),
    [
        (False, torch.ones(1, 3, 1, 4), r"the package triton is not installed \(pip install triton\)"),
        (True, torch.ones(1, 3, 1, 4), "the tensors are on cpu and its kernels run on GPUs"),
        (True, torch.ones(1, 3, 1, 4, dtype=torch.float64), "the inputs are float64"),
        (True, torch.ones(1, 3, 1, 300), "K = 300"),
    ],
)
def test_why_there_are_no_kernels(installed, q, why, monkeypatch):
    """The reason for another backend, or of the refusal where kernels are asked for."""
    monkeypatch.setattr(dispatch, "_INSTALLED", installed)
    monkeypatch.setattr(dispatch, "_interpreted", lambda: not why.endswith("GPUs"))
    choice = osdn.explain(q)
    assert choice.backend == "chunked"
    assert re.search(why, choice.reason)
    with pytest.raises(ValueError, match=f"^backend: 'triton' is not available, since .*{why}.*; 'chunked' runs"):
        osdn.explain(q, backend="triton")


def test_runs_on_the_meta_device():
    """Shapes without values, for models that are planned before they are built."""
    x = {n: torch.randn(2, 70, 2, 4, device="meta") for n in ("q", "k", "v")}
    o, state = call(**x, beta=torch.rand(2, 70, 2, device="meta"), output_final_state=True)
    assert (o.shape, state.S.shape, state.d.shape) == ((2, 70, 2, 4), (2, 2, 4, 4), (2, 2, 4))


# PyTorch warns of itself when it first differentiates forward.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_where_it_would_be_silently_zero():
    x = {n: torch.randn(1, 5, 2, 4) for n in ("q", "k", "v")} | {"beta": torch.rand(1, 5, 2)}
    with forward_ad.dual_level():
        x["v"] = forward_ad.make_dual(x["v"], x["v"].clone())
        out, tangent = forward_ad.unpack_dual(call(**x, backend="reference")[0])
        torch.testing.assert_close(tangent, out)  # linear in v, and S_0 = 0
        with pytest.raises(ValueError, match="'chunked' under forward-mode differentiation, takes 'reference'"):
            call(**x, backend="chunked")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_in_compiled_graphs():
    x = {n: torch.randn(1, 5, 2, 4) for n in ("q", "k", "v")} | {"beta": torch.rand(1, 5, 2)}
    compiled = torch.compile(lambda v: call(**x | {"v": v}, backend="chunked")[0], backend="aot_eager")
    expected = compiled(x["v"])
    inside = torch.compile(lambda v: torch.func.jvp(compiled, (v,), (v,))[1], backend="aot_eager")
    message = "'chunked' under forward-mode differentiation, takes 'reference'"
    with pytest.raises(ValueError, match=message):
        inside(x["v"])
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        compiled(forward_ad.make_dual(x["v"], x["v"].clone()))
    assert torch.equal(compiled(x["v"]), expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_offsets_are_checked_in_compiled_graphs(backend):
    x = {n: torch.randn(1, 70, 2, 4) for n in ("q", "k", "v")} | {"beta": torch.rand(1, 70, 2)}
    compiled = torch.compile(lambda cu: call(**x, cu_seqlens=cu, backend=backend)[0], backend="aot_eager")
    good = torch.tensor([0, 30, 70])
    torch.testing.assert_close(compiled(good), call(**x, cu_seqlens=good, backend=backend)[0])
    for bad in ([0, 50, 10, 70], [0, 30, 60]):
        with pytest.raises(ValueError, match=r"cu_seqlens: got .*, takes offsets from 0 to T = 70"):
            compiled(torch.tensor(bad))


@pytest.mark.parametrize(
    ("gpu", "version", "taken"),
    [("sm_90", "3.9", True), ("sm_90", "3.6", True), ("sm_80", "3.9", False), ("sm_90", "3.7", False)],
)
def test_auto_takes_kernels_only_where_their_tests_were_seen_to_pass(gpu, version, taken, monkeypatch):
    monkeypatch.setattr(dispatch, "_gpu", lambda _: gpu)
    monkeypatch.setattr(dispatch, "_triton", lambda: version)
    monkeypatch.setattr(dispatch, "why_not_triton", lambda _: "")
    monkeypatch.delenv("OSDN_BACKEND", raising=False)
    q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 1, 4))
    lacks = dispatch.why_not_triton_unasked(q)
    assert taken == (lacks == "")
    assert dispatch.choose(q, "auto").backend == ("triton" if taken else "chunked")
    assert taken or f"not seen to pass on {gpu}, Triton {version}" in lacks
