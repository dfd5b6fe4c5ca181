"""bf16 in Triton's interpreter as on a GPU: casts to the nearest, and products of bf16 operands summed in float32.

As it comes, the interpreter truncates, and multiplies the bits of bf16 operands as integers. Products in tf32 stay in
float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch


def round_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    from osdn.ops.triton import call

    convert = interpreter._convert_float

    def widened(x):
        return (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def rounded(x, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(x)
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    def create_dot(_self, a, b, d, *_precision):
        left, right = (widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    operands = property(lambda self: tl.bfloat16 if self.k.dtype == torch.bfloat16 else tl.float32)
    monkeypatch.setattr(call.Call, "DT", operands)
