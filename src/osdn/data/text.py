"""Byte-level language modelling on local files; by default the sources of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCAB_SIZE = 256
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_END = b"\0"  # closes every document


@dataclass(frozen=True, eq=False)
class ByteText:
    """Documents as two rows of bytes, one to train on, one held out. A token is a byte; byte 0 closes a document.

    train, held_out: uint8 arrays. sources: "<files> files, <bytes> bytes" of both, for people.
    """

    train: np.ndarray
    held_out: np.ndarray
    sources: str

    @classmethod
    def load(cls, data: Sequence[Path] = (), eval_data: Sequence[Path] = ()) -> ByteText:
        """Read files, and every file below directories (hidden ones apart), in any encoding.

        data: what to train on; empty means the `*.py` files of the running interpreter's standard library, without
            its tests. eval_data: what to evaluate on. Without it a tenth of the files is held out, those whose
            relative paths have the smallest SHA-256, so that the choice does not depend on any order; of one single
            file, its last tenth.

        Raises ValueError, naming the path, for one that cannot be read, holds no bytes, or stands on both sides.
        """
        files = find_files("data", data) if data else standard_library()
        if eval_data:
            held = find_files("eval_data", eval_data)
            if both := sorted(files.keys() & held.keys()):
                raise ValueError(f"eval_data: got {both[0]}, which is in data too; takes files that are not trained on")
        elif len(files) == 1:
            text = _read("data", files)
            cut = len(text) - len(text) // 10
            return cls(text[:cut], text[cut:], f"1 file, {len(text):,} bytes, the last tenth held out")
        else:
            ranked = sorted(files, key=lambda f: (hashlib.sha256(files[f].encode()).digest(), f))
            held = {f: files[f] for f in ranked[: max(1, len(files) // 10)]}
            files = {f: name for f, name in files.items() if f not in held}
        train, held_out = _read("data", files), _read("eval_data" if eval_data else "data", held)
        return cls(
            train,
            held_out,
            f"{len(files)} file(s), {len(train):,} bytes; held out {len(held)} file(s), {len(held_out):,} bytes",
        )

    @property
    def digest(self) -> str:
        """SHA-256 of both parts: what a result must be traced to."""
        parts = (hashlib.sha256(x.tobytes()).digest() for x in (self.train, self.held_out))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def require(self, seq_len: int) -> None:
        """Raises ValueError where a part is shorter than one sequence."""
        for name, text in (("data", self.train), ("eval_data", self.held_out)):
            if len(text) < seq_len:
                raise ValueError(f"{name}: got {len(text)} bytes ({self.sources}), takes at least seq_len = {seq_len}")

    def batch(self, n: int, seq_len: int, *, seed: int, step: int = 0) -> Tensor:
        """`[n, seq_len]` int64: n crops of the training text at uniform offsets, a function of (seed, step)."""
        offsets = np.random.default_rng([seed, step]).integers(0, len(self.train) - seq_len + 1, size=n)
        return torch.from_numpy(self.train[offsets[:, None] + np.arange(seq_len)].astype(np.int64))

    def blocks(self, n: int, seq_len: int) -> Tensor:
        """`[min(n, all), seq_len]` int64: fixed disjoint blocks of the held-out text, evenly spread over it."""
        return spread_blocks(self.held_out, n, seq_len)


def spread_blocks(tokens: np.ndarray, n: int, seq_len: int) -> Tensor:
    """`[min(n, all), seq_len]` int64: disjoint blocks of the row `tokens`, evenly spread over it; at least one fits."""
    total = len(tokens) // seq_len
    starts = np.arange(min(n, total)) * total // min(n, total) * seq_len
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len)].astype(np.int64))


def read_bytes(argument: str, path: Path, most: int) -> bytes:
    """A file, or all files below a directory, byte 0 behind each.

    Raises ValueError naming `argument` and the path where that cannot be read, or holds nothing or more than `most`.
    """
    files = find_files(argument, [path])
    if (size := sum(file.stat().st_size for file in files)) > most:
        raise ValueError(f"{argument}: got {path} of {size:,} bytes, takes at most {most:,}; a sample of it will do")
    return _read(argument, files).tobytes()


def read_text(argument: str, path: Path) -> str:
    """Raises ValueError naming `argument` and the path where that cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise _unreadable(argument, path, error) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: got {path}, which is not UTF-8 at byte {error.start}; takes UTF-8") from None


def ar_hits(ids: Tensor) -> Tensor:
    """Zoology's AR-hit slice: the tokens that recall of the context can predict.

    ids: `[B, T]` integers >= 0, below 2^31. Returns bool `[B, T]`, True at t where the bigram (ids[t-1], ids[t]) stood
    earlier in the same row: some u < t has ids[u-1] = ids[t-1] and ids[u] = ids[t].
    """
    bigram = ids[:, :-1] * (int(ids.max()) + 1) + ids[:, 1:]
    # In a stable order a bigram seen before stands right behind an equal one.
    value, order = bigram.sort(dim=1, stable=True)
    repeated = torch.zeros_like(value, dtype=torch.bool)
    repeated[:, 1:] = value[:, 1:] == value[:, :-1]
    hits = torch.zeros_like(ids, dtype=torch.bool)
    hits[:, 1:] = torch.zeros_like(repeated).scatter(1, order, repeated)
    return hits


def find_files(argument: str, paths: Sequence[Path]) -> dict[Path, str]:
    """Resolved file -> its name relative to the path it was given by, sorted."""
    found: dict[Path, str] = {}
    for path in paths:
        if path.is_file():
            if path.stat().st_size == 0:
                raise ValueError(f"{argument}: got {path}, which is empty; takes files with text")
            found[path.resolve()] = path.name
        elif path.is_dir():
            try:
                inside = {f.resolve(): f.relative_to(path).as_posix() for f in _walk(path, skip=set())}
            except OSError as error:
                raise _unreadable(argument, path, error) from None
            if not inside:
                raise ValueError(f"{argument}: got {path}, a directory without non-empty files; takes files with text")
            found |= inside
        else:
            raise ValueError(f"{argument}: got {path}, which does not exist; takes files and directories")
    return dict(sorted(found.items()))


def standard_library() -> dict[Path, str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {f: f.relative_to(root).as_posix() for f in _walk(root, _NOT_LIBRARY) if f.suffix == ".py"}
    if not files:
        raise ValueError(f"data: got no sources in {root} (this Python ships without them); takes --data PATH...")
    return files


def _walk(root: Path, skip: set[str]) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name in skip:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, skip)
        elif path.is_file() and path.stat().st_size:
            yield path


def _read(argument: str, files: dict[Path, str]) -> np.ndarray:
    text = bytearray()
    for path in files:
        try:
            text += path.read_bytes() + _END
        except OSError as error:
            raise _unreadable(argument, path, error) from None
    return np.frombuffer(text, dtype=np.uint8)


def _unreadable(argument: str, path: Path, error: OSError) -> ValueError:
    return ValueError(f"{argument}: got {path}, which cannot be read ({error.strerror}); takes readable files")
