"""Runs the experiments and writes what they found: a table, a figure each, raw values, and what the theory lacks."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from osdn.ops.options import refuse
from osdn.runs.provenance import provenance
from osdn.runs.store import write_atomic, write_json
from osdn.theory import memory, population, preconditioner, stability
from osdn.theory.config import Name
from osdn.theory.outcome import Numbers, Outcome, Row

EXPERIMENTS: Mapping[Name, Callable[[], Outcome]] = {
    "T1": preconditioner.exactness,
    "T6": preconditioner.forgetting_pulls_to_zero,
    "T7": preconditioner.aware_fixed_point,
    "T9": population.gap_at_800,
    "C2": population.steps_to_the_optimum,
    "box": population.box_truncation,
    "regret": preconditioner.regret,
    "S1": memory.diagonal_covariance,
    "S2": memory.rotated_covariance,
    "S3": memory.noise,
    "S4": memory.key_lengths,
    "S5": memory.covariance_switch,
    "S6": memory.correlated_gates,
    "S7": memory.one_pass_recall,
    "S8": preconditioner.covariance_in_d,
    "gate": memory.gates,
    "stability": stability.stability,
    "relaxation": preconditioner.relaxation,
    "newton": preconditioner.newton_shape,
}
HEADER = ("id", "quantity", "expected", "measured", "accepted", "why", "verdict")
GENERAL = (
    "Super-geometric convergence against a right-Newton comparator is proved, and seen, for the population's own "
    "feedback (C2, T9: full D, or diagonal D under a diagonal covariance). It does not follow for the rule that is "
    "shipped, token-local and diagonal with unit keys: see S1 and S2.",
    "Token-local contraction is proved and seen (regret), and is not recall: a small residual ratio goes with a "
    "large loss in S1 and S3, and one scalar on beta gives it as well in S7.",
    "The published results on language models, +32% recall and -39% residual ratio, are not tested by any of this.",
)


def run(only: tuple[Name, ...], out: Path | None, console: Console | None = None) -> dict[str, Any]:
    """Run the experiments named in `only` (all, where empty), print the table, write the run directory.

    out: in it results.json (raw values, seeds, versions; written anew after every experiment), table.md, table.csv and
        <experiment>.png; runs/theory-<time> by default.

    Returns the content of results.json. Raises ValueError for an experiment given twice or a directory that holds any
    of these files or another command's run, RunError where a file cannot be written; both before any work.
    """
    console = console or Console()
    if len(set(only)) < len(only):
        raise ValueError(f"only: got {' '.join(only)}, takes different names among {' '.join(get_args(Name))}")
    names: list[Name] = [name for name in EXPERIMENTS if not only or name in only]
    now = datetime.now(UTC)
    out = out or Path("runs") / f"theory-{now:%Y%m%d-%H%M%S}"
    written = ("results.json", "table.md", "table.csv", *(f"{name}.png" for name in names))
    if there := [name for name in ("config.json", *written) if (out / name).exists()]:  # config.json: another run's
        refuse("out", f"{out}, which holds {', '.join(there)}", "a new path")
    content: dict[str, Any] = {"date": now.isoformat(timespec="seconds"), **provenance(), "experiments": {}}
    write_json(out / "results.json", content)
    outcomes: dict[str, Outcome] = {}
    for experiment in track(names, "theory", console=console, transient=True):
        began = time.monotonic()
        outcomes[experiment] = EXPERIMENTS[experiment]()
        seconds = time.monotonic() - began
        content["experiments"][experiment] = plain(outcomes[experiment]) | {"wall_seconds": seconds}
        write_atomic(out / f"{experiment}.png", figure(outcomes[experiment]))
        write_json(out / "results.json", content)
        write_atomic(out / "table.md", markdown(outcomes, content).encode())
        write_atomic(out / "table.csv", as_csv(outcomes).encode())
    if console.is_terminal:
        for name, outcome in outcomes.items():
            console.print(_rich(name, outcome))
        console.print(words(outcomes, content), markup=False, highlight=False)
    else:
        console.print(markdown(outcomes, content), markup=False, highlight=False, soft_wrap=True)
    console.print(f"results.json, table.md, table.csv and figures are in {out}", soft_wrap=True)
    return content


def plain(outcome: Outcome) -> dict[str, Any]:
    """Rows with every seed's value and the points of the figure; strict JSON, with infinities and NaN as text."""
    rows = [
        {
            "quantity": row.quantity,
            "expected": row.expected,
            "measured": _number(row.measured),
            "low": _number(row.low),
            "high": _number(row.high),
            "why": row.why,
            "agrees": row.agrees,
            "each": _plain(row.each),
        }
        for row in outcome.rows
    ]
    text = {"title": outcome.title, "gives": outcome.gives, "lacks": outcome.lacks}
    panels = [
        {
            "x": panel.x,
            "y": panel.y,
            "lines": {label: [_plain(x), _plain(y)] for label, (x, y) in panel.lines.items()},
        }
        for panel in outcome.panels
    ]
    return text | {"seeds": list(outcome.seeds), "rows": rows, "panels": panels}


def _plain(values: Numbers | Sequence[str]) -> list[float | str]:
    return [x if isinstance(x, str) else _number(float(x)) for x in values]


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def cells(name: str, row: Row) -> list[str]:
    """A line of the table, as in HEADER."""
    if row.low == -math.inf:
        accepted = f"≤ {row.high:.4g}"
    elif row.high == math.inf:
        accepted = f"≥ {row.low:.4g}"
    else:
        accepted = f"{row.low:.4g} to {row.high:.4g}"
    verdict = "agrees" if row.agrees else "DISAGREES"
    return [name, row.quantity, row.expected, f"{row.measured:.4g}", accepted, row.why, verdict]


def markdown(outcomes: Mapping[str, Outcome], content: Mapping[str, Any]) -> str:
    """The table, what the theory gives and lacks, and where the numbers come from."""
    lines = [list(HEADER), ["---"] * len(HEADER)]
    lines += [
        [cell.replace("|", "\\|") for cell in cells(n, row)] for n, outcome in outcomes.items() for row in outcome.rows
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{words(outcomes, content)}"


def words(outcomes: Mapping[str, Outcome], content: Mapping[str, Any]) -> str:
    """The verdicts counted, both lists, and the provenance."""
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    off = [f"{name}: {row.quantity}" for name, outcome in outcomes.items() for row in outcome.rows if not row.agrees]
    counted = f"{len(rows) - len(off)} of {len(rows)} rows agree with what was expected."
    if off:
        counted += f" These do not: {'; '.join(off)}."
    gives = [f"- {name}: {outcome.gives}" for name, outcome in outcomes.items() if outcome.gives]
    lacks = [f"- {text}" for text in GENERAL]
    lacks += [f"- {name}: {outcome.lacks}" for name, outcome in outcomes.items() if outcome.lacks]
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    origin = f"{content['date']}, commit {content['commit']}, {versions}, {content['device']}, float64."
    sections = [
        counted,
        "What the theory gives:\n\n" + "\n".join(gives),
        "What it does not give:\n\n" + "\n".join(lacks),
        origin,
    ]
    return "\n\n".join(sections) + "\n"


def as_csv(outcomes: Mapping[str, Outcome]) -> str:
    """The table with the raw values of every row, separated by spaces."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow((*HEADER, "each"))
    for name, outcome in outcomes.items():
        writer.writerows([*cells(name, row), " ".join(map(repr, row.each))] for row in outcome.rows)
    return buffer.getvalue()


def figure(outcome: Outcome) -> bytes:
    """PNG of an outcome's panels side by side."""
    n = len(outcome.panels)
    picture = Figure(figsize=(6.4 * n, 4.4), layout="constrained")
    for axes, panel in zip(picture.subplots(1, n, squeeze=False)[0], outcome.panels):
        for label, (x, y) in panel.lines.items():
            reference = label.startswith(("bound", "expected"))
            style = (
                {"linestyle": "none", "marker": "o", "markersize": 3, "alpha": 0.7}
                if panel.dots
                else {"linewidth": 1.6}
            )
            if reference:
                style = {"linestyle": "--", "linewidth": 1.2}
            axes.plot(x, y, label=label, **style)
        axes.set(xlabel=panel.x, ylabel=panel.y)
        if panel.log_x:
            axes.set_xscale("log")
        if panel.log_y:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    picture.suptitle(outcome.title, fontsize=11)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _rich(name: str, outcome: Outcome) -> Table:
    """For a terminal; why stands in the files."""
    table = Table(title=f"{name}: {outcome.title}", title_justify="left")
    for column in ("quantity", "expected", "measured", "accepted", "verdict"):
        table.add_column(column)
    for row in outcome.rows:
        _, quantity, expected, measured, accepted, _, verdict = cells(name, row)
        table.add_row(quantity, expected, measured, accepted, verdict)
    return table
