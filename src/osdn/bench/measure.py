"""The clock and the memory of the CPU, and how calls take turns on any device.

Time: wall clock of whole calls; cases and lengths take turns within each round, so that a slow minute of the machine
hits all of them alike, and the median over rounds is reported. Every sample is kept.

Memory: `python -m osdn.bench.measure SUITE CASE SHAPE THREADS SEED` is run as a child process for each case and length,
and prints how far its resident set rose above what it was just before the call. Neither competitor can then reuse
what another left behind. The kernel's high-water mark is reset before each call (`getrusage` cannot do that: there
the peak of the imports would hide the call's), and the child's malloc gives every block above 64 KiB back at once
(MALLOC_MMAP_THRESHOLD_), so that the warm-up leaves no room to hide in: this agrees with torch's own profile of its
allocations to within 1%. Linux only; elsewhere memory is not reported.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from osdn.bench.cases import SUITES, Inputs, Run

MODES = ("forward", "forward+backward")


def call(run: Run, x: Inputs, mode: str) -> None:
    """One call: without a graph, or with the gradients of all leaves from that of o."""
    if mode == "forward+backward":
        torch.autograd.grad(run(x)[0], list(x.leaves().values()), x.do, allow_unused=True)
    else:
        with torch.no_grad():
            run(x)


Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
Sample = TypeVar("Sample")


def wall_clock(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    competitors: Mapping[Name, Call], repeats: int, clock: Callable[[Call], Sample]
) -> dict[Name, list[Sample]]:
    """What `clock` says of each in each round. Rounds differ in order; each timed call follows an untimed one.

    In a fixed order a short call behind a long one pays for it in every round: threads asleep, memory returned.
    """
    samples: dict[Name, list[Sample]] = {name: [] for name in competitors}
    order, shuffle = list(competitors), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            competitors[name]()
            samples[name].append(clock(competitors[name]))
    return samples


def peak_memory(suite: str, case: str, shape: str, threads: int, seed: int) -> dict[str, int]:
    """Extra bytes of resident memory by mode, measured in a child process; empty off Linux."""
    if sys.platform != "linux":
        return {}
    command = [sys.executable, "-m", "osdn.bench.measure", suite, case, shape, str(threads), str(seed)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"the memory measurement of {case!r} at T = {shape} failed:\n{child.stderr}")
    result: dict[str, int] = json.loads(child.stdout)
    return result


def _measure_here(name: str, case: str, shape: str, threads: int, seed: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    suite = SUITES[name]
    run, shapes = suite.case(case).run, {**suite.shapes, **suite.quick}
    warm, x = suite.inputs(shapes["128"], seed), suite.inputs(shapes[shape], seed)
    peaks = {}
    for mode in MODES:
        call(run, warm, mode)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call(run, x, mode)
        peaks[mode] = _status("VmHWM") - before
    return peaks


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    name, case, shape, threads, seed = sys.argv[1:]
    print(json.dumps(_measure_here(name, case, shape, int(threads), int(seed))))
