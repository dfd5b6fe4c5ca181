"""The layer and its parts, usable in any model."""

from osdn.nn.layer import OnlineScaledDeltaNet
from osdn.nn.options import PreconditionerOptions

__all__ = ["OnlineScaledDeltaNet", "PreconditionerOptions"]
