"""`osdn convert`: checkpoints of models with a delta rule become OSDN ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class Convert:
    """Upgrade a checkpoint: a preconditioner for each delta rule, d learned from 1.

    Takes flash-linear-attention's DeltaNet, Gated DeltaNet and KDA, transformers' Qwen3-Next, Qwen3.5, OLMo-hybrid and
    Kimi-Linear, and OSDN models that have none. Prints by how much the logits change: without forgetting, by rounding
    alone with eta 0, and by little more, through the eps of the keys' norm, with beta_free feedback."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Directory of the checkpoint: config.json and weights."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Directory to write, which must not exist or be empty."""
    feedback: Literal["beta_free", "beta_aware"] = "beta_free"
    """beta_free keeps the function until training moves d0; beta_aware changes it at once."""
    eta: float = 1.0
    """Step size of the preconditioner; 0: d stays what it is learned to be at first."""
    d_max: float | None = None
    """Upper end of d's box; by default 2, or 1 where beta reaches 2."""
    forget: Literal["none", "data_dependent"] = "none"
    """data_dependent: with a forget gate (APF), which changes the function at once."""
    probe: Path | None = None
    """Text whose first 1,024 tokens to compare logits on; by default random tokens."""

    def run(self) -> None:
        from osdn.convert.checkpoint import convert

        options: dict[str, Any] = {"feedback": self.feedback, "eta": self.eta, "forget": self.forget}
        if self.d_max is not None:
            options["d_max"] = self.d_max
        print(convert(self.source, self.out, options, probe=self.probe))
