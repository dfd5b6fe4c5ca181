"""Text to tokens and back, and the loop around `generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from osdn.data.documents import check_characters
from osdn.data.text import read_text
from osdn.data.tokenizer import opening
from osdn.generate import Generate
from osdn.models.configuration import CACHE, OSDNConfig
from osdn.models.modeling import OSDNCache

_PREFILL = 1024  # tokens at a time, so that memory does not grow with the prompt


def prompt_text(path: Path | None) -> str:
    """The text in `path`, or in standard input; ValueError where there is none, or it is not UTF-8."""
    if path is not None:
        return read_text("file", path)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"file: got standard input, which is not UTF-8 at byte {error.start}; takes UTF-8") from None


@dataclass(frozen=True)
class Codec:
    """Text to tokens and back, with the tokenizer of a checkpoint."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that is to go on: as documents begin, special tokens in it read as such, and without what
        some tokenizers put behind every text. ValueError where there are none, and for what is no Unicode text."""
        check_characters(text, "prompt")
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [*opening(self.tokenizer), *ids]
        if not tokens:
            raise ValueError("prompt: got an empty text, takes at least one token")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; U+FFFD for what is no UTF-8, and nothing for special tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class TextStream(BaseStreamer):
    """Hands on text as its characters become whole; remembers a few tokens, however long the text.

    `put` gets the prompt first, as transformers has it, and then one token at a time.
    """

    def __init__(self, codec: Codec, write: Callable[[str], None]) -> None:
        self.codec, self.write = codec, write
        self.tokens: list[int] | None = None
        self.whole = [0]  # numbers of tokens that ended with a whole character
        self.shown = 0

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        text = self.codec.decode(self.tokens)
        # Perhaps the first bytes of a character, which has up to four. Byte fallback decodes a run of bytes that does
        # not end with a whole character to marks alone, one a byte, also where characters have been shown.
        marks = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if marks == 0:
            self.whole.append(len(self.tokens))
        given_up = len(self.tokens) - self.whole[-1] > 3
        shown = max(self.shown, len(text) - (min(marks, 3) if given_up else marks))
        self.write(text[self.shown : shown])
        self.shown = shown
        if len(self.tokens) > 12 and (marks == 0 or given_up):
            cut = len(self.tokens) - 6
            cut = max((n for n in self.whole if 0 < n <= cut), default=cut)
            self.tokens = self.tokens[cut:]
            self.whole = [n - cut for n in self.whole if n > cut] or [0]
            self.shown += len(self.codec.decode(self.tokens)) - len(text)

    def end(self) -> None:
        self.write(self.codec.decode(self.tokens or [])[self.shown :])


@torch.no_grad()
def continue_texts(
    model: PreTrainedModel,
    codec: Codec,
    prompts: Sequence[str],
    options: Generate,
    write: Callable[[str], None] | None = None,
) -> list[str]:
    """The continuations, `options.samples` of each prompt in a row. write: gets the text of a single one piecemeal.

    Prompts of any lengths are one batch, padded at the left. Raises ValueError as `Codec.encode`, before any work.
    """
    rows = [codec.encode(prompt) for prompt in prompts]
    T = max(map(len, rows))
    if min(map(len, rows)) < T and (T - 1) % _PREFILL == 1:
        T += 1  # no part of one token in `prefill`: transformers' hybrids take a single column for no padding
    tokens = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=model.device)
    torch.manual_seed(options.seed)
    cache = prefill(model, tokens[:, :-1], mask[:, :-1])
    copies = max(options.samples, options.beams)
    if copies > 1:
        cache.reorder_cache(torch.arange(len(rows)).repeat_interleave(copies))
    drawn = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    end = model.generation_config.eos_token_id
    sequences = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=options.samples,
        num_beams=options.beams,
        do_sample=options.temperature > 0,
        pad_token_id=end[0] if isinstance(end, list) else end or 0,
        streamer=None if write is None else TextStream(codec, write),
        **{CACHE: cache},
        **drawn if options.temperature > 0 else {},
    )
    return [codec.decode(row) for row in sequences[:, T:].tolist()]


def prefill(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Cache:
    """A cache that has seen tokens `[B, T]`, T >= 0, except where mask `[B, T]` is 0; 1,024 at a time."""
    config = model.config.get_text_config()
    cache = OSDNCache(config) if isinstance(config, OSDNConfig) else DynamicCache(config=config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for start in range(0, tokens.shape[1], _PREFILL):
        part = slice(start, start + _PREFILL)
        model(
            tokens[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=positions[:, part],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
    return cache
