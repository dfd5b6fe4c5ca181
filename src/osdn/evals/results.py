"""What a task is, the log of its examples, and what is computed from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from osdn.runs import RunError
from osdn.runs.store import differences

Record = dict[str, Any]
Metric = dict[str, Any]
_START = b'{"task": '  # of every log


class Task(Protocol):
    """Examples 0 .. len - 1, scored in batches; a record is plain JSON and names its example as `index`."""

    name: str
    kind: str  # tasks of a kind share a figure
    version: int  # to be raised when scores change their meaning: older results are then not compared with
    policy: dict[str, Any]  # the context an example is given; results of different ones are not compared
    cut: dict[str, int]  # what that left out
    data: dict[str, Any]  # sha256, sources

    def __len__(self) -> int: ...

    def order(self) -> Sequence[int]:
        """Examples, those that need the most memory first."""
        ...

    def score(self, model: Any, indices: Sequence[int]) -> list[Record]: ...

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]: ...


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Metric:
    """sum s_i / sum n_i over N examples, with its standard error.

    The error is that of a ratio of means, sqrt(N / (N - 1) sum (s_i - r n_i)^2) / sum n_i; with all n_i equal it is the
    standard error of the mean. None for N < 2.
    """
    N, total = len(sums), math.fsum(counts)
    r = math.fsum(sums) / total
    spread = math.fsum((s - r * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return {"value": r, "stderr": math.sqrt(N / (N - 1) * spread) / total if N > 1 else None, "examples": N}


class ExampleLog:
    """JSON lines: what they are examples of, then one record each, appended as soon as it is known.

    A last line that is not whole, of a process that was killed, is dropped, and its example done again.
    identity: plain JSON, "task" first. `records`: those that are there, by index.

    Raises ValueError where `path` holds examples of another evaluation, RunError where it cannot be read or written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.records = path, dict[int, Record]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            if not (content.startswith(_START) or _START.startswith(content)):
                raise ValueError(f"out: got {path}, which is no log of examples; takes a new path")
            whole = content[: content.rfind(b"\n") + 1]
            if whole.count(b"\n") < 2:  # no example yet: nothing to lose, whatever it was
                whole = b""
            self._read(whole, identity)
            with path.open("r+b" if content else "wb") as file:
                file.truncate(len(whole))
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from error
        if not whole:
            self._write([identity])

    def append(self, records: Sequence[Record]) -> None:
        self._write(records)
        self.records |= {record["index"]: record for record in records}

    def _read(self, content: bytes, identity: dict[str, Any]) -> None:
        for number, line in enumerate(content.splitlines()):
            try:
                value = json.loads(line)
                if number:
                    self.records[value["index"]] = value
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"out: got {self.path}, whose line {number + 1} is damaged; takes a new path"
                ) from None
            if number == 0 and value != identity:
                raise ValueError(
                    f"out: got {self.path}, of another evaluation ({differences(value, identity)}); takes a new path"
                )

    def _write(self, values: Sequence[dict[str, Any]]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(value) + "\n" for value in values).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); what stood there before is intact"
            ) from error
