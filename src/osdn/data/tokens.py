"""Tokenizers."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer at a path or by name; "bytes" is `byte_tokenizer()`.

    Raises ValueError where there is none, or where it has no end-of-text token.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the files, the hub or the network have to say
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"tokenizer: got {name!r} ({reason}); takes bytes, or a path or name") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: got {name!r}, which has no end-of-text token; takes one with eos_token")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens: token b is byte b of the UTF-8 text, and 0, a byte that text does not have, ends a document."""
    # The names of bytes in byte-level BPE: printable ones stand for themselves, others for characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    names = [chr(b) if b in printable else next(others) for b in range(256)]
    tokenizer = Tokenizer(models.BPE({END: 0} | {name: b for b, name in enumerate(names) if b}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a document, closed by the end-of-text token. What looks like a special token in the text is text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]
