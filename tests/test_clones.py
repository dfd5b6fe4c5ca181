"""No code twice: 12 equal lines in a row, in src or tests, are a clone. Shared code gets a name instead."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
WINDOW = 12


def code_lines(source):
    """(line number, text) of what counts; not imports, docstrings, or the signatures that interfaces share."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            skipped.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped.update(range(node.lineno, node.body[0].lineno))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and n not in skipped]


def clones(sources):
    """The first place of each run of equal lines that stands somewhere else too, with that other place."""
    seen, found, last = {}, [], None
    for name, source in sources.items():
        lines = code_lines(source)
        for i in range(len(lines) - WINDOW + 1):
            text = tuple(line for _, line in lines[i : i + WINDOW])
            here = (name, lines[i][0])
            there = seen.setdefault(text, here)
            # A longer clone is a run of windows: one report for all of it.
            if there != here and last != (name, i - 1):
                found.append(f"{name}:{here[1]} repeats {there[0]}:{there[1]}")
            if there != here:
                last = (name, i)
    return found


def test_no_new_clones():
    files = sorted(path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    found = clones({str(path.relative_to(ROOT)): path.read_text() for path in files})
    assert not found, "\n".join(found)


def test_a_clone_is_found_whatever_its_comments_and_indentation():
    body = [f"x{i} = {i}" for i in range(WINDOW)]
    one = "import os\n" + "\n".join(body)
    two = "def f():\n" + "\n".join(f"    {line}  # {line}\n" for line in body)
    assert clones({"a": one, "b": two}) == ["b:2 repeats a:2"]
    assert clones({"a": one, "b": two.replace("x7", "y7")}) == []
