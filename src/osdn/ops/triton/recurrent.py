"""The recurrence itself, one token of every sequence: the kernel of decoding, and its host.

Bound by memory: of each head, S is read and written once and everything else is small. Letters: shared.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.options import Preconditioner
from osdn.ops.triton.launch import CONFIGS, launch
from osdn.ops.triton.shared import clip, total

# TILE: how many entries of S a program has in registers at a time. Small, so that several programs share a processor
# and one's loads overlap the others' sums.
CONFIGS["delta_step_kernel"] = [{"TILE": 4096, "num_warps": 4}]


@triton.jit
def delta_step_kernel(
    q, k, v, beta, g, forget, S, d, slots, o, q_row, k_row, v_row, scale, eta, d_min, d_max,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
    DECAY: tl.constexpr, L2NORM: tl.constexpr, PRECONDITIONED: tl.constexpr, AWARE: tl.constexpr,
    NORMALIZE: tl.constexpr, FORGET: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per sequence and value head, over blocks of V.

        S <- Gamma S;  S <- S + beta (d * k) (v - S^T k)^T;  o = scale S^T q
        d <- clip(exp(forget) d + eta e k^2, d_min, d_max)        e, Gamma: see ops/reference.py

    q, k [B, H, K] and v [B, HV, V] with rows q_row, k_row, v_row apart; beta, forget [B, HV]; g [B, HV] (DECAY = 1) or
    [B, HV, K] (2); o [B, HV, V]; S [slots, HV, K, V] and d [slots, HV, K] are updated in place. A slot below 0 has
    o = 0 and no state.

    V is not split over programs: every block of V needs d from before its update, and nothing would order the program
    that writes d behind those that still have to read it.
    """
    BV: tl.constexpr = WIDTH if WIDTH * BK <= TILE else TILE // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    b = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    hk = h // (HV // H)
    i = tl.arange(0, BK)
    u = tl.arange(0, BV)
    slot = b
    if SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    if slot < 0:
        all_u = tl.arange(0, WIDTH)
        tl.store(o + (b * HV + h) * V + all_u, tl.zeros([WIDTH], o.dtype.element_ty), all_u < V)
        return

    # Asked for first, so that it is on its way while d, k and their sums are worked out.
    entries = S + (slot * HV + h) * K * V + i[:, None] * V + u[None, :]
    tile = tl.load(entries, (i < K)[:, None] & (u < V)[None, :], 0.0)

    kx = tl.load(k + b * k_row + hk * K + i, i < K, 0.0).to(tl.float32)
    qx = tl.load(q + b * q_row + hk * K + i, i < K, 0.0).to(tl.float32)
    step = tl.load(beta + b * HV + h).to(tl.float32)
    if L2NORM:
        kx *= tl.rsqrt(total(kx, kx) + 1e-6)
        qx *= tl.rsqrt(total(qx, qx) + 1e-6)
    w = kx
    if PRECONDITIONED:
        at = d + (slot * HV + h) * K + i
        used = tl.load(at, i < K, 0.0)
        w = used * kx
        s = kx * kx
        x = total(used, s)
        e = 1.0 - x
        if AWARE:
            e = step * (1.0 - step * x)
        if NORMALIZE:
            e = e / (total(kx, kx) + 1e-5)
        kept = used
        if FORGET:
            kept = tl.exp(tl.load(forget + b * HV + h).to(tl.float32)) * used
        after = clip(kept + eta * e * s, d_min, d_max)
    if DECAY == 1:
        decay = tl.exp(tl.load(g + b * HV + h).to(tl.float32))
    if DECAY == 2:
        decay = tl.exp(tl.load(g + (b * HV + h) * K + i, i < K, 0.0).to(tl.float32))[:, None]

    for block in range(NV):
        if NV > 1:  # behind the last block there is nothing: all masked
            ahead = tl.load(entries + (block + 1) * BV, (i < K)[:, None] & ((block + 1) * BV + u < V)[None, :], 0.0)
        value = (b * HV + h) * V + block * BV + u
        live = block * BV + u < V
        vx = tl.load(v + b * v_row + h * V + block * BV + u, live, 0.0).to(tl.float32)
        if DECAY > 0:
            tile *= decay
        r = vx - total(tile, kx[:, None])
        tile += w[:, None] * (step * r)[None, :]
        # Of a tensor with fewer entries than the program has threads, several threads read an entry and one writes it.
        tl.debug_barrier()
        tl.store(entries + block * BV, tile, (i < K)[:, None] & live[None, :])
        tl.store(o + value, (scale * total(tile, qx[:, None])).to(o.dtype.element_ty), live)
        if NV > 1:
            tile = ahead
    if PRECONDITIONED:
        tl.store(at, after, i < K)


def delta_step(
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
    l2norm: bool,
) -> Tensor:
    """o [B, HV, V] in the dtype of v; S and d (both contiguous) become those after the token."""
    (B, H, K), (HV, V) = k.shape, v.shape[1:]
    # Not `contiguous()` alone: rows that lie apart, as those of one tensor split in q, k and v, need no copy.
    q, k, v = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v))
    rest = {"beta": beta, "g": g, "forget": forget, "slots": slots}
    rest = {n: None if x is None else x.contiguous() for n, x in rest.items()}
    p = Preconditioner() if p is None else p
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch(
        delta_step_kernel, lambda _: (B * HV,), q.device, q=q, k=k, v=v, **rest, S=S, d=d, o=o,
        q_row=q.stride(0), k_row=k.stride(0), v_row=v.stride(0), scale=scale, eta=float(p.eta), d_min=float(p.d_min),
        d_max=float(p.d_max), H=H, HV=HV, K=K, V=V, BK=_block(K), WIDTH=_block(V), DECAY=0 if g is None else g.ndim - 1,
        L2NORM=l2norm, PRECONDITIONED=d is not None, AWARE=p.feedback == "beta_aware", NORMALIZE=p.normalize_step,
        FORGET=forget is not None, SLOTS=slots is not None,
    )  # fmt: skip
    return o


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
