"""The layer and its parts, usable in any model."""

from osdn.nn.decay import parameter_groups
from osdn.nn.layer import DeltaMixer, OnlineScaledDeltaNet, Writes
from osdn.nn.options import PreconditionerOptions

__all__ = ["DeltaMixer", "OnlineScaledDeltaNet", "PreconditionerOptions", "Writes", "parameter_groups"]
