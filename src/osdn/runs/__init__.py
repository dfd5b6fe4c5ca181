"""What every command has in common: errors of one line, the run directory and its files, where a number comes from.

This module imports no torch, so that `--help` stays quick.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


class RunError(Exception):
    """Something the user can act on; one line, no traceback."""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def fingerprint(identity: dict[str, Any]) -> str:
    """Short hash of an identity: it names the run directory and stamps every file in it."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
