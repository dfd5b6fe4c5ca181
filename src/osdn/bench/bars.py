"""What a GPU result is held against, and its tables. Every ratio is formed within one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from osdn.bench.cases import DECAYS
from osdn.bench.measure import MODES
from osdn.bench.report import row

Result = dict[str, Any]
Numbers = dict[tuple[str, str, str, str], float]
"""Of a run, by shape, decay, contestant, and what it is: a mode's seconds, bytes "kept", "bandwidth" over a copy's."""


@dataclass(frozen=True)
class Bar:
    """value: of a shape in a run, KeyError where that was not measured. applies: to which shapes."""

    what: str
    limit: float
    aim: float
    value: Callable[[Numbers, str], float]
    applies: Callable[[dict[str, Any]], bool] = lambda shape: shape["T"] > 1

    def holds(self, value: float, bound: float) -> bool:
        """At most the bound; at least, where the aim lies above the limit."""
        return value >= bound if self.aim > self.limit else value <= bound

    def judge(self, result: Result) -> tuple[str, dict[str, tuple[float, int]], list[str]]:
        """The verdict, each shape's latest value with the number of its run, and the shapes that have none."""
        found: dict[str, tuple[float, int]] = {}
        missing = []
        numbers = [(n, _numbers(run)) for n, run in enumerate(result["runs"], 1)]
        for shape in (name for name, x in result["runs"][-1]["shapes"].items() if self.applies(x)):
            for n, known in numbers:
                try:
                    found[shape] = self.value(known, shape), n
                except KeyError:
                    continue
            if shape not in found:
                missing.append(shape)
        values = [value for value, _ in found.values()]
        if not all(self.holds(value, self.limit) for value in values):
            return "missed", found, missing
        if missing or not values:
            return "open", found, missing
        return "aim met" if all(self.holds(value, self.aim) for value in values) else "met", found, missing


def _over(peer: str, what: str, decay: str) -> Callable[[Numbers, str], float]:
    return lambda n, shape: n[shape, decay, "osdn", what] / n[shape, decay, peer, what]


def _share(decay: str) -> Callable[[Numbers, str], float]:
    return lambda n, shape: 1 - n[shape, decay, "osdn-plain", MODES[1]] / n[shape, decay, "osdn", MODES[1]]


def _longer(decay: str) -> Callable[[Numbers, str], float]:
    """Against the same number of tokens in short sequences."""
    return lambda n, shape: n[shape, decay, "osdn", MODES[1]] / n["b16-t4096-h8", decay, "osdn", MODES[1]]


def _decode(decay: str) -> Callable[[Numbers, str], float]:
    return lambda n, shape: n[shape, decay, "osdn-step", "bandwidth"]


def _many(shape: dict[str, Any]) -> bool:
    return bool(shape["T"] == 1 and shape["B"] >= 64)


def _one_long(shape: dict[str, Any]) -> bool:
    return bool(shape["T"] == 65536 and not shape["packed"])


BARS = (
    Bar(f"OSDN over FLA DeltaNet, {MODES[1]}", 1.10, 0.6, _over("fla-deltanet", MODES[1], "none")),
    Bar(f"OSDN over FLA DeltaNet, {MODES[0]}", 1.15, 0.6, _over("fla-deltanet", MODES[0], "none")),
    Bar("saved activations over FLA DeltaNet's", 1.15, 1.15, _over("fla-deltanet", "kept", "none")),
    *(Bar(f"preconditioner's share of {MODES[1]}, decay {decay}", 0.12, 0.05, _share(decay)) for decay in DECAYS),
    *(Bar(f"gated OSDN over FLA GDN, {mode}", 1.15, 0.8, _over("fla-gdn", mode, "scalar")) for mode in MODES),
    *(Bar(f"channel-gated OSDN over FLA KDA, {mode}", 1.15, 0.8, _over("fla-kda", mode, "channel")) for mode in MODES),
    *(
        Bar(f"decode, state bytes / time over copy, decay {decay}", 0.75, 0.90, _decode(decay), _many)
        for decay in DECAYS
    ),
    *(Bar(f"T 4096 -> 65,536, {MODES[1]}, decay {decay}", 1.3, 1.1, _longer(decay), _one_long) for decay in DECAYS),
)


def _numbers(run: dict[str, Any]) -> Numbers:
    numbers: Numbers = {}
    for entry in run["entries"]:
        for who, x in entry["contestants"].items():
            at = entry["shape"], entry["decay"], who
            numbers |= {(*at, mode): times["median"] for mode, times in x["times"].items()}
            if "kept" in x:
                numbers[*at, "kept"] = x["kept"]
            if "rotated" in x["times"]:
                numbers[*at, "bandwidth"] = _rate(run, x, "rotated")[1]
    return numbers


def _rate(run: dict[str, Any], x: dict[str, Any], mode: str) -> tuple[float, float]:
    """Bytes per second, and that over a copy's."""
    rate = x["bytes"][mode] / x["times"][mode]["median"]
    return rate, rate / run["ceilings"]["copy_bytes_per_second"]


def verdicts(result: Result) -> str:
    """The bars, each with what it was met by."""
    lines = [f"# {result['device']}, {result['runs'][-1]['date'][:10]}", "", "## Bars", ""]
    lines += [row("", "bar", "aim", "worst", "verdict", "by shape (run)"), "|---|---:|---:|---:|---|---|"]
    for bar in BARS:
        verdict, found, missing = bar.judge(result)
        sign = ">=" if bar.aim > bar.limit else "<="
        values = [value for value, _ in found.values()]
        worst = f"{(min if sign == '>=' else max)(values):.2f}" if values else ""
        shapes = [f"{shape} {value:.2f} ({n})" for shape, (value, n) in found.items()]
        shapes += [f"{shape} not measured" for shape in missing]
        lines.append(row(bar.what, f"{sign} {bar.limit}", f"{sign} {bar.aim}", worst, verdict, ", ".join(shapes)))
    return "\n".join([*lines, ""])


def markdown(result: Result) -> str:
    """The bars with their verdicts, then each run: what it ran on, its times, and what it left out."""
    lines = verdicts(result).splitlines()
    for n, run in enumerate(result["runs"], 1):
        lines += ["", f"## Run {n}: {run['date']}", "", *_run(run)]
    return "\n".join([*lines, ""])


def _run(run: dict[str, Any]) -> Iterator[str]:
    copy, product = run["ceilings"]["copy_bytes_per_second"], run["ceilings"]["matmul_flop_per_second"]
    yield f"Commit {run['commit']}; {run['versions']}; environment {run['environment']}; {run['config']}."
    yield f"Ceilings: a copy {copy / 1e9:.0f} GB/s read and written, a bf16 product {product / 1e12:.0f} TFLOP/s."
    worst = (f"{case} {max(errors.values()):.1e}" for case, errors in run["gate"].items() if "o" in errors)
    yield f"Largest relative error against the float64 reference: {'; '.join(worst)}."
    yield from (f"RED {case}: {why}" for case, why in run["red"].items())
    if "stopped" in run:
        yield f"Stopped {run['stopped']}."
    for mode in (*MODES, "step", "rotated"):
        rows = [(e, who, x) for e in run["entries"] for who, x in e["contestants"].items() if mode in x["times"]]
        if not rows:
            continue
        head = ("ms", "osdn over it", "host ms", "TFLOP/s", "GB/s", "peak MiB", "kept MiB")
        yield from ("", f"### {mode}", "", row("decay", "shape", "", *head), "|---|---|---|" + "---:|" * len(head))
        for entry, who, x in rows:
            seconds, host = x["times"][mode]["median"], x["times"][mode].get("host")
            ours = entry["contestants"].get("osdn-step" if "step" in x["times"] else "osdn", {"times": {}})["times"]
            flop, (rate, share) = entry["flop"][mode] / seconds, _rate(run, x, mode)
            yield row(
                *(entry["decay"], entry["shape"], who, f"{1e3 * seconds:.4g}"),
                f"{ours[mode]['median'] / seconds:.2f}" if mode in ours else "",
                "" if host is None else f"{1e3 * host:.3g}",
                *(f"{flop / 1e12:.1f} ({flop / product:.0%})", f"{rate / 1e9:.0f} ({share:.0%})"),
                *("" if y is None else f"{y / 2**20:.0f}" for y in (x["peak"].get(mode), x.get("kept"))),
            )
    notes: dict[str, dict[str, None]] = {}
    for entry in run["entries"]:
        for who, x in entry["contestants"].items():
            here = f"{who}, decay {entry['decay']},"
            if who in run["peers"]:
                notes.setdefault(f"{here} ran", {}).update(
                    dict.fromkeys(f"`{name}`" for name, _ in x.get("kernels", ()))
                )
            if differs := x.get("differs"):
                name = max(differs, key=lambda name: (math.isnan(differs[name]), differs[name]))
                notes.setdefault(f"{here} differs from osdn-plain by", {})[f"{differs[name]:.0e} ({name})"] = None
            for mode, why in x["refused"].items():
                notes.setdefault(f"{here} refused {mode}: {why}; on", {})[entry["shape"]] = None
        for who, why in entry["left_out"].items():
            notes.setdefault(f"{who}, decay {entry['decay']}, left out: {why}; on", {})[entry["shape"]] = None
    yield from ("", "### Peers: kernels that ran, results, refusals", "")
    yield from (f"- {what} {', '.join(items)}" for what, items in notes.items() if items)
