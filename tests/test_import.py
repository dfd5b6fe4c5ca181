"""What a newcomer meets first: the import, the README's examples, the state of the repository."""

import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest

import osdn

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "DeltaState",
    "OSDNConfig",
    "OSDNForCausalLM",
    "OSDNModel",
    "OnlineScaledDeltaNet",
    "Preconditioner",
    "explain",
    "load_preconditioned",
    "online_scaled_delta_rule",
    "precondition",
    "precondition_model",
}

IMPORT = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Refuse())
import osdn
print(*sorted({"matplotlib", "rich", "tyro", "triton"} & set(sys.modules)))
"""


def test_import_needs_no_triton_and_leaves_the_command_line_alone():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_public_names():
    assert set(osdn.__all__) >= PUBLIC
    assert all(getattr(osdn, name).__doc__ for name in osdn.__all__)


def test_types_are_shipped():
    assert importlib.resources.files("osdn").joinpath("py.typed").is_file()


def run_blocks(markdown):
    """Executes the ```python blocks in order, each on its own: a later one may use files that an earlier one left."""
    blocks = re.findall(r"^```python\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE)
    for n, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, python block {n}", "exec"), {"__name__": "readme"})
    return len(blocks)


def test_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    fences = re.findall(r"^\s*```\s*py", text, re.MULTILINE)
    assert run_blocks(text) == len(fences), "a python block is fenced in a way that this test does not see"


def test_a_broken_readme_example_is_noticed():
    assert run_blocks("a\n```python\nx = 1\n```\nb\n```python\ny = 2\n```\n```bash\nfalse\n```\n") == 2
    with pytest.raises(ZeroDivisionError):
        run_blocks("text\n\n```python\n1 / 0\n```\n")
    with pytest.raises(NameError):
        run_blocks("```python\nx = 1\n```\n```python\nx\n```\n")


def unchecked(markdown):
    """Numbered statements that name no test, and names of tests that do not exist."""
    parts = re.split(r"^\*\*(\d+)\. ", markdown.partition("## What follows")[0], flags=re.MULTILINE)
    statements = dict(zip(parts[1::2], parts[2::2]))
    named = {n: re.findall(r"`([\w/]+\.py)::(test_\w+)`", text) for n, text in statements.items()}
    paths = {path: ROOT / "tests" / path for each in named.values() for path, _ in each}
    sources = {name: path.read_text() if path.is_file() else "" for name, path in paths.items()}
    missing = [f"{p}::{t}" for each in named.values() for p, t in each if f"def {t}(" not in sources[p]]
    return [n for n, each in named.items() if not each], missing, len(statements)


def test_the_mathematics_names_tests_that_exist():
    text = (ROOT / "docs" / "math.md").read_text()
    bare, missing, statements = unchecked(text)
    assert (bare, missing) == ([], [])
    assert statements == 18
    assert len(re.findall(r"`[^`]*test_\w+`", text)) == len(re.findall(r"`[\w/]+\.py::test_\w+`", text))


def test_a_statement_without_its_test_is_noticed():
    text = (
        "**1. One.** x\nTest: `test_import.py::test_public_names`.\n\n**2. Two.** Test: `test_import.py::test_gone`.\n"
    )
    assert unchecked(text + "**3. Three.** `nowhere/test_x.py::test_y`\n\n**4. Four.** none") == (
        ["4"],
        ["test_import.py::test_gone", "nowhere/test_x.py::test_y"],
        4,
    )


# Written so that they do not match themselves.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.~-])/([r]oot|[h]ome/\w+|[U]sers/\w+)/",
    "a registry's host": r"\b([p]ypi\.(org|python)|[p]ythonhosted|[d]ownload\.pytorch|[r]egistry\.npmjs)",
    "an open end without the issue that it waits for": r"\b([T]ODO|[F]IXME)(?!\(issue \d+\))",
}


def offences(text):
    return [what for what, pattern in FORBIDDEN.items() if re.search(pattern, text)]


def test_repository_names_no_machine_and_no_registry():
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [path for name in names if name and (path := ROOT / name).is_file() and path.suffix not in {".png", ".pt"}]
    assert len(files) > 10
    found = [f"{path}: {what}" for path in files for what in offences(path.read_text(errors="replace"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", [f"cd /{'home'}/me/main", f"'/{'root'}/.cache'", f"https://{'pypi'}.org/simple", f"# {'TO'}DO: x"]
)
def test_an_offence_is_noticed(text):
    assert len(offences(text)) == 1
    assert offences(f"src/home/main.py, ~/root/x, {'TO'}DO(issue 12): x, http://127.0.0.1/") == []
