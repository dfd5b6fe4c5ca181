"""The registry: what is measured, on which inputs, and the gate that each implementation has to pass first.

A case states in `claim` what its inputs are to exercise, and the benchmark asserts it: a "clip" case in which no clip
fires, or an "adaptive" one in which d stays put, would time something else.

Letters: B batch, T tokens, H heads, K key dim, V value dim, N sequences (B, or those packed into B = 1).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

import osdn
from osdn.ops.options import Backend

DECAYS = ("none", "scalar", "channel")
OUTPUTS = ("o", "S_T", "d_T")


@dataclass(frozen=True)
class Shape:
    """Of one call. packed: lengths of the sequences that stand in B = 1; state: S starts from random values, not 0."""

    B: int
    T: int
    H: int
    K: int
    V: int
    packed: tuple[int, ...] | None = None
    state: bool = False


@dataclass(frozen=True)
class Inputs:
    """One call's leaves, the gradient of o, and the bounds of packed sequences.

    q, k [B, T, H, K]; v [B, T, H, V]; beta, forget [B, T, H]; g [B, T, H] or [B, T, H, K]; d [N, H, K]; S [N, H, K, V].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    d: Tensor
    do: Tensor
    g: Tensor | None = None
    forget: Tensor | None = None
    S: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        return {name: x for name, x in vars(self).items() if x is not None and name not in ("do", "cu_seqlens")}

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, as new leaves."""
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves().items()}
        return dataclasses.replace(self, do=self.do.to(dtype), **leaves)

    def copy(self) -> Inputs:
        """The same values elsewhere in memory and without gradients: what a step may write into."""
        return dataclasses.replace(self, **{name: x.detach().clone() for name, x in self.leaves().items()})


Run = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An implementation to measure: `run` computes o and, where it hands them out, the final S and d.

    preconditioner: what the float64 reference computes. claim: what share of (chunk of 64, head) pairs sees a clip;
    None where that is not asserted. decays: those it runs under. step: it takes shapes of one token, and updates their
    state in place. function: a peer's own name; None for ours. plain: it computes our operator with
    `preconditioner=None`. tuning: seconds that a peer's first calls have been seen to take.
    tolerances: relative errors of its gate, in place of the suite's.
    """

    name: str
    run: Run
    preconditioner: osdn.Preconditioner | None
    claim: float | None
    decays: tuple[str, ...] = ("none",)
    step: bool = False
    function: str | None = None
    plain: bool = False
    tuning: float = 0.0
    tolerances: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Cases measured on the same shapes, in the same run; ratios are taken against the peers.

    gates (step_gates for steps): shapes on which each case of ours is first compared with the float64 reference.
    tolerances: relative errors up to which that is green, by result; "*" for all others. d_0: its range.
    """

    device: str
    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    quick: Mapping[str, Shape]
    gates: tuple[Shape, ...]
    cases: tuple[Case, ...]
    repeats: int
    tolerances: Mapping[str, float]
    step_gates: tuple[Shape, ...] = ()
    d_0: tuple[float, float] = (0.2, 2.0)
    forget: bool = False

    @property
    def peer(self) -> Case:
        """The first peer."""
        return next(case for case in self.cases if case.function)

    def case(self, name: str) -> Case:
        """The case of that name."""
        return {case.name: case for case in self.cases}[name]

    def inputs(self, shape: Shape, seed: int, decay: str = "none") -> Inputs:
        """Correlated unit keys, betas over all of (0, 1), d_0 away from 1: inputs on which d moves."""
        gen = torch.Generator(self.device).manual_seed(seed)
        B, T, H, K, V = shape.B, shape.T, shape.H, shape.K, shape.V
        N = len(shape.packed or range(B))

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=gen, device=self.device)

        def rand(*size: int) -> Tensor:
            return torch.rand(size, generator=gen, device=self.device)

        # Part of a key is common to its head; much more, and some d would leave [0, 2], where nothing is to clip.
        k = randn(B, T, H, K) + 0.25 * randn(B, 1, H, K)
        tokens = {"q": randn(B, T, H, K), "k": k / k.norm(dim=-1, keepdim=True), "v": randn(B, T, H, V)}
        low, high = self.d_0
        others = {"beta": rand(B, T, H), "d": low + (high - low) * rand(N, H, K)}
        do = randn(B, T, H, V).to(self.dtype)
        if self.forget:
            others["forget"] = logsigmoid(6.9 + 0.3 * randn(B, T, H))  # near the layer's initial value
        if decay != "none":
            # As layers of Gated DeltaNet and KDA start: rates of 1 to 16 per head, steps of .001 to .1.
            size = (H,) if decay == "scalar" else (H, K)
            step = torch.exp(math.log(0.001) + math.log(100) * rand(*size))
            rate = (1 + 15 * rand(H)).view(H, *[1] * (len(size) - 1))
            others["g"] = -rate * softplus(randn(B, T, *size) + step + torch.log(-torch.expm1(-step)))
        if shape.state:
            others["S"] = randn(N, H, K, V)
        bounds = None
        if shape.packed is not None:
            bounds = torch.tensor([0, *shape.packed], device=self.device).cumsum(0)
        leaves = {name: x.to(self.dtype) for name, x in tokens.items()} | others
        return Inputs(**{name: x.requires_grad_() for name, x in leaves.items()}, do=do, cu_seqlens=bounds)


def osdn_run(preconditioner: osdn.Preconditioner | None, backend: Backend = "chunked") -> Run:
    """The library's operator under that rule, as a user calls it."""

    def run(x: Inputs) -> tuple[Tensor, ...]:
        d, forget = (None, None) if preconditioner is None else (x.d, x.forget)
        o, end = osdn.online_scaled_delta_rule(
            *(x.q, x.k, x.v, x.beta),
            g=x.g,
            forget=forget,
            preconditioner=preconditioner,
            initial_state=osdn.DeltaState(x.S, d),
            output_final_state=True,
            cu_seqlens=x.cu_seqlens,
            backend=backend,
        )
        assert end is not None
        return tuple(y for y in (o, end.S, end.d) if y is not None)

    return run


def step_run(preconditioner: osdn.Preconditioner | None, backend: Backend = "auto") -> Run:
    """Token by token, as a decoder calls it; x.S and x.d are updated in place."""

    def run(x: Inputs) -> tuple[Tensor, ...]:
        d, forget = (None, None) if preconditioner is None else (x.d, x.forget)
        state, o = osdn.DeltaState(x.S, d), []
        for t in range(x.q.shape[1]):
            g, lam = (None if y is None else y[:, t] for y in (x.g, forget))
            q, k, v, beta = (y[:, t] for y in (x.q, x.k, x.v, x.beta))
            o.append(
                osdn.online_scaled_delta_step(
                    q, k, v, beta, state, g=g, forget=lam, preconditioner=preconditioner, backend=backend
                )
            )
        # A single token's o is not copied: that would be a second kernel beside the one that is timed.
        out = torch.stack(o, 1) if len(o) > 1 else o[0][:, None]
        return tuple(y for y in (out, x.S, d) if y is not None)

    return run


def _peer(name: str, function: str, tuning: float, decay: str = "none", plain: bool = True, **more: str) -> Case:
    """A function with flash-linear-attention's signature, imported when first called; `more`: argument = our input."""
    module, _, attribute = function.rpartition(".")
    takes = {n: n for n in ("q", "k", "v", "beta", "cu_seqlens")} | ({} if decay == "none" else {"g": "g"}) | more

    def run(x: Inputs) -> tuple[Tensor, ...]:
        call = getattr(importlib.import_module(module), attribute)
        return (call(**{name: getattr(x, ours) for name, ours in takes.items()}, use_qk_l2norm_in_kernel=True)[0],)

    return Case(name, run, None, None, (decay,), function=function, plain=plain, tuning=tuning)


@cache
def qwen3_next() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' own chunked gated delta rule, imported on first use since that takes seconds.

    The decorated function dispatches to other kernels where those are installed; the innermost one does not.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next

    peer: Callable[..., tuple[Tensor, Tensor | None]] = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    return peer


def _qwen3_next_run(x: Inputs) -> tuple[Tensor, ...]:
    g = torch.zeros_like(x.beta)
    return (qwen3_next()(x.q, x.k, x.v, g=g, beta=x.beta, use_qk_l2norm_in_kernel=True)[0],)


FREE = osdn.Preconditioner(eta=1.0, d_min=0.0, d_max=math.inf)
# beta_aware feedback keeps pushing d out at both ends; beta_free settles at d = 1, where nothing moves any more.
CLIPPED = osdn.Preconditioner(eta=1.0, feedback="beta_aware", d_min=1.4, d_max=1.6)

# With forgetting, beta_free keeps d moving around .9 for ever: far inside the paper's box, and out of a narrow one.
BOXED = osdn.Preconditioner(eta=1.0, d_min=0.0, d_max=2.0)
NARROW = osdn.Preconditioner(eta=1.0, d_min=0.88, d_max=0.92)


def gpu_cases(backend: Backend = "triton") -> tuple[Case, ...]:
    """Ours and, for each decay, the peers."""
    return (
        Case("osdn", osdn_run(BOXED, backend), BOXED, 0.0, DECAYS),
        Case("osdn-plain", osdn_run(None, backend), None, None, DECAYS, plain=True),
        # What d costs is the same under every decay. A value within a rounding of its bound, of which a gate has a few,
        # is clipped in float32 or in float64 alone: 1e-7 more of forget moves its gradient by 1e-2, in fp32 already.
        Case("osdn-clips", osdn_run(NARROW, backend), NARROW, 1.0, tolerances={"dforget": 5e-2}),
        Case("osdn-step", step_run(BOXED, backend), BOXED, None, DECAYS, step=True),
        Case("osdn-step-plain", step_run(None, backend), None, None, DECAYS, step=True),
        _peer("fla-deltanet", "fla.ops.delta_rule.chunk_delta_rule", 110),
        _peer("fla-gdn", "fla.ops.gated_delta_rule.chunk_gated_delta_rule", 110, "scalar"),
        _peer("flashqla-gdn", "flash_qla.chunk_gated_delta_rule", 120, "scalar"),
        _peer(
            "fla-precond-gdn",
            "fla.ops.precond_gated_delta_rule.chunk_precond_gated_delta_rule",
            150,
            "scalar",
            plain=False,
            g_atk="forget",
            beta_atk="beta",
        ),
        _peer("fla-kda", "fla.ops.kda.chunk_kda", 210, "channel"),
    )


SUITES: dict[str, Suite] = {
    "cpu": Suite(
        device="cpu",
        dtype=torch.float32,
        shapes={str(T): Shape(1, T, 8, 64, 64) for T in (512, 1024, 2048, 4096, 8192)},
        quick={str(T): Shape(1, T, 8, 64, 64) for T in (128, 256)},
        gates=(Shape(1, 200, 8, 64, 64),),
        cases=(
            Case("osdn", osdn_run(FREE), FREE, claim=0.0),
            Case("osdn, preconditioner=None", osdn_run(None), None, claim=None),
            Case("osdn, every chunk clips", osdn_run(CLIPPED), CLIPPED, claim=1.0),
            Case("transformers qwen3_next", _qwen3_next_run, None, claim=None, function="torch_chunk_gated_delta_rule"),
        ),
        repeats=7,
        tolerances={"*": 1e-4},  # float32 rounding stays well below it, a wrong term does not
    ),
    "gpu": Suite(
        device="cuda",
        dtype=torch.bfloat16,
        shapes={
            "b8-t4096-h8": Shape(8, 4096, 8, 128, 128),
            "b16-t4096-h8": Shape(16, 4096, 8, 128, 128),  # the next one's tokens in short sequences
            "b1-t65536-h8": Shape(1, 65536, 8, 128, 128),
            "packed-16x4096-h8": Shape(1, 65536, 8, 128, 128, packed=(4096,) * 16),
            "b4-t4096-h16": Shape(4, 4096, 16, 128, 128),
            "b1-t8192-h16": Shape(1, 8192, 16, 128, 128),
            **{f"decode-b{B}": Shape(B, 1, 16, 128, 128, state=True) for B in (1, 64, 256)},
        },
        quick={"b1-t256-h2": Shape(1, 256, 2, 128, 128), "decode-b2": Shape(2, 1, 2, 128, 128, state=True)},
        gates=(
            Shape(2, 200, 2, 128, 128, state=True),
            Shape(1, 323, 2, 128, 128, packed=(1, 63, 64, 65, 130), state=True),
        ),
        cases=gpu_cases(),
        repeats=30,
        # Rounding a bf16 operand costs 2e-3, and several are rounded one after another; d is float32 throughout.
        tolerances={"*": 2e-2, "d_T": 1e-3},
        step_gates=(Shape(3, 5, 2, 128, 128, state=True),),
        d_0=(0.2, 1.2),
        forget=True,
    ),
}


class RedGateError(Exception):
    """An implementation is wrong, or inputs do not exercise what their case claims: no speed is reported."""


def gate(suite: Suite, case: Case, *, decay: str = "none", seed: int = 0) -> dict[str, float]:
    """Relative errors of every result of `case` against the float64 reference, each of its worst sequence and head.

    Results are o and, where it hands them out, the final S and d, and but for a step every gradient, from random
    cotangents of all of these. Lengths are short and no multiples of the chunk length. Raises RedGateError above the
    tolerances of the case or else of the suite.
    """
    errors: dict[str, float] = {}
    tolerances = {**suite.tolerances, **case.tolerances}
    for shape in suite.step_gates if case.step else suite.gates:
        x = suite.inputs(shape, seed, decay)
        got = results(case.run, x.copy() if case.step else x, grads=not case.step)
        reference = osdn_run(case.preconditioner, "reference")
        want = results(reference, x.to(torch.float64), grads=not case.step, outputs=len(got.keys() & set(OUTPUTS)))
        found = compare(got, want, shape.packed)
        wrong = {name: e for name, e in found.items() if not e <= tolerances.get(name, tolerances["*"])}
        if wrong:
            limits = ", ".join(f"{limit} ({name})" for name, limit in tolerances.items())
            raise RedGateError(f"{case.name}: relative error against the float64 reference above {limits}: {wrong}")
        errors = {name: max(e, errors.get(name, 0.0)) for name, e in found.items()}
    return errors


def results(run: Run, x: Inputs, grads: bool = True, outputs: int | None = None) -> dict[str, Tensor]:
    """The first `outputs` of what `run` returns, and the gradients of all leaves from random cotangents of these."""
    with torch.set_grad_enabled(grads):
        ys = run(x)[:outputs]
    named = {name: y.detach() for name, y in zip(OUTPUTS, ys)}
    if not grads:
        return named
    gen = torch.Generator(x.do.device).manual_seed(1)
    cotangents = [x.do, *(torch.randn(y.shape, generator=gen, device=y.device).to(y.dtype) for y in ys[1:])]
    leaves = x.leaves()
    found = torch.autograd.grad(ys, list(leaves.values()), cotangents, materialize_grads=True)
    return named | {f"d{name}": grad for name, grad in zip(leaves, found)}


def compare(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], packed: tuple[int, ...] | None = None
) -> dict[str, float]:
    """||got - want|| / ||want|| by name, each of its worst sequence and head; NaN where there is one.

    ||want|| is at least a tenth of its largest: the gradient of a single token's gate may cancel to nearly nothing.
    """

    def norms(name: str, y: Tensor) -> Tensor:
        if name in ("S_T", "d_T", "dS", "dd"):
            return y.flatten(2).norm(dim=-1)
        y = y.transpose(1, 2)
        return torch.cat([part.flatten(2).norm(dim=-1) for part in ([y] if packed is None else y.split(packed, 2))])

    errors = {}
    for name, y in want.items():
        off, size = norms(name, got[name].double() - y), norms(name, y.double())
        # d_0 has no gradient where there is no preconditioner: both sides are zero.
        errors[name] = float(torch.where(off == 0, 0.0, off / size.clamp(min=0.1 * size.max())).max())
    return errors


def check_claim(case: Case, x: Inputs) -> dict[str, float]:
    """How far d moved and where it was clipped; raises RedGateError if that is not what the case claims."""
    p = case.preconditioner
    if p is None or case.claim is None:
        return {}
    with torch.no_grad():
        d_0 = x.d.detach().double()
        # The reference walks from token to token: packed sequences (of one length, in the suites) go side by side.
        k, beta = (y.detach().double().reshape(len(d_0), -1, *y.shape[2:]) for y in (x.k, x.beta))
        forget = None if x.forget is None else x.forget.detach().double().reshape(beta.shape)
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        d, d_final = osdn.precondition(k, beta, preconditioner=p, forget=forget, initial_d=d_0, backend="reference")
        b = beta if p.feedback == "beta_aware" else torch.ones_like(beta)
        s = k.square()
        e = b * (1 - b * (d * s).sum(-1))
        kept = d if forget is None else forget.exp()[..., None] * d
        free = kept + p.eta * e[..., None] * s
        clipped = ((free < p.d_min) | (free > p.d_max)).any(-1)
    chunks = torch.stack([chunk.any(1) for chunk in clipped.split(64, dim=1)])
    measured = {
        "d_moved": float((d_final - d_0).abs().amax(-1).min()),
        "chunks_clipped": float(chunks.double().mean()),
        "tokens_clipped": float(clipped.double().mean()),
    }
    if measured["d_moved"] < 0.1 or measured["chunks_clipped"] != case.claim:
        raise RedGateError(f"{case.name}: claims d moved and clips in {case.claim:.0%} of chunks, but {measured}")
    return measured
