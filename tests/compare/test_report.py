import io

import pytest
from rich.console import Console

from osdn.compare import Experiment
from osdn.compare.report import Summary, Values


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
    }


RESULTS = [
    result("deltanet", 0, accuracy=0.90, loss=1.0),
    result("deltanet", 1, accuracy=0.96, loss=0.8),
    result("osdn", 0, accuracy=0.95, loss=0.9),
    result("osdn", 1, accuracy=0.92, loss=0.7),
]


def summary(task="mqar", models=("deltanet", "osdn")):
    return Summary(Experiment(task=task, models=models, eval_pairs=(4, 24), steps=9).resolved(), RESULTS)


def test_values():
    assert Values((0.9, 0.96)).text(".3f") == ".930 ±.030"
    assert Values((0.5, 1.0, 0.6)).text(".2f") == ".70 ±.25"
    assert Values((1.0, 1.0)).text(".3f") == "1.000 ±.000"
    assert Values((0.25,)).text(".3f") == ".250"


def test_table():
    header, rows = summary().table()
    assert header[:5] == ["model", "4 pairs", "24 pairs", "residual ratio", "geometric"]
    assert header[5:] == ["state, bytes", "parameters", "tokens/s"]
    assert rows[0][:4] == ["deltanet", "1.000 ±.000", ".930 ±.030", ".250 ±.000"]
    assert rows[0][4:] == ["1.5e-07 ±0", "11,272", "148,736", "20,000"]
    header, rows = summary("text").table()
    assert header[1:5] == ["loss", "bits a byte", "AR-hit loss", "other loss"]
    assert rows[1][1] == ".800 ±.100"


def test_remarks_say_which_is_better_and_what_is_missing():
    text = "\n".join(summary().remarks())
    assert "trained at 24; mean ± half the range over 2 seeds" in text
    assert "Difference in accuracy at 24 pairs from deltanet, seed by seed: osdn +0.005 (better in 1 of 2)" in text
    assert "Not learned" not in text
    low = Summary(summary().experiment, [*RESULTS[:2], result("osdn", 0, 0.49, 3.0), RESULTS[3]]).remarks()
    assert "Not learned in 9 steps (accuracy below .5): osdn 1 of 2." in low[2]
    assert "Controls not in this run: beta2, static, forget-only, gdn." in text
    assert "osdn -0.100 (better in 2 of 2)" in "\n".join(summary("text").remarks())
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
