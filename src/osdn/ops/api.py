"""The public operators: validation, defaults, normalisation; the mathematics is the backends'.

Letters: B batch, T tokens, H key heads, HV value heads (a multiple of H), K key dim, V value dim, N sequences
(the batch, or the sequences of a packed batch). The work dtype is float64 for float64 inputs, float32 for all others.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

from osdn.ops.dispatch import Choice, choose
from osdn.ops.options import Backend, Preconditioner, no_autocast, refuse, work_dtype
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
            its own state. Empty sequences are allowed. The values are checked on CPU only.
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
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta)):
        if x is None:
            refuse(name, None, "a torch.Tensor")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        refuse("scale", repr(scale), "a float, or None for K^-0.5")
    work, N = _check_call(q, k, v, beta, g, forget, preconditioner, cu_seqlens, chunk_size)
    choice = choose(q, backend)
    H, K, HV, V = q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    state = initial_state if initial_state is not None else DeltaState()
    if not isinstance(state, DeltaState):
        refuse("initial_state", type(initial_state).__name__, "an osdn.DeltaState or None")
    if preconditioner is None and state.d is not None:
        refuse("initial_state.d", "a tensor", "None where preconditioner is None (d == 1)")
    S = _state("initial_state.S", state.S, (N, HV, K, V), work, q.device, 0.0)
    d = None
    if preconditioner is not None:
        _warn_tie(preconditioner, state.d, forget)
        d = _state("initial_state.d", state.d, (N, HV, K), work, q.device, 1.0)
    _check_differentiable(choice, q, k, v, beta, g, forget, S, d)

    with no_autocast(q.device):
        qw, kw = q.to(work), k.to(work)
        if qk_l2norm:
            qw, kw = l2norm(qw), l2norm(kw)
        if HV != H:
            qw, kw = (x.repeat_interleave(HV // H, 2) for x in (qw, kw))
        o, S, d = choice.module.online_scaled_delta_rule(
            qw,
            kw,
            v.to(work),
            beta.to(work),
            None if g is None else g.to(work),
            None if forget is None else forget.to(work),
            S,
            d,
            cu_seqlens,
            preconditioner,
            K**-0.5 if scale is None else float(scale),
            chunk_size,
        )
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
    work, N = _check_call(None, k, None, beta, None, forget, preconditioner, cu_seqlens, 64)
    choice = choose(k, backend)
    H, K = k.shape[2], k.shape[3]
    _warn_tie(preconditioner, initial_d, forget)
    d = _state("initial_d", initial_d, (N, H, K), work, k.device, 1.0)
    _check_differentiable(choice, k, beta, forget, d)
    with no_autocast(k.device):
        beta, forget = (None if x is None else x.to(work) for x in (beta, forget))
        return choice.module.precondition(k.to(work), beta, forget, d, cu_seqlens, preconditioner)


def explain(q: Tensor, *, backend: Backend = "auto") -> Choice:
    """Which backend a call with this q takes, and why; nothing is computed.

    `str()` of the result is one readable line. Raises ValueError as the call itself would for `backend`.
    """
    if not isinstance(q, Tensor) or q.ndim != 4:
        refuse("q", tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__, "a tensor [B, T, H, K]")
    return choose(q, backend)


def _check_call(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    forget: Tensor | None,
    preconditioner: Preconditioner | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[torch.dtype, int]:
    """Refuse what does not fit together; the work dtype and the number of sequences."""
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "forget": forget, "cu_seqlens": cu_seqlens}
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            refuse(name, type(x).__name__, "a torch.Tensor")
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if k.ndim != 4 or 0 in k.shape:
        refuse("k", tuple(k.shape), "shape [B, T, H, K] with every size >= 1")
    B, T, H, K = k.shape
    if k.dtype not in floats:
        refuse("k", k.dtype, "a floating dtype")
    if q is not None and q.shape != k.shape:
        refuse("q", tuple(q.shape), f"the shape of k, {tuple(k.shape)}")
    HV = H
    if v is not None:
        if v.ndim != 4 or v.shape[:2] != (B, T) or 0 in v.shape or v.shape[2] % H:
            refuse("v", tuple(v.shape), f"shape [{B}, {T}, HV, V] with HV a multiple of {H}, V >= 1")
        HV = v.shape[2]
    for name, x in (("q", q), ("v", v)):
        if x is not None and x.dtype != k.dtype:
            refuse(name, x.dtype, f"the dtype of k, {k.dtype}")
    for name, x in (("beta", beta), ("g", g), ("forget", forget)):
        if x is None:
            continue
        shapes = [(B, T, HV), (B, T, HV, K)] if name == "g" else [(B, T, HV)]
        if tuple(x.shape) not in shapes:
            refuse(name, tuple(x.shape), " or ".join(f"shape {list(s)}" for s in shapes))
        dtypes = {k.dtype} if k.dtype == torch.float64 else {k.dtype, torch.float32}
        if x.dtype not in dtypes:
            refuse(name, x.dtype, " or ".join(sorted(map(str, dtypes))))
    for name, x in tensors.items():
        # cu_seqlens may stay on the CPU, where its values can be read without a synchronisation.
        if x is not None and x.device != k.device and not (name == "cu_seqlens" and x.device.type == "cpu"):
            refuse(name, x.device, f"the device of k, {k.device}")
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        refuse("preconditioner", type(preconditioner).__name__, "an osdn.Preconditioner or None")
    if preconditioner is None and forget is not None:
        refuse("forget", "a tensor", "None where preconditioner is None (there is no d to forget)")
    if chunk_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        refuse("chunk_size", chunk_size, "a power of two from 1 to 256")
    return work_dtype(k), check_packing(cu_seqlens, B, T)


def _check_differentiable(choice: Choice, *tensors: Tensor | None) -> None:
    """`chunked` has no forward-mode derivative, and PyTorch would silently take it for zero."""
    if choice.backend == "reference" or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        refuse("backend", f"{choice.backend!r} under forward-mode differentiation", "'reference' there")


def check_packing(cu_seqlens: Tensor | None, B: int, T: int) -> int:
    """The number of sequences; refuses offsets that do not fit a batch of B rows of T tokens."""
    if cu_seqlens is None:
        return B
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        refuse("cu_seqlens", f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}", "int32 or int64, shape [N + 1], N >= 1")
    if B != 1:
        refuse("cu_seqlens", f"B = {B}", "a packed batch, B = 1")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
            shown = bounds if len(bounds) <= 8 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
            refuse("cu_seqlens", shown, f"offsets from 0 to T = {T} that do not decrease")
    return len(cu_seqlens) - 1


def _state(
    name: str, x: Tensor | None, shape: tuple[int, ...], work: torch.dtype, device: torch.device, default: float
) -> Tensor:
    if x is None:
        return torch.full(shape, default, dtype=work, device=device)
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a torch.Tensor or None")
    if tuple(x.shape) != shape or x.dtype != work or x.device != device:
        refuse(name, f"{x.dtype} {tuple(x.shape)} on {x.device}", f"{work} {shape} on {device}")
    return x


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
