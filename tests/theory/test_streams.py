"""The stream helpers: seeds side by side, the operator's own states, and a full right-Newton step by a rotation."""

from __future__ import annotations

import torch

import osdn
from osdn.theory.population import rotation
from osdn.theory.streams import (
    F64,
    Draws,
    constant,
    learn,
    preconditioners,
    progress,
    read,
    relative_loss,
    spectrum,
    state_error,
    token_ratio,
    unit,
)


def test_a_seed_draws_the_same_whoever_stands_beside_it():
    alone, among = Draws([5]), Draws([3, 5])
    for one, two in ((alone.randn(2, 3), among.randn(2, 3)), (alone.rand(4), among.rand(4))):
        assert torch.equal(one[0], two[1])
        assert not torch.equal(two[0], two[1])


def test_states_at_marks_are_those_of_the_operator():
    draws = Draws([0, 1])
    k, v, beta = 1.1 * unit(draws.randn(20, 1, 5)), draws.randn(20, 1, 3), draws.rand(20, 1)
    d, S = 0.2 + draws.rand(1, 5), draws.randn(1, 5, 3)
    rule = osdn.Preconditioner(2.0, "beta_aware", 0.1, 1.5)
    states = learn(k, v, beta, rule, forget=0.9, d=d, S=S, marks=(3, 11))
    assert len(states) == 3
    for state, T in zip(states, (3, 11, 20)):
        _, want = osdn.online_scaled_delta_rule(
            *(k[:, :T], k[:, :T], v[:, :T], beta[:, :T]),
            forget=torch.full((2, T, 1), 0.9, dtype=F64).log(),
            preconditioner=rule,
            initial_state=osdn.DeltaState(S, d),
            output_final_state=True,
            qk_l2norm=False,
            backend="reference",
        )
        torch.testing.assert_close(state, want.S, rtol=1e-12, atol=1e-12)
    used, end = preconditioners(k, beta, rule, forget=0.9, d=d)
    torch.testing.assert_close(end, want.d, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(token_ratio(k, beta, used), (1 - beta * (used * k * k).sum(-1)) ** 2)


def test_a_rotation_makes_right_newton_diagonal():
    """S += beta Sigma^-1 k (v - S^T k)^T with a full Sigma, against the operator on keys in Sigma's own basis."""
    draws = Draws([0])
    K, T = 5, 12
    R, scales = rotation(draws, K), spectrum(50.0, K)
    straight, target = unit(draws.randn(T, 1, K)), draws.randn(1, K, 3)
    k = straight @ R[:, None].mT
    v, beta = read(target, k), 1 / progress(straight, 1 / scales)
    [inside] = learn(straight, v, beta, osdn.Preconditioner(0.0), d=1 / scales)
    newton = R[0] @ torch.diag(1 / scales) @ R[0].mT
    S = torch.zeros(K, 3, dtype=F64)
    for t in range(T):
        key = k[0, t, 0]
        S = S + beta[0, t, 0] * torch.outer(newton @ key, v[0, t, 0] - S.mT @ key)
    torch.testing.assert_close(R[0] @ inside[0, 0], S, rtol=1e-11, atol=1e-11)
    # And beta x = 1: the key just written is read back exactly.
    torch.testing.assert_close(S.mT @ k[0, -1, 0], v[0, -1, 0], rtol=1e-11, atol=1e-11)


def test_losses():
    draws = Draws([0, 1])
    k, S, target = draws.randn(7, 1, 4), draws.randn(1, 4, 3), draws.randn(1, 4, 3)
    left, of_zero = (read(x, k).square().sum((1, 2, 3)) for x in (S - target, target))
    torch.testing.assert_close(relative_loss(S, target, k), left / of_zero)
    torch.testing.assert_close(state_error(2 * target, target), torch.ones(2, dtype=F64))
    assert constant(k, 0.5).shape == (2, 7, 1)
