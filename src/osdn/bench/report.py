"""What a run leaves behind: one JSON with everything, and the tables beside it as markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osdn.bench.measure import MODES


def write(result: dict[str, Any], table: str, folder: Path) -> Path:
    """Write `<device>_<date>.json` and the tables as `.md`; beside a run that is there already: -2, -3 and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(result)
    text = json.dumps(result, indent=1) + "\n"
    n = 1
    while True:
        path = folder / f"{stem}{'' if n == 1 else f'-{n}'}.json"
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            n += 1
            continue
        path.with_suffix(".md").write_text(table)
        return path


def add(runs: Sequence[dict[str, Any]], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Put runs of one device and day into its file, in place of what that has of the same runs."""
    stems = {_stem(run) for run in runs}
    if len(stems) != 1:
        raise ValueError(f"runs of one device and day go into one file; got {', '.join(sorted(stems))}")
    path = folder / f"{stems.pop()}.json"
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    by_date = {run["date"]: run for run in (*known, *runs)}
    result = {"device": runs[0]["device"], "runs": [by_date[date] for date in sorted(by_date)]}
    # Samples on one line: they are most of the file.
    text = re.sub(r"\[[-+.\de,\s]+\]", lambda x: " ".join(x[0].split()), json.dumps(result, indent=1))
    folder.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # whoever is stopped while writing keeps the old one
    new.write_text(text + "\n")
    new.replace(path)
    return path, json.loads(text)


def _stem(run: Mapping[str, Any]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    suite = "step_" if run["config"].get("suite") == "step" else ""
    return f"{suite}{slug}_{run['date'][:10]}{'_quick' if run['config']['quick'] else ''}"


def flatness(per_token: Mapping[int, float], T_min: int = 1024) -> float | None:
    """Largest over smallest cost per token from T_min on; None with fewer than two lengths."""
    values = [value for T, value in per_token.items() if T_min <= T]
    return max(values) / min(values) if len(values) > 1 else None


def markdown(result: dict[str, Any]) -> str:
    """Times with their ratio to the peer, cost per token over the lengths, and what ran."""
    peer, cases, lengths, shape = result["peer"], result["cases"], result["tokens"], result["shape"]
    costs: dict[tuple[str, str, str], dict[int, float]] = {}
    for x in result["measured"]:
        costs.setdefault((x["what"], x["mode"], x["case"]), {})[x["tokens"]] = x["median"]
    lines = [f"# {result['device']}, {result['threads']} threads, {result['date'][:10]}", ""]
    for mode in MODES:
        lines += [f"## {mode}: ms (ratio to {peer['case']}), median of {result['config']['repeats']}", ""]
        lines += [row("T", *cases), "|---:" * (len(cases) + 1) + "|"]
        for T in lengths:
            base = costs["seconds", mode, peer["case"]][T]
            times = (costs["seconds", mode, case][T] for case in cases)
            lines.append(row(T, *(f"{1e3 * time:.1f} ({time / base:.2f})" for time in times)))
        lines.append("")
    lines += ["## Cost per token; flatness is the largest over the smallest from T = 1024 on", ""]
    lines += [row("", "mode", "case", *(f"T = {T}" for T in lengths), "flatness")]
    lines += ["|---|---|---|" + "---:|" * (len(lengths) + 1)]
    for (what, mode, case), cost in costs.items():
        unit, scale = ("us", 1e6) if what == "seconds" else ("KiB", 1 / 1024)
        per_token = {T: scale * value / T for T, value in cost.items()}
        flat = flatness(per_token)
        values = (f"{value:.1f}" for value in per_token.values())
        lines.append(row(unit, mode, case, *values, "" if flat is None else f"{flat:.2f}"))
    worst = (f"{case} {max(errors.values()):.1e}" for case, errors in result["gate"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"B{shape['B']} H{shape['H']} K{shape['K']} V{shape['V']} {shape['dtype']}; "
            f"peer `{peer['module']}.{peer['qualname']}`; {result['versions']}; commit {result['commit']}.",
            f"Largest relative error against the float64 reference: {', '.join(worst)}.",
            f"Load average before the run, which counts other work: {result['load_before']}.",
            "",
        ]
    )


def row(*cells: object) -> str:
    """Of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
