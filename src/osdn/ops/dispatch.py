"""Which backend runs a call, and why. Backends are modules with the two functions of `reference.py`.

`triton` alone takes q, k, v as the caller has them, with one argument more (qk_l2norm): its kernels normalise, convert
and share keys among value heads on the way.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from osdn.ops import chunked, reference
from osdn.ops.options import Backend

log = logging.getLogger("osdn")
_announced: set[str] = set()
SEEN_TO_PASS = {"sm_90, Triton 3.6", "sm_90, Triton 3.9"}
"""Where "auto" takes the kernels: GPU and Triton of a run of `make gpu-test` that docs/log.md records."""
try:
    _INSTALLED = importlib.util.find_spec("triton") is not None
except ModuleNotFoundError:  # hidden by whoever imports
    _INSTALLED = False
_MODULES: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}


@dataclass(frozen=True)
class Choice:
    """A backend's name and the reason it was taken."""

    backend: str
    reason: str

    @property
    def module(self) -> ModuleType:
        if self.backend not in _MODULES:
            from osdn.ops.triton import function  # a statement, which torch.compile can trace

            _MODULES[self.backend] = function
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
    lacks = ""
    if asked in ("triton", "auto"):
        lacks = why_not_triton(q) if asked == "triton" else why_not_triton_unasked(q)
    if asked == "triton" and lacks:
        raise ValueError(f"{source}: 'triton' is not available, since {lacks}; 'chunked' runs wherever PyTorch does")
    if asked != "auto":
        return Choice(asked, f"asked for by {source}={asked!r}")
    if q.shape[1] == 1:
        choice = Choice("reference", "a single token is one step of the recurrence")
    elif not lacks:
        choice = Choice("triton", f"kernels for {q.device.type}")
    else:
        choice = Choice("chunked", f"chunkwise-parallel PyTorch, since {lacks}")
    if not torch.compiler.is_compiling() and choice.reason not in _announced:
        _announced.add(choice.reason)
        # Whoever has a GPU expects kernels: say loudly that none ran.
        quiet = choice.backend != "chunked" or q.device.type in ("cpu", "meta")
        log.log(logging.INFO if quiet else logging.WARNING, "backend=auto takes %s", choice)
    return choice


def why_not_triton_unasked(q: Tensor) -> str:
    """Why "auto" does not take the kernels; empty where it does: where their tests were seen to pass, and nowhere else.

    What compiles is not therefore right: with other versions or GPUs some configs were wrong (docs/kernels.md).
    """
    if lacks := why_not_triton(q):
        return lacks
    where = f"{_gpu(q.device)}, Triton {_triton()}" if q.device.type == "cuda" else ""
    if where and where not in SEEN_TO_PASS:
        return f"the kernels' tests were not seen to pass on {where} (`make gpu-test`); backend='triton' takes them"
    return ""


@cache
def _gpu(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def _triton() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def why_not_triton(q: Tensor) -> str:
    """Why the kernels cannot take a call with this q; empty where they can."""
    if not _INSTALLED:
        return "the package triton is not installed (pip install triton)"
    if q.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {q.device.type} and its kernels run on GPUs"
    if q.dtype == torch.float64:
        return "its kernels compute in float32 and the inputs are float64"
    if q.shape[-1] > 256:
        return f"its kernels take head dimensions up to 256 and K = {q.shape[-1]}"
    return ""


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
