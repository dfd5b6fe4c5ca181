"""The mechanism's own measure: how much of its residual a write leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from osdn.nn import DeltaMixer, Writes


def residual_ratio(model: nn.Module, input_ids: Tensor) -> dict[str, object]:
    """Arithmetic and geometric mean of `token_residuals` over all tokens and heads, together and by layer.

    input_ids: `[B, T]`. Returns {"mean", "geometric", "layers": [{"mean", "geometric"}, ..]}. The geometric mean is 0
    where a single ratio is.
    """
    ratios = [q.double().flatten() for q in token_residuals(model, input_ids)]
    return {**_means(torch.cat(ratios)), "layers": [_means(q) for q in ratios]}


@torch.no_grad()
def token_residuals(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """q_t = f_t(S_t) / f_t(Sbar_t) = (1 - beta_t <d_t, k_t^2>)^2 at every token, `[B, T, HV]`, one a layer.

    f_t(S) = ||v_t - S^T k_t||^2 and Sbar_t is the decayed state. Less than 1: the write brings S closer to v_t at k_t.
    """
    ratios: list[Tensor] = []
    with evaluating(model), observed(model, lambda _, writes: ratios.append(ratio(writes, writes.d))):
        model(input_ids=input_ids, use_cache=False)
    return ratios


def ratio(writes: Writes, d: Tensor | None) -> Tensor:
    """(1 - beta_t <d, k_t^2>)^2, `[B, T, HV]`; d broadcasts to `[B, T, HV, K]`, None is 1."""
    return (1 - writes.beta * reach(writes, d)).square()


def reach(writes: Writes, d: Tensor | None) -> Tensor:
    """x_t = <d, k_t^2>, `[B, T, HV]`."""
    s = writes.k.square()
    return (s if d is None else d * s).sum(-1)


@contextmanager
def observed(model: nn.Module, hook: Callable[[int, Writes], None]) -> Iterator[list[str]]:
    """Within, `hook(i, writes)` sees what layer i, in the order of `named_modules`, writes with; yields their names."""
    layers = {m: name for name, m in model.named_modules() if isinstance(m, DeltaMixer)}
    place = {layer: i for i, layer in enumerate(layers)}
    handles = [layer.register_write_hook(lambda layer, writes: hook(place[layer], writes)) for layer in layers]
    try:
        yield list(layers.values())
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _means(ratios: Tensor) -> dict[str, float]:
    return {"mean": float(ratios.mean()), "geometric": float(ratios.log().mean().exp())}
