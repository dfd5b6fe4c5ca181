import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.data import MQAR


@st.composite
def tasks(draw):
    pairs, passes = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    return MQAR(
        num_pairs=pairs,
        passes=passes,
        seq_len=2 * pairs * (passes + 1) + draw(st.integers(0, 15)),
        vocab_size=2 * pairs + 2 + draw(st.integers(0, 20)),
        alpha=draw(st.sampled_from([0.01, 0.5, 1.0, 2.0])),
    )


@given(tasks(), st.integers(0, 2**31), st.sampled_from(["train", "test"]))
@settings(max_examples=60, deadline=None)
def test_every_label_is_the_listed_value_of_the_key_before_it(task, seed, split):
    ids, labels = task.batch(3, seed=seed, split=split)
    assert ids.shape == labels.shape == (3, task.seq_len)
    half, start = task.vocab_size // 2, 2 * task.num_pairs * task.passes
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        listing = dict(zip(row[0 : 2 * task.num_pairs : 2], row[1 : 2 * task.num_pairs : 2], strict=True))
        assert len(listing) == task.num_pairs == len(set(listing.values()))
        assert all(1 <= key < half <= value < task.vocab_size for key, value in listing.items())
        assert row[:start] == row[: 2 * task.num_pairs] * task.passes
        answers = [t for t, token in enumerate(label) if token != -100]
        assert all(t > start and (t - start) % 2 == 1 for t in answers)
        assert {row[t - 1]: label[t] for t in answers} == listing
        assert len(answers) == task.num_pairs


def test_a_batch_is_a_function_of_split_seed_and_step():
    task = MQAR(num_pairs=4, seq_len=32, vocab_size=64)
    first = task.batch(8, seed=3, step=5)
    again = task.batch(8, seed=3, step=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}, {"seed": 3, "step": 5, "split": "test"}):
        assert not torch.equal(first[0], task.batch(8, **other)[0])


def test_no_test_sequence_is_trained_on():
    task = MQAR(num_pairs=2, seq_len=8, vocab_size=64)
    test = {tuple(row) for row in task.batch(2000, seed=0, split="test")[0].tolist()}
    train = {tuple(row) for step in range(5) for row in task.batch(2000, seed=0, step=step)[0].tolist()}
    assert len(test) == 2000
    assert not test & train


def test_gaps_follow_the_power_law():
    # One query: its gap is one draw, so the frequencies are p itself.
    task = MQAR(num_pairs=1, seq_len=22, vocab_size=16)
    labels = task.batch(20_000, seed=1)[1]
    slot = (labels != -100).int().argmax(1).sub(3).div(2, rounding_mode="floor").numpy()
    p = np.arange(1, 11) ** (0.01 - 1)
    p /= p.sum()
    seen = np.bincount(slot, minlength=10) / len(slot)
    assert np.abs(seen - p).max() < 4 * np.sqrt(0.25 / len(slot))
    assert seen[0] > 4 * seen[9] > 0


def test_free_positions_hold_any_token_and_never_the_answer_on_purpose():
    task = MQAR(num_pairs=2, seq_len=64, vocab_size=32)
    ids, labels = task.batch(500, seed=2)
    answered = (ids == labels).sum() / (labels != -100).sum()
    assert answered < 2 / 32
    assert set(ids[:, 4:].unique().tolist()) == set(range(32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_pairs": 0}, "num_pairs: got 0, takes an integer >= 1"),
        ({"passes": 0}, "passes: got 0, takes an integer >= 1"),
        ({"num_pairs": 2.5}, "num_pairs: got 2.5, takes an integer >= 1"),
        ({"seq_len": "128"}, "seq_len: got '128', takes an integer >= 1"),
        ({"vocab_size": 256.0}, "vocab_size: got 256.0, takes an integer >= 1"),
        ({"alpha": math.inf}, "alpha: got inf, takes a finite number > 0"),
        ({"alpha": "1"}, "alpha: got '1', takes a finite number > 0"),
        ({"alpha": 0.0}, "alpha: got 0.0, takes a finite number > 0"),
        ({"num_pairs": 4, "seq_len": 15}, "seq_len: got 15, takes at least 2 * num_pairs * (passes + 1) = 16"),
        ({"num_pairs": 4, "seq_len": 23, "passes": 2}, "seq_len: got 23, takes at least"),
        ({"num_pairs": 4, "seq_len": 32, "vocab_size": 9}, "vocab_size: got 9, takes at least 10"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MQAR(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: got 0, takes an integer >= 1"),
        ({"seed": -1}, "seed: got -1, takes an integer >= 0"),
        ({"step": 0.5}, "step: got 0.5, takes an integer >= 0"),
        ({"split": "x"}, "split: got 'x', takes one of ('train', 'test')"),
    ],
)
def test_refusals_of_a_batch(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        MQAR().batch(**{"n": 2, "seed": 0, **arguments})
