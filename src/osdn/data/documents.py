"""Documents: files read one after the other, or a dataset by name; to train on them, `datasets` keeps the place."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from osdn.data.text import find_files, read_text, standard_library
from osdn.runs import first_line

if TYPE_CHECKING:
    import datasets

_GLOB = re.compile(r"[*?\[]")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Documents(NamedTuple):
    """source: an iterable dataset whose examples hold a text in `text_field`. name: what it is, without its place on
    the disk. sizes: a digest of the sizes of its files, empty for a dataset by name."""

    source: datasets.IterableDataset
    text_field: str
    name: str
    sizes: str


def open_documents(
    argument: str, data: Sequence[str], *, subset: str | None = None, split: str = "train", text_field: str = "text"
) -> Documents:
    """The documents of `data`, not yet read.

    data: files, directories and globs; a `.jsonl` file holds a document a line and a `.parquet` file one a row, under
        `text_field`, any other file is one document of UTF-8 text. Or one name of a dataset, of which `subset` and
        `split` are streamed. Empty: the sources of Python's standard library, without its tests.

    Raises ValueError, naming `argument`: for what is missing, empty or cannot be read, now or, where the content is at
    fault (not UTF-8, not JSON, no such field), when it is come to; then with the file and the line.
    """
    import datasets

    if len(data) == 1 and not Path(data[0]).exists() and _NAME.fullmatch(data[0]) and not Path(data[0]).suffix:
        try:
            source = datasets.load_dataset(data[0], subset, split=split, streaming=True)
        except Exception as error:  # whatever `datasets`, the hub or the network have to say
            takes = "files, globs, or the name of a dataset that can be loaded"
            raise ValueError(f"{argument}: got {data[0]!r} ({first_line(error)}); takes {takes}") from error
        return Documents(source, text_field, "/".join(filter(None, (data[0], subset, split))), "")

    files = find_documents(argument, data)
    digest = _digest(sorted(files.values()))
    sizes = _digest([f"{name} {path.stat().st_size}" for path, name in sorted(files.items(), key=lambda x: x[1])])
    arguments = {"files": [str(f) for f in files], "argument": argument, "text_field": text_field}
    source = datasets.IterableDataset.from_generator(_examples, gen_kwargs=arguments)
    return Documents(source, text_field, f"{len(files)} file(s) {digest}", sizes)


def find_documents(argument: str, data: Sequence[str]) -> dict[Path, str]:
    """`osdn.data.text.find_files` of paths and globs; of none, the standard library's sources."""
    if not data:
        return standard_library()
    paths = []
    for name in data:
        is_glob = _GLOB.search(name) and not Path(name).exists()
        found = sorted(glob(name, recursive=True)) if is_glob else [name]  # noqa: PTH207, also absolute ones
        if not found:
            raise ValueError(f"{argument}: got {name!r}, which matches nothing; takes files and globs")
        paths += [Path(path) for path in found]
    return find_files(argument, paths)


def read_documents(argument: str, files: Iterable[Path], text_field: str) -> Iterator[str]:
    """The documents of files one after the other, see `open_documents`, with its errors where the content is at
    fault."""
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    for path in files:
        if (suffix := path.suffix.lower()) not in readers:
            yield read_text(argument, path)
            continue
        try:
            yield from readers[suffix](path, text_field)
        except (OSError, ValueError) as error:
            raise ValueError(f"{argument}: got {path}{error}") from None


def is_held_out(text: str, share: float) -> bool:
    """True for `share` of all texts, always the same ones: equal documents are never on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2.0**64


def check_characters(text: str, where: str) -> None:
    """Raises ValueError, beginning with `where`, for half of a character, which JSON has as an escape, and no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{where}: {half!a}, half of a character; takes Unicode text") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """What stands in each line, with its number, blank ones apart. ValueError, ", line <n>: ..", where one is not JSON
    in UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f", line {number}: not UTF-8 at byte {error.start} of it; takes UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f", line {number}: not JSON ({error.msg}); takes an object a line") from None
            yield number, value


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _examples(files: list[str], argument: str, text_field: str) -> Iterator[dict[str, str]]:
    for text in read_documents(argument, map(Path, files), text_field):
        yield {text_field: text}


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, document in json_lines(path):
        if not isinstance(document, dict) or not isinstance(document.get(text_field), str):
            raise ValueError(f", line {number}: no text in field {text_field!r}; --text-field names another")
        check_characters(document[text_field], f", line {number}")
        yield document[text_field]


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(", Parquet, which needs `pip install 'osdn[train]'`") from None
    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f", not a whole Parquet file ({first_line(error)})") from None
    if text_field not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise ValueError(f", no column {text_field!r} among {names}; --text-field names another")
    if file.metadata.num_rows == 0:
        raise ValueError(", without rows; takes files with text")
    for batch in file.iter_batches(batch_size=1000, columns=[text_field]):
        for row, text in enumerate(batch.column(0).to_pylist()):
            if not isinstance(text, str):
                raise ValueError(f", row {row} of a batch: {text!r} in column {text_field!r}; takes text")
            yield text
