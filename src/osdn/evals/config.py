"""The `osdn eval` command. Imports neither torch nor transformers, so that its `--help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

RECALL = ("fda", "fda_twice", "swde", "swde_twice", "squad", "squad_twice")
TASKS = ("perplexity", "mqar", *RECALL)
_OPTIONS = {  # and the tasks they are for
    ("text", "text_field", "held_out", "block_size", "bucket_size", "segment_size"): ("perplexity",),
    ("cloze", "window"): RECALL,
    ("pairs", "seq_len", "passes", "vocab_size", "seed"): ("mqar",),
    ("limit", "batch_size", "device", "dtype"): TASKS,
}


@dataclass(frozen=True)
class Evaluation:
    """Evaluate a checkpoint: perplexity by position, recall, or any task of lm-evaluation-harness.

    Results go to a directory: for each task a JSON and a log of its examples, then a table and figures. A run that was
    stopped goes on with the same command."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT]")] = None
    """Directory of a causal language model, as `save_pretrained` writes it."""
    tasks: tuple[str, ...] = ()
    """Any of: perplexity mqar fda fda_twice swde swde_twice squad squad_twice."""
    out: Path | None = None
    """Where results go; by default runs/eval-<name of the checkpoint>."""
    table: tuple[Path, ...] = ()
    """Instead: put these results (of osdn eval, or of the harness) side by side; --out keeps table and figures."""
    harness: str = ""
    """Instead: everything behind it goes to lm-evaluation-harness, with --model hf on this checkpoint."""
    export_auto_map: bool = False
    """Instead: let the checkpoint be loaded without `import osdn`, by trust_remote_code=True."""

    text: tuple[str, ...] = ()
    """perplexity: text, JSONL or Parquet files, as paths, globs or directories."""
    text_field: str = "text"
    """perplexity: field or column of JSONL and Parquet that holds the text."""
    held_out: float = 1.0
    """perplexity: take this share of the documents alone, that which osdn train --held-out leaves out."""
    block_size: int = 20_480
    """perplexity: tokens a block, which is read from an empty state."""
    bucket_size: int = 2_048
    """perplexity: tokens a bucket of positions."""
    segment_size: int = 2_048
    """perplexity: tokens a forward pass; the state is carried on to the next."""

    cloze: Path | None = None
    """fda, swde, squad: a local .jsonl file with text, key and value, instead of the data set's own."""
    window: int = 1_000
    """fda, swde, squad: tokens of a document around its answer, with those kept for the answer."""

    pairs: tuple[int, ...] = (4, 8, 16, 24, 32)
    """mqar: numbers of key-value pairs to evaluate at."""
    seq_len: int = 128
    """mqar: tokens a sequence."""
    passes: int = 1
    """mqar: how often the pairs are listed before the queries."""
    vocab_size: int = 0
    """mqar: number of tokens the model was trained with; 0: all that it knows."""
    seed: int = 0
    """mqar: seed of the sequences, which are never those of training."""

    limit: int = 0
    """Blocks, documents, or sequences of every number of pairs; 0: all there are, and 256 sequences."""
    batch_size: int = 8
    """Blocks, documents or sequences at once; changes no result."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """auto: the checkpoint's own."""

    def check(self) -> None:
        """Raises ValueError for a field out of range; not on construction, or the command line would frame the line."""
        modes = {"table": self.table, "harness": self.harness, "export_auto_map": self.export_auto_map}
        if sum(map(bool, (*modes.values(), self.tasks))) != 1:
            given = [name for name, value in {"tasks": self.tasks, **modes}.items() if value]
            raise ValueError(f"tasks: got {', '.join(given) or 'none'}, takes one of tasks, {', '.join(modes)}")
        if (self.checkpoint is None) != bool(self.table):
            wanted = "none beside table" if self.table else "a directory"
            raise ValueError(f"checkpoint: got {self.checkpoint or 'none'}, takes {wanted}")
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ValueError(f"tasks: got {unknown[0]!r}, takes names among {', '.join(TASKS)}")
        for name in ("tasks", "pairs"):
            if len(set(value := getattr(self, name))) < len(value):
                raise ValueError(f"{name}: got {' '.join(map(str, value))}, takes different ones")
        if not self.pairs:
            raise ValueError("pairs: got none, takes one or more")
        for name in ("block_size", "bucket_size", "segment_size", "seq_len", "passes", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: got {value}, takes an int >= 1")
        for name in ("vocab_size", "seed", "limit"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}: got {value}, takes an int >= 0")
        if not 0 < self.held_out <= 1:
            raise ValueError(f"held_out: got {self.held_out}, takes a share in (0, 1]")
        if not self.bucket_size <= self.block_size:
            raise ValueError(f"bucket_size: got {self.bucket_size}, takes at most block_size = {self.block_size}")
        if "perplexity" in self.tasks and not self.text:
            raise ValueError("text: got none, takes files to compute the perplexity of")
        if self.out is not None and (self.harness or self.export_auto_map):
            raise ValueError(f"out: got {self.out}, takes none beside harness and export_auto_map")
        for names, tasks in _OPTIONS.items():
            idle = [name for name in names if getattr(self, name) != getattr(Evaluation, name)]
            if idle and not set(tasks) & set(self.tasks):
                raise ValueError(f"{idle[0]}: got {getattr(self, idle[0])}, takes a task beside it: {', '.join(tasks)}")

    @property
    def goes_on(self) -> bool:
        return bool(self.tasks)

    def run(self) -> None:
        self.check()
        if self.checkpoint is None:
            from osdn.evals.report import show

            show(self.table, self.out)
        elif self.harness:
            from osdn.evals.harness import run_harness

            run_harness(self.checkpoint, self.harness)
        elif self.export_auto_map:
            from osdn.evals.harness import export_auto_map

            print(f"written in {self.checkpoint}: {', '.join(export_auto_map(self.checkpoint))}")
        else:
            from osdn.evals.run import evaluate

            evaluate(self, self.checkpoint)
