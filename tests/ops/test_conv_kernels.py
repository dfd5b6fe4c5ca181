"""The kernels of the short convolution against its definition: on a GPU, or in Triton's interpreter (conftest.py)."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from bf16 import round_as_a_gpu
from mutants import CONVOLUTION_MUTANTS, mutate_kernels
from torch.autograd import forward_ad

import osdn
from osdn import OnlineScaledDeltaNet, OSDNConfig
from osdn.models import OSDNCache
from osdn.nn.conv import causal_conv1d, short_convolution
from osdn.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LACKS = dispatch.why_not_triton(torch.empty(1, 1, 1, device=DEVICE))
pytestmark = [
    pytest.mark.skipif(bool(LACKS), reason=LACKS or "nothing lacks"),
    # Of a mutant that reads what is not its own.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def bf16_as_on_a_gpu(monkeypatch):
    if DEVICE == "cpu" and not LACKS:
        round_as_a_gpu(monkeypatch)


def convolved(x, weight, sizes, cu_seqlens, backend):
    y, last = short_convolution(x, weight, sizes, 1, None, cu_seqlens, backend)
    assert backend != "triton" or all(part.is_contiguous() for part in y)
    return torch.cat(list(y), -1), last


def compared(sizes, width, lengths, packed, dtype):
    """Results and gradients of the kernels, and of the definition in float64, on the same numbers."""
    gen = torch.Generator().manual_seed(0)
    shape = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    x, do = (torch.randn(*shape, sum(sizes), generator=gen).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(sum(sizes), 1, width, generator=gen).to(DEVICE, dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    for backend, kind in (("triton", dtype), ("chunked", torch.float64)):
        inputs = [y.to(kind).requires_grad_() for y in (x, weight)]
        y, last = convolved(*inputs, sizes, cu_seqlens, backend)
        yield [y.detach(), *torch.autograd.grad(y, inputs, do.to(kind)), last.detach()]


CASES = [
    ((5, 3, 140), 4, (70, 70), False),
    ((128, 16, 16), 4, (33, 0, 1, 2, 40, 0), True),
    ((16, 16, 16), 1, (3, 3, 3), False),
    ((2, 2, 2), 2, (0, 5, 1), True),
    ((7, 7, 9), 3, (4,), False),
    ((1, 1, 1), 4, (1, 1), False),
]


def worst(dtype, *case):
    """The largest error, of the largest entry, over what it may be; memory that nobody has written is NaN."""
    # Sums of up to 4 products and, of the weight, of up to 140 tokens in fp32; bf16 results are rounded once.
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    torch.use_deterministic_algorithms(True)
    try:
        got, exact = compared(*case, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)]
    return max(errors) / tolerance if all(error >= 0 for error in errors) else math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_definition(case, dtype):
    assert worst(dtype, *case) <= 1


def test_wider_ones_go_by_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "osdn.ops.triton.conv", None)
    x, weight = torch.randn(2, 9, 6, device=DEVICE), torch.randn(6, 1, 5, device=DEVICE)
    got, last = short_convolution(x, weight, (2, 2, 2), 1, backend="triton")
    y, state = causal_conv1d(x, weight)
    assert torch.equal(torch.cat(list(got), -1), F.silu(y))
    assert torch.equal(last, state)
    with pytest.raises(ImportError):
        short_convolution(x, weight[..., 1:], (2, 2, 2), 1, backend="triton")


def test_heads_that_the_operator_has_no_kernels_for_have_none_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "osdn.ops.triton.conv", None)
    layer = OnlineScaledDeltaNet(8, 1, 257, backend="triton").to(DEVICE)
    with pytest.raises(ValueError, match="head dimensions up to 256 and K = 257"):
        layer(torch.randn(1, 3, 8, device=DEVICE))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own first time
def test_forward_mode_is_refused():
    x, weight = torch.randn(2, 9, 6, device=DEVICE), torch.randn(6, 1, 4, device=DEVICE)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="backend: got 'triton' under forward-mode"):
        short_convolution(x, forward_ad.make_dual(weight, weight), (2, 2, 2), 1, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: there, an edit costs no compilation")
@pytest.mark.parametrize("name", [None, *CONVOLUTION_MUTANTS])
def test_mutant_is_killed(name, tmp_path, monkeypatch):
    mutant = mutate_kernels(CONVOLUTION_MUTANTS.get(name), tmp_path, "conv")
    monkeypatch.setitem(sys.modules, "osdn.ops.triton.conv", mutant)
    assert all(worst(torch.float32, *case) <= 1 for case in CASES[:2]) == (name is None)


def test_operator_is_what_pytorch_expects():
    x = torch.randn(1, 20, 9, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 1, 4, device=DEVICE, requires_grad=True)
    sizes, cu_seqlens = [2, 3, 4], torch.tensor([0, 5, 20])

    def f(x, weight):
        return short_convolution(x, weight, sizes, 1, None, cu_seqlens, "triton")[0]

    eager, compiled = (g(x, weight) for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")))
    gradients = [torch.autograd.grad(sum(y.sum() for y in parts), [x, weight]) for parts in (eager, compiled)]
    for y, z in zip((*eager, *gradients[0]), (*compiled, *gradients[1]), strict=True):
        assert torch.equal(y, z)
    given = [y.detach() for y in (*eager, x, weight)]
    forward, backward = torch.ops.osdn.triton_short_convolution, torch.ops.osdn.triton_short_convolution_backward
    torch.library.opcheck(forward.default, (*given[3:], cu_seqlens, sizes), test_utils="test_faketensor")
    torch.library.opcheck(backward.default, (*given, cu_seqlens, sizes, []), test_utils="test_faketensor")


def test_a_graph_is_whole_also_where_kernels_are_not_imported_yet(monkeypatch):
    monkeypatch.delitem(dispatch._MODULES, "triton", raising=False)
    layer = OnlineScaledDeltaNet(16, 2, 8, backend="triton").to(DEVICE)
    x = torch.randn(1, 5, 16, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="there, an assertion ends the process")
@pytest.mark.parametrize("offsets", [[0, 5], [1, 8], [0, 6, 3, 8]])
def test_offsets_whose_values_no_one_reads_beforehand_are_asserted(offsets):
    """As they are on a GPU, and in compiled graphs: kernels leave alone what no sequence has."""
    x, weight = torch.randn(1, 8, 6), torch.randn(6, 1, 4)
    q, beta = torch.randn(1, 8, 1, 16), torch.rand(1, 8, 1)

    def convolve(offsets):
        return short_convolution(x, weight, (2, 2, 2), 1, None, offsets, "triton")[0]

    def rule(offsets):
        options = {"preconditioner": None, "cu_seqlens": offsets, "backend": "triton"}
        return osdn.online_scaled_delta_rule(q, q, q, beta, **options)[0]

    def path(offsets):
        options = {"preconditioner": osdn.Preconditioner(), "cu_seqlens": offsets, "backend": "triton"}
        return osdn.precondition(q, beta, **options)[0]

    for f in (convolve, rule, path):
        with pytest.raises(RuntimeError, match="cu_seqlens do not go from 0 to T"):
            torch.compile(f, fullgraph=True, backend="aot_eager")(torch.tensor(offsets))


def test_kernels_keep_sequences_apart_also_where_one_is_nan():
    x, weight = torch.randn(1, 12, 6, device=DEVICE), torch.randn(6, 1, 4, device=DEVICE, requires_grad=True)
    x[:, 5:8] = torch.nan
    x.requires_grad_()
    y, _ = convolved(x, weight, (2, 2, 2), torch.tensor([0, 5, 8, 12]), "triton")
    assert y.isnan().any(-1)[0].tolist() == [5 <= t < 8 for t in range(12)]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.isnan().any(-1)[0].tolist() == [5 <= t < 8 for t in range(12)]


def test_a_part_that_nothing_depends_on_has_no_gradient():
    x = torch.randn(2, 6, 6, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, 1, 4, device=DEVICE, requires_grad=True)
    (_, k, _), _ = short_convolution(x, weight, (2, 2, 2), 1, backend="triton")
    dx, dweight = torch.autograd.grad(k.sum(), [x, weight])
    y = F.silu(causal_conv1d(x, weight)[0])[..., 2:4]
    torch.testing.assert_close([dx, dweight], list(torch.autograd.grad(y.sum(), [x, weight])))
    assert [bool(part.any()) for part in dx.split(2, -1)] == [False, True, False]


def test_a_layer_with_kernels_is_the_layer_without():
    torch.manual_seed(0)
    options = {"state_decay": "scalar", "preconditioner": {"d_max": 1.2, "eta": 4.0}, "layer_idx": 0}
    kernels = OnlineScaledDeltaNet(24, 2, 12, backend="triton", **options).to(DEVICE)
    plain = OnlineScaledDeltaNet(24, 2, 12, backend="chunked", **options).to(DEVICE)
    plain.load_state_dict(kernels.state_dict())
    x = torch.randn(2, 21, 24, device=DEVICE)
    mask = torch.ones(2, 21, device=DEVICE)
    mask[1, :6] = 0
    for given in (None, mask):
        both = [layer(x, given) for layer in (kernels, plain)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
        grads = [
            torch.autograd.grad(y.square().sum(), list(layer.parameters()))
            for y, layer in zip(both, (kernels, plain), strict=True)
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    cache = OSDNCache(OSDNConfig.preset("os-gdn-tiny", num_hidden_layers=1))
    with torch.no_grad():
        parts = [kernels(part, None, cache) for part in x.split([16, 1, 4], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), plain(x), rtol=1e-4, atol=1e-5)
