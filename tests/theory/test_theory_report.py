"""Verdicts, the run directory, the command line, and the experiments that are quick enough to be run here."""

from __future__ import annotations

import csv
import json
import math
import re
from typing import get_args

import pytest
from rich.console import Console

from osdn.cli import main
from osdn.theory import memory, report
from osdn.theory.config import Name
from osdn.theory.outcome import Outcome, Panel, at_least, at_most, estimated, sampled, within


def test_sampled_accepts_three_standard_errors_and_half_a_digit():
    row = sampled("x", [1.0, 3.0], "2.5", draws=6)
    slack = 3 * 2**0.5 * (1 / 2 + 1 / 6) ** 0.5 + 0.05
    assert (row.measured, row.low, row.high) == (2.0, pytest.approx(2.5 - slack), pytest.approx(2.5 + slack))
    assert row.agrees
    assert sampled("x", [1.04, 1.04], "1.0").agrees
    assert not sampled("x", [1.06, 1.06], "1.0").agrees
    assert sampled("x", [1.06, 1.06], "1").agrees
    assert sampled("x", [104.0, 104.0], "1.0e2").agrees
    assert not sampled("x", [106.0, 106.0], "1.0e2").agrees


def test_sampled_in_the_logarithm():
    row = sampled("x", [1e-6, 1e-8], "1e-7", log=True)
    assert row.measured == pytest.approx(1e-7)
    assert row.high / 1e-7 == pytest.approx(1e-7 / row.low)
    assert not sampled("x", [1e-9, 1.1e-9], "1e-7", log=True).agrees


def test_other_verdicts():
    assert within("x", [1.0, 2.0], 1.4, 0.11, "").agrees
    assert not within("x", [1.0, 2.0], 1.4, 0.09, "").agrees
    assert at_most("x", [1.0, 2.0], 2.0, "").agrees
    assert not at_most("x", [1.0, 2.0], 1.9, "").agrees
    assert at_least("x", [1.0, 2.0], 1.0, "").agrees
    assert not at_least("x", [1.0, 2.0], 1.1, "").agrees
    assert not at_most("x", [0.5, math.nan], 1.0, "").agrees
    assert not at_least("x", [2.0, math.nan], 1.0, "").agrees
    assert not estimated("x", [1.0, 1.0], 1.2, 0.1, "").agrees
    assert estimated("x", [1.0, 1.2], 1.3, 0.0, "").agrees


def outcome(measured):
    rows = (within("one | two", [measured], 1.0, 0.1, "a reason"), at_least("never", [math.inf], 5.0, "patience"))
    panel = Panel("x", "y", {"a line": ((1, 2), (3, 4)), "bound": ((1, 2), (4, 4))}, log_x=True, log_y=True)
    return Outcome(
        "A title", (3, 4), rows, (panel, Panel("", "y", {"b": (("p", "q"), (1, 2))}, dots=True)), "gives", "lacks"
    )


@pytest.fixture
def experiments(monkeypatch):
    fake = {"T1": lambda: outcome(1.0), "S6": lambda: outcome(2.0)}
    monkeypatch.setattr(report, "EXPERIMENTS", fake)
    return fake


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_leaves_table_raw_values_and_figures(experiments, tmp_path, terminal):  # noqa: ARG001
    out = tmp_path / "new" / "run"
    with (tmp_path / "printed").open("w") as file:
        content = report.run((), out, Console(file=file, force_terminal=terminal, width=200))
    printed = (tmp_path / "printed").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["S6.png", "T1.png", "results.json", "table.csv", "table.md"]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((out / "results.json").read_text(), parse_constant=refuse) == content
    assert {"commit", "versions", "device", "date"} <= content.keys()
    assert content["experiments"]["S6"]["seeds"] == [3, 4]
    first, second = content["experiments"]["S6"]["rows"]
    assert (first["agrees"], first["each"], second["measured"], second["high"]) == (False, [2.0], "inf", "inf")
    curve, names = content["experiments"]["S6"]["panels"]
    assert (curve["lines"]["a line"], names["lines"]["b"]) == ([[1.0, 2.0], [3.0, 4.0]], [["p", "q"], [1.0, 2.0]])
    lines = list(csv.reader((out / "table.csv").read_text().splitlines()))
    assert lines[0][-2:] == ["verdict", "each"]
    assert [line[-2] for line in lines[1:]] == ["agrees", "agrees", "DISAGREES", "agrees"]
    assert lines[3] == ["S6", "one | two", "1", "2", "0.9 to 1.1", "a reason", "DISAGREES", "2.0"]
    table = (out / "table.md").read_text()
    assert "| S6 | one \\| two | 1 | 2 | 0.9 to 1.1 | a reason | DISAGREES |" in table
    for text in (table, printed):
        assert "3 of 4 rows agree with what was expected. These do not: S6: one | two." in text
        assert text.index("What the theory gives") < text.index("- S6: gives")
        assert text.index("What it does not give") < text.index("not tested by any of this") < text.index("- S6: lacks")
    assert "DISAGREES" in printed
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("T1", "S6"))


def test_a_stopped_run_keeps_what_it_has(experiments, tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setitem(experiments, "S6", stop)
    with pytest.raises(KeyboardInterrupt):
        report.run((), tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["experiments"]) == ["T1"]
    assert "| T1 |" in (tmp_path / "run" / "table.md").read_text()


def test_the_command_runs_what_it_is_asked_for(experiments, tmp_path, monkeypatch, capsys):  # noqa: ARG001
    monkeypatch.chdir(tmp_path)
    assert main(["theory", "--only", "S6"]) == 0
    [out] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"theory-\d{8}-\d{6}", out.name)
    assert list(json.loads((out / "results.json").read_text())["experiments"]) == ["S6"]
    assert str(out.relative_to(tmp_path)) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only S6 S6", "only: got S6 S6, takes different names among T1 T6"),
        ("--out held", "out: got held, which holds results.json, takes a new path"),
        ("--only S6 --out own", "out: got own, which holds table.md, S6.png, takes a new path"),
        ("--out compare", "out: got compare, which holds config.json, takes a new path"),
        ("--out file", "osdn: file/results.json: cannot be written ("),
        ("--only S99", "S99"),
    ],
)
def test_a_bad_request_is_refused_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    def work():
        raise AssertionError("work was done")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "EXPERIMENTS", dict.fromkeys(get_args(Name), work))
    (tmp_path / "file").write_text("kept")
    for name in ("held/results.json", "own/table.md", "own/T1.png", "own/S6.png", "compare/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kept")
    try:
        status = main(["theory", *arguments.split()])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.read_text() for path in files] == ["kept"] * 6


def test_every_name_is_an_experiment():
    assert set(report.EXPERIMENTS) == set(get_args(Name))


# T9 and box are in test_population.py. The others take long, or disagree in rows that the log names.
@pytest.mark.parametrize("name", ["T1", "T6", "T7", "regret", "S1", "S2", "gate", "stability", "relaxation", "newton"])
def test_quick_experiments_agree_with_the_expected_figures(name):
    outcome = report.EXPERIMENTS[name]()
    assert [row.quantity for row in outcome.rows if not row.agrees] == []
    assert outcome.rows
    assert report.figure(outcome)


def test_d_leans_the_wrong_way():
    assert report.EXPERIMENTS["S8"]().rows[-1].agrees


@pytest.mark.parametrize(
    "experiment",
    [memory.noise, memory.key_lengths, memory.covariance_switch, memory.correlated_gates, memory.one_pass_recall],
)
def test_longer_experiments_run_on_shorter_streams(experiment, monkeypatch):
    """Two seeds and 1,024 tokens: numbers of another run, but all of them."""
    monkeypatch.setattr(memory, "T", 1024)
    monkeypatch.setattr(memory, "SEEDS", range(2))
    monkeypatch.setattr(memory, "MARKS", (256,))
    monkeypatch.setattr(memory, "WARM_UP", 64)
    outcome = experiment()
    assert all(len(row.each) >= 1 and math.isfinite(row.measured) for row in outcome.rows)
    assert report.figure(outcome)
