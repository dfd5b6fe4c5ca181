"""The GPU suite: ours beside its peers, decay by decay and shape by shape.

Peers tune themselves for minutes when first called, so `Selection` limits what one command does; those of Triton do so
at each shape, since what is the fastest at one can take half as long again at another. What one command finds is a
"run", and `report.add` collects those of a day. Within an entry (a shape under a decay) all contestants take turns.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.util
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from statistics import median, quantiles
from typing import Any

import torch

from osdn.bench.cases import DECAYS, Case, Inputs, Shape, Suite, check_claim, compare, gate, results
from osdn.bench.device import Cuda, Device
from osdn.bench.measure import MODES, Call, call, interleaved
from osdn.runs.provenance import provenance, versions

Run = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """What of the GPU suite to measure, and for how long. Names may have wildcards ("osdn*"); none given is all."""

    shapes: tuple[str, ...] = ()
    decays: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Contestants, ours or peers."""
    limit: float = math.inf
    """Seconds after which nothing new is started."""
    peer_limit: float = 300.0
    """Seconds that the first calls of a peer may take on one shape."""
    commit: str | None = None
    """The commit that is measured, where git cannot tell."""


def run(suite: Suite, chosen: Selection, *, repeats: int, seed: int = 0, quick: bool = False) -> Iterator[Run]:
    """The run so far, again after every entry.

    A case that the gate finds wrong is listed in "red", and no time of it is measured.
    """
    shapes = _choose("shapes", suite.quick if quick else suite.shapes, chosen.shapes)
    decays = _choose("decays", dict.fromkeys(DECAYS), chosen.decays)
    cases = _choose("only", {case.name: case for case in suite.cases}, chosen.only).values()
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--suite gpu needs a CUDA device, and torch {torch.__version__} sees none")
    # FLA would pass its gated rule on to FlashQLA where that is installed, and be measured as a peer of itself.
    os.environ.setdefault("FLA_FLASH_QLA", "0")
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # nor keep on disk what it chose at another shape
    device = Cuda("cuda") if suite.device == "cuda" else Device(suite.device)
    session = _Session(suite, chosen, device, repeats, seed, _start(suite, chosen, repeats, seed, quick))
    for decay, (name, shape) in product(decays, shapes.items()):
        wanted = [case for case in cases if case.step == (shape.T == 1) and decay in case.decays]
        if not wanted:
            continue
        if session.left() <= 0:
            session.run["stopped"] = f"before {name}, decay {decay}: {chosen.limit:.0f} s had passed"
            break
        session.run["entries"].append(session.entry(name, shape, decay, wanted))
        session.run["seconds"] = round(session.elapsed(), 1)
        yield session.run
    yield session.run


def _choose(what: str, known: Mapping[str, Any], patterns: tuple[str, ...]) -> dict[str, Any]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"--{what}: got {pattern!r}, takes {', '.join(known)}")
    return {name: x for name, x in known.items() if not patterns or any(fnmatchcase(name, p) for p in patterns)}


def _start(suite: Suite, chosen: Selection, repeats: int, seed: int, quick: bool) -> Run:
    here = provenance()
    packages = versions("triton", "fla-core", "flash-linear-attention", "flash-qla", "tilelang")
    limits = {"limit": None if chosen.limit == math.inf else chosen.limit, "peer_limit": chosen.peer_limit}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if suite.device == "cuda" else here["device"],
        "commit": chosen.commit or here["commit"],
        "versions": here["versions"] | packages,
        "environment": {n: x for n, x in os.environ.items() if n.startswith(("FLA_", "TRITON_", "OSDN_"))},
        "config": {"quick": quick, "repeats": repeats, "seed": seed, **dataclasses.asdict(chosen), **limits},
        "dtype": str(suite.dtype),
        "tolerances": {
            **suite.tolerances,
            **{f"{name}, {case.name}": x for case in suite.cases for name, x in case.tolerances.items()},
        },
        "cases": {case.name: repr(case.preconditioner) for case in suite.cases if not case.function},
        "peers": {case.name: case.function for case in suite.cases if case.function},
        "shapes": {name: dataclasses.asdict(x) for name, x in (suite.quick if quick else suite.shapes).items()},
        "gate": {},
        "red": {},
        "entries": [],
    }


@dataclass
class _Session:
    """One command: its device, what it has found out so far, and what time it has left."""

    suite: Suite
    chosen: Selection
    device: Device
    repeats: int
    seed: int
    run: Run
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.run["ceilings"] = self.device.ceilings()

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        return self.chosen.limit - self.elapsed()

    def entry(self, name: str, shape: Shape, decay: str, wanted: list[Case]) -> dict[str, Any]:
        """All of `wanted` that are right, there and in time, measured side by side."""
        _say(f"{self.elapsed():.0f} s: {name}, decay {decay}")
        x = self.suite.inputs(shape, self.seed, decay)
        x = x.copy() if shape.T == 1 else x
        contestants: dict[str, Any] = {}
        left_out: dict[str, str] = {}
        entry = {"shape": name, "decay": decay, "flop": _flop(shape), "contestants": contestants, "left_out": left_out}
        ready: dict[str, dict[str, Call]] = {mode: {} for mode in (MODES if shape.T > 1 else ("step",))}
        _untune({_package(case.function) for case in wanted if case.function})
        for case in sorted(wanted, key=lambda case: case.function is not None):  # ours first
            why = self._why_not(case, name, decay, x)
            if case.function and not contestants and "red" in left_out.values():
                why = "nothing to compare it with"
            if why:
                left_out[case.name] = why
                continue
            calls = {mode: partial(call, case.run, x, mode) for mode in ready}
            refused = self._first_calls(case, calls)
            if refused and not case.function:
                self.run["red"][f"{case.name}, {name}, {decay}"] = str(refused)
                left_out[case.name] = "red"
                continue
            contestants[case.name] = {"refused": refused, "times": {}, "bytes": _bytes(case, x), "peak": {}}
            for mode in calls.keys() - refused.keys():
                ready[mode][case.name] = calls[mode]
        for mode, by_name in ready.items():
            for who, samples in interleaved(by_name, self.repeats, self.device.clock).items():
                host = median(seconds for _, seconds in samples)
                contestants[who]["times"][mode] = _summary([seconds for seconds, _ in samples]) | {"host": host}
                contestants[who]["peak"][mode] = self.device.peak(by_name[who])
        for who, measured in contestants.items():
            if measured["times"]:
                measured["kernels"] = self.device.kernels(ready[list(measured["times"])[-1]][who])
        if shape.T > 1:
            self._compare(contestants, shape, x)
        else:
            self._rotate(contestants, x)
        return entry

    def _why_not(self, case: Case, name: str, decay: str, x: Inputs) -> str:
        """Why the case is not to be called: wrong, on inputs that are not what it claims, not there, or late.

        Asked once under each decay, and of each shape. A wrong one of ours is the run's failure; a peer is not gated.
        """
        if case.function:
            package = _package(case.function)
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
            left, needs = max(0, self.left()), case.tuning
            late = f"{left:.0f} s were left, and its first calls have been seen to take {needs:.0f} s"
            return late if needs > left else ""
        checks: dict[str, Callable[[], dict[str, float]]] = {
            f"{case.name}, {decay}": lambda: gate(self.suite, case, decay=decay, seed=self.seed),
            f"{case.name}, {name}": lambda: check_claim(case, x),
        }
        for key, check in checks.items():
            if key not in self.run["gate"].keys() | self.run["red"].keys():
                try:
                    self.run["gate"][key] = check()
                except Exception as error:  # whatever a broken implementation raises
                    self.run["red"][key] = _text(error)
                    _say(f"RED: {key}: {_text(error)}")
        return "red" if checks.keys() & self.run["red"].keys() else ""

    def _first_calls(self, case: Case, calls: Mapping[str, Call]) -> dict[str, str]:
        """By mode, what there is instead of a result: peers may refuse, and are given a limited time."""
        refused = {}
        for mode, one in calls.items():
            if case.function:
                _say(f"{self.elapsed():.0f} s: {case.name}, first {mode}")
            try:
                with _time_limit(min(self.chosen.peer_limit, self.left()) if case.function else math.inf):
                    one()
                    self.device.synchronize()
            except Exception as error:
                refused[mode] = _text(error)
                _say(refused[mode])
        return refused

    def _compare(self, contestants: dict[str, Any], shape: Shape, x: Inputs) -> None:
        """What is kept for the backward, and whether a peer computes what we do without a preconditioner."""
        plain = next((c for c in self.suite.cases if c.plain and c.name in contestants and not c.function), None)
        for who, measured in contestants.items():
            case = self.suite.case(who)
            if not measured["times"]:
                continue
            with self.device.allocated() as more:
                o = case.run(x)[0]
            if more:
                measured["kept"] = more[0] - o.nbytes
            del o
            if case.function and case.plain and plain:
                grads = MODES[1] in measured["times"]
                want = results(plain.run, x, grads, outputs=1)
                measured["differs"] = compare(results(case.run, x, grads, outputs=1), want, shape.packed)

    def _rotate(self, contestants: dict[str, Any], x: Inputs) -> None:
        """Steps on several states in turn, as the layers of a model take them: none is found in a cache."""
        assert x.S is not None
        sets = [x.copy() for _ in range(min(256, max(2, -(-self.device.ROTATED // x.S.nbytes))))]
        sets *= -(-16 // len(sets))
        for who, measured in contestants.items():
            if not measured["times"]:
                continue
            calls = [partial(call, self.suite.case(who).run, y, "step") for y in sets]
            try:
                seconds = self.device.in_a_row(calls, self.repeats)
            except RuntimeError as error:  # a graph that cannot be captured
                measured["refused"]["rotated"] = _text(error)
            else:
                measured["times"]["rotated"] = _summary(seconds)


def _package(function: str) -> str:
    return function.partition(".")[0]


def _untune(packages: set[str]) -> None:
    """Have Triton kernels of these packages choose their configs anew: most do so by keys without a sequence's length
    and how many there are, and would go on with what was the fastest at the first shape that they met."""
    if "triton" in sys.modules:
        from triton.runtime.autotuner import Autotuner

        for tuner in [x for x in gc.get_objects() if issubclass(type(x), Autotuner)]:
            if _package(tuner.base_fn.__module__) in packages:
                tuner.cache.clear()


def _bytes(case: Case, x: Inputs) -> dict[str, int]:
    """The least that has to be moved: inputs read and outputs written once; for a step, its states read and written."""
    if case.step:
        assert x.S is not None
        state = x.S.nbytes + (x.d.nbytes if case.preconditioner else 0)
        return dict.fromkeys(("step", "rotated"), 2 * state)
    unused = set() if case.preconditioner else {"d", "forget"}
    leaves = sum(leaf.nbytes for name, leaf in x.leaves().items() if name not in unused)
    forward = leaves + x.do.nbytes
    return {MODES[0]: forward, MODES[1]: forward + x.do.nbytes + 2 * leaves}


def _flop(shape: Shape, C: int = 64) -> dict[str, int]:
    """The products of the plain delta rule in chunks of C, counted alike for all; twice as many in the backward."""
    K, V, tokens = shape.K, shape.V, shape.B * shape.T * shape.H
    if shape.T == 1:
        return dict.fromkeys(("step", "rotated"), 6 * K * V * tokens)
    forward = (C * (6 * K + 4 * V) + 6 * K * V) * tokens
    return {MODES[0]: forward, MODES[1]: 3 * forward}


def _summary(seconds: list[float]) -> dict[str, Any]:
    tenths = quantiles(seconds, n=10, method="inclusive")
    samples = [float(f"{x:.6g}") for x in seconds]
    return {"median": median(seconds), "p10": tenths[0], "p90": tenths[-1], "samples": samples}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError once they have passed, out of whatever Python is doing then."""
    if seconds == math.inf:
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"its first calls took more than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        # Signals reach the main thread alone; a backward pass, where most is tuned, would otherwise run in another.
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
