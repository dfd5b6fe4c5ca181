"""Runs jobs in this process or in worker processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from osdn.compare.train import Job, train
from osdn.runs import RunError

Event = tuple[Any, ...]
Listen = Callable[[Job, Event], None]


class Failure(NamedTuple):
    """Why a job has no result; the traceback is empty where the message says all."""

    job: Job
    message: str
    traceback: str


def run_jobs(jobs: Sequence[Job], workers: int, listen: Listen) -> list[Failure]:
    """Train every job; the failures, in the order they came.

    workers: worker processes; 0 or 1 trains in this process. listen: called with every event of a job, see `train`,
    and with ("done",) or ("failed",) at its end. A job that fails does not stop the others. KeyboardInterrupt passes
    through once every worker has written a checkpoint.
    """
    if workers > 1 and len(jobs) > 1:
        return _in_workers(jobs, min(workers, len(jobs)), listen)
    failures = []
    # Ctrl-C is only recorded: the step at hand is finished and a checkpoint written; behind the last one, the job ends.
    with _one_thread(), _interrupts() as interrupted:
        for job in jobs:
            outcome = _attempt(job, lambda *event, job=job: listen(job, event), interrupted)
            if outcome != ("stopped",):
                listen(job, outcome[:1])
            if interrupted():
                raise KeyboardInterrupt
            if outcome[0] == "failed":
                failures.append(Failure(job, *outcome[1:]))
    return failures


def _in_workers(jobs: Sequence[Job], workers: int, listen: Listen) -> list[Failure]:
    waiting, failures = list(jobs), list[Failure]()
    active: dict[Connection, tuple[BaseProcess, Job]] = {}

    def give(connection: Connection, process: BaseProcess) -> None:
        if waiting:
            connection.send(waiting[0])
            active[connection] = process, waiting.pop(0)
        else:
            connection.send(None)
            process.join()

    try:
        while waiting or active:
            while waiting and len(active) < workers:
                give(*_start_worker())
            for connection in wait(list(active)):
                assert isinstance(connection, Connection)
                process, job = active[connection]
                try:
                    event = connection.recv()
                except EOFError:  # killed from outside, or out of memory
                    process.join()
                    event = "failed", f"{job.name}: its worker process ended with exit code {process.exitcode}", ""
                if event[0] not in ("done", "failed"):
                    listen(job, event)
                    continue
                listen(job, event[:1])
                del active[connection]
                if event[0] == "failed":
                    failures.append(Failure(job, *event[1:]))
                if process.is_alive():
                    give(connection, process)
    finally:
        for connection in active:  # any message, and the end of this process as well, asks a worker to stop
            with suppress(OSError):
                connection.send(None)
        for process, _ in active.values():
            process.join(timeout=60)
            process.terminate()
    return failures


def _start_worker() -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_worker, args=(there,), daemon=True)
    # A terminal's Ctrl-C reaches every process; the worker is to be told by this one, also while it still imports.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        process.start()
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
    there.close()
    return here, process


def _worker(connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        while (job := connection.recv()) is not None:
            connection.send(_attempt(job, lambda *event: connection.send(event), connection.poll))
    except (EOFError, OSError):  # the parent is gone
        return


def _attempt(job: Job, report: Callable[..., None], stop: Callable[[], bool]) -> Event:
    try:
        return ("done",) if train(job, report, stop) else ("stopped",)
    except RunError as error:
        return "failed", str(error), ""
    except Exception as error:
        return "failed", f"{job.name}: {type(error).__name__}: {error}", traceback.format_exc()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    seen: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: seen.append(number)) if main else None
    try:
        yield lambda: bool(seen)
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
