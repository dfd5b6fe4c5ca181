"""Root mean square norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from osdn.ops.options import work_dtype


class RMSNorm(nn.Module):
    """y = x * rsqrt(mean x^2 + eps) * weight [* gate], in float32 (float64 for float64 x), returned in x's dtype.

    x: `[..., size]`; gate, where there is one: the same shape, already activated.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = x.to(work_dtype(x))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(y.dtype)
        return (y if gate is None else y * gate.to(y.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
