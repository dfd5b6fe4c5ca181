"""`osdn compare`: does preconditioning pay? Models that differ in the mixer alone, side by side."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from osdn.compare.config import CONTROLS, Experiment, variants
from osdn.runs import RunError, fingerprint

__all__ = ["Experiment", "RunError", "compare", "grid"]

_RESULT = {"stamp", "model", "seed", "losses", "history", "final", "residual", "parameters", "state_bytes", "origin"}


def compare(
    experiment: Experiment,
    *,
    out: Path | None = None,
    workers: int = 2,
    checkpoint_every: int = 100,
    baselines: tuple[str, ...] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not yet done of `experiment`, print the tables, write the run directory.

    out: the run directory, by default runs/<task>-<hash of the config>. In it: config.json; jobs/, a result and a
        checkpoint for each model and seed; results.json, table.md, figure.png. It may be copied to another machine and
        continued there, and results of the same config made elsewhere may be copied into jobs/: each says where it
        was made.
    workers: processes of one thread each; 0 or 1 trains in this one. checkpoint_every: steps between checkpoints.
    baselines: the models that others are compared with, seed by seed; by default the first.
    console: where progress and table go; stdout by default.

    Returns the content of results.json. Raises ValueError for a config that cannot be run or that is not the run
    directory's, RunError where a job failed or a file could not be written (finished jobs are kept).
    """
    from osdn.compare.display import display
    from osdn.compare.report import Summary
    from osdn.compare.runner import run_jobs
    from osdn.compare.train import Job, model_config, recall_task
    from osdn.data import ByteText
    from osdn.runs.provenance import provenance
    from osdn.runs.store import claim, read_json, write_atomic, write_json

    console = console or Console()
    if workers < 0 or checkpoint_every < 1:
        raise ValueError(f"workers, checkpoint_every: got {workers}, {checkpoint_every}, takes ints >= 0 and >= 1")
    experiment = experiment.resolved()
    digest = sources = None
    if experiment.task == "mqar":
        recall_task(experiment, experiment.num_pairs)
    else:
        text = ByteText.load(experiment.data, experiment.eval_data)
        text.require(experiment.seq_len * max((1, *experiment.eval_lengths)))
        digest, sources = text.digest, text.sources
    for model in experiment.models:
        model_config(experiment, model)
    baselines = variants(baselines)
    for name in baselines:
        if name not in experiment.models:
            raise ValueError(f"baselines: got {name!r}, takes names among {' '.join(experiment.models)}")

    def note(message: str) -> None:
        console.print(f"note: {message}", markup=False, soft_wrap=True)

    identity = experiment.identity(digest)
    stamp = fingerprint(identity)
    out = out or Path("runs") / f"{experiment.task}-{stamp}"
    with claim(out, identity, note, ("results.json", "table.md", "figure.png")):
        jobs = [
            Job(experiment, m, s, out, stamp, checkpoint_every)
            for m in experiment.models
            for s in range(experiment.seeds)
        ]

        def read(job: Job) -> dict[str, Any] | None:
            return read_json(job.result, _RESULT, note, {"stamp": stamp, "model": job.model, "seed": job.seed})

        done = [job for job in jobs if read(job) is not None]
        todo = sorted((job for job in jobs if job not in done), key=lambda job: job.seed)
        console.print(f"run directory {out}: {len(done)} of {len(jobs)} runs done, {len(todo)} to do", soft_wrap=True)
        if todo:
            began = time.monotonic()
            with display(console, jobs, done, experiment.steps) as listen:
                failures = run_jobs(todo, workers, listen)
            if failures:
                for failure in failures:
                    console.print(failure.traceback or failure.message, markup=False, highlight=False, soft_wrap=True)
                raise RunError(
                    f"{len(failures)} of {len(jobs)} runs failed, first {failures[0].message}; finished runs are kept "
                    f"in {out}, the same command takes up the rest"
                )
        results = [content for job in jobs if (content := read(job)) is not None]
        summary = Summary(experiment, results, baselines)
        report = out / "results.json"
        run = None if todo else read_json(report, {"date", "wall_seconds", "workers"}, note)
        if run is None:
            run = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                **provenance(),
                "workers": workers,
                "wall_seconds": time.monotonic() - began if todo else None,
            }
        content = {
            "stamp": stamp,
            "identity": identity,
            **run,
            "experiment": experiment.as_dict(),
            "data": {"sha256": digest, "sources": sources},
            "tables": {t.title: [dict(zip(t.header, row, strict=True)) for row in t.rows] for t in summary.tables()},
            "remarks": summary.remarks(),
            "runs": results,
        }
        write_json(report, content)
        write_atomic(out / "table.md", summary.markdown().encode())
        write_atomic(out / "figure.png", summary.figure())
        shown = summary.for_terminal() if console.is_terminal else [summary.markdown()]
        console.print(*shown, sep="\n", markup=False, highlight=False, soft_wrap=True)
        console.print(f"table.md, figure.png and results.json are in {out}", soft_wrap=True)
        return content


def grid(
    experiment: Experiment,
    *,
    out: Path | None = None,
    workers: int = 2,
    checkpoint_every: int = 100,
    baselines: tuple[str, ...] = (),
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """`compare` on each of `experiment.grid()`, in folders of `out` (runs/grid); all tables go into its grid.md.

    baselines: by default DeltaNet and the controls, as far as they are among the models. All else as in `compare`; runs
    that fail in one setting do not keep the other from being run.
    """
    from osdn.ops.options import refuse
    from osdn.runs.store import write_atomic

    out = out or Path("runs") / "grid"
    parts, contents, failures = experiment.grid(), {}, list[RunError]()
    if (out / "grid.md").exists() and not any((out / name / "config.json").exists() for name in parts):
        refuse("out", f"{out}, which holds grid.md of another origin", "a new path")
    for name, part in parts.items():
        known = variants(part.models)
        try:
            contents[name] = compare(
                part,
                out=out / name,
                workers=workers,
                checkpoint_every=checkpoint_every,
                baselines=baselines or tuple(b for b in ("deltanet", *CONTROLS) if b in known),
                console=console,
            )
        except RunError as error:
            failures.append(error)
    if failures:
        raise RunError("; ".join(map(str, failures)))
    tables = (f"### {name}\n\n{(out / name / 'table.md').read_text()}" for name in parts)
    write_atomic(out / "grid.md", "\n".join(tables).encode())
    (console or Console()).print(f"the tables of both settings are in {out / 'grid.md'}", soft_wrap=True)
    return contents
