"""Checkpoints that are whole or not there: written beside, fsynced, sealed by a manifest, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from osdn.runs import RunError
from osdn.runs.store import Warn, open_up, set_aside, write_json

MANIFEST = "manifest.json"


def seal(part: Path, final: Path, stamp: str) -> None:
    """Make the directory `part` the checkpoint `final`: every file is on the disk, then its manifest, then its name."""
    open_up(part)
    files = {path.relative_to(part).as_posix(): _size_and_hash(path, sync=True) for path in _files(part)}
    write_json(part / MANIFEST, {"stamp": stamp, "files": files})
    for directory in (part, *(path for path in part.rglob("*") if path.is_dir())):
        _sync_directory(directory)
    part.replace(final)
    _sync_directory(final.parent)


def latest(out: Path, stamp: str, warn: Warn) -> Path | None:
    """The newest whole checkpoint of `out`; None where none was ever written.

    One that is damaged is set aside with a warning, and the one before is taken. Raises RunError where all were, and
    for one that belongs to another run or was not written by `osdn train`; these are left where they are.
    """
    found = _steps(out)
    for step in reversed(found):
        path = out / f"checkpoint-{step}"
        try:
            manifest = _read_manifest(path)
            if manifest["stamp"] != stamp:
                raise RunError(f"{path}: belongs to another run ({manifest['stamp']}, not {stamp}); move it away")
            _check(path, manifest["files"])
        except ValueError as error:
            set_aside(path, error, warn)
        else:
            return path
    if found:
        raise RunError(f"{out}: no checkpoint is whole, all are set aside; the same command begins at step 0")
    return None


def damage(path: Path) -> str:
    """What a sealed directory lacks, a file or weights as they were written; empty where it is whole. Other files may
    have been edited since."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = _read_manifest(path)["files"]
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if name.endswith(".safetensors") and _size_and_hash(path / name) != expected:
            return f"{name} is damaged"
    return ""


def prune(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. One that is half deleted is no longer called one."""
    for step in _steps(out)[:-keep]:
        old = out / "checkpoint.old"
        shutil.rmtree(old, ignore_errors=True)
        (out / f"checkpoint-{step}").replace(old)
        shutil.rmtree(old, ignore_errors=True)


def _steps(out: Path) -> list[int]:
    names = (path.name.removeprefix("checkpoint-") for path in out.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path}: has no {MANIFEST}, so `osdn train` did not write it; move it away") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    fields = manifest.keys() if isinstance(manifest, dict) else set()
    if fields != {"stamp", "files"} or not isinstance(manifest["files"], dict):
        raise ValueError(f"its {MANIFEST} is damaged")
    return manifest


def _check(path: Path, files: dict[str, list[Any]]) -> None:
    for name, expected in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (got := _size_and_hash(path / name)) != expected:
            raise ValueError(f"{name} is damaged: {got[0]:,} bytes, {expected[0]:,} were written")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _size_and_hash(path: Path, *, sync: bool = False) -> list[Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync_directory(path: Path) -> None:
    """So that names survive a power cut; Windows has no such thing."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
