"""Documents and questions to evaluate on, and what they are traced by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osdn.data.documents import check_characters, find_documents, is_held_out, json_lines, read_documents


def read_texts(
    argument: str, data: Sequence[str], *, text_field: str = "text", held_out: float = 1.0
) -> tuple[list[str], dict[str, Any]]:
    """The documents of files, see `osdn.data.documents.open_documents`, that are not empty; and their origin.

    held_out: share of them to take, that which training with this `held_out` leaves out.

    Raises ValueError, naming `argument` and the file, for one that cannot be read or is not UTF-8, and for nothing.
    """
    files = find_documents(argument, data)
    documents = [text for text in read_documents(argument, files, text_field) if text and is_held_out(text, held_out)]
    sources = f"{len(files)} file(s)" + (f", held-out share {held_out}" if held_out < 1 else "")
    if not documents:
        raise ValueError(f"{argument}: got {sources}, without a document; takes files with text")
    return documents, {"sha256": digest(documents), "sources": sources}


def read_jsonl(
    argument: str, path: Path, fields: Sequence[str], may_be_blank: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One object a line, blank lines apart; see `check_fields`.

    Raises ValueError with the number of the first line where that does not hold.
    """
    rows = list[dict[str, Any]]()
    try:
        for number, row in json_lines(path):
            check_fields(row, fields, may_be_blank, f", line {number}")
            rows.append(row)
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{argument}: got {path}{error}") from None
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
        check_characters(row[name], where)


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts: what a result must be traced to."""
    parts = (hashlib.sha256(text.encode()).digest() for text in texts)
    return hashlib.sha256(b"".join(parts)).hexdigest()
