"""The layer's choices for the preconditioner: the operator's rule, the initial d and the forget gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from osdn.ops.options import Feedback, Preconditioner, check_flags, check_number, refuse

Forget = Literal["none", "data_dependent"]


@dataclass(frozen=True)
class PreconditionerOptions:
    """What `preconditioner` holds in a layer or config; JSON-ready. The defaults are those of the `osdn-apf` presets.

    eta, feedback, d_min, d_max, normalize_step: the rule, see `osdn.Preconditioner`. d_max None is no upper bound,
        since JSON has no infinity.
    d_init: initial value of d, the same for all channels. learn_d_init: make it a parameter `d0` [HV, K].
    forget: "none", lambda = 1, or "data_dependent", lambda = sigmoid(forget_proj(x)) (Adaptive Preconditioner
        Forgetting). forget_bias: initial bias of forget_proj, whose weight starts at 0; 6.9 is lambda = 0.999.

    Raises ValueError naming the field, what it got and what it takes. Source: arXiv 2605.13473.
    """

    eta: float = 1.0
    feedback: Feedback = "beta_free"
    d_min: float = 0.0
    d_max: float | None = None
    normalize_step: bool = False
    d_init: float = 1.0
    learn_d_init: bool = True
    forget: Forget = "data_dependent"
    forget_bias: float = 6.9

    def __post_init__(self) -> None:
        if self.d_max == math.inf:
            object.__setattr__(self, "d_max", None)
        for name in ("eta", "d_min", "d_max", "d_init", "forget_bias"):
            value = getattr(self, name)
            if name == "d_max" and value is None:
                continue
            takes = "a finite number" + (", or None for no upper bound" if name == "d_max" else "")
            check_number(f"preconditioner.{name}", value, takes)
            if not math.isfinite(value):
                refuse(f"preconditioner.{name}", repr(value), takes)
            object.__setattr__(self, name, float(value))
        check_flags(**{f"preconditioner.{name}": getattr(self, name) for name in ("normalize_step", "learn_d_init")})
        if self.forget not in get_args(Forget):
            refuse("preconditioner.forget", repr(self.forget), f"one of {get_args(Forget)}")
        try:
            self.rule()
        except ValueError as error:
            raise ValueError(f"preconditioner.{error}") from None

    @classmethod
    def parse(cls, value: PreconditionerOptions | Mapping[str, Any]) -> PreconditionerOptions:
        """Options from a mapping, missing keys taking their defaults; unknown ones are refused by name."""
        if isinstance(value, cls):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            takes = f"None, osdn.nn.PreconditionerOptions or a dict with keys among {', '.join(known)}"
            refuse("preconditioner", repr(value), takes)
        if unknown := sorted(set(value) - set(known)):
            refuse("preconditioner", f"unknown {', '.join(unknown)}", ", ".join(known))
        return cls(**value)

    def rule(self) -> Preconditioner:
        """The operator's part."""
        d_max = math.inf if self.d_max is None else self.d_max
        return Preconditioner(self.eta, self.feedback, self.d_min, d_max, self.normalize_step)

    def to_dict(self) -> dict[str, Any]:
        """Every key, ready for config.json."""
        return asdict(self)
