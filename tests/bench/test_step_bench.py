"""The benchmark of whole training steps: what it compares, and that it reports no speed of a wrong operator."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest

from osdn.bench import __main__ as bench
from osdn.bench import step


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    arguments = ["bench", "--suite", "step", "--quick", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(step, "QUICK", {"20": (1, 20)})
    return bench.main


def test_a_run_leaves_json_and_table(run_main, tmp_path, capsys):
    run_main()
    (path,) = tmp_path.glob("step_*_quick.json")
    result = json.loads(path.read_text())
    assert [x["case"] for x in result["measured"]] == ["gdn", "os-gdn", step.PEER]
    assert result["gate"]["20"][step.PEER] < step.SETTINGS["cpu"].tolerance
    assert result["operators"][step.PEER].endswith(".torch_chunk_gated_delta_rule")
    assert step.markdown(result) in capsys.readouterr().out


def test_the_peer_runs_its_own_operator():
    tokens = step.torch.arange(20)[None]
    with patch.object(step, "qwen3_next", side_effect=AssertionError("called")):
        step.Step("gdn", tokens, step.SETTINGS["cpu"]).gradients()
        with pytest.raises(AssertionError, match="called"):
            step.Step(step.PEER, tokens, step.SETTINGS["cpu"]).gradients()


def test_what_a_gpu_measures_is_gated_in_bf16(monkeypatch):
    """Rounding passes: it is there, and below what a wrong operator, here of shifted outputs, does."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_heads": 2, "head_dim": 32, "vocab_size": 512}
    setting = replace(step.SETTINGS["cuda"], fields=small)
    tokens = step.torch.arange(200).view(2, 100)
    ours, peer = step.Step("gdn", tokens, setting), step.Step(step.PEER, tokens, setting)
    assert 1e-3 < step.gate(ours, peer) < 0.5 * setting.tolerance
    assert ours.model.lm_head.weight.dtype == step.torch.float32
    plain = step.qwen3_next()
    monkeypatch.setattr(step, "qwen3_next", lambda: lambda *args, **options: (plain(*args, **options)[0].roll(1, 1), 0))
    with pytest.raises(step.RedGateError, match="the gradient differs by"):
        step.gate(ours, peer)


def test_a_wrong_operator_is_red(run_main, tmp_path, monkeypatch):
    plain = step.qwen3_next()

    def wrong(*args, **kwargs):
        o, state = plain(*args, **kwargs)
        return o.roll(1, 1), state

    monkeypatch.setattr(step, "qwen3_next", lambda: wrong)
    with pytest.raises(SystemExit, match="red gate, no speed is reported: gdn and gdn, transformers' operator"):
        run_main()
    assert list(tmp_path.iterdir()) == []
