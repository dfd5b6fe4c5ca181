"""What the token-local rule does to the memory S: convergence, noise, switches, gates and one-pass recall.

Every run is the library's own operator (`streams.learn`). A rotated right-Newton step needs no second operator either:
rotating keys and S together leaves losses alone and turns the write key Sigma^-1 k into a diagonal one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import osdn
from osdn.theory.outcome import Lines, Outcome, Panel, Row, at_least, at_most, sampled, within
from osdn.theory.population import rotation
from osdn.theory.streams import (
    F64,
    Draws,
    constant,
    learn,
    mean,
    preconditioners,
    progress,
    read,
    relative_loss,
    spectrum,
    state_error,
    token_ratio,
    unit,
)

K, V, T, SEEDS = 32, 16, 8192, range(8)
FREE, AWARE = osdn.Preconditioner(), osdn.Preconditioner(feedback="beta_aware")
WARM_UP = 4000
MARKS = tuple(64 * 2**i for i in range(7))
ROUNDING = "equal but for rounding"


def diagonal_covariance() -> Outcome:
    """S1."""
    draws, k, target = _stream(1e4)
    earlier = {"DeltaNet": "2.6e-4", "with APF .999": "2.0e-3"}
    return _convergence("diagonal", draws, k, target, torch.eye(K, dtype=F64), earlier, "7e-32")


def rotated_covariance() -> Outcome:
    """S2."""
    draws, k, target = _stream(1e4)
    R = rotation(draws, K)[:, None]
    return _convergence("rotated", draws, k, target, R, {"DeltaNet": "2.7e-4", "with APF .999": "3.5e-4"}, "1e-31")


def _stream(kappa: float) -> tuple[Draws, Tensor, Tensor]:
    """Unit keys of diagonal Gaussian covariance and a Gaussian S*."""
    draws = Draws(SEEDS)
    return draws, unit(draws.randn(T, 1, K) * spectrum(kappa, K).sqrt()), draws.randn(1, K, V)


def _convergence(
    which: str, draws: Draws, straight: Tensor, target: Tensor, R: Tensor, earlier: dict[str, str], newton: str
) -> Outcome:
    """straight: keys in the basis of their covariance; R turns them into those that are used."""
    k = straight @ R.mT
    v, one = read(target, k), constant(k, 1.0)
    rules: dict[str, tuple[osdn.Preconditioner | None, float]] = {
        "DeltaNet": (None, 1.0),
        "OSDN": (FREE, 1.0),
        "with APF .999": (osdn.Preconditioner(d_min=0.1, d_max=10.0), 0.999),
    }
    states = {name: learn(k, v, one, rule, forget=forget, marks=MARKS) for name, (rule, forget) in rules.items()}
    d = 1 / spectrum(1e4, K)
    beta = 1 / progress(straight, d)
    states["right-Newton"] = [R @ S for S in learn(straight, v, beta, osdn.Preconditioner(0.0), d=d, marks=MARKS)]
    losses = {name: torch.stack([relative_loss(S, target, k) for S in each]) for name, each in states.items()}
    final = {name: each[-1] for name, each in losses.items()}
    tie = ((states["OSDN"][-1] - states["DeltaNet"][-1]).norm() / states["DeltaNet"][-1].norm())[None]
    rows = (
        *(sampled(f"F, {name}", final[name], value) for name, value in earlier.items()),
        at_most("state of OSDN (beta-free) beside DeltaNet's", tie, 1e-12, ROUNDING, "same"),
        at_most("F, right-Newton with βx = 1", final["right-Newton"], 1e-24, ROUNDING, newton),
        at_most(
            "mean (1 - βx)², DeltaNet and right-Newton",
            torch.stack([mean(token_ratio(k, one, torch.ones(K))), mean(token_ratio(straight, beta, d))]),
            1e-24,
            ROUNDING,
            "0",
        ),
    )
    at = (*MARKS, T)
    lines: Lines = {name: (at, each.mean(1)) for name, each in losses.items()}
    apart = float((final["DeltaNet"] / final["right-Newton"]).log10().mean())
    return Outcome(
        f"Tokens, {which} Σ, κ = 10000, unit keys, β = 1",
        draws.seeds,
        rows,
        (Panel("tokens", "F(S) / F(0)", lines, log_x=True, log_y=True),),
        "The oracle's write key Σ^-1 k with βx = 1 finds S* to rounding.",
        "The super-geometric rate does not carry over to the token-local rule: with unit keys d = 1 is optimal for "
        "every token whatever Σ is, and OSDN with beta-free feedback is DeltaNet. Both have residual ratio 0, as has "
        f"right-Newton, whose F is 1e{apart:.0f} times smaller: a low residual ratio is not recall.",
    )


def noise() -> Outcome:
    """S3: beta in (.1, .9), a clean and a noisy target."""
    draws, k, target = _stream(1e4)
    beta, disturbance = 0.1 + 0.8 * draws.rand(T, 1), draws.randn(T, 1, V)
    d, _ = preconditioners(k, beta, AWARE)
    ratios = {"DeltaNet": token_ratio(k, beta, torch.ones(K)), "beta-aware": token_ratio(k, beta, d)}
    earlier = {
        ("DeltaNet", 0.0): "4.8e-4",
        ("beta-aware", 0.0): "6.7e-4",
        ("DeltaNet", 0.5): "0.128",
        ("beta-aware", 0.5): "0.278",
    }
    lines: Lines = {}
    final: dict[tuple[str, float], Tensor] = {}
    rows: list[Row] = []
    for name, ratio, value in zip(ratios, ratios.values(), ("0.302", "0.179")):
        rows.append(sampled(f"mean (1 - βx)², {name}", mean(ratio), value))
    for level in (0.0, 0.5):
        v = read(target, k) + level * disturbance
        for name, rule in (("DeltaNet", None), ("beta-aware", AWARE)):
            states = learn(k, v, beta, rule, marks=MARKS)
            losses = torch.stack([relative_loss(S, target, k) for S in states])
            final[name, level] = losses[-1]
            rows.append(sampled(f"F, noise {level:g}, {name}", losses[-1], earlier[name, level]))
            lines[f"{name}, noise {level:g}"] = ((*MARKS, T), losses.mean(1))
    worse = torch.stack([final["beta-aware", x] / final["DeltaNet", x] for x in (0.0, 0.5)]).mean(1)
    rows.append(at_least("F, beta-aware over DeltaNet, noise 0 and .5", worse, 1.0, "the sign", "> 1: worse"))
    return Outcome(
        "Tokens, β ~ U(.1, .9), κ = 10000",
        draws.seeds,
        tuple(rows),
        (Panel("tokens", "F(S) / F(0)", lines, log_x=True, log_y=True),),
        "Beta-aware feedback lowers the residual ratio.",
        f"F beside DeltaNet's: {worse[0]:.2f} times as large without noise, {worse[1]:.2f} times with. A larger "
        "effective step takes up more noise.",
    )


def key_lengths() -> Outcome:
    """S4: Gaussian keys that are not normalised; E||k||^2 = 1."""
    rows: list[Row] = []
    lines: Lines = {}
    expected = {"DeltaNet": "5e-12", "NLMS": "1.5e-13", "OSDN": "3e-15"}
    for kappa in (100.0, 1e4):
        draws = Draws(SEEDS)
        scales = spectrum(kappa, K)
        k = draws.randn(T, 1, K) * (scales / scales.sum()).sqrt()
        target, one = draws.randn(1, K, V), constant(k, 1.0)
        v = read(target, k)
        states = {
            "DeltaNet": learn(k, v, one, None, marks=MARKS),
            "NLMS": learn(k, v, 1 / k.square().sum(-1), None, marks=MARKS),
            "OSDN": learn(k, v, one, FREE, marks=MARKS),
            "OSDN, box [0, 2]": learn(k, v, one, osdn.Preconditioner(d_max=2.0), marks=MARKS),
        }
        if kappa == 100:
            errors = {name: state_error(each[-1], target) for name, each in states.items()}
            rows += [
                sampled(f"state error, κ = 100, {name}", errors[name], x, log=True) for name, x in expected.items()
            ]
            order = torch.stack([errors["OSDN"] / errors["NLMS"], errors["NLMS"] / errors["DeltaNet"]])
            rows.append(at_most("OSDN over NLMS, NLMS over DeltaNet, seed by seed", order, 1.0, "the order"))
            for name, each in states.items():
                lines[name] = ((*MARKS, T), torch.stack([state_error(S, target) for S in each]).mean(1))
        else:
            final = {name: relative_loss(each[-1], target, k) for name, each in states.items()}
            rows += [
                sampled("F, κ = 10000, DeltaNet", final["DeltaNet"], "3.4e-4"),
                sampled("F, κ = 10000, OSDN, box [0, 2]", final["OSDN, box [0, 2]"], "2.7e-4"),
                at_least("F, κ = 10000, OSDN without a box", final["OSDN"], 1.0, "above F(0)", "diverges"),
            ]
            diverged = int((final["OSDN"] > 1).sum())
    return Outcome(
        "Tokens, Gaussian keys of any length, E||k||² = 1, β = 1",
        draws.seeds,
        tuple(rows),
        (Panel("tokens (κ = 100)", "||S - S*||² / ||S*||²", lines, log_x=True, log_y=True),),
        "Where keys differ in length, beta-free feedback does learn a preconditioner, and beats NLMS at κ = 100.",
        f"At κ = 10000 it gains little. Expected to diverge there without a box, it did on {diverged} of 8 seeds.",
    )


def covariance_switch() -> Outcome:
    """S5: at T / 2 the spectrum is permuted and the target replaced."""
    draws = Draws(SEEDS)
    z, scales = draws.randn(T, 1, K), spectrum(1e4, K).sqrt()
    order = draws.rand(K).argsort(-1)
    k = unit(torch.cat([z[:, : T // 2] * scales, z[:, T // 2 :] * scales[order][:, None, None]], 1))
    first, second = draws.randn(1, K, V), draws.randn(1, K, V)
    v = torch.cat([read(first, k[:, : T // 2]), read(second, k[:, T // 2 :])], 1)
    marks = tuple(T // 2 + T // 2 ** (i + 1) for i in range(6, 0, -1))
    rows: list[Row] = []
    lines: Lines = {}
    for name, rule, forget, value in (
        ("DeltaNet", None, 1.0, "1.0e-3"),
        ("OSDN", osdn.Preconditioner(0.5), 1.0, "1.0e-3"),
        ("with APF .9999", osdn.Preconditioner(0.5), 0.9999, "1.7e-3"),
        ("with APF .999", osdn.Preconditioner(0.5), 0.999, "1.2e-2"),
    ):
        states = learn(k, v, constant(k, 1.0), rule, forget=forget, marks=marks)
        losses = torch.stack([relative_loss(S, second, k[:, T // 2 :]) for S in states])
        rows.append(sampled(f"F at the end, {name}", losses[-1], value))
        lines[name] = ([m - T // 2 for m in (*marks, T)], losses.mean(1))
    return Outcome(
        "Tokens, covariance and S* switched at T / 2",
        draws.seeds,
        tuple(rows),
        (Panel("tokens since the switch", "F(S) / F(0)", lines, log_x=True, log_y=True),),
        "",
        "Forgetting does not help to follow a switch of covariance: with unit keys and β = 1 it only shrinks the step.",
    )


def correlated_gates() -> Outcome:
    """S6: two halves of the features, beta .2 for one and .8 for the other, swapped at T / 2."""
    draws = Draws(SEEDS)
    z, first_half = draws.randn(T, 1, K), draws.rand(T, 1) < 0.5
    k = unit(z * torch.where(torch.arange(K) < K // 2, first_half[..., None], ~first_half[..., None]))
    low = torch.cat([first_half[:, : T // 2], ~first_half[:, T // 2 :]], 1)
    beta = torch.where(low, 0.2, 0.8).to(k)
    old, fresh = draws.randn(1, K, V), draws.randn(1, K, V)
    h = T // 2
    rules = {
        "DeltaNet": (osdn.Preconditioner(0.0), 1.0),
        "aware, d_max 10": (osdn.Preconditioner(4.0, "beta_aware", d_max=10.0), 1.0),
        "with APF .9995": (osdn.Preconditioner(4.0, "beta_aware", d_max=10.0), 0.9995),
        "aware, d_max 2.5": (osdn.Preconditioner(4.0, "beta_aware", d_max=2.5), 1.0),
    }
    earlier = {
        "DeltaNet": (".34", ".338", ".41", ".190"),
        "aware, d_max 10": ("6e-6", ".123", "1.26", ".046"),
        "with APF .9995": ("4e-3", ".115", ".78", ""),
        "aware, d_max 2.5": ("", "", ".23", ".073"),
    }

    def error(window: slice, rule: osdn.Preconditioner, forget: float, d: Tensor, S: Tensor, c: float = 1.0) -> Tensor:
        """After a window in which the fresh target is learned from S, with d as it is at the window's start."""
        part = k[:, window]
        [end] = learn(part, read(fresh, part), c * beta[:, window], rule, forget=forget, d=d[:, window.start], S=S)
        return state_error(end, fresh)

    after, last = slice(h, h + 96), slice(h - 96, h)
    rows: list[Row] = []
    lines: Lines = {}
    learned, steady = dict[str, Tensor](), dict[str, Tensor]()
    for name, (rule, forget) in rules.items():
        d, _ = preconditioners(k, beta, rule, forget=forget)
        ratio = token_ratio(k, beta, d)
        steady[name] = mean(ratio[:, h - 512 : h])
        learned[name] = error(last, rule, forget, d, torch.zeros_like(fresh))
        measured = (steady[name], mean(ratio[:, h : h + 512]), error(after, rule, forget, d, old), learned[name])
        what = (
            "mean (1 - βx)², 512 tokens before the swap",
            "mean (1 - βx)², 512 tokens after the swap",
            "state error 96 tokens after the swap",
            "state error, last 96 tokens before the swap",
        )
        rows += [
            sampled(f"{quantity}, {name}", each, value, log="e" in value)
            for quantity, each, value in zip(what, measured, earlier[name])
            if value
        ]
        smooth = ratio.mean((0, 2)).unfold(0, 64, 64).mean(-1)
        lines[name] = (torch.arange(len(smooth)) * 64 + 32, smooth)
    plain, ones = rules["DeltaNet"][0], torch.ones(len(k), T, 1, K, dtype=k.dtype)
    factors = [1.0 + 0.05 * i for i in range(25)]
    scaled = torch.stack([error(last, plain, 1.0, ones, torch.zeros_like(fresh), c) for c in factors])
    best = int(scaled.mean(1).argmin())
    rows.append(sampled("the same, DeltaNet with β times the best scalar", scaled[best], ".133"))
    online = learned["aware, d_max 10"]
    rows.append(at_least("that control's error over aware's, each seed", scaled[best] / online, 1.0, "the sign", "> 1"))
    by_scalar: Lines = {
        "DeltaNet, β times c": (factors, scaled.mean(1)),
        "aware, d_max 10, β as it is": (factors, online.mean().expand(len(factors))),
    }
    return Outcome(
        "Tokens, β tied to features (.2 and .8), swapped at T / 2",
        draws.seeds,
        tuple(rows),
        (
            Panel("token", "mean (1 - βx)² of 64 tokens and all seeds", lines, log_y=True),
            Panel("c, factor of β", "state error, 96 tokens before the swap", by_scalar),
        ),
        "Where gates correlate with features, aware OSDN learns what no scalar can do: state error "
        f"{online.mean():.3f} against {scaled[best].mean():.3f} for the best scalar tried, c = {factors[best]:.2f}.",
        "Behind the swap the learned d is wrong and does harm until relearned; a smaller box bounds the harm better "
        f"than forgetting does, and forgetting costs in the steady state ({steady['with APF .9995'].mean():.1e} "
        f"against {steady['aware, d_max 10'].mean():.1e}). The scalar control was run here and in S7 only.",
    )


def one_pass_recall() -> Outcome:
    """S7: 16 pairs after WARM_UP keys that move d alone."""
    K, pairs = 64, 16
    rows: list[Row] = []
    left: dict[float, dict[str, float]] = {}
    earlier = {1.0: (".334", ".334", ".185", ".185"), 100.0: (".408", ".408", ".346", ".351")}
    for condition, values in earlier.items():
        draws = Draws(range(64))
        k = unit(draws.randn(WARM_UP + pairs, 1, K) * spectrum(condition, K).sqrt())
        beta, v = 0.3 + 0.4 * draws.rand(WARM_UP + pairs, 1), draws.randn(pairs, 1, V)
        free, aware = (osdn.Preconditioner(4.0, feedback, d_max=2.0) for feedback in ("beta_free", "beta_aware"))
        d_free, d_aware = (preconditioners(k, beta, rule)[0][:, WARM_UP:] for rule in (free, aware))
        k, beta = k[:, WARM_UP:], beta[:, WARM_UP:]
        c = float(progress(k, d_aware).mean())
        measured = {
            "DeltaNet": _recall(k, v, beta, None),
            "beta-free": _recall(k, v, beta, free, d_free[:, 0]),
            "beta-aware": _recall(k, v, beta, aware, d_aware[:, 0]),
            "DeltaNet, β · mean x": _recall(k, v, c * beta, None),
        }
        rows += [
            sampled(f"recall residual, κ = {condition:g}, {name}", each, value, 64)
            for (name, each), value in zip(measured.items(), values)
        ]
        apart = measured["beta-aware"] - measured["DeltaNet, β · mean x"]
        slack = 3 * float(apart.std()) / 8
        quantity = f"beta-aware minus its scalar control, κ = {condition:g}"
        rows.append(within(quantity, apart, 0.0, slack, "3 standard errors, paired"))
        left[condition] = {name: float(each.mean()) for name, each in measured.items()}
    random = left[1.0]
    dots: Lines = {f"κ = {condition:g}": (list(each), list(each.values())) for condition, each in left.items()}
    return Outcome(
        "One-pass recall of 16 pairs, β ~ U(.3, .7)",
        draws.seeds,
        tuple(rows),
        (
            Panel(
                "",
                "recall residual",
                dots,
                dots=True,
            ),
        ),
        f"On random keys beta-aware OSDN leaves {random['beta-aware']:.3f} of the residual, DeltaNet "
        f"{random['DeltaNet']:.3f}.",
        f"DeltaNet with β times one scalar, the mean of x, leaves {random['DeltaNet, β · mean x']:.3f}: the gain "
        f"is a larger step and nothing else. Beta-free OSDN leaves {random['beta-free']:.3f}, what DeltaNet does.",
    )


def _recall(k: Tensor, v: Tensor, beta: Tensor, rule: osdn.Preconditioner | None, d: Tensor | float = 1.0) -> Tensor:
    """sum ||S^T k_t - v_t||^2 over sum ||v_t||^2, `[N]`, where S has learned the pairs in one pass from 0."""
    [S] = learn(k, v, beta, rule, d=d)
    return (read(S, k) - v).square().sum((1, 2, 3)) / v.square().sum((1, 2, 3))


def gates() -> Outcome:
    """The residual ratio against the decayed state, and against the undecayed one."""
    draws = Draws(range(4))
    length, size, width = 400, 16, 8
    k, beta, target = unit(draws.randn(length, 1, size)), draws.rand(length, 1), draws.randn(1, size, width)
    v, d0 = read(target, k), 0.2 + 1.8 * draws.rand(1, size)
    used, _ = preconditioners(k, beta, AWARE, d=d0)
    exact = token_ratio(k, beta, used)
    # Now and then a token forgets; in between S comes close to S*, so that residuals are small.
    wipes = draws.rand(length, 1) < 0.02
    decays = {"scalar": draws.rand(length, 1).log(), "channel": draws.rand(length, 1, size).log()}
    rows: list[Row] = []
    dots: Lines = {}
    for name, g in decays.items():
        g = torch.where(wipes if name == "scalar" else wipes[..., None], g, 0.0)
        decayed, undecayed = _ratios(k, v, beta, g, d0)
        error = ((decayed - exact).abs() / exact).flatten(1).amax(1)
        rows.append(at_most(f"{name} gate, decayed state: ratio beside (1 - βx)²", error, 1e-6, ROUNDING, "equal"))
        q = (undecayed / exact).flatten(1).amax(1)
        rows.append(at_least(f"{name} gate, undecayed state: largest ratio / (1 - βx)²", q, 10.0, "not near 1", ">> 1"))
        for state, ratio in (("decayed", decayed), ("undecayed", undecayed)):
            dots[f"{name} gate, {state} state"] = (exact[wipes], ratio[wipes])
    rows.append(_small_residual())
    return Outcome(
        "Residual ratio of gated rules, against two states",
        draws.seeds,
        tuple(rows),
        (Panel("(1 - βx)², tokens that forget", "measured ratio", dots, log_x=True, log_y=True, dots=True),),
        "Against the decayed state the ratio is (1 - βx)² exactly, for every gate.",
        "Against the undecayed state it is that times a factor of S and v which no choice of d controls, and which "
        "grows without bound as the residual shrinks: no regret is defined there.",
    )


def _ratios(k: Tensor, v: Tensor, beta: Tensor, g: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """f_t(S_t) over f_t of the decayed and of the undecayed state, `[N, T, 1]` each; from S = 0, beta-aware."""
    N, T, H, K = k.shape
    S, d = torch.zeros(N, H, K, v.shape[-1], dtype=k.dtype), d.clone()
    decayed, undecayed = [], []
    for t in range(T):
        key, before = k[:, t : t + 1], S.clone()
        kept = before * g[:, t].exp().view(N, H, -1, 1)
        now = (k[:, t], k[:, t], v[:, t], beta[:, t], osdn.DeltaState(S, d))
        osdn.online_scaled_delta_step(*now, g=g[:, t], preconditioner=AWARE, qk_l2norm=False)
        after, of_kept, of_before = ((v[:, t] - read(x, key)[:, 0]).square().sum(-1) for x in (S, kept, before))
        decayed.append(after / of_kept)
        undecayed.append(after / of_before)
    return torch.stack(decayed, 1), torch.stack(undecayed, 1)


def _small_residual() -> Row:
    """q = ||alpha r - (1 - alpha) v||^2 / ||r||^2 at ||r|| = .003 ||v||, r orthogonal to v, alpha = .9."""
    k = torch.eye(4, dtype=F64)[None, :1, None]
    v, beta = torch.tensor([[[[1.0, 0.0]]]], dtype=F64), constant(k, 0.5)
    S = torch.zeros(1, 1, 4, 2, dtype=F64)
    S[..., 0, :] = torch.tensor([1.0, 0.003], dtype=F64)  # S^T k = v + r
    # d == 1 and beta = 1/2: the ratio against the decayed state is 1/4.
    after = S.clone()
    now = (k[:, 0], k[:, 0], v[:, 0], beta[:, 0], osdn.DeltaState(after))
    osdn.online_scaled_delta_step(*now, g=constant(k, math.log(0.9))[:, 0], preconditioner=None, qk_l2norm=False)
    left, before = ((read(x, k) - v).square().sum() for x in (after, S))
    want = (0.9**2 * 0.003**2 + 0.1**2) / 0.003**2
    quantity = "undecayed state: ratio / (1 - βx)² at ||r|| = .003 ||v||, α = .9"
    return within(quantity, (4 * left / before)[None], want, 1e-9 * want, ROUNDING)
