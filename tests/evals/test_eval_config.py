import subprocess
import sys

import pytest

from osdn.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "takes one of tasks, table, harness, export_auto_map"),
        ("x --tasks mqar --export-auto-map", "tasks: got tasks, export_auto_map, takes one of"),
        ("--tasks mqar", "checkpoint: got none, takes a directory"),
        ("x --table y", "checkpoint: got x, takes none beside table"),
        ("x --tasks mqar nothing", "tasks: got 'nothing', takes names among perplexity, mqar, fda, fda_twice,"),
        ("x --tasks mqar mqar", "tasks: got mqar mqar, takes different ones"),
        ("x --tasks mqar --pairs 4 8 4", "pairs: got 4 8 4, takes different ones"),
        ("x --tasks mqar --pairs", "pairs: got none, takes one or more"),
        ("x --tasks mqar --batch-size 0", "batch_size: got 0, takes an int >= 1"),
        ("x --tasks mqar --limit -1", "limit: got -1, takes an int >= 0"),
        ("x --tasks perplexity", "text: got none, takes files to compute the perplexity of"),
        ("x --tasks perplexity --text y --held-out 0", "held_out: got 0.0, takes a share in (0, 1]"),
        ("x --tasks mqar --text y", "text: got ('y',), takes a task beside it: perplexity"),
        ("x --tasks mqar --cloze y", "cloze: got y, takes a task beside it: fda, fda_twice,"),
        ("x --tasks perplexity --text y --window 9", "window: got 9, takes a task beside it: fda, fda_twice,"),
        ("x --tasks fda --seq-len 9", "seq_len: got 9, takes a task beside it: mqar"),
        ("--table x --limit 9", "limit: got 9, takes a task beside it: perplexity, mqar,"),
        ("x --out y --harness --tasks z", "out: got y, takes none beside harness and export_auto_map"),
        ("x --tasks perplexity --text y --block-size 9", "bucket_size: got 2048, takes at most block_size = 9"),
        ("x --tasks mqar", "osdn: x: does not exist, takes the directory of a checkpoint"),
        ("x --harness --tasks y", "osdn: x: does not exist, takes the directory of a checkpoint"),
        ("x --export-auto-map", "osdn: x: does not exist, takes the directory of a checkpoint"),
        ("--table x", "table: got x, which cannot be read (No such file"),
    ],
)
def test_a_bad_request_says_what_it_takes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("osdn: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_help_imports_neither_torch_nor_lm_eval():
    # `import osdn` brings torch; this one alone is to bring nothing beyond it.
    program = (
        "import sys, osdn; before = set(sys.modules); import osdn.evals.config; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"lm_eval", "datasets", "matplotlib", "tokenizers", "pandas"}
