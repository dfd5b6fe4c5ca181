"""Kernels of the preconditioner: d_{t+1} = clip(lambda_t d_t + eta e_t s_t, d_min, d_max), s = k^2, e = c1 - c2 <d, s>.

    solve       M = (I + L)^-1 of every chunk, L_tj = eta c2_t R_{t-1,j} <s_t, s_j>         parallel over chunks
    map         what a segment of chunks does to d, as an affine map                        parallel over segments
    fwd         d before each chunk: d <- G_C d + eta sum_t (prod_{i > t} lambda_i) e_t s_t, chunk after chunk
                and e_t = sum_j M_tj (c1_j - c2_j G_j <s_j, d>)
    check       in which chunk of a sequence a clip might fire first                        parallel
    expand      d_t of every token, or the write keys d_t k_t                               parallel
    local       what the adjoint of a chunk needs that does not depend on later chunks      parallel
    bwd         u, the adjoint of d, before each chunk, and p_t = <u_t, s_t>                chunk after chunk, backwards
    grads       gradients of k, beta, forget from p, e and the adjoints                     parallel

R_tj = prod_{j < i <= t} lambda_i, G_t = prod_{i < t} lambda_i. From the first token at which a clip fires, a chunk is
walked through token by token; `tails` is how many tokens that are. What is before them is as if none had fired, to the
bit, so that no token changes what comes before it. All else about a chunk can be rebuilt from d before it and e. All in
float32, but for M, products of [C, K] tiles and maps that are kept, which are docs/kernels.md's subject. Derivations:
docs/math.md.
"""

import triton
import triton.language as tl

from osdn.ops.triton.shared import (
    below,
    between,
    chunk_at,
    clip,
    exp,
    invert,
    log_sums,
    per_token,
    place,
    rows,
    sequence_at,
    store_rows,
    total,
)


@triton.jit
def strengths(beta, first, end, h, heads, C: tl.constexpr, AWARE: tl.constexpr):
    """[C] beta, or 1 where the feedback does not know it."""
    if AWARE:
        b = per_token(beta, first, end, h, heads, C)
    else:
        b = tl.full([C], 1.0, tl.float32)
    return b


@triton.jit
def feedback(b, n, NORMALIZE: tl.constexpr):
    """c1, c2 [C] of e = c1 - c2 <d, s>, from n = sum s."""
    c1 = b
    c2 = b * b
    if NORMALIZE:
        c1 = c1 / (n + 1e-5)
        c2 = c2 / (n + 1e-5)
    return c1, c2


@triton.jit
def keys(
    k, rk, first, end, h, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, start=0
):  # fmt: skip
    """[C, BK] float32 keys as used: normalised when rk is given."""
    x = rows(k, first, end, h // (HV // H), H, K, C, BK, start).to(tl.float32)
    if rk is not None:
        x *= per_token(rk, first, end, h // (HV // H), H, C)[:, None]
    return x


@triton.jit
def entries(x, t, end, h, heads, K: tl.constexpr, BK: tl.constexpr):
    """[BK] of one token and head."""
    i = tl.arange(0, BK)
    return tl.load(x + (t * heads + h) * K + i, i < tl.where(t < end, K, 0), 0.0)


@triton.jit
def one(x, t, end, h, heads):
    return tl.load(x + t * heads + h, t < end, 0.0)


@triton.jit
def token(
    k, rk, x, forget, a, t, end, h, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    FORGET: tl.constexpr,
):  # fmt: skip
    """As stored, of token t: key, what normalises it, entries of x and forget, row of a; 1 for what is absent."""
    norm = tl.full([], 1.0, tl.float32)
    entry, kept, row = norm, norm, norm
    if rk is not None:
        norm = one(rk, t, end, h // (HV // H), H)
    if x is not None:
        entry = one(x, t, end, h, HV)
    if FORGET:
        kept = one(forget, t, end, h, HV)
    if a is not None:
        row = entries(a, t, end, h, HV, K, BK)
    return entries(k, t, end, h // (HV // H), H, K, BK), norm, entry, kept, row


@triton.jit
def four(
    k, rk, x, forget, a, t, end, h, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    FORGET: tl.constexpr,
):  # fmt: skip
    """Tokens from t on, asked for while the four before are worked out: a load takes longer than a token."""
    return (
        token(k, rk, x, forget, a, t, end, h, H, HV, K, BK, FORGET),
        token(k, rk, x, forget, a, t + 1, end, h, H, HV, K, BK, FORGET),
        token(k, rk, x, forget, a, t + 2, end, h, H, HV, K, BK, FORGET),
        token(k, rk, x, forget, a, t + 3, end, h, H, HV, K, BK, FORGET),
    )


@triton.jit
def read(asked):
    """What `token` left, in float32, the key as used. Only where it is needed: that waits for it."""
    x, norm, entry, kept, row = asked
    return x.to(tl.float32) * norm, entry.to(tl.float32), kept.to(tl.float32), row.to(tl.float32)


@triton.jit
def moved(d, step, s, log_kept, FORGET: tl.constexpr):
    """lambda d + step s, not clipped yet."""
    raw = step * s
    if FORGET:
        raw += tl.exp(log_kept) * d
    else:
        raw += d
    return raw


@triton.jit
def affine(scale, shift, scale_after, shift_after):
    """x -> scale x + shift, and the map after it, as one."""
    return scale * scale_after, shift * scale_after + shift_after


@triton.jit
def until_clip(
    forget, steps, s, d, first, end, h, d_min, d_max,
    HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """How many of a chunk's updates by steps [C], s [C, BK] are before the first that takes d out of the box, and d
    behind these; C if none does, and no d."""
    j = tl.arange(0, C)
    after = steps[:, None] * s
    start = tl.where(j[:, None] == 0, d[None, :], 0.0)
    if FORGET:
        kept = tl.exp(per_token(forget, first, end, h, HV, C))[:, None] + tl.zeros([C, BK], tl.float32)
        _kept, after = tl.associative_scan((kept, after + kept * start), 0, affine)
    else:
        after = tl.cumsum(after + start, 0)
    inside = (after >= d_min) & (after <= d_max)  # not NaN
    count = tl.min(tl.where(inside, C, j[:, None]), 0)
    count = tl.min(tl.where(tl.arange(0, BK) < K, count, C), 0)
    count = tl.where(first + count < end, count, C)
    return count, tl.where(count > 0, tl.sum(tl.where(j[:, None] == count - 1, after, 0.0), 0), d)


@triton.jit
def walk(
    D, tail, k, rk, forget, e, first, end, h, eta, d_min, d_max,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """D [C, BK], d_t of the chunk's tokens, with the last `tail` rows anew, token by token from the first of them on.

    Lanes beyond K stay as they are: there an infinite step is 0 times infinity. Tokens are asked for two ahead, not by
    `four`, for which `precondition_grads` has no registers.
    """
    r = tl.arange(0, C)
    i = tl.arange(0, BK)
    t = first + C - tail
    d = tl.sum(tl.where(r[:, None] == C - tail, D, 0.0), 0)
    now = token(k, rk, e, forget, None, t, end, h, H, HV, K, BK, FORGET)
    after = token(k, rk, e, forget, None, t + 1, end, h, H, HV, K, BK, FORGET)
    for j in range(C - tail, C):
        t = first + j
        later = token(k, rk, e, forget, None, t + 2, end, h, H, HV, K, BK, FORGET)
        D = tl.where(r[:, None] == j, d[None, :], D)
        x, e_t, log_kept, _a = read(now)
        raw = moved(d, eta * e_t, x * x, log_kept, FORGET)
        d = tl.where(i < tl.where(t < end, K, 0), clip(raw, d_min, d_max), d)
        now, after = after, later
    return D


@triton.jit
def logs(forget, first, end, h, HV: tl.constexpr, C: tl.constexpr, FORGET: tl.constexpr):
    """[C] log lambda as `forgetting` takes it, to be asked for before what takes longer."""
    if FORGET:
        f = per_token(forget, first, end, h, HV, C)
    else:
        f = tl.zeros([C], tl.float32)
    return f


@triton.jit
def forgetting(f, C: tl.constexpr, FORGET: tl.constexpr):
    """Of log lambda f [C], R_{t-1,j} [C, C] below the diagonal, G_t and prod_{i > t} lambda_i [C]; G_C."""
    R = tl.full([C, C], 1.0, tl.float32)
    G = tl.full([C], 1.0, tl.float32)
    behind = G
    kept = 1.0
    if FORGET:
        before, upto, whole = log_sums(f)
        R = between(before, upto, C)
        G = exp(before)
        behind = exp(whole - upto)
        kept = exp(whole)
    return below(R, C, False), G, behind, kept


@triton.jit
def path(
    R, G, k, rk, forget, e, errors, d, s, first, end, h, tail, eta, d_min, d_max,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    FORGET: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """d_t [C, BK] from d before the chunk, errors and s, whose product is eta e s, and R and G from `forgetting`; with
    WALK the last `tail` tokens, whose steps may be NaN, are walked through."""
    steps = tl.where((tl.arange(0, C) + tail < C)[:, None], s * errors[:, None], 0.0)
    steps = clip(steps, -1e30, 1e30)  # infinite, they would be NaN in rows before, too
    D = G[:, None] * d[None, :] + tl.dot(R.to(DT), steps.to(DT), input_precision=PRECISION)
    if WALK and tail > 0:
        D = walk(D, tail, k, rk, forget, e, first, end, h, eta, d_min, d_max, H, HV, K, C, BK, FORGET)
    return D


@triton.jit
def precondition_solve_kernel(
    k, rk, beta, forget, solve, factors, cu_seqlens, chunks, eta, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, L2NORM: tl.constexpr, AWARE: tl.constexpr, NORMALIZE: tl.constexpr, FORGET: tl.constexpr,
    PACKED: tl.constexpr, SOLVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the passes over chunks read beside k: with SOLVE, M = (I + L)^-1 -> solve [chunks, HV, C, C].

    factors [chunks, HV, 6, C]: c1; c2 G_t, 1 and prod_{i > t} lambda_i, each times r^2, with s = r^2 k^2; G_C; with
    SOLVE the largest s of each token. With L2NORM r = rsqrt(sum k^2 + 1e-6) is in rk [tokens, H], where SOLVE puts it.
    """
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    hk = h // (HV // H)
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    i = tl.arange(0, C)
    n = tl.zeros([C], tl.float32)
    top = n
    L = tl.zeros([C, C], tl.float32)
    for block in range(0, BK // BB):
        y = rows(k, first, end, hk, H, K, C, BB, block * BB).to(tl.float32)
        n += total(y, y, 1)
        y *= y
        top = tl.maximum(top, tl.max(y, 1))
        L = tl.dot(y, tl.trans(y), L, input_precision=PRECISION)
    r2 = tl.full([C], 1.0, tl.float32)
    if L2NORM:
        if SOLVE:
            r = tl.rsqrt(n + 1e-6)
            tl.store(rk + (first + i) * H + hk, r, first + i < end)
        else:
            r = per_token(rk, first, end, hk, H, C)
        r2 = r * r
    c1, c2 = feedback(strengths(beta, first, end, h, HV, C, AWARE), n * r2, NORMALIZE)
    weights = (eta * c2 * r2)[:, None] * r2[None, :]
    at = factors + (c * HV + h) * 6 * C + i
    tl.store(at, c1)
    tl.store(at + 2 * C, r2)
    if FORGET:
        R, G, behind, kept = forgetting(per_token(forget, first, end, h, HV, C), C, FORGET)
        weights *= R
        c2 *= G
        tl.store(at + 3 * C, r2 * behind)
        tl.store(at + 4 * C, tl.zeros([C], tl.float32) + kept)
    tl.store(at + C, r2 * c2)
    if SOLVE:
        tl.store(at + 5 * C, r2 * top)
        M = invert(below(L * weights, C, False), C, LEVELS, PRECISION, JOIN=True)
        tl.store(solve + (c * HV + h) * C * C + i[:, None] * C + i[None, :], M.to(solve.dtype.element_ty))


@triton.jit
def fetch(
    k, solve, factors, m, c, begin, end, h, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """Of a segment's m-th chunk, k^2 and what the solve left: M, c1, r^2 c2 G, r^2, r^2 prod lambda, G_C [BK]."""
    j = tl.arange(0, C)
    i = tl.arange(0, BK)
    cell = (c + m) * HV + h
    x = rows(k, begin + m * C, end, h // (HV // H), H, K, C, BK).to(tl.float32)
    M = tl.load(solve + cell * C * C + j[:, None] * C + j[None, :]).to(tl.float32)
    at = factors + cell * 6 * C
    r2 = tl.load(at + 2 * C + j)
    behind = r2
    kept = tl.full([BK], 1.0, tl.float32)
    if FORGET:
        behind = tl.load(at + 3 * C + j)
        # A number of its own would be waited for in each chunk: only loads of tensors are issued ahead.
        kept = tl.load(at + 4 * C + i % C)
    return x * x, M, tl.load(at + j), tl.load(at + C + j), r2, behind, kept


@triton.jit
def onward(d, xx, M, c1, c2, behind, kept, eta, TURNED: tl.constexpr):
    """e of a chunk's tokens from d before it, and d behind it, where no clip fires.

    TURNED, M is used transposed: the compiler then does not lay out k^2 as M, which it would add up over tokens with
    more passing between lanes and warps, and that is what a chunk waits for.
    """
    z = c1 - c2 * total(xx, d[None, :], 1)
    if TURNED:
        e = total(tl.trans(M), z[:, None], 0)
    else:
        e = total(M, z[None, :], 1)
    return e, kept * d + total(xx, (eta * e * behind)[:, None])


@triton.jit
def clips(solve, cell, C: tl.constexpr):
    """Of a chunk that was walked through, C bits for each channel in place of M, which has room for 16 C channels."""
    WORD: tl.constexpr = tl.int64 if C == 64 else tl.int32 if C == 32 else tl.int16
    return (solve + cell * C * C).to(tl.pointer_type(WORD))


@triton.jit
def stays(d, kept, step, s, d_min, d_max, live):
    """Whether no update of a chunk by step [C], s [C, BK] can take d out of the box: none can pass these sums."""
    up = tl.maximum(step, 0.0)
    low = tl.minimum(d, kept * d) + total(s, (step - up)[:, None])
    high = tl.maximum(d, kept * d) + total(s, up[:, None])
    return tl.min(tl.where(live, ((low >= d_min) & (high <= d_max)).to(tl.int32), 1), 0) > 0


@triton.jit
def roomy(d, new, kept, step, top, d_min, d_max, live):
    """What `stays` says or False, without the keys: from d behind the chunk as `onward` has it, `new`, and each token's
    largest s, `top`.

    With u = sum max(step, 0) s and v = sum max(-step, 0) s, d behind the chunk is kept d + sum behind step s with
    `behind` from kept to 1: so kept u <= new - kept d + v, and kept v <= u - (new - kept d). What rounding may add is
    allowed for.
    """
    u = total(tl.maximum(step, 0.0), top) * 1.001
    v = total(tl.maximum(-step, 0.0), top) * 1.001
    change = new - kept * d
    slack = 1e-5 * (tl.abs(new) + tl.abs(d) + u + v)
    high = tl.maximum(d, kept * d) + tl.minimum(u, (change + v + slack) / kept)
    low = tl.minimum(d, kept * d) - tl.minimum(v, (u - change + slack) / kept)
    return tl.min(tl.where(live, ((low - slack >= d_min) & (high + slack <= d_max)).to(tl.int32), 1), 0) > 0


@triton.jit
def precondition_fwd_kernel(
    k, rk, beta, forget, solve, factors, d_0, starts, e, tails, last, d_end, stops, cu_seqlens, first_chunk, eta,
    d_min, d_max, tokens, split,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    AWARE: tl.constexpr, NORMALIZE: tl.constexpr, FORGET: tl.constexpr, PACKED: tl.constexpr,
    WALK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d before each chunk -> starts [chunks, HV, K], e [tokens, HV], d_end [N, HV, K].

    Without WALK, from d before each segment, as if no clip fired. With it, each sequence from its chunk `stops`
    [N, HV] on: how many tokens a chunk has from the first clip on -> tails [chunks, HV], if any, in place of its M a
    bit for each token whose clip was inactive, and the last such chunk, or -1 -> last [N, HV].
    """
    n = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    begin, end, c, _skipped = sequence_at(n, tokens, cu_seqlens, first_chunk, 1 if WALK else split, C, PACKED)
    i = tl.arange(0, BK)
    j = tl.arange(0, C)
    at = (n * HV + h).to(tl.int64) * K + i
    count = tl.cdiv(end - begin, C).to(tl.int32)
    begun = 0
    latest = -1
    live = i < K
    if WALK:
        begun = tl.load(stops + n * HV + h)
        if begun >= count:
            tl.store(last + n * HV + h, latest)
            return
        d = tl.load(starts + ((c + begun) * HV + h) * K + i, i < K, 0.0)
    else:
        d = tl.load(d_0 + at, i < K, 0.0)
        live = i < tl.where(n % split == split - 1, K, 0)
        n //= split
        at = (n * HV + h).to(tl.int64) * K + i
        if stops is not None:
            tl.store(stops + n * HV + h, 2**31 - 1)
    for m in tl.range(begun, count, num_stages=STAGES):
        xx, M, c1, c2, r2, behind, kept = fetch(k, solve, factors, m, c, begin, end, h, H, HV, K, C, BK, FORGET)
        first = begin + m * C
        tl.store(starts + ((c + m) * HV + h) * K + i, d, i < K)
        solved, new = onward(d, xx, M, c1, c2, behind, kept, eta, not WALK)
        before = C
        if WALK:
            steps = eta * solved * r2
            if not stays(d, kept, steps, xx, d_min, d_max, i < K):
                before, d = until_clip(forget, steps, xx, d, first, end, h, d_min, d_max, HV, K, C, BK, FORGET)
                new = clip(new, d_min, d_max)  # where none fires, it may still be out by a rounding
            tl.store(tails + (c + m) * HV + h, C - before)
            if before < C:
                latest = m
                new = d
                bits = tl.zeros([BK], tl.int64) + ((tl.full([], 1, tl.int64) << before) - 1)
                strength = beta if AWARE else None
                stop = tl.minimum(end, first + C)
                asked = four(k, rk, strength, forget, None, first + before, stop, h, H, HV, K, BK, FORGET)
                for v in range(before, C, 4):
                    later = four(k, rk, strength, forget, None, first + v + 4, stop, h, H, HV, K, BK, FORGET)
                    for u in tl.static_range(4):
                        t = first + v + u
                        y, b, log_kept, _a = read(asked[u])
                        sq = y * y
                        error = b * (1.0 - b * total(new, sq))
                        if NORMALIZE:
                            error /= total(y, y) + 1e-5
                        raw_t = moved(new, eta * error, sq, log_kept, FORGET)
                        inside = (t < stop) & (raw_t >= d_min) & (raw_t <= d_max)
                        bits |= inside.to(tl.int64) << tl.minimum(v + u, C - 1)
                        # As in `walk`, lanes beyond K stay.
                        new = tl.where(i < tl.where(t < stop, K, 0), clip(raw_t, d_min, d_max), new)
                        tl.store(e + t * HV + h, error, t < stop)
                    asked = later
                tl.store(clips(solve, (c + m) * HV + h, C) + i, bits, i < K)
        # In its first chunk WALK leaves e before a clip: rounded otherwise, that would depend on whether one follows.
        own = tl.where(m > begun, before, 0) if WALK else before
        tl.store(e + (first + j) * HV + h, solved, (j < own) & (first + j < end))
        d = new
    if WALK:
        tl.store(last + n * HV + h, latest)
    tl.store(d_end + at, d, live)


@triton.jit
def precondition_map_kernel(
    k, solve, factors, d_0, maps, maps_T, d_end, cu_seqlens, first_chunk, eta, tokens, split,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FORGET: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What `chain_kernel` reads, as if no clip fired: d behind each segment, where a sequence's first begins with d_0
    and others with 0 -> d_end [segments, HV, K], and how that depends on where it begins, less the identity -> maps
    [N (split - 2), HV, K, K], and transposed -> maps_T; a first segment has no map, and the last is left out. Maps are
    held transposed, as S is in `delta_inter_fwd_kernel`, in blocks of columns. d_end is left by programs that start
    behind all of these: where there are as few as processors, no two of them then share one."""
    NV: tl.constexpr = (K + BV - 1) // BV
    block = tl.program_id(0)
    behind_maps = block - tl.num_programs(0) // (NV + 1) * NV
    n = tl.where(behind_maps < 0, block // NV, behind_maps)
    h = n % HV
    n = n // HV
    g = n % split
    if (g == split - 1) | ((g == 0) & (behind_maps < 0)):
        return
    begin, end, c, _skipped = sequence_at(n, tokens, cu_seqlens, first_chunk, split, C, PACKED)
    count = tl.cdiv(end - begin, C)
    i = tl.arange(0, BK)
    if behind_maps >= 0:
        d = tl.load(d_0 + (n // split * HV + h).to(tl.int64) * K + i, i < tl.where(g == 0, K, 0), 0.0)
        for m in tl.range(0, count, num_stages=STAGES):
            xx, M, c1, c2, _r2, behind, kept = fetch(k, solve, factors, m, c, begin, end, h, H, HV, K, C, BK, FORGET)
            _e, d = onward(d, xx, M, c1, c2, behind, kept, eta, True)
        tl.store(d_end + (n * HV + h).to(tl.int64) * K + i, d, i < K)
        return
    u = block % NV * BV + tl.arange(0, BV)
    D = tl.where(u[:, None] == i[None, :], 1.0, 0.0)
    for m in tl.range(0, count, num_stages=STAGES):
        xx, M, _c1, c2, _r2, behind, kept = fetch(k, solve, factors, m, c, begin, end, h, H, HV, K, C, BK, FORGET)
        xx = xx.to(DT)
        X = tl.dot(D.to(DT), tl.trans(xx), input_precision=PRECISION) * c2[None, :]
        Y = tl.dot(X.to(DT), tl.trans(M.to(DT)), input_precision=PRECISION) * (eta * behind)[None, :]
        D = kept[None, :] * D - tl.dot(Y.to(DT), xx, input_precision=PRECISION)
    D -= tl.where(u[:, None] == i[None, :], 1.0, 0.0)
    inside = (u < K)[:, None] & (i < K)[None, :]
    at = ((n // split * (split - 2) + g - 1) * HV + h).to(tl.int64) * K * K
    tl.store(maps + at + i[None, :] * K + u[:, None], D, inside)
    tl.store(maps_T + at + i[None, :] + u[:, None] * K, D, inside)


@triton.jit
def precondition_check_kernel(
    k, rk, factors, starts, e, tails, stops, d_end, cu_seqlens, chunks, eta, d_min, d_max, tokens, split,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, C: tl.constexpr,
    FORGET: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The least chunk of a sequence in which a clip might fire, if any -> stops [N, HV]; 0 -> tails [chunks, HV]."""
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    n, m = place(c, tokens, chunks, C, PACKED)
    i = tl.arange(0, BK)
    d = tl.load(starts + (c * HV + h) * K + i, i < K, 0.0)
    new = tl.load(starts + ((c + 1) * HV + h) * K + i, i < tl.where(first + C < end, K, 0), 0.0)
    new += tl.load(d_end + (n * HV + h) * K + i, i < tl.where(first + C < end, 0, K), 0.0)
    step = eta * per_token(e, first, end, h, HV, C)
    at = factors + (c * HV + h) * 6 * C
    top = tl.load(at + 5 * C + tl.arange(0, C))
    kept = 1.0
    if FORGET:
        kept = tl.load(at + 4 * C)
    tl.store(tails + c * HV + h, 0)
    # Where another segment begins, d is what maps in bf16 made of it.
    count = tl.cdiv(end - first, C) + m
    per = tl.cdiv(count, split)
    known = tl.where(m + 1 < count, (m + 1) % per != 0, m // per == split - 1)
    if not (known & roomy(d, new, kept, step, top, d_min, d_max, i < K)):
        free = 1
        for block in range(0, BK // BB):
            part = block * BB + tl.arange(0, BB)
            some = tl.load(starts + (c * HV + h) * K + part, part < K, 0.0)
            x = keys(k, rk, first, end, h, H, HV, K, C, BB, block * BB)
            free &= stays(some, kept, step, x * x, d_min, d_max, part < K).to(tl.int32)
        if free == 0:
            tl.atomic_min(stops + n * HV + h, m.to(tl.int32))


@triton.jit
def precondition_expand_kernel(
    k, rk, forget, starts, e, tails, stops, d, cu_seqlens, chunks, eta, d_min, d_max, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    FORGET: tl.constexpr, BOX: tl.constexpr, PACKED: tl.constexpr, WALK: tl.constexpr, OF_WRITE_KEY: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_t, or OF_WRITE_KEY d_t k_t of k as used -> d [tokens, HV, K].

    Without WALK, as if no clip fired. With it, from the first clip on of a sequence's chunk `stops` [N, HV].
    """
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    since = first
    tail = 0
    if WALK:
        n, m = place(c, tokens, chunks, C, PACKED)
        stop = tl.load(stops + n * HV + h)
        if m < stop:
            return
        tail = tl.load(tails + c * HV + h)
        # What is before it stays: rounded otherwise, that would depend on whether a clip follows.
        since += tl.where(m == stop, C - tail, 0)
    i = tl.arange(0, BK)
    t = first + tl.arange(0, C)
    # All that is read comes first, to be waited for once.
    f = logs(forget, first, end, h, HV, C, FORGET)
    errors = eta * per_token(e, first, end, h, HV, C)
    x = keys(k, rk, first, end, h, H, HV, K, C, BK)
    start = tl.load(starts + (c * HV + h) * K + i, i < K, 0.0)
    if BOX and not WALK:  # NaN, which is walked through, would be in all rows
        errors = tl.where(errors == errors, errors, 0.0)
    R, G, _behind, _kept = forgetting(f, C, FORGET)
    D = path(
        R.to(DT), G, k, rk, forget, e, errors, start, x * x, first, end, h, tail, eta, d_min, d_max, H, HV, K, C, BK,
        FORGET, DT, PRECISION, WALK,
    )  # fmt: skip
    if OF_WRITE_KEY:
        D *= x
    mask = ((t >= since) & (t < end))[:, None] & (i < K)[None, :]
    tl.store(d + ((t * HV + h) * K)[:, None] + i[None, :], D.to(d.dtype.element_ty), mask)


@triton.jit
def precondition_local_kernel(
    a, k, rk, forget, h_local, adj_local, cu_seqlens, chunks, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr, C: tl.constexpr,
    FORGET: tl.constexpr, PACKED: tl.constexpr, OF_WRITE_KEY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of y, the gradient of d_t: <s_t, sum_{j > t} R_{j-1,t} y_j> -> h_local [tokens, HV], and sum_t G_t y_t ->
    adj_local [chunks, HV, K]. BB channels at a time."""
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    R, G, _behind, _kept = forgetting(logs(forget, first, end, h, HV, C, FORGET), C, FORGET)
    R = tl.trans(R.to(DT))
    hs = tl.zeros([C], tl.float32)
    for block in tl.static_range(0, BK // BB):
        x = keys(k, rk, first, end, h, H, HV, K, C, BB, block * BB)
        y = rows(a, first, end, h, HV, K, C, BB, block * BB).to(tl.float32)
        if OF_WRITE_KEY:
            y *= x
        i = block * BB + tl.arange(0, BB)
        tl.store(adj_local + (c * HV + h) * K + i, total(y, G[:, None]), i < K)
        hs += total(x * x, tl.dot(R, y.to(DT), input_precision=PRECISION), 1)
    t = first + tl.arange(0, C)
    tl.store(h_local + t * HV + h, hs, t < end)


@triton.jit
def precondition_bwd_kernel(
    a, k, rk, beta, forget, solve, factors, tails, last, h_local, adj_local, d_adj_end, p, u, adj_ends,
    d_adj_0, cu_seqlens, first_chunk, eta, tokens, split,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    AWARE: tl.constexpr, NORMALIZE: tl.constexpr, FORGET: tl.constexpr, BOX: tl.constexpr, PACKED: tl.constexpr,
    WALK: tl.constexpr, OF_WRITE_KEY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """p [tokens, HV] = <u_t, s_t>, the adjoint behind each chunk -> adj_ends [chunks, HV, K], before each sequence ->
    d_adj_0 [N, HV, K]; of chunks that were walked through, u_t -> u [tokens, HV, K]. With p None, the adjoint before
    each segment alone -> d_adj_0 [segments, HV, K], where a sequence's last begins with d_adj_end, others with 0, and
    the first is left out.

    Without WALK, each segment down to the chunk behind `last` of its sequence, the last that was walked through; with
    it, each sequence from that chunk to its beginning.
    """
    n = tl.program_id(0) // HV
    h = tl.program_id(0) % HV
    if p is None and n % split == 0:
        return
    begin, end, c, skipped = sequence_at(n, tokens, cu_seqlens, first_chunk, 1 if WALK else split, C, PACKED)
    i = tl.arange(0, BK)
    j = tl.arange(0, C)
    at = (n * HV + h).to(tl.int64) * K + i
    count = tl.cdiv(end - begin, C).to(tl.int32)
    live = i < K
    until = 0
    if BOX:
        until = tl.load(last + (n // (1 if WALK else split)) * HV + h) + 1
    if WALK:
        if until <= 0:
            return
        adj = tl.load(adj_ends + ((c + until - 1) * HV + h) * K + i, i < K, 0.0)
        todo = until
    else:
        until = tl.minimum(tl.maximum(until - skipped, 0), count).to(tl.int32)
        adj = tl.zeros([BK], tl.float32)
        of_sequence = (n // split * HV + h).to(tl.int64) * K + i
        if d_adj_end is not None:
            if p is None:
                adj = tl.load(d_adj_end + of_sequence, i < tl.where(n % split == split - 1, K, 0), 0.0)
            else:
                adj = tl.load(d_adj_end + at, i < K, 0.0)
        todo = count - until
        if p is not None:
            live = i < tl.where(n % split == 0, K, 0)
            at = of_sequence
    for back in tl.range(0, todo, num_stages=STAGES):
        m = (until if WALK else count) - 1 - back
        xx, M, _c1, c2, _r2, behind, kept = fetch(k, solve, factors, m, c, begin, end, h, H, HV, K, C, BK, FORGET)
        first = begin + m * C
        hs = per_token(h_local, first, end, h, HV, C)
        row = ((c + m) * HV + h) * K + i
        rest = tl.load(adj_local + row, i < K, 0.0)
        if p is not None:
            tl.store(adj_ends + row, adj, i < K)
        ps = total(M, (hs + behind * total(xx, adj[None, :], 1))[:, None])
        new = rest + kept * adj - total(xx, (eta * c2 * ps)[:, None])
        walked = False
        if WALK:
            walked = tl.load(tails + (c + m) * HV + h) > 0
            if walked:
                bits = tl.load(clips(solve, (c + m) * HV + h, C) + i, i < K, 0)
                new = adj
                strength = beta if AWARE else None
                asked = four(k, rk, strength, forget, a, first + C - 4, end, h, H, HV, K, BK, FORGET)
                for v in range(C - 4, -1, -4):
                    before = first + tl.maximum(v - 4, 0)
                    later = four(k, rk, strength, forget, a, before, end, h, H, HV, K, BK, FORGET)
                    for o in tl.static_range(3, -1, -1):
                        t = first + v + o
                        y, b, log_kept, da = read(asked[o])
                        sq = y * y
                        if OF_WRITE_KEY:
                            da *= y
                        b *= b
                        if NORMALIZE:
                            b /= total(y, y) + 1e-5
                        through = tl.where(((bits >> (v + o)) & 1) == 1, new, 0.0)
                        p_t = total(through, sq)
                        tl.store(p + t * HV + h, p_t, t < end)
                        tl.store(u + (t * HV + h) * K + i, through, i < tl.where(t < end, K, 0))
                        if FORGET:
                            through *= tl.exp(log_kept)
                        new = tl.where(t < end, da + through - eta * b * p_t * sq, new)
                    asked = later
        if p is not None:
            tl.store(p + (first + j) * HV + h, ps, first + j < tl.where(walked, first, end))
        adj = new
    if BOX and not WALK:
        tl.store(adj_ends + ((c + until - 1) * HV + h) * K + i, adj, i < tl.where(until > 0, K, 0))
    tl.store(d_adj_0 + at, adj, live)


@triton.jit
def precondition_grads_kernel(
    a, k, rk, beta, forget, starts, e, tails, p, u, adj_ends, dk_rest, dbeta_rest, dk, dbeta, dforget,
    cu_seqlens, chunks, eta, d_min, d_max, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    AWARE: tl.constexpr, NORMALIZE: tl.constexpr, FORGET: tl.constexpr, BOX: tl.constexpr, PACKED: tl.constexpr,
    OF_WRITE_KEY: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k (as stored), beta and forget, the delta rule's own parts dk_rest (of k as used), dbeta_rest added.

    ds = eta e u - eta c2 p d, dc1 = eta p, dc2 = -eta p x, dlambda = <u, d>.
    """
    c = (tl.program_id(0) // HV).to(tl.int64)
    h = tl.program_id(0) % HV
    first, end = chunk_at(c, tokens, cu_seqlens, chunks, C, PACKED)
    if first >= end:
        return
    i = tl.arange(0, BK)
    j = tl.arange(0, C)
    t = first + j
    row = (c * HV + h) * K + i
    # All that is read comes first, to be waited for once; decays are computed meanwhile.
    start = tl.load(starts + row, i < K, 0.0)
    adj = tl.load(adj_ends + row, i < K, 0.0)
    tail = 0
    if BOX:
        tail = tl.load(tails + c * HV + h)
    kr = rows(k, first, end, h // (HV // H), H, K, C, BK)
    nk = tl.full([C], 1.0, tl.float32)
    if rk is not None:
        nk = per_token(rk, first, end, h // (HV // H), H, C)
    dw = rows(a, first, end, h, HV, K, C, BK)
    if OF_WRITE_KEY:
        rest = rows(dk_rest, first, end, h, HV, K, C, BK)
        db = per_token(dbeta_rest, first, end, h, HV, C) if AWARE else None
    b = strengths(beta, first, end, h, HV, C, AWARE)
    errors = eta * per_token(e, first, end, h, HV, C)
    ps = eta * per_token(p, first, end, h, HV, C)
    f = logs(forget, first, end, h, HV, C, FORGET)
    R, G, behind, _kept = forgetting(f, C, FORGET)
    x = kr.to(tl.float32) * nk[:, None]
    s = x * x
    n = total(x, x, 1)
    c1, c2 = feedback(b, n, NORMALIZE)
    y = dw.to(tl.float32) * x if OF_WRITE_KEY else dw
    z = y - (c2 * ps)[:, None] * s
    U = behind[:, None] * adj[None, :] + tl.dot(tl.trans(R.to(DT)), z.to(DT), input_precision=PRECISION)
    if BOX and tail > 0:
        U = rows(u, first, end, h, HV, K, C, BK).to(tl.float32)
    D = path(
        R, G, k, rk, forget, e, errors, start, s, first, end, h, tail, eta, d_min, d_max, H, HV, K, C, BK, FORGET, DT,
        PRECISION, BOX,
    )  # fmt: skip
    ds = errors[:, None] * U - (c2 * ps)[:, None] * D
    dc1 = ps
    dc2 = -ps * total(D, s, 1)
    if NORMALIZE:
        n += 1e-5
        ds -= ((dc1 * c1 + dc2 * c2) / n)[:, None]
        dc1 = dc1 / n
        dc2 = dc2 / n
    dx = 2.0 * x * ds
    if OF_WRITE_KEY:
        dx += D * dw.to(tl.float32) + rest.to(tl.float32)
    if rk is not None:
        dx = (dx - x * total(x, dx, 1)[:, None]) * nk[:, None]
    store_rows(dk, dx, first, end, h, HV, K, C, BK)
    if AWARE:
        change = dc1 + 2.0 * b * dc2
        if OF_WRITE_KEY:
            change += db
        tl.store(dbeta + t * HV + h, change, t < end)
    if FORGET:
        tl.store(dforget + t * HV + h, total(U, D, 1) * tl.exp(f), t < end)
