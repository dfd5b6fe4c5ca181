"""What an experiment hands back: rows of the table, panels of its figure, and what it says in words.

What a row expects is a closed form, an inequality, or the figure of an earlier implementation of the same experiment,
written independently of this library and with other random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean, stdev

import torch
from torch import Tensor

Numbers = Sequence[float] | Tensor
Lines = dict[str, tuple[Numbers | Sequence[str], Numbers]]


@dataclass(frozen=True)
class Row:
    """A measured value beside the expected one; it agrees where it lies in [low, high], and `why` says why there."""

    quantity: str
    expected: str
    each: tuple[float, ...]  # raw: one number a seed, or one alone
    measured: float
    low: float
    high: float
    why: str

    @property
    def agrees(self) -> bool:
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Panel:
    """One picture: lines of (x, y) by label, dashed where that begins with `bound` or `expected`; x may be names."""

    x: str
    y: str
    lines: Lines
    log_x: bool = False
    log_y: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Outcome:
    """seeds: of every random number in it. gives, lacks: what the theory says here, and what it does not."""

    title: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    panels: tuple[Panel, ...]
    gives: str
    lacks: str = ""


def sampled(quantity: str, each: Numbers, expected: str, draws: int = 8, *, log: bool = False) -> Row:
    """The mean over seeds beside an earlier implementation's mean over `draws` other seeds.

    Accepted within three standard errors of the difference of the two means, plus half a unit of the earlier figure's
    last digit. log: the same for log10 of the values, where they spread by factors; measured is then the
    geometric mean.
    """
    values = floats(each)
    half = 0.5 * 10.0 ** int(Decimal(expected).as_tuple().exponent)
    target = float(expected)
    if log:
        half = math.log10((target + half) / target)
        target = math.log10(target)
        values = tuple(math.log10(x) for x in values)
    mean = fmean(values)
    slack = 3 * stdev(values) * math.sqrt(1 / len(values) + 1 / draws) + half
    low, high = target - slack, target + slack
    if log:
        mean, low, high = (10**x for x in (mean, low, high))
    there = str(draws) if draws > 1 else "one"
    why = f"3 standard errors ({len(values)} seeds here, {there} there) + half a digit"
    return Row(quantity, expected, floats(each), mean, low, high, why)


def within(quantity: str, each: Numbers, expected: float, tolerance: float, why: str) -> Row:
    """The mean of `each` within an absolute tolerance of a closed form."""
    values = floats(each)
    return Row(quantity, f"{expected:.4g}", values, fmean(values), expected - tolerance, expected + tolerance, why)


def estimated(quantity: str, each: Numbers, expected: float, floor: float, why: str) -> Row:
    """The mean over seeds within three standard errors of a closed form, plus a floor for which `why` answers."""
    values = floats(each)
    slack = 3 * stdev(values) / math.sqrt(len(values)) + floor
    return within(quantity, values, expected, slack, f"3 standard errors ({len(values)} seeds) + {why}")


def at_most(quantity: str, each: Numbers, bound: float, why: str, expected: str = "") -> Row:
    """The largest of `each` at most `bound`; a NaN among them agrees with nothing."""
    values = floats(each)
    largest = float(torch.tensor(values, dtype=torch.float64).amax())
    return Row(quantity, expected or f"≤ {bound:.4g}", values, largest, -math.inf, bound, why)


def at_least(quantity: str, each: Numbers, bound: float, why: str, expected: str = "") -> Row:
    """The smallest of `each` at least `bound`; a NaN among them agrees with nothing."""
    values = floats(each)
    smallest = float(torch.tensor(values, dtype=torch.float64).amin())
    return Row(quantity, expected or f"≥ {bound:.4g}", values, smallest, bound, math.inf, why)


def floats(values: Numbers) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())
