"""Documents to evaluate on: text files and JSON lines, in UTF-8, or a data set of the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osdn.data.text import find_files


def read_documents(argument: str, paths: Sequence[Path]) -> tuple[list[str], dict[str, Any]]:
    """Texts of files and of every file below directories, a .jsonl file giving one for each line; and their origin.

    Raises ValueError, naming `argument` and the file, for one that cannot be read, is empty or not UTF-8.
    """
    documents = list[str]()
    files = find_files(argument, paths)
    for file in files:
        if file.suffix == ".jsonl":
            documents += [row["text"] for row in read_jsonl(argument, file, ("text",))]
        else:
            documents.append(read_text(argument, file))
    return documents, {"sha256": digest(documents), "sources": f"{len(files)} file(s)"}


def read_text(argument: str, path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: got {path}, which is not UTF-8 at byte {error.start}; takes UTF-8") from None


def read_jsonl(
    argument: str, path: Path, fields: Sequence[str], may_be_blank: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One object a line, blank lines apart; see `check_fields`.

    Raises ValueError with the number of the first line where that does not hold.
    """
    rows = list[dict[str, Any]]()
    for number, line in enumerate(read_text(argument, path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            check_fields(row, fields, may_be_blank, f"{argument}: got {path}, line {number}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{argument}: got {path}, without a line; takes JSON objects with {', '.join(fields)}")
    return rows


def check_fields(row: Any, fields: Sequence[str], may_be_blank: Sequence[str], where: str) -> None:
    """Raises ValueError, beginning with `where`, unless `row` is an object whose `fields` are strings, none blank but
    those that may be."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}, which is no JSON object; takes one with {', '.join(fields)}")
    for name in fields:
        if not isinstance(row.get(name), str) or not (row[name].strip() or name in may_be_blank):
            got = repr(row[name]) if name in row else "nothing"
            raise ValueError(f"{where}, with {got} as {name!r}; takes a string that is not blank")


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts: what a result must be traced to."""
    parts = (hashlib.sha256(text.encode()).digest() for text in texts)
    return hashlib.sha256(b"".join(parts)).hexdigest()
