"""One token of every sequence, in place: what decoding calls in each layer.

Letters: B sequences that take a step, N states in the pool, H key heads, HV value heads (a multiple of H), K key dim, V
value dim. The work dtype is float64 for float64 inputs, float32 for all others.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from osdn.ops import dispatch, reference
from osdn.ops.api import check_inputs, check_scale, check_state, has_tangent, l2norm, refuse_none
from osdn.ops.options import Backend, Feedback, Preconditioner, check_flags, no_autocast, refuse, work_dtype
from osdn.ops.state import DeltaState


def online_scaled_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: DeltaState,
    *,
    g: Tensor | None = None,
    forget: Tensor | None = None,
    preconditioner: Preconditioner | None,
    slots: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """One token of `online_scaled_delta_rule` for each of B sequences; `state` becomes the one after it, in place.

        S <- Gamma S + beta (d * k) (v - (Gamma S)^T k)^T,   o = scale * S^T q,   d <- clip(exp(forget) d + eta e k^2)

    Args:
        q, k: `[B, H, K]`, repeated over value heads where HV > H. One floating dtype for q, k and v.
        v: `[B, HV, V]`.
        beta: `[B, HV]`, step size in linear space; in the dtype of q or float32, as g and forget.
        state: `DeltaState(S [N, HV, K, V], d [N, HV, K])`, contiguous, in the work dtype; written to. d is None where
            `preconditioner` is. N is B, or any number of slots.
        g: log state decay, <= 0: None, `[B, HV]` or `[B, HV, K]`. forget: log lambda, <= 0 and finite, `[B, HV]`.
        preconditioner: the rule for d; None is d == 1, the plain delta rule.
        slots: `[B]` int32 or int64, the state of each sequence; None is state b for sequence b. A slot of -1 leaves
            all states alone and gives o = 0. The values are checked on CPU only. A slot given twice leaves a state
            that is undefined.
        scale: factor of the output; None is K^-0.5.
        qk_l2norm: normalise q and k by `x * rsqrt(sum x^2 + 1e-6)`, in the work dtype.
        backend: "triton" is one kernel launch, which a CUDA graph can capture; "reference" is plain PyTorch, which
            cannot be captured where there are slots. "chunked" is "reference": one token makes no chunk. "auto" takes
            "triton" where it is available. OSDN_BACKEND overrides "auto".

    Returns:
        o `[B, HV, V]` in the dtype of v.

    Raises:
        ValueError: naming the argument, what it got and what it takes, before any work is done. Also where gradients
            are recorded and an input requires them: the step is not differentiable, `online_scaled_delta_rule` is.
    """
    refuse_none(q=q, k=k, v=v, beta=beta)
    check_flags(qk_l2norm=qk_l2norm)
    check_inputs(q, k, v, beta, g, forget, preconditioner, "B")
    scale = check_scale(scale, k)
    check_state("state", state, len(k) if slots is None else None, k, v, preconditioner, whole=True)
    S, d = state.S, state.d
    assert S is not None
    compiling = torch.compiler.is_compiling()
    for name, x in (("state.S", S), ("state.d", d)):
        if x is None:
            continue
        if not x.is_contiguous():
            refuse(name, f"strides {x.stride()}", "a contiguous tensor, to be updated in place")
        if not compiling and x.is_inference() and not torch.is_inference_mode_enabled():
            refuse(name, "an inference tensor outside inference mode", "one that may be updated there")
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "forget": forget, "state.S": S, "state.d": d}
    for name, x in inputs.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            refuse(name, "a tensor that requires grad", "one that does not, or a call under torch.no_grad()")
        if has_tangent(x):
            refuse(name, "a tensor with a tangent", "one without: the step is not differentiable")
    if slots is not None:
        _check_slots(slots, k, len(S))
    tensors = (q, k, v, beta, g, forget, S, d, slots)
    if compiling or q.is_meta or type(q) is not Tensor:  # fake tensors among these
        p = preconditioner or Preconditioner()
        rule = (float(p.eta), p.feedback, float(p.d_min), float(p.d_max), p.normalize_step)
        return _operator(*tensors, *rule, scale, qk_l2norm, backend)
    o = _step(backend, *tensors, preconditioner, scale, qk_l2norm)
    for x in (S, d):  # autograd is to see what a kernel wrote into
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)
    return o


def _check_slots(slots: Tensor, k: Tensor, N: int) -> None:
    if not isinstance(slots, Tensor):
        refuse("slots", type(slots).__name__, "a torch.Tensor")
    if slots.shape != k.shape[:1] or slots.dtype not in (torch.int32, torch.int64) or slots.device != k.device:
        takes = f"int32 or int64 {tuple(k.shape[:1])} on {k.device}"
        refuse("slots", f"{slots.dtype} {tuple(slots.shape)} on {slots.device}", takes)
    if slots.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(y) for y in slots.aminmax())
        if low < -1 or high >= N:
            refuse("slots", f"values from {low} to {high}", f"-1 (skipped) or a slot below {N}")


def _step(backend: Backend, q: Tensor, *rest: Any) -> Tensor:
    if backend == "auto" and not os.environ.get("OSDN_BACKEND"):
        backend = "reference" if dispatch.why_not_triton_unasked(q) else "triton"
    if dispatch.choose(q[:, None], backend).backend == "triton":
        from osdn.ops.triton.recurrent import delta_step

        return delta_step(q, *rest)
    return _by_definition(q, *rest)


@torch.library.custom_op(
    "osdn::delta_step",
    mutates_args=("S", "d"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? forget, Tensor(a!) S, Tensor(b!)? d, "
    "Tensor? slots, float eta, str feedback, float d_min, float d_max, bool normalize_step, float scale, "
    "bool qk_l2norm, str backend) -> Tensor",
)
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    forget: Tensor | None,
    S: Tensor,
    d: Tensor | None,
    slots: Tensor | None,
    eta: float,
    feedback: Feedback,
    d_min: float,
    d_max: float,
    normalize_step: bool,
    scale: float,
    qk_l2norm: bool,
    backend: Backend,
) -> Tensor:
    """For compiled graphs, which stay whole: the backend is chosen in here, out of the compiler's sight, and values of
    slots are looked at. Eager calls go without, as it would cost them more of the host's time than all the rest does.
    """
    if slots is not None:
        _check_slots(slots, k, len(S))
    p = None if d is None else Preconditioner(eta, feedback, d_min, d_max, normalize_step)
    return _step(backend, q, k, v, beta, g, forget, S, d, slots, p, scale, qk_l2norm)


@_operator.register_fake
def _(_q, _k, v, *_):  # type: ignore[no-untyped-def]
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    forget: Tensor | None,
    S: Tensor,
    d: Tensor | None,
    slots: Tensor | None,
    p: Preconditioner | None,
    scale: float,
    qk_l2norm: bool,
) -> Tensor:
    """A sequence of one token, by the definition."""
    work, groups = work_dtype(q), v.shape[1] // q.shape[1]
    o = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    at: Tensor | slice = slice(None)
    live: Tensor | slice = slice(None)
    if slots is not None:
        live = (slots >= 0).nonzero()[:, 0]
        at = slots[live].long()

    def one(x: Tensor) -> Tensor:
        return x[live, None].to(work)

    with no_autocast(q.device):
        qw, kw = one(q), one(k)
        if qk_l2norm:
            qw, kw = l2norm(qw), l2norm(kw)
        qw, kw = (x.repeat_interleave(groups, 2) for x in (qw, kw))
        g, forget = (None if x is None else one(x) for x in (g, forget))
        new, S_new, d_new = reference.online_scaled_delta_rule(
            qw, kw, one(v), one(beta), g, forget, S[at], None if d is None else d[at], None, p, scale, 1
        )
    o[live] = new[:, 0].to(o.dtype)
    S[at] = S_new
    if d is not None and d_new is not None:
        d[at] = d_new
    return o
