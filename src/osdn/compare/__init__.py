"""`osdn compare`: does preconditioning pay? Models that differ in the mixer alone, side by side."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from osdn.compare.config import Experiment, RunError, fingerprint

__all__ = ["Experiment", "RunError", "compare"]

_RESULT = {"stamp", "model", "seed", "losses", "history", "final", "residual", "parameters", "state_bytes"}


def compare(
    experiment: Experiment,
    *,
    out: Path | None = None,
    workers: int = 2,
    checkpoint_every: int = 100,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not yet done of `experiment`, print the table, write the run directory.

    out: the run directory, by default runs/<task>-<hash of the config>. In it: config.json; jobs/, a result and a
        checkpoint for each model and seed; results.json, table.md, figure.png.
    workers: processes of one thread each; 0 or 1 trains in this one. checkpoint_every: steps between checkpoints.
    console: where progress and table go; stdout by default.

    Returns the content of results.json. Raises ValueError for a config that cannot be run or that is not the run
    directory's, RunError where a job failed or a file could not be written (finished jobs are kept).
    """
    from osdn.compare.display import display
    from osdn.compare.provenance import provenance
    from osdn.compare.report import Summary
    from osdn.compare.runner import run_jobs
    from osdn.compare.store import claim, read_json, write_atomic, write_json
    from osdn.compare.train import Job, model_config, recall_task
    from osdn.data import ByteText

    console = console or Console()
    if workers < 0 or checkpoint_every < 1:
        raise ValueError(f"workers, checkpoint_every: got {workers}, {checkpoint_every}, takes ints >= 0 and >= 1")
    experiment = experiment.resolved()
    digest = sources = None
    if experiment.task == "mqar":
        recall_task(experiment, experiment.num_pairs)
    else:
        text = ByteText.load(experiment.data, experiment.eval_data)
        text.require(experiment.seq_len)
        digest, sources = text.digest, text.sources
    for model in experiment.models:
        model_config(experiment, model)

    def note(message: str) -> None:
        console.print(f"note: {message}", markup=False, soft_wrap=True)

    identity = experiment.identity(digest)
    stamp = fingerprint(identity)
    out = out or Path("runs") / f"{experiment.task}-{stamp}"
    claim(out, identity, note)
    jobs = [
        Job(experiment, m, s, out, stamp, checkpoint_every) for m in experiment.models for s in range(experiment.seeds)
    ]

    def read(job: Job) -> dict[str, Any] | None:
        return read_json(job.result, _RESULT, note)

    done = [job for job in jobs if read(job) is not None]
    todo = [job for job in jobs if job not in done]
    console.print(f"run directory {out}: {len(done)} of {len(jobs)} runs done, {len(todo)} to do", soft_wrap=True)
    if todo:
        began = time.monotonic()
        with display(console, jobs, done, experiment.steps) as listen:
            failures = run_jobs(todo, workers, listen)
        if failures:
            for failure in failures:
                console.print(failure.traceback or failure.message, markup=False, highlight=False, soft_wrap=True)
            raise RunError(
                f"{len(failures)} of {len(jobs)} runs failed, first {failures[0].message}; finished runs are kept in "
                f"{out}, the same command takes up the rest"
            )
    results = [content for job in jobs if (content := read(job)) is not None]
    summary = Summary(experiment, results)
    report = out / "results.json"
    content = None if todo else read_json(report, {"stamp", "runs"}, note)
    if content is None:
        content = {
            "stamp": stamp,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "experiment": experiment.as_dict(),
            "data": {"sha256": digest, "sources": sources},
            **provenance(),
            "workers": workers,
            "wall_seconds": time.monotonic() - began if todo else None,
            "table": [dict(zip(summary.table()[0], row, strict=True)) for row in summary.table()[1]],
            "remarks": summary.remarks(),
            "runs": results,
        }
        write_json(report, content)
    write_atomic(out / "table.md", summary.markdown().encode())
    write_atomic(out / "figure.png", summary.figure())
    if console.is_terminal:
        console.print(summary.rich(), *summary.remarks(), sep="\n", markup=False, highlight=False)
    else:
        console.print(summary.markdown(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"table.md, figure.png and results.json are in {out}", soft_wrap=True)
    return content
