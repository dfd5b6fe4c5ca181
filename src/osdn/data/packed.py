"""Documents packed into rows of one length, in an order that can be taken up again at any row.

A row is filled with one document after the other; what does not fit goes on in the next row, as a sequence of its own.
`position_ids` count from 0 in every piece, which is where the model begins anew: no state crosses documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from osdn.data.documents import Documents, is_held_out
from osdn.data.mqar import IGNORE
from osdn.data.tokenizer import encoder

Row = dict[str, Tensor]
Position = dict[str, Any]


class PackedRows(IterableDataset):
    """The training rows of one process, without end: from stream after stream in turn, epoch after epoch.

    documents: dealt to `streams` parts of which this process reads `own`. shuffle: documents in a block; within it,
    their order is random, a function of (seed, stream, epoch, block). held_out: share of the documents to leave out.
    positions: where each stream is taken up, as a row's "position" told it; by default at the beginning.

    Yields rows: input_ids, labels and position_ids `[context]`, int64, where labels are -100 at the first token of
    each piece (nothing before it tells of it), and position, the pair of a stream and its place behind this row.

    Raises ValueError where a stream has no documents.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        shuffle: int,
        seed: int,
        held_out: float = 0.0,
        streams: int = 1,
        own: Sequence[int] = (0,),
        positions: Mapping[int, Position] | None = None,
    ) -> None:
        self.documents, self.tokenizer, self.context = documents, tokenizer, context
        self.shuffle, self.seed, self.held_out = shuffle, seed, held_out
        self.streams, self.own, self.positions = streams, own, positions or {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        streams = [(stream, self._stream(stream)) for stream in self.own]
        while True:
            for stream, rows in streams:
                row, position = next(rows)
                yield {**row, "position": (stream, position)}

    def _stream(self, stream: int) -> Iterator[tuple[Row, Position]]:
        start: Position = {"epoch": 0, "block": 0, "source": None, "document": 0, "token": 0}
        place = start | self.positions.get(stream, {})
        epoch, block, source, document, token = place.values()
        row, encode = _Row(self.context), encoder(self.tokenizer)
        while True:
            part = split_dataset_by_node(self.documents.source, stream, self.streams)
            if source is not None:
                part.load_state_dict(source)
            texts = training_texts(part, self.documents, self.held_out)
            while some := list(islice(texts, self.shuffle)):
                order = np.random.default_rng([self.seed, stream, epoch, block]).permutation(len(some))
                for i in range(document, len(some)):
                    ids = encode(some[order[i]])
                    while token < len(ids):
                        token += row.fill(ids, token)
                        if row.is_full:
                            place = {"epoch": epoch, "block": block, "source": source, "document": i, "token": token}
                            yield row.take(), place
                    token = 0
                document, block, source = 0, block + 1, part.state_dict()
            if block == 0:
                got = f"no documents to train on for stream {stream} of {self.streams} ({self.documents.name})"
                raise ValueError(f"data: got {got}; takes one or more for each, or fewer --streams")
            epoch, block, source = epoch + 1, 0, None


def training_texts(source: Iterable[dict[str, str]], documents: Documents, held_out: float) -> Iterator[str]:
    """The texts of `source`, all of `documents` or a part, without empty ones and those that are held out."""
    return (text for text in _texts(source, documents) if not is_held_out(text, held_out))


def fills_streams(documents: Documents, streams: int, held_out: float) -> bool:
    """Does each stream get a document? Reads as far as the first of each."""
    parts = (split_dataset_by_node(documents.source, stream, streams) for stream in range(streams))
    return all(any(training_texts(part, documents, held_out)) for part in parts)


def held_out_rows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, context: int, rows: int, share: float
) -> list[Row]:
    """At most `rows` whole rows of the documents that `is_held_out` at `share`, in the order they are read.

    So that they come from many documents, each gives at most its part of rows * context tokens, from its middle: of as
    many parts as there are documents, or rows.
    """
    row, found, encode = _Row(context), list[Row](), encoder(tokenizer)
    texts = (text for text in _texts(documents.source, documents) if is_held_out(text, share))
    first = list(islice(texts, rows))
    most = math.ceil(rows * context / max(1, len(first)))
    for text in chain(first, texts):
        ids = encode(text)
        begin = max(0, len(ids) - most) // 2
        ids, begin = ids[begin : begin + most], 0
        while begin < len(ids) and len(found) < rows:
            begin += row.fill(ids, begin)
            if row.is_full:
                found.append(row.take())
        if len(found) == rows:
            break
    return found


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch `[B, context]` of each; where rows have a position, `positions` holds the last of each stream."""
    batch: dict[str, Any] = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels", "position_ids")}
    if "position" in rows[0]:
        batch["positions"] = dict(row["position"] for row in rows)
    return batch


def unigram_entropy(rows: Iterable[Row]) -> float:
    """Entropy of the labels' own distribution, in nats: what no model without a context can get below on them."""
    labels = torch.cat([row["labels"][1:] for row in rows])
    p = labels[labels != IGNORE].bincount().double()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log()).sum())


class _Row:
    """A row that is being filled."""

    def __init__(self, context: int) -> None:
        self.context = context
        self._clear()

    def _clear(self) -> None:
        self.ids, self.labels, self.positions = list[int](), list[int](), list[int]()

    @property
    def is_full(self) -> bool:
        return len(self.ids) == self.context

    def fill(self, ids: list[int], begin: int) -> int:
        """Take what fits of a document from `begin` on; the number of tokens taken."""
        piece = ids[begin : begin + self.context - len(self.ids)]
        self.ids += piece
        self.labels += [IGNORE, *piece[1:]]
        self.positions += range(len(piece))
        return len(piece)

    def take(self) -> Row:
        row = {"input_ids": self.ids, "labels": self.labels, "position_ids": self.positions}
        self._clear()
        return {name: torch.tensor(values) for name, values in row.items()}


def _texts(source: Iterable[dict[str, str]], documents: Documents) -> Iterator[str]:
    for example in source:
        if documents.text_field not in example:
            names = ", ".join(example)
            raise ValueError(f"text_field: got {documents.text_field!r}, takes a field of {documents.name}: {names}")
        if text := example[documents.text_field]:
            yield text
