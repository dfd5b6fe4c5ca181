"""Runs the tasks of an evaluation, one after the other, and writes what they found."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from osdn.evals.checkpoint import Checkpoint
from osdn.evals.config import RECALL, TASKS, Evaluation
from osdn.evals.mqar import PairRecall
from osdn.evals.perplexity import Perplexity
from osdn.evals.recall import Cloze
from osdn.evals.report import Report, read_results
from osdn.evals.results import ExampleLog, Task
from osdn.runs.provenance import provenance
from osdn.runs.store import write_json

_SEQUENCES = 256


def evaluate(config: Evaluation, path: Path, console: Console | None = None) -> list[dict[str, Any]]:
    """Score what is not yet scored of the checkpoint in `path`, print the table of all results in the
    directory, write it.

    In it: <task>.jsonl, the log of the examples; <task>.json, the result; table.md; <kind>.png.

    Returns the results. Raises ValueError for a checkpoint, data or directory that does not fit, before any work, and
    RunError where a file cannot be written: what is scored by then is kept.
    """
    console = console or Console()
    checkpoint = Checkpoint.open(path)
    out = config.out or Path("runs") / f"eval-{checkpoint.name}"
    tasks = [_task(config, checkpoint, name) for name in config.tasks]
    identities = [
        {
            "task": task.name,
            "version": task.version,
            "checkpoint_sha256": checkpoint.sha256,
            "dtype": config.dtype,
            "data_sha256": task.data["sha256"],
            **task.policy,
        }
        for task in tasks
    ]
    logs = [ExampleLog(out / f"{task.name}.jsonl", x) for task, x in zip(tasks, identities, strict=True)]
    model = checkpoint.load(config.device, config.dtype)
    results = []
    for task, log in zip(tasks, logs, strict=True):
        todo = [i for i in task.order() if i not in log.records]
        console.print(f"{task.name}: {len(task)} examples, {len(todo)} to do", highlight=False)
        with Progress(
            *Progress.get_default_columns(), MofNCompleteColumn(), console=console, disable=not console.is_terminal
        ) as bar:
            for start in bar.track(range(0, len(todo), config.batch_size), description=task.name):
                log.append(task.score(model, todo[start : start + config.batch_size]))
        result = {
            "task": task.name,
            "kind": task.kind,
            "version": task.version,
            "context_policy": task.policy,
            "cut": task.cut,
            "data": task.data,
            "metrics": task.metrics([log.records[i] for i in range(len(task))]),
            "checkpoint": {
                "name": checkpoint.name,
                "sha256": checkpoint.sha256,
                "model_type": checkpoint.config.model_type,
                "parameters": model.num_parameters(),
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "log": log.path.name,
            "batch_size": config.batch_size,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(),
            "device": str(model.device) if model.device.type != "cpu" else provenance()["device"],
        }
        write_json(out / f"{task.name}.json", result)
        results.append(result)
    # Also what an earlier call with other tasks has left here.
    files = (out / f"{name}.json" for name in TASKS)
    report = Report([result for file in files if file.exists() for result in read_results(file)])
    report.write(out)
    report.print(console)
    console.print(f"results, logs of the examples, table.md and figures are in {out}", soft_wrap=True)
    return results


def _task(config: Evaluation, checkpoint: Checkpoint, name: str) -> Task:
    if name == "perplexity":
        return Perplexity(
            checkpoint,
            config.text,
            text_field=config.text_field,
            held_out=config.held_out,
            block_size=config.block_size,
            bucket_size=config.bucket_size,
            segment_size=config.segment_size,
            limit=config.limit,
        )
    if name in RECALL:
        return Cloze(checkpoint, name, config.cloze, window=config.window, limit=config.limit)
    return PairRecall(
        checkpoint,
        config.pairs,
        seq_len=config.seq_len,
        passes=config.passes,
        vocab_size=config.vocab_size,
        seed=config.seed,
        sequences=config.limit or _SEQUENCES,
    )
