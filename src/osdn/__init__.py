"""osdn: Online Scaled DeltaNet, the delta rule with a preconditioner learned online (arXiv 2605.13473)."""

from typing import TYPE_CHECKING, Any

from osdn.models import OSDNConfig
from osdn.nn import OnlineScaledDeltaNet
from osdn.ops.api import explain, online_scaled_delta_rule, precondition
from osdn.ops.options import Preconditioner
from osdn.ops.state import DeltaState
from osdn.ops.step import online_scaled_delta_step

if TYPE_CHECKING:
    from osdn.models import OSDNForCausalLM, OSDNModel, load_preconditioned, precondition_model

__all__ = [
    "DeltaState",
    "OSDNConfig",
    "OSDNForCausalLM",
    "OSDNModel",
    "OnlineScaledDeltaNet",
    "Preconditioner",
    "explain",
    "load_preconditioned",
    "online_scaled_delta_rule",
    "online_scaled_delta_step",
    "precondition",
    "precondition_model",
]


def __getattr__(name: str) -> Any:
    if name in ("OSDNForCausalLM", "OSDNModel", "load_preconditioned", "precondition_model"):
        from osdn import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
