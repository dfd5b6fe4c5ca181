"""Checkpoints of small models in which the preconditioner matters, in float64; a token is a byte."""

import os

import pytest
import torch

import osdn

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network for anything fails at once

SIZE = {"vocab_size": 256, "hidden_size": 24, "num_heads": 2, "head_dim": 12, "intermediate_size": 32}


@pytest.fixture
def save(tmp_path):
    def make(preset="osdn-apf", name="model", seed=0, **options):
        torch.manual_seed(seed)
        model = osdn.OSDNForCausalLM(osdn.OSDNConfig.preset(f"{preset}-tiny", **{**SIZE, **options})).double()
        for key, p in model.named_parameters():
            if key.endswith("d0"):
                torch.nn.init.uniform_(p, 0.2, 2)
            elif p.ndim > 1:
                torch.nn.init.normal_(p, std=1.0 if "embeddings" in key else 0.4)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def text(tmp_path):
    """Two documents, 700 bytes, with repetitions."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 8)
    (folder / "b.txt").write_text("Größe " * 40)
    return folder
