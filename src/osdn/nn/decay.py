"""Which parameters take weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

_UNDECAYED = ("d0", "A_log", "dt_bias")  # of any shape: Kimi-Linear's A_log has four dimensions


def decayed_names(model: nn.Module) -> list[str]:
    """Names of the parameters that take weight decay: matrices, embeddings and convolutions. Not d0, which it would
    pull to 0 and the step size with it, nor A_log, dt_bias, biases and norms."""
    return [n for n, p in model.named_parameters() if p.ndim >= 2 and n.rpartition(".")[2] not in _UNDECAYED]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: what requires a gradient, with decay for `decayed_names` and none for the others."""
    names = set(decayed_names(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if name in names]
    others = [p for name, p in named if name not in names]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
