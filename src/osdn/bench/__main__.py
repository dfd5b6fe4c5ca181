"""`osdn bench`, `python -m osdn.bench`: gate, measure, report."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro

from osdn.bench import bars, gpu, step
from osdn.bench.cases import SUITES, RedGateError, Suite, check_claim, gate, qwen3_next
from osdn.bench.measure import MODES, call, interleaved, peak_memory, wall_clock
from osdn.bench.report import add, markdown, write
from osdn.runs.provenance import provenance


@dataclass(frozen=True)
class Config:
    """Measure speed and memory, behind a correctness gate.

    cpu: beside transformers' chunked gated delta rule. step: whole training steps, on a GPU where there is one, beside
    the same model around that rule, there also around flash-linear-attention's where it imports. gpu: beside the
    kernels of flash-linear-attention and FlashQLA, where they import; runs of one device and day go into one file."""

    suite: Literal["cpu", "step", "gpu"] = "cpu"
    threads: int | None = None
    """Threads of torch; as many as torch takes by itself unless given."""
    quick: bool = False
    """Short lengths and three repeats, to see that it runs."""
    repeats: int | None = None
    """7 on the CPU, 30 on a GPU."""
    seed: int = 0
    out: Path = Path("benchmarks/results")
    selection: tyro.conf.OmitArgPrefixes[gpu.Selection] = field(default_factory=gpu.Selection)
    merge: tuple[Path, ...] = ()
    """Measure nothing: put the runs of these results of the GPU suite into one, and print its bars."""

    def run(self) -> None:
        """Print the table, write the files. Raises ValueError for a selection that selects nothing."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.suite == "gpu" or self.merge:
            _gpu(self, SUITES["gpu"])
        elif self.selection != gpu.Selection():
            raise ValueError("--shapes, --decays, --only, --limit, --peer-limit and --commit belong to --suite gpu")
        elif self.suite == "step":
            repeats = _repeats(self, SUITES["cpu"])
            measure = partial(step.run, repeats=repeats, quick=self.quick, threads=self.threads, seed=self.seed)
            _report(measure, step.markdown, self.out)
        else:
            _report(partial(run, self, SUITES["cpu"]), markdown, self.out)


def run(config: Config, suite: Suite) -> dict[str, Any]:
    """All that is measured on the CPU; RedGateError, before any clock runs, where an implementation is wrong."""
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    shapes = suite.quick if config.quick else suite.shapes
    repeats = _repeats(config, suite)
    errors = {case.name: gate(suite, case, seed=config.seed) for case in suite.cases}
    claims: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    inputs = {shape.T: suite.inputs(shape, config.seed) for shape in shapes.values()}
    for T, x in inputs.items():
        claims += ({"case": case.name, "tokens": T, **check_claim(case, x)} for case in suite.cases)
    for mode in MODES:
        # All lengths take turns too: a slow minute would otherwise show as a cost that is not flat over T.
        competitors = {
            (case.name, T): partial(call, case.run, x, mode) for T, x in inputs.items() for case in suite.cases
        }
        _say(f"{mode}: {repeats} rounds of {len(competitors)} calls, twice each")
        for (name, T), raw in interleaved(competitors, repeats, wall_clock).items():
            measured.append(_entry(name, mode, "seconds", T, raw))
    for length, shape in shapes.items():
        for case in suite.cases:
            _say(f"memory of {case.name} at T = {length}")
            peaks = peak_memory(config.suite, case.name, length, torch.get_num_threads(), config.seed)
            measured += (_entry(case.name, mode, "bytes", shape.T, [peak]) for mode, peak in peaks.items())
    return {
        **provenance(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "config": {name: getattr(config, name) for name in ("suite", "threads", "quick", "seed")}
        | {"repeats": repeats},
        "shape": {n: x for n, x in vars(shape).items() if n in "BHKV"} | {"dtype": str(suite.dtype)},
        "tokens": list(inputs),
        "cases": {case.name: repr(case.preconditioner) for case in suite.cases},
        "peer": {
            "case": suite.peer.name,
            "module": qwen3_next().__module__,
            "qualname": qwen3_next().__qualname__,
        },
        "gate": errors,
        "claims": claims,
        "measured": measured,
    }


def _repeats(config: Config, suite: Suite) -> int:
    repeats = config.repeats or suite.repeats
    return min(repeats, 3) if config.quick else repeats


def _entry(case: str, mode: str, what: str, T: int, raw: Sequence[float]) -> dict[str, Any]:
    return {"case": case, "mode": mode, "what": what, "tokens": T, "median": median(raw), "samples": raw}


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _report(measure: Callable[[], dict[str, Any]], table_of: Callable[[dict[str, Any]], str], folder: Path) -> None:
    try:
        result = measure()
    except RedGateError as error:
        sys.exit(f"red gate, no speed is reported: {error}")
    table = table_of(result)
    print(table)
    print(f"wrote {write(result, table, folder)} and the table beside it")


def _gpu(config: Config, suite: Suite) -> None:
    """The file is written after every entry: a command that is stopped has not measured for nothing."""
    if config.merge:
        runs = [run for path in config.merge for run in json.loads(path.read_text())["runs"]]
        path, result = add(runs, config.out)
    else:
        repeats, runs = _repeats(config, suite), []
        for so_far in gpu.run(suite, config.selection, repeats=repeats, seed=config.seed, quick=config.quick):
            runs = [so_far]
            path, result = add(runs, config.out)
    path.with_suffix(".md").write_text(bars.markdown(result))
    print(bars.verdicts(result))
    print(f"wrote {path}, and all tables beside it")
    if red := [name for run in runs for name in run["red"]]:
        sys.exit(f"red gate, no times are reported of: {'; '.join(red)}")


def main() -> None:
    """`osdn bench`, as a module."""
    try:
        tyro.cli(Config).run()
    except ValueError as error:
        print(f"osdn.bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
