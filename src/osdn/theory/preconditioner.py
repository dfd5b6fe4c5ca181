"""What the rule does to d, which no value and no state enter: exactness, fixed points, regret.

d is computed by `osdn.precondition` alone. Letters as in `streams.py`; w_t stands for beta_t k_t^2 (beta_aware) or
k_t^2 (beta_free), p_t for 1 - <d_t, w_t>.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import lsq_linear
from torch import Tensor

import osdn
from osdn.ops.options import Backend
from osdn.theory.outcome import Lines, Outcome, Panel, Row, at_least, at_most, estimated, sampled, within
from osdn.theory.streams import F64, Draws, constant, mean, preconditioners, spectrum, unit


def exactness() -> Outcome:
    """T1 to T3: chunked forms beside the token loop."""
    draws = Draws([0])
    T, K, V = 300, 24, 8
    k, q, v = 1.3 * unit(draws.randn(T, 1, K) + draws.randn(1, 1, K)), draws.randn(T, 1, K), draws.randn(T, 1, V)
    beta, forget, d = draws.rand(T, 1), -0.1 * draws.rand(T, 1).square(), 0.2 + 1.8 * draws.rand(1, K)
    g = -draws.rand(T, 1, K).pow(4)
    no_box, box = osdn.Preconditioner(2.0, "beta_aware"), osdn.Preconditioner(2.0, "beta_aware", 0.7, 1.2)

    def outputs(rule: osdn.Preconditioner, backend: Backend) -> Tensor:
        o, state = osdn.online_scaled_delta_rule(
            *(q, k, v, beta),
            g=g,
            forget=forget,
            preconditioner=rule,
            initial_state=osdn.DeltaState(d=d),
            output_final_state=True,
            qk_l2norm=False,
            backend=backend,
        )
        assert state is not None
        assert state.S is not None
        return torch.cat([o.flatten(), state.S.flatten()])

    def d_of(rule: osdn.Preconditioner, backend: Backend) -> Tensor:
        return osdn.precondition(
            k,
            beta,
            preconditioner=rule,
            forget=forget,
            initial_d=d,
            backend=backend,
        )[0]

    clipped = float(((d_of(box, "reference") == 0.7) | (d_of(box, "reference") == 1.2)).double().mean())
    rows: list[Row] = []
    for name, f, rule in (
        ("delta rule in chunks, decay per channel", outputs, no_box),
        ("d by triangular solve, with forgetting", d_of, no_box),
        (f"d with a box that {clipped:.0%} of all entries touch", d_of, box),
    ):
        want = f(rule, "reference")
        error = ((f(rule, "chunked") - want).norm() / want.norm())[None]
        rows.append(at_most(f"{name}: relative error", error, 1e-12, "an exact form", "< 1e-12"))
    lines: Lines = {
        "chunked beside the token loop": (("delta rule", "d, no box", "d, box"), [row.measured for row in rows])
    }
    return Outcome(
        "Chunked forms beside the token loop",
        draws.seeds,
        tuple(rows),
        (Panel("", "relative error", lines, log_y=True, dots=True),),
        "The chunkwise forms are exact, box included.",
    )


def forgetting_pulls_to_zero() -> Outcome:
    """T6: unit Gaussian keys, K = 64, d_0 = 1, the mean of d over the second half of 8,000 tokens."""
    draws = Draws(range(12, 20))
    T, K = 8000, 64
    k = unit(draws.randn(T, 1, K))
    rows: list[Row] = []
    lines: Lines = {}
    for eta, lam, earlier in ((0.1, 0.99, ".135"), (1.0, 0.99, ".610"), (1.0, 0.999, ".940")):
        d, _ = preconditioners(k, constant(k, 1.0), osdn.Preconditioner(eta), forget=lam)
        rows.append(sampled(f"mean d, η = {eta:g}, λ = {lam:g}", mean(d[:, T // 2 :]), earlier, 1))
        lines[f"η = {eta:g}, λ = {lam:g}"] = (range(0, T, 10), d.mean((0, 2, 3))[::10])
        fixed = 1 / (1 + K * (1 - lam) / eta)
        lines[f"expected {fixed:.3f}"] = ((0, T), (fixed, fixed))
    return Outcome(
        "Fixed point of forgetting",
        draws.seeds,
        tuple(rows),
        (Panel("token", "mean of d over channels and seeds", lines),),
        "With forgetting, isotropic unit keys and beta-free feedback d settles at 1 / (1 + K(1-λ)/η).",
        "That is a pull towards 0, not towards 1: lambda has to stay within η / K of 1.",
    )


def aware_fixed_point() -> Outcome:
    """T7: unit Gaussian keys, beta = 1/2, eta = 1, d_0 = 1."""
    draws = Draws(range(8))
    T, K = 16_000, 32
    k = unit(draws.randn(T, 1, K))
    d, end = preconditioners(k, constant(k, 0.5), osdn.Preconditioner(feedback="beta_aware"))
    rows = (
        within(
            "β = .5: d after 16,000 tokens, largest distance from 2",
            (end - 2).abs().amax((1, 2)),
            0.0,
            1e-2,
            "not yet at rest",
        ),
    )
    line: Lines = {
        "mean of d": (range(0, T, 10), d.mean((0, 2, 3))[::10]),
        "expected 1/β": ((0, T), (2, 2)),
    }
    return Outcome(
        "Fixed point of beta-aware feedback",
        draws.seeds,
        rows,
        (Panel("token", "d", line),),
        "Beta-aware feedback with constant β drives d to 1/β, where every token's ratio is 0.",
        "That is what a scalar multiple of β does as well.",
    )


def covariance_in_d() -> Outcome:
    """S8: kappa = 1e4, diagonal covariance, unit keys, K = 32, 8,192 tokens, box [1e-3, 9]."""
    draws = Draws(range(8))
    T, K = 8192, 32
    scales = spectrum(1e4, K)
    k = unit(draws.randn(T, 1, K) * scales.sqrt())
    varied = 0.1 + 0.8 * draws.rand(T, 1)
    rows: list[Row] = []
    dots: Lines = {}
    aware, free = (osdn.Preconditioner(1.0, feedback, 1e-3, 9.0) for feedback in ("beta_aware", "beta_free"))
    for name, rule, beta, lam, earlier in (
        ("aware, β = .5", aware, constant(k, 0.5), 1.0, ".92"),
        ("aware, β ~ U(.1, .9)", aware, varied, 1.0, ".92"),
        ("beta-free, APF .999", free, varied, 0.999, ".98"),
    ):
        _, end = preconditioners(k, beta, rule, forget=lam)
        each = [float(torch.corrcoef(torch.stack([d.flatten().log(), scales.log()]))[0, 1]) for d in end]
        rows.append(sampled(f"corr(log d, log Σ_ii), {name}", each, earlier))
        dots[name] = (scales.repeat(len(end)), end.flatten())
    smallest = [min(row.each) for row in rows]
    rows.append(at_least("smallest of all these correlations", smallest, 0.0, "Newton's sign is -", "> 0"))
    return Outcome(
        "What d learns of the covariance",
        draws.seeds,
        tuple(rows),
        (Panel("Σ_ii", "d_i at the end", dots, log_x=True, log_y=True, dots=True),),
        "",
        "d leans the wrong way: Newton's would fall as 1/Σ_ii, the learned one rises with Σ_ii, since features that "
        "are seen more are learned first (aware) or forgotten less (APF).",
    )


def newton_shape() -> Outcome:
    """Gaussian keys of any length, E||k||^2 = 1, diagonal covariance: d -> Sigma^-1 / (K + 2); unit keys: d -> 1."""
    draws = Draws(range(8))
    T, K = 40_000, 8
    scales = spectrum(4.0, K)
    scales = scales / scales.sum()
    z = draws.randn(T, 1, K) * scales.sqrt()
    rule = osdn.Preconditioner(0.2, d_min=-math.inf)
    late = {}
    for name, k in (("any", z), ("unit", unit(z))):
        d, _ = preconditioners(k, constant(k, 1.0), rule, d=0.5)
        late[name] = d[:, T // 2 :].mean(1)[:, 0]
    newton = 1 / (scales * (K + 2))
    over = late["any"] / newton
    rows = (
        estimated("keys of any length: d Σ_ii (K + 2), largest Σ_ii", over[:, 0], 1.0, 0.01, "what is left of d_0"),
        estimated("keys of any length: d Σ_ii (K + 2), smallest Σ_ii", over[:, -1], 1.0, 0.01, "what is left of d_0"),
        at_most("unit keys: largest |d - 1|", (late["unit"] - 1).abs().amax(1), 1e-6, "what is left of d_0"),
    )
    lines: Lines = {f"keys of {name} length": (scales, d.mean(0)) for name, d in late.items()}
    lines |= {"expected Σ^-1 / (K + 2)": (scales, newton), "expected 1": (scales, torch.ones(K))}
    return Outcome(
        "Newton's shape, and how unit keys erase it",
        draws.seeds,
        rows,
        (Panel("Σ_ii", "mean of d over the second half", lines, log_x=True, log_y=True),),
        "With Gaussian keys that keep their length, beta-free feedback finds Σ^-1 / (K + 2).",
        "The L2 norm that every model here applies to its keys erases this: d → 1 whatever Σ is.",
    )


def relaxation() -> Outcome:
    """K = 64, eta = 1, unit keys, beta-free: K / eta tokens for the mean of d, K (K + 2) / (2 eta) for its shape."""
    draws = Draws(range(16))
    K = 64
    slow = K * (K + 2) // 2
    k = unit(draws.randn(3 * slow + 1, 1, K))
    shape = torch.where(torch.arange(K) % 2 == 0, 0.5, -0.5).to(F64)
    rows: list[Row] = []
    lines: Lines = {}
    for name, d0, expected in (("mean", torch.full((K,), 1.5, dtype=F64), K), ("shape", 1 + shape, slow)):
        d, _ = preconditioners(k, constant(k, 1.0), osdn.Preconditioner(), d=d0)
        mode = 2 * (d0 - 1)
        left = ((d - 1) @ mode)[:, :, 0] / ((d0 - 1) @ mode)
        measured = -expected / left[:, expected].log()
        rows.append(estimated(f"time constant of the {name}, tokens", measured, expected, 0.5, "half a token"))
        lines[name] = (torch.arange(3 * expected + 1) / expected, left.mean(0)[: 3 * expected + 1])
    lines["expected exp(-t)"] = (torch.linspace(0, 3, 50), torch.linspace(0, 3, 50).neg().exp())
    return Outcome(
        "How fast d relaxes",
        draws.seeds,
        tuple(rows),
        (Panel("tokens over the closed form's time constant", "share of the distance left", lines, log_y=True),),
        "The mean of d relaxes in K/η tokens, differences between channels in K(K+2)/2η.",
        "At η = 0.003 and K = 128 that is 43,000 and 2.8 million tokens: such a d does not adapt within any context.",
    )


def regret() -> Outcome:
    """Both sides of the token-local bound, unit keys with a common part, beta ~ U(.1, .9), d_0 ~ U[.2, 2]."""
    draws = Draws(range(8))
    T, K = 4096, 16
    k = unit(draws.randn(T, 1, K) + 0.7 * draws.randn(1, 1, K))
    beta, d0 = 0.1 + 0.8 * draws.rand(T, 1), 0.2 + 1.8 * draws.rand(1, K)
    ends = [2**i for i in range(6, 13)]
    rows: list[Row] = []
    lines: Lines = {}
    for name, box in (("no box", (-math.inf, math.inf)), ("box [0, 1.2]", (0.0, 1.2))):
        rule = osdn.Preconditioner(1.0, "beta_aware", *box)
        d, _ = preconditioners(k, beta, rule, d=d0)
        sides = torch.stack([torch.stack(aware_sides(k[n], beta[n], d[n], rule, ends)) for n in range(len(k))])
        rows.append(
            at_most(
                f"aware, {name}: Σp² over its bound, all T", (sides[:, 0] / sides[:, 1]).amax(1), 1.0, "an inequality"
            )
        )
        online, bound, best, plain = sides.mean(0) / torch.tensor(ends)
        lines |= {
            f"online, {name}": (ends, online),
            f"bound, {name}": (ends, bound),
            f"best fixed d, {name}": (ends, best),
        }
    lines["d = 1, DeltaNet"] = (ends, plain)
    below = 1 - float(online[-1] / plain[-1])
    over = float(online[-1] / best[-1])
    rows += [_free_bound(k, beta, d0), _forgetting_bound(k, beta, d0)]
    return Outcome(
        "Regret against the best fixed d",
        draws.seeds,
        tuple(rows),
        (Panel("tokens T", "mean (1 - βx)² of T tokens", lines, log_x=True),),
        f"Aware feedback stays below its bound at every T and, at T = {T}, near the best fixed d of [0, 1.2] in "
        f"hindsight ({over:.2f} times its Σp²; {below:.0%} below d = 1).",
        "The comparator of beta-free feedback is DeltaNet itself: parity, never a gain. A small Σp² is a small "
        "residual ratio, not recall: see S1, S3 and S7.",
    )


def aware_sides(
    k: Tensor, beta: Tensor, d: Tensor, rule: osdn.Preconditioner, ends: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At each T of `ends`: sum p_t^2; its bound, at the fixed d of the box where that is smallest; the sum of the best
    fixed d; the sum of d = 1.

        sum p_t^2 <= ||d_1 - u||^2 / (eta a) + sum (1 - <u, w_t>)^2 / a^2,   a = 1 - eta Lambda / 2,
        Lambda = max ||w_t||^2, for every u in the box

    k `[T, 1, K]`, beta `[T, 1]`, d `[T, 1, K]` of one seed, beta_aware, lambda = 1.
    """
    w = (beta[..., None] * k.square())[:, 0]
    p2 = (1 - (d[:, 0] * w).sum(-1)).square()
    start, limits = d[0, 0], (rule.d_min, rule.d_max)
    columns = []
    for T in ends:
        a = 1 - rule.eta * float(w[:T].square().sum(-1).max()) / 2
        assert a > 0, "the step is too large for the bound"
        near = (rule.eta * a) ** -0.5
        system = torch.cat([w[:T] / a, near * torch.eye(w.shape[1], dtype=F64)])
        target = torch.cat([torch.full((T,), 1 / a, dtype=F64), near * start])
        plain = (1 - w[:T].sum(-1)).square().sum()
        columns.append(
            torch.stack(
                [p2[:T].sum(), _least(system, target, limits), _least(w[:T], torch.ones(T, dtype=F64), limits), plain]
            )
        )
    online, bound, best, ones = torch.stack(columns, 1)
    return online, bound, best, ones


def _least(A: Tensor, b: Tensor, limits: tuple[float, float]) -> Tensor:
    """min ||A u - b||^2 over the box."""
    return torch.tensor(2 * lsq_linear(A.numpy(), b.numpy(), limits).cost, dtype=F64)


def _free_bound(k: Tensor, beta: Tensor, d0: Tensor) -> Row:
    """RMS(1 - beta x) <= RMS(1 - beta) + max beta RMS(e), with sum e^2 <= Lambda ||d_1 - 1||^2 at eta = 1 / Lambda."""
    Lambda = float(k.square().square().sum(-1).max())
    d, _ = preconditioners(k, beta, osdn.Preconditioner(1 / Lambda), d=d0)
    x = (d * k.square()).sum(-1)
    excess = (Lambda * (d0 - 1).square().sum((1, 2)) / x.shape[1]).sqrt()
    bound = mean((1 - beta).square()).sqrt() + beta.amax((1, 2)) * excess
    return at_most(
        "beta-free: RMS(1 - βx) over DeltaNet's plus its excess",
        mean((1 - beta * x).square()).sqrt() / bound,
        1.0,
        "an inequality",
    )


def _forgetting_bound(k: Tensor, beta: Tensor, d0: Tensor) -> Row:
    """APF without a box, constant lambda, for fixed u: w, p as beta_aware,

    sum (eta / lambda)(1 - eta Lambda / lambda) p_t^2
        <= ||d_1 - u||^2 + sum [(eta / lambda)(1 - <u, w_t>)^2 + (1 - lambda) ||u||^2 / lambda]
    """
    lam, eta = 0.999, 1.0
    d, _ = preconditioners(k, beta, osdn.Preconditioner(eta, "beta_aware", -math.inf), forget=lam, d=d0)
    w = (beta[..., None] * k.square())[:, :, 0]
    _, T, K = w.shape
    each = []
    for n in range(len(k)):
        Lambda = float(w[n].square().sum(-1).max())
        left = eta / lam * (1 - eta * Lambda / lam) * (1 - (d[n, :, 0] * w[n]).sum(-1)).square().sum()
        eye = torch.eye(K, dtype=F64)
        system = torch.cat([eye, (eta / lam) ** 0.5 * w[n], (T * (1 - lam) / lam) ** 0.5 * eye])
        target = torch.cat([d0[n, 0], torch.full((T,), (eta / lam) ** 0.5, dtype=F64), torch.zeros(K, dtype=F64)])
        each.append(float(left / _least(system, target, (-math.inf, math.inf))))
    return at_most("aware with APF .999, no box: both sides' quotient", each, 1.0, "an inequality")
