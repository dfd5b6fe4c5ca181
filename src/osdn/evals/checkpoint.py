"""A checkpoint of any causal language model: what it is, its tokenizer, its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from osdn.convert.fla import is_fla
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
            if is_fla(fields):
                got = f"flash-linear-attention's {fields['model_type']}"
                raise ValueError(f"checkpoint: got {path}, {got}; takes what osdn convert makes of it") from None
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
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return most if most is not None and most > 0 else None

    def require(self, tokens: int, what: str) -> None:
        """Raises ValueError where `tokens` are more than the model can read: nothing is truncated behind one's back."""
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"{what}: needs {tokens} tokens, takes at most the {self.context} that {self.path} can read"
            )

    def load(self, device: str, dtype: str) -> Any:
        """The model, in evaluation mode, on a device. Raises as `load_model`, and ValueError for the device, a dtype
        that the model cannot run in, and a model whose logits are not finite or know of later tokens."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_model(self.path, dtype=dtype, any_kind=True)
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {device!r}, which cannot be used ({first_line(error)})") from error
        T = min(16, self.context or 16)
        ids = torch.arange(T, device=model.device).remainder(self.vocab_size).repeat(2, 1)
        ids[1, -1] = (ids[0, -1] + 1) % self.vocab_size
        try:
            with torch.no_grad():
                one, other = model(input_ids=ids).logits[:, :-1].float()
        except Exception as error:  # whatever a model has to say, as experts of float64
            how = f"with dtype {dtype} on {device} ({first_line(error)})"
            raise ValueError(f"checkpoint: got {self.path}, which cannot run {how}") from error
        if not bool(one.isfinite().all()):
            raise ValueError(f"checkpoint: got {self.path}, whose logits are not finite in {model.dtype}")
        rounding = min(0.01, 100 * torch.finfo(model.dtype).eps)
        if float((one - other).norm()) > rounding * float(one.norm()):
            raise ValueError(f"checkpoint: got {self.path}, whose logits know of later tokens; takes a causal model")
        return model
