"""Checkpoints that several processes wrote under FSDP, each its shard."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn

_FOLDER = "pytorch_model_fsdp_0"  # accelerate's name


def load_sharded(model: nn.Module, checkpoint: Path) -> None:
    """Fill `model`, not sharded, from the shards in `checkpoint`; any number of processes, also one, may have written
    them. `model.save_pretrained` then makes of it what `from_pretrained` takes.

    Raises RuntimeError where a parameter of the model is not in the checkpoint.
    """
    state = {"model": model.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint / _FOLDER), no_dist=True)
    model.load_state_dict(state["model"])
