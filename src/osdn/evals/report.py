"""Results side by side, if they are of the same thing: a table and a figure for each kind of task."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from osdn.bench.report import row
from osdn.compare.report import COLORS, label
from osdn.evals.results import Metric
from osdn.runs.store import write_atomic

Result = dict[str, Any]
_FIELDS = {"task", "kind", "version", "context_policy", "data", "metrics", "checkpoint"}
_OF_HARNESS = (
    *("max_length", "lm_eval_version", "chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn"),
    *("tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id"),
)
_AXES = {"perplexity": ("position in the block, tokens", "perplexity"), "mqar": ("pairs in the sequence", "accuracy")}


class Report:
    """Results of one or more checkpoints.

    Raises ValueError where two results of a task differ in version, context policy or data, or are of one checkpoint.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        first: dict[str, Result] = {}
        names: dict[tuple[str, str], set[str]] = {}
        for result in results:
            _check_comparable(first.setdefault(result["task"], result), result)
            names.setdefault((result["kind"], result["checkpoint"]["name"]), set()).add(result["checkpoint"]["sha256"])
        dtypes = {result["checkpoint"].get("dtype") for result in results} - {None}
        self.kinds: dict[str, dict[str, dict[str, Metric]]] = {}  # kind -> checkpoint -> metric
        self.notes = list[str]()
        for result in results:
            name, sha256, dtype = (result["checkpoint"].get(key) for key in ("name", "sha256", "dtype"))
            marks = [sha256 and sha256[:6]] * (len(names[result["kind"], name]) > 1) + [dtype] * (len(dtypes) > 1)
            model = f"{name} ({', '.join(filter(None, marks))})" if any(marks) else name
            column = self.kinds.setdefault(result["kind"], {}).setdefault(model, {})
            prefix = "" if result["task"] == result["kind"] else f"{result['task']} "
            if any(prefix + metric in column for metric in result["metrics"]):
                raise ValueError(f"table: got {result['task']} of {model} twice, takes one result of each")
            column |= {prefix + metric: value for metric, value in result["metrics"].items()}
            cut = ", ".join(f"{what.replace('_', ' ')} {n}" for what, n in result.get("cut", {}).items() if n)
            policy = ", ".join(f"{what} {value!r}" for what, value in result["context_policy"].items())
            note = f"{result['task']}, version {result['version']}, {model}: {policy}; cut: {cut or 'nothing'}."
            self.notes.append(note)

    def table(self, kind: str) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text: a row for each metric, a column for each checkpoint."""
        columns = self.kinds[kind]
        metrics = dict.fromkeys(metric for column in columns.values() for metric in column)
        return [kind, *columns], [[m, *(_text(c.get(m)) for c in columns.values())] for m in metrics]

    def markdown(self) -> str:
        tables = []
        for header, rows in map(self.table, self.kinds):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            tables.append("\n".join(row(*line) for line in lines))
        return "\n\n".join([*tables, "Values ± standard errors over examples.", *self.notes]) + "\n"

    def print(self, console: Console) -> None:
        if not console.is_terminal:
            console.print(self.markdown(), markup=False, highlight=False, soft_wrap=True)
            return
        for kind in self.kinds:
            header, rows = self.table(kind)
            table = Table()
            for i, name in enumerate(header):
                table.add_column(name, justify="right" if i else "left")
            for cells in rows:
                table.add_row(*cells)
            console.print(table)
        console.print("Values ± standard errors over examples.", *self.notes, sep="\n", markup=False, highlight=False)

    def figure(self, kind: str) -> bytes:
        """PNG: metrics along an axis where they have one, bars elsewhere; whiskers are standard errors."""
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        columns = self.kinds[kind]
        names = self.table(kind)[1]
        for i, (model, column) in enumerate(columns.items()):
            if kind in _AXES:
                points = {m["x"]: m for m in column.values() if "x" in m}
            else:
                at = (i - (len(columns) - 1) / 2) * 0.8 / len(columns)
                points = {j + at: column[name] for j, (name, *_) in enumerate(names) if name in column}
            values, errors = [m["value"] for m in points.values()], [m["stderr"] or 0.0 for m in points.values()]
            look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "label": model, "capsize": 3}
            if kind in _AXES:
                axes.errorbar(list(points), values, yerr=errors, marker="o", markersize=5, **look)
            else:
                axes.bar(list(points), values, yerr=errors, width=0.8 / len(columns), **look)
        label(axes, *_AXES.get(kind, ("", "score")))
        if kind not in _AXES:
            axes.set_xticks(range(len(names)), [name for name, *_ in names], rotation=20, ha="right")
        if kind in ("mqar", "recall"):
            axes.set_ylim(0, max(0.05, axes.get_ylim()[1]))
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()

    def write(self, out: Path) -> None:
        write_atomic(out / "table.md", self.markdown().encode())
        for kind in self.kinds:
            write_atomic(out / f"{kind}.png", self.figure(kind))


def show(paths: Sequence[Path], out: Path | None, console: Console | None = None) -> None:
    """Print results side by side; `out`: a directory for table and figures, too."""
    report = Report([result for path in paths for result in read_results(path)])
    if out is not None:
        report.write(out)
    report.print(console or Console())


def read_results(path: Path) -> list[Result]:
    """The result of `osdn eval` in `path`, or those that lm-evaluation-harness has put there.

    Raises ValueError, naming the path, for anything else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise ValueError(f"table: got {path}, which cannot be read ({reason}); takes results of osdn eval") from None
    if isinstance(content, dict) and content.keys() >= _FIELDS:
        return [content]
    if isinstance(content, dict) and content.keys() >= {"results", "versions", "n-shot", "n-samples", "model_name"}:
        return [_of_harness(content, task) for task in content["results"] if task in content["n-samples"]]
    raise ValueError(f"table: got {path}, which is no result; takes results of osdn eval or of lm-evaluation-harness")


def _of_harness(content: dict[str, Any], task: str) -> Result:
    scores, metrics = content["results"][task], {}
    for key, value in scores.items():
        name, _, kind = key.partition(",")
        no_score = name.isdecimal() and value == -1  # RULER has a metric for each length, run or not
        if kind and not name.endswith("_stderr") and isinstance(value, int | float) and not no_score:
            error = scores.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else f"{name} {kind}"
            metrics[label] = {"value": value, "stderr": error if isinstance(error, float) else None}
    run = content.get("config", {})
    arguments = run.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(argument.strip().partition("=")[::2] for argument in arguments.split(","))
    policy = {
        "n-shot": content["n-shot"].get(task),
        "examples": content["n-samples"][task]["effective"],
        **{name: content.get(name) for name in _OF_HARNESS},
        **{name: run.get(name) for name in ("gen_kwargs", "fewshot_seed")},
        **{name: arguments.get(name) for name in ("add_bos_token", "prefix_token_id", "chat_template_args")},
    }
    return {
        "task": task,
        "kind": "harness",
        "version": content["versions"].get(task),
        "context_policy": {name: value for name, value in policy.items() if value not in (None, "", {})},
        "task_config": _task_config(content.get("configs", {}).get(task, {}), arguments),
        "cut": {},
        "data": {"sha256": content.get("task_hashes", {}).get(task), "sources": task},
        "metrics": metrics,
        "checkpoint": {"name": content["model_name"], "sha256": run.get("model_sha") or None},
    }


def _task_config(config: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The harness' configuration of a task without what is of one run: it puts the model's arguments and the place of
    the task's file into metadata, and the addresses of some functions.
    """
    config = json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(config)))
    metadata = config.pop("metadata", None) or {}
    one_run = {"pretrained", "config_source", *arguments}
    config |= {f"metadata.{name}": value for name, value in metadata.items() if name not in one_run}
    return {f"configs.{name}": value for name, value in config.items()}


def _check_comparable(one: Result, other: Result) -> None:
    before, now = (
        {"version": result["version"], **result["context_policy"], **result.get("task_config", {})}
        for result in (one, other)
    )
    data = [result["data"]["sha256"] for result in (one, other)]
    if None not in data:  # the harness tells it with --log_samples alone
        before["data"], now["data"] = data
    unlike = [f"{k} {before.get(k)!r} and {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)]
    if unlike:
        names = " and ".join(x["checkpoint"]["name"] for x in (one, other))
        raise ValueError(f"table: got {one['task']} of {names} with {'; '.join(unlike)}; takes results of one protocol")


def _text(metric: Metric | None) -> str:
    if metric is None:
        return ""
    return f"{metric['value']:.4g}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.2g}")
