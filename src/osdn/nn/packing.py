"""Padding and packing are one thing: the real tokens of all sequences in one row, and where each sequence begins.

Letters: B rows, T columns, M real tokens, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How a batch [B, T] becomes one row [1, M] of N sequences, and back.

    tokens: `[M]` places of the real tokens in the flattened batch; None where all are real.
    cu_seqlens: `[N + 1]` offsets of the sequences. per_row: sequence n is row n, so that a cache of B rows fits.
    """

    B: int
    T: int
    tokens: Tensor | None
    cu_seqlens: Tensor
    per_row: bool

    @property
    def is_empty(self) -> bool:
        """Nothing but padding."""
        return self.tokens is not None and len(self.tokens) == 0

    def to(self, device: torch.device) -> Packing:
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, tokens=tokens, cu_seqlens=self.cu_seqlens.to(device))

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[1, M, ...]`."""
        x = x.flatten(0, 1)
        return (x if self.tokens is None else x.index_select(0, self.tokens))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, M, ...]` to `[B, T, ...]`, zeros at the padding."""
        x = x[0]
        if self.tokens is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.tokens, x)
        return x.unflatten(0, (self.B, self.T))


def check_ids(name: str, x: object, B: int, T: int) -> None:
    """Raises ValueError, naming the argument, for what is no tensor `[B, T]` or `[1, T]`."""
    if not isinstance(x, Tensor) or tuple(x.shape) not in ((B, T), (1, T)):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got {got}, takes shape [{B}, {T}]" + (f" or [1, {T}]" if B > 1 else ""))


def check_agreement(cu_seqlens: object, position_ids: Tensor) -> None:
    """Raises ValueError where positions `[1, T]` begin a sequence and cu_seqlens, `[N + 1]`, has none beginning."""
    steps = position_ids[0].diff()
    rises = torch.cat([steps[1:] > 0, steps.new_zeros(1) > 0])[: len(steps)]
    starts = ((steps < 0) | (steps == 0) & rises).nonzero()[:, 0] + 1  # what stays the same is padding
    if isinstance(cu_seqlens, Tensor) and not bool(torch.isin(starts, cu_seqlens.to(starts)).all()):
        raise ValueError("position_ids: got a sequence that begins where none of cu_seq_lens_q does, takes none such")


def find_packing(
    B: int,
    T: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Packing | None:
    """The packing that a mask or position ids call for; None where every row is one full sequence.

    A sequence ends where `position_ids` do not rise, or `seq_idx` changes, from one real token of a row to the next:
    holes that the mask leaves in a run of positions are no boundaries. Synchronises the device.

    Args:
        attention_mask: `[B, >= T]`, 0 at padding; the last T columns count, as transformers passes the whole past.
        position_ids, seq_idx: `[B, T]` or `[1, T]` integers.

    Raises:
        ValueError: naming the argument whose shape does not fit.
    """
    keep = None
    if attention_mask is not None:
        mask = attention_mask
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: got {got}, takes shape [{B}, >= {T}], 0 at padding")
        keep = mask[:, mask.shape[1] - T :] != 0
        keep = None if bool(keep.all()) else keep
    ids = [("position_ids", position_ids), ("seq_idx", seq_idx)]
    for name, x in ids:
        if x is not None:
            check_ids(name, x, B, T)

    if T == 1:
        ids = []
    if keep is None and all(x is None for _, x in ids):
        return None
    device = next(x.device for x in (keep, position_ids, seq_idx) if x is not None)
    tokens = torch.arange(B * T, device=device) if keep is None else keep.flatten().nonzero()[:, 0]
    same_row = tokens[1:] // T == tokens[:-1] // T
    cut = torch.zeros_like(same_row)
    for name, x in ids:
        if x is not None:
            x = x.expand(B, T).flatten()[tokens]
            cut |= same_row & (x[1:] <= x[:-1] if name == "position_ids" else x[1:] != x[:-1])
    if bool(cut.any()):
        starts = (cut | ~same_row).nonzero()[:, 0] + 1
        ends = torch.tensor([0, len(tokens)], device=device)
        cu_seqlens = torch.cat([ends[:1], starts, ends[1:]])
        return Packing(B, T, None if keep is None else tokens, cu_seqlens, per_row=False)
    if keep is None:
        return None
    return Packing(B, T, tokens, torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)), per_row=True)
