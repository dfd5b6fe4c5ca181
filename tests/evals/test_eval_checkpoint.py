import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from osdn.data.tokenizer import byte_tokenizer
from osdn.evals.checkpoint import Checkpoint


def test_open_and_load(save):
    path = save("os-gdn", name="mine")
    checkpoint = Checkpoint.open(path)
    assert (checkpoint.name, checkpoint.vocab_size, checkpoint.context) == ("mine", 256, None)
    model = checkpoint.load("auto", "auto")
    assert not model.training
    assert model.dtype == torch.float64
    assert checkpoint.load("cpu", "bfloat16").dtype == torch.bfloat16
    checkpoint.require(10**9, "window")


def test_the_digest_is_of_config_and_weights(save):
    digests = {Checkpoint.open(save(seed=seed)).sha256 for seed in (0, 1, 0)}
    digests |= {Checkpoint.open(save(norm_eps=1e-5)).sha256}
    assert len(digests) == 3


def test_tokens_tell_vocabularies_apart(save):
    bytes_alone = Checkpoint.open(save(name="a"))
    byte_tokenizer().save_pretrained(save(name="b"))
    assert Checkpoint.open(bytes_alone.path.parent / "b").tokens == bytes_alone.tokens
    other = json.loads((bytes_alone.path.parent / "b" / "tokenizer.json").read_text())
    other["model"]["vocab"] = {letter: i for i, letter in enumerate(sorted(other["model"]["vocab"]))}
    (bytes_alone.path.parent / "b" / "tokenizer.json").write_text(json.dumps(other))
    assert Checkpoint.open(bytes_alone.path.parent / "b").tokens != bytes_alone.tokens


def test_what_is_no_checkpoint(save, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"checkpoint: got {tmp_path}/none, which does not exist; takes")):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(ValueError, match=re.escape(f"checkpoint: got {tmp_path}, which has no config.json")):
        Checkpoint.open(tmp_path)
    path = save()
    (path / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="which has no weights; takes a directory that save_pretrained wrote"):
        Checkpoint.open(path)
    (tmp_path / "away").rename(path / "model.safetensors")
    for config in ("{", '{"model_type": "nothing"}', '{"model_type": "osdn", "lower_bound": 1}'):
        (path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=re.escape(f"checkpoint: got {path}, whose config cannot be used (")):
            Checkpoint.open(path)


def test_weights_that_are_damaged_or_of_another_model(save):
    path = save()
    file = path / "model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=re.escape(f"checkpoint: got {path}, which cannot be loaded (")):
        Checkpoint.open(path).load("cpu", "auto")
    lost = "model.layers.1.attn.d0"
    save_file({name: w for name, w in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"which lacks 1 weights of its model, first {lost}")):
        Checkpoint.open(path).load("cpu", "auto")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="device: got 'moon', which cannot be used"):
        Checkpoint.open(path).load("moon", "auto")
