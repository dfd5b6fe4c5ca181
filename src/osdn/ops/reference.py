"""THE definition: the online scaled delta rule, one token at a time.

    Sbar_t  = Gamma_t S_{t-1}                        the decayed state; Gamma_t: 1 | exp(g_t) | Diag(exp(g_t))
    r_t     = v_t - Sbar_t^T k_t                     residual, read with the READ key k_t
    S_t     = Sbar_t + beta_t (d_t * k_t) r_t^T      written with the WRITE key w_t = d_t * k_t
    o_t     = scale * S_t^T q_t

    e_t     = 1 - x_t                    beta_free       x_t = <d_t, k_t^2>
            = beta_t (1 - beta_t x_t)    beta_aware      both over (sum k_t^2 + 1e-5) when normalize_step
    d_{t+1} = clip(lambda_t d_t + eta e_t k_t^2, d_min, d_max)

d depends on k (and beta, lambda) alone, so the operator is `delta_rule(read=k, write=d * k)` after `precondition(k)`.
Everything fast in this library is checked against this file in float64. It is slow, and meant to be read.

Shapes: q, k [B, T, H, K]; v [B, T, H, V]; beta, forget (log lambda) [B, T, H]; g (log decay) [B, T, H] or
[B, T, H, K]; S [N, H, K, V]; d [N, H, K], with N = B, or the number of sequences packed into B = 1 by cu_seqlens.
All of one dtype, which is the dtype of the arithmetic. Source: arXiv 2605.13473.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from osdn.ops.options import Preconditioner, bounds_of


def precondition(
    k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor, cu_seqlens: Tensor | None, p: Preconditioner
) -> tuple[Tensor, Tensor]:
    """d_t as used at every token (before that token's update) [B, T, H, K], and d after the last [N, H, K]."""

    def run(k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor]:
        used = []
        for t in range(k.shape[1]):
            used.append(d)
            s = k[:, t] ** 2
            x = (d * s).sum(-1)
            if p.feedback == "beta_free":
                e = 1 - x
            else:
                assert beta is not None
                e = beta[:, t] * (1 - beta[:, t] * x)
            if p.normalize_step:
                e = e / (s.sum(-1) + 1e-5)
            kept = d if forget is None else forget[:, t, :, None].exp() * d
            d = torch.clamp(kept + p.eta * e[..., None] * s, p.d_min, p.d_max)
        return torch.stack(used, 1) if used else torch.empty_like(k), d

    return _by_sequence(run, (k, beta, forget), d, cu_seqlens)


def delta_rule(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    S: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The delta rule with read key k and write key w: o [B, T, H, V] and S after the last token [N, H, K, V]."""

    def run(
        q: Tensor, k: Tensor, w: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor
    ) -> tuple[Tensor, Tensor]:
        o = []
        for t in range(q.shape[1]):
            if g is not None:
                S = (g[:, t, :, None, None] if g.ndim == 3 else g[:, t, :, :, None]).exp() * S
            r = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
            S = S + torch.einsum("bhk,bhv->bhkv", w[:, t], beta[:, t, :, None] * r)
            o.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
        return torch.stack(o, 1) if o else torch.empty_like(v), S

    return _by_sequence(run, (q, k, w, v, beta, g), S, cu_seqlens)


def online_scaled_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    forget: Tensor | None,
    S: Tensor,
    d: Tensor | None,
    cu_seqlens: Tensor | None,
    p: Preconditioner | None,
    scale: float,
    chunk_size: int,  # noqa: ARG001 (the backends' common signature)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(o, S, d): the composition. Without a preconditioner d == 1 and the write key is the read key."""
    w = k
    if p is not None:
        assert d is not None
        d_used, d = precondition(k, beta, forget, d, cu_seqlens, p)
        w = d_used * k
    o, S = delta_rule(q, k, w, v, beta, g, S, scale, cu_seqlens)
    return o, S, d


def _by_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor | None, ...],
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A packed batch is nothing but its sequences, one after the other, each with its own state."""
    if cu_seqlens is None:
        return run(*inputs, state)
    assert inputs[0] is not None
    bounds = bounds_of(cu_seqlens, inputs[0].shape[1])
    parts = [
        run(*(None if x is None else x[:, a:b] for x in inputs), state[n : n + 1])
        for n, (a, b) in enumerate(pairwise(bounds))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])
