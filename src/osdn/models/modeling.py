"""OSDN language model for transformers: pre-norm blocks of `OnlineScaledDeltaNet` and a SwiGLU MLP.

Letters: B batch, T tokens, D hidden size, N sequences. Parameter names are flash-linear-attention's.
Source: arXiv 2605.13473.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from osdn.models.configuration import CACHE, OSDNConfig
from osdn.nn.layer import OnlineScaledDeltaNet, OutputGate, StateDecay
from osdn.nn.norm import RMSNorm
from osdn.nn.packing import Packing, check_agreement, check_ids, find_packing
from osdn.ops.options import check_size, refuse


class OSDNCache(DynamicCache):
    """transformers' cache of linear-attention layers, which also counts its tokens.

    State of layer i: `layers[i].conv_states[0]` [B, 2HK + HV V, W] (last inputs of the convolutions, q|k|v),
    `layers[i].recurrent_states[0]` S [B, HV, K, V], `layers[i].recurrent_states[1]` d [B, HV, K]; S and d float32.
    Any transformers cache of such layers works in `forward`. But `generate` asks a cache for its length, and a cache
    of linear layers alone has none to tell, so it is this one that `generate` makes and returns. Models count; a layer
    of its own does not.
    """

    is_compileable = False  # `generate` would compile the forward pass on GPU, for every new count of tokens

    def __init__(self, config: OSDNConfig, offloading: bool = False) -> None:
        super().__init__(config=config, offloading=offloading)
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Tokens seen, padding included, for all layers alike."""
        return self.seen_tokens

    @property
    def is_linear(self) -> list[bool]:
        """No layer passes for one that cannot tell its length: `generate` would run over all tokens once more."""
        return [False] * len(self.layers)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0

    def snapshot(self) -> dict[str, Tensor]:
        """All that the tokens seen have left, as copies: `{"seen_tokens", "<layer>.conv", "<layer>.S", "<layer>.d"}`,
        shaped as above, without `d` where there is no preconditioner. Ready for `safetensors.torch.save_file`.
        """
        state = {"seen_tokens": torch.tensor(self.seen_tokens)}
        for i, layer in enumerate(self.layers):
            if layer.has_previous_state[0]:
                parts = {"conv": layer.conv_states[0], "S": layer.recurrent_states[0], "d": layer.recurrent_states[1]}
                state |= {f"{i}.{name}": x.detach().clone() for name, x in parts.items() if x is not None}
        return state

    def restore(self, snapshot: Mapping[str, Tensor], copies: int = 1) -> None:
        """Be what was snapshot, whatever was here before; sequence b in the places b * copies, b * copies + 1, ...,
        so that many continuations share one prefill. The snapshot is not written to.

        Raises ValueError for a snapshot of another number of layers, or with d of some layers alone. What does not fit
        a model is refused by its forward pass.
        """
        names = set(snapshot) - {"seen_tokens"}
        needed = {f"{i}.{part}" for i in range(len(self)) for part in ("conv", "S")}
        with_d = needed | {f"{i}.d" for i in range(len(self))}
        if "seen_tokens" not in snapshot or names not in (set(), needed, with_d):
            refuse("snapshot", f"keys {', '.join(sorted(snapshot))}", f"a snapshot of {len(self)} layers")
        check_size("copies", copies)
        self.seen_tokens = int(snapshot["seen_tokens"])
        for i, layer in enumerate(self.layers):
            fresh = self.layers[i] = type(layer)(number_of_states=layer.number_of_states)
            conv, recurrent = fresh.update_conv_state, fresh.update_recurrent_state
            for name, write, state_idx in (("conv", conv, 0), ("S", recurrent, 0), ("d", recurrent, 1)):
                if f"{i}.{name}" in names:
                    write(snapshot[f"{i}.{name}"].repeat_interleave(copies, 0), state_idx=state_idx)
                    fresh.has_previous_state[state_idx] = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Sequence b in the places b * repeats, b * repeats + 1, ..."""
        self.restore(self.snapshot(), repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences at these places, in this order."""
        self.restore({n: x if n == "seen_tokens" else x[indices] for n, x in self.snapshot().items()})

    def crop(self, *_: Any) -> NoReturn:
        """Refused: S and d cannot be rolled back."""
        raise ValueError("crop: S and d cannot be rolled back; take a snapshot() before, and restore() it")


class OSDNMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OSDNBlock(GradientCheckpointingLayer):
    """x + attn(attn_norm(x)), then x + mlp(mlp_norm(x))."""

    def __init__(self, config: OSDNConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = OnlineScaledDeltaNet(
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            expand_v=config.expand_v,
            num_v_heads=config.num_v_heads,
            conv_size=config.conv_size,
            norm_eps=config.norm_eps,
            allow_neg_eigval=config.allow_neg_eigval,
            state_decay=cast(StateDecay, config.state_decay),
            output_gate=cast(OutputGate, config.output_gate),
            preconditioner=config.preconditioner,
            layer_idx=layer_idx,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = OSDNMLP(config.hidden_size, cast(int, config.intermediate_size))

    def forward(self, x: Tensor, past_key_values: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), past_key_values=past_key_values, cu_seqlens=cu_seqlens)
        return x + self.mlp(self.mlp_norm(x))


class OSDNPreTrainedModel(PreTrainedModel):
    """Initialisation and loading, common to the models."""

    config_class = OSDNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OSDNBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _input_embed_layer = "embeddings"
    _is_stateful = True  # the state cannot be rolled back: assisted decoding is refused

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Children come before their parents, so that the layer has the last word on forget_proj.
        super()._init_weights(module)
        if isinstance(module, OnlineScaledDeltaNet):
            module.init_special_parameters()


class OSDNModel(OSDNPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: OSDNConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OSDNBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, D]` of `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`.

        Args:
            attention_mask: `[B, >= T]`, 0 at padding, which may stand anywhere; the last T columns count. Padded
                tokens change nothing and give zeros.
            position_ids: `[B, T]` or `[1, T]`; where they do not rise from one real token to the next, a new packed
                sequence begins. `seq_idx`, and `cu_seq_lens_q` for B = 1, say the same in transformers' other names.
            past_key_values: a cache to continue from, written in place; see `OSDNCache`. One is made where
                `use_cache` (default: `config.use_cache` outside training) and the batch is not packed. `cache`: the
                same, by transformers' name from 5.24 on, which is then the output's, too; either name reads that.

        Raises:
            ValueError: naming the argument, what it got and what it takes; unknown arguments are refused by name.
        """
        _check_kwargs(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: got {got}, takes exactly one of the two")
        if past_key_values is not None and cache is not None:
            raise ValueError("past_key_values, cache: got both, takes one of the two")
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
                found = type(input_ids).__name__
                if isinstance(input_ids, Tensor):
                    found = f"{input_ids.dtype} {tuple(input_ids.shape)}"
                refuse("input_ids", found, "an integer torch.Tensor [B, T]")
            x = self.embeddings(input_ids)
        else:
            x, D = inputs_embeds, self.config.hidden_size
            if x.ndim != 3 or x.shape[2] != D:
                raise ValueError(f"inputs_embeds: got {tuple(x.shape)}, takes [B, T, {D}]")
        B, T, _ = x.shape
        if B == 0 or T == 0:
            raise ValueError(f"input_ids, inputs_embeds: got {B} x {T} tokens, takes at least one token")
        packing = _packing(B, T, attention_mask, position_ids, kwargs)
        packed = packing is not None and not packing.per_row

        recomputed = self.gradient_checkpointing and self.training
        if cache is not None and (packed or recomputed):
            why = "packed sequences" if packed else "gradient checkpointing, which would write it twice"
            raise ValueError(f"{CACHE}: got a cache, takes None with {why}")
        if cache is not None and position_ids is not None and T > 1:  # decoding is not to wait for the device
            _check_going_on(cache, position_ids.expand(B, T), attention_mask)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and not packed and not recomputed:
            cache = OSDNCache(self.config)

        if packing is not None:
            x = packing.pack(x)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        wanted = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        hidden = []
        for layer in self.layers:
            if wanted:
                hidden.append(x)
            if packing is None or not packing.is_empty:
                x = layer(x, past_key_values=cache, cu_seqlens=cu_seqlens)
        hidden.append(self.norm(x))
        if packing is not None:
            hidden = [packing.unpack(h) for h in hidden]
        if isinstance(cache, OSDNCache):
            cache.seen_tokens += T
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[-1], hidden_states=tuple(hidden) if wanted else None, **{CACHE: cache}
        )


class OSDNForCausalLM(OSDNPreTrainedModel, GenerationMixin):
    """`OSDNModel` with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OSDNConfig) -> None:
        super().__init__(config)
        self.model = OSDNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, vocab_size]`, or of the last `logits_to_keep` tokens (a tensor: of these positions).

        `labels` `[B, T]`, -100 where there is none, are shifted here (`shift_labels`, by name: were shifted before);
        the loss is the mean over labels, or their sum over `num_items_in_batch`. All else as in `OSDNModel.forward`.
        """
        if not isinstance(logits_to_keep, (int, Tensor)):
            refuse("logits_to_keep", repr(logits_to_keep), "an int or a tensor of positions")
        # Not in the signature: Trainer asks its data for every parameter there that has "label" in its name.
        shift_labels = kwargs.pop("shift_labels", None)
        given = inputs_embeds if input_ids is None else input_ids
        if isinstance(given, Tensor) and isinstance(logits_to_keep, int) and logits_to_keep == 0:
            for name, y in (("labels", labels), ("shift_labels", shift_labels)):
                if isinstance(y, Tensor) and y.shape != given.shape[:2]:
                    refuse(name, tuple(y.shape), f"shape {tuple(given.shape[:2])}")
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache,
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep > 0:
            x = x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(x)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` a cache that can tell its length; a state of constant size is "static" and "dynamic"."""
        kind = generation_config.cache_implementation
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool((mask[:, -1] != 0).all()):
            refuse("attention_mask", "padding in the last column", "a token there, which generation goes on from")
        if generation_config.is_assistant:
            raise ValueError("assistant_model: got OSDNForCausalLM, takes a model whose state can be rolled back")
        if kind == "quantized":
            raise ValueError(f"cache_implementation: got {kind!r}, takes None: S and d stay in float32")
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = OSDNCache(self.config, offloading=kind == "offloaded")
            return
        if isinstance(cache, Cache) and not isinstance(cache, OSDNCache):
            if cache.has_previous_state(0, 0):
                got = f"a filled {type(cache).__name__}, whose length is unknown"
                raise ValueError(f"{CACHE}: got {got}, takes an osdn.models.OSDNCache")
            model_kwargs[CACHE] = OSDNCache(self.config)
            model_kwargs[CACHE].layers = cache.layers  # the caller's own, so that they are filled
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    if unknown := sorted(set(kwargs) - TransformersKwargs.__optional_keys__):
        raise ValueError(
            f"{', '.join(unknown)}: unknown, forward takes {', '.join(sorted(TransformersKwargs.__optional_keys__))}"
        )
    for name in ("output_attentions", "output_router_logits"):
        if kwargs.get(name):
            raise ValueError(f"{name}: got {kwargs[name]!r}, takes False: there are no such matrices")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal: got False, takes True: the recurrence is causal")
    if not isinstance(wanted := kwargs.get("output_hidden_states"), (bool, type(None))):
        raise ValueError(f"output_hidden_states: got {wanted!r}, takes True or False")


def _check_going_on(cache: Cache, position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse a sequence that begins, at position 0, where the cache holds another one's state."""
    layer: Any = next(iter(getattr(cache, "layers", [])), None)  # what is no cache is refused by the layers
    if not isinstance(layer, LinearAttentionCacheLayerMixin) or not layer.has_previous_state[0]:
        return
    B, T = position_ids.shape
    real = torch.ones_like(position_ids) if attention_mask is None else (attention_mask[:, -T:] != 0).long()
    first = position_ids.gather(1, real.argmax(1, keepdim=True))[:, 0]
    begins = (first == 0) & (real.sum(1) > 0)
    state: Tensor = layer.conv_states[0]
    if len(state) == B and bool(state[begins.to(state.device)].any()):
        got = f"a sequence that begins beside the {CACHE} of another"
        raise ValueError(f"position_ids: got {got}, takes one that goes on, or no cache")


def _packing(
    B: int, T: int, attention_mask: Tensor | None, position_ids: Tensor | None, kwargs: TransformersKwargs
) -> Packing | None:
    """What separates the sequences of this batch: `cu_seq_lens_q`, or else mask, `position_ids` and `seq_idx`."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return find_packing(B, T, attention_mask, position_ids, kwargs.get("seq_idx"))
    if B != 1:
        raise ValueError(f"cu_seq_lens_q: got B = {B}, takes a packed batch, B = 1")
    if find_packing(B, T, attention_mask) is not None:
        raise ValueError("attention_mask: got zeros beside cu_seq_lens_q, takes ones or None there")
    if position_ids is not None:
        check_ids("position_ids", position_ids, B, T)
        check_agreement(cu_seqlens, position_ids)
    return Packing(B, T, None, cu_seqlens, per_row=False)


AutoModel.register(OSDNConfig, OSDNModel, exist_ok=True)
AutoModelForCausalLM.register(OSDNConfig, OSDNForCausalLM, exist_ok=True)
