"""Files of a run directory: written whole or not at all, set aside when they cannot be read, never deleted."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from osdn.runs import RunError, first_line

Warn = Callable[[str], None]


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename: at any moment `path` holds the old content or the new. Raises RunError."""
    beside = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise RunError(f"{path}: cannot be written ({error.strerror}); what stood there before is intact") from error


def open_up(directory: Path) -> None:
    """Let others read what the umask lets them: mkdtemp and safetensors make files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        inherited = path.stat().st_mode & 0o7000
        with suppress(OSError):  # of file systems without modes
            path.chmod(inherited | (0o777 if path.is_dir() else 0o666) & ~umask)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(
    path: Path, required: set[str], warn: Warn, expected: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The object in `path`; None where there is none, or where it had to be set aside: damaged, without a `required`
    field, or with another value than the `expected` one.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or required - value.keys():
            raise ValueError("fields are missing")
        if other := [name for name, x in (expected or {}).items() if value.get(name) != x]:
            raise ValueError(f"it belongs to another {', '.join(other)}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # what a truncated or overwritten file gives
        set_aside(path, error, warn)
        return None
    return value


@contextmanager
def claim(
    out: Path, identity: dict[str, Any], warn: Warn, replaces: Sequence[str] = ("results.json",)
) -> Iterator[None]:
    """Inside, `out` is the run directory of `identity`, written to config.json, and of no other process.

    replaces: the files that the run writes, whatever stood there.

    Raises ValueError where it is another config's or holds such files of another origin, RunError where a process that
    lives works there.
    """
    config, lock = out / "config.json", FileLock(out / ".lock", timeout=0)
    there = [name for name in replaces if (out / name).exists()]  # before config.json is looked for: a run begins there
    if there and _object(config) is None and _identity(out / "results.json") is None:
        raise ValueError(f"out: got {out}, which holds {', '.join(there)} of another origin; takes a new path")
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{out}: another process works there; wait for its end, or take another path") from None
    except (OSError, NotImplementedError) as error:  # as of file systems without locks
        warn(f"{out} cannot be locked ({first_line(error)}): let no other process work there")
    try:
        if (before := read_json(config, set(), warn)) is None:  # not yet written, or lost
            before = _identity(out / "results.json") or identity
        if before != identity:
            changes = differences(before, identity)
            raise ValueError(f"out: got {out}, a run of another config ({changes}); takes a new path")
        if not config.exists():
            write_json(config, identity)
        yield
    finally:
        lock.release()


def _identity(results: Path) -> Any:
    """As the results of a run tell it; None where there are none that do."""
    identity = (_object(results) or {}).get("identity")
    return identity if isinstance(identity, dict) else None


def _object(path: Path) -> dict[str, Any] | None:
    """What `path` holds; None where that is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What a user may have changed, old value first."""
    names = [name for name in now | before if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} here" for name in names)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Keeps the one before as `<path>.previous`, the last good state should this one be damaged later."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    beside = path.with_name(f"{path.name}.new")
    write_atomic(beside, buffer.getvalue())
    if path.exists():
        path.replace(previous(path))
    beside.replace(path)


def read_checkpoint(path: Path, stamp: str, warn: Warn) -> dict[str, Any] | None:
    """The newest readable checkpoint that carries `stamp`; None where there is none."""
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            state = torch.load(candidate, weights_only=True)
            if state["stamp"] != stamp:
                raise ValueError("it belongs to another config")
            assert isinstance(state, dict)
            return state
        except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
            set_aside(candidate, error, warn)
    return None


def previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def set_aside(path: Path, error: Exception, warn: Warn) -> None:
    """Rename what cannot be used to `<path>.damaged-<n>`, and say so."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.replace(aside)
    warn(f"{path} cannot be used ({first_line(error)}); set aside as {aside.name}")
