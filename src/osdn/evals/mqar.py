"""Multi-query associative recall: accuracy by number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from osdn.data.mqar import MQAR
from osdn.evals.checkpoint import Checkpoint
from osdn.evals.results import Metric, Record, ratio


class PairRecall:
    """Share of the queried keys whose value is the likeliest next token, `sequences` held-out sequences for each of
    `pairs` (see `osdn.data.MQAR`)."""

    name = kind = "mqar"
    version = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        pairs: Sequence[int],
        *,
        seq_len: int = 128,
        passes: int = 1,
        vocab_size: int = 0,
        seed: int = 0,
        sequences: int = 256,
    ) -> None:
        vocab_size = vocab_size or checkpoint.vocab_size
        if vocab_size > checkpoint.vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}, takes at most the model's {checkpoint.vocab_size}")
        checkpoint.require(seq_len, "seq_len")
        self.pairs, self.sequences = tuple(pairs), sequences
        tasks = [MQAR(n, seq_len, vocab_size, passes) for n in pairs]
        batches = [task.batch(sequences, seed=seed, split="test") for task in tasks]
        self.ids, self.labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.policy: dict[str, Any] = {
            "pairs": list(pairs),
            "seq_len": seq_len,
            "passes": passes,
            "vocab_size": vocab_size,
            "alpha": tasks[0].alpha,
            "seed": seed,
            "sequences": sequences,
        }
        self.cut = dict[str, int]()
        self.data: dict[str, Any] = {"sha256": None, "sources": f"drawn from seed {seed}"}

    def __len__(self) -> int:
        return len(self.ids)

    def order(self) -> Sequence[int]:
        return range(len(self))

    @torch.no_grad()
    def score(self, model: Any, indices: Sequence[int]) -> list[Record]:
        ids, labels = self.ids[list(indices)], self.labels[list(indices), 1:]
        answers = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        right = (answers == labels).sum(1)  # a label that is no answer is negative
        return [
            {"index": index, "pairs": self.pairs[index // self.sequences], "right": int(right[row])}
            for row, index in enumerate(indices)
        ]

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        found = {}
        for n in self.pairs:
            right = [r["right"] for r in records if r["pairs"] == n]
            found[f"{n} pairs"] = ratio(right, [n] * len(right)) | {"x": n}
        return found
