"""Chunkwise-parallel backend: the exact recurrence of `reference.py`, C tokens at a time, on any device.

Tokens are laid out as rows [M, C, ...]: a row is one chunk of one head of one sequence, and "wave" i is the rows of
every sequence's i-th chunk, so that dense and packed batches are one loop over waves. What depends on inputs alone is
computed for all rows at once under autograd; what is sequential are the two operators of `scans.py`.
Derivations: docs/math.md. Letters: M rows, C chunk length, NH states, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from osdn.ops.options import Preconditioner, bounds_of
from osdn.ops.scans import delta_scan, precondition_scan, segment_sums


@dataclass(frozen=True)
class _Layout:
    """Where each token stands among the rows, and how many sequences each wave has."""

    B: int
    T: int
    H: int
    C: int
    waves: list[int]  # rows of wave i, heads counted; a single number where all waves have as many
    token_at: Tensor | None = None  # packed: [M / H, C] token at each place, T where there is none
    place_of: Tensor | None = None  # packed: [T] place of each token
    order: Tensor | None = None  # packed: sequences by falling length, so that a wave's are the first ones

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> _Layout:
        B, T, H = x.shape[:3]
        if cu_seqlens is None:
            C = chunk_size if chunk_size <= T else min(chunk_size, 1 << (T - 1).bit_length())
            return _Layout(B, T, H, C, [B * H])
        bounds = bounds_of(cu_seqlens, T)
        spans = sorted(enumerate(pairwise(bounds)), key=lambda s: s[1][0] - s[1][1])
        longest = spans[0][1][1] - spans[0][1][0]
        C = min(chunk_size, 1 << max(longest - 1, 0).bit_length())
        chunks = [[(a + i, b) for _, (a, b) in spans if a + i < b] for i in range(0, longest, C)]
        begin, end = torch.tensor([chunk for wave in chunks for chunk in wave])[..., None].unbind(1)
        token_at = begin + torch.arange(C)
        token_at = torch.where(token_at < end, token_at, T)
        place_of = torch.empty(T + 1, dtype=torch.long)
        place_of = place_of.scatter_(0, token_at.flatten(), torch.arange(token_at.numel()))[:T]
        order = torch.tensor([n for n, _ in spans])
        on = [i.to(x.device, non_blocking=True) for i in (token_at, place_of, order)]
        return _Layout(B, T, H, C, [len(wave) * H for wave in chunks], *on)

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [M, C, ...], zero where a chunk has no token."""
        rest = x.shape[3:]
        if self.token_at is None:
            n = -(-self.T // self.C)
            if n * self.C != self.T:
                x = torch.cat([x, x.new_zeros(self.B, n * self.C - self.T, *x.shape[2:])], 1)
            x = x.view(self.B, n, self.C, self.H, *rest).movedim((1, 3), (0, 2))
        else:
            x = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])[self.token_at].movedim(2, 1)
        return x.reshape(-1, self.C, *rest)

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        rest = x.shape[2:]
        if self.token_at is None:
            x = x.view(-1, self.B, self.H, self.C, *rest).movedim((0, 2), (1, 3))
            return x.reshape(self.B, -1, self.H, *rest)[:, : self.T]
        return x.view(-1, self.H, self.C, *rest).movedim(1, 2).reshape(-1, self.H, *rest)[self.place_of][None]

    def state_rows(self, state: Tensor) -> Tensor:
        """[N, H, ...] -> [NH, ...], longest sequence first."""
        return (state if self.order is None else state[self.order]).flatten(0, 1)

    def states(self, rows: Tensor) -> Tensor:
        """The inverse of `state_rows`."""
        state = rows.unflatten(0, (-1, self.H))
        return state if self.order is None else state[self.order.argsort()]


def precondition(
    k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor, cu_seqlens: Tensor | None, p: Preconditioner
) -> tuple[Tensor, Tensor]:
    layout = _Layout.of(k, cu_seqlens, 64)
    beta, forget = (None if x is None else layout.rows(x) for x in (beta, forget))
    used, final = _precondition(layout.rows(k), beta, forget, layout.state_rows(d), layout.waves, p)
    return layout.tokens(used), layout.states(final)


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
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = _Layout.of(q, cu_seqlens, chunk_size)
    q, k, v, beta = (layout.rows(x) for x in (q, k, v, beta))
    g, forget = (None if x is None else layout.rows(x) for x in (g, forget))
    w = k
    if p is not None:
        assert d is not None
        used, d = _precondition(k, beta, forget, layout.state_rows(d), layout.waves, p)
        w, d = used * k, layout.states(d)
        del used
    kb, vb = k * beta[..., None], v * beta[..., None]
    del k, v  # without autograd, freed before the scan

    # Within a chunk: A_tj = <kb_t, w_j> and P_tj = <q_t, w_j>, each with the decay between j and t. The solver
    # reads A below the diagonal only.
    kept = None
    if g is None:
        A, P = kb @ w.mT, (q @ w.mT) * _lower(q)
    else:
        if g.ndim == 2:
            between = segment_sums(g).exp()
            A, P = (kb @ w.mT) * between, (q @ w.mT) * between
            g = g[..., None]
        else:
            A, P = _decayed_products(kb, q, w, g)
        since_start, until_end = g.cumsum(1).exp(), _sum_after(g).exp()
        kb, q, w, kept = kb * since_start, q * since_start, w * until_end, since_start[:, -1]
    saves = torch.is_grad_enabled() and any(x.requires_grad for x in (q, kb, vb, w, A, S))
    o, S, _, _ = delta_scan(q, kb, w, vb, A, P, kept, layout.state_rows(S), layout.waves, scale, saves)
    return layout.tokens(o), layout.states(S), d


def _precondition(
    k: Tensor, beta: Tensor | None, forget: Tensor | None, d: Tensor, waves: list[int], p: Preconditioner
) -> tuple[Tensor, Tensor]:
    """Either feedback is e = c1 - c2 <d, s>, with s = k^2."""
    s = k.square()
    b = k.new_ones(k.shape[:2]) if p.feedback == "beta_free" or beta is None else beta
    n = s.sum(-1) + 1e-5 if p.normalize_step else None
    c1, c2 = (b, b * b) if n is None else (b / n, b * b / n)
    used, final, _ = precondition_scan(s, c1, c2, forget, d, waves, p.eta, p.d_min, p.d_max)
    return used, final


def _lower(x: Tensor) -> Tensor:
    """[C, C] ones up to the diagonal; a product with it is faster than `tril` on CPU."""
    return x.new_ones(x.shape[1], x.shape[1]).tril()


def _sum_after(x: Tensor) -> Tensor:
    """sum_{i > t} x_i along dim 1, summed as such: a difference of running sums would cancel under strong decay."""
    return torch.cat([x[:, 1:].flip(1).cumsum(1).flip(1), torch.zeros_like(x[:, :1])], 1)


def _decayed_products(kb: Tensor, q: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A, P [M, C, C]: sum_c x_tc w_jc exp(sum_{j < i <= t} g_ic) for x = kb (j < t) and x = q (j <= t).

    Built from blocks of h = 1, 2, 4, ... tokens: between the halves of a block the decay splits at the middle into two
    factors that are both at most 1, so nothing overflows and no quotient of decays is formed.
    """
    M, C, K = w.shape
    P = (q * w).sum(-1)[..., None, None]
    A = torch.zeros_like(P)
    h = 1
    while h < C:
        g_, w_, kb_, q_ = (x.reshape(-1, 2, h, K) for x in (g, w, kb, q))
        row, col = g_[:, 1].cumsum(1).exp(), _sum_after(g_[:, 0]).exp()
        below = (w_[:, 0] * col).mT
        A, P = (_grow(D, (x[:, 1] * row @ below).view(M, -1, h, h)) for D, x in ((A, kb_), (P, q_)))
        h *= 2
    return A[:, 0], P[:, 0]


def _grow(D: Tensor, low: Tensor) -> Tensor:
    """Diagonal blocks [M, n, h, h] and the blocks between their pairs [M, n/2, h, h] -> [M, n/2, 2h, 2h]."""
    top, bottom = D[:, 0::2], D[:, 1::2]
    return torch.cat([torch.cat([top, torch.zeros_like(top)], -1), torch.cat([low, bottom], -1)], -2)
