import io
import math

import pytest
from rich.console import Console

from osdn.compare import Experiment
from osdn.compare.report import Summary, Values

ORIGIN = {
    "from_step": 0,
    "device": "a machine",
    "versions": {"python": "3.11", "torch": "2.13"},
    "commit": 40 * "c",
    "source_sha256": 64 * "s",
}


def result(model, seed, accuracy, loss):
    score = {"accuracy": accuracy, "loss": loss, "bits": loss / 0.7, "hit_loss": loss / 2, "rest_loss": loss * 2}
    return {
        "model": model,
        "seed": seed,
        "history": [{"step": 0, "accuracy": 0.0, "loss": 5.0}, {"step": 9, "accuracy": accuracy, "loss": loss}],
        "final": score | {"by_pairs": {"4": {"accuracy": 1.0}, "24": {"accuracy": accuracy}}},
        "residual": {"mean": 0.25, "geometric": 1.5e-7},
        "parameters": 148736,
        "state_bytes": 11264 + len(model),
        "tokens_per_second": 20000.0 + seed,
        "origin": [ORIGIN],
    }


RESULTS = [
    result("deltanet", 0, accuracy=0.90, loss=1.0),
    result("deltanet", 1, accuracy=0.96, loss=0.8),
    result("osdn", 0, accuracy=0.95, loss=0.9),
    result("osdn", 1, accuracy=0.92, loss=0.7),
]


def summary(task="mqar", models=("deltanet", "osdn"), baselines=()):
    return Summary(Experiment(task=task, models=models, eval_pairs=(4, 24), steps=9).resolved(), RESULTS, baselines)


def a_grid(gains, lengths=(2, 4)):
    """Five seeds of a baseline, of a control that is better by .01, and of a model that is better by `gains`."""
    results = []
    for seed, gain in enumerate(gains):
        base = 0.8 + 0.03 * seed
        for model, accuracy in (("deltanet", base), ("beta2", base + 0.01), ("osdn", base + gain)):
            one = result(model, seed, accuracy, loss=1.0)
            one["final"]["by_length"] = {str(128 * m): {"accuracy": accuracy / m, "loss": 1.0} for m in lengths}
            results.append(one)
    experiment = Experiment(
        models=("deltanet", "beta2", "osdn"), seeds=len(gains), eval_pairs=(4, 24), eval_lengths=lengths
    )
    return Summary(experiment.resolved(), results, ("deltanet", "beta2"))


def test_values():
    assert Values((0.9, 0.96)).text(".3f") == ".930 ±.030"
    assert Values((0.5, 1.0, 0.6)).text(".2f") == ".70 ±.66"
    assert Values((1.0, 1.0)).text(".3f") == "1.000 ±.000"
    assert Values((0.25,)).text(".3f") == ".250"


def test_intervals():
    # Student's t of 4 degrees of freedom: 2.776; standard deviation of 1 .. 5: sqrt(2.5).
    assert Values((1.0, 2.0, 3.0, 4.0, 5.0)).half_interval == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)
    assert Values((0.5, 0.5, 0.5)).half_interval == 0
    assert math.isnan(Values((0.5,)).half_interval)
    assert Values((0.25, 0.5, 0.75)).text(".3f") == ".500 ±.621"
    assert Values((0.25, 0.5, 0.75)).interval_text() == "+.500 [-.121, +1.121]"
    assert Values((-0.25,)).interval_text() == "-.250"


def test_differences_are_paired():
    gains = (0.02, 0.03, 0.02, 0.03, 0.025)
    tables = {table.title: table for table in a_grid(gains).tables()}
    differences = tables["Difference in accuracy at 24 pairs, seed by seed: mean and 95% t-interval"]
    assert differences.header == ["model", "minus deltanet", "minus beta2"]
    # Seeds differ by .12, gains by .01 alone: unpaired intervals would hold 0.
    assert differences.rows == [
        ["deltanet", "", "-.010 [-.010, -.010]"],
        ["beta2", "+.010 [+.010, +.010]", ""],
        ["osdn", "+.025 [+.019, +.031]", "+.015 [+.009, +.021]"],
    ]
    assert "Difference in accuracy at T = 512, seed by seed: mean and 95% t-interval" in tables
    [by_length] = [table for title, table in tables.items() if title.startswith("Length extrapolation")]
    assert by_length.header == ["model", "T = 128", "T = 256", "T = 512"]
    assert by_length.rows[0][1:] == [".860 ±.059", ".430 ±.029", ".215 ±.015"]
    assert tables[a_grid(gains).title].rows[0][1] == "5"
    assert all(table.markdown() in a_grid(gains).markdown() for table in tables.values())


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((0.02, 0.03, 0.02, 0.03, 0.025), "osdn"), ((0.002, 0.003, 0.002, 0.003, 0.002), "none")],
)
def test_what_beats_every_baseline(gains, verdict):
    """The second is better than DeltaNet, for certain, and worse than the control."""
    lines = a_grid(gains).remarks()
    assert f"at 24 pairs than deltanet, beta2, by an interval without 0 for each: {verdict}." in "\n".join(lines)
    assert "Intervals are not corrected for the number of comparisons." in lines


def test_a_figure_of_many():
    models = tuple(f"osdn[eta={i}]" for i in range(9))
    results = [result(m, 0, 0.9 + 0.01 * i, 1.0) for i, m in enumerate(models)]
    for one in results:
        one["final"]["by_length"] = {"256": {"accuracy": 0.5}}
    experiment = Experiment(models=models, seeds=1, eval_pairs=(4, 24), eval_lengths=(2,)).resolved()
    many = Summary(experiment, results)
    assert many.figure().startswith(b"\x89PNG")
    assert many.for_terminal() == [many.markdown()]


def test_one_seed_has_no_differences():
    one = Summary(Experiment(models=("deltanet", "osdn"), seeds=1, eval_pairs=(4, 24)).resolved(), RESULTS[::2])
    assert [table.title for table in one.tables()] == [one.title]
    assert len(summary().tables()) == 2


def test_table():
    _, header, rows = summary().tables()[0]
    assert header[:6] == ["model", "n", "4 pairs", "24 pairs", "residual ratio", "geometric"]
    assert header[6:] == ["state, bytes", "parameters", "tokens/s"]
    assert rows[0][:5] == ["deltanet", "2", "1.000 ±.000", ".930 ±.030", ".250 ±.000"]
    assert rows[0][5:] == ["1.5e-07 ±0", "11,272", "148,736", "20,000"]
    _, header, rows = summary("text").tables()[0]
    assert header[2:6] == ["loss", "bits a byte", "AR-hit loss", "other loss"]
    assert rows[1][2] == ".800 ±.100"


def test_remarks_say_which_is_better_and_what_is_missing():
    text = "\n".join(summary().remarks())
    assert "trained at 24; mean ± half the range over 2 seeds" in text
    assert "Better in accuracy at 24 pairs than deltanet, by an interval without 0 for each: none." in text
    assert "Seeds in which it is better, of 2: osdn 1." in text
    assert "not corrected" not in text
    assert "Not learned" not in text
    low = Summary(summary().experiment, [*RESULTS[:2], result("osdn", 0, 0.49, 3.0), RESULTS[3]]).remarks()
    assert "Not learned in 9 steps (accuracy below .5): osdn 1 of 2." in low[2]
    assert "Controls not in this run: beta2, static, forget-only, gdn." in text
    assert "Seeds in which it is better, of 2: osdn 2." in "\n".join(summary("text").remarks())
    assert text.endswith(
        "Trained on: a machine, python 3.11 torch 2.13, commit cccccccccccc, sources ssssssssssss, 4 runs."
    )
    assert "Controls" not in "\n".join(summary(models=("deltanet",)).remarks())


@pytest.mark.parametrize("task", ["mqar", "text"])
def test_rendered(task):
    console = Console(file=io.StringIO(), width=80)
    console.print(summary(task).rich())
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "deltanet" in shown
    assert (" .930 ±.030 │" if task == "mqar" else " .900 ±.100 │") in shown
    markdown = summary(task).markdown().splitlines()
    assert markdown[2].count("|") == markdown[3].count("|") == markdown[5].count("|")
    assert summary(task).figure().startswith(b"\x89PNG")
