"""Which backend runs a call, and why. Backends are modules with the two functions of `reference.py`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from osdn.ops import chunked, reference
from osdn.ops.options import Backend

log = logging.getLogger("osdn")
_announced: set[str] = set()
_MODULES: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}


@dataclass(frozen=True)
class Choice:
    """A backend's name and the reason it was taken."""

    backend: str
    reason: str

    @property
    def module(self) -> ModuleType:
        return _MODULES[self.backend]

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def choose(q: Tensor, backend: str) -> Choice:
    """Resolve `backend` for a call with query (or key) `q`; OSDN_BACKEND overrides "auto" alone."""
    asked, source = backend, "backend"
    if backend == "auto" and os.environ.get("OSDN_BACKEND"):
        asked, source = os.environ["OSDN_BACKEND"], "OSDN_BACKEND"
    if asked not in get_args(Backend):
        raise ValueError(f"{source}: got {asked!r}, takes one of {', '.join(map(repr, get_args(Backend)))}")
    if asked == "triton":
        raise ValueError(
            f"{source}: 'triton' is not available, since this version of osdn ships no Triton kernels; "
            "use 'chunked', which runs on any device PyTorch runs on"
        )
    if asked != "auto":
        return Choice(asked, f"asked for by {source}={asked!r}")
    if q.shape[1] == 1:
        choice = Choice("reference", "a single token is one step of the recurrence")
    else:
        choice = Choice("chunked", f"chunkwise-parallel PyTorch, the fastest exact path on {q.device.type} so far")
    if not torch.compiler.is_compiling() and choice.reason not in _announced:
        _announced.add(choice.reason)
        # Whoever has a GPU expects kernels: say loudly that none ran.
        log.log(logging.INFO if q.device.type in ("cpu", "meta") else logging.WARNING, "backend=auto takes %s", choice)
    return choice
