"""Bytes as a Hugging Face tokenizer, for checkpoints that come without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from osdn.data.text import VOCAB_SIZE

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b is byte b of UTF-8; 0, which closes a document in `ByteText`, is end of text and padding.

    No text is taken for the end-of-text token: every string comes back from `decode` as it was.
    """
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(VOCAB_SIZE)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=letters[0], pad_token=letters[0], split_special_tokens=True
    )


def load_tokenizer(checkpoint: Path, vocab_size: int) -> Any:
    """The checkpoint's own tokenizer, or bytes where it has none and `vocab_size` >= 256.

    Raises ValueError, naming the checkpoint, for one that cannot be read, has more tokens than the model knows, or is
    missing beside a smaller vocabulary.
    """
    if not any((checkpoint / name).exists() for name in _FILES):
        if vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"checkpoint: got {checkpoint}, without tokenizer files and with {vocab_size} tokens; takes a "
                f"tokenizer beside the model, or at least {VOCAB_SIZE} tokens, which are then bytes"
            )
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # whatever damaged or foreign files lead it to
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint: got {checkpoint}, whose tokenizer cannot be read ({reason})") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"checkpoint: got {checkpoint}, whose tokenizer has {len(tokenizer)} tokens; takes at most the model's "
            f"{vocab_size}"
        )
    return tokenizer
