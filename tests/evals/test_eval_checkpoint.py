import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import osdn
from osdn.data.tokenizer import byte_tokenizer
from osdn.evals.checkpoint import Checkpoint
from osdn.evals.harness import run_harness
from osdn.runs import RunError


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
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/none: does not exist, takes the directory")):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: not a checkpoint, there is no config.json")):
        Checkpoint.open(tmp_path)
    path = save()
    (path / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="which has no weights; takes a directory that save_pretrained wrote"):
        Checkpoint.open(path)
    (tmp_path / "away").rename(path / "model.safetensors")
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"{path}/config.json: cannot be read (")):
        Checkpoint.open(path)
    for config in ('{"model_type": "nothing"}', '{"model_type": "osdn", "lower_bound": 1}'):
        (path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=re.escape(f"checkpoint: got {path}, whose config cannot be used (")):
            Checkpoint.open(path)


def test_weights_that_are_damaged_or_of_another_model(save):
    path = save()
    file = path / "model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(RunError, match=re.escape(f"{path}: weights cannot be read (")):
        Checkpoint.open(path).load("cpu", "auto")
    lost = "model.layers.1.attn.d0"
    save_file({name: w for name, w in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(RunError, match=re.escape(f"the weights are not those of OSDNForCausalLM: {lost} is missing")):
        Checkpoint.open(path).load("cpu", "auto")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="device: got 'moon', which cannot be used"):
        Checkpoint.open(path).load("moon", "auto")


def test_of_a_hybrid_the_preconditioner_is_evaluated_too(tmp_path):
    """transformers' own loading leaves it out, with a warning; the harness loads so, and is refused."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    host = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads)).eval()
    ids = torch.randint(256, (1, 40))
    before = host(ids).logits
    model = osdn.precondition_model(host, {"feedback": "beta_aware", "d_init": 0.5})
    model.save_pretrained(tmp_path)
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-4
    loaded = Checkpoint.open(tmp_path).load("cpu", "auto")
    assert torch.equal(loaded(ids).logits, after)
    with pytest.raises(ValueError, match=re.escape(f"harness: got {tmp_path}, a hybrid that it would load without")):
        run_harness(tmp_path, "--tasks x")
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=8, num_attention_heads=2))
    other.save_pretrained(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(weights | {"vision.weight": torch.ones(2)}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(tmp_path / "other").load("cpu", "auto").num_parameters() == other.num_parameters()


def test_models_that_cannot_be_scored(save, tmp_path):
    path = save()
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] * math.inf}, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=re.escape(f"checkpoint: got {path}, whose logits are not finite in torch.float64")
    ):
        Checkpoint.open(path).load("cpu", "auto")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"checkpoint: got \S+bert, whose logits know of later tokens; takes a causal"):
        Checkpoint.open(tmp_path / "bert").load("cpu", "auto")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=1, head_dim=8))
    moe.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"checkpoint: got \S+moe, which cannot run with dtype float64 on cpu \("):
        Checkpoint.open(tmp_path / "moe").load("cpu", "float64")
    Checkpoint.open(tmp_path / "moe").load("cpu", "float32")
    (path / "config.json").write_text('{"model_type": "kda", "vocab_size": 257}')
    with pytest.raises(ValueError, match=r"got \S+, flash-linear-attention's kda; takes what osdn convert makes of it"):
        Checkpoint.open(path)
