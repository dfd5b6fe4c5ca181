"""Depthwise causal convolution over dense or packed sequences, with a state to continue from.

Letters: B batch, T tokens, D channels, W width, N sequences (B, or those packed into B = 1 by cu_seqlens).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osdn.ops.api import check_differentiable
from osdn.ops.dispatch import choose

WIDEST = 4
"""W that the kernel is for: its backward has W^2 products a token at hand."""


def kernel_of(conv: nn.Conv1d, device: torch.device) -> Tensor:
    """The weight `[D, 1, W]` of a depthwise convolution, on the device of its input.

    Where accelerate offloads it, it is there only while the module is called: then as the answer to an impulse, the
    same to the bit.
    """
    if not conv.weight.is_meta:
        return conv.weight
    D, _, W = conv.weight.shape
    impulse = torch.zeros(1, D, 2 * W - 1 - 2 * int(conv.padding[0]), dtype=conv.weight.dtype, device=device)
    impulse[..., impulse.shape[2] // 2] = 1
    return conv(impulse)[0].flip(-1)[:, None]


def short_convolution(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    K: int,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Sequence[Tensor], Tensor]:
    """silu of `causal_conv1d`, in three parts of so many channels, and the state after x.

    Where the operator, of `backend` and K channels a head, has Triton kernels, by one of its own (ops/triton/conv.py),
    if no state is given and W <= `WIDEST`.

    Raises:
        ValueError: by a kernel, under forward-mode differentiation, of which it knows nothing.
    """
    choice = None if state is not None or weight.shape[-1] > WIDEST else choose(x[..., :K], backend)
    if choice is None or choice.backend != "triton":
        y, state = causal_conv1d(x, weight, state, cu_seqlens)
        return F.silu(y).split(list(sizes), -1), state
    check_differentiable(choice, x, weight)
    from osdn.ops.triton.conv import convolve

    return convolve(x, weight, list(sizes), cu_seqlens), _last(x, weight.shape[-1], cu_seqlens)


def _last(x: Tensor, W: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last W inputs of each sequence, `[N, D, W]`, zeros at the left of shorter ones."""
    if cu_seqlens is None:
        tail = x[:, -W:].mT
        return F.pad(tail, (W - tail.shape[-1], 0))
    cu = cu_seqlens.to(device=x.device, dtype=torch.long)
    token = cu[1:, None] + torch.arange(-W, 0, device=x.device)
    inside = token >= cu[:-1, None]
    return torch.where(inside[..., None], x[0, token.where(inside, 0)], 0).mT


def causal_conv1d(
    x: Tensor, weight: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = sum_{j < W} weight[:, 0, j] * x_{t - W + 1 + j} within each sequence; no bias, no activation.

    Args:
        x: `[B, T, D]`. weight: `[D, 1, W]`.
        state: `[N, D, W]`, the last W inputs before x of each sequence; None is zeros.
        cu_seqlens: `[N + 1]` offsets of the sequences packed into B = 1.

    Returns:
        y `[B, T, D]` and the state after x, `[N, D, W]`, zeros at the left of sequences shorter than W.
    """
    D, W = x.shape[2], weight.shape[-1]
    weight = weight.to(x.dtype)
    if cu_seqlens is None:
        if state is None:
            return F.conv1d(x.mT, weight, groups=D, padding=W - 1)[..., : x.shape[1]].mT, _last(x, W, None)
        x = torch.cat([state.to(x.dtype), x.mT], -1)
        return F.conv1d(x[..., 1:], weight, groups=D).mT, x[..., -W:]

    # One buffer, sequence n in it behind its own W columns of state, so that no window sees another sequence.
    M, N, device = x.shape[1], len(cu_seqlens) - 1, x.device
    cu = cu_seqlens.to(device=device, dtype=torch.long)
    n = torch.arange(N, device=device)
    token = torch.arange(M, device=device) + W * (1 + n.repeat_interleave(cu.diff(), output_size=M))
    border = cu[:, None] + W * torch.arange(N + 1, device=device)[:, None] + torch.arange(W, device=device)
    buffer = x.new_zeros(M + W * N, D).index_copy(0, token, x[0])
    if state is not None:
        buffer = buffer.index_copy(0, border[:-1].flatten(), state.to(x.dtype).mT.flatten(0, 1))
    y = F.conv1d(buffer.T[None], weight, groups=D)[0].T
    return y[token - (W - 1)][None], buffer[border[1:] - W].mT
