"""A kernel around `roomy`, which is a part of one."""

import triton
import triton.language as tl

from osdn.ops.triton.precondition import roomy


@triton.jit
def roomy_kernel(d, new, kept, step, top, bounds, found, K: tl.constexpr, C: tl.constexpr):
    n = tl.program_id(0)
    i = n * K + tl.arange(0, K)
    j = n * C + tl.arange(0, C)
    low = tl.load(bounds + 2 * n)
    high = tl.load(bounds + 2 * n + 1)
    free = roomy(
        tl.load(d + i), tl.load(new + i), tl.load(kept + n), tl.load(step + j), tl.load(top + j), low, high,
        tl.arange(0, K) < K,
    )  # fmt: skip
    tl.store(found + n, free.to(tl.int32))
