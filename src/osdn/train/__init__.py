"""`osdn train`: a language model from text, on Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from osdn.runs import RunError
from osdn.train.config import TrainConfig

__all__ = ["TrainConfig", "train"]


def train(config: TrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Train the model of `config`, evaluate it and write the run directory; go on where an earlier call was stopped.

    In the run directory: config.json; checkpoint-<step>, the newest `keep`; tensorboard; at the end model, for
    `from_pretrained`, and results.json. Under torchrun every process calls this.

    console: where progress and results go; stdout by default.

    Returns the content of results.json. Raises ValueError for a config that cannot be run or that is not the run
    directory's, RunError where a file could not be written or no checkpoint can be used.
    """
    config.check()
    try:
        from osdn.train.run import run
    except ModuleNotFoundError as error:
        raise RunError(f"osdn train needs {error.name}; pip install 'osdn[train]'") from error

    return run(config, console or Console())
