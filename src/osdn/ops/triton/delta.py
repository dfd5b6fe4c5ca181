"""Kernels of the delta rule with read key k and write key w = d * k, chunk by chunk.

    (I + A) U = B,  B = beta (v - k S),  A_tj = beta_t <k_t, w_j> R_tj (j < t),  P_tj = scale <q_t, w_j> R_tj (j <= t)
    O = scale q S + P U,  S <- Gamma S + w^T U

    intra_fwd   T = (I + A)^-1 and P of every chunk                                        parallel over chunks
    channels    q, k and w with the decays of their channels in them                       parallel over chunks
    inter_fwd   O and S, or for the backward S before each chunk and U                     chunk after chunk
    inter_bwd   dB and dS behind each chunk                                                chunk after chunk, backwards
    intra_bwd   gradients of q, k, w, v, beta, g                                           parallel over chunks

R_tj is the state's decay between j and t. A decay per head multiplies rows; one per key channel is put into q, k and
w, each relative to a token between the two that meet, so that no factor exceeds 1 where that could overflow.
Derivations: docs/math.md; what is rounded to bf16: docs/kernels.md.
"""

import triton
import triton.language as tl

from osdn.ops.triton.shared import (
    below,
    between,
    chunk_at,
    exp,
    invert,
    log_sums,
    per_token,
    rows,
    sequence_at,
    store_rows,
    total,
)


@triton.jit
def upto_and_behind(g, x, first, end, h, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BB: tl.constexpr, start):
    """Of x [C, BB], channels of g: exp of the sums up to each token and behind it, and over the chunk [BB]."""
    r = tl.arange(0, C)
    i = start + tl.arange(0, BB)
    at = ((first + r + 1) * HV + h) * K
    mask = ((r < C - 1) & (first + r + 1 < end))[:, None] & (i < K)[None, :]
    behind = tl.load(g + at[:, None] + i[None, :], mask, 0.0).to(tl.float32)
    return tl.exp(tl.cumsum(x, 0)), tl.exp(tl.cumsum(behind, 0, reverse=True)), tl.exp(tl.sum(x, 0))


@triton.jit
def first_level(x):
    """-1 where no channel of x decays by more than exp(-80): one reference token serves all pairs. Otherwise 0."""
    return tl.where(tl.min(tl.sum(x, 0), 0) > -80.0, -1, 0)


@triton.jit
def factors(x, level, C: tl.constexpr, EXACT: tl.constexpr):
    """Decays of rows t and columns j relative to a token in between, and the pairs (t, j), j < t, that they serve.

    level < 0: relative to the chunk's middle, for all pairs; no factor passes exp(80) in a chunk that decays by no
    more. Otherwise, with h = 2^level, relative to the middle of each block of 2h tokens, for t in its second half and
    j in its first: factors of at most 1, and sums over their own tokens alone, which no wipe elsewhere can cancel.
    """
    r = tl.arange(0, C)
    if level < 0:
        y = tl.cumsum(x, 0) - tl.sum(tl.where((r < C // 2)[:, None], x, 0.0), 0)[None, :]
        row = tl.exp(y)
        col = tl.exp(-y)
        pairs = r[:, None] > r[None, :]
    else:
        block = r >> level
        same = block[:, None] == block[None, :]
        second = (block & 1) == 1
        spans = tl.where(second[:, None], r[:, None] >= r[None, :], r[:, None] < r[None, :]) & same
        # x in two terms, of which tf32 holds the first, as it does 0 and 1, and of the second 11 bits.
        TERM: tl.constexpr = "tf32" if EXACT == "tf32x3" else EXACT
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        mask = tl.where(spans, 1.0, 0.0)
        row = tl.dot(mask, x - high, tl.dot(mask, high, input_precision=TERM), input_precision=TERM)
        row = tl.exp(row)
        col = row
        pairs = ((block[:, None] >> 1) == (block[None, :] >> 1)) & (block[:, None] > block[None, :])
    return row, col, pairs


@triton.jit
def meet(k, q, w, row, col, pairs, A, P, DT: tl.constexpr, PRECISION: tl.constexpr):
    wc = tl.trans((w.to(tl.float32) * col).to(DT))
    A += tl.where(pairs, tl.dot((k.to(tl.float32) * row).to(DT), wc, input_precision=PRECISION), 0.0)
    P += tl.where(pairs, tl.dot((q.to(tl.float32) * row).to(DT), wc, input_precision=PRECISION), 0.0)
    return A, P


@triton.jit
def norm(x, first, end, h, heads, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    y = rows(x, first, end, h, heads, K, C, BK).to(tl.float32)
    return tl.rsqrt(total(y, y, 1) + 1e-6)


@triton.jit
def scalar_decay(g):
    """Of a chunk's g [C], its sums up to each token, exp of them and of those behind it, and exp of the whole sum."""
    _, upto, whole = log_sums(g)
    return upto, exp(upto), exp(whole - upto), exp(whole)


@triton.constexpr_function
def scales_of(DECAY, PRECONDITIONED):
    """How many factors of rows a chunk has: of q and k; of w; its own decay."""
    return 4 if DECAY == 1 else 2 if PRECONDITIONED else 3


@triton.jit
def delta_intra_fwd_kernel(
    q, k, w, beta, g, rq, rk, scales, T, P, cu_seqlens, chunks, scale, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, DECAY: tl.constexpr, L2NORM: tl.constexpr, PRECONDITIONED: tl.constexpr,
    PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """T and P [chunks, HV, C, C]; with L2NORM rq [tokens, H], and rk unless PRECONDITIONED. BB channels at a time.

    Unless DECAY = 2, what the passes over chunks multiply rows of q, k and w with, decays to the chunk's start and end
    among it, and the chunk's own decay, as far as not 1 -> scales [chunks, HV, 2 to 4, C].
    """
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    hk = h // (HV // H)
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    r = tl.arange(0, C)
    t = first + r
    # What is short is asked for first, to be there when it is used.
    b = per_token(beta, first, end, h, HV, C)
    if DECAY == 1:
        x = per_token(g, first, end, h, HV, C)
    nk = tl.full([C], 1.0, tl.float32)
    nq = nk
    if L2NORM:
        nq = norm(q, first, end, hk, H, K, C, BK)
        if PRECONDITIONED:
            nk = per_token(rk, first, end, hk, H, C)
        else:
            nk = norm(k, first, end, hk, H, K, C, BK)
    A = tl.zeros([C, C], tl.float32)
    PP = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for block in tl.range(0, BK // BB, disable_licm=True):
        at = block * BB
        kr = rows(k, first, end, hk, H, K, C, BB, at).to(DT)
        if DECAY != 2:  # else it is loaded late, behind a barrier, as registers are few
            qr = rows(q, first, end, hk, H, K, C, BB, at).to(DT)
        if PRECONDITIONED:
            wd = rows(w, first, end, h, HV, K, C, BB, at).to(DT)
        else:
            wd = (kr.to(tl.float32) * nk[:, None]).to(DT)
        if DECAY == 2:
            tl.debug_barrier()
            qr = rows(q, first, end, hk, H, K, C, BB, at).to(DT)
            x = rows(g, first, end, h, HV, K, C, BB, at).to(tl.float32)
            diagonal += total(qr.to(tl.float32), wd.to(tl.float32), 1)
            lowest = first_level(x)
            for level in tl.range(lowest, tl.where(lowest < 0, 0, LEVELS), disable_licm=True):
                row, col, pairs = factors(x, level, C, EXACT)
                A, PP = meet(kr, qr, wd, row, col, pairs, A, PP, DT, PRECISION)
        else:
            wt = tl.trans(wd)
            A = tl.dot(kr, wt, A, input_precision=PRECISION)
            PP = tl.dot(qr, wt, PP, input_precision=PRECISION)
    if L2NORM:  # after the loop, so that q and k are loaded once
        tl.store(rq + t * H + hk, nq, t < end)
        if not PRECONDITIONED:
            tl.store(rk + t * H + hk, nk, t < end)
    A *= (b * nk)[:, None]
    if DECAY != 2:
        fw = tl.full([C], 1.0, tl.float32) if PRECONDITIONED else nk
        at_scales = scales + (c * HV + h) * scales_of(DECAY, PRECONDITIONED) * C + r
        fq = scale * nq
        fk = nk
        if DECAY == 1:
            sums, upto, behind, kept = scalar_decay(x)
            decays = between(sums, sums, C)
            A *= decays
            PP *= decays
            fq *= upto
            fk *= upto
            fw *= behind
            tl.store(at_scales + 3 * C, tl.zeros([C], tl.float32) + kept)
        tl.store(at_scales, fq)
        tl.store(at_scales + C, fk)
        if DECAY == 1 or not PRECONDITIONED:
            tl.store(at_scales + 2 * C, fw)
    else:
        PP += tl.where(r[:, None] == r[None, :], diagonal[:, None], 0.0)
    PP *= (scale * nq)[:, None]
    square = (c * HV + h) * C * C + r[:, None] * C + r[None, :]
    tl.store(P + square, below(PP, C, True).to(P.dtype.element_ty))
    tl.store(T + square, invert(below(A, C, False), C, LEVELS, PRECISION, JOIN=False).to(T.dtype.element_ty))


@triton.jit
def delta_channels_kernel(
    q, k, w, g, rq, rk, qx, kx, wx, decay, cu_seqlens, chunks, scale, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, C: tl.constexpr,
    L2NORM: tl.constexpr, PRECONDITIONED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """With a decay per channel, what the passes over chunks read: scale q, k, w with the decays to the chunk's start
    and end -> qx, kx, wx [tokens, HV, K], and exp(sum g) -> decay [chunks, HV, K]."""
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    hk = h // (HV // H)
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    nq = tl.full([C], 1.0, tl.float32)
    nk = nq
    if L2NORM:
        nq = per_token(rq, first, end, hk, H, C)
        nk = per_token(rk, first, end, hk, H, C)
    for block in tl.range(0, BK // BB, disable_licm=True):
        at = block * BB
        i = at + tl.arange(0, BB)
        x = rows(g, first, end, h, HV, K, C, BB, at).to(tl.float32)
        upto, behind, kept = upto_and_behind(g, x, first, end, h, HV, K, C, BB, at)
        tl.store(decay + (c * HV + h) * K + i, kept, i < K)
        y = rows(q, first, end, hk, H, K, C, BB, at).to(tl.float32) * (scale * nq)[:, None]
        store_rows(qx, y * upto, first, end, h, HV, K, C, BB, at)
        y = rows(k, first, end, hk, H, K, C, BB, at).to(tl.float32) * nk[:, None]
        store_rows(kx, y * upto, first, end, h, HV, K, C, BB, at)
        if PRECONDITIONED:
            y = rows(w, first, end, h, HV, K, C, BB, at).to(tl.float32)
        store_rows(wx, y * behind, first, end, h, HV, K, C, BB, at)


@triton.jit
def at_hand(
    scales, decay, cell, K: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PRECONDITIONED: tl.constexpr,
):  # fmt: skip
    """What was left to multiply rows of q, k and w with [C]; and S over the chunk: with a decay per channel [BK], else
    one number N times [N]."""
    fw = tl.full([C], 1.0, tl.float32)
    if DECAY == 2:
        fq = fw
        fk = fw
        i = tl.arange(0, BK)
        kept = tl.load(decay + cell * K + i, i < K, 0.0)
    else:
        at = scales + cell * scales_of(DECAY, PRECONDITIONED) * C
        fq = tl.load(at + tl.arange(0, C))
        fk = tl.load(at + C + tl.arange(0, C))
        if DECAY == 1 or not PRECONDITIONED:
            fw = tl.load(at + 2 * C + tl.arange(0, C))
        kept = tl.full([N], 1.0, tl.float32)
        if DECAY == 1:  # as a number it would be waited for in each chunk: only loads of tensors are issued ahead
            kept = tl.load(at + 3 * C + tl.arange(0, N) % C)
    return fq, fk, fw, kept


@triton.jit
def delta_inter_fwd_kernel(
    q, k, w, v, beta, decay, scales, T, P, S_0, o, S_end, S_map, S_map_T, states, U, cu_seqlens, first_chunk,
    tokens, split,
    HV: tl.constexpr, HQ: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, PRECONDITIONED: tl.constexpr, PACKED: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What is not None of: o and U [tokens, HV, V], S_end [N, HV, K, V], S before each chunk -> states.

    With S_map, what `chain_kernel` reads: S behind each segment -> S_end [segments, HV, K, V], where a sequence's first
    begins with S_0 and others with 0, and what the pass adds to S but for what v adds, a map less the identity -> S_map
    [N (split - 2), HV, K, K], and transposed -> S_map_T, computed in columns behind those of S, which begin as the
    identity; a first segment has no map, and the last is left out. S is held transposed: so what products take from it,
    and from each other, stays in registers.
    """
    NV: tl.constexpr = (V + (0 if S_map is None else K) + BV - 1) // BV
    bv = tl.program_id(0) % NV
    h = (tl.program_id(0) // NV) % HV
    n = tl.program_id(0) // (NV * HV)
    if S_map is not None and (n % split == split - 1) | ((n % split == 0) & (bv * BV >= V)):
        return
    begin, end, c, _skipped = sequence_at(n, tokens, cu_seqlens, first_chunk, split, C, PACKED)
    i = tl.arange(0, BK)
    r = tl.arange(0, C)
    u = bv * BV + tl.arange(0, BV)
    entries = u[:, None] + i[None, :] * V
    inside = (u < V)[:, None] & (i < K)[None, :]
    vr = rows(v, begin, end, h, HV, V, C, BV, bv * BV)
    S = tl.zeros([BV, BK], tl.float32)
    if S_map is not None:
        S = tl.where(u[:, None] - V == i[None, :], 1.0, 0.0)
        if S_0 is not None and n % split == 0:
            S = tl.load(S_0 + (n // split * HV + h).to(tl.int64) * K * V + entries, inside, 0.0)
    elif S_0 is not None:
        S = tl.load(S_0 + (n * HV + h).to(tl.int64) * K * V + entries, inside, 0.0)
    for m in tl.range(0, tl.cdiv(end - begin, C), num_stages=STAGES):
        first = begin + m * C
        cell = (c + m) * HV + h
        fq, fk, fw, kept = at_hand(scales, decay, cell, K, BK, BV, C, DECAY, PRECONDITIONED)
        kr = rows(k, first, end, h // (HV // HQ), HQ, K, C, BK).to(DT)
        wr = rows(w, first, end, h // (HV // HW), HW, K, C, BK).to(DT)
        Tc = tl.load(T + cell * C * C + r[:, None] * C + r[None, :])
        b = per_token(beta, first, end, h, HV, C)
        Sd = S.to(DT)
        B = tl.trans(vr).to(tl.float32) - tl.dot(Sd, tl.trans(kr), input_precision=PRECISION) * fk[None, :]
        B = (B * b[None, :]).to(DT)
        # In registers until the next turn: shared memory is full of what products read.
        vr = rows(v, first + C, end, h, HV, V, C, BV, bv * BV)
        Uc = tl.dot(B, tl.trans(Tc.to(DT)), input_precision=PRECISION)
        if o is not None:
            qr = rows(q, first, end, h // (HV // HQ), HQ, K, C, BK).to(DT)
            Pc = tl.load(P + cell * C * C + r[:, None] * C + r[None, :])
            out = tl.dot(Sd, tl.trans(qr), input_precision=PRECISION) * fq[None, :]
            out += tl.dot(Uc.to(DT), tl.trans(Pc.to(DT)), input_precision=PRECISION)
            store_rows(o, tl.trans(out), first, end, h, HV, V, C, BV, bv * BV)
        if states is not None:
            tl.store(states + cell * K * V + entries, S.to(states.dtype.element_ty), inside)
            store_rows(U, tl.trans(Uc), first, end, h, HV, V, C, BV, bv * BV)
        if DECAY == 1:
            S *= kept[:, None]
        if DECAY == 2:
            S *= kept[None, :]
        S += tl.dot((Uc * fw[None, :]).to(DT), wr, input_precision=PRECISION)
    if S_end is not None:
        if S_map is None:
            inside = (u < tl.where(n % split == split - 1, V, 0))[:, None] & (i < K)[None, :]
            n //= split
        tl.store(S_end + (n * HV + h).to(tl.int64) * K * V + entries, S, inside)
    if S_map is not None:
        at = ((n // split * (split - 2) + n % split - 1) * HV + h).to(tl.int64) * K * K
        S -= tl.where(u[:, None] - V == i[None, :], 1.0, 0.0)
        inside = ((u >= V) & (u < tl.where(n % split > 0, V + K, 0)))[:, None] & (i < K)[None, :]
        tl.store(S_map + at + i[None, :] * K + u[:, None] - V, S, inside)
        tl.store(S_map_T + at + i[None, :] + (u[:, None] - V) * K, S, inside)


@triton.jit
def turned(x, TURNED: tl.constexpr):
    return tl.trans(x) if TURNED else x


@triton.jit
def times(a, b, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """a b, or with b and the result transposed."""
    if TURNED:
        ab = tl.dot(b, tl.trans(a), input_precision=PRECISION)
    else:
        ab = tl.dot(a, b, input_precision=PRECISION)
    return ab


@triton.jit
def delta_inter_bwd_kernel(
    q, k, w, beta, decay, scales, T, P, do, dS_end, dB, dstates, dS_0, cu_seqlens, first_chunk, tokens, split,
    HV: tl.constexpr, HQ: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, PRECONDITIONED: tl.constexpr, PACKED: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dS before each segment -> dS_0 [segments, HV, K, V] and dS behind each chunk -> dstates [chunks, HV, K, V], dB
    [tokens, HV, V], from dS_end [segments, HV, K, V], None for 0. With dB None dS_0 alone, where a sequence's last
    segment begins with dS_end [N, HV, K, V], others with 0, and the first is left out.

    dU = P^T dO + w dS, dB = T^T dU, dS <- Gamma dS + scale q^T dO - k^T (beta dB). TURNED: all of these are held
    transposed, as S is in `delta_inter_fwd_kernel`.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    ROW: tl.constexpr = 0 if TURNED else 1
    bv = tl.program_id(0) % NV
    h = (tl.program_id(0) // NV) % HV
    n = tl.program_id(0) // (NV * HV)
    if dB is None and n % split == 0:
        return
    begin, end, c, _skipped = sequence_at(n, tokens, cu_seqlens, first_chunk, split, C, PACKED)
    i = tl.expand_dims(tl.arange(0, BK), ROW)
    u = tl.expand_dims(bv * BV + tl.arange(0, BV), 1 - ROW)
    r = tl.arange(0, C)
    entries = i * V + u
    inside = (i < K) & (u < V)
    dS = turned(tl.zeros([BK, BV], tl.float32), TURNED)
    if dS_end is not None:
        known = n if dB is not None else n // split
        ended = (i < K) & (u < (V if dB is not None else tl.where(n % split == split - 1, V, 0)))
        dS = tl.load(dS_end + (known * HV + h).to(tl.int64) * K * V + entries, ended, 0.0)
    count = tl.cdiv(end - begin, C)
    dor = rows(do, begin + tl.maximum(count - 1, 0) * C, end, h, HV, V, C, BV, bv * BV)
    for back in tl.range(0, count, num_stages=STAGES):
        first = begin + (count - 1 - back) * C
        cell = (c + count - 1 - back) * HV + h
        fq, fk, fw, kept = at_hand(scales, decay, cell, K, BK, BK, C, DECAY, PRECONDITIONED)
        qr = rows(q, first, end, h // (HV // HQ), HQ, K, C, BK).to(DT)
        kr = rows(k, first, end, h // (HV // HQ), HQ, K, C, BK).to(DT)
        wr = rows(w, first, end, h // (HV // HW), HW, K, C, BK).to(DT)
        square = r[:, None] * C + r[None, :]
        Tc = tl.load(T + cell * C * C + square).to(DT)
        Pc = tl.load(P + cell * C * C + square).to(DT)
        b = per_token(beta, first, end, h, HV, C)
        if dstates is not None:
            tl.store(dstates + cell * K * V + entries, dS.to(dstates.dtype.element_ty), inside)
        dO = turned(dor, TURNED)
        dU = times(wr, dS.to(DT), TURNED, PRECISION) * tl.expand_dims(fw, ROW)
        dU += times(tl.trans(Pc), dO.to(DT), TURNED, PRECISION)
        dBc = times(tl.trans(Tc), dU.to(DT), TURNED, PRECISION)
        if dB is not None:
            store_rows(dB, turned(dBc, TURNED), first, end, h, HV, V, C, BV, bv * BV)
        scaled = (dO.to(tl.float32) * tl.expand_dims(fq, ROW)).to(DT)
        dor = rows(do, tl.maximum(first - C, begin), end, h, HV, V, C, BV, bv * BV)  # as v in `delta_inter_fwd_kernel`
        if DECAY != 0:
            dS *= tl.expand_dims(kept, ROW)
        dS += times(tl.trans(qr), scaled, TURNED, PRECISION)
        dS -= times(tl.trans(kr), (dBc * tl.expand_dims(b * fk, ROW)).to(DT), TURNED, PRECISION)
    tl.store(dS_0 + (n * HV + h).to(tl.int64) * K * V + entries, dS, inside)


@triton.jit
def spread(
    kb, q, w, row, col, pairs, dA, dP, dq, dk, dw, DT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradients of what `meet` computed."""
    GA = tl.where(pairs, dA, tl.zeros_like(dA))
    GP = tl.where(pairs, dP, tl.zeros_like(dP))
    wc = (w.to(tl.float32) * col).to(DT)
    dq += row * tl.dot(GP, wc, input_precision=PRECISION)
    dk += row * tl.dot(GA, wc, input_precision=PRECISION)
    back = tl.dot(tl.trans(GP), (q.to(tl.float32) * row).to(DT), input_precision=PRECISION)
    back = tl.dot(tl.trans(GA), (kb.to(tl.float32) * row).to(DT), acc=back, input_precision=PRECISION)
    dw += col * back
    return dq, dk, dw


@triton.jit
def by_states(
    do, dB, U, states, dstates, i, u, dq, dk, dw, ended, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + dO S^T, dk + dB S^T, dw + U dS^T over columns u of S and dS, channels i; with a decay <S, dS> by channel."""
    entries = i[:, None] * V + u[None, :]
    inside = (i < K)[:, None] & (u < V)[None, :]
    S = tl.load(states + entries, inside, 0.0)
    dS = tl.load(dstates + entries, inside, 0.0)
    if DECAY != 0:
        ended += total(S.to(tl.float32), dS.to(tl.float32), 1)
    St = tl.trans(S.to(DT))
    dq = tl.dot(do, St, dq, input_precision=PRECISION)
    dk = tl.dot(dB, St, dk, input_precision=PRECISION)
    dw = tl.dot(U, tl.trans(dS.to(DT)), dw, input_precision=PRECISION)
    return dq, dk, dw, ended


@triton.jit
def delta_intra_bwd_kernel(
    q, k, w, v, beta, g, rq, rk, states, dstates, U, dB, do, dq, dk, dw, dv, dbeta, dg, cu_seqlens, chunks, scale,
    tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr, L2NORM: tl.constexpr,
    PRECONDITIONED: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq, dk [tokens, HV, K], dv [tokens, HV, V], dbeta, dg; PRECONDITIONED: dk of k as used and without w's part,
    and dw.

    dq = scale dO S^T + dP w, d(beta k) = -dB S^T + dA w, dw = U dS^T + dP^T q + dA^T (beta k), dP = scale dO U^T and
    dA = -dB U^T where A and P are not 0. As decays are factors of q, k (up to a token) and w (behind it), the
    gradient of their logarithms is made of q dq, k dk and w dw. BB channels at a time.
    """
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    hk = h // (HV // H)
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    NV: tl.constexpr = (V + BV - 1) // BV
    r = tl.arange(0, C)
    t = first + r
    cell = c * HV + h
    b = per_token(beta, first, end, h, HV, C)
    nq = tl.full([C], 1.0, tl.float32)
    nk = nq
    if L2NORM:
        nq = per_token(rq, first, end, hk, H, C)
        nk = per_token(rk, first, end, hk, H, C)
    dP = tl.zeros([C, C], tl.float32)
    dA = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    dqa = tl.zeros([C, BB], tl.float32)
    dka = tl.zeros([C, BB], tl.float32)
    dwa = tl.zeros([C, BB], tl.float32)
    ended = tl.zeros([BB], tl.float32)
    states += cell * K * V
    dstates += cell * K * V
    if BK == BB:  # before the products, as what they wait for takes as long
        kr = rows(k, first, end, hk, H, K, C, BB).to(DT)
        qr = rows(q, first, end, hk, H, K, C, BB).to(DT)
        if PRECONDITIONED:
            wd = rows(w, first, end, h, HV, K, C, BB).to(DT)
    vr = rows(v, first, end, h, HV, V, C, BV)  # one block ahead of its use
    for bv in range(0, NV):
        Ud = rows(U, first, end, h, HV, V, C, BV, bv * BV).to(DT)
        dBd = rows(dB, first, end, h, HV, V, C, BV, bv * BV)
        dod = rows(do, first, end, h, HV, V, C, BV, bv * BV).to(DT)
        dP = tl.dot(dod, tl.trans(Ud), dP, input_precision=PRECISION)
        dA = tl.dot(dBd.to(DT), tl.trans(Ud), dA, input_precision=PRECISION)
        if BK == BB:
            dqa, dka, dwa, ended = by_states(
                dod, dBd.to(DT), Ud, states, dstates, tl.arange(0, BB), bv * BV + tl.arange(0, BV), dqa, dka, dwa,
                ended, K, V, DECAY, DT, PRECISION,
            )  # fmt: skip
        db += total(dBd.to(tl.float32), vr.to(tl.float32), 1)
        vr = rows(v, first, end, h, HV, V, C, BV, (bv + 1) * BV)
        store_rows(dv, dBd.to(tl.float32) * b[:, None], first, end, h, HV, V, C, BV, bv * BV)
    dP = below(dP, C, True) * scale
    dA = -below(dA, C, False)
    upto = tl.full([C], 1.0, tl.float32)
    behind = upto
    kept = 1.0
    if DECAY == 1:
        sums, upto, behind, kept = scalar_decay(per_token(g, first, end, h, HV, C))
        decays = between(sums, sums, C)
        dP *= decays
        dA *= decays
    if DECAY == 2:
        diagonal = tl.sum(tl.where(r[:, None] == r[None, :], dP, 0.0), 1)[:, None]
        dP = below(dP, C, False)
    dP = dP.to(DT)
    dA = dA.to(DT)
    lost = tl.zeros([BB], tl.float32)
    dg_row = tl.zeros([C], tl.float32)
    total_q = tl.zeros([C], tl.float32)
    total_k = tl.zeros([C], tl.float32)
    for block in tl.range(0, BK // BB, disable_licm=True):
        at = block * BB
        i = at + tl.arange(0, BB)
        if BK != BB:
            dqa = tl.zeros([C, BB], tl.float32)
            dka = tl.zeros([C, BB], tl.float32)
            dwa = tl.zeros([C, BB], tl.float32)
            ended = tl.zeros([BB], tl.float32)
            for bv in tl.range(0, NV, disable_licm=True):
                Ud = rows(U, first, end, h, HV, V, C, BV, bv * BV).to(DT)
                dBd = rows(dB, first, end, h, HV, V, C, BV, bv * BV).to(DT)
                dod = rows(do, first, end, h, HV, V, C, BV, bv * BV).to(DT)
                dqa, dka, dwa, ended = by_states(
                    dod, dBd, Ud, states, dstates, i, bv * BV + tl.arange(0, BV), dqa, dka, dwa, ended, K, V, DECAY,
                    DT, PRECISION,
                )  # fmt: skip
        dqa *= (scale * upto)[:, None]
        dka *= -upto[:, None]
        dwa *= behind[:, None]
        if BK != BB:
            kr = rows(k, first, end, hk, H, K, C, BB, at).to(DT)
            qr = rows(q, first, end, hk, H, K, C, BB, at).to(DT)
            if PRECONDITIONED:
                wd = rows(w, first, end, h, HV, K, C, BB, at).to(DT)
        kn = kr.to(tl.float32) * nk[:, None]
        qn = qr.to(tl.float32) * nq[:, None]
        if not PRECONDITIONED:
            wd = kn.to(DT)
        qd = qn.to(DT)
        kb = (kn * b[:, None]).to(DT)
        if DECAY == 2:
            x = rows(g, first, end, h, HV, K, C, BB, at).to(tl.float32)
            ups, behinds, kept_each = upto_and_behind(g, x, first, end, h, HV, K, C, BB, at)
            dqa *= ups
            dka *= ups
            dwa *= behinds
            ended = ended * kept_each + total(wd.to(tl.float32), dwa)
            dqa += diagonal * wd.to(tl.float32)
            dwa += diagonal * qn
            lowest = first_level(x)
            for level in tl.range(lowest, tl.where(lowest < 0, 0, LEVELS), disable_licm=True):
                row, col, pairs = factors(x, level, C, EXACT)
                dqa, dka, dwa = spread(kb, qd, wd, row, col, pairs, dA, dP, dqa, dka, dwa, DT, PRECISION)
            y = tl.cumsum(qn * dqa + kn * b[:, None] * dka - wd.to(tl.float32) * dwa, 0, reverse=True)
            store_rows(dg, y + ended[None, :], first, end, h, HV, K, C, BB, at)
        else:
            if DECAY == 1:
                lost += ended * kept + total(wd.to(tl.float32), dwa)
            dqa = tl.dot(dP, wd, dqa, input_precision=PRECISION)
            dka = tl.dot(dA, wd, dka, input_precision=PRECISION)
            dwa = tl.dot(tl.trans(dP), qd, dwa, input_precision=PRECISION)
            dwa = tl.dot(tl.trans(dA), kb, dwa, input_precision=PRECISION)
        along_q = total(qn, dqa, 1)
        total_q += along_q
        if L2NORM and BK == BB:
            dqa = (dqa - qn * total_q[:, None]) * nq[:, None]
        store_rows(dq, dqa, first, end, h, HV, K, C, BB, at)
        along_k = total(kn, dka, 1)
        along_w = total(wd.to(tl.float32), dwa, 1)
        db += along_k
        total_k += b * along_k
        if DECAY == 1:
            dg_row += along_q + b * along_k - along_w
        dka *= b[:, None]
        if not PRECONDITIONED:
            dka += dwa
            total_k += along_w
            if L2NORM and BK == BB:
                dka = (dka - kn * total_k[:, None]) * nk[:, None]
        store_rows(dk, dka, first, end, h, HV, K, C, BB, at)
        if PRECONDITIONED:
            store_rows(dw, dwa, first, end, h, HV, K, C, BB, at)
    tl.store(dbeta + t * HV + h, db, t < end)
    if DECAY == 1:
        lost = tl.sum(lost[None, :], 1)  # of a vector, Triton 3.6 cannot compile it for Blackwell
        tl.store(dg + t * HV + h, tl.cumsum(dg_row, 0, reverse=True) + lost, t < end)
    if L2NORM and BK != BB:
        # What runs along a normalised key is known only now.
        tl.debug_barrier()
        for block in tl.range(0, BK // BB, disable_licm=True):
            at = block * BB
            qn = rows(q, first, end, hk, H, K, C, BB, at).to(tl.float32) * nq[:, None]
            dqa = rows(dq, first, end, h, HV, K, C, BB, at).to(tl.float32)
            store_rows(dq, (dqa - qn * total_q[:, None]) * nq[:, None], first, end, h, HV, K, C, BB, at)
            if not PRECONDITIONED:
                kn = rows(k, first, end, hk, H, K, C, BB, at).to(tl.float32) * nk[:, None]
                dka = rows(dk, first, end, h, HV, K, C, BB, at).to(tl.float32)
                store_rows(dk, (dka - kn * total_k[:, None]) * nk[:, None], first, end, h, HV, K, C, BB, at)
