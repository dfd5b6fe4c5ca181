import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from osdn.data import MQAR
from osdn.evals.checkpoint import Checkpoint
from osdn.evals.mqar import PairRecall


class Knows:
    """Looks up the value that stood behind the first occurrence of a token; of keys >= `below` it knows nothing."""

    device = torch.device("cpu")

    def __init__(self, below=999):
        self.below = below

    def __call__(self, input_ids, use_cache):
        assert not use_cache
        answers = torch.zeros_like(input_ids)
        for b, row in enumerate(input_ids.tolist()):
            for t, token in enumerate(row):
                answers[b, t] = row[row.index(token) + 1] if row.index(token) < t and token < self.below else 0
        return SimpleNamespace(logits=one_hot(answers, 256).float())


@pytest.fixture
def task(save):
    return PairRecall(Checkpoint.open(save()), (2, 8), seq_len=40, vocab_size=40, sequences=12)


def test_accuracy_by_number_of_pairs(task):
    assert len(task) == 24
    found = task.metrics(task.score(Knows(), task.order()))
    assert found == {f"{n} pairs": {"value": 1.0, "stderr": 0.0, "examples": 12, "x": n} for n in (2, 8)}
    records = task.score(Knows(below=10), task.order())
    for n, found in zip((2, 8), task.metrics(records).values(), strict=True):
        keys = task.ids[[r["index"] for r in records if r["pairs"] == n], : 2 * n : 2]
        shares = (keys < 10).double().mean(1)
        assert found["value"] == pytest.approx(float(shares.mean()))
        assert found["stderr"] == pytest.approx(float(shares.std() / 12**0.5))
        assert 0.2 < found["value"] < 0.8


def test_a_batch_changes_nothing(task, save):
    model = Checkpoint.open(save()).load("cpu", "auto")
    indices = [3, 20, 0, 12]
    assert task.score(model, indices) == [task.score(model, [i])[0] for i in indices]


def test_sequences_are_those_of_the_test_split(task, save):
    for i, n in enumerate((2, 8)):
        ids, labels = MQAR(n, 40, 40).batch(12, seed=0, split="test")
        assert torch.equal(task.ids[12 * i : 12 * (i + 1)], ids)
        assert torch.equal(task.labels[12 * i : 12 * (i + 1)], labels)
    with pytest.raises(ValueError, match=re.escape("vocab_size: got 257, takes at most the model's 256")):
        PairRecall(Checkpoint.open(save()), (8,), vocab_size=257)
    assert PairRecall(Checkpoint.open(save()), (8,)).policy["vocab_size"] == 256
    with pytest.raises(ValueError, match="seq_len: got 20, takes at least"):
        PairRecall(Checkpoint.open(save()), (2, 8), seq_len=20)
