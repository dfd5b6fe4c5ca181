"""The layer's short convolutions: depthwise, causal, SiLU; kernels and their differentiable operator.

    y_t = silu(a_t),  a_t = sum_{j < W} weight[W - 1 - j] x_{t - j}          x is 0 before its sequence begins

Bound by memory: of each token and channel x is read and y written, and for the backward x and dy read and dx written.
PyTorch convolves [B, D, T]; what it would transpose, twice each way, costs more than the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.triton.call import Tables, assert_covered, chunk_tables, count_chunks
from osdn.ops.triton.function import differentiable, tensors
from osdn.ops.triton.launch import CONFIGS, launch
from osdn.ops.triton.shared import chunk_at, place

C = 16
"""Tokens of a chunk, which a program takes of some channels."""
CONFIGS["conv_fwd_kernel"] = CONFIGS["conv_bwd_kernel"] = [{"BD": 128, "num_warps": 4}]


@triton.jit
def block_at(tokens, cu_seqlens, chunks, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr):
    """Of a program: its chunk, tokens [C] and channels [BD], and where the sequence of its tokens begins and ends."""
    across: tl.constexpr = (D + BD - 1) // BD
    chunk = tl.program_id(0) // across
    first, end = chunk_at(chunk, tokens, cu_seqlens, chunks, C, PACKED)
    _, m = place(chunk, tokens, chunks, C, PACKED)
    t = first + tl.arange(0, C)
    return chunk.to(tl.int64), t, (tl.program_id(0) % across) * BD + tl.arange(0, BD), first - m * C, end


@triton.jit
def tap(x, t, c, begin, end, row, D: tl.constexpr):
    """x [C, BD] of tokens t, `row` apart; 0 outside their sequence."""
    there = ((t >= begin) & (t < end))[:, None] & (c < D)[None, :]
    return tl.load(x + t[:, None] * row + c[None, :], there, 0.0).to(tl.float32)


@triton.jit
def factor(weight, c, j: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """The weight [1, BD] of x_{t - j}."""
    return tl.load(weight + c * W + (W - 1 - j), c < D, 0.0).to(tl.float32)[None, :]


@triton.jit
def conv_fwd_kernel(
    x, weight, y, cu_seqlens, chunks, tokens, row,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x [tokens, D], `row` apart; weight [D, W]; y [tokens, D]."""
    _, t, c, begin, end = block_at(tokens, cu_seqlens, chunks, D, BD, C, PACKED)
    a = tl.zeros([C, BD], tl.float32)
    for j in tl.static_range(W):
        a += factor(weight, c, j, D, W) * tap(x, t - j, c, begin, end, row, D)
    out = (a * tl.sigmoid(a)).to(y.dtype.element_ty)
    tl.store(y + t[:, None] * D + c[None, :], out, (t < end)[:, None] & (c < D)[None, :])


@triton.jit
def conv_bwd_kernel(
    x, weight, dy, dx, dweight, cu_seqlens, chunks, tokens, row,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx as x; dweight [chunks, D, W], each chunk's part. a is computed anew, up to W - 1 tokens ahead."""
    chunk, t, c, begin, end = block_at(tokens, cu_seqlens, chunks, D, BD, C, PACKED)
    dxs = tl.zeros([C, BD], tl.float32)
    for i in tl.static_range(W - 1, -1, -1):
        a = tl.zeros([C, BD], tl.float32)
        for j in tl.static_range(W):
            a += factor(weight, c, j, D, W) * tap(x, t + (i - j), c, begin, end, row, D)
        s = tl.sigmoid(a)
        da = tap(dy, t + i, c, begin, end, D, D) * s * (1.0 + a * (1.0 - s))
        dxs += factor(weight, c, i, D, W) * da
    for j in tl.static_range(W):  # da is that of t itself
        part = tl.sum(da * tap(x, t - j, c, begin, end, row, D), 0)
        tl.store(dweight + (chunk * D + c) * W + (W - 1 - j), part, c < D)
    tl.store(dx + t[:, None] * row + c[None, :], dxs.to(dx.dtype.element_ty), (t < end)[:, None] & (c < D)[None, :])


def _launch(kernel: Any, row: int, table: Tables, x: Tensor, weight: Tensor, **arguments: Tensor) -> None:
    (D, _, W), (cu, chunks, _) = weight.shape, table
    count = count_chunks(x, cu, C)
    launch(
        kernel, lambda meta: (count * -(-D // meta["BD"]),), x.device, x=x, weight=weight, cu_seqlens=cu, chunks=chunks,
        tokens=x.shape[1], row=row, D=D, W=W, C=C, PACKED=cu is not None, **arguments,
    )  # fmt: skip


def _forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...]:
    assert_covered(x, cu_seqlens)
    made, table = _fake(x, weight, cu_seqlens, sizes), chunk_tables(x, cu_seqlens, C)
    for y, part, own in zip(made, x.split(sizes, -1), weight.split(sizes)):
        _launch(conv_fwd_kernel, x.shape[2], table, part, own, y=y)
    return made


def _fake(x: Tensor, _weight: Tensor, _cu_seqlens: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(*x.shape[:2], size) for size in sizes)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *grads, x, weight, cu_seqlens, sizes, _ = arguments
    dx, found, table = torch.empty_like(x), [], chunk_tables(x, cu_seqlens, C)
    for dy, part, own, dpart in zip(grads, x.split(sizes, -1), weight.split(sizes), dx.split(sizes, -1)):
        dy = torch.zeros_like(part, memory_format=torch.contiguous_format) if dy is None else dy
        parts = own.new_empty(count_chunks(x, cu_seqlens, C), len(own), own.shape[2], dtype=torch.float32)
        _launch(conv_bwd_kernel, x.shape[2], table, part, own, dy=dy, dx=dpart, dweight=parts)
        found.append(parts.sum(0)[:, None])
    return dx, torch.cat(found)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, weight = arguments[-5:-3]
    return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


_rule = differentiable(
    "triton_short_convolution",
    "Tensor x, Tensor weight, Tensor? cu_seqlens, int[] sizes",
    tensors(3), tensors(2), 3, _forward, _fake, _backward, _backward_fake,
)  # fmt: skip


def convolve(x: Tensor, weight: Tensor, sizes: list[int], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """y in three contiguous parts of `sizes` channels, of x [B, T, D] and weight [D, 1, W]."""
    return _rule(x.contiguous(), weight.contiguous(), cu_seqlens, sizes)
