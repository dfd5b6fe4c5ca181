"""osdn: Online Scaled DeltaNet, the delta rule with a preconditioner learned online (arXiv 2605.13473)."""

from osdn.ops.api import explain, online_scaled_delta_rule, precondition
from osdn.ops.options import Preconditioner
from osdn.ops.state import DeltaState

__all__ = ["DeltaState", "Preconditioner", "explain", "online_scaled_delta_rule", "precondition"]
