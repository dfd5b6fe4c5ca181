"""One configuration for every variant: the mixer is a matter of fields, a preset is a mixer and a size."""

# No `from __future__ import annotations`: @strict reads the types of the fields.
import inspect
import math
from dataclasses import field, fields
from typing import Any, ClassVar, Self, TypeVar, get_args

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from osdn.nn.layer import OutputGate, StateDecay, head_shape
from osdn.nn.options import PreconditionerOptions
from osdn.ops.options import check_positive, check_size, refuse

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the installed transformers calls a cache, in `forward`, `generate` and outputs: "cache" from 5.24 on."""


def cache_name(model: nn.Module) -> str:
    """What `model.forward` calls a cache, and its output: models from elsewhere may not know CACHE yet."""
    return CACHE if CACHE in inspect.signature(model.forward).parameters else "past_key_values"


_PAPER_BOX = {"feedback": "beta_aware", "eta": 0.003, "d_min": 2 / 3, "d_max": 3 / 2, "forget": "none"}
_BOX = {"feedback": "beta_aware", "d_max": 2.0, "forget": "none"}
_GDN = {"state_decay": "scalar", "output_gate": "silu"}
_KDA = {"state_decay": "channel", "output_gate": "sigmoid_lowrank"}

# What each preset's name says of the mixer. Preconditioner keys that are not named have the defaults of
# PreconditionerOptions, which are osdn-apf's.
MIXERS: dict[str, dict[str, Any]] = {
    "deltanet": {"preconditioner": None},
    "osdn": {"preconditioner": {"d_max": 2.0, "d_init": 0.0, "learn_d_init": False, "forget": "none"}},
    "osdn-apf": {"preconditioner": {}},
    "osdn-apf-paper": {"preconditioner": {"d_init": 0.0}},
    "static": {"preconditioner": {"eta": 0.0, "forget": "none"}},
    "beta2": {"preconditioner": None, "allow_neg_eigval": True},
    "forget-only": {"preconditioner": {"eta": 0.0}},
    "gdn": {"preconditioner": None, **_GDN},
    "os-gdn": {"preconditioner": _BOX, **_GDN},
    "os-gdn-paper": {"preconditioner": _PAPER_BOX, **_GDN},
    "kda": {"preconditioner": None, **_KDA},
    "os-kda": {"preconditioner": _BOX, **_KDA},
    "os-kda-paper": {"preconditioner": _PAPER_BOX, **_KDA},
}
_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 64},
    "340m": {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8, "head_dim": 128},
    "1.3b": {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16, "head_dim": 128},
}

# Fields of flash-linear-attention's configs that change the mathematics, and the one value that is this model.
_FLA_NEUTRAL = {"lower_bound": None, "use_beta": True, "qk_norm": "l2", "attn": None}
# What transformers itself may put into a config beside the dataclass fields.
TRANSFORMERS_KEYS = {
    *("model_type", "name_or_path", "torch_dtype", "num_labels", "attn_implementation", "experts_implementation"),
    *("output_attentions", "quantization_config", "auto_map", "tie_last_hidden_states", "per_layer_config"),
    *GenerationConfig._get_default_generation_params(),
}

_C = TypeVar("_C", bound=PreTrainedConfig)


def _strict(cls: type[_C]) -> type[_C]:
    """@strict with ValueErrors in place of its own, which it raises outside of the class' `__setattr__`."""
    cls = strict(cls)
    checked: Any = cls.__setattr__

    def assign(self: _C, key: str, value: Any) -> None:
        try:
            checked(self, key, value)
        except StrictDataclassFieldValidationError:
            refuse(key, repr(value), inspect.formatannotation(cls.__dataclass_fields__[key].type))

    cls.__setattr__ = assign  # type: ignore[assignment]
    return cls


@_strict
class OSDNConfig(PreTrainedConfig):
    """Configuration of `OSDNModel` and `OSDNForCausalLM`.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_heads: sizes; head_dim None is hidden_size / num_heads.
        expand_v: value dim / key dim. num_v_heads: None is num_heads.
        hidden_ratio: MLP width over hidden_size, before the 2/3 of SwiGLU; the width `intermediate_size` is
            256 ceil(hidden_size hidden_ratio 2/3 / 256) where it is None.
        conv_size: width of the causal convolutions. norm_eps: eps of all norms.
        allow_neg_eigval: beta in (0, 2).
        state_decay: "none", "scalar" or "channel". output_gate: "none", "silu" or "sigmoid_lowrank".
        preconditioner: None, or a dict of the fields of `osdn.nn.PreconditionerOptions`. Missing keys are filled in
            on assignment, so that reading it always gives all of them; {} is the `osdn-apf` presets' and the default.
        initializer_range, tie_word_embeddings, use_cache, *_token_id: as everywhere in transformers.

    Raises:
        ValueError: naming the field, what it got and what it takes; unknown fields, and those of
            flash-linear-attention's configs that are not supported, are refused by name.

    Source: arXiv 2605.13473.
    """

    model_type = "osdn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }
    number_of_conv_states: ClassVar[int] = 2  # transformers' caches read it: state 0 is (conv, S), state 1 is d

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_heads: int = 8
    head_dim: int | None = None
    expand_v: float | int = 1.0
    num_v_heads: int | None = None
    hidden_ratio: float | int = 4
    intermediate_size: int | None = None
    conv_size: int = 4
    norm_eps: float | int = 1e-6
    allow_neg_eigval: bool = False
    state_decay: str = "none"
    output_gate: str = "none"
    preconditioner: Any = field(default_factory=dict)
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "preconditioner" and value is not None:
            value = PreconditionerOptions.parse(value).to_dict()
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs: Any) -> None:
        for name, neutral in _FLA_NEUTRAL.items():
            if (value := kwargs.pop(name, neutral)) != neutral:
                refuse(name, value, f"{neutral!r}; nothing else of flash-linear-attention's `{name}` is supported")
        unknown = [k for k in kwargs if k not in TRANSFORMERS_KEYS and not k.startswith("_")]
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: OSDNConfig has no such field, takes {', '.join(_FIELDS)}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "conv_size"):
            check_size(name, getattr(self, name))
        for name in ("hidden_ratio", "norm_eps", "initializer_range"):
            check_positive(name, getattr(self, name))
        for name, takes in (("state_decay", get_args(StateDecay)), ("output_gate", get_args(OutputGate))):
            if getattr(self, name) not in takes:
                refuse(name, repr(getattr(self, name)), f"one of {takes}")
        head_shape(self.hidden_size, self.num_heads, self.head_dim, self.expand_v, self.num_v_heads)
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(self.hidden_size * self.hidden_ratio * 2 / 3 / 256)
        if self.intermediate_size < 1:
            refuse("intermediate_size", self.intermediate_size, "an integer >= 1, or None")
        super().__post_init__(**kwargs)
        # AutoModel finds models by the config's type, so they are registered no later than the first config exists.
        # Importing them with osdn would cost those who want the operator alone some seconds.
        from osdn.models import modeling  # noqa: F401

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches are built from."""
        return ["linear_attention"] * self.num_hidden_layers

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration `<mixer>-<size>`, e.g. "osdn-apf-340m", with some fields replaced.

        An override of `preconditioner` replaces the preset's keys that it names; None takes the preconditioner away.

        Raises:
            ValueError: for an unknown name, listing what exists, and for an override that is no field, by name.
        """
        mixer, _, size = str(name).rpartition("-")
        if mixer not in MIXERS or size not in _SIZES:
            takes = f"<mixer>-<size> with a mixer of {', '.join(MIXERS)} and a size of {', '.join(_SIZES)}"
            refuse("preset", repr(name), takes)
        if unknown := sorted(set(overrides) - set(_FIELDS)):
            raise ValueError(f"{', '.join(unknown)}: OSDNConfig has no such field, takes {', '.join(_FIELDS)}")
        values = {**_SIZES[size], **MIXERS[mixer], **overrides}
        if isinstance(overrides.get("preconditioner"), dict):
            values["preconditioner"] = {**(MIXERS[mixer]["preconditioner"] or {}), **overrides["preconditioner"]}
        return cls(**values)

    def state_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one sequence carries from token to token, over all layers: S [HV, K, V] and, where there is a
        preconditioner, d [HV, K], both float32, and the conv state [2HK + HV V, W] in `dtype`.
        """
        H, HV, K, V = head_shape(self.hidden_size, self.num_heads, self.head_dim, self.expand_v, self.num_v_heads)
        recurrent = HV * K * V + (0 if self.preconditioner is None else HV * K)
        conv = self.conv_size * (2 * H * K + HV * V)
        return self.num_hidden_layers * (4 * recurrent + dtype.itemsize * conv)


_FIELDS = [f.name for f in fields(OSDNConfig) if f.name not in PreTrainedConfig.__dataclass_fields__]
