"""A checkpoint of any causal language model: what it is, its tokenizer, its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from osdn.data.tokenizer import checkpoint_tokenizer, digest
from osdn.models.checkpoint import load_model, read_config
from osdn.runs import first_line


@dataclass(frozen=True)
class Checkpoint:
    """A directory as `save_pretrained` writes it, looked at but not loaded yet.

    sha256: of its config and weights. context: tokens the model can read, None where there is no end to them.
    """

    path: Path
    config: Any
    tokenizer: Any
    sha256: str

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises ValueError, naming the path, where there is no model to load."""
        fields = read_config(path)
        weights = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
        if not weights:
            raise ValueError(
                f"checkpoint: got {path}, which has no weights; takes a directory that save_pretrained wrote"
            )
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # whatever a foreign or damaged config leads it to
            raise ValueError(f"checkpoint: got {path}, whose config cannot be used ({first_line(error)})") from error
        fields.pop("auto_map", None)  # says where the code is, not what the model is
        content = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for file in weights:
            with file.open("rb") as opened:
                content.update(hashlib.file_digest(opened, "sha256").digest())
        return cls(path, config, checkpoint_tokenizer(path, config.get_text_config().vocab_size), content.hexdigest())

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def tokens(self) -> str:
        """Which tokens lengths are counted in, and losses are averaged over: see `osdn.data.tokenizer.digest`."""
        return digest(self.tokenizer)

    @property
    def context(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def require(self, tokens: int, what: str) -> None:
        """Raises ValueError where `tokens` are more than the model can read: nothing is truncated behind one's back."""
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"{what}: needs {tokens} tokens, takes at most the {self.context} that {self.path} can read"
            )

    def load(self, device: str, dtype: str) -> Any:
        """The model, in evaluation mode, on a device. Raises as `load_model`, and ValueError for the device."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_model(self.path, dtype=dtype, any_kind=True)
        try:
            return model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {device!r}, which cannot be used ({first_line(error)})") from error
