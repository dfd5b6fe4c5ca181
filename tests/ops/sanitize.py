"""Every kernel under one decay, in small cases, for compute-sanitizer: `make gpu-sanitize`.

That slows a kernel down a hundredfold, so lengths are those of a few chunks. What comes out is not looked at: the tests
do that.
"""

import math
import sys
from dataclasses import replace
from itertools import product

import torch
from inputs import BOX, Case, run

import osdn
from osdn.nn.conv import short_convolution
from osdn.ops.triton import call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with TRITON_INTERPRET=1
BF16, FP32 = torch.bfloat16, torch.float32


def passes(case: Case, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        x = {n: None if y is None else y.to(DEVICE) for n, y in case.tensors(dtype).items()}
        run(case, x, "triton")
        if case.preconditioner is not None:
            k = x["k"].repeat_interleave((case.HV or case.H) // case.H, 2)
            osdn.precondition(
                *(k, x["beta"]),
                preconditioner=case.preconditioner,
                forget=x["forget"],
                initial_d=x["d"],
                cu_seqlens=case.cu_seqlens,
                backend="triton",
            )


def steps(decay: str | None, K: int) -> None:
    gen = torch.Generator().manual_seed(0)
    shape = {None: None, "scalar": (3, 2), "channel": (3, 2, K)}[decay]
    q, k, v = (torch.randn(3, 2, K, generator=gen).to(DEVICE) for _ in range(3))
    beta, d = torch.rand(3, 2, generator=gen).to(DEVICE), torch.rand(3, 2, K, generator=gen).to(DEVICE)
    S = torch.randn(3, 2, K, K, generator=gen).to(DEVICE)
    g = None if shape is None else -torch.rand(shape, generator=gen).to(DEVICE)
    rule = osdn.Preconditioner(20.0, "beta_aware", *BOX)
    for dtype in (BF16, FP32):
        x = (y.to(dtype) for y in (q, k, v))
        osdn.online_scaled_delta_step(
            *x, beta, osdn.DeltaState(S, d), g=g, forget=-beta, preconditioner=rule, backend="triton"
        )


def convolutions() -> None:
    for dtype, cu_seqlens in product((BF16, FP32), (None, torch.tensor([0, 40, 40, 41, 70]))):
        gen = torch.Generator().manual_seed(0)
        x = torch.randn(1, 70, 160, generator=gen).to(DEVICE, dtype).requires_grad_()
        weight = torch.randn(160, 1, 4, generator=gen).to(DEVICE, dtype).requires_grad_()
        y, _ = short_convolution(x, weight, (5, 15, 140), 5, None, cu_seqlens, "triton")
        torch.autograd.grad(list(y), [x, weight], [torch.ones_like(part) for part in y])


def main(decay: str) -> None:
    kind = None if decay == "none" else decay
    narrow = Case(150, 1, K=16, V=16, B=1, decay=kind, feedback="beta_aware", forget=True, qk_l2norm=True, box=BOX)
    wide = replace(narrow, K=128, V=128, eta=30.0)
    free = {"box": (0.0, math.inf)}
    passes(wide, BF16, FP32)
    passes(replace(wide, **free), BF16)
    passes(replace(wide, plain=True, forget=False), BF16)
    passes(replace(wide, lengths=(70, 0, 1, 90), HV=2), BF16)
    passes(replace(wide, K=64, V=64), BF16, FP32)
    passes(replace(wide, K=100, V=60), BF16)
    passes(narrow, BF16, FP32)
    passes(replace(narrow, **free), BF16)
    # As where sequences are long and few: each cut into segments.
    call.CROWD, call.SEGMENT, call.SEGMENTS = 1, (1, 1), 3
    passes(replace(wide, T=400), BF16, FP32)
    passes(replace(wide, T=400, **free), BF16)
    passes(narrow, FP32)
    for K in (16, 128):
        steps(kind, K)
    convolutions()


if __name__ == "__main__":
    main(sys.argv[1])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
