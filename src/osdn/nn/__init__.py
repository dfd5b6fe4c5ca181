"""The layer and its parts, usable in any model."""

from osdn.nn.layer import OnlineScaledDeltaNet, Writes
from osdn.nn.options import PreconditionerOptions

__all__ = ["OnlineScaledDeltaNet", "PreconditionerOptions", "Writes"]
