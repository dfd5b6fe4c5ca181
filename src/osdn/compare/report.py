"""The results of all jobs as one JSON, one table, one figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from osdn.compare.config import Experiment

Result = dict[str, Any]
_CONTROLS = ("beta2", "static", "forget-only", "gdn")
_COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Values:
    """One number a seed."""

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.each) / len(self.each)

    @property
    def half_range(self) -> float:
        return (max(self.each) - min(self.each)) / 2

    def text(self, form: str) -> str:
        spread = f" ±{_short(format(self.half_range, form))}" if len(self.each) > 1 else ""
        return _short(format(self.mean, form)) + spread


class Summary:
    """Finished jobs, grouped by model. `results`: the contents of every job's result file, model by model."""

    def __init__(self, experiment: Experiment, results: Sequence[Result]) -> None:
        self.experiment = experiment
        self.mqar = experiment.task == "mqar"
        self.runs = {name: [r for r in results if r["model"] == name] for name in experiment.models}

    def values(self, model: str, *path: str) -> Values:
        """What stands under `path` in the result of every seed."""
        numbers: list[Any] = list(self.runs[model])
        for key in path:
            numbers = [inside[key] for inside in numbers]
        return Values(tuple(numbers))

    @property
    def headline(self) -> tuple[str, str]:
        """Path of the number by which models are compared: accuracy at the trained number of pairs, or the loss."""
        return "final", "accuracy" if self.mqar else "loss"

    @property
    def title(self) -> str:
        e = self.experiment
        task = f"MQAR, {e.num_pairs} pairs listed {_times(e.passes)}" if self.mqar else "Bytes of text"
        heads = f"{e.num_heads} head{'s' * (e.num_heads > 1)} of {e.head_dim}"
        return f"{task}, T = {e.seq_len}, {e.num_layers} layers, {heads}, {e.steps:,} steps of {e.batch_size} sequences"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text."""
        columns: list[tuple[str, str, tuple[str, ...]]]
        if self.mqar:
            pairs = [str(n) for n in self.experiment.eval_pairs]
            columns = [(f"{n} pairs", ".3f", ("final", "by_pairs", n, "accuracy")) for n in pairs]
        else:
            names = {"loss": "loss", "bits": "bits a byte", "hit_loss": "AR-hit loss", "rest_loss": "other loss"}
            columns = [(name, ".3f", ("final", key)) for key, name in names.items()]
        columns.append(("residual ratio", ".3f", ("residual", "mean")))
        columns.append(("geometric", ".2g", ("residual", "geometric")))
        header = ["model", *(name for name, _, _ in columns), "state, bytes", "parameters", "tokens/s"]
        rows = [
            [
                model,
                *(self.values(model, *path).text(form) for _, form, path in columns),
                f"{runs[0]['state_bytes']:,}",
                f"{runs[0]['parameters']:,}",
                f"{self.values(model, 'tokens_per_second').mean:,.0f}",
            ]
            for model, runs in self.runs.items()
        ]
        return header, rows

    def remarks(self) -> list[str]:
        """What the table says and does not say."""
        e = self.experiment
        baseline, *others = e.models
        seeds = f"mean ± half the range over {e.seeds} seeds" if e.seeds > 1 else "one seed"
        if self.mqar:
            lines = [f"Recall accuracy by number of pairs in a held-out sequence, trained at {e.num_pairs}; {seeds}."]
        else:
            lines = [f"Losses in nats on held-out text; AR-hit: bytes that complete a bigram seen before in the same "
                     f"context; {seeds}."]  # fmt: skip
        differences = []
        for model in others:
            pairs = zip(*(self.values(name, *self.headline).each for name in (model, baseline)), strict=True)
            gain = Values(tuple(a - b for a, b in pairs))
            better = sum(x > 0 if self.mqar else x < 0 for x in gain.each)
            differences.append(f"{model} {gain.mean:+.3f} (better in {better} of {e.seeds})")
        if differences:
            what = f"accuracy at {e.num_pairs} pairs" if self.mqar else "loss"
            lines.append(f"Difference in {what} from {baseline}, seed by seed: {', '.join(differences)}.")
        if self.mqar:
            low = {name: sum(x < 0.5 for x in self.values(name, *self.headline).each) for name in e.models}
            if any(low.values()):
                counts = ", ".join(f"{name} {n} of {e.seeds}" for name, n in low.items() if n)
                lines.append(
                    f"Not learned in {e.steps:,} steps (accuracy below .5): {counts}. A mean over such runs says when "
                    "a model learns rather than how much it recalls; more steps (--full) tell the two apart."
                )
        if e.d_max is not None and any(name.startswith(("osdn", "os-", "static", "forget")) for name in e.models):
            lines.append(f"The box of every preconditioned model ends at {e.d_max:g} here, whatever its preset says.")
        missing = [name for name in _CONTROLS if name not in e.models]
        if missing and any(name.startswith(("osdn", "os-")) for name in e.models):
            lines.append(
                f"Controls not in this run: {', '.join(missing)}. Without them a gain cannot be credited to the online "
                "preconditioner: a larger step, a learned d or the forget gate alone may bring it as well."
            )
        return lines

    def markdown(self) -> str:
        header, rows = self.table()
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([self.title, table, *self.remarks()]) + "\n"

    def rich(self) -> Table:
        """For a terminal: models side by side, which fits 80 columns for up to four of them."""
        header, rows = self.table()
        table = Table(title=self.title)
        for name, *cells in zip(header, *rows, strict=True):
            if name == header[0]:
                table.add_column("")
                for model in cells:
                    table.add_column(model, justify="right")
            else:
                table.add_row(name, *cells)
        return table

    def figure(self) -> bytes:
        """PNG: the headline against steps, what it is made of, and against state bytes; thick lines and dots are means,
        bands and bars the range over seeds, thin lines the seeds."""
        e = self.experiment
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        steps, parts, size = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        what = f"recall accuracy at {e.num_pairs} pairs" if self.mqar else "loss, nats a byte"
        key = "accuracy" if self.mqar else "loss"
        for i, model in enumerate(e.models):
            aside = i - (len(e.models) - 1) / 2  # keeps bars of equal height apart
            color, runs = _COLORS[i % len(_COLORS)], self.runs[model]
            at = [point["step"] for point in runs[0]["history"]]
            curve = [Values(tuple(run["history"][j][key] for run in runs)) for j in range(len(at))]
            steps.plot(at, [v.mean for v in curve], color=color, label=model, linewidth=2)
            for run in runs:
                steps.plot(at, [point[key] for point in run["history"]], color=color, linewidth=0.8, alpha=0.6)
            steps.fill_between(at, [min(v.each) for v in curve], [max(v.each) for v in curve], color=color, alpha=0.12)
            if self.mqar:
                pairs = e.eval_pairs
                points = [self.values(model, "final", "by_pairs", str(n), "accuracy") for n in pairs]
                _bars(parts, [n + 0.35 * aside for n in pairs], points, color, line="-")
            else:
                points = [self.values(model, "final", k) for k in ("hit_loss", "rest_loss")]
                _bars(parts, [x + 0.12 * aside for x in (0.0, 1.0)], points, color, line="")
            _bars(size, [runs[0]["state_bytes"]], [self.values(model, *self.headline)], color, line="")
        _label(steps, "training steps", f"held-out {what}")
        if self.mqar:
            _label(parts, "pairs in the sequence", "recall accuracy after training")
            parts.set_xticks(list(e.eval_pairs))
        else:
            _label(parts, "", "loss after training, nats a byte")
            parts.set_xticks([0, 1], ["AR-hit: bigram seen\nbefore in the context", "all other bytes"])
            parts.set_xlim(-0.5, 1.5)
        _label(size, "recurrent state, bytes a sequence", f"{what}")
        size.margins(x=0.35, y=0.25)
        size.ticklabel_format(useOffset=False)
        size.locator_params(axis="x", nbins=4)
        if self.mqar:
            for axes in (steps, parts, size):
                bottom, top = axes.get_ylim()
                axes.set_ylim(max(bottom, -0.03), min(top, 1.03))
        steps.legend(frameon=False)
        seeds = f"mean and range over {e.seeds} seeds" if e.seeds > 1 else "one seed"
        figure.suptitle(f"{self.title}; {seeds}", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def _bars(axes: Axes, x: Sequence[float], values: Sequence[Values], color: str, line: str) -> None:
    low, high = ([sign * (end(v.each) - v.mean) for v in values] for sign, end in ((-1, min), (1, max)))
    means = [v.mean for v in values]
    axes.errorbar(x, means, yerr=[low, high], color=color, marker="o", markersize=5, capsize=3, linestyle=line)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _short(number: str) -> str:
    """0.973 as .973"""
    return number[1:] if number.startswith("0.") else number
