"""The results of all jobs as one JSON, a few tables, one figure."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table as RichTable
from scipy import stats

from osdn.compare.config import CONTROLS, Experiment

Result = dict[str, Any]
Path = tuple[str, ...]
COLORS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", "--", ":")
_FEW = 4  # models that fit a terminal side by side, and a figure with every seed drawn


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

    @property
    def half_interval(self) -> float:
        """Half the 95% confidence interval of the mean, Student's t with n - 1 degrees of freedom; NaN for n = 1."""
        n = len(self.each)
        if n < 2:
            return math.nan
        return float(stats.t.ppf(0.975, n - 1)) * stdev(self.each) / math.sqrt(n)

    def minus(self, other: Values) -> Values:
        """Seed by seed."""
        return Values(tuple(a - b for a, b in zip(self.each, other.each, strict=True)))

    def text(self, form: str) -> str:
        """Mean and spread: half the range of two seeds, of which no interval says anything, then `half_interval`."""
        n = len(self.each)
        spread = self.half_range if n == 2 else self.half_interval
        return _short(format(self.mean, form)) + (f" ±{_short(format(spread, form))}" if n > 1 else "")

    def interval_text(self) -> str:
        """Mean and interval, signed."""
        low, high = (self.mean + sign * self.half_interval for sign in (-1, 1))
        ends = f" [{_signed(low)}, {_signed(high)}]" if len(self.each) > 1 else ""
        return _signed(self.mean) + ends


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Summary:
    """Finished jobs, grouped by model. `results`: the contents of every job's result file; `baselines`: the models that
    others are compared with, by default the first.
    """

    def __init__(self, experiment: Experiment, results: Sequence[Result], baselines: Sequence[str] = ()) -> None:
        self.experiment = experiment
        self.mqar = experiment.task == "mqar"
        self.baselines = tuple(baselines) or experiment.models[:1]
        self.runs = {name: [r for r in results if r["model"] == name] for name in experiment.models}

    def values(self, model: str, *path: str) -> Values:
        """What stands under `path` in the result of every seed."""
        numbers: list[Any] = list(self.runs[model])
        for key in path:
            numbers = [inside[key] for inside in numbers]
        return Values(tuple(numbers))

    @property
    def key(self) -> str:
        return "accuracy" if self.mqar else "loss"

    @property
    def headline(self) -> Path:
        """Path of the number by which models are compared: accuracy at the trained number of pairs, or the loss."""
        return "final", self.key

    @property
    def outcomes(self) -> dict[str, Path]:
        """By what models are compared, the headline first: then with the most pairs, and at the greatest length."""
        e = self.experiment
        if not self.mqar:
            out = {"loss": self.headline}
        else:
            out = {f"accuracy at {e.num_pairs} pairs": self.headline}
            if e.eval_pairs and e.eval_pairs[-1] > e.num_pairs:
                most = str(e.eval_pairs[-1])
                out[f"accuracy at {most} pairs"] = ("final", "by_pairs", most, self.key)
        if e.eval_lengths and e.eval_lengths[-1] > 1:
            longest = str(e.eval_lengths[-1] * e.seq_len)
            out[f"{self.key} at T = {longest}"] = ("final", "by_length", longest, self.key)
        return out

    @property
    def title(self) -> str:
        e = self.experiment
        task = f"MQAR, {e.num_pairs} pairs listed {_times(e.passes)}" if self.mqar else "Bytes of text"
        heads = f"{e.num_heads} head{'s' * (e.num_heads > 1)} of {e.head_dim}"
        return f"{task}, T = {e.seq_len}, {e.num_layers} layers, {heads}, {e.steps:,} steps of {e.batch_size} sequences"

    def tables(self) -> list[Table]:
        """Results; by length where there are longer ones; of two seeds or more, differences from each baseline."""
        return [self._results(), *self._lengths(), *self._differences()]

    def _results(self) -> Table:
        columns: list[tuple[str, str, Path]]
        if self.mqar:
            pairs = [str(n) for n in self.experiment.eval_pairs]
            columns = [(f"{n} pairs", ".3f", ("final", "by_pairs", n, "accuracy")) for n in pairs]
        else:
            names = {"loss": "loss", "bits": "bits a byte", "hit_loss": "AR-hit loss", "rest_loss": "other loss"}
            columns = [(name, ".3f", ("final", key)) for key, name in names.items()]
        columns.append(("residual ratio", ".3f", ("residual", "mean")))
        columns.append(("geometric", ".2g", ("residual", "geometric")))
        header = ["model", "n", *(name for name, _, _ in columns), "state, bytes", "parameters", "tokens/s"]
        rows = [
            [
                model,
                str(len(runs)),
                *(self.values(model, *path).text(form) for _, form, path in columns),
                f"{runs[0]['state_bytes']:,}",
                f"{runs[0]['parameters']:,}",
                f"{self.values(model, 'tokens_per_second').mean:,.0f}",
            ]
            for model, runs in self.runs.items()
        ]
        return Table(self.title, header, rows)

    def _lengths(self) -> list[Table]:
        e = self.experiment
        if not e.eval_lengths:
            return []
        paths = {e.seq_len: self.headline}
        paths |= {m * e.seq_len: ("final", "by_length", str(m * e.seq_len), self.key) for m in e.eval_lengths}
        rows = [[m, *(self.values(m, *path).text(".3f") for path in paths.values())] for m in e.models]
        what = f"{self.key} at {e.num_pairs} pairs" if self.mqar else self.key
        title = f"Length extrapolation: {what} by length, trained at T = {e.seq_len}"
        return [Table(title, ["model", *(f"T = {T:,}" for T in paths)], rows)]

    def _differences(self) -> list[Table]:
        if len(self.experiment.models) < 2 or self.experiment.seeds < 2:
            return []
        tables = []
        for what, path in self.outcomes.items():
            rows = [
                [
                    model,
                    *("" if model == b else self._difference(model, b, path).interval_text() for b in self.baselines),
                ]
                for model in self.experiment.models
                if self.baselines != (model,)
            ]
            title = f"Difference in {what}, seed by seed: mean and 95% t-interval"
            tables.append(Table(title, ["model", *(f"minus {b}" for b in self.baselines)], rows))
        return tables

    def _difference(self, model: str, baseline: str, path: Path) -> Values:
        return self.values(model, *path).minus(self.values(baseline, *path))

    def remarks(self) -> list[str]:
        """What the tables say and do not say."""
        e = self.experiment
        seeds = {
            1: "one seed",
            2: "mean ± half the range over 2 seeds",
        }.get(e.seeds, f"mean ± half the 95% t-interval over {e.seeds} seeds")
        if self.mqar:
            lines = [f"Recall accuracy by number of pairs in a held-out sequence, trained at {e.num_pairs}; {seeds}."]
        else:
            lines = [f"Losses in nats on held-out text; AR-hit: bytes that complete a bigram seen before in the same "
                     f"context; {seeds}."]  # fmt: skip
        lines += self._verdicts()
        if self.mqar:
            low = {name: sum(x < 0.5 for x in self.values(name, *self.headline).each) for name in e.models}
            if any(low.values()):
                counts = ", ".join(f"{name} {n} of {e.seeds}" for name, n in low.items() if n)
                lines.append(
                    f"Not learned in {e.steps:,} steps (accuracy below .5): {counts}. A mean over such runs says when "
                    "a model learns rather than how much it recalls; more steps (--full) tell the two apart."
                )
        if e.d_max is not None and any(name.startswith(("osdn", "os-", "static", "forget")) for name in e.models):
            lines.append(
                f"The box of every preconditioned model ends at {e.d_max:g} here, unless its name says otherwise."
            )
        missing = [name for name in CONTROLS if name not in e.models]
        if missing and any(name.startswith(("osdn", "os-")) for name in e.models):
            lines.append(
                f"Controls not in this run: {', '.join(missing)}. Without them a gain cannot be credited to the online "
                "preconditioner: a larger step, a learned d or the forget gate alone may bring it as well."
            )
        return [*lines, self._origin()]

    def _verdicts(self) -> list[str]:
        """By outcome, which models are better than all baselines."""
        e, lines = self.experiment, list[str]()
        others = [model for model in e.models if model not in self.baselines]
        sign = 1 if self.mqar else -1
        for what, path in self.outcomes.items() if others else ():
            gains = {model: [self._difference(model, b, path) for b in self.baselines] for model in others}
            clear = [m for m, by in gains.items() if all(sign * gain.mean > gain.half_interval for gain in by)]
            line = (
                f"Better in {what} than {', '.join(self.baselines)}, by an interval without 0 for each: "
                f"{', '.join(clear) or 'none'}."
            )
            if len(self.baselines) == 1:
                won = {model: sum(sign * x > 0 for x in by[0].each) for model, by in gains.items()}
                line += f" Seeds in which it is better, of {e.seeds}: {', '.join(f'{m} {n}' for m, n in won.items())}."
            lines.append(line)
        if len(others) * len(self.baselines) > 1 and e.seeds > 1:
            lines.append("Intervals are not corrected for the number of comparisons.")
        return lines

    def _origin(self) -> str:
        """Machines and states of the code that took part."""
        runs: dict[str, int] = {}
        for result in (r for of_model in self.runs.values() for r in of_model):
            for part in {_place(part): None for part in result["origin"]}:
                runs[part] = runs.get(part, 0) + 1
        return f"Trained on: {'; '.join(f'{place}, {n} runs' for place, n in runs.items())}."

    def markdown(self) -> str:
        tables = [text for t in self.tables() for text in (t.title, t.markdown())]
        return "\n\n".join([*tables, *self.remarks()]) + "\n"

    def rich(self) -> RichTable:
        """The results for a terminal: models side by side, which fits 80 columns for up to four of them."""
        results = self._results()
        table = RichTable(title=results.title)
        for name, *cells in zip(results.header, *results.rows, strict=True):
            if name == results.header[0]:
                table.add_column("")
                for model in cells:
                    table.add_column(model, justify="right")
            else:
                table.add_row(name, *cells)
        return table

    def for_terminal(self) -> list[RichTable | str]:
        """The results side by side where they fit, all else as Markdown."""
        if len(self.experiment.models) > _FEW:
            return [self.markdown()]
        return [self.rich(), *(f"\n{t.title}\n\n{t.markdown()}\n" for t in self.tables()[1:]), *self.remarks()]

    def figure(self) -> bytes:
        """PNG: the headline against steps, what it is made of, length, and error against state bytes; lines and dots
        are means. With few models bars and bands are the range over seeds, and thin lines the seeds; with many, small
        dots are the seeds."""
        e = self.experiment
        columns = 4 if e.eval_lengths else 3
        figure = Figure(figsize=(4.4 * columns, 4.4 + 0.18 * len(e.models)), layout="constrained")
        axes = list(figure.subplots(1, columns))
        steps, parts, size = axes[0], axes[1], axes[-1]
        what = f"recall accuracy at {e.num_pairs} pairs" if self.mqar else "loss, nats a byte"
        few = len(e.models) <= _FEW
        for i, model in enumerate(e.models):
            aside = (i - (len(e.models) - 1) / 2) / max(1, len(e.models) / _FEW)  # keeps bars of equal height apart
            color, line = COLORS[i % len(COLORS)], _LINES[i // len(COLORS) % len(_LINES)]
            runs = self.runs[model]
            at = [point["step"] for point in runs[0]["history"]]
            curve = [Values(tuple(run["history"][j][self.key] for run in runs)) for j in range(len(at))]
            steps.plot(at, [v.mean for v in curve], color=color, label=model, linewidth=2, linestyle=line)
            if few:
                for run in runs:
                    curve_of_run = [point[self.key] for point in run["history"]]
                    steps.plot(at, curve_of_run, color=color, linewidth=0.8, alpha=0.6)
                low, high = ([end(v.each) for v in curve] for end in (min, max))
                steps.fill_between(at, low, high, color=color, alpha=0.12)
            if self.mqar:
                points = [self.values(model, "final", "by_pairs", str(n), "accuracy") for n in e.eval_pairs]
                _points(parts, [n + 0.35 * aside for n in e.eval_pairs], points, color, line, few)
            else:
                points = [self.values(model, "final", k) for k in ("hit_loss", "rest_loss")]
                _points(parts, [x + 0.12 * aside for x in (0.0, 1.0)], points, color, "", few)
            if e.eval_lengths:
                lengths = [e.seq_len * m for m in e.eval_lengths]
                points = [self.values(model, "final", "by_length", str(T), self.key) for T in lengths]
                points = [self.values(model, *self.headline), *points]
                _points(axes[2], [T * 1.02**aside for T in (e.seq_len, *lengths)], points, color, line, few)
            score = self.values(model, *self.headline)
            if self.mqar:  # half an answer stands for none wrong
                floor = 0.5 / (e.eval_sequences * e.num_pairs)
                score = Values(tuple(max(1 - x, floor) for x in score.each))
            _points(size, [runs[0]["state_bytes"] * 1.001**aside], [score], color, "", few)
        label(steps, "training steps", f"held-out {what}")
        if self.mqar:
            label(parts, "pairs in the sequence", "recall accuracy after training")
            parts.set_xticks(list(e.eval_pairs))
            size.set_yscale("log")
            label(size, "recurrent state, bytes a sequence", f"recall error at {e.num_pairs} pairs")
        else:
            label(parts, "", "loss after training, nats a byte")
            parts.set_xticks([0, 1], ["AR-hit: bigram seen\nbefore in the context", "all other bytes"])
            parts.set_xlim(-0.5, 1.5)
            label(size, "recurrent state, bytes a sequence", what)
        if e.eval_lengths:
            label(axes[2], f"tokens in the sequence, trained at {e.seq_len}", what)
            axes[2].set_xscale("log")
            axes[2].set_xticks([e.seq_len, *(e.seq_len * m for m in e.eval_lengths)])
            axes[2].xaxis.set_major_formatter("{x:.0f}")
            axes[2].minorticks_off()
        size.margins(x=0.35)
        size.ticklabel_format(axis="x", useOffset=False)
        size.locator_params(axis="x", nbins=4)
        if self.mqar:
            for panel in axes[:-1]:
                bottom, top = panel.get_ylim()
                panel.set_ylim(max(bottom, -0.03), min(top, 1.03))
        figure.legend(loc="outside lower center", ncols=3 if len(e.models) > _FEW else _FEW, frameon=False, fontsize=8)
        seeds = f"mean and {'range over' if few else 'each of'} {e.seeds} seeds" if e.seeds > 1 else "one seed"
        figure.suptitle(f"{self.title}; {seeds}", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def _points(axes: Axes, x: Sequence[float], values: Sequence[Values], color: str, line: str, few: bool) -> None:
    """Means, with the range of each, or, as ranges of many hide each other, all that it is made of."""
    low, high = ([sign * (end(v.each) - v.mean) for v in values] for sign, end in ((-1, min), (1, max)))
    means, ranges = [v.mean for v in values], [low, high] if few else None
    axes.errorbar(x, means, yerr=ranges, color=color, marker="o", markersize=5, capsize=3, linestyle=line)
    if not few:
        for at, v in zip(x, values):
            axes.plot([at] * len(v.each), v.each, color=color, marker="o", markersize=2, linestyle="", alpha=0.5)


def label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _short(number: str) -> str:
    """0.973 as .973"""
    return number[1:] if number.startswith("0.") else number


def _signed(x: float) -> str:
    """+0.06 as +.060"""
    text = format(x, "+.3f")
    return text[0] + _short(text[1:])


def _place(part: dict[str, Any]) -> str:
    versions = " ".join(f"{name} {v}" for name, v in part["versions"].items() if name in ("python", "torch"))
    commit = "no commit known" if part["commit"] is None else f"commit {part['commit'][:12]}"
    return f"{part['device']}, {versions}, {commit}, sources {part['source_sha256'][:12]}"
