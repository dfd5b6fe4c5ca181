"""flash-linear-attention's configurations of DeltaNet, Gated DeltaNet and KDA in terms of `OSDNConfig`.

Parameter names are the same, so that weights need no translation; only what a config means has to be told.
"""

from __future__ import annotations

import math
from typing import Any

from osdn.models.configuration import TRANSFORMERS_KEYS, OSDNConfig

# By model_type: the fields that decide shapes and gates, with the values they have where config.json leaves them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 16, "num_hidden_layers": 24, "expand_k": 1.0, "expand_v": 1.0, "use_gate": False},
    "gated_deltanet": {"num_heads": 6, "num_hidden_layers": 21, "head_dim": 256, "expand_v": 2.0, "use_gate": True},
    "kda": {"num_heads": 16, "num_hidden_layers": 24, "head_dim": 128, "expand_v": 1.0},
}
_COMMON: dict[str, Any] = {
    "hidden_size": 2048,
    "vocab_size": 32000,
    "conv_size": 4,
    "norm_eps": 1e-6,
    "allow_neg_eigval": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLP = {"hidden_ratio": 4, "intermediate_size": None}
_OR_NONE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("intermediate_size", "num_v_heads", "pad_token_id", "bos_token_id"), (int,)),
    "hidden_ratio": (int, float),
    "eos_token_id": (int, list),
}
# Fields that change the mathematics, with what OSDN computes.
_TAKES: dict[str, tuple[Any, ...]] = {
    "use_short_conv": (True,),
    "use_beta": (True,),
    "use_output_norm": (True,),
    "conv_bias": (False,),
    "qk_norm": ("l2",),
    "qk_activation": ("silu",),
    "hidden_act": ("swish", "silu"),
    "attn": (None, []),
    "lower_bound": (None,),
    "safe_gate": (False,),
    "attnres_block_size": (None,),
    "quantization_config": (None,),
    # Of older configs.
    "norm_first": (False,),
    "share_conv_kernel": (False,),
    "use_rope": (False,),
    "elementwise_affine": (True,),
}
# Fields that choose a kernel, bound a length that nothing depends on, or matter in training alone.
_IDLE = {
    *("attn_mode", "max_position_embeddings", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy"),
    *("fuse_linear_cross_entropy", "use_l2warp", "architectures", "transformers_version", "dtype"),
    # What transformers' configs of all kinds had or have, and these models do not look at.
    *("is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
    *("pruned_heads", "rope_scaling", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward"),
    *("output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "finetuning_task", "prefix"),
    *("task_specific_params", "tokenizer_class"),
}


def is_fla(config: dict[str, Any]) -> bool:
    """Whether config.json is flash-linear-attention's, of a kind that can be converted."""
    return config.get("model_type") in _DEFAULTS


def translate(config: dict[str, Any]) -> OSDNConfig:
    """The `OSDNConfig`, d == 1, of the model that config.json of flash-linear-attention describes.

    Raises ValueError naming every field that OSDN does not support, what it got and what it takes, or does not know.
    """
    kind = config["model_type"]
    read = _DEFAULTS[kind] | _COMMON | _MLP | ({} if kind == "delta_net" else {"num_v_heads": None})
    known = {*read, *_TAKES, *_IDLE, *TRANSFORMERS_KEYS}
    wrong = [
        f"{name}: got {config[name]!r}, takes {' or '.join(map(repr, takes))}"
        for name, takes in _TAKES.items()
        if name in config and config[name] not in takes
    ]
    unknown = sorted(name for name in set(config) - known if not name.startswith("_"))
    wrong += [f"{name}: got {config[name]!r}, a field that is not known" for name in unknown]
    c = {name: config.get(name, default) for name, default in read.items()}
    for name, got in c.items():
        default = read[name]
        kinds = _OR_NONE.get(name) or ((int, float) if isinstance(default, float) else (type(default),))
        if type(got) not in kinds and not (got is None and name in _OR_NONE):
            takes = [*(kind.__name__ for kind in kinds), *["None"] * (name in _OR_NONE)]
            wrong.append(f"{name}: got {got!r}, takes {' or '.join(takes)}")
    if wrong:
        raise ValueError(f"{kind} config: {'; '.join(wrong)}")
    c |= {name: float(c[name]) for name, default in read.items() if isinstance(default, float)}
    K, expand_v = c.get("head_dim"), c["expand_v"]
    if kind == "delta_net":  # both expansions are of hidden_size
        K, V = (int(c["hidden_size"] * c[name]) // c["num_heads"] for name in ("expand_k", "expand_v"))
        expand_v = V / K
    width = c["intermediate_size"]
    if width is None:
        width = 256 * math.ceil(int(c["hidden_size"] * (c["hidden_ratio"] or 4) * 2 / 3) / 256)
    gate = "sigmoid_lowrank" if kind == "kda" else "silu" if c["use_gate"] else "none"
    return OSDNConfig(
        **{name: c[name] for name in (*_COMMON, "num_heads", "num_hidden_layers")},
        head_dim=K,
        expand_v=expand_v,
        num_v_heads=c.get("num_v_heads"),
        intermediate_size=width,
        state_decay={"delta_net": "none", "gated_deltanet": "scalar", "kda": "channel"}[kind],
        output_gate=gate,
        preconditioner=None,
    )
