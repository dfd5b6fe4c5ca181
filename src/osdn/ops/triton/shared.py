"""What several kernels need: where a chunk lies, decays between tokens, the triangular inverse.

Letters: C chunk length, K key dim, V value dim, H key heads, HV value heads; BK, BV powers of two at least K and (a
block of) V. Chunks are numbered through all sequences; the chunks of packed sequences are looked up in tables that the
host fills on the device, so that no length has to travel back.
"""

import triton
import triton.language as tl


@triton.jit
def place(c, tokens, chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """Of chunk c, its sequence and its number in that; sequence -1 for a chunk number that no chunk has."""
    if PACKED:
        n = tl.load(chunks + 2 * c)
        m = tl.load(chunks + 2 * c + 1)
    else:
        per = tl.cdiv(tokens, C)
        n = (c // per).to(tl.int64)
        m = c % per
    return n, m


@triton.jit
def chunk_at(c, tokens, cu_seqlens, chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk c and the end of its sequence; (0, 0) for a chunk number that no chunk has."""
    n, m = place(c, tokens, chunks, C, PACKED)
    if PACKED:
        begin = tl.load(cu_seqlens + n, mask=n >= 0, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1, mask=n >= 0, other=0).to(tl.int64)
        first = begin + m * C
    else:
        first = n * tokens + m * C
        end = (n + 1) * tokens
    return first, end


@triton.jit
def sequence_at(n, tokens, cu_seqlens, first_chunk, split, C: tl.constexpr, PACKED: tl.constexpr):
    """Of the n-th segment, where each sequence has `split` segments of whole chunks: first token, end, first chunk, and
    the chunks of its sequence before it."""
    g = n % split
    n = n // split
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
        chunk = tl.load(first_chunk + n).to(tl.int64)
    else:
        begin = n.to(tl.int64) * tokens
        end = begin + tokens
        chunk = n.to(tl.int64) * tl.cdiv(tokens, C)
    per = tl.cdiv(tl.cdiv(end - begin, C), split)
    first = tl.minimum(begin + g * per * C, end)
    return first, tl.minimum(begin + (g + 1) * per * C, end), chunk + g * per, g * per


@triton.jit
def rows(x, first, end, h, heads, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, start=0):
    """[C, BN] of x [tokens, heads, N] as stored, columns from `start` on; 0 outside."""
    t = first + tl.arange(0, C)
    i = start + tl.arange(0, BN)
    return tl.load(x + ((t * heads + h) * N)[:, None] + i[None, :], (t < end)[:, None] & (i < N)[None, :], 0.0)


@triton.jit
def store_rows(x, value, first, end, h, heads, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, start=0):
    """What `rows` would load."""
    t = first + tl.arange(0, C)
    i = start + tl.arange(0, BN)
    at = ((t * heads + h) * N)[:, None] + i[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), (t < end)[:, None] & (i < N)[None, :])


@triton.jit
def per_token(x, first, end, h, heads, C: tl.constexpr):
    """[C] float32 of x [tokens, heads], 0 outside [first, end)."""
    t = first + tl.arange(0, C)
    return tl.load(x + t * heads + h, t < end, 0.0).to(tl.float32)


@triton.jit
def log_sums(f):
    """Float64 sums of log decays f [C] up to each token, without it and with it, and over the chunk.

    Decays between two tokens are exp of differences of these: in float32 such a difference cancels where one decay is
    a wipe, in float64 it keeps 12 digits below the decimal point once what exp takes for 0 is cut off.
    """
    f = tl.where(f < -150.0, -150.0, f).to(tl.float64)
    upto = tl.cumsum(f, 0)
    return upto - f, upto, tl.sum(f, 0)


@triton.jit
def exp(logarithm):
    return tl.exp(logarithm.to(tl.float32))


@triton.jit
def clip(x, d_min, d_max):
    x = tl.where(x < d_min, d_min, x)  # unlike minimum and maximum, this keeps a NaN
    return tl.where(x > d_max, d_max, x)


@triton.jit
def total(x, y, AXIS: tl.constexpr = 0):
    """The sum of x y over an axis, the same to the bit in all lanes that have it.

    Where a lane has one product of a sum, compilers fuse that into the first step between two lanes: each rounds the
    other's product and not its own, and Triton 3.9 has them all write what they found to one place. So the product
    is fused with 0 beforehand. Of more than 32 rows and columns, a lane has several.
    """
    products = x * y
    if products.numel <= 32 * products.shape[0] or products.numel <= 32 * products.shape[-1]:
        products = tl.fma(x, y, 0.0)
    return tl.sum(products, AXIS)


@triton.jit
def in_two(x):
    """Float64 x as a sum of two in float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def between(later, earlier, C: tl.constexpr):
    """[C, C] exp(later_t - earlier_j) at (t, j), j < t, of two sums from `log_sums`; 1 elsewhere.

    Each sum in two terms of float32: their differences round as that of float64 does on its way to float32, and take a
    small part of the time.
    """
    i = tl.arange(0, C)
    a, a_rest = in_two(later)
    b, b_rest = in_two(earlier)
    y = (a[:, None] - b[None, :]) + (a_rest[:, None] - b_rest[None, :])
    return tl.exp(tl.where(i[:, None] > i[None, :], y, 0.0))


@triton.jit
def below(A, C: tl.constexpr, DIAGONAL: tl.constexpr):
    i = tl.arange(0, C)
    if DIAGONAL:
        A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    else:
        A = tl.where(i[:, None] > i[None, :], A, 0.0)
    return A


@triton.jit
def diagonal(A, C: tl.constexpr, L: tl.constexpr):
    """[C / L, L, L]: the blocks on the diagonal of A [C, C]."""
    i = tl.arange(0, C // L)
    same = i[:, None, None, None] == i[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(A, [C // L, L, C // L, L]), 0.0), 2)


@triton.jit
def widen(X, N: tl.constexpr, L: tl.constexpr):
    """[N / 2, 2L, 2L] with two blocks of X [N, L, L] each on their diagonals."""
    i = tl.arange(0, 2)
    same = i[None, :, None, None, None] == i[None, None, None, :, None]
    return tl.reshape(tl.where(same, tl.reshape(X, [N // 2, 2, L, 1, L]), 0.0), [N // 2, 2 * L, 2 * L])


@triton.jit
def join(A, X, C: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr):
    """Of the inverses X [C / L, L, L] of the diagonal blocks of I + A, those of blocks twice as long."""
    N: tl.constexpr = C // (2 * L)
    half = tl.arange(0, 2)
    upper = half[None, :, None, None] == 0
    pair = tl.reshape(X, [N, 2, L, L])
    first = tl.sum(tl.where(upper, pair, 0.0), 1)
    second = tl.sum(tl.where(upper, 0.0, pair), 1)
    corner = ((half[:, None, None, None] == 1) & (half[None, None, :, None] == 0))[None, :, :, :, :]
    B = tl.reshape(diagonal(A, C, 2 * L) if N > 1 else A, [N, 2, L, 2, L])
    B = tl.sum(tl.sum(tl.where(corner, B, 0.0), 3), 1)
    if N == 1:  # a batch of one would be computed by each warp anew
        first = tl.reshape(first, [L, L])
        second = tl.reshape(second, [L, L])
        B = tl.reshape(B, [L, L])
    Y = tl.dot(tl.dot(second, B, input_precision=PRECISION), first, input_precision=PRECISION)
    Y = tl.where(corner, tl.reshape(Y, [N, 1, L, 1, L]), 0.0)
    return widen(X, 2 * N, L) - tl.reshape(Y, [N, 2 * L, 2 * L])


@triton.jit
def invert(A, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr, JOIN: tl.constexpr):
    """(I + A)^-1 for A [C, C] strictly below the diagonal, C = 2^LEVELS >= 16.

    By doubling: with X the inverse of the diagonal blocks of length h and B the part of A between the halves of the
    blocks of length 2h, X - X B X is the inverse of the latter. Every X is an inverse of blocks of I + A, so nothing
    grows that is not large in the result. JOIN: from h = 16 on without what is 0 in these products, an eighth of the
    operations, which pays where no other warp waits for the pieces.
    """
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    blocks = diagonal(A, C, 16)
    X = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, blocks, 0.0)
    for level in tl.static_range(1, 4):
        B = tl.where(((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level)), blocks, 0.0)
        X -= tl.dot(tl.dot(X, B, input_precision=PRECISION), X, input_precision=PRECISION)
    for level in tl.static_range(4, LEVELS):
        if JOIN:
            X = join(A, X, C, 1 << level, PRECISION)
        else:
            X = widen(X, C >> level, 1 << level)
            r = tl.arange(0, 2 << level)
            halves = (r[:, None] >= (1 << level)) & (r[None, :] < (1 << level))
            if 2 << level == C:  # as in `join`
                X = tl.reshape(X, [C, C])
                B = tl.where(halves, A, 0.0)
            else:
                B = tl.where(halves[None, :, :], diagonal(A, C, 2 << level), 0.0)
            X -= tl.dot(tl.dot(X, B, input_precision=PRECISION), X, input_precision=PRECISION)
    return tl.reshape(X, [C, C])


@triton.jit
def chain_kernel(
    maps, steps, x_0, starts, split, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [K, V] before each of a sequence's segments -> starts [segments, HV, K, V]; BACK: last first.

    steps, as starts: of the first segment, x behind it; of others, what they add to x <- x + E x. Their E, less that of
    the last, which no one needs: maps [N (split - 2), HV, K, K], in bf16 too: x <- M x as x <- x + (M - I) x, since
    rounding is to cost nothing where x stays as it is, or it would grow from segment to segment. x_0 None is 0.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    WAY: tl.constexpr = -1 if BACK else 1
    # All of E in three terms of tf32 would not fit in registers.
    BR: tl.constexpr = BK if BK <= 32 or (BK <= 128 and (PRECISION == "tf32" or BV == 1)) else 32
    n = tl.program_id(0) // (NV * HV)
    h = (tl.program_id(0) // NV) % HV
    i = tl.arange(0, BK)
    u = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    entries = i[:, None] * V + u[None, :]
    inside = (i < K)[:, None] & (u < V)[None, :]
    x = tl.zeros([BK, BV], tl.float32)
    if x_0 is not None:
        x = tl.load(x_0 + (n * HV + h).to(tl.int64) * K * V + entries, inside, 0.0)
    first = n * split + (split - 1 if BACK else 0)
    at = (first * HV + h).to(tl.int64) * K * V
    tl.store(starts + at + entries, x, inside)
    x = tl.load(steps + at + entries, inside, 0.0)
    tl.store(starts + at + WAY * HV * K * V + entries, x, inside)
    for step in tl.range(1, split - 1, num_stages=STAGES):
        g = first + WAY * step
        cell = (n * (split - 2) + (split - 2 - step if BACK else step - 1)) * HV + h
        E_at = maps + cell.to(tl.int64) * K * K
        at = (g * HV + h).to(tl.int64) * K * V
        after = starts + at + WAY * HV * K * V
        y = tl.zeros([BR, BV], tl.float32)
        for block in range(0, BK // BR):
            r = block * BR + tl.arange(0, BR)
            live = (r < K)[:, None] & (u < V)[None, :]
            E = tl.load(E_at + r[:, None] * K + i[None, :], (r < K)[:, None] & (i < K)[None, :], 0.0)
            if BV == 1:
                y = total(E.to(tl.float32), tl.trans(x), 1)[:, None]
            else:
                y = tl.dot(E.to(tl.float32), x, input_precision=PRECISION)
            y += tl.load(steps + at + r[:, None] * V + u[None, :], live, 0.0)
            if BR < BK:
                tl.store(after + r[:, None] * V + u[None, :], y, live)
        if BR < BK:
            tl.debug_barrier()
            y = tl.load(after + entries, inside, 0.0)
            tl.debug_barrier()  # before it is overwritten
        x += y
        tl.store(after + entries, x, inside)
