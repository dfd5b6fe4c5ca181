"""The registry: what is measured, on which inputs, and the gate that each implementation has to pass first.

A case states in `claim` what its inputs are to exercise, and the benchmark asserts it: a "clip" case in which no clip
fires, or an "adaptive" one in which d stays put, would time something else.

Letters: B batch, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import osdn
from osdn.ops.options import Backend


@dataclass(frozen=True)
class Inputs:
    """One call's leaves (q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H], d_0 [B, H, K]) and the gradient of o."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    d: Tensor
    do: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        return {name: x for name, x in vars(self).items() if name != "do"}

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, as new leaves."""
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves().items()}
        return Inputs(**leaves, do=self.do.to(dtype))


Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Case:
    """An implementation to measure: `run` computes o; `preconditioner` says what the float64 reference computes.

    claim: what share of (chunk of 64, head) pairs sees a clip; None where no preconditioner is in use.
    """

    name: str
    run: Run
    preconditioner: osdn.Preconditioner | None
    claim: float | None


@dataclass(frozen=True)
class Suite:
    """Cases measured on the same shapes, in the same run; ratios are taken against the case named `peer`."""

    device: str
    dtype: torch.dtype
    B: int
    H: int
    K: int
    V: int
    tokens: tuple[int, ...]
    quick_tokens: tuple[int, ...]
    cases: tuple[Case, ...]
    peer: str

    def case(self, name: str) -> Case:
        """The case of that name."""
        return {case.name: case for case in self.cases}[name]

    def inputs(self, T: int, seed: int) -> Inputs:
        """Correlated unit keys, betas over all of (0, 1), d_0 from U[0.2, 2]: inputs on which d moves."""
        gen = torch.Generator().manual_seed(seed)

        def leaf(x: Tensor) -> Tensor:
            return x.to(self.device, self.dtype).requires_grad_()

        B, H, K, V = self.B, self.H, self.K, self.V
        # Part of a key is common to its head; much more, and some d would step below 0, where FREE must not clip.
        k = torch.randn(B, T, H, K, generator=gen) + 0.25 * torch.randn(B, 1, H, K, generator=gen)
        return Inputs(
            q=leaf(torch.randn(B, T, H, K, generator=gen)),
            k=leaf(k / k.norm(dim=-1, keepdim=True)),
            v=leaf(torch.randn(B, T, H, V, generator=gen)),
            beta=leaf(torch.rand(B, T, H, generator=gen)),
            d=leaf(0.2 + 1.8 * torch.rand(B, H, K, generator=gen)),
            do=torch.randn(B, T, H, V, generator=gen).to(self.device, self.dtype),
        )


def osdn_run(preconditioner: osdn.Preconditioner | None, backend: Backend = "chunked") -> Run:
    """The library's operator under that rule, as a user calls it."""

    def run(x: Inputs) -> Tensor:
        state = None if preconditioner is None else osdn.DeltaState(d=x.d)
        return osdn.online_scaled_delta_rule(
            x.q, x.k, x.v, x.beta, preconditioner=preconditioner, initial_state=state, backend=backend
        )[0]

    return run


@cache
def qwen3_next() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' own chunked gated delta rule, imported on first use since that takes seconds.

    The decorated function dispatches to other kernels where those are installed; the innermost one does not.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next

    peer: Callable[..., tuple[Tensor, Tensor | None]] = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    return peer


def _qwen3_next_run(x: Inputs) -> Tensor:
    g = torch.zeros_like(x.beta)
    return qwen3_next()(x.q, x.k, x.v, g=g, beta=x.beta, use_qk_l2norm_in_kernel=True)[0]


FREE = osdn.Preconditioner(eta=1.0, d_min=0.0, d_max=math.inf)
# beta_aware feedback keeps pushing d out at both ends; beta_free settles at d = 1, where nothing moves any more.
CLIPPED = osdn.Preconditioner(eta=1.0, feedback="beta_aware", d_min=1.4, d_max=1.6)

SUITES: dict[str, Suite] = {
    "cpu": Suite(
        device="cpu",
        dtype=torch.float32,
        B=1,
        H=8,
        K=64,
        V=64,
        tokens=(512, 1024, 2048, 4096, 8192),
        quick_tokens=(128, 256),
        cases=(
            Case("osdn", osdn_run(FREE), FREE, claim=0.0),
            Case("osdn, preconditioner=None", osdn_run(None), None, claim=None),
            Case("osdn, every chunk clips", osdn_run(CLIPPED), CLIPPED, claim=1.0),
            Case("transformers qwen3_next", _qwen3_next_run, None, claim=None),
        ),
        peer="transformers qwen3_next",
    ),
}


class RedGateError(Exception):
    """An implementation is wrong, or inputs do not exercise what their case claims: no speed is reported."""


def gate(suite: Suite, case: Case, *, T: int = 200, seed: int = 0, tolerance: float = 1e-4) -> dict[str, float]:
    """Relative errors (largest deviation over largest value) of o and every gradient against the float64 reference.

    T is short and no multiple of the chunk length. Raises RedGateError above `tolerance`: float32 rounding stays well
    below it, a wrong term does not.
    """
    x = suite.inputs(T, seed)
    got, want = (
        _o_and_grads(run, y)
        for run, y in ((case.run, x), (osdn_run(case.preconditioner, "reference"), x.to(torch.float64)))
    )
    errors = {}
    for name, reference in want.items():
        scale = reference.abs().max()
        # d_0 has no gradient where there is no preconditioner: both sides are zero.
        errors[name] = float((got[name].double() - reference).abs().max() / torch.where(scale > 0, scale, 1.0))
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        raise RedGateError(f"{case.name}: relative error against the float64 reference above {tolerance}: {wrong}")
    return errors


def _o_and_grads(run: Run, x: Inputs) -> dict[str, Tensor]:
    o = run(x)
    leaves = x.leaves()
    grads = torch.autograd.grad(o, list(leaves.values()), x.do, materialize_grads=True)
    return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def check_claim(case: Case, x: Inputs) -> dict[str, float]:
    """How far d moved and where it was clipped; raises RedGateError if that is not what the case claims."""
    p = case.preconditioner
    if p is None or case.claim is None:
        return {}
    with torch.no_grad():
        k, beta, d_0 = (y.detach().double() for y in (x.k, x.beta, x.d))
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        d, d_final = osdn.precondition(k, beta, preconditioner=p, initial_d=d_0, backend="reference")
        b = beta if p.feedback == "beta_aware" else torch.ones_like(beta)
        s = k.square()
        e = b * (1 - b * (d * s).sum(-1))
        free = d + p.eta * e[..., None] * s
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
