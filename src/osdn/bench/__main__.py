"""`python -m osdn.bench`: gate, measure, report."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro

from osdn.bench.cases import SUITES, RedGateError, Suite, check_claim, gate, qwen3_next
from osdn.bench.measure import MODES, call, interleaved, peak_memory
from osdn.bench.report import markdown, write
from osdn.compare.provenance import provenance


@dataclass(frozen=True)
class Config:
    """Measure speed and memory beside transformers' chunked gated delta rule, behind a correctness gate."""

    suite: Literal["cpu"] = "cpu"
    threads: int | None = None
    """Threads of torch; as many as torch takes by itself unless given."""
    quick: bool = False
    """Short lengths and three repeats, to see that it runs."""
    repeats: int = 7
    seed: int = 0
    out: Path = Path("benchmarks/results")


def run(config: Config, suite: Suite) -> dict[str, Any]:
    """Everything that is measured; raises RedGateError, before any clock runs, where an implementation is wrong."""
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.quick:
        config = dataclasses.replace(config, repeats=min(config.repeats, 3))
    lengths = suite.quick_tokens if config.quick else suite.tokens
    errors = {case.name: gate(suite, case, seed=config.seed) for case in suite.cases}
    claims: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    inputs = {T: suite.inputs(T, config.seed) for T in lengths}
    for T, x in inputs.items():
        claims += ({"case": case.name, "tokens": T, **check_claim(case, x)} for case in suite.cases)
    for mode in MODES:
        # All lengths take turns too: a slow minute would otherwise show as a cost that is not flat over T.
        competitors = {
            (case.name, T): partial(call, case.run, x, mode) for T, x in inputs.items() for case in suite.cases
        }
        _say(f"{mode}: {config.repeats} rounds of {len(competitors)} calls, twice each")
        for (name, T), raw in interleaved(competitors, config.repeats).items():
            measured.append(_entry(name, mode, "seconds", T, raw))
    for T in lengths:
        for case in suite.cases:
            _say(f"memory of {case.name} at T = {T}")
            peaks = peak_memory(config.suite, case.name, T, torch.get_num_threads(), config.seed)
            measured += (_entry(case.name, mode, "bytes", T, [peak]) for mode, peak in peaks.items())
    return {
        **provenance(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "config": {name: value for name, value in vars(config).items() if name != "out"},
        "shape": {"B": suite.B, "H": suite.H, "K": suite.K, "V": suite.V, "dtype": str(suite.dtype)},
        "tokens": list(lengths),
        "cases": {case.name: repr(case.preconditioner) for case in suite.cases},
        "peer": {"case": suite.peer, "module": qwen3_next().__module__, "qualname": qwen3_next().__qualname__},
        "gate": errors,
        "claims": claims,
        "measured": measured,
    }


def _entry(case: str, mode: str, what: str, T: int, raw: Sequence[float]) -> dict[str, Any]:
    return {"case": case, "mode": mode, "what": what, "tokens": T, "median": median(raw), "samples": raw}


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    """Measure as the command line says, print the table, write the files."""
    config = tyro.cli(Config)
    try:
        result = run(config, SUITES[config.suite])
    except RedGateError as error:
        sys.exit(f"red gate, no speed is reported: {error}")
    table = markdown(result)
    print(table)
    print(f"wrote {write(result, table, config.out)} and the table beside it")


if __name__ == "__main__":
    main()
