"""Token streams in float64 and what the library's own operator makes of them; seeds stand on the batch axis.

Letters: N seeds, T tokens, one head, K, V. S is `[N, 1, K, V]`, keys `[N, T, 1, K]`, beta `[N, T, 1]`, as in
`osdn.online_scaled_delta_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

import osdn

F64 = torch.float64


class Draws:
    """Random numbers of several seeds side by side on a first axis; each seed has a generator of its own."""

    def __init__(self, seeds: Iterable[int]) -> None:
        self.seeds = tuple(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def randn(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g, dtype=F64) for g in self._generators])

    def rand(self, *shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g, dtype=F64) for g in self._generators])


def spectrum(kappa: float, K: int) -> Tensor:
    """`[K]` from 1 down to 1 / kappa, evenly in the logarithm."""
    return torch.logspace(0, -math.log10(kappa), K, dtype=F64)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def constant(k: Tensor, value: float) -> Tensor:
    """`[N, T, 1]`, as beta or log lambda are."""
    return torch.full(k.shape[:3], value, dtype=F64)


def read(S: Tensor, k: Tensor) -> Tensor:
    """S^T k_t, `[N, T, 1, V]`."""
    return torch.einsum("nhkv,nthk->nthv", S, k)


def preconditioners(
    k: Tensor, beta: Tensor, rule: osdn.Preconditioner, *, forget: float = 1.0, d: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """`osdn.precondition`: d_t as used `[N, T, 1, K]` and after the last token `[N, 1, K]`, from d_0 = d."""
    return osdn.precondition(k, beta, preconditioner=rule, forget=_log(k, forget), initial_d=_initial(k, d))


def learn(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    rule: osdn.Preconditioner | None,
    *,
    forget: float = 1.0,
    d: Tensor | float = 1.0,
    S: Tensor | None = None,
    marks: Sequence[int] = (),
) -> list[Tensor]:
    """`osdn.online_scaled_delta_rule` on keys as they are: S after `marks` tokens and after all of them.

    rule None is DeltaNet. forget: lambda, constant. S None is 0.
    """
    state = osdn.DeltaState(S, None if rule is None else _initial(k, d))
    states = []
    for a, b in pairwise([0, *marks, k.shape[1]]):
        part = k[:, a:b]
        _, end = osdn.online_scaled_delta_rule(
            part,
            part,
            v[:, a:b],
            beta[:, a:b],
            forget=None if rule is None else _log(part, forget),
            preconditioner=rule,
            initial_state=state,
            output_final_state=True,
            qk_l2norm=False,
        )
        assert end is not None
        assert end.S is not None
        state = end
        states.append(end.S)
    return states


def _log(k: Tensor, forget: float) -> Tensor | None:
    return None if forget == 1 else constant(k, math.log(forget))


def _initial(k: Tensor, d: Tensor | float) -> Tensor:
    shape = (len(k), *k.shape[2:])
    return torch.full(shape, d, dtype=F64) if isinstance(d, float) else d.expand(shape).contiguous()


def progress(k: Tensor, d: Tensor) -> Tensor:
    """x_t = <d_t, k_t^2>, `[N, T, 1]`."""
    return (d * k.square()).sum(-1)


def token_ratio(k: Tensor, beta: Tensor, d: Tensor) -> Tensor:
    """(1 - beta_t x_t)^2, the share of token t's loss that its write leaves, `[N, T, 1]`."""
    return (1 - beta * progress(k, d)).square()


def mean(x: Tensor) -> Tensor:
    """Per seed: `[N, ...]` to `[N]`."""
    return x.flatten(1).mean(1)


def state_error(S: Tensor, target: Tensor) -> Tensor:
    """||S - S*||^2 / ||S*||^2, `[N]`."""
    return (S - target).square().sum((1, 2, 3)) / target.square().sum((1, 2, 3))


def relative_loss(S: Tensor, target: Tensor, k: Tensor) -> Tensor:
    """F(S) / F(0), `[N]`: the mean of ||(S - S*)^T k||^2 over that of ||S*^T k||^2, k the keys of the same seed."""
    covariance = torch.einsum("nthk,nthl->nhkl", k, k)
    loss, of_zero = ((E * (covariance @ E)).sum((1, 2, 3)) for E in (S - target, target))
    return loss / of_zero
