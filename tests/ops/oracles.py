"""Closed forms that share no step with the recurrence in `reference.py`: products of explicit matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_by_kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, d: Tensor, g: Tensor | None, S: Tensor) -> Tensor:
    """Outputs [T, V] of one head through the symmetric route, scale 1.

    For d > 0, S_t = Diag(sqrt d_t) M_t turns write-key scaling into KDA with the symmetric key sqrt(d_t) * k_t, the
    query sqrt(d_t) * q_t and the channel decay sqrt(d_{t-1} / d_t):
    M_t = (I - beta_t kappa_t kappa_t^T) D_t M_{t-1} + beta_t kappa_t v_t^T, M_0 = Diag(d_1)^(-1/2) S_0,
    summed as M_t = sum_j (prod_{i > j} A_i) beta_j kappa_j v_j^T + (prod_i A_i) M_0.

    q, k, d [T, K], v [T, V], beta [T], g [T, K] log decay or None, S [K, V].
    """
    T, K = k.shape
    kappa, query = d.sqrt() * k, d.sqrt() * q
    decay = torch.cat([torch.ones_like(d[:1]), (d[:-1] / d[1:]).sqrt()])
    if g is not None:
        decay = decay * g.exp()
    eye = torch.eye(K, dtype=k.dtype)
    A = (eye - beta[:, None, None] * kappa[:, :, None] * kappa[:, None, :]) * decay[:, None, :]
    outputs = []
    for t in range(T):
        product, M = eye, torch.zeros_like(S)
        for j in range(t, -1, -1):
            M = M + product @ (beta[j] * torch.outer(kappa[j], v[j]))
            product = product @ A[j]
        outputs.append(query[t] @ (M + product @ (S / d[0].sqrt()[:, None])))
    return torch.stack(outputs)


def preconditioner_by_products(k: Tensor, b: Tensor, lam: Tensor, d: Tensor, eta: Tensor) -> Tensor:
    """d_t [T + 1, K] of one head without a box: d_{t+1} = (lambda_t I - eta_t b_t^2 s_t s_t^T) d_t + eta_t b_t s_t.

    An affine map, so homogeneous matrices [[A, p], [0, 1]] are multiplied and applied to (d_0, 1).
    """
    T, K = k.shape
    s = k.square()
    product = torch.eye(K + 1, dtype=k.dtype)
    start = torch.cat([d, d.new_ones(1)])
    used = [d]
    for t in range(T):
        step = torch.eye(K + 1, dtype=k.dtype)
        step[:K, :K] = lam[t] * torch.eye(K, dtype=k.dtype) - eta[t] * b[t] ** 2 * torch.outer(s[t], s[t])
        step[:K, K] = eta[t] * b[t] * s[t]
        product = step @ product
        used.append((product @ start)[:K])
    return torch.stack(used)
