"""The causal convolution against a plain loop over tokens, dense and packed."""

import pytest
import torch

from osdn.nn.conv import causal_conv1d

D, W = 5, 4


def loop(x, weight, state):
    """One sequence [T, D] from a state [D, W]."""
    window, out = state, []
    for token in x:
        window = torch.cat([window[:, 1:], token[:, None]], 1)
        out.append((window * weight[:, 0]).sum(1))
    return torch.stack(out) if out else x, window


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_dense_is_the_loop(T, with_state):
    x, weight, state = random(2, T, D), random(D, 1, W), random(2, D, W) if with_state else None
    y, final = causal_conv1d(x, weight, state)
    starts = torch.zeros(2, D, W, dtype=torch.float64) if state is None else state
    for row in range(2):
        expected_y, expected_final = loop(x[row], weight, starts[row])
        torch.testing.assert_close(y[row], expected_y)
        torch.testing.assert_close(final[row], expected_final)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_is_looped_over_sequences_with_gradients(with_state):
    lengths = [3, 0, 1, 7, 4, 0]
    x, weight = random(1, sum(lengths), D), random(D, 1, W)
    state = random(len(lengths), D, W) if with_state else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    y, final = causal_conv1d(x, weight, state, cu_seqlens)

    starts = torch.zeros(len(lengths), D, W, dtype=torch.float64) if state is None else state
    parts = [loop(part, weight, start) for part, start in zip(x[0].split(lengths), starts)]
    expected_y, expected_final = torch.cat([p for p, _ in parts]), torch.stack([f for _, f in parts])
    torch.testing.assert_close(y[0], expected_y)
    torch.testing.assert_close(final, expected_final)

    inputs = [x, weight] + ([state] if with_state else [])
    u, v = torch.randn_like(y), torch.randn_like(final)
    got = torch.autograd.grad((y * u).sum() + (final * v).sum(), inputs)
    expected = torch.autograd.grad((expected_y * u[0]).sum() + (expected_final * v).sum(), inputs)
    torch.testing.assert_close(got, expected)


def test_weights_of_another_dtype_are_taken():
    x, weight = torch.randn(1, 6, D, dtype=torch.bfloat16), torch.randn(D, 1, W)
    for state in (None, torch.randn(1, D, W)):
        y, _ = causal_conv1d(x, weight, state)
        assert torch.equal(y, causal_conv1d(x, weight.bfloat16(), state)[0])
