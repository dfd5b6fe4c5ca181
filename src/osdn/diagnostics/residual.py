"""The mechanism's own measure: how much of its residual a write leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from osdn.nn import layer
from osdn.ops.api import l2norm, precondition


def residual_ratio(model: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    """Arithmetic and geometric mean of `token_residuals` over all tokens and heads, together and by layer.

    input_ids: `[B, T]`. Returns {"mean", "geometric", "layers": [{"mean", "geometric"}, ..]}. The geometric mean is 0
    where a single ratio is.
    """
    ratios = [q.double().flatten() for q in token_residuals(model, input_ids)]
    return _means(torch.cat(ratios)) | {"layers": [_means(q) for q in ratios]}


@torch.no_grad()
def token_residuals(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """q_t = f_t(S_t) / f_t(Sbar_t) = (1 - beta_t <d_t, k_t^2>)^2 at every token, `[B, T, H]`, one a layer.

    f_t(S) = ||v_t - S^T k_t||^2 and Sbar_t is the decayed state. Less than 1: the write brings S closer to v_t at k_t.
    d_t is computed anew, by `osdn.precondition`, from what the layers pass to the operator.
    """
    training = model.training
    with _recorded() as ratios:
        model.eval()(input_ids=input_ids, use_cache=False)
    model.train(training)
    return ratios


@contextmanager
def _recorded() -> Iterator[list[Tensor]]:
    """Within, every call that a layer makes to the operator appends its ratios."""
    operator, ratios = layer.online_scaled_delta_rule, list[Tensor]()

    def record(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> Any:
        repeats, rule = v.shape[2] // k.shape[2], options["preconditioner"]
        s = l2norm(k.to(beta.dtype)).repeat_interleave(repeats, 2)
        x = s.square().sum(-1)
        if rule is not None:
            d, _ = precondition(
                s,
                beta,
                preconditioner=rule,
                forget=options["forget"],
                initial_d=options["initial_state"].d,
                cu_seqlens=options["cu_seqlens"],
                backend=options["backend"],
            )
            x = (d * s.square()).sum(-1)
        ratios.append((1 - beta * x).square())
        return operator(q, k, v, beta, **options)

    layer.online_scaled_delta_rule = record
    try:
        yield ratios
    finally:
        layer.online_scaled_delta_rule = operator


def _means(ratios: Tensor) -> dict[str, float]:
    return {"mean": float(ratios.mean()), "geometric": float(ratios.log().mean().exp())}
