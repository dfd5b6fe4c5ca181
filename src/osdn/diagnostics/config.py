"""`osdn diagnose`. Imports neither torch nor transformers, so that `osdn --help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Diagnose:
    """What a trained model writes with: residual ratio, preconditioner, step, forgetting; as JSON, CSV and a page."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model saved with save_pretrained, or jobs/<model>-seed<i>.pt of an `osdn compare` run."""
    data: tuple[str, ...]
    """What to measure on, each a task of its own: text files or directories, or mqar:<pairs>x<passes>, synthetic
    recall. A name may stand before, 'name=path', up to the first '=' of what is not itself a path."""
    out: Path = Path("diagnosis")
    """Directory to write to; diagnosis.json, heads.csv, positions.csv and index.html in it are replaced."""
    tokenizer: str | None = None
    """Directory of a tokenizer, or bytes; by default the checkpoint's own, or bytes where it has none."""
    seq_len: int = 1024
    """Tokens of a sequence."""
    sequences: int = 16
    """Sequences of each task: blocks spread evenly over a text."""
    chunk_size: int = 256
    """Tokens that the model sees at once, its state carried on; memory grows with this alone."""
    batch_size: int = 4
    """Sequences that the model sees at once."""

    def run(self) -> None:
        """Print the means, write the files. Raises ValueError and RunError before any work where it can."""
        from osdn.diagnostics.command import run

        run(self)
