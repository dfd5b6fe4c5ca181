"""What a call can choose, the preconditioner's rule and the backend, and a few conventions that all of it shares."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

Feedback = Literal["beta_free", "beta_aware"]
Backend = Literal["auto", "reference", "chunked", "triton"]


def refuse(name: str, got: object, takes: str) -> NoReturn:
    """The one form of this library's complaints."""
    raise ValueError(f"{name}: got {got}, takes {takes}")


def check_size(name: str, x: object, takes: str = "an integer >= 1") -> None:
    if type(x) is not int or x < 1:
        refuse(name, repr(x), takes)


def check_positive(name: str, x: float) -> None:
    check_number(name, x, takes := "a finite number > 0")
    if not 0 < x < math.inf:
        refuse(name, x, takes)


def check_number(name: str, x: object, takes: str = "a float") -> None:
    """A number that has a float, which an int need not have; True and False are none."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        refuse(name, repr(x), takes)
    try:
        float(x)
    except OverflowError:
        refuse(name, f"an int of {int(x).bit_length()} bits", takes)


def check_flags(**flags: object) -> None:
    """True or False, and not what merely passes for it."""
    for name, x in flags.items():
        if not isinstance(x, bool):
            refuse(name, repr(x), "True or False")


def bounds_of(cu_seqlens: Tensor, T: int) -> list[int]:
    """The offsets of sequences packed into T tokens; where they are on a GPU, that waits for it."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
        refuse("cu_seqlens", shown, f"offsets from 0 to T = {T} that do not decrease")
    return bounds


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic, gates, norms and states beside x: float64 where x is, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Under autocast products would run in bf16; d, beta, gates and S are to be kept in the work dtype."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class Preconditioner:
    """The rule by which d is learned online: d_{t+1} = clip(lambda_t d_t + eta e_t k_t^2, d_min, d_max).

    eta: step size, a float >= 0 that is not differentiated. At 0, d is d_0 times the running product of lambda.
    feedback: "beta_free", e_t = 1 - <d_t, k_t^2> (the paper's OSDN), or "beta_aware",
        e_t = beta_t (1 - beta_t <d_t, k_t^2>), the true hypergradient (its gated variants).
    d_min, d_max: the box, applied after every token. d_0 itself is not clipped. With unit keys and beta <= beta_max,
        a d within [0, 2 / beta_max] keeps |1 - beta_t x_t| <= 1: d_max = 2, or 1 where beta goes up to 2.
    normalize_step: divide e_t by sum(k_t^2) + 1e-5, for keys that are not of unit length.

    Raises ValueError for eta < 0, d_min > d_max, an unknown feedback, a NaN, or a value of another type.
    Source: arXiv 2605.13473.
    """

    eta: float = 1.0
    feedback: Feedback = "beta_free"
    d_min: float = 0.0
    d_max: float = math.inf
    normalize_step: bool = False

    def __post_init__(self) -> None:
        for name in ("eta", "d_min", "d_max"):
            check_number(name, getattr(self, name))
        check_flags(normalize_step=self.normalize_step)
        if not 0 <= self.eta < math.inf:
            refuse("eta", repr(self.eta), "a finite float >= 0")
        if self.feedback not in get_args(Feedback):
            refuse("feedback", repr(self.feedback), f"one of {get_args(Feedback)}")
        if not self.d_min <= self.d_max:
            refuse("d_min, d_max", f"[{self.d_min!r}, {self.d_max!r}]", "d_min <= d_max")
