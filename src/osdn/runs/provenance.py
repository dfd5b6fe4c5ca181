"""Where a number comes from."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import osdn


@cache
def provenance() -> dict[str, Any]:
    """Commit, digest of the package's sources, versions, device and threads of this process, as plain JSON."""
    return {
        "commit": _commit(),
        "source_sha256": _sources(),
        "versions": {"python": platform.python_version()} | versions("osdn", "torch", "transformers"),
        "device": f"cpu ({_processor()})",
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """None for a package that is not installed, as osdn where it is run from its source."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _sources() -> str:
    """Tells two states of the code apart where git cannot: an edited, copied or installed package."""
    package = Path(osdn.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _commit() -> str | None:
    """Of the repository that tracks this package; None for an installed one, or without git."""
    package = Path(osdn.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
