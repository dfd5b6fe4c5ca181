"""The Triton backend: hosts of the kernels, and their two differentiable operators.

    osdn::triton_delta_rule      the fused rule, preconditioner optional
    osdn::triton_precondition    d_t alone

As `torch.library` operators they leave a `torch.compile` graph whole. Inputs are taken as the caller has them (bf16,
fp16 or fp32, q and k not yet normalised, fewer key than value heads); states are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from osdn.ops.options import Preconditioner
from osdn.ops.triton import delta
from osdn.ops.triton import precondition as kernels
from osdn.ops.triton.call import Call, assert_covered


@dataclass(frozen=True)
class _Path:
    """What is left of d: d before each chunk, e of each token, the chunks that were walked through and the last of
    them in each sequence, transposed maps of segments, M."""

    starts: Tensor | None = None
    e: Tensor | None = None
    tails: Tensor | None = None
    last: Tensor | None = None
    maps: Tensor | None = None
    solve: Tensor | None = None


@dataclass(frozen=True)
class _Rule:
    """The preconditioner's part of a call."""

    call: Call
    k: Tensor
    beta: Tensor | None
    forget: Tensor | None
    p: Preconditioner
    l2norm: bool

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "k": self.k, "beta": self.beta, "forget": self.forget, "eta": self.p.eta, "d_min": self.p.d_min,
            "d_max": self.p.d_max, "AWARE": self.p.feedback == "beta_aware", "NORMALIZE": self.p.normalize_step,
            "FORGET": self.forget is not None, "BOX": self.p.d_min > -math.inf or self.p.d_max < math.inf,
        }  # fmt: skip

    def factors(self, rk: Tensor | None, path: _Path, solve: bool) -> Tensor:
        """What the passes over chunks read beside k and M, which is computed too where it is not known yet."""
        call = self.call
        factors = call.new(call.chunk_count, call.HV, 6, call.C)
        call.by_chunk(
            kernels.precondition_solve_kernel, rk=rk, L2NORM=self.l2norm, solve=path.solve, factors=factors,
            SOLVE=solve, **self.arguments,
        )  # fmt: skip
        return factors

    def empty_path(self) -> _Path:
        call, n, HV, K = self.call, self.call.chunk_count, self.call.HV, self.k.shape[3]
        # fp16 is as exact as tf32 and overflows where d would grow by 65504 in a chunk: only a box has that walked to.
        small = self.k.dtype == torch.bfloat16 and self.arguments["BOX"]
        return _Path(
            starts=call.new(n, HV, K),
            e=call.tokens(HV),
            tails=call.new(n, HV, dtype=torch.int32),
            last=call.sequences(dtype=torch.int32),
            maps=call.maps(call.stored) if call.split > 1 else None,
            solve=call.new(n, HV, call.C, call.C, dtype=torch.float16 if small else torch.float32),
        )

    def forward(self, d: Tensor, rk: Tensor | None, into: Tensor, **expanded: Any) -> tuple[_Path, Tensor]:
        """Where d goes, and d at the end; rk is filled in where keys are to be normalised, and d_t of each token, or
        what it makes of the key, put into a tensor."""
        call, path, box = self.call, self.empty_path(), self.arguments["BOX"]
        arguments = {"factors": self.factors(rk, path, True), **vars(path), **self.arguments, "rk": rk, "d_0": d}
        if path.maps is not None:
            steps, maps = call.segments(d.shape[2]), call.maps()
            call.by_segment(
                kernels.precondition_map_kernel, **arguments | {"d_end": steps, "maps": maps, "maps_T": path.maps}
            )
            arguments["d_0"] = call.chain(maps, steps, d, back=False)
            del steps, maps
        arguments["d_end"] = torch.empty_like(d)
        arguments["stops"] = call.sequences(dtype=torch.int32) if box else None
        for walk in (False, True) if box else (False,):
            call.by_segment(kernels.precondition_fwd_kernel, WALK=walk, **arguments)
            call.by_chunk(kernels.precondition_expand_kernel, WALK=walk, d=into, **arguments | expanded)
            if box and not walk:
                call.by_chunk(kernels.precondition_check_kernel, **arguments)
        return path, arguments["d_end"]

    def backward(
        self, a: Tensor, d_adj_end: Tensor | None, rk: Tensor | None, path: _Path, dk_rest: Tensor | None = None,
        dbeta_rest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        """Gradients of k, beta, forget, d_0 from `a`, that of d_t or, with the rest of k's, of the write key."""
        call, (HV, K) = self.call, a.shape[2:]
        p, adj_ends = call.tokens(HV), call.new(call.chunk_count, HV, K)
        local = {"h_local": call.tokens(HV), "adj_local": torch.empty_like(adj_ends)}
        u = call.tokens(HV, K, dtype=call.stored) if self.arguments["BOX"] else None
        common = self.arguments | vars(path) | {"a": a, "rk": rk, "p": p, "u": u, "adj_ends": adj_ends}
        common["OF_WRITE_KEY"] = dk_rest is not None
        call.by_chunk(kernels.precondition_local_kernel, **local, **common)
        passes = partial(call.by_segment, kernels.precondition_bwd_kernel)
        passed = {**common, **local, "factors": self.factors(rk, path, False)}
        if path.maps is not None:
            first = call.segments(K)
            alone = {"d_adj_end": d_adj_end, "d_adj_0": first, "p": None, "BOX": False}
            passes(WALK=False, **passed | alone)
            d_adj_end = call.chain(path.maps, first, d_adj_end, back=True)
        passed |= {"d_adj_end": d_adj_end, "d_adj_0": call.sequences(K)}
        passes(WALK=False, **passed)
        if self.arguments["BOX"]:
            passes(WALK=True, **passed)
        dk = call.tokens(HV, K, dtype=self.k.dtype)
        dbeta = call.tokens(HV) if self.p.feedback == "beta_aware" else None
        dforget = None if self.forget is None else call.tokens(HV)
        call.by_chunk(
            kernels.precondition_grads_kernel, dk=dk, dbeta=dbeta, dforget=dforget, dk_rest=dk_rest,
            dbeta_rest=dbeta_rest, **common,
        )  # fmt: skip
        return dk, dbeta if dbeta is not None else dbeta_rest, dforget, passed["d_adj_0"]


@dataclass(frozen=True)
class _Delta:
    """The delta rule's part of a call."""

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    rule: _Rule | None
    l2norm: bool
    scale: float

    @property
    def DECAY(self) -> int:
        return 0 if self.g is None else self.g.ndim - 2

    @property
    def common(self) -> dict[str, Any]:
        return {
            "g": self.g, "beta": self.beta, "scale": self.scale, "DECAY": self.DECAY, "L2NORM": self.l2norm,
            "PRECONDITIONED": self.rule is not None,
        }  # fmt: skip

    def empty_intra(self) -> dict[str, Tensor | None]:
        """T, P and scales of rows, of each chunk alone, which `delta_intra_fwd_kernel` leaves, and w."""
        call, n, HV, C = self.call, self.call.chunk_count, self.call.HV, self.call.C
        T, P = (call.new(n, HV, C, C, dtype=call.stored) for _ in range(2))
        w = None if self.rule is None else call.tokens(HV, self.k.shape[3], dtype=call.stored)
        rows = delta.scales_of(self.DECAY, self.rule is not None)
        return {"T": T, "P": P, "w": w, "scales": None if self.DECAY == 2 else call.new(n, HV, rows, C)}

    def read(self, rq: Tensor | None, rk: Tensor | None, intra: dict[str, Any]) -> dict[str, Any]:
        """What the passes over chunks read."""
        call, HV, K = self.call, self.call.HV, self.k.shape[3]
        w = self.k if intra["w"] is None else intra["w"]
        x = {**self.common, **intra, "q": self.q, "k": self.k, "w": w, "decay": None}
        if self.DECAY == 2:
            qx, kx, wx = (call.tokens(HV, K, dtype=call.stored) for _ in range(3))
            decay = call.new(call.chunk_count, HV, K)
            into = {"rq": rq, "rk": rk, "qx": qx, "kx": kx, "wx": wx, "decay": decay}
            call.by_chunk(delta.delta_channels_kernel, **x | into)
            x |= {"q": qx, "k": kx, "w": wx, "decay": decay}
        return x | {"HQ": x["q"].shape[2], "HW": x["w"].shape[2]}

    def pass_on(self, read: dict[str, Any], **asked: Tensor | None) -> None:
        """S from chunk to chunk, S_0 None for 0; of what the kernel can leave, what is asked for."""
        absent = dict.fromkeys(("S_0", "o", "S_end", "S_map", "S_map_T", "states", "U"))
        self.call.by_segment(delta.delta_inter_fwd_kernel, v=self.v, **read | absent | asked)

    def forward(
        self, rq: Tensor | None, rk: Tensor | None, intra: dict[str, Tensor | None], S: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """o, S at the end, and what is kept: S before segments and their maps transposed, T, P, w and scales; of
        `intra` w is given, and of norms those that a preconditioner has left."""
        call, K, V = self.call, self.k.shape[3], self.call.V
        call.by_chunk(delta.delta_intra_fwd_kernel, q=self.q, k=self.k, rq=rq, rk=rk, **self.common, **intra)
        o, S_end = torch.empty_like(self.v), call.sequences(K, V)
        pass_on = partial(self.pass_on, self.read(rq, rk, intra))
        starts = maps_T = None
        if call.split > 1:
            steps, maps, maps_T = call.segments(K, V), call.maps(), call.maps(call.stored)
            pass_on(S_0=S, S_end=steps, S_map=maps, S_map_T=maps_T)
            S = starts = call.chain(maps, steps, S, back=False)
            del steps, maps
        pass_on(S_0=S, o=o, S_end=S_end)
        return o, S_end, [starts, maps_T, *intra.values()]

    def backward(
        self, do: Tensor, dS_end: Tensor | None, S: Tensor | None, kept: list[Tensor | None], rq: Tensor | None,
        rk: Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Gradients by name; with a preconditioner, dk is that of k as used, without the part that comes through w."""
        call, HV, K, V = self.call, self.call.HV, self.k.shape[3], self.call.V
        starts, maps_T, *intra = kept
        read = self.read(rq, rk, dict(zip(("T", "P", "w", "scales"), intra)))
        states, dstates = (call.new(call.chunk_count, HV, K, V, dtype=call.stored) for _ in range(2))
        U, dB = (call.tokens(HV, V, dtype=call.stored) for _ in range(2))
        self.pass_on(read, S_0=S if starts is None else starts, states=states, U=U)
        back = partial(call.by_segment, delta.delta_inter_bwd_kernel, do=do, **read)
        first = call.segments(K, V)
        if maps_T is not None:
            back(dS_end=dS_end, dB=None, dstates=None, dS_0=first)
            dS_end = call.chain(maps_T, first, dS_end, back=True)
        back(dS_end=dS_end, dB=dB, dstates=dstates, dS_0=first)
        del read, back  # under a decay per channel, copies of q, k and w
        found = {
            "dq": call.tokens(HV, K, dtype=self.q.dtype),
            "dk": call.tokens(HV, K, dtype=self.q.dtype if self.rule is None else call.stored),
            "dv": torch.empty_like(self.v),
            "dbeta": call.tokens(HV),
            "dg": None if self.g is None else call.tokens(*self.g.shape[2:]),
            "dw": None if self.rule is None else call.tokens(HV, K, dtype=call.stored),
        }
        call.by_chunk(
            delta.delta_intra_bwd_kernel, q=self.q, k=self.k, w=intra[2], v=self.v, rq=rq, rk=rk, states=states,
            dstates=dstates, U=U, dB=dB, do=do, **found, **self.common,
        )  # fmt: skip
        if call.split > 1:  # copied, as a view of a single sequence's would keep those of all segments alive
            first = first.unflatten(0, (call.N, call.split))[:, 0].clone()
        return found | {"dS": None if S is None else first}


def _parts(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, forget: Tensor | None, cu_seqlens: Tensor | None,
    preconditioned: bool, rule: list[float], l2norm: bool, scale: float, chunk_size: int,
) -> _Delta:  # fmt: skip
    call = Call(k, v.shape[2], v.shape[3], cu_seqlens, chunk_size, g is not None and g.ndim == 4)
    own = _Rule(call.of_d(), k, beta, forget, _preconditioner(rule), l2norm) if preconditioned else None
    return _Delta(call, q, k, v, beta, g, own, l2norm, scale)


def _numbers(p: Preconditioner) -> list[float]:
    """A rule as an operator's argument. Of an int, Triton would make a constant or compile anew."""
    return [float(p.eta), float(p.d_min), float(p.d_max), p.feedback == "beta_aware", p.normalize_step]


def _preconditioner(rule: list[float]) -> Preconditioner:
    eta, d_min, d_max, aware, normalize = rule
    return Preconditioner(eta, "beta_aware" if aware else "beta_free", d_min, d_max, bool(normalize))


def _or_empty(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Operators return tensors only: an empty one stands for None."""
    return [like.new_empty(0) if x is None else x for x in tensors]


def _or_none(*tensors: Tensor) -> list[Tensor | None]:
    return [None if x.numel() == 0 else x for x in tensors]


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, forget: Tensor | None, S: Tensor | None,
    d: Tensor | None, cu_seqlens: Tensor | None, rule: list[float], l2norm: bool, scale: float, chunk_size: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """o, S_end, d_end and what the backward needs: what `_Delta` keeps, norms of q and k, and the path of d."""
    assert_covered(k, cu_seqlens)
    parts = _parts(q, k, v, beta, g, forget, cu_seqlens, d is not None, rule, l2norm, scale, chunk_size)
    rq, rk = (parts.call.tokens(k.shape[2]) if l2norm else None for _ in range(2))
    intra, path, d_end = parts.empty_intra(), None, None
    if parts.rule is not None and d is not None and intra["w"] is not None:
        path, d_end = parts.rule.forward(d, rk, intra["w"], OF_WRITE_KEY=True)
    o, S_end, kept = parts.forward(rq, rk, intra, S)
    return o, S_end, *_or_empty(k, d_end, *kept, rq, rk, *vars(path or _Path()).values())


def _delta_rule_fake(q, k, v, beta, g, forget, S, d, cu_seqlens, rule, l2norm, scale, chunk_size):  # type: ignore[no-untyped-def]
    parts = _parts(q, k, v, beta, g, forget, cu_seqlens, d is not None, rule, l2norm, scale, chunk_size)
    call = parts.call
    K, V = k.shape[3], v.shape[3]
    starts = call.segments(K, V) if call.split > 1 else None
    maps = call.maps(call.stored) if call.split > 1 else None
    norms = [call.tokens(k.shape[2]) if l2norm else None for _ in range(2)]
    path = _Path() if parts.rule is None else parts.rule.empty_path()
    d_end = None if d is None else torch.empty_like(d)
    kept = (starts, maps, *parts.empty_intra().values(), *norms, *vars(path).values())
    return torch.empty_like(v), call.sequences(K, V), *_or_empty(k, d_end, *kept)


def _delta_rule_backward(
    do: Tensor, dS: Tensor | None, dd: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    forget: Tensor | None, S: Tensor | None, d: Tensor | None, cu_seqlens: Tensor | None, rule: list[float],
    l2norm: bool, scale: float, chunk_size: int, saved: list[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, beta, g, forget, S and d; empty where there is no such input."""
    parts = _parts(q, k, v, beta, g, forget, cu_seqlens, d is not None, rule, l2norm, scale, chunk_size)
    *kept, rq, rk = _or_none(*saved[:8])
    path = _or_none(*saved[8:])
    at = None if parts.rule is None else _Path(*path)
    found = parts.backward(do, dS, S, kept, rq, rk)
    dq, dk, dbeta, dw, dforget, dd_0 = (*(found[n] for n in ("dq", "dk", "dbeta", "dw")), None, None)
    if parts.rule is not None and at is not None and dw is not None:
        dk, dbeta, dforget, dd_0 = parts.rule.backward(dw, dd, rk, at, dk, dbeta)
    groups = v.shape[2] // k.shape[2]
    if groups > 1:
        dq, dk = (x.unflatten(2, (-1, groups)).sum(3) for x in (dq, dk))
    return tuple(_or_empty(k, dq, dk, found["dv"], dbeta, found["dg"], dforget, found["dS"], dd_0))


def _delta_rule_backward_fake(do, dS, dd, q, k, v, beta, g, forget, S, d, *_):  # type: ignore[no-untyped-def]
    gates = (None if x is None else torch.empty_like(x, dtype=torch.float32) for x in (beta, g, forget))
    rest = (None if x is None else torch.empty_like(x) for x in (S, d))
    return *(torch.empty_like(x) for x in (q, k, v)), *_or_empty(k, *gates, *rest)


def _alone(k: Tensor, beta: Tensor | None, forget: Tensor | None, cu: Tensor | None, rule: list[float]) -> _Rule:
    return _Rule(Call(k, k.shape[2], 1, cu, 64).of_d(), k, beta, forget, _preconditioner(rule), False)


def _precondition(
    k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor, cu_seqlens: Tensor | None, rule: list[float]
) -> tuple[Tensor, ...]:
    """d_t, d at the end and what the backward needs: d before each chunk, e, where clips may have fired."""
    assert_covered(k, cu_seqlens)
    own = _alone(k, beta, forget, cu_seqlens, rule)
    used = own.call.tokens(*k.shape[2:])
    path, d_end = own.forward(d, None, used, DT=tl.float32, PRECISION=own.call.EXACT, OF_WRITE_KEY=False)
    return used, d_end, *_or_empty(k, *vars(path).values())


def _precondition_fake(k, beta, forget, d, cu_seqlens, rule):  # type: ignore[no-untyped-def]
    own = _alone(k, beta, forget, cu_seqlens, rule)
    return own.call.tokens(*k.shape[2:]), torch.empty_like(d), *_or_empty(k, *vars(own.empty_path()).values())


def _precondition_backward(
    a: Tensor, dd: Tensor | None, k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor,
    cu_seqlens: Tensor | None, rule: list[float], saved: list[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of k, beta, forget and d_0; empty where there is no such input."""
    own = _alone(k, beta, forget, cu_seqlens, rule)
    dk, dbeta, dforget, dd_0 = own.backward(a, dd, None, _Path(*_or_none(*saved)))
    if beta is not None and dbeta is None:
        dbeta = torch.zeros_like(beta, dtype=torch.float32)
    return dk, *_or_empty(k, dbeta, dforget), dd_0


def _precondition_backward_fake(a, dd, k, beta, forget, d, *_):  # type: ignore[no-untyped-def]
    gates = (None if x is None else torch.empty_like(x, dtype=torch.float32) for x in (beta, forget))
    return torch.empty_like(k), *_or_empty(k, *gates), torch.empty_like(d)


def differentiable(
    name: str,
    schema: str,
    results: str,
    gradients: str,
    outputs: int,
    forward: Callable[..., tuple[Tensor, ...]],
    forward_fake: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]],
    backward_fake: Callable[..., Any],
) -> Callable[..., tuple[Tensor, ...]]:
    """`forward` with gradients: an autograd.Function, and in compiled graphs an operator of torch.library.

    The second alone would cost eager calls more of the host's time than the launches do. Of the results, the first
    `outputs` are the caller's and the others are saved for `backward`, which takes the gradients of the former, all
    inputs and the latter.
    """
    tensors = sum(part.strip().startswith("Tensor") for part in schema.split(","))
    cotangents = ", ".join(["Tensor grad"] + [f"Tensor? grad{i}" for i in range(1, outputs)])
    operator = torch.library.custom_op(f"osdn::{name}", forward, mutates_args=(), schema=f"({schema}) -> ({results})")
    operator.register_fake(forward_fake)
    schema = f"({cotangents}, {schema}, Tensor[] saved) -> ({gradients})"
    adjoint = torch.library.custom_op(f"osdn::{name}_backward", backward, mutates_args=(), schema=schema)
    adjoint.register_fake(backward_fake)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.others, ctx.shape, ctx.dtype = inputs[tensors:], output[0].shape, output[0].dtype
        ctx.mark_non_differentiable(*output[outputs:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *output[outputs:])

    def gradient(run: Callable[..., tuple[Tensor, ...]], ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # read once, as activation checkpointing allows no more
        inputs, saved = kept[:tensors], kept[tensors:]
        first, *rest = (None if x is None else x.contiguous() for x in grads[:outputs])
        if first is None:
            first = torch.zeros(ctx.shape, dtype=ctx.dtype, device=inputs[0].device)
        found = run(first, *rest, *inputs, *ctx.others, list(saved))
        known = (None if x is None else y.to(x.dtype) for x, y in zip(inputs[:-1], found))
        return *known, *[None] * (1 + len(ctx.others))  # the last tensor is cu_seqlens

    operator.register_autograd(partial(gradient, adjoint), setup_context=setup)

    # Not with setup_context, for which PyTorch would look up the signature in every call.
    def run(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    # The operator's, where derivatives of it are recorded, as it refuses these: a function would pass for a constant.
    def back(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return gradient(adjoint if torch.is_grad_enabled() else backward, ctx, *grads)

    members = {"forward": staticmethod(run), "backward": staticmethod(back)}
    function: Any = type(name, (torch.autograd.Function,), members)
    return lambda *inputs: (operator if torch.compiler.is_compiling() else function.apply)(*inputs)


def tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


delta_rule = differentiable(
    "triton_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? forget, Tensor? S, Tensor? d, Tensor? cu_seqlens, "
    "float[] rule, bool l2norm, float scale, int chunk_size",
    tensors(17), tensors(8), 3, _delta_rule, _delta_rule_fake, _delta_rule_backward, _delta_rule_backward_fake,
)  # fmt: skip
precondition_rule = differentiable(
    "triton_precondition",
    "Tensor k, Tensor? beta, Tensor? forget, Tensor d, Tensor? cu_seqlens, float[] rule",
    tensors(8), tensors(4), 2, _precondition, _precondition_fake, _precondition_backward, _precondition_backward_fake,
)  # fmt: skip


def precondition(
    k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor, cu_seqlens: Tensor | None, p: Preconditioner
) -> tuple[Tensor, Tensor]:
    used, d_end, *_ = precondition_rule(*_contiguous(k, beta, forget, d), cu_seqlens, _numbers(p))
    return used, d_end


def online_scaled_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, forget: Tensor | None, S: Tensor | None,
    d: Tensor | None, cu_seqlens: Tensor | None, p: Preconditioner | None, scale: float, chunk_size: int, l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    rule = [] if p is None else _numbers(p)
    o, S, d_end, *_ = delta_rule(
        *_contiguous(q, k, v, beta, g, forget, S, d), cu_seqlens, rule, l2norm, scale, chunk_size
    )
    return o, S, None if p is None else d_end


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]
