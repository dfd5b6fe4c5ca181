"""Checkpoints as flash-linear-attention saves them, made from transformers' models: a second implementation."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
SAVED = {  # what flash-linear-attention's config.json holds beside the sizes
    "attn": None,
    "attn_mode": "chunk",
    "conv_size": 4,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "hidden_act": "swish",
    "fuse_cross_entropy": True,
    "hidden_ratio": 4,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "use_cache": True,
    "use_l2warp": False,
    "use_short_conv": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "allow_neg_eigval": False,
    "transformers_version": "4.57.0",
    "attnres_block_size": None,
    "torch_dtype": "float32",
}
KINDS = {
    "delta_net": {
        "use_gate": False,
        "use_beta": True,
        "qk_norm": "l2",
        "qk_activation": "silu",
        "use_output_norm": True,
        "num_heads": 2,
        "expand_k": 0.5,
        "expand_v": 0.75,
        "fuse_linear_cross_entropy": False,
    },
    "gated_deltanet": {"use_gate": True, "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5},
    "kda": {
        "num_heads": 2,
        "num_v_heads": None,
        "head_dim": 8,
        "expand_v": 1.0,
        "lower_bound": None,
        "safe_gate": False,
    },
}


def saved_config(kind):
    names = {"delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet", "kda": "KDA"}
    return {**SIZES, **SAVED, **KINDS[kind], "model_type": kind, "architectures": [f"{names[kind]}ForCausalLM"]}


class Ungated(nn.Module):
    """RMSNorm with another norm's weight, deaf to the gate."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, gate):  # noqa: ARG002
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def qwen3_next(kind):
    """Gated DeltaNet; DeltaNet where the decay is none, with the gate taken out. Its norms multiply by 1 + weight."""
    H, HV, K, V = (2, 4, 8, 12) if kind == "gated_deltanet" else (2, 2, 8, 12)
    config = transformers.Qwen3NextConfig(
        **SIZES,
        linear_num_key_heads=H,
        linear_num_value_heads=HV,
        num_attention_heads=2,
        num_key_value_heads=2,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        layer_types=["linear_attention"] * 2,
        mlp_only_layers=[0, 1],
    )
    model = random(transformers.Qwen3NextForCausalLM(config))
    weights = {}
    for name, x in model.state_dict().items():
        attn = name.replace("linear_attn", "attn")
        if name.endswith("in_proj_qkvz.weight"):
            parts = x.unflatten(0, (H, -1)).split([K, K, HV // H * V, HV // H * V], 1)
            for letter, part in zip("qkvg", parts):
                weights[attn.replace("in_proj_qkvz", f"{letter}_proj")] = part.flatten(0, 1)
        elif name.endswith("in_proj_ba.weight"):
            for letter, part in zip("ba", x.unflatten(0, (H, -1)).chunk(2, 1)):
                weights[attn.replace("in_proj_ba", f"{letter}_proj")] = part.flatten(0, 1)
        elif name.endswith("conv1d.weight"):
            for letter, part in zip("qkv", x.split([H * K, H * K, HV * V])):
                weights[attn.replace("conv1d", f"{letter}_conv1d")] = part
        elif "layernorm" in name or name == "model.norm.weight":
            weights[name.replace("input_layernorm", "attn_norm").replace("post_attention_layernorm", "mlp_norm")] = (
                x + 1
            )
        else:
            weights[attn.replace("attn.norm", "attn.o_norm").replace("out_proj", "o_proj")] = x
    if kind == "delta_net":
        weights = {
            k: x for k, x in weights.items() if not any(y in k for y in ("g_proj", "a_proj", "A_log", "dt_bias"))
        }
        for layer in model.model.layers:
            layer.linear_attn.A_log.data.fill_(-torch.inf)
            layer.linear_attn.norm = Ungated(layer.linear_attn.norm.weight)
    return model, weights


def kimi_linear():
    """KDA; the gate's bias, which it has not, is 0."""
    config = transformers.KimiLinearConfig(
        **SIZES,
        linear_num_heads=2,
        linear_head_dim=8,
        num_attention_heads=2,
        pad_token_id=0,
        rms_norm_eps=1e-6,
        layer_types=["linear_attention"] * 2,
        mlp_layer_types=["dense"] * 2,
    )
    model = random(transformers.KimiLinearForCausalLM(config))
    renamed = {"self_attn.": "attn.", "forget_gate.": "", "f_a_proj": "f_proj.0", "f_b_proj": "f_proj.1"}
    renamed |= {"g_a_proj": "g_proj.0", "g_b_proj": "g_proj.1"}
    renamed |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    weights = {}
    for name, x in model.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if name.endswith("attn.conv1d.weight"):
            for letter, part in zip("qkv", x.chunk(3)):
                weights[name.replace("conv1d", f"{letter}_conv1d")] = part
        else:
            weights[name] = x.flatten() if name.endswith("A_log") else x
        if name.endswith("g_proj.1.weight"):
            weights[name.replace("weight", "bias")] = torch.zeros(len(x))
    return model, weights


@torch.no_grad()
def random(model):
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "A_log" in name or "dt_bias" in name:
            p.uniform_(-2, 0.5)
        elif p.ndim > 1:
            p.normal_(std=0.3)
        else:
            p.uniform_(-0.5, 0.5)
    return model.eval()


@pytest.fixture
def fla_config():
    return saved_config


@pytest.fixture
def make_fla(tmp_path):
    """kind -> (a model of transformers, the directory of the same model as flash-linear-attention saves it)."""

    def make(kind, dtype=torch.float32, **changed):
        model, weights = kimi_linear() if kind == "kda" else qwen3_next(kind)
        weights = {k.replace("embed_tokens", "embeddings"): x.to(dtype).contiguous() for k, x in weights.items()}
        path = tmp_path / kind
        path.mkdir()
        halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
        for i, (name, x) in enumerate(weights.items()):
            list(halves.values())[i % 2][name] = x
        for name, half in halves.items():
            save_file(half, path / name, metadata={"format": "pt"})
        index = {name: file for file, half in halves.items() for name in half}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (path / "config.json").write_text(json.dumps({**saved_config(kind), **changed}))
        return model, path

    return make
