import re

import pytest

from osdn.cli import main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"osdn \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "compare" in capsys.readouterr().out


def test_an_out_that_is_a_file_is_one_line(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    assert main(["compare", "--steps", "1", "--out", str(file)]) == 2
    assert re.fullmatch(r"osdn: \S+config.json: cannot be read \(Not a directory\)\n", capsys.readouterr().err)
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models nothing", "models: got 'nothing', takes names among deltanet, osdn, osdn-apf,"),
        ("--num-pairs 33", "seq_len: got 128, takes at least 2 * num_pairs * (passes + 1) = 132"),
        ("--full --steps 9", "steps: got 9 beside full, takes one of the two"),
        ("--task text --data nowhere", "data: got nowhere, which does not exist"),
        ("--data a b", "data: got a b, takes task text beside it"),
        ("--grid --eval-data a", "eval_data: got a, takes task text beside it"),
        ("--task text --num-pairs 7", "num_pairs: got 7, takes task mqar beside it"),
        ("--task text --eval-pairs 4 8", "eval_pairs: got 4 8, takes task mqar beside it"),
        ("--task text --vocab-size 300", "vocab_size: got 300, takes task mqar beside it"),
        ("--task text --seq-len 99999999", "data: got "),
        ("--workers -1", "workers, checkpoint_every: got -1, 100, takes"),
        ("--seeds -1", "seeds: got -1, takes a number >= 0"),
        ("--grid --passes 2", "passes: got 2 beside grid, takes one of the two"),
        ("--grid --task text", "task: got text beside grid, takes one of the two"),
        ("--grid --models osdn --baselines beta2", "baselines: got 'beta2', takes names among osdn"),
        ("--models osdn[d_init=2", "models: got 'osdn[d_init=2', takes a preset's name or 'name[option=value"),
        ("--models osdn[eta=1,eta=2]", "models: got 'osdn[eta=1,eta=2]', takes every option once"),
        ("--models osdn[eta=1|1]", "models: got osdn[eta=1] osdn[eta=1], takes different names"),
        ("--models osdn[beta=1]", "models: got 'osdn[beta=1]' with unknown beta, takes allow_neg_eigval"),
        ("--models osdn[eta=-1]", "models: got 'osdn[eta=-1]': preconditioner.eta: got -1.0, takes"),
        ("--models osdn[head_dim=x]", "models: got 'osdn[head_dim=x]': head_dim: got 'x', takes int | None"),
        ("--models gdn[eta=1]", "models: got 'gdn[eta=1]', takes no eta: gdn has no preconditioner"),
    ],
)
def test_a_bad_request_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"osdn: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bench_is_a_subcommand(capsys):
    assert main(["bench", "--shapes", "b8-t4096-h8"]) == 2
    assert "belong to --suite gpu" in capsys.readouterr().err
