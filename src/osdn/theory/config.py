"""What `osdn theory` takes. Imports no torch, so that `osdn --help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal[
    "T1", "T6", "T7", "T9", "C2", "box", "regret", "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8",
    "gate", "stability", "relaxation", "newton",
]  # fmt: skip


@dataclass(frozen=True)
class Theory:
    """Run the theory: convergence, regret, fixed points and recall in float64, expected beside measured.

    One table, one figure for each experiment, and what the theory does not give. All of it takes about a minute."""

    only: tuple[Name, ...] = ()
    """Experiments to run; all unless given."""
    out: Path | None = None
    """Run directory, for results.json, table.md, table.csv and <experiment>.png; by default runs/theory-<time>."""

    def run(self) -> None:
        from osdn.theory.report import run

        run(self.only, self.out)
