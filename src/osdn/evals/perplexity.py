"""Perplexity by position, and on the tokens that recall of the context can predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from osdn.data.text import ar_hits
from osdn.data.tokenizer import encoder, opening
from osdn.evals.checkpoint import Checkpoint
from osdn.evals.documents import read_texts
from osdn.evals.results import Metric, Record, ratio
from osdn.models.configuration import cache_name


class Perplexity:
    """exp of the mean loss on blocks of T tokens, each read from an empty state, by what stands before a token.

    Documents, see `osdn.data.tokenizer.encoder`, are put one behind the other and cut into blocks. The token at
    position t of a block, t = 1 .. T-1, has t tokens of context, and counts in bucket t // bucket_size; what the
    tokenizer puts before every text is context alone, since training need not teach it. An AR-hit is a token that
    completes a bigram seen earlier in its block (`osdn.data.ar_hits`).

    A block goes through the model in segments, so that memory does not grow with its length, but for what the model
    itself keeps of the past.
    """

    name = kind = "perplexity"
    version = 2

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Sequence[str],
        *,
        text_field: str = "text",
        held_out: float = 1.0,
        block_size: int = 20_480,
        bucket_size: int = 2_048,
        segment_size: int = 2_048,
        limit: int = 0,
    ) -> None:
        checkpoint.require(block_size, "block_size")
        if bucket_size < 2:
            raise ValueError(f"bucket_size: got {bucket_size}, takes an int >= 2: the first token has no loss")
        texts, self.data = read_texts("text", text, text_field=text_field, held_out=held_out)
        tokenizer = checkpoint.tokenizer
        documents, before = list(map(encoder(tokenizer), texts)), len(opening(tokenizer))
        tokens = np.concatenate([np.array(document, np.int32) for document in documents])
        counted = np.concatenate([np.arange(len(document)) >= before for document in documents])
        count = len(tokens) // block_size
        if block_size < 2 or not count:
            raise ValueError(f"block_size: got {block_size}, takes 2 to {len(tokens)}, the tokens there are in text")
        used = min(count, limit) if limit else count
        self.blocks, self.counted = (x[: used * block_size].reshape(used, block_size) for x in (tokens, counted))
        if not self.counted[:, 1:].any():
            raise ValueError(f"block_size: got {block_size}, by which no token of the text is read behind another")
        self.bucket_size, self.segment_size = bucket_size, segment_size
        self.policy: dict[str, Any] = {
            "block_size": block_size,
            "bucket_size": bucket_size,
            "limit": limit,
            "tokenizer": checkpoint.tokens,
            "documents": "concatenated"
            + (", begin of text before each, not counted" if before else "")
            + ("" if tokenizer.eos_token_id is None else ", end of text behind each"),
        }
        self.cut = {"tokens_behind_the_last_block": len(tokens) - used * block_size}

    def __len__(self) -> int:
        return len(self.blocks)

    def order(self) -> Sequence[int]:
        return range(len(self))

    def score(self, model: Any, indices: Sequence[int]) -> list[Record]:
        ids = torch.from_numpy(self.blocks[list(indices)].astype(np.int64))
        counted = torch.from_numpy(self.counted[list(indices), 1:])
        losses = token_losses(model, ids, self.segment_size) * counted
        hits, bucket = ar_hits(ids)[:, 1:] & counted, torch.arange(1, ids.shape[1]) // self.bucket_size
        sums = torch.zeros(len(ids), int(bucket[-1]) + 1, dtype=torch.float64).index_add(1, bucket, losses)
        counts = torch.zeros(*sums.shape, dtype=torch.int64).index_add(1, bucket, counted.long())
        return [
            {
                "index": index,
                "losses": sums[row].tolist(),
                "tokens": counts[row].tolist(),
                "hit_loss": float(losses[row][hits[row]].sum()),
                "hits": int(hits[row].sum()),
            }
            for row, index in enumerate(indices)
        ]

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        losses, tokens = ([sum(r[key]) for r in records] for key in ("losses", "tokens"))
        hit_losses, hits = ([r[key] for r in records] for key in ("hit_loss", "hits"))
        loss = ratio(losses, tokens)
        found = {"perplexity": _exp(loss), "loss": loss}
        if sum(hits):
            found["AR-hit loss"] = ratio(hit_losses, hits)
        if sum(hits) < sum(tokens):
            rest = [a - b for a, b in zip(losses, hit_losses, strict=True)]
            found["other loss"] = ratio(rest, [a - b for a, b in zip(tokens, hits, strict=True)])
        found["AR-hit share"] = ratio(hits, tokens)
        T = self.blocks.shape[1]
        for i in range(len(records[0]["tokens"])):
            start, end = i * self.bucket_size, min((i + 1) * self.bucket_size, T)
            counts = [r["tokens"][i] for r in records]
            if not sum(counts):
                continue
            part = ratio([r["losses"][i] for r in records], counts)
            found[f"perplexity {start}-{end}"] = _exp(part) | {"x": (start + end) / 2}
        return found


@torch.no_grad()
def token_losses(model: Any, ids: Tensor, segment_size: int) -> Tensor:
    """-log p of ids[:, 1:], `[B, T-1]` float64 on the CPU, for ids `[B, T]`; `segment_size` tokens a forward pass.

    Raises ValueError where the model does not take up the state where it left it, as some caches of transformers.
    """
    device, T = model.device, ids.shape[1]
    if segment_size < T and T > 2:
        _check_carried_state(model, ids[:1, :128])
    losses, cache = list[Tensor](), None
    for start in range(0, T, segment_size):
        out = _forward(model, ids[:, start : start + segment_size].to(device), cache)
        cache = out.get(cache_name(model))
        losses.append(_losses(out.logits, ids[:, start + 1 : start + segment_size + 1].to(device)))
    return torch.cat(losses, 1).double().cpu()


def _forward(model: Any, ids: Tensor, cache: Any) -> Any:
    carried = {} if cache is None else {cache_name(model): cache}
    return model(input_ids=ids, use_cache=True, **carried)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits[:, : targets.shape[1]].transpose(1, 2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def _check_carried_state(model: Any, ids: Tensor) -> None:
    ids, half = ids.to(model.device), ids.shape[1] // 2
    whole = model(input_ids=ids, use_cache=False).logits
    cache = _forward(model, ids[:, :half], None).get(cache_name(model))
    second = _forward(model, ids[:, half:], cache).logits
    targets = ids[:, half + 1 :]
    off = float((_losses(second, targets) - _losses(whole[:, half:], targets)).abs().mean())
    # A state that starts anew is off by tenths of a nat, rounding by a few eps times the number of layers; in models of
    # float64 some things, as angles of positions, stay in float32.
    if not off <= math.sqrt(max(torch.finfo(x).eps for x in (whole.dtype, torch.float32))):
        raise ValueError(
            f"segment_size: a {type(model).__name__} read in two segments is off by {off:.2g} nats a token from one "
            f"read at once, its cache does not carry the state on; takes segment_size >= block_size for it"
        )


def _exp(loss: Metric) -> Metric:
    """Perplexity of a mean loss, its error to first order."""
    value = math.exp(loss["value"]) if loss["value"] < 700 else math.inf
    return loss | {"value": value, "stderr": None if loss["stderr"] is None else value * loss["stderr"]}
