"""What all subcommands share."""

import pytest

from osdn.cli import SUBCOMMANDS, main

GOES_ON = {
    "compare": "",
    "train": "tiny_text_cpu",
    "eval": "model --tasks mqar",
}
BEGINS_ANEW = {
    "theory": "",
    "bench": "",
    "diagnose": "model --data text",
    "convert": "model out",
    "generate": "model",
    "eval": "model --harness --tasks x",
}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([name, *flags.split()], "; the same command goes on from the last checkpoints")
        for name, flags in GOES_ON.items()
    ]
    + [([name, *flags.split()], "") for name, flags in BEGINS_ANEW.items()],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_interrupted(arguments, hint, capsys, monkeypatch):
    def interrupt(self):  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(SUBCOMMANDS[arguments[0]], "run", interrupt)
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"osdn: interrupted{hint}\n"


def test_an_option_given_twice_loses_nothing_without_a_word(capsys):
    for again in (["--prompt", "b"], ["--prompt=b"]):
        assert main(["generate", "model", "--prompt", "a", *again]) == 2
        assert capsys.readouterr().err == "osdn: --prompt: got it 2 times, takes all its values behind one\n"
    assert main(["train", "tiny_text_cpu", "--eval-data", "x", "--eval_data", "y"]) == 2
    assert capsys.readouterr().err.startswith("osdn: --eval-data: got it 2 times")
    assert main(["eval", "x", "--tasks", "mqar", "--limit", "1", "--limit", "-1"]) == 2  # of a value the last counts
    assert capsys.readouterr().err.startswith("osdn: limit: got -1")


@pytest.mark.parametrize("empty", [[""], ["a", ""], None])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("diagnose model", "--data"),
        ("compare --task text", "--data"),
        ("compare --task text", "--eval-data"),
        ("compare", "--out"),
        ("train tiny_text_cpu", "--data"),
        ("eval model --tasks perplexity", "--text"),
    ],
)
def test_an_empty_value_is_not_the_current_directory(command, option, empty, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SUBCOMMANDS[command.split()[0]], "run", lambda _: None)
    assert main([*command.split(), *([f"{option}="] if empty is None else [option, *empty])]) == 2
    assert capsys.readouterr().err == f"osdn: {option}: got '', takes no empty value\n"


def test_a_prompt_may_be_empty(monkeypatch):
    monkeypatch.setattr(SUBCOMMANDS["generate"], "run", lambda _: None)
    assert main(["generate", "model", "--prompt", ""]) == main(["generate", "model", "--prompt="]) == 0


def test_every_subcommand_is_interrupted_above():
    assert GOES_ON.keys() | BEGINS_ANEW.keys() == SUBCOMMANDS.keys()


@pytest.mark.parametrize("name", [*SUBCOMMANDS, "train tiny_text_cpu"])
def test_help_is_for_users(name, capsys):
    """No exceptions in it, and what is given by place has a name."""
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert "ValueError" not in shown
    assert "PATH" not in shown.splitlines()[0]
