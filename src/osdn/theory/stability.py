"""Products of the transitions B_t = I - beta_t (d_t * k_t) k_t^T (statement 18 of docs/math.md)."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

import osdn
from osdn.ops.options import Feedback
from osdn.theory.outcome import Lines, Outcome, Panel, at_most, within
from osdn.theory.streams import F64, Draws, learn, unit


def transition(k: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """I - beta (d * k) k^T, `[..., K, K]` of k, d `[..., K]` and beta `[...]`: S_t = B_t S_{t-1} + beta_t w_t v_t^T."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    return eye - beta[..., None, None] * (d * k)[..., :, None] * k[..., None, :]


def norm(k: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """||B|| = (n + sqrt(n^2 + 4 - 4 s)) / 2 with n = beta ||k|| ||d * k|| and s = beta x, or 1 where that is less."""
    n, s = beta * k.norm(dim=-1) * (d * k).norm(dim=-1), beta * (d * k * k).sum(-1)
    return ((n + (n.square() + 4 - 4 * s).clamp(min=0).sqrt()) / 2).clamp(min=1)


def adversary(low: float, high: float, angles: int = 180) -> float:
    """The largest growth a step that was found for a d that switches within [low, high].

    The spectral radius of products of two steps to the power 1/2; K = 2, unit keys, beta = 1, a grid of keys and the
    corners of the box.
    """
    turn = torch.arange(angles, dtype=F64) * math.pi / angles
    corners = torch.cartesian_prod(*[torch.tensor([low, high], dtype=F64)] * 2)
    k = torch.stack([turn.cos(), turn.sin()], -1)
    k, d = k.repeat_interleave(4, 0), corners.repeat(angles, 1)
    B = transition(k, d, torch.ones(len(k), dtype=F64))
    trace = torch.einsum("aij,bji->ab", B, B)
    determinant = torch.linalg.det(B)
    root = (trace.square() - 4 * determinant[:, None] * determinant).to(torch.complex128).sqrt()
    radius = torch.maximum((trace + root).abs(), (trace - root).abs()) / 2
    return float(radius.max().sqrt())


def stability() -> Outcome:
    draws = Draws(range(8))
    N, T, K = 8, 2048, 16
    k, d, beta = unit(draws.randn(500, K)), 0.5 + 1.5 * draws.rand(500, K), draws.rand(500)
    # beta x over all of [0, 2], the norm's bounds being sharp at either end.
    for_two = 2 * beta / (d * k * k).sum(-1)
    exact = torch.linalg.matrix_norm(transition(k, d, for_two), 2)
    error = (exact - norm(k, d, for_two)).abs().amax(1)
    spread = d.amax(-1) / d.amin(-1)
    bound = torch.where(beta <= 0.5, (spread + 1) / (2 * spread.sqrt()), spread.sqrt())
    rows = [
        at_most("||B|| beside its closed form", error, 1e-10, "equal but for rounding", "equal"),
        at_most("||B|| over its bound in d_max/d_min", (exact / bound).amax(1), 1 + 1e-12, "an inequality"),
    ]
    growth = {}
    for low, high, earlier, half in ((0.9, 1.1, 0.0049, 5e-5), (0.5, 2.0, 0.19, 5e-3)):
        found = growth[low, high] = adversary(low, high)
        rows.append(
            within(
                f"d switched in [{low:g}, {high:g}]: growth a step, less 1",
                [found - 1],
                earlier,
                half,
                "half a digit",
            )
        )

    k, beta, d0 = unit(draws.randn(T, 1, K)), 0.1 + 0.9 * draws.rand(T, 1), 0.5 + draws.rand(1, K)
    marks = (*range(1, 16), *range(16, T, 16))  # products are largest within the first tokens
    lines: Lines = {}
    for feedback in get_args(Feedback):
        rule = osdn.Preconditioner(1.0, feedback, 0.0, 2.0)
        # With v = 0 and S_0 = I the state is the product of the transitions.
        identity = torch.eye(K, dtype=F64).expand(N, 1, K, K).contiguous()
        states = learn(k, torch.zeros_like(k), beta, rule, d=d0, S=identity, marks=marks)
        norms = torch.stack([torch.linalg.matrix_norm(S, 2)[:, 0] for S in states])
        rows.append(
            at_most(
                f"stationary stream, {feedback}: largest ||∏B||", norms.amax(0), 1.065, "an earlier maximum", "≤ 1.065"
            )
        )
        lines[feedback] = ((*marks, T), norms.amax(1).clamp(min=1e-12))
    return Outcome(
        "Stability of B = I - β (d * k) k^T",
        draws.seeds,
        tuple(rows),
        (Panel("tokens", "||∏B||, largest of the seeds", lines, log_x=True, log_y=True),),
        "A box within [0, 2/β_max] keeps every step's spectral radius at 1, and on stationary streams products hardly "
        "exceed 1.",
        f"No box bounds products by itself: d switched within [.9, 1.1] lets them grow by a factor of "
        f"{growth[0.9, 1.1]:.4f} a step, within [.5, 2] of {growth[0.5, 2.0]:.2f}, at β = 1, although every step's "
        "spectral radius is 1.",
    )
