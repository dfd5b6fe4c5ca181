"""What a training run is. Imports neither torch nor transformers, so that `osdn train --help` stays quick."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

_FORMAT = 1  # to be raised when the training procedure changes: older run directories are then refused
# Where data lies, how often something is written and how many devices share the work do not change what is learned.
_FREE = {
    *("data", "eval_data", "out", "save_every", "keep", "log_every", "eval_every", "wandb", "prefetch"),
    *("micro_batch", "fsdp", "device", "compile", "checkpoint_activations", "eval_sequences"),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run of a causal language model."""

    preset: str = "osdn-apf-tiny"
    """Model, <mixer>-<size> of osdn.OSDNConfig.preset."""
    size: dict[str, int] = field(default_factory=dict)
    """Integer fields of OSDNConfig in place of the preset's, e.g. num_hidden_layers 4 hidden_size 256."""

    data: tuple[str, ...] = ()
    """Text, JSONL or Parquet files (paths, globs, directories whose every file is text), or one name of a dataset to
    stream. Empty: the sources of Python's standard library."""
    subset: str | None = None
    """Configuration of a dataset that is streamed by name."""
    split: str = "train"
    """Split of a dataset that is streamed by name."""
    text_field: str = "text"
    """Field or column of JSONL, Parquet and named datasets that holds the text."""
    eval_data: tuple[str, ...] = ()
    """Files to evaluate on, as in data. None: a share of data, see held_out."""
    held_out: float = 0.0
    """Share of the documents of data, chosen by the hash of their text, never to be trained on, for evaluation."""
    tokenizer: str = "bytes"
    """bytes (a token is a byte, 0 closes a document), or the path or name of a Hugging Face tokenizer."""
    context: int = 256
    """Tokens of a packed row."""
    shuffle: int = 1000
    """Documents in a block; documents are shuffled within their block, anew in every epoch."""
    streams: int = 1
    """Parts the documents are dealt to; row i of a batch comes from part i modulo streams, so that long documents do
    not fill a batch. A multiple of the number of processes, which then changes neither batches nor position."""
    prefetch: bool = False
    """Read and tokenise in a process beside each training process."""

    steps: int = 200
    """Optimizer steps."""
    batch_size: int = 16
    """Rows a step, over all processes."""
    micro_batch: int = 16
    """Rows that a process takes at once; what is left of batch_size is accumulated."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine."""
    min_lr: float = 0.1
    """End of the cosine, as a share of lr."""
    warmup_steps: int = 20
    """Steps of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays of AdamW's two moments."""
    eps: float = 1e-15
    """AdamW's eps."""
    weight_decay: float = 0.1
    """On matrices, embeddings and convolutions; never on d0, A_log, dt_bias, biases and norms."""
    clip: float = 1.0
    """Largest gradient norm. A step whose gradients are not finite is skipped and counted."""
    seed: int = 0
    """Of the initial values and of the order of the documents."""

    bf16: bool = False
    """Compute in bfloat16; parameters, optimizer, d, S and losses stay in float32."""
    compile: bool = False
    """torch.compile the model."""
    checkpoint_activations: bool = False
    """Recompute a block's activations in the backward pass."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer over the processes of torchrun (FSDP2)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""

    out: Path | None = None
    """Run directory; by default runs/train-<hash of the config>."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps between logged losses, each the mean since the one before; every checkpoint logs one, too."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end alone."""
    eval_sequences: int = 64
    """Held-out rows an evaluation takes at the most."""
    wandb: bool = False
    """Log to Weights & Biases beside TensorBoard."""

    def check(self) -> None:
        """Raises ValueError for a field out of range; not on construction, or the command line would frame the line."""
        at_least = {
            2: ("context",),
            1: ("shuffle", "streams", "steps", "batch_size", "micro_batch", "save_every", "keep", "log_every"),
            0: ("warmup_steps", "eval_every", "eval_sequences", "seed"),
        }
        for least, names in at_least.items():
            for name in names:
                if not (value := getattr(self, name)) >= least:
                    raise ValueError(f"{name}: got {value}, takes a number >= {least}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay}, takes a finite number >= 0")
        if not 1e-37 <= self.eps < math.inf:  # AdamW would divide 0 by 0 where there is no gradient
            raise ValueError(f"eps: got {self.eps}, takes a finite number >= 1e-37, which float32 tells from 0")
        if self.seed >= 2**32:
            raise ValueError(f"seed: got {self.seed}, takes a number < 2^32")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: got {self.lr}, takes a finite float > 0")
        if not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, takes a float > 0")
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"min_lr: got {self.min_lr}, takes a number in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, takes numbers in [0, 1)")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, takes a share in [0, 1)")
        if self.batch_size % self.streams:
            raise ValueError(f"streams: got {self.streams}, takes a divisor of batch_size, {self.batch_size}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    def accumulation(self, processes: int) -> int:
        """Micro-batches a step. Raises ValueError where batch_size and streams do not divide among `processes`."""
        if self.streams % processes:
            raise ValueError(f"streams: got {self.streams}, takes a multiple of the number of processes, {processes}")
        rows = self.batch_size // processes
        if rows % self.micro_batch:
            takes = f"takes a divisor of the {rows} rows that each of {processes} processes takes a step"
            raise ValueError(f"micro_batch: got {self.micro_batch}, {takes}")
        return rows // self.micro_batch

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = json.loads(json.dumps(asdict(self), default=str))
        assert isinstance(plain, dict)
        return plain

    def identity(self, data: str, tokens: str) -> dict[str, Any]:
        """All that decides what is learned: the fields, with a digest of the data's files in place of their paths, and
        one of what the tokenizer makes of texts beside its name."""
        fields = {name: value for name, value in self.as_dict().items() if name not in _FREE}
        name = Path(self.tokenizer).name  # wherever it lies
        return {"format": _FORMAT, **fields, "data": data, "tokenizer": f"{name} {tokens}"}
