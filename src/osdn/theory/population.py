"""Gradient descent whose preconditioner learns from the population's own feedback: a covariance, and no tokens.

    F(S) - F* = tr(E^T Sigma E) / 2        E = S - S* [K, V],   G = Sigma E
    E_{t+1}   = E_t - D_t G_t
    D_{t+1}   = D_t - eta (Sigma D_t - I) M_t                  M_t = G_t G_t^T / ||G_t||^2

The third line is projected gradient descent on h_t(D) = (F(S_t - D G_t) - F(S_t)) / ||G_t||^2; a diagonal D keeps the
diagonal of that gradient, and may have a box: its entries then end at d_max. Nothing here depends on the size of E,
only on its direction, so E is rescaled at every step and the gap kept as a logarithm: super-geometric convergence
leaves float64's range within a hundred steps.
Letters: N runs side by side, K, V as everywhere. Statements 12 and 13 of docs/math.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from osdn.theory.outcome import Lines, Outcome, Panel, Row, at_least, at_most, sampled, within
from osdn.theory.streams import Draws, spectrum

K, V, SEEDS = 16, 8, range(8)
TINY = 1e-300


@dataclass(frozen=True)
class Descent:
    """N runs of T steps: log10 of gap_t / gap_0 [T + 1, N] and the curvature along the gradient,
    sigma_t = ||G_t||^2 / (2 gap_t) [T, N].
    """

    log_gap: Tensor
    sigma: Tensor

    @property
    def ratio(self) -> Tensor:
        """rho_t = gap_{t+1} / gap_t, `[T, N]`."""
        return 10 ** self.log_gap.diff(dim=0)

    @property
    def surrogate(self) -> Tensor:
        """g_t = h_t(D_t) - h_t(Sigma^+) >= 0, `[T, N]`; rho_t = 2 sigma_t g_t."""
        return self.ratio / (2 * self.sigma)

    def steps_to(self, gap: float) -> Tensor:
        """`[N]` steps to a gap relative to the first; infinite where it is not reached."""
        below = self.log_gap <= math.log10(gap)
        return torch.where(below.any(0), below.int().argmax(0).double(), torch.inf)


def descend(
    covariance: Tensor, start: Tensor, steps: int, *, eta: float | None = None, diagonal: bool, d_max: float = math.inf
) -> Descent:
    """N runs from D = I / L; eta None is 1 / L_h, and eta 0 is gradient descent at 1 / L.

    covariance: `[K, K]` or `[N, K, K]`. start: E, `[N, K, V]`. d_max: upper end of the box, diagonal D alone. Ratios
    below 1e-300 count as 1e-300, those of an error that is exactly 0 among them, whose sigma counts as L.
    """
    N, K, _ = start.shape
    covariance = covariance.expand(N, K, K)
    L, L_h = smoothness(covariance, diagonal)
    step = (1 / L_h if eta is None else torch.full_like(L_h, eta))[:, None]
    D = (1 / L)[:, None].expand(N, K) if diagonal else torch.eye(K, dtype=start.dtype) / L[:, None, None]
    E = start / start.flatten(1).norm(dim=1)[:, None, None]
    log_gap, sigma, total = [torch.zeros(N, dtype=start.dtype)], [], torch.zeros(N, dtype=start.dtype)
    for _ in range(steps):
        G = covariance @ E
        gap = (E * G).sum((1, 2)) / 2
        norm2 = G.square().sum((1, 2))
        M = G @ G.mT / norm2.clamp(min=TINY)[:, None, None]
        if diagonal:
            E = E - D[..., None] * G
            gradient = ((M * covariance) @ D[..., None])[..., 0] - M.diagonal(dim1=1, dim2=2)
            D = (D - step * gradient).clamp(max=d_max)
        else:
            E = E - D @ G
            D = D - step[..., None] * (covariance @ D @ M - M)
        after = (E * (covariance @ E)).sum((1, 2)) / 2
        total = total + (after / gap.clamp(min=TINY)).clamp(min=TINY).log10()
        log_gap.append(total)
        sigma.append(torch.where(gap > 0, norm2 / (2 * gap.clamp(min=TINY)), L))
        E = E / E.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
    return Descent(torch.stack(log_gap), torch.stack(sigma))


def smoothness(covariance: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """L, the largest eigenvalue, and L_h, the smoothness of the surrogate: L, or the largest diagonal entry."""
    L = torch.linalg.eigvalsh(covariance)[..., -1]
    return L, covariance.diagonal(dim1=-2, dim2=-1).amax(-1) if diagonal else L


def distance(covariance: Tensor) -> Tensor:
    """||D_1 - Sigma^-1||_F^2 for D_1 = I / L."""
    eigenvalues = torch.linalg.eigvalsh(covariance)
    return (1 / eigenvalues - 1 / eigenvalues[..., -1:]).square().sum(-1)


def product_bounds(covariance: Tensor, run: Descent, diagonal: bool) -> tuple[Tensor, Tensor]:
    """C `[]` and C_traj `[T, N]`: prod_{s <= t} rho_s <= (C_traj,t / t)^t <= (C / t)^t, for eta = 1 / L_h.

    C = L L_h ||D_1 - D*||^2; C_traj has the geometric mean of sigma_1..t in place of L.
    """
    L, L_h = smoothness(covariance, diagonal)
    C_h = L_h * distance(covariance)
    t = torch.arange(1, len(run.sigma) + 1)[:, None]
    return L * C_h, C_h * (run.sigma.log().cumsum(0) / t).exp()


def first_below(C_traj: Tensor, t: Tensor) -> Tensor:
    """`[N]`, the first step from which on C_traj / t < 1 says something; infinite where there is none. t: `[T, 1]`."""
    below = C_traj < t
    return torch.where(below.any(0), 1.0 + below.int().argmax(0), torch.inf)


def rotation(draws: Draws, K: int) -> Tensor:
    """Random orthogonal matrices `[N, K, K]`."""
    return torch.linalg.qr(draws.randn(K, K))[0]


def _start() -> tuple[Draws, Tensor]:
    draws = Draws(SEEDS)
    return draws, draws.randn(K, V)


KAPPAS = (2.0, 10.0, 30.0, 100.0, 1e3, 1e4)


def steps_to_the_optimum() -> Outcome:
    """C2: full and diagonal D, diagonal and rotated Sigma, beside gradient descent, right-Newton and the bounds."""
    draws, start = _start()
    R = rotation(draws, K)
    straight = {kappa: torch.diag(spectrum(kappa, K)) for kappa in KAPPAS}
    turned = {kappa: R.mT @ covariance @ R for kappa, covariance in straight.items()}
    runs = {
        name: {kappa: descend(each[kappa], start, 1500, diagonal=diagonal) for kappa in KAPPAS}
        for name, each, diagonal in (
            ("full D", straight, False),
            ("full D, rotated Σ", turned, False),
            ("diagonal D", straight, True),
            ("diagonal D, rotated Σ", turned, True),
        )
    }
    runs["gradient descent"] = {
        kappa: descend(straight[kappa], start, min(60_000, round(25 * kappa)), eta=0.0, diagonal=False)
        for kappa in KAPPAS
    }
    steps = {name: {kappa: run.steps_to(1e-20) for kappa, run in each.items()} for name, each in runs.items()}
    rows = [
        sampled(f"{name}, κ = {kappa:g}: steps to 1e-20", steps[name][kappa], earlier, 1)
        for (name, kappa), earlier in EARLIER_STEPS.items()
    ]
    never = steps["gradient descent"][1e4]
    rows.append(at_least("gradient descent, κ = 10000: steps to 1e-20", never, 60_000, "ran for 60000", "> 60000"))
    over_full = torch.stack([steps["diagonal D"][kappa] / steps["full D"][kappa] for kappa in KAPPAS])
    rows.append(at_most("diagonal D, diagonal Σ: steps over full D's, all κ", over_full, 1.2, "as fast", "near 1"))
    lost = steps["diagonal D, rotated Σ"][100.0] / steps["full D, rotated Σ"][100.0]
    rows.append(at_least("diagonal D, rotated Σ, κ = 100: steps over full D's", lost, 3.0, "linear", ">> 1"))
    for kappa, covariance in turned.items():
        E = start - torch.linalg.inv(covariance) @ (covariance @ start)
        left, quantity = loss(covariance, E) / loss(covariance, start), f"right-Newton, rotated Σ, κ = {kappa:g}"
        rows.append(at_most(f"{quantity}: gap after a step", left, 1e-28 * kappa**2, "rounding", "0"))
    slow = descend(turned[1e4], start, 4000, diagonal=True)
    late = slow.ratio[3000:].log().mean(0).exp()
    rows += [
        sampled("diagonal D, rotated Σ, κ = 10000: mean ρ, steps 3000-4000", late, "0.9994", 1),
        sampled("diagonal D, rotated Σ, κ = 10000: gap at 4000", 10 ** slow.log_gap[-1], "6e-6", 1, log=True),
        *_bounds(turned, runs["full D, rotated Σ"], diagonal=False),
        *_bounds(straight, runs["diagonal D"], diagonal=True),
        _single_mode(),
    ]
    C, C_traj = product_bounds(straight[100.0], runs["diagonal D"][100.0], diagonal=True)
    t = torch.arange(1, 1501)
    first = int(first_below(C_traj[:, :1], t[:, None]))
    lines: Lines = {name: (t, each[100.0].log_gap[1:1501, 0].clamp(min=-40)) for name, each in runs.items()}
    lines["bound, C of the trajectory"] = (t[first - 1 :], (t * (C_traj[:, 0] / t).log10())[first - 1 :].clamp(min=-40))
    counts: Lines = {name: (KAPPAS, [float(x.median()) for x in each.values()]) for name, each in steps.items()}
    counts["expected slope, √κ"] = (KAPPAS, [10 * kappa**0.5 for kappa in KAPPAS])
    return Outcome(
        "Population feedback: steps to the optimum",
        draws.seeds,
        tuple(rows),
        (
            Panel("steps (κ = 100)", "log10 of the relative gap, cut at -40", lines),
            Panel("condition κ", "steps to a relative gap of 1e-20", counts, log_x=True, log_y=True),
        ),
        "With the population's own feedback a full D learns Σ^-1 and converges super-geometrically, whatever the "
        "rotation; the bound ∏ρ ≤ (C/T)^T holds at every step of every run.",
        f"At κ = 100 the bound says nothing before step {first} (with the trajectory's C; {C:.0f} with the a priori "
        f"one), while 1e-20 is reached by step {steps['diagonal D'][100.0].max():.0f}. A diagonal D under a rotated Σ "
        "converges linearly only. None of this is about tokens: see S1 and S2.",
    )


EARLIER_STEPS = {
    ("full D", 10.0): "42",
    ("full D", 100.0): "122",
    ("full D", 1e4): "984",
    ("full D, rotated Σ", 100.0): "122",
    ("gradient descent", 10.0): "201",
    ("gradient descent", 100.0): "2025",
}


def loss(covariance: Tensor, E: Tensor) -> Tensor:
    """F - F* of errors `[N, K, V]`, `[N]`."""
    return (E * (covariance @ E)).sum((1, 2)) / 2


def _bounds(covariances: dict[float, Tensor], runs: dict[float, Descent], *, diagonal: bool) -> list[Row]:
    """The theorem at every prefix of every run, and where it begins to say something."""
    what = f"{'diagonal' if diagonal else 'full'} D, all κ"
    worst, total = [], []
    rows: list[Row] = []
    for kappa, run in runs.items():
        covariance = covariances[kappa]
        _, C_traj = product_bounds(covariance, run, diagonal)
        t = torch.arange(1, len(run.sigma) + 1, dtype=C_traj.dtype)[:, None]
        worst.append((run.log_gap[1:] / t - (C_traj / t).log10()).max())
        most = smoothness(covariance, diagonal)[1] / 2 * distance(covariance)
        total.append((run.surrogate.sum(0) / most).max())
        if diagonal and 10 <= kappa <= 100:
            first = first_below(C_traj, t)
            why = "below 1 within the run of 1500 steps"
            rows.append(at_most(f"bound, diagonal D, κ = {kappa:g}: informative from step", first, 1500, why))
    why = "an inequality; slack for rounding"
    return [
        at_most(f"{what}: log10 of (∏ρ)^(1/T) over C_traj/T, any T", torch.stack(worst), 1e-9, why, "≤ 0"),
        at_most(f"{what}: Σ g_t over (L_h/2) ||D_1 - Σ^-1||²", torch.stack(total), 1 + 1e-9, why, "≤ 1"),
        *rows,
    ]


def _single_mode() -> Row:
    """An error in one eigenvector: prod rho = (1 - 1/kappa)^(T (T + 1)), exactly."""
    kappa, T = 30.0, 60
    covariance = torch.diag(spectrum(kappa, K))
    start = torch.zeros(1, K, V, dtype=covariance.dtype)
    start[:, -1] = 1
    got = descend(covariance, start, T, diagonal=True).log_gap[-1]
    want = T * (T + 1) * math.log10(1 - 1 / kappa)
    why = "exact; 60 roundings of D"
    return within("one eigenmode, κ = 30, T = 60: log10 ∏ρ, (1-1/κ)^T(T+1)", got, want, 1e-9 * abs(want), why)


def gap_at_800() -> Outcome:
    """T9: kappa = 1e4, 800 steps."""
    draws, start = _start()
    covariance = torch.diag(spectrum(1e4, K))
    runs = {
        "full D": descend(covariance, start, 800, diagonal=False),
        "diagonal D": descend(covariance, start, 800, diagonal=True),
        "gradient descent": descend(covariance, start, 800, eta=0.0, diagonal=False),
    }
    earlier = {"full D": "-13.7", "diagonal D": "-13.7", "gradient descent": "-3.4"}
    rows = tuple(
        sampled(f"{name}: log10 of the relative gap at T = 800", run.log_gap[-1], earlier[name], 1)
        for name, run in runs.items()
    )
    lines: Lines = {name: (range(801), run.log_gap[:, 0]) for name, run in runs.items()}
    return Outcome(
        "Population feedback at κ = 10000, diagonal Σ",
        draws.seeds,
        rows,
        (Panel("steps", "log10 of the relative gap", lines),),
        "Where Σ is diagonal, a diagonal D is as good as a full one.",
    )


def box_truncation() -> Outcome:
    """A box that excludes Sigma^-1: the rate falls back to (1 - d_max lambda_min)^2."""
    draws, start = _start()
    covariance = torch.diag(spectrum(100.0, K))
    rows: list[Row] = []
    lines: Lines = {}
    for d_max, steps in ((50.0, 800), (10.0, 3000), (2.0, 3000)):
        run = descend(covariance, start, steps, diagonal=True, d_max=d_max)
        limit = (1 - d_max / 100) ** 2
        why = "limit of T → ∞: the slowest mode is all that is left"
        rows.append(within(f"d_max = {d_max:g}, λ_min = 0.01: ρ at T = {steps}", run.ratio[-1], limit, 1e-3, why))
        lines[f"d_max = {d_max:g}"] = (range(1, steps + 1), run.ratio[:, 0])
    free = descend(covariance, start, 300, diagonal=True)
    wide = descend(covariance, start, 300, diagonal=True, d_max=150.0)
    apart = (wide.log_gap - free.log_gap).abs().amax(0)
    rows.append(
        at_most("d_max = 150, which holds Σ^-1: log10 of the gap beside no box, 300 steps", apart, 1e-9, "equal", "0")
    )
    lines["no box"] = (range(1, 301), free.ratio[:, 0])
    return Outcome(
        "Population feedback: a box that excludes Σ^-1",
        draws.seeds,
        tuple(rows),
        (Panel("steps", "ρ, gap after a step over gap before", lines, log_x=True),),
        "A box that contains Σ^-1 costs nothing.",
        "A box that excludes it leaves linear convergence at ρ = (1 - d_max λ_min)²: for κ = 100 and d_max = 2 that "
        "is .96 a step, beside gradient descent's .98.",
    )
