"""The public operators: validation, defaults, normalisation; the mathematics is the backends'.

Letters: B batch, T tokens, H key heads, HV value heads (a multiple of H), K key dim, V value dim, N sequences
(the batch, or the sequences of a packed batch). The work dtype is float64 for float64 inputs, float32 for all others.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from osdn.ops.dispatch import Choice, choose
from osdn.ops.options import (
    Backend,
    Preconditioner,
    bounds_of,
    check_flags,
    check_number,
    no_autocast,
    refuse,
    work_dtype,
)
from osdn.ops.state import DeltaState

_warned_tie = False


def online_scaled_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    g: Tensor | None = None,
    forget: Tensor | None = None,
    preconditioner: Preconditioner | None,
    initial_state: DeltaState | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    qk_l2norm: bool = True,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[Tensor, DeltaState | None]:
    """Delta rule whose write key is scaled by a preconditioner d that is learned online.

        Sbar_t  = Gamma_t S_{t-1},   Gamma_t = 1 | exp(g_t) | Diag(exp(g_t))
        S_t     = Sbar_t + beta_t (d_t * k_t) (v_t - Sbar_t^T k_t)^T
        o_t     = scale * S_t^T q_t
        d_{t+1} = clip(exp(forget_t) d_t + eta e_t k_t^2, d_min, d_max)     e_t: see `Preconditioner`

    Args:
        q, k: `[B, T, H, K]`, T >= 1; repeated over value heads where HV > H. One floating dtype for q, k and v.
        v: `[B, T, HV, V]`.
        beta: `[B, T, HV]`, step size in linear space; in the dtype of q or float32.
        g: log state decay, <= 0: None (DeltaNet), `[B, T, HV]` (Gated DeltaNet) or `[B, T, HV, K]` (KDA). Positive
            or infinite values are not checked (that would synchronise the device).
        forget: log lambda (Adaptive Preconditioner Forgetting), <= 0 and finite, `[B, T, HV]`; None is lambda = 1.
        preconditioner: the rule for d; None is d == 1, the plain delta rule.
        initial_state: `DeltaState(S [N, HV, K, V], d [N, HV, K])` in the work dtype; None stands for S = 0, d = 1.
        output_final_state: return the state after the last token, to be passed on as `initial_state`.
        scale: factor of the output; None is K^-0.5.
        qk_l2norm: normalise q and k by `x * rsqrt(sum x^2 + 1e-6)`, in the work dtype.
        cu_seqlens: `[N + 1]` int32 or int64, from 0 to T, not decreasing: N sequences packed into B = 1, each with
            its own state. Empty sequences are allowed. The values are checked where they are on the CPU or read
            by the backend, as `reference` and `chunked` do.
        chunk_size: a power of two up to 256; speed and memory, not the result.
        backend: "auto", "reference" (token loop), "chunked" or "triton". OSDN_BACKEND overrides "auto".

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the `DeltaState` in the work dtype (d is None when `preconditioner`
        is), or None unless `output_final_state`.

    Raises:
        ValueError: naming the argument, what it got and what it takes, before any work is done.

    Differentiable once, in reverse mode; forward mode, second derivatives and torch.func need backend="reference".
    NaN or overflow at a token may reach earlier outputs of its chunk, unless backend="reference".

    Warns once where beta_free feedback meets d = 1 and lambda = 1, which is the plain delta rule. Call backward outside
    autocast, as PyTorch asks: inside it, the products that autograd forms would run in low precision.

    Source: arXiv 2605.13473; the chunkwise form is derived in docs/math.md.
    """
    refuse_none(q=q, k=k, v=v, beta=beta)
    check_flags(output_final_state=output_final_state, qk_l2norm=qk_l2norm)
    work = check_inputs(q, k, v, beta, g, forget, preconditioner)
    scale, N = check_scale(scale, k), check_packing(cu_seqlens, k)
    if type(chunk_size) is not int or chunk_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        refuse("chunk_size", repr(chunk_size), "an int, a power of two from 1 to 256")
    choice = choose(q, backend)
    H, K, HV, V = q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    state = initial_state if initial_state is not None else DeltaState()
    check_state("initial_state", state, N, k, v, preconditioner)
    S, d = state.S, state.d
    if S is None and choice.backend != "triton":
        S = q.new_zeros(N, HV, K, V, dtype=work)
    if preconditioner is not None:
        _warn_tie(preconditioner, d, forget)
        d = q.new_ones(N, HV, K, dtype=work) if d is None else d
    check_differentiable(choice, q, k, v, beta, g, forget, S, d)

    with no_autocast(q.device):
        rest = (S, d, cu_seqlens, preconditioner, scale, chunk_size)
        if choice.backend == "triton":
            o, S, d = choice.module.online_scaled_delta_rule(q, k, v, beta, g, forget, *rest, qk_l2norm)
        else:
            qw, kw = q.to(work), k.to(work)
            if qk_l2norm:
                qw, kw = l2norm(qw), l2norm(kw)
            if HV != H:
                qw, kw = (x.repeat_interleave(HV // H, 2) for x in (qw, kw))
            gates = (None if x is None else x.to(work) for x in (beta, g, forget))
            o, S, d = choice.module.online_scaled_delta_rule(qw, kw, v.to(work), *gates, *rest)
    return o.to(v.dtype), DeltaState(S, d) if output_final_state else None


def precondition(
    k: Tensor,
    beta: Tensor | None,
    *,
    preconditioner: Preconditioner,
    forget: Tensor | None = None,
    initial_d: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The preconditioner alone: d_{t+1} = clip(exp(forget_t) d_t + eta e_t k_t^2, d_min, d_max).

    Args:
        k: `[B, T, H, K]`, as used by the delta rule: already normalised, and repeated where there are more value heads.
        beta: `[B, T, H]`, linear space; may be None for "beta_free" feedback.
        forget: log lambda `[B, T, H]`, <= 0 and finite; None is lambda = 1.
        initial_d: `[N, H, K]` in the work dtype; None is 1.
        preconditioner, cu_seqlens, backend: as in `online_scaled_delta_rule`.

    Returns:
        d `[B, T, H, K]` as used at each token, that is before the token's own update, and d after the last token
        `[N, H, K]`; both in the work dtype.

    Raises:
        ValueError: naming the argument, what it got and what it takes, before any work is done.
    """
    if not isinstance(preconditioner, Preconditioner):
        refuse("preconditioner", type(preconditioner).__name__, "an osdn.Preconditioner")
    if beta is None and preconditioner.feedback == "beta_aware":
        refuse("beta", None, "a tensor [B, T, H] for beta_aware feedback")
    refuse_none(k=k)
    work = check_inputs(None, k, None, beta, None, forget, preconditioner)
    shape = (check_packing(cu_seqlens, k), *k.shape[2:])
    choice = choose(k, backend)
    _warn_tie(preconditioner, initial_d, forget)
    _check_part("initial_d", initial_d, shape, k)
    d = k.new_ones(shape, dtype=work) if initial_d is None else initial_d
    check_differentiable(choice, k, beta, forget, d)
    with no_autocast(k.device):
        if choice.backend != "triton":
            k = k.to(work)
            beta, forget = (None if x is None else x.to(work) for x in (beta, forget))
        return choice.module.precondition(k, beta, forget, d, cu_seqlens, preconditioner)


def explain(q: Tensor, *, backend: Backend = "auto") -> Choice:
    """Which backend a call of the operators with this q takes, and why; nothing is computed. A decoding step takes the
    kernels wherever a longer call would, and the definition elsewhere.

    `str()` of the result is one readable line. Raises ValueError as the call itself would for `backend`.
    """
    if not isinstance(q, Tensor) or q.ndim != 4:
        refuse("q", tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__, "a tensor [B, T, H, K]")
    return choose(q, backend)


def refuse_none(**tensors: Tensor | None) -> None:
    """The arguments that have no default."""
    for name, x in tensors.items():
        if x is None:
            refuse(name, None, "a torch.Tensor")


def check_scale(scale: float | None, k: Tensor) -> float:
    """The factor of the output."""
    if scale is None:
        return k.shape[-1] ** -0.5
    check_number("scale", scale, takes := "a float, or None for K^-0.5")
    if scale != scale:
        refuse("scale", scale, takes)
    return float(scale)


def check_inputs(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    forget: Tensor | None,
    preconditioner: Preconditioner | None,
    letters: str = "B, T",
) -> torch.dtype:
    """Refuse what does not fit together; the work dtype. letters: of the dimensions before that of the heads."""
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "forget": forget}
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            refuse(name, type(x).__name__, "a torch.Tensor")
    if k.ndim != letters.count(",") + 3 or 0 in k.shape:
        refuse("k", tuple(k.shape), f"shape [{letters}, H, K] with every size >= 1")
    *lead, H, K = k.shape
    if k.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        refuse("k", k.dtype, "a floating dtype")
    if q is not None and q.shape != k.shape:
        refuse("q", tuple(q.shape), f"the shape of k, {tuple(k.shape)}")
    HV = H
    if v is not None:
        if v.ndim != k.ndim or list(v.shape[:-2]) != lead or 0 in v.shape or v.shape[-2] % H:
            sizes = ", ".join(map(str, lead))
            refuse("v", tuple(v.shape), f"shape [{sizes}, HV, V] with HV a multiple of {H}, V >= 1")
        HV = v.shape[-2]
    for name, x in (("q", q), ("v", v)):
        if x is not None and x.dtype != k.dtype:
            refuse(name, x.dtype, f"the dtype of k, {k.dtype}")
    for name, x in (("beta", beta), ("g", g), ("forget", forget)):
        if x is None:
            continue
        shapes = [[*lead, HV], [*lead, HV, K]] if name == "g" else [[*lead, HV]]
        if list(x.shape) not in shapes:
            refuse(name, tuple(x.shape), " or ".join(f"shape {s}" for s in shapes))
        dtypes = {k.dtype} if k.dtype == torch.float64 else {k.dtype, torch.float32}
        if x.dtype not in dtypes:
            refuse(name, x.dtype, " or ".join(sorted(map(str, dtypes))))
    for name, x in tensors.items():
        if x is not None and x.device != k.device:
            refuse(name, x.device, f"the device of k, {k.device}")
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        refuse("preconditioner", type(preconditioner).__name__, "an osdn.Preconditioner or None")
    if preconditioner is None and forget is not None:
        refuse("forget", "a tensor", "None where preconditioner is None (there is no d to forget)")
    return work_dtype(k)


def check_state(
    name: str,
    state: DeltaState,
    N: int | None,
    k: Tensor,
    v: Tensor,
    preconditioner: Preconditioner | None,
    *,
    whole: bool = False,
) -> None:
    """Refuse a state that does not fit. N: how many, None for any number. whole: S and d must be there."""
    if not isinstance(state, DeltaState):
        refuse(name, type(state).__name__, "an osdn.DeltaState")
    if preconditioner is None and state.d is not None:
        refuse(f"{name}.d", "a tensor", "None where preconditioner is None (d == 1)")
    if N is None:
        N = len(state.S) if isinstance(state.S, Tensor) and state.S.ndim > 0 else 1
    shape = (N, v.shape[-2], k.shape[-1], v.shape[-1])
    _check_part(f"{name}.S", state.S, shape, k, whole)
    _check_part(f"{name}.d", state.d, shape[:-1], k, whole and preconditioner is not None)


def _check_part(name: str, x: Tensor | None, shape: tuple[int, ...], k: Tensor, needed: bool = False) -> None:
    if x is None and not needed:
        return
    if not isinstance(x, Tensor):
        refuse(name, None if x is None else type(x).__name__, "a torch.Tensor" + ("" if needed else " or None"))
    if tuple(x.shape) != shape or x.dtype != work_dtype(k) or x.device != k.device:
        refuse(name, f"{x.dtype} {tuple(x.shape)} on {x.device}", f"{work_dtype(k)} {shape} on {k.device}")


def has_tangent(x: Tensor | None) -> bool:
    """Whether forward-mode differentiation comes through x; in a graph that is compiled under it, it may."""
    if x is None or forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or forward_ad.unpack_dual(x).tangent is not None


def check_differentiable(choice: Choice, *tensors: Tensor | None) -> None:
    """`chunked` has no forward-mode derivative, and PyTorch would silently take it for zero."""
    if choice.backend != "reference" and any(map(has_tangent, tensors)):
        refuse("backend", f"{choice.backend!r} under forward-mode differentiation", "'reference' there")


def check_packing(cu_seqlens: Tensor | None, x: Tensor) -> int:
    """The number of sequences in x [B, T, ...]; refuses offsets that do not fit it."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return B
    if not isinstance(cu_seqlens, Tensor):
        refuse("cu_seqlens", type(cu_seqlens).__name__, "a torch.Tensor")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        refuse("cu_seqlens", f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}", "int32 or int64, shape [N + 1], N >= 1")
    if B != 1:
        refuse("cu_seqlens", f"B = {B}", "a packed batch, B = 1")
    # They may stay on the CPU, where their values can be read without a synchronisation.
    if cu_seqlens.device not in (x.device, torch.device("cpu")):
        refuse("cu_seqlens", cu_seqlens.device, f"{x.device} or cpu")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds_of(cu_seqlens, T)
    return len(cu_seqlens) - 1


def l2norm(x: Tensor) -> Tensor:
    """x * rsqrt(sum x^2 + 1e-6) over the last dimension: what qk_l2norm does to q and k."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _warn_tie(p: Preconditioner, d: Tensor | None, forget: Tensor | None) -> None:
    """At d = 1, lambda = 1 and unit keys, beta_free feedback is 0 for ever: OSDN is DeltaNet."""
    global _warned_tie
    if torch.compiler.is_compiling() or _warned_tie or d is not None or forget is not None:
        return
    if p.feedback == "beta_free" and p.eta > 0 and p.d_min <= 1 <= p.d_max:
        _warned_tie = True
        warnings.warn(
            "d starts at 1 and lambda is 1: with beta_free feedback and unit-length keys d stays at 1, which is the "
            "plain delta rule; pass another initial d, or forget, or feedback='beta_aware'",
            stacklevel=3,
        )
