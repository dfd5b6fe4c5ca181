"""A measurement as one HTML page that needs nothing else: pictures, and under each what it shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Layers = list[dict[str, Any]]
_RATIOS = {
    "ratio": ("as it is", "#d55e00", "-"),
    "ratio_d_one": ("d = 1", "#4d4d4d", "--"),
    "ratio_d_mean": ("mean of d", "#0072b2", ":"),
    "ratio_d_permuted": ("d permuted", "#009e73", "-."),
}
_QUANTITIES = {
    "d": ("d_t, the preconditioner, over features and heads", "Constant lines: nothing is learned online."),
    "x": ("x_t = <d_t, k_t²>, the reach of a write", "With unit keys and d = 1 it is 1."),
    "step": ("beta_t x_t, the effective step", "At 1 a write replaces what is read at its key; above 2 it diverges."),
    "lambda": ("lambda_t, the preconditioner's forgetting", "Below 1 it draws d towards 0."),
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption, footer { font-size: .9rem; color: #444; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


class Picture(NamedTuple):
    title: str
    figure: Figure
    says: str


def page(result: dict[str, Any]) -> str:
    """HTML of what `osdn diagnose` measured: `diagnose`'s content, with checkpoint, date, data and provenance."""
    tasks = result["tasks"]
    sections = "\n".join(_section(name, content, result["levels"]) for name, content in tasks.items())
    across = f'<div class="figures">{_html(_tasks(tasks))}</div>' if len(tasks) > 1 else ""
    plain = all("d" not in layer["all"] for content in tasks.values() for layer in content["layers"])
    note = "<p>This checkpoint has no preconditioner: d = 1 throughout, and there is nothing of d to show.</p>"
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>osdn diagnose: {escape(result["checkpoint"])}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>What this model writes with</h1>
<p>{escape(result["checkpoint"])}, on {escape(", ".join(tasks))}. The residual ratio of a token is
(1 &minus; beta x)&sup2;, the share of its squared error that its write leaves, against the decayed state; x is the
preconditioner d weighted by the squared key. A low ratio is not recall, and a larger step alone lowers it: hence the
lines with another d.</p>
{note if plain else ""}
{across}
{sections}
<footer>{escape(result["date"])}; {escape(result["device"])}; {escape(versions)};
commit {escape(str(result["commit"]))}. The numbers are in diagnosis.json, heads.csv and positions.csv.</footer>
</body>
</html>
"""


def _section(name: str, content: dict[str, Any], levels: Sequence[float]) -> str:
    layers: Layers = content["layers"]
    pictures = [_by_layer(layers), _by_position(layers), _by_head(layers)]
    pictures += [_fans(layers, q, levels) for q in _QUANTITIES if any(q in x["all"] for x in layers)]
    if any("at_min" in layer["all"] for layer in layers):
        pictures.append(_bounds(layers))
    size = f"{content['sequences']} sequences of {content['tokens']:,} tokens"
    return f'<h2>{escape(name)}</h2>\n<p>{size}.</p>\n<div class="figures">{_html(*pictures)}</div>\n{_table(layers)}'


def _by_layer(layers: Layers) -> Picture:
    figure, axes = _axes("layer", "residual ratio, mean")
    for key, (label, color, line) in _RATIOS.items():
        if any(key in layer["all"] for layer in layers):
            y = [layer["all"].get(key, np.nan) for layer in layers]
            axes.plot(y, color=color, linestyle=line, marker="o", markersize=4, label=label)
    axes.set_xticks(range(len(layers)) if len(layers) < 9 else range(0, len(layers), 4))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    mean = {key: _mean(layers, key) for key in _RATIOS}
    says = f"A write leaves {_n(mean['ratio'])} of its squared residual, on average over layers and heads"
    if mean["ratio_d_one"] is not None:
        says += (
            f"; with d = 1 it would leave {_n(mean['ratio_d_one'])}, with the mean of d over features "
            f"{_n(mean['ratio_d_mean'])}, with d permuted among features {_n(mean['ratio_d_permuted'])}. Where these "
            "two are as low, d acts as a scalar step and no feature needs its own."
        )
    else:
        says += ". d is 1 here, so there is nothing to take away."
    return Picture("Residual ratio by layer", figure, says)


def _by_position(layers: Layers) -> Picture:
    figure, axes = _axes("relative position in the sequence", "residual ratio, mean over layers")
    ends = ""
    for key, (label, color, line) in _RATIOS.items():
        having = [layer["positions"] for layer in layers if key in layer["all"]]
        if having:
            y = np.mean([[point[key] for point in points] for points in having], axis=0)
            axes.plot(_centres(len(y)), y, color=color, linestyle=line, label=label)
            if key == "ratio":
                ends = f"From the first to the last bin of the sequence it goes from {_n(y[0])} to {_n(y[-1])}."
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return Picture(
        "Residual ratio by relative position", figure, f"{ends} A rise says that writes wear off with length."
    )


def _by_head(layers: Layers) -> Picture:
    figure, axes = _axes("head", "layer")
    heads = max(len(layer["heads"]) for layer in layers)
    grid = np.full((len(layers), heads), np.nan)
    for i, layer in enumerate(layers):
        grid[i, : len(layer["heads"])] = [head["ratio"] for head in layer["heads"]]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(0, heads, max(1, heads // 8)))
    axes.set_yticks(range(0, len(layers), max(1, len(layers) // 8)))
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes)
    i, h = (int(x) for x in np.unravel_index(np.nanargmin(grid), grid.shape))
    lowest, highest = _n(grid[i, h]), _n(np.nanmax(grid))
    says = f"Lowest in layer {i}, head {h} ({lowest}); highest {highest}. Dark heads write most fully."
    return Picture("Residual ratio by layer and head", figure, says)


def _fans(layers: Layers, quantity: str, levels: Sequence[float]) -> Picture:
    """A panel a layer: quantiles against position."""
    what, hint = _QUANTITIES[quantity]
    shown = [(i, layer["positions"]) for i, layer in enumerate(layers) if quantity in layer["all"]]
    rows = -(-len(shown) // 2)
    figure = _figure(height=0.6 + 1.5 * rows)
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axes, (i, points) in zip(panels, shown, strict=False):
        y = np.array([point["quantiles"][quantity] for point in points]).T
        x = _centres(y.shape[1])
        for low, high in ((0, -1), (1, -2)):
            axes.fill_between(x, y[low], y[high], color="#0072b2", alpha=0.25, linewidth=0)
        axes.plot(x, y[len(y) // 2], color="#0072b2")
        axes.set_title(f"layer {i}", fontsize=9)
        axes.ticklabel_format(axis="y", useOffset=False)
        _plain(axes)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("relative position", fontsize=9)
    start, end = (np.mean([points[p]["quantiles"][quantity] for _, points in shown], axis=0) for p in (0, -1))
    middle, span = len(levels) // 2, f"{100 * levels[0]:.0f}% to {100 * levels[-1]:.0f}%"
    says = (
        f"Line: median; bands: middle half, and {span}. Over layers the median goes from {_n(start[middle])} to "
        f"{_n(end[middle])}, and the outer band ends between {_n(end[0])} and {_n(end[-1])}. {hint}"
    )
    return Picture(what, figure, says)


def _bounds(layers: Layers) -> Picture:
    figure, axes = _axes("layer", "share of features")
    for key, label, color in (("at_min", "at d_min", "#0072b2"), ("at_max", "at d_max", "#d55e00")):
        y = [layer["all"].get(key, np.nan) for layer in layers]
        axes.plot(y, color=color, marker="o", markersize=4, label=label)
    axes.set_xticks(range(len(layers)) if len(layers) < 9 else range(0, len(layers), 4))
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    low, high = _mean(layers, "at_min"), _mean(layers, "at_max")
    says = f"On average {_n(low)} of all d stand at the lower bound of the box and {_n(high)} at the upper one."
    return Picture("Features at the bounds of the box", figure, f"{says} A feature at d_min = 0 is not written.")


def _tasks(tasks: dict[str, Any]) -> Picture:
    figure, axes = _axes("", "residual ratio, mean over layers")
    width = 0.8 / len(_RATIOS)
    for j, (key, (label, color, _)) in enumerate(_RATIOS.items()):
        means_of_tasks = [_mean(content["layers"], key) for content in tasks.values()]
        y = [np.nan if mean is None else mean for mean in means_of_tasks]
        if not np.isnan(y).all():
            axes.bar(np.arange(len(y)) + width * (j - 1.5), y, width, color=color, label=label)
    axes.set_xticks(range(len(tasks)), [name[:16] for name in tasks], rotation=20)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    means = {name: _mean(content["layers"], "ratio") for name, content in tasks.items()}
    low, high = (choose(means, key=lambda name: means[name] or 0.0) for choose in (min, max))
    says = f"Lowest on {low} ({_n(means[low])}), highest on {high} ({_n(means[high])})."
    return Picture("Residual ratio by task", figure, says)


def _table(layers: Layers) -> str:
    names = list(dict.fromkeys(name for layer in layers for name in layer["all"]))
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ["layer", *names])
    rows = "".join(
        f"<tr><td>{i}</td>" + "".join(f"<td>{_n(layer['all'].get(name))}</td>" for name in names) + "</tr>"
        for i, layer in enumerate(layers)
    )
    rules = sorted({layer["rule"] for layer in layers})
    return f'<div class="table"><table><tr>{head}</tr>{rows}</table></div>\n<p>{escape("; ".join(rules))}</p>'


def _html(*pictures: Picture) -> str:
    return "\n".join(
        f"<figure><h3>{escape(p.title)}</h3>"
        f'<img alt="{escape(p.title)}" src="data:image/svg+xml;base64,{_svg(p.figure)}">'
        f"<figcaption>{escape(p.says)}</figcaption></figure>"
        for p in pictures
    )


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "osdn"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _figure(height: float = 3.0) -> Figure:
    """4 inches wide, so that text is as large on a telephone as it is here."""
    return Figure(figsize=(4, height), layout="constrained")


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = _figure()
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(layers: Layers, key: str) -> float | None:
    values = [layer["all"][key] for layer in layers if key in layer["all"]]
    return float(np.mean(values)) if values else None


def _centres(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n


def _n(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}" if abs(x) < 1e4 else f"{x:.1e}"
