"""Multi-query associative recall (Zoology, arXiv 2312.04927; read in several passes: JRT, arXiv 2407.05483)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from osdn.ops.options import check_positive, check_size, refuse

Split = Literal["train", "test"]
_SPLITS: dict[str, int] = {"train": 0, "test": 1}
IGNORE = -100


@dataclass(frozen=True)
class MQAR:
    """A sequence lists `num_pairs` key-value pairs, then queries every key once; the model is to answer its value.

        k_1 v_1 .. k_N v_N  (the same listing `passes` times)  |  slot_0 slot_1 ..   two tokens a slot

    Keys are distinct tokens of 1..V//2-1, values distinct tokens of V//2..V-1. Key j is queried on the first token of
    slot g_j, where the gaps g_1, g_2, .. are drawn one after the other, without replacement, with
    p(i) ~ alpha * i^(alpha - 1) at slot i - 1: most queries follow soon after the listing, some late. The answer is a
    label alone: the input behind a query, like every other free position, is a token drawn uniformly from all V (it
    may equal a listed key, as in Zoology; the value asked for is always the listed one).

    num_pairs: N >= 1. seq_len: T >= 2 N (passes + 1). vocab_size: V >= 2 N + 2, so that the keys can be distinct.
    passes: listings of the same pairs in the same order, >= 1. alpha: finite, > 0; 1 is uniform.

    Raises ValueError where these do not hold.
    """

    num_pairs: int = 24
    seq_len: int = 128
    vocab_size: int = 256
    passes: int = 1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        for name in ("num_pairs", "seq_len", "vocab_size", "passes"):
            check_size(name, getattr(self, name))
        check_positive("alpha", self.alpha)
        shortest = 2 * self.num_pairs * (self.passes + 1)
        if self.seq_len < shortest:
            raise ValueError(
                f"seq_len: got {self.seq_len}, takes at least 2 * num_pairs * (passes + 1) = {shortest} "
                f"for num_pairs = {self.num_pairs}, passes = {self.passes}"
            )
        if self.vocab_size < 2 * self.num_pairs + 2:
            raise ValueError(
                f"vocab_size: got {self.vocab_size}, takes at least {2 * self.num_pairs + 2} for "
                f"{self.num_pairs} distinct keys among 1..vocab_size//2-1"
            )

    def batch(self, n: int, *, seed: int, step: int = 0, split: Split = "train") -> tuple[Tensor, Tensor]:
        """n sequences, a function of (self, split, seed, step): the two splits draw from separate random streams.

        Returns:
            input_ids `[n, T]` and labels `[n, T]`, int64, in transformers' convention: the logits at t are scored
            against labels[t + 1]. A label stands one token behind its query; everywhere else is -100.

        Raises ValueError for n < 1, seed < 0, step < 0, another split, or a value of another type.
        """
        check_size("n", n)
        for name, x in (("seed", seed), ("step", step)):
            if type(x) is not int or x < 0:
                refuse(name, repr(x), "an integer >= 0")
        if split not in (takes := tuple(_SPLITS)):
            refuse("split", repr(split), f"one of {takes}")
        rng = np.random.default_rng([_SPLITS[split], seed, step])
        N, T, V, half = self.num_pairs, self.seq_len, self.vocab_size, self.vocab_size // 2
        keys = 1 + _distinct(rng, n, half - 1, N)
        values = half + _distinct(rng, n, V - half, N)
        listing = np.tile(np.stack([keys, values], axis=-1).reshape(n, 2 * N), self.passes)
        start = listing.shape[1]
        # The N largest of log p + Gumbel noise, in descending order, are N successive draws without replacement.
        log_p = (self.alpha - 1) * np.log(np.arange(1, (T - start) // 2 + 1))
        gaps = np.argsort(-(log_p + rng.gumbel(size=(n, len(log_p)))), axis=1)[:, :N]
        query = start + 2 * gaps
        ids = rng.integers(0, V, size=(n, T))
        ids[:, :start] = listing
        np.put_along_axis(ids, query, keys, axis=1)
        labels = np.full((n, T), IGNORE)
        np.put_along_axis(labels, query + 1, values, axis=1)
        return torch.from_numpy(ids), torch.from_numpy(labels)


def _distinct(rng: np.random.Generator, n: int, m: int, k: int) -> np.ndarray:
    """`[n, k]`: in every row k distinct integers below m, in random order."""
    return np.argsort(rng.random((n, m)), axis=1)[:, :k]
