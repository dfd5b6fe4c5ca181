"""A call of the kernels: its shapes, the constants they are compiled for, how it is cut into chunks and segments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.triton import delta
from osdn.ops.triton import precondition as kernels
from osdn.ops.triton.launch import capability, launch
from osdn.ops.triton.shared import chain_kernel

INTERPRETED = triton.knobs.runtime.interpret
PROGRAMS = 128
"""Sequences are split until a pass over chunks has so many: about the processors of a GPU."""
CROWD = 2
"""Programs of a pass of d that a processor takes side by side."""
SEGMENT = 12, 8
"""Tokens for each channel of a key or value that a segment has at least, by sequences' mean length, and so many under a
decay per channel, whose passes take longer: in bf16, a tenth of what is kept is then of segments, and a sixth."""
SEGMENTS = 3
"""Segments that a sequence is cut into at least, if at all: of two, each would have half of what there is to do, twice,
and there would be no maps."""
_OVER_V = (delta.delta_inter_fwd_kernel, delta.delta_inter_bwd_kernel, kernels.precondition_map_kernel, chain_kernel)
"""Kernels whose programs have a block of columns each."""


Tables = tuple[Tensor | None, Tensor | None, Tensor | None]


def count_chunks(x: Tensor, cu_seqlens: Tensor | None, C: int) -> int:
    """Of C tokens, in x [B, T, ...]; an upper bound where sequences are packed: their lengths are on the device."""
    B, T = x.shape[:2]
    return B * -(-T // C) if cu_seqlens is None else T // C + len(cu_seqlens) - 1


def chunk_tables(x: Tensor, cu_seqlens: Tensor | None, C: int) -> Tables:
    """cu_seqlens on the device, (sequence, chunk in it) of each chunk or (-1, .), first chunk of each sequence."""
    if cu_seqlens is None:
        return None, None, None
    cu = cu_seqlens.to(x.device, torch.int64).contiguous()
    ends = cu.diff().add(C - 1).div(C, rounding_mode="floor").cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    index = torch.arange(count_chunks(x, cu, C), device=cu.device)
    n = torch.searchsorted(ends, index, right=True)
    inside = index - starts[n]
    return cu, torch.stack([torch.where(index < ends[-1], n, -1), inside], 1).contiguous(), starts


def assert_covered(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """That offsets go from 0 to T and never back, on the device: no kernel writes what no sequence has."""
    if cu_seqlens is not None:
        whole = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == x.shape[1])
        torch._assert_async(whole & (cu_seqlens.diff() >= 0).all(), "cu_seqlens do not go from 0 to T")


@dataclass(frozen=True)
class Call:
    """Shapes and constants of a call, common to its kernels."""

    k: Tensor
    HV: int
    V: int
    cu_seqlens: Tensor | None
    chunk_size: int
    per_channel: bool = False
    """Whether S has a decay per channel."""
    crowd: int = 1
    """Programs of a pass over chunks that a processor takes side by side."""

    def of_d(self) -> Call:
        """The same for the passes of d, a vector: they wait for little but their own last step."""
        call = replace(self, crowd=CROWD)
        vars(call)["tables"] = self.tables  # made once
        return call

    @cached_property
    def C(self) -> int:
        # Products of fp32, all before Hopper and those on AMD's take operands and sums from registers, of which those
        # with a decay per channel worked into them have too few for 64.
        small = self.per_channel or self.BK > 128 or capability(self.k.device) < 90
        longest = 16 if self.DT is tl.float32 and self.BK > 64 else 32 if small else 64
        return max(16, min(self.chunk_size, longest))

    @cached_property
    def BK(self) -> int:
        return max(16, 1 << (self.k.shape[3] - 1).bit_length())

    @cached_property
    def DT(self) -> Any:
        # The interpreter multiplies in numpy, which has no bf16. fp16 has too short a range for decays.
        return tl.bfloat16 if self.k.dtype == torch.bfloat16 and not INTERPRETED else tl.float32

    @cached_property
    def stored(self) -> torch.dtype:
        """Of what stands for an operand of a product."""
        return torch.bfloat16 if self.k.dtype == torch.bfloat16 else torch.float32

    @cached_property
    def EXACT(self) -> str:
        return "ieee" if torch.version.hip or INTERPRETED else "tf32x3"

    @cached_property
    def PRECISION(self) -> str:
        """Of products whose operands stay in float32."""
        return "tf32" if self.stored == torch.bfloat16 and self.EXACT == "tf32x3" else self.EXACT

    @cached_property
    def N(self) -> int:
        return len(self.k) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @cached_property
    def chunk_count(self) -> int:
        return count_chunks(self.k, self.cu_seqlens, self.C)

    @cached_property
    def tables(self) -> Tables:
        return chunk_tables(self.k, self.cu_seqlens, self.C)

    @cached_property
    def split(self) -> int:
        """Segments, worked on side by side, that each sequence is cut into where there are few of these and heads."""
        rows, programs = self.N * self.HV, self.crowd * PROGRAMS
        least = -(-SEGMENT[self.per_channel] * max(self.k.shape[3], self.V) // self.C)
        most = min(programs // rows, self.chunk_count // self.N // least)

        def time(split: int) -> float:
            """Of a first pass, which leaves out last segments and has maps of those between, and a second."""
            first, second = rows * (2 * split - 3), rows * split
            if self.crowd == 1 and second < PROGRAMS:  # of so few, each is cut in two (launch.py)
                second *= 2
            return (-(-first // programs) + -(-second // programs)) / split

        # For d, whose passes may have twice as many programs: maps cost what all sequences and heads do together, and
        # save what one of them waits for.
        few = SEGMENTS * rows <= PROGRAMS
        return min(range(SEGMENTS, most + 1), key=time, default=1) if few else 1

    def maps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What segments between a sequence's first and last do to its state."""
        K = self.k.shape[3]
        return self.new(self.N * (self.split - 2), self.HV, K, K, dtype=dtype)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def tokens(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.new(*self.k.shape[:2], *shape, dtype=dtype)

    def sequences(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.new(self.N, self.HV, *shape, dtype=dtype)

    def segments(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.new(self.N * self.split, self.HV, *shape, dtype=dtype)

    def by_chunk(self, kernel: Any, **arguments: Any) -> None:
        cu, table, _ = self.tables
        self._launch(kernel, self.chunk_count * self.HV, arguments, cu_seqlens=cu, chunks=table)

    def by_segment(self, kernel: Any, **arguments: Any) -> None:
        cu, _, first = self.tables
        programs = self.N * self.HV * (1 if arguments.get("WALK") else self.split)
        self._launch(kernel, programs, arguments, cu_seqlens=cu, first_chunk=first)

    def chain(self, maps: Tensor, steps: Tensor, x_0: Tensor | None, back: bool) -> Tensor:
        """x before each segment (behind it, where back, with maps transposed) from x_0 and what segments do to it."""
        starts = torch.empty_like(steps)
        width = steps.shape[3] if steps.ndim == 4 else 1
        self._launch(
            chain_kernel, self.N * self.HV,
            {"maps": maps, "steps": steps, "x_0": x_0, "starts": starts, "BACK": back, "V": width},
        )  # fmt: skip
        return starts

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "tokens": self.k.shape[1], "H": self.k.shape[2], "HV": self.HV, "K": self.k.shape[3], "V": self.V,
            "BK": self.BK, "C": self.C, "LEVELS": self.C.bit_length() - 1, "PACKED": self.cu_seqlens is not None,
            "split": self.split, "DT": self.DT, "PRECISION": self.PRECISION, "EXACT": self.EXACT,
        }  # fmt: skip

    def _launch(self, kernel: Any, programs: int, arguments: dict[str, Any], **tables: Tensor | None) -> None:
        everything = {**self.constants, **tables, **arguments}
        takes = {name: everything[name] for name in kernel.arg_names if name in everything}

        def grid(meta: dict[str, Any]) -> tuple[int]:
            columns = meta.get("V", meta["K"]) + (meta["K"] if meta.get("S_map") is not None else 0)
            blocks = -(-columns // meta["BV"]) if kernel in _OVER_V else 1
            alone = kernel is kernels.precondition_map_kernel  # a program for d itself
            return (programs * (blocks + alone),)

        launch(kernel, grid, self.k.device, **takes)
