import json
import re

import pytest

from osdn.cli import main
from osdn.evals import run
from osdn.evals.perplexity import Perplexity
from osdn.evals.recall import Cloze


@pytest.fixture
def command(save, text, tmp_path):
    """Arguments of an evaluation of three tasks in batches of 2."""
    rows = [{"text": f"The word is w{i}. " + "more " * i, "key": "word", "value": f"w{i}"} for i in range(5)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("eval", str(save()), "--tasks", "perplexity", "mqar", "fda_twice", "--text", str(text)),
        *("--block-size", "100", "--bucket-size", "40", "--segment-size", "50", "--cloze", str(tmp_path / "c.jsonl")),
        *("--pairs", "2", "5", "--seq-len", "24", "--limit", "7", "--batch-size", "2", "--out"),
    ]


def results(folder):
    names = ("perplexity", "mqar", "fda_twice")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    return {name: {k: v for k, v in r.items() if k != "date"} for name, r in found.items()}


def test_end_to_end(command, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main([*command, str(out)]) == 0
    said = capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert table.strip() in said
    assert "| mqar | model |" in table
    assert "| fda_twice contains | 0" in table
    for kind in ("perplexity", "mqar", "recall"):
        assert (out / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    for name, result in results(out).items():
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert result["task"] == lines[0]["task"] == name
        assert result["version"] == lines[0]["version"] == (1 if name == "mqar" else 2)
        assert result["context_policy"].items() <= lines[0].items()
        assert sorted(line["index"] for line in lines[1:]) == list(range({"fda_twice": 5, "mqar": 14}.get(name, 7)))
        assert all({"value", "stderr", "examples"} <= metric.keys() for metric in result["metrics"].values())
        assert {"commit", "versions", "device", "threads", "cut", "data", "log"} <= result.keys()
        assert result["checkpoint"].items() >= {"name": "model", "model_type": "osdn", "dtype": "float64"}.items()

    logs = {file: file.read_bytes() for file in out.glob("*.jsonl")}
    monkeypatch.setattr(Perplexity, "score", None)
    assert main([*command, str(out)]) == 0
    assert "perplexity: 7 examples, 0 to do" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in out.glob("*.jsonl")} == logs
    assert main([*command[:3], "mqar", *command[command.index("--pairs") :], str(out)]) == 0
    assert (out / "table.md").read_text() == table  # of all that is there, not of the last call's tasks alone
    capsys.readouterr()
    assert main(["eval", "--table", *(str(out / f"{name}.json") for name in results(out))]) == 0
    assert table.strip() in capsys.readouterr().out


def test_interrupted_it_goes_on(command, tmp_path, monkeypatch, capsys):
    assert main([*command, str(tmp_path / "whole")]) == 0
    score, calls = Cloze.score, []

    def interrupted(self, model, indices):
        calls.append(list(indices))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, model, indices)

    monkeypatch.setattr(Cloze, "score", interrupted)
    out = tmp_path / "parts"
    assert main([*command, str(out)]) == 130
    log = out / "fda_twice.jsonl"
    assert log.read_text().count("\n") == 1 + 2
    log.write_bytes(log.read_bytes()[:-5])  # and killed while it wrote
    assert main([*command, str(out)]) == 0
    assert "fda_twice: 5 examples, 4 to do" in capsys.readouterr().out
    assert calls[2:] == [[3, 2], [1, 0]]
    assert results(out) == results(tmp_path / "whole")


def test_another_evaluation_is_refused_before_any_work(command, tmp_path, monkeypatch, capsys, save):
    out = tmp_path / "out"
    assert main([*command, str(out)]) == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(run.Checkpoint, "load", None)
    assert main([*command, str(out), "--window", "900"]) == 2
    assert capsys.readouterr().err.startswith(
        f"osdn: out: got {out}/fda_twice.jsonl, of another evaluation (window: 1000 there, 900 here); takes a new path"
    )
    save(seed=1)
    assert main([*command, str(out)]) == 2
    assert "checkpoint_sha256" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*command, str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"osdn: \S+perplexity.jsonl: cannot be written \(.+\)\n", capsys.readouterr().err)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
