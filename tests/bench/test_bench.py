"""The benchmark on tiny shapes: what it refuses to report, what it reports, and where."""

import dataclasses
import json
import sys

import pytest
import torch

import osdn
from osdn.bench import __main__ as bench
from osdn.bench.cases import SUITES, Case, RedGateError, Shape, check_claim, gate, osdn_run
from osdn.bench.measure import interleaved, peak_memory, wall_clock
from osdn.bench.report import flatness, markdown, write

CPU = SUITES["cpu"]
SHAPE = Shape(1, 70, 1, 64, 64)
TINY = dataclasses.replace(CPU, quick={"70": SHAPE}, gates=(SHAPE,))
FREE = TINY.case("osdn")


@pytest.mark.parametrize("case", CPU.cases, ids=lambda case: case.name)
def test_every_case_passes_the_gate_and_keeps_its_claim(case):
    errors = gate(TINY, case)
    states = set() if case.function else {"S_T"} if case.preconditioner is None else {"S_T", "d_T"}
    assert set(errors) == {"o", "dq", "dk", "dv", "dbeta", "dd"} | states
    check_claim(case, CPU.inputs(CPU.quick["256"], 0))


def _scaled(x):
    o, *states = FREE.run(x)
    return (1.001 * o, *states)


def _wrong_state(x):
    o, S, d = FREE.run(x)
    return o, S, 1.001 * d


def _no_gradient_of_d(x):
    return FREE.run(dataclasses.replace(x, d=x.d.detach()))


def _nan_with_right_gradients(x):
    o, *states = FREE.run(x)
    return (o + torch.nan, *states)


@pytest.mark.parametrize("wrong", [osdn_run(None), _scaled, _wrong_state, _no_gradient_of_d, _nan_with_right_gradients])
def test_gate_turns_red_on_a_wrong_implementation(wrong):
    with pytest.raises(RedGateError, match="osdn: relative error"):
        gate(TINY, dataclasses.replace(FREE, run=wrong))


def test_a_case_may_have_tolerances_of_its_own():
    wrong = dataclasses.replace(FREE, run=_wrong_state)
    gate(TINY, dataclasses.replace(wrong, tolerances={"*": 2e-3}))
    with pytest.raises(RedGateError, match=r"0\.0001 \(d_T\)"):
        gate(TINY, dataclasses.replace(wrong, tolerances={"*": 2e-3, "d_T": 1e-4}))


def test_inputs_that_do_not_exercise_the_case_are_refused():
    def with_rule(claim, **rule):
        return Case("x", FREE.run, osdn.Preconditioner(**rule), claim)

    x = TINY.inputs(Shape(1, 256, 1, 64, 64), 0)
    check_claim(with_rule(1.0, d_min=0.9, d_max=1.1, feedback="beta_aware"), x)
    for case in (
        with_rule(1.0),  # no clip fires
        with_rule(0.0, d_min=0.9, d_max=1.1, feedback="beta_aware"),  # clips fire
        with_rule(0.0, eta=0.0),  # d stays where it was
    ):
        with pytest.raises(RedGateError, match="claims"):
            check_claim(case, x)


def test_competitors_take_turns_in_changing_order_each_behind_an_untimed_call():
    calls = []
    competitors = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleaved(competitors, 6, wall_clock)
    rounds = ["".join(calls[i : i + 6]) for i in range(0, 36, 6)]
    assert all(sorted(r) == list("aabbcc") and r[0::2] == r[1::2] for r in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 6, "b": 6, "c": 6}


def test_flatness_looks_at_long_inputs_alone():
    assert flatness({512: 9.0, 1024: 2.0, 2048: 3.0}) == 1.5
    assert flatness({512: 9.0, 1024: 2.0}) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call():
    peaks = peak_memory("cpu", "osdn, preconditioner=None", "1024", 1, 0)
    tensor = 4 * 1024 * 8 * 64
    # At least o and one copy each of q, k and v; far below what the interpreter and torch occupy.
    assert 4 * tensor < peaks["forward"] < peaks["forward+backward"] < 50 * tensor
    with pytest.raises(RuntimeError, match="'no such case' at T = 1024"):
        peak_memory("cpu", "no such case", "1024", 1, 0)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Runs the command on a suite, without the memory's child processes; its arguments are those of a user."""

    def run(suite):
        monkeypatch.setitem(SUITES, "cpu", suite)
        monkeypatch.setattr(bench, "peak_memory", lambda *_: {"forward": 70 * 1024, "forward+backward": 140 * 1024})
        monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--repeats", "2", "--out", str(tmp_path)])
        bench.main()

    return run


def test_a_run_leaves_json_and_table_and_overwrites_nothing(run_main, tmp_path, capsys):
    run_main(TINY)
    (path,) = tmp_path.glob("*.json")
    first = path.read_text()
    result = json.loads(first)
    assert {"commit", "versions", "device", "threads", "date", "load_before", "config", "shape", "claims"} < set(result)
    assert result["config"] == {"suite": "cpu", "threads": None, "quick": True, "repeats": 2, "seed": 0}
    assert result["peer"]["qualname"] == "torch_chunk_gated_delta_rule"
    assert result["peer"]["module"].startswith("transformers.models.qwen3_next")
    assert result["shape"] == {"B": 1, "H": 1, "K": 64, "V": 64, "dtype": "torch.float32"}
    assert set(result["gate"]) == set(result["cases"]) == {case.name for case in TINY.cases}
    seconds = [x for x in result["measured"] if x["what"] == "seconds"]
    assert len(seconds) == 2 * len(TINY.cases)
    assert all(len(x["samples"]) == 2 and min(x["samples"]) > 0 for x in seconds)
    table = path.with_suffix(".md").read_text()
    assert table == markdown(result)
    assert table in capsys.readouterr().out
    assert "| KiB | forward | osdn | 1.0 |" in table

    again = write(result, "second", tmp_path)
    assert again.stem == path.stem + "-2"
    assert (path.read_text(), path.with_suffix(".md").read_text()) == (first, table)
    assert again.with_suffix(".md").read_text() == "second"


def test_a_red_gate_reports_no_speed(run_main, tmp_path, capsys):
    cases = tuple(dataclasses.replace(case, run=_scaled) if case == FREE else case for case in TINY.cases)
    with pytest.raises(SystemExit, match="red gate, no speed is reported: osdn"):
        run_main(dataclasses.replace(TINY, cases=cases))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
