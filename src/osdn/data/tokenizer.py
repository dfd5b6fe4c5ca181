"""Tokenizers: one by name to train with, a checkpoint's own to use it with, and bytes where there is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from osdn.data.text import VOCAB_SIZE
from osdn.runs import first_line

_SAMPLE = "The  Fox's\t1,234.50 €\r\n\n naïve ÉTÉ ﬁ 你好 🙂 e\u0301 \\x41: f(x**2) != _y2; <s>don't</s>\n    return "
_FILES = ("tokenizer*", "vocab.json", "vocab.txt", "spiece.model")  # also those of slow tokenizers


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens: token b is byte b of UTF-8, and 0, which texts hardly have, is also end of text and padding.

    What is written like a special token is text: every string comes back from `decode` as it was.
    """
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(VOCAB_SIZE)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=letters[0], pad_token=letters[0], split_special_tokens=True
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer to train with, at a path or by its name on the Hub; "bytes" is `byte_tokenizer()`.

    Raises ValueError where there is none, or where it has no end-of-text token.
    """
    if name == "bytes":
        return byte_tokenizer()
    takes = "takes bytes, or a path or name"
    tokenizer = _read(lambda reason: f"tokenizer: got {name!r} ({reason}); {takes}", name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: got {name!r}, which has no end-of-text token; takes one with eos_token")
    return tokenizer


def has_tokenizer(checkpoint: Path) -> bool:
    """Whether there are files of a tokenizer in a directory."""
    return checkpoint.is_dir() and any(any(checkpoint.glob(pattern)) for pattern in _FILES)


def checkpoint_tokenizer(checkpoint: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's directory, or bytes where there is none and `vocab_size` >= 256.

    Raises ValueError, naming the checkpoint, for one that cannot be read, has more tokens than the model knows, or is
    missing beside a smaller vocabulary.
    """
    if not has_tokenizer(checkpoint):
        if vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"checkpoint: got {checkpoint}, without tokenizer files and with {vocab_size} tokens; takes a "
                f"tokenizer beside the model, or at least {VOCAB_SIZE} tokens, which are then bytes"
            )
        return byte_tokenizer()
    tokenizer = _read(
        lambda reason: f"checkpoint: got {checkpoint}, whose tokenizer cannot be read ({reason})",
        checkpoint,
        local_files_only=True,
    )
    if (size := 1 + max(tokenizer.get_vocab().values())) > vocab_size:
        raise ValueError(
            f"checkpoint: got {checkpoint}, whose tokenizer has {size} tokens; takes at most the model's {vocab_size}"
        )
    return tokenizer


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """The function from a document to its tokens: behind what the tokenizer puts before every text, if anything, and
    closed by the end-of-text token where there is one. What looks like a special token in the text is text.
    """
    before = opening(tokenizer)
    closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [*before, *ids, *closing]

    return encode


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: often nothing, or a begin-of-text token."""
    for text in chain("a", _words(tokenizer)):  # some know no "a"
        bare, whole = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (False, True))
        if bare:
            return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
    return []


def _words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of what texts become: of the vocabulary, which of it is special, and a sample text's tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    words = " ".join(name for name, _ in vocabulary[:: max(1, len(vocabulary) // 1000)])
    splits = encoder(tokenizer)(f"{_SAMPLE}{words}")
    return hashlib.sha256(json.dumps([vocabulary, sorted(tokenizer.all_special_ids), splits]).encode()).hexdigest()[:12]


def _read(problem: Callable[[str], str], name: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Raises ValueError with what `problem` makes of a reason in one line."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # whatever damaged or foreign files, the Hub or the network have to say
        raise ValueError(problem(first_line(error))) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "dropout", None):
        raise ValueError(problem(f"it splits texts at random, dropout {backend.model.dropout:.2g}"))
    return tokenizer
