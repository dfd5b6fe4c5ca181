import io
import json

import pytest
from rich.console import Console

from osdn.train import TrainConfig

TOY = {
    "size": {"hidden_size": 32, "num_heads": 1, "head_dim": 16, "intermediate_size": 32},
    "context": 32,
    "batch_size": 4,
    "micro_batch": 4,
    "steps": 6,
    "warmup_steps": 2,
    "shuffle": 4,
    "save_every": 2,
    "log_every": 1,
    "lr": 1e-2,
    "device": "cpu",
}


@pytest.fixture
def text(tmp_path):
    """A file of 40 documents, in which what comes next can be learned."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    lines = [" ".join(words[(i * j) % 10] for j in range(3 + i % 9)) for i in range(40)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def said(console):
    return console.file.getvalue


@pytest.fixture
def toy(text, tmp_path):
    def make(out="run", **fields):
        return TrainConfig(**{**TOY, "data": (str(text),), "out": tmp_path / out, **fields})

    return make
