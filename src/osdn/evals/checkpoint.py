"""A checkpoint of any causal language model: what it is, its tokenizer, its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from osdn.data.tokenizer import load_tokenizer


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
        if not (path / "config.json").is_file():
            what = "which does not exist" if not path.exists() else "which has no config.json"
            raise ValueError(f"checkpoint: got {path}, {what}; takes a directory that save_pretrained wrote")
        weights = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
        if not weights:
            raise ValueError(
                f"checkpoint: got {path}, which has no weights; takes a directory that save_pretrained wrote"
            )
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # whatever a foreign or damaged config leads it to
            raise ValueError(f"checkpoint: got {path}, whose config cannot be used ({_first_line(error)})") from error
        fields = json.loads((path / "config.json").read_bytes())
        fields.pop("auto_map", None)  # says where the code is, not what the model is
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for file in weights:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return cls(path, config, load_tokenizer(path, config.get_text_config().vocab_size), digest.hexdigest())

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def tokens(self) -> str:
        """Which tokens lengths are counted in, and losses are averaged over: a short hash of the vocabulary."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(vocabulary.encode()).hexdigest()[:12]

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
        """The model, in evaluation mode. Raises ValueError where weights are missing, damaged or of other shapes."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # whatever damaged weights lead it to
            raise ValueError(f"checkpoint: got {self.path}, which cannot be loaded ({_first_line(error)})") from error
        if lost := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
            raise ValueError(
                f"checkpoint: got {self.path}, which lacks {len(lost)} weights of its model, first {lost[0]}"
            )
        try:
            return model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {device!r}, which cannot be used ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
