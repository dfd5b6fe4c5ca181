"""What is seen while jobs run: bars in a terminal, a sparse line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from osdn.compare.runner import Event, Listen
from osdn.compare.train import Job

_SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def display(console: Console, jobs: Sequence[Job], done: Sequence[Job], steps: int) -> Iterator[Listen]:
    """Show `jobs` of `steps` steps each, of which `done` are finished; yields what is to be told of every event."""
    view = _bars if console.is_terminal else _lines
    with view(console, jobs, done, steps) as listen:
        yield listen


@contextmanager
def _bars(console: Console, jobs: Sequence[Job], done: Sequence[Job], steps: int) -> Iterator[Listen]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        total = progress.add_task("[bold]all", total=steps * len(jobs), loss="", completed=steps * len(done))
        rows = {
            job: progress.add_task(job.name, total=steps, loss="", completed=steps if job in done else 0, start=False)
            for job in jobs
        }

        def listen(job: Job, event: Event) -> None:
            kind, row = event[0], rows[job]
            if kind == "note":
                progress.console.print(f"note: {event[1]}", markup=False)
            elif kind == "failed":
                progress.update(row, loss="[red]failed")
            elif kind == "step":
                task = next(t for t in progress.tasks if t.id == row)
                progress.update(total, advance=event[1] - task.completed)
                if not task.started:
                    progress.start_task(row)
                progress.update(row, completed=event[1], loss=f"loss {event[2]:.3f}")

        yield listen


@contextmanager
def _lines(console: Console, jobs: Sequence[Job], done: Sequence[Job], steps: int) -> Iterator[Listen]:
    began = shown = time.monotonic()
    at = dict.fromkeys(jobs, 0) | dict.fromkeys(done, steps)
    before = sum(at.values())
    losses: dict[Job, float] = {}

    def listen(job: Job, event: Event) -> None:
        nonlocal shown
        if event[0] == "note":
            _print(console, f"note: {event[1]}")
        elif event[0] == "failed":
            _print(console, f"{job.name}: failed")
        elif event[0] == "done":
            _print(console, f"{job.name}: done, training loss {losses.get(job, float('nan')):.3f}")
        elif event[0] == "step":
            at[job], losses[job] = event[1:]
            now, made = time.monotonic(), sum(at.values())
            if now - shown > _SECONDS_BETWEEN_LINES and made > before:
                shown = now
                left = (steps * len(jobs) - made) / (made - before) * (now - began)
                running = ", ".join(f"{j.name}: {n}, loss {losses[j]:.3f}" for j, n in at.items() if 0 < n < steps)
                _print(console, f"{made}/{steps * len(jobs)} steps, {left:.0f} s left ({running})")

    yield listen


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
