"""The two sequential parts of the chunked backend, as `torch.library` operators with hand-written backwards.

    osdn::precondition_scan   e = (I + L)^-1 (c1 - c2 G s d), then d_t; a token scan from a chunk's first clip on
    osdn::delta_scan          U = (I + A)^-1 (vb - kb S), O = scale (q S + P U), S <- Gamma S + w^T U

Being opaque operators, their loops over chunks and the data-dependent token scan leave a `torch.compile` graph whole.
Rows [M, C, ...] and waves are those of `chunked.py`: M rows, C chunk length, NH states, K key dim, V value dim;
`waves` holds the number of rows of each wave, or one number for all, and a wave of n rows concerns the first n states.
Derivations: docs/math.md.
"""

from __future__ import annotations

from itertools import accumulate, pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from osdn.ops.options import no_autocast


def segment_sums(f: Tensor) -> Tensor:
    """[M, C] -> [M, C, C]: sum_{j < i <= t} f_i at (t, j) for j <= t, -inf above the diagonal. No cancellation."""
    C = f.shape[1]
    ones = torch.ones(C, C, dtype=torch.bool, device=f.device)
    x = f[:, :, None].expand(-1, C, C).masked_fill(~ones.tril(-1), 0)
    return x.cumsum(1).masked_fill(~ones.tril(), -torch.inf)


def _products(forget: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of one wave: R_tj = prod_{j < i <= t} lambda_i, 0 for j > t; G_t = prod_{i < t} lambda_i, None where it is 1."""
    if forget is None:
        return s.new_ones(s.shape[1], s.shape[1]).tril().expand(len(s), -1, -1), None
    return segment_sums(forget).exp(), torch.cat([torch.zeros_like(forget[:, :1]), forget[:, :-1]], 1).cumsum(1).exp()


def _shifted(R: Tensor) -> Tensor:
    """R_{t-1,j}: 0 on the diagonal."""
    return torch.cat([torch.zeros_like(R[:, :1]), R[:, :-1]], 1)


def _system(s: Tensor, scaled_c2: Tensor, R: Tensor | None) -> Tensor:
    """Of one wave: L below its diagonal, with (I + L) e = c1 - c2 G s d; R shifted, None where it is 1."""
    L = (s @ s.mT).mul_(scaled_c2[..., None])
    return L if R is None else L.mul_(R)


@torch.library.custom_op(
    "osdn::precondition_scan",
    mutates_args=(),
    schema="(Tensor s, Tensor c1, Tensor c2, Tensor? forget, Tensor d, int[] waves, float eta, float d_min, "
    "float d_max) -> (Tensor, Tensor, Tensor)",
)
def precondition_scan(
    s: Tensor,
    c1: Tensor,
    c2: Tensor,
    forget: Tensor | None,
    d: Tensor,
    waves: list[int],
    eta: float,
    d_min: float,
    d_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_{t+1} = clip(lambda_t d_t + eta (c1_t - c2_t <d_t, s_t>) s_t) over all rows.

    s [M, C, K], c1, c2, forget (log lambda) [M, C], d [NH, K] -> d as used [M, C, K], d after the last token [NH, K],
    and where the clip was inactive [M, C, K].
    """
    used, inside = torch.empty_like(s), torch.ones_like(s, dtype=torch.bool)
    d, scaled_c2 = d.clone(), eta * c2
    R, G = _products(None, s)
    R = _shifted(R)
    for i, n in _slices(waves, len(s)):
        s_, c1_, c2_, f_, scaled_ = _of_wave(i, s, c1, c2, forget, scaled_c2)
        now = d[:n]
        if f_ is not None:
            R, G = _products(f_, s_)
            R = _shifted(R)
        x = (now[:, None] @ s_.mT)[:, 0]
        if G is not None:
            x *= G
        right = torch.addcmul(c1_, c2_, x, value=-1)[..., None]
        L = _system(s_, scaled_, None if f_ is None else R)
        e = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True).mul_(eta)
        start = now[:, None] if G is None else G[..., None] * now[:, None]
        path = torch.baddbmm(start, R[:n] * e.mT, s_, out=used[i])
        last = path[:, -1] if f_ is None else f_[:, -1:].exp() * path[:, -1]
        last = torch.addcmul(last, e[:, -1], s_[:, -1])
        ends = [float(x) for part in (path, last) for x in torch.aminmax(part)]
        if not all(d_min <= x <= d_max for x in ends):  # NaN too is left to the token scan
            after = torch.cat([path[:, 1:], last[:, None]], 1)
            _finish_by_tokens(after, inside[i], now, s_, c1_, c2_, f_, eta, d_min, d_max)
            path[:, 0], path[:, 1:], last = now, after[:, :-1], after[:, -1]
        d[:n] = last
    return used, d, inside


def _slices(waves: list[int], M: int) -> list[tuple[slice, int]]:
    if len(waves) == 1:  # any M, so that a compiled graph holds for any number of chunks
        waves = waves * (M // waves[0])
    return [(slice(a, b), b - a) for a, b in pairwise(accumulate(waves, initial=0))]


def _of_wave(i: slice, *rows: Any) -> Any:
    return [None if x is None else x[i] for x in rows]


def _finish_by_tokens(
    after: Tensor,
    inside: Tensor,
    d: Tensor,
    s: Tensor,
    c1: Tensor,
    c2: Tensor,
    forget: Tensor | None,
    eta: float,
    d_min: float,
    d_max: float,
) -> None:
    """From each row's first clip on, replace the solved d_{t+1} in `after` [n, C, K] by those of the token scan.

    All rows are walked through, and from the start of the chunk: a few operations a token cost the same for many rows
    as for one, and a row's bits then depend neither on the other rows nor on later tokens.
    """
    solved = (after.amin(-1, keepdim=True) >= d_min) & (after.amax(-1, keepdim=True) <= d_max)  # False for NaN
    solved = solved.cummin(1).values
    if solved.all():  # only d_0, which is not clipped, lies outside
        return
    keeps = repeat(None) if forget is None else forget.exp()[..., None, None].unbind(1)
    rows = (s[:, :, None], eta * c1[..., None, None], _pull(s, eta * c2))
    now, raws, clipped = d[:, None], [], []
    for s_, push, pull, keep in zip(*(x.unbind(1) for x in rows), keeps):
        e = torch.baddbmm(push, now, pull)
        raws.append(torch.addcmul(now if keep is None else keep * now, e, s_))
        now = raws[-1].clamp(d_min, d_max)
        clipped.append(now)
    raw, now = torch.cat(raws, 1), torch.cat(clipped, 1)
    torch.where(solved, after, now, out=after)
    torch.eq(raw, now, out=inside)


def _pull(s: Tensor, scaled_c2: Tensor) -> Tensor:
    """-eta c2_t s_t as columns [n, C, K, 1]: a row times it is the feedback to d_t, or to u_t."""
    return -scaled_c2[..., None, None] * s[..., None]


@precondition_scan.register_fake
def _(s, c1, c2, forget, d, waves, eta, d_min, d_max):  # type: ignore[no-untyped-def]
    return torch.empty_like(s), torch.empty_like(d), torch.empty_like(s, dtype=torch.bool)


@torch.library.custom_op(
    "osdn::precondition_scan_backward",
    mutates_args=(),
    schema="(Tensor grad_used, Tensor grad_final, Tensor s, Tensor c1, Tensor c2, Tensor? forget, Tensor used, "
    "Tensor inside, int[] waves, float eta) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def precondition_scan_backward(
    grad_used: Tensor,
    grad_final: Tensor,
    s: Tensor,
    c1: Tensor,
    c2: Tensor,
    forget: Tensor | None,
    used: Tensor,
    inside: Tensor,
    waves: list[int],
    eta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, c1, c2, forget (empty without) and d_0.

    With m_t the clip's mask, a_t the incoming gradient of d_t: u_t = m_t adj_{t+1}, p_t = <u_t, s_t>,
    adj_t = a_t + lambda_t u_t - eta c2_t p_t s_t; where no clip fired, (I + L^T) p = <s, U0> with
    U0_t = sum_{j >= t} R_jt a_{j+1}, a_C being the adjoint from behind the chunk.
    """
    with no_autocast(s.device):
        lam = None if forget is None else forget.exp()
        ds, p, x, scaled_c2 = torch.empty_like(s), torch.empty_like(c1), torch.empty_like(c1), eta * c2
        df = s.new_empty(0) if forget is None else torch.empty_like(forget)
        adj = grad_final.clone()
        for i, n in reversed(_slices(waves, len(s))):
            a, s_, used_, f_, lam_, scaled_ = _of_wave(i, grad_used, s, used, forget, lam, scaled_c2)
            if inside[i].view(torch.uint8).all():  # 15 times faster than of booleans
                R, _ = _products(f_, s_)
                L = _system(s_, scaled_, None if f_ is None else _shifted(R))
                u = R.mT @ torch.cat([a[:, 1:], adj[:n, None]], 1)
                h = (u * s_).sum(-1, keepdim=True)
                p[i] = torch.linalg.solve_triangular(L.mT, h, upper=True, unitriangular=True)[..., 0]
                back = (scaled_ * p[i])[..., None] * s_
                u -= _shifted(R).mT @ back
                adj[:n] = a[:, 0] + (u[:, 0] if lam_ is None else lam_[:, :1] * u[:, 0]) - back[:, 0]
            else:
                u, adj[:n] = _adjoint_by_tokens(a, adj[:n], s_, scaled_, lam_, inside[i])
                p[i] = (u * s_).sum(-1)
            x[i] = (used_ * s_).sum(-1)
            torch.mul(u, (eta * c1[i] - scaled_ * x[i])[..., None], out=ds[i])
            ds[i].addcmul_(used_, (scaled_ * p[i])[..., None], value=-1)
            if lam_ is not None:
                df[i] = lam_ * (u * used_).sum(-1)
        p *= eta
        return ds, p, -p * x, df, adj


def _adjoint_by_tokens(
    a: Tensor, adj: Tensor, s: Tensor, scaled_c2: Tensor, lam: Tensor | None, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one wave: u [n, C, K] from behind, u_{t-1} = m_{t-1} (a_t + lambda_t u_t - eta c2_t p_t s_t), and adj_0."""
    m = torch.cat([torch.ones_like(s[:, :1]), inside[:, :-1].to(s.dtype)], 1)  # of token t - 1, so that u_{-1} = adj_0
    m, a, s, pull = (m if lam is None else m * lam[..., None]), m * a, m * s, _pull(s, scaled_c2)
    us = [u := (inside[:, -1] * adj)[:, None]]
    for keep, a_, s_, pull_ in reversed(list(zip(*(x.unbind(1) for x in (*(y[:, :, None] for y in (m, a, s)), pull))))):
        u = torch.addcmul(a_, keep, u).addcmul_(torch.bmm(u, pull_), s_)
        us.append(u)
    return torch.cat(us[-2::-1], 1), u[:, 0]


@precondition_scan_backward.register_fake
def _(grad_used, grad_final, s, c1, c2, forget, used, inside, waves, eta):  # type: ignore[no-untyped-def]
    df = s.new_empty(0) if forget is None else torch.empty_like(forget)
    return torch.empty_like(s), torch.empty_like(c1), torch.empty_like(c2), df, torch.empty_like(grad_final)


def _precondition_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    s, c1, c2, forget, _, ctx.waves, ctx.eta, _, _ = inputs
    used, _, inside = output
    ctx.mark_non_differentiable(inside)
    ctx.save_for_backward(s, c1, c2, forget, used, inside)


def _precondition_backward(ctx, grad_used, grad_final, _):  # type: ignore[no-untyped-def]
    s, c1, c2, forget, used, inside = ctx.saved_tensors
    ds, dc1, dc2, df, dd = precondition_scan_backward(
        grad_used, grad_final, s, c1, c2, forget, used, inside, ctx.waves, ctx.eta
    )
    return ds, dc1, dc2, None if forget is None else df, dd, None, None, None, None


precondition_scan.register_autograd(_precondition_backward, setup_context=_precondition_setup)


@torch.library.custom_op(
    "osdn::delta_scan",
    mutates_args=(),
    schema="(Tensor q, Tensor kb, Tensor w, Tensor vb, Tensor A, Tensor P, Tensor? kept, Tensor S, int[] waves, "
    "float scale, bool saves) -> (Tensor, Tensor, Tensor, Tensor)",
)
def delta_scan(
    q: Tensor,
    kb: Tensor,
    w: Tensor,
    vb: Tensor,
    A: Tensor,
    P: Tensor,
    kept: Tensor | None,
    S: Tensor,
    waves: list[int],
    scale: float,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chunk by chunk: U = (I + A)^-1 (vb - kb S), O = scale (q S + P U), S <- kept S + w^T U.

    q, kb, w [M, C, K], vb [M, C, V], A (below the diagonal), P [M, C, C], kept [M, 1 | K], S [NH, K, V]
    -> O [M, C, V], S after the last token, and, when `saves`, U [M, C, V] and S before each chunk [M, K, V].
    """
    M, C, K = q.shape
    V = vb.shape[-1]
    o = torch.empty_like(vb)
    U_all, S_all = (vb.new_empty(shape if saves else 0) for shape in ((M, C, V), (M, K, V)))
    S = S.clone(memory_format=torch.contiguous_format)  # a step takes no other
    for i, n in _slices(waves, len(q)):
        S_ = S[:n]
        U = torch.linalg.solve_triangular(
            A[i], torch.baddbmm(vb[i], kb[i], S_, alpha=-1), upper=False, unitriangular=True
        )
        if saves:
            U_all[i], S_all[i] = U, S_
        torch.bmm(q[i], S_, out=o[i])
        o[i].baddbmm_(P[i], U, beta=scale, alpha=scale)
        if kept is not None:
            S_ *= kept[i, :, None]
        S_.baddbmm_(w[i].mT, U)
    return o, S, U_all, S_all


@delta_scan.register_fake
def _(q, kb, w, vb, A, P, kept, S, waves, scale, saves):  # type: ignore[no-untyped-def]
    saved = (vb.shape, (*q.shape[::2], vb.shape[-1])) if saves else ((0,), (0,))
    return torch.empty_like(vb), torch.empty_like(S), *(vb.new_empty(x) for x in saved)


@torch.library.custom_op(
    "osdn::delta_scan_backward",
    mutates_args=(),
    schema="(Tensor grad_o, Tensor grad_S, Tensor q, Tensor kb, Tensor w, Tensor A, Tensor P, Tensor? kept, Tensor U, "
    "Tensor S, int[] waves, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def delta_scan_backward(
    grad_o: Tensor,
    grad_S: Tensor,
    q: Tensor,
    kb: Tensor,
    w: Tensor,
    A: Tensor,
    P: Tensor,
    kept: Tensor | None,
    U: Tensor,
    S: Tensor,
    waves: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, kb, w, vb, A, P, kept (empty without) and S_0; S holds the state before each chunk."""
    with no_autocast(q.device):
        dq, dkb, dw, dvb, dA, dP = (torch.empty_like(x) for x in (q, kb, w, U, A, P))
        dkept = q.new_empty(0) if kept is None else torch.empty_like(kept)
        below = A.new_ones(A.shape[1:]).tril(-1)
        dS = grad_S.clone()
        for i, n in reversed(_slices(waves, len(q))):
            dS_, do = dS[:n], scale * grad_o[i]
            dU = torch.baddbmm(w[i] @ dS_, P[i].mT, do)
            dB = torch.linalg.solve_triangular(A[i].mT, dU, upper=True, unitriangular=True)
            torch.bmm(U[i], dS_.mT, out=dw[i])
            torch.bmm(do, U[i].mT, out=dP[i])
            torch.bmm(do, S[i].mT, out=dq[i])
            torch.bmm(dB, U[i].mT, out=dA[i]).neg_()
            torch.bmm(dB, S[i].mT, out=dkb[i]).neg_()
            dvb[i] = dB
            if kept is not None:
                per_channel = (dS_ * S[i]).sum(-1)
                dkept[i] = per_channel if kept.shape[1] > 1 else per_channel.sum(-1, keepdim=True)
                dS_ *= kept[i, :, None]
            dS_.baddbmm_(q[i].mT, do).baddbmm_(kb[i].mT, dB, alpha=-1)
        return dq, dkb, dw, dvb, dA.mul_(below), dP, dkept, dS


@delta_scan_backward.register_fake
def _(grad_o, grad_S, q, kb, w, A, P, kept, U, S, waves, scale):  # type: ignore[no-untyped-def]
    dkept = q.new_empty(0) if kept is None else torch.empty_like(kept)
    return *(torch.empty_like(x) for x in (q, kb, w, U, A, P)), dkept, torch.empty_like(grad_S)


def _delta_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, kb, w, _, A, P, kept, _, ctx.waves, ctx.scale, _ = inputs
    _, _, U, S = output
    ctx.mark_non_differentiable(U, S)
    ctx.save_for_backward(q, kb, w, A, P, kept, U, S)


def _delta_backward(ctx, grad_o, grad_S, *_):  # type: ignore[no-untyped-def]
    q, kb, w, A, P, kept, U, S = ctx.saved_tensors
    *grads, dkept, dS = delta_scan_backward(grad_o, grad_S, q, kb, w, A, P, kept, U, S, ctx.waves, ctx.scale)
    return *grads, None if kept is None else dkept, dS, None, None, None


delta_scan.register_autograd(_delta_backward, setup_context=_delta_setup)
