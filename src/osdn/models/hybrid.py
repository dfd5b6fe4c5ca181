"""transformers' own hybrids with a preconditioner: their gated delta layers keep all they have and gain d.

Letters as in `osdn.nn.layer`. A host is a layer of transformers that mixes tokens by a gated delta rule.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from osdn.models.configuration import CACHE, OSDNConfig
from osdn.nn.conv import kernel_of
from osdn.nn.layer import DeltaMixer, OnlineScaledDeltaNet, Projections, is_preconditioner_parameter
from osdn.nn.options import PreconditionerOptions
from osdn.nn.packing import Packing, check_agreement, check_ids, find_packing
from osdn.ops.options import refuse, work_dtype

Train = Literal["all", "preconditioner"]
Model = TypeVar("Model", bound=PreTrainedModel)
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PACKING = "osdn_packing"  # among what a host's layers are called with
FIELD = "osdn_preconditioner"  # of the host's config: the options, by which `load_preconditioned` knows the checkpoint


class PreconditionedHost(DeltaMixer):
    """A host's parameters, under the host's names, around the preconditioned operator.

        q, k, v, b, g, gate                              as the host makes them
        o = online_scaled_delta_rule(q, k, v, sigmoid(b) [* 2], g, forget) from d = d0

    host: the layer whose submodules and parameters are taken over. preconditioner: see `osdn.nn.PreconditionerOptions`.
    """

    def __init__(self, host: Any, preconditioner: PreconditionerOptions) -> None:
        super().__init__()
        self.kind = type(host).__name__
        self.H, self.HV, self.K, self.V = _HOSTS[self.kind].shape(host)
        self.hidden_size, self.layer_idx = host.hidden_size, host.layer_idx
        self.allow_neg_eigval, self.backend = _allows_neg_eigval(host), "auto"
        for name, child in host.named_children():
            self.add_module(name, child)
        for name, parameter in host.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.precondition(preconditioner)

    def _project(self, x: Tensor) -> Projections:
        qkv, b, g, gate = _HOSTS[self.kind].project(self, x)
        return Projections(qkv, kernel_of(cast(nn.Conv1d, self.conv1d), x.device), b, g, gate)

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        names = _HOSTS[self.kind]
        normed = self.get_submodule(names.norm)(o, gate.view_as(o))
        return self.get_submodule(names.out)(normed.flatten(2))

    def forward(  # type: ignore[override]  # the host's signature
        self,
        hidden_states: Tensor,
        cache: Any | None = None,
        attention_mask: Tensor | None = None,
        cache_params: Any | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `osdn.OnlineScaledDeltaNet.forward`, called as the host was, before transformers 5.24 with `cache_params`
        for `cache`; of kwargs, `cu_seq_lens_q` counts, and what `_pass_packing` puts there."""
        cache = cache_params if cache is None else cache
        cu_seqlens, packing = kwargs.get("cu_seq_lens_q"), kwargs.get(PACKING)
        packed = cu_seqlens is not None or packing is not None
        if not packed and kwargs.get("seq_idx") is not None:
            refuse("seq_idx", "a tensor", "None, or cu_seq_lens_q or position_ids beside it")
        if packed and cache is not None:
            refuse(CACHE, "a cache", "None with packed sequences: pass use_cache=False")
        if packing is not None:
            return self._mix_packed(hidden_states, None, packing.to(hidden_states.device))
        return super().forward(hidden_states, attention_mask, cache, cu_seqlens)


def _pass_packing(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any] | None:
    """Before a host's text model runs: of sequences packed by `position_ids`, which transformers heeds in attention
    layers alone, the delta layers are told too; and packed ones get no cache unless it is asked for."""
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else []
    given = {**dict(zip(names, args)), **kwargs}
    by_offsets, by_positions = given.get("cu_seq_lens_q") is not None, isinstance(given.get("position_ids"), Tensor)
    if not by_offsets and not by_positions:
        return None
    packing = _packing(given)
    if by_positions:
        given["seq_idx"] = None  # says the same
    if by_offsets or packing is not None:
        given |= {"use_cache": bool(given.get("use_cache")), PACKING: packing}
    return (), given


def _packing(given: dict[str, Any]) -> Packing | None:
    """What `position_ids` alone say; beside `cu_seq_lens_q`, which then counts, they are only looked at."""
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    x = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if isinstance(positions, Tensor) and positions.ndim == 3:  # for images: of text and three axes, or of axes
        positions = positions[0] if len(positions) == 4 else None
    if x is None or not isinstance(positions, Tensor) or x.shape[1] == 1:  # decoding is not to wait for the device
        return None
    B, T = x.shape[:2]
    check_ids("position_ids", positions, B, T)
    if given.get("cu_seq_lens_q") is not None:
        check_agreement(given["cu_seq_lens_q"], positions[:1])
        return None
    padding = mask.get("linear_attention") if isinstance(mask, dict) else mask
    if not isinstance(padding, Tensor) or padding.ndim != 2:
        padding = None
    if padding is None and given.get("past_key_values") is None and given.get("cache") is None:
        runs = F.pad((positions.diff(dim=-1) != 1).cumsum(-1), (1, 0))  # as transformers counts them
        return find_packing(B, T, seq_idx=runs)
    packing = find_packing(B, T, padding, positions)
    if packing is None or packing.per_row:
        return None
    if padding is not None and padding is mask:
        refuse("attention_mask", "a mask beside position_ids of packed sequences", "None: attention may mix them")
    return packing


def precondition_model(
    model: Model,
    preconditioner: PreconditionerOptions | Mapping[str, Any] | None = None,
    *,
    train: Train = "all",
) -> Model:
    """Put a preconditioner into every delta layer of a model, in place.

        S_t = Gamma_t S_{t-1} + beta_t k_t r_t^T    becomes    Gamma_t S_{t-1} + beta_t (d_t * k_t) r_t^T

    The layers keep their projections, convolution, gates and norm, under their names; they gain `d0` `[HV, K]` and,
    with `forget`, `forget_proj`. At d_init 1 and without forgetting, outputs are what they were until training moves
    d0: up to rounding with eta 0, up to the eps of the keys' norm with beta_free feedback. beta_aware feedback and
    forgetting change them at once. Padding, packing by `cu_seq_lens_q`, caches, `generate` and beams work as before:
    the cache holds d beside S. Packing by `position_ids` alone, which transformers' sdpa and eager attention heed,
    holds in the delta layers too; beside a mask or a cache, where they do not heed it, it is refused. A model on the
    meta device is to get its weights from a checkpoint or another process: `init_weights` reaches neither d0 and
    forget_proj nor the decays of the layers that are replaced.

    Args:
        model: transformers' Qwen3-Next, Qwen3.5 (dense or MoE), OLMo-hybrid or Kimi-Linear, with any head or none, or
            an OSDN model whose preconditioner is None. Not a part of another model, whose config would not know.
        preconditioner: `osdn.nn.PreconditionerOptions`, or a dict of its fields; those not named are what
            `upgrade_options` says: beta_free, eta 1, d0 learned from 1, no forgetting, box [0, 2 / beta_max].
        train: "all" leaves `requires_grad` as it is; "preconditioner" freezes everything but d0 and forget_proj.

    Returns:
        model. `save_pretrained` saves it whole, and `osdn.load_preconditioned` brings a transformers model back.

    Raises:
        ValueError: naming the argument, what it got and what it takes; the model is then unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        refuse("model", type(model).__name__, "a transformers model")
    if train not in get_args(Train):
        refuse("train", repr(train), f"one of {get_args(Train)}")
    hosts = find_hosts(model)
    options = upgrade_options(preconditioner, any(map(_allows_neg_eigval, hosts.values())))
    if train == "preconditioner" and not options.learn_d_init and options.forget == "none":
        refuse("train", repr(train), "'all' where neither d0 is learned nor there is a forget gate")
    _replace(model, hosts, options)
    if train == "preconditioner":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_preconditioner_parameter(name))
    return model


def upgrade_options(
    preconditioner: PreconditionerOptions | Mapping[str, Any] | None, allow_neg_eigval: bool
) -> PreconditionerOptions:
    """What an upgraded checkpoint gets where nothing else is said: beta_free, eta 1, d0 learned from 1, no forgetting,
    the box [0, 2 / beta_max]. At first it computes what it did before.
    """
    named = {} if preconditioner is None else preconditioner
    if isinstance(named, Mapping):
        named = {"forget": "none", "d_max": 1.0 if allow_neg_eigval else 2.0, **named}
    return PreconditionerOptions.parse(named)


def load_preconditioned(path: str | Path, **kwargs: Any) -> Any:
    """A model saved after `precondition_model`, as its class's `from_pretrained(path, **kwargs)` would load it: dtype,
    devices, shards and loading info included. All parameters are trainable; freezing is not saved.

    Raises ValueError for `config` among kwargs, as it is the checkpoint's own, where config.json names no
    preconditioner or a class that transformers does not have, and where weights of the preconditioner are missing.
    """
    if "config" in kwargs:
        refuse("config", type(kwargs["config"]).__name__, "none: the checkpoint's own is used")
    config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in _WHERE if name in kwargs})
    options = getattr(config.get_text_config(), FIELD, None)
    if options is None:
        refuse("path", path, f"a model saved after osdn.precondition_model, whose config has {FIELD}")
    name = (config.architectures or ["none"])[0]
    host_class = getattr(transformers, name, None)
    if host_class is None:
        refuse("path", f"{path}, a model of class {name}", "a class of transformers")

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        host_class.__init__(self, config, *args, **kwargs)
        _replace(self, find_hosts(self), PreconditionerOptions.parse(options))

    # from_pretrained makes the model, then loads weights and drops those that have no place in it: d0 must be there as
    # soon as the model is made. Hence a class whose __init__ puts it there, only while loading, and under the same
    # name and module, since transformers goes by these.
    loader: Any = type(name, (host_class,), {"__init__": init, "__module__": host_class.__module__})
    wanted = kwargs.pop("output_loading_info", False)
    model, info = loader.from_pretrained(path, output_loading_info=True, **kwargs)
    if lacks := sorted(filter(is_preconditioner_parameter, info["missing_keys"])):
        refuse("path", f"{path} without {', '.join(lacks)}", "all weights of the preconditioner")
    model.__class__ = host_class
    return (model, info) if wanted else model


def find_hosts(model: nn.Module) -> dict[str, Any]:
    """The layers to precondition by their names; refuses a model that has none, or one that cannot be changed."""
    if any(isinstance(module, DeltaMixer) and module.preconditioner is not None for module in model.modules()):
        refuse("model", f"a {type(model).__name__} that has its preconditioner already", "one without")
    kinds = (OnlineScaledDeltaNet.__name__, *_HOSTS)
    hosts = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    if not hosts:
        refuse("model", type(model).__name__, f"a model with layers among {', '.join(kinds)}")
    for name, host in hosts.items():
        if getattr(host, "activation", "silu") != "silu":
            refuse("model", f"{name} with hidden_act={host.activation!r}", "'silu'")
        if hasattr(host, "_hf_hook"):
            refuse("model", f"{name} dispatched by accelerate", "a model that is dispatched afterwards")
    return hosts


def _replace(model: PreTrainedModel, hosts: dict[str, Any], options: PreconditionerOptions) -> None:
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)  # models made from one config share it, and only this one is to change
    for module in model.modules():
        if (shared := copies.get(id(getattr(module, "config", None)))) is not None:
            module.config = shared
    config = model.config.get_text_config()
    for name, host in hosts.items():
        if isinstance(host, OnlineScaledDeltaNet):
            host.precondition(options)
        else:
            model.set_submodule(name, PreconditionedHost(host, options).train(host.training))
    if isinstance(config, OSDNConfig):
        config.preconditioner = options.to_dict()
    else:
        config.number_of_conv_states = 2  # transformers' caches read it: state 0 is (conv, S), state 1 is d
        setattr(config, FIELD, options.to_dict())
        for name in {name.rpartition("layers.")[0].rstrip(".") for name in hosts}:
            model.get_submodule(name).register_forward_pre_hook(_pass_packing, with_kwargs=True)


def _allows_neg_eigval(host: Any) -> bool:
    return getattr(host, "allow_neg_eigval", False)


# What each host is called by, and how it makes (qkv, b, g, gate), see `Projections`.


class _Host(NamedTuple):
    shape: Callable[[Any], tuple[int, int, int, int]]  # H, HV, K, V
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    norm: str
    out: str


def _grouped_shape(host: Any) -> tuple[int, int, int, int]:
    return host.num_k_heads, host.num_v_heads, host.head_k_dim, host.head_v_dim


def _scalar_decay(host: Any, a: Tensor) -> Tensor:
    work = work_dtype(a)
    return -host.A_log.to(work).exp() * F.softplus(a.to(work) + host.dt_bias.to(work))


def _qwen3_next(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One product makes q, k, v, gate of each key head in turn, another b, a."""
    per_key_head, G = (host.H, -1), host.HV // host.H
    sizes = [host.K, host.K, G * host.V, G * host.V]
    parts = [y.flatten(2) for y in host.in_proj_qkvz(x).unflatten(-1, per_key_head).split(sizes, -1)]
    b, a = (y.flatten(2) for y in host.in_proj_ba(x).unflatten(-1, per_key_head).split(G, -1))
    return torch.cat(parts[:3], -1), b, _scalar_decay(host, a), parts[3]


def _qwen3_5(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return host.in_proj_qkv(x), host.in_proj_b(x), _scalar_decay(host, host.in_proj_a(x)), host.in_proj_z(x)


def _olmo_hybrid(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = torch.cat([host.q_proj(x), host.k_proj(x), host.v_proj(x)], -1)
    return qkv, host.b_proj(x), _scalar_decay(host, host.a_proj(x)), host.g_proj(x)


def _kimi_linear(host: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = torch.cat([host.q_proj(x), host.k_proj(x), host.v_proj(x)], -1)
    return qkv, host.b_proj(x), host.forget_gate(x), host.g_b_proj(host.g_a_proj(x))


_HOSTS: dict[str, _Host] = {
    "Qwen3NextGatedDeltaNet": _Host(_grouped_shape, _qwen3_next, "norm", "out_proj"),
    "Qwen3_5GatedDeltaNet": _Host(_grouped_shape, _qwen3_5, "norm", "out_proj"),
    "Qwen3_5MoeGatedDeltaNet": _Host(_grouped_shape, _qwen3_5, "norm", "out_proj"),
    "OlmoHybridGatedDeltaNet": _Host(_grouped_shape, _olmo_hybrid, "o_norm", "o_proj"),
    "KimiLinearDeltaAttention": _Host(
        lambda host: (host.num_heads, host.num_heads, host.head_dim, host.head_dim), _kimi_linear, "o_norm", "o_proj"
    ),
}
