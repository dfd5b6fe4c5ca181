"""Online Scaled DeltaNet: the layer around the operator.

Letters: B batch, T tokens, D hidden size, H key heads, HV value heads (a multiple of H), K key dim, V value dim,
W conv width, N sequences (B, or those packed into B = 1). "Work dtype": float32, or float64 for float64 inputs.
Parameter names are flash-linear-attention's, besides `d0` and `forget_proj`, which it does not have.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from osdn.nn.conv import kernel_of, short_convolution
from osdn.nn.norm import RMSNorm
from osdn.nn.options import PreconditionerOptions
from osdn.nn.packing import Packing, find_packing
from osdn.ops.api import check_packing, l2norm, online_scaled_delta_rule, precondition
from osdn.ops.options import (
    Backend,
    Preconditioner,
    check_number,
    check_positive,
    check_size,
    no_autocast,
    refuse,
    work_dtype,
)
from osdn.ops.state import DeltaState
from osdn.ops.step import online_scaled_delta_step

StateDecay = Literal["none", "scalar", "channel"]
OutputGate = Literal["none", "silu", "sigmoid_lowrank"]
_DEFAULT_PRECONDITIONER = PreconditionerOptions()


@dataclass(frozen=True, eq=False)
class Writes:
    """What the tokens of one call write with; a hook gets it, see `DeltaMixer.register_write_hook`.

    k: `[B, T, HV, K]`, as read: normalised, repeated over value heads. beta: `[B, T, HV]`.
    forget: log lambda `[B, T, HV]`; None is lambda = 1.
    d: `[B, T, HV, K]`, before each token's own update; None is d == 1, the plain delta rule. rule: of d, or None.
    All in the work dtype. Padding is left out and packed batches are one row, as the operator sees them.
    """

    k: Tensor
    beta: Tensor
    forget: Tensor | None
    d: Tensor | None
    rule: Preconditioner | None


class Projections(NamedTuple):
    """What a layer makes of x `[B, T, D]` before it mixes tokens; b, g and gate may be in any dtype."""

    qkv: Tensor  # [B, T, 2HK + HV V], inputs of the convolutions
    conv: Tensor  # [2HK + HV V, 1, W], their weights
    b: Tensor  # [B, T, HV], logit of beta
    g: Tensor | None  # log state decay [B, T, HV] or [B, T, HV, K]
    gate: Tensor | None  # [B, T, HV V], before its activation


class DeltaMixer(nn.Module):
    """What every layer around the operator shares: convolution, operator, cache, padding and packing.

    A subclass sets the attributes below, makes or takes over its parameters, those of the preconditioner by
    `_add_preconditioner` or `precondition`, and has `_project` and `_output(o [B, T, HV, V], gate) -> y`.
    """

    hidden_size: int  # D
    H: int
    HV: int
    K: int
    V: int
    allow_neg_eigval: bool
    preconditioner: PreconditionerOptions | None
    layer_idx: int | None
    backend: Backend
    _write_hooks: OrderedDict[int, Callable[[DeltaMixer, Writes], None]] | None = None

    def _project(self, x: Tensor) -> Projections:
        raise NotImplementedError

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        raise NotImplementedError

    def register_write_hook(self, hook: Callable[[DeltaMixer, Writes], None]) -> RemovableHandle:
        """`hook(layer, writes)` is called before every call of the operator, prefill and decoding alike, until
        `handle.remove()`. d is computed anew for it, by `osdn.precondition`: the operator keeps its own to itself.
        """
        if self._write_hooks is None:
            self._write_hooks = OrderedDict()
        handle = RemovableHandle(self._write_hooks)
        self._write_hooks[handle.id] = hook
        return handle

    def _add_preconditioner(self) -> None:
        """d0 and forget_proj, uninitialised, where the preconditioner has them."""
        p = self.preconditioner
        if p is not None and p.learn_d_init:
            self.d0 = nn.Parameter(torch.empty(self.HV, self.K))
        if p is not None and p.forget == "data_dependent":
            self.forget_proj = ForgetProjection(self.hidden_size, self.HV)

    def precondition(self, preconditioner: PreconditionerOptions) -> None:
        """Give a layer of d == 1 a preconditioner, on the device and in the dtype of the other weights."""
        like = next(p for p in self.parameters() if p.ndim > 1)
        self.preconditioner = preconditioner
        with like.device:
            self._add_preconditioner()
        new = [p for name, p in self.named_parameters() if is_preconditioner_parameter(name)]
        for parameter in new:
            parameter.data = parameter.data.to(like.dtype)
        DeltaMixer.init_special_parameters(self)
        for parameter in new:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone from now on

    @torch.no_grad()
    def init_special_parameters(self) -> None:
        """Initial values of d0 and forget_proj; a library's own initialisation must not have the last word on them.
        Parameters that transformers has marked as loaded from a checkpoint are left alone.
        """
        p = self.preconditioner
        if p is not None and p.learn_d_init:
            _assign(self.d0, torch.full_like(self.d0, p.d_init))
        if p is not None and p.forget == "data_dependent":
            _assign(self.forget_proj.weight, torch.zeros_like(self.forget_proj.weight))
            _assign(self.forget_proj.bias, torch.full_like(self.forget_proj.bias, p.forget_bias))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, `[B, T, D]` to `[B, T, D]`.

        Args:
            attention_mask: `[B, >= T]`, 0 at padding, anywhere; padded tokens change nothing and give zeros. The
                last T columns count.
            past_key_values: a `transformers.Cache` of linear-attention layers, e.g. `DynamicCache(config=...)`,
                continued from and written in place: the conv state `[N, 2HK + HV V, W]` (q, k, v) and S
                `[N, HV, K, V]` at state 0, d `[N, HV, K]` at state 1; S and d in the work dtype. Where it is filled, a
                single token without gradients and padding is one `osdn.online_scaled_delta_step`.
            cu_seqlens: `[N + 1]` offsets of N sequences packed into B = 1; not with `attention_mask`.

        Raises:
            ValueError: naming the argument, what it got and what it takes.
        """
        width = self.hidden_size
        shape = tuple(hidden_states.shape)
        if len(shape) != 3 or shape[2] != width or 0 in shape or not hidden_states.is_floating_point():
            refuse("hidden_states", f"{hidden_states.dtype} {shape}", f"a floating tensor [B, T, {width}] of tokens")
        B, T, _ = shape
        if attention_mask is None:
            check_packing(cu_seqlens, hidden_states)
            return self._mix(hidden_states, past_key_values, cu_seqlens)
        if cu_seqlens is not None:
            refuse("attention_mask", "a mask beside cu_seqlens", "None with packed sequences")
        return self._mix_packed(hidden_states, past_key_values, find_packing(B, T, attention_mask))

    def _mix_packed(self, x: Tensor, cache: Any | None, packing: Packing | None) -> Tensor:
        if packing is None:
            return self._mix(x, cache, None)
        if packing.is_empty:
            return torch.zeros_like(x)
        return packing.unpack(self._mix(packing.pack(x), cache, packing.cu_seqlens))

    def _mix(self, x: Tensor, cache: Any | None, cu_seqlens: Tensor | None) -> Tensor:
        work = work_dtype(x)
        conv_state, state = self._read(cache, x, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
        # Decoding: S and d are the cache's own tensors and may be updated where they are.
        steps = conv_state is not None and x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
        p = self._project(x)
        if conv_state is not None:
            self._check_held(conv_state, state, p.conv, work)
        sizes = (self.H * self.K, self.H * self.K, self.HV * self.V)
        (q, k, v), conv_state = short_convolution(p.qkv, p.conv, sizes, self.K, conv_state, cu_seqlens, self.backend)
        q, k = q.unflatten(-1, (self.H, self.K)), k.unflatten(-1, (self.H, self.K))
        v = v.unflatten(-1, (self.HV, self.V))
        beta = torch.sigmoid(p.b.to(work))
        beta = 2 * beta if self.allow_neg_eigval else beta
        g = None if p.g is None else p.g.to(work)
        forget = F.logsigmoid(self.forget_proj(x).to(work)) if hasattr(self, "forget_proj") else None
        rule = None if self.preconditioner is None else self.preconditioner.rule()
        if self._write_hooks:
            writes = self._writes(k, beta, forget, rule, state.d, cu_seqlens)
            for hook in list(self._write_hooks.values()):
                hook(self, writes)
        if steps:
            q, k, v, beta = (y[:, 0] for y in (q, k, v, beta))
            g, forget = (None if y is None else y[:, 0] for y in (g, forget))
            o = online_scaled_delta_step(
                *(q, k, v, beta, state), g=g, forget=forget, preconditioner=rule, backend=self.backend
            )
            o = o[:, None]
        else:
            o, final = online_scaled_delta_rule(
                *(q, k, v, beta),
                g=g,
                forget=forget,
                preconditioner=rule,
                initial_state=state,
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
        if cache is not None:
            self._write(cache, conv_state, None if steps else final)
        return self._output(o, p.gate)

    def _writes(
        self,
        k: Tensor,
        beta: Tensor,
        forget: Tensor | None,
        rule: Preconditioner | None,
        d: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Writes:
        k = l2norm(k.to(beta.dtype)).repeat_interleave(self.HV // self.H, 2)
        if rule is not None:
            d, _ = precondition(
                *(k, beta),
                preconditioner=rule,
                forget=forget,
                initial_d=d,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
        return Writes(k, beta, forget, d, rule)

    def _read(self, cache: Any | None, x: Tensor, N: int) -> tuple[Tensor | None, DeltaState]:
        """Conv state and operator state of N sequences: the cache's, or the initial ones."""
        if cache is not None:
            layer = self._cache_layer(cache, N)
            # Not `cache.get_recurrent_state(..., 1)`: transformers tracks what is filled by conv states alone.
            if layer.has_previous_state[0]:
                states = [layer.conv_states[0], layer.recurrent_states[0], layer.recurrent_states[1]]
                if self.preconditioner is not None and states[2] is None:
                    refuse("past_key_values", "a cache with S and without d", "one that a preconditioned model filled")
                if torch.is_grad_enabled():  # the cache is written in place, also over what autograd has saved
                    states = [None if s is None else s.clone() for s in states]
                return states[0], DeltaState(states[1], states[2])
        p = self.preconditioner
        if p is None or (not p.learn_d_init and p.d_init == 1):
            return None, DeltaState()  # the operator's own d = 1
        work = work_dtype(x)
        if p.learn_d_init:
            d = self.d0.to(work)
        else:
            d = torch.full((self.HV, self.K), p.d_init, dtype=work, device=x.device)
        return None, DeltaState(d=d.expand(N, -1, -1))

    def _check_held(self, conv_state: Tensor, state: DeltaState, weight: Tensor, work: torch.dtype) -> None:
        """Refuse what another model, or one in another precision, has left in the cache."""
        N, (D, _, W), (HV, K, V) = len(conv_state), weight.shape, (self.HV, self.K, self.V)
        held = {"conv": (conv_state, (N, D, W)), "S": (state.S, (N, HV, K, V)), "d": (state.d, (N, HV, K))}
        for name, (y, shape) in held.items():
            if y is not None and (tuple(y.shape) != shape or (name != "conv" and y.dtype != work)):
                takes = f"{shape}" if name == "conv" else f"{work} {shape}"
                refuse("past_key_values", f"{name} {y.dtype} {tuple(y.shape)}", takes)

    def _write(self, cache: Any, conv_state: Tensor, state: DeltaState | None) -> None:
        """None: S and d have been updated in place."""
        # conv_state holds all W columns, so that it replaces what the cache holds, whether that appends or not.
        cache.update_conv_state(conv_state, self.layer_idx, conv_kernel_size=conv_state.shape[-1])
        for i, y in enumerate((state.S, state.d) if state is not None else ()):
            if y is not None:
                # The cache makes its tensors in the image of the first ones; a step takes contiguous ones.
                cache.update_recurrent_state(y.contiguous(), self.layer_idx, state_idx=i)
                cache.layers[self.layer_idx].has_previous_state[i] = True

    def _cache_layer(self, cache: Any, N: int) -> Any:
        i = self.layer_idx
        if i is None:
            refuse("layer_idx", None, "the layer's place in past_key_values")
        layers = getattr(cache, "layers", [])
        layer = layers[i] if i < len(layers) else None
        states = 1 if self.preconditioner is None else 2
        if layer is None or getattr(layer, "number_of_states", 0) < states:
            got = f"{type(cache).__name__} whose layer {i} is {'missing' if layer is None else layer}"
            takes = f"a linear-attention layer of {states} states there, as in transformers.DynamicCache(config=...)"
            refuse("past_key_values", got, takes)
        if layer.record_past:
            refuse(
                "past_key_values",
                "a cache that records the past (assisted decoding)",
                "one that does not: S and d cannot be rolled back",
            )
        if layer.conv_states[0] is not None and len(layer.conv_states[0]) != N:
            refuse("past_key_values", f"a cache of {len(layer.conv_states[0])} sequences", f"one of {N}")
        return layer


class OnlineScaledDeltaNet(DeltaMixer):
    """Token mixing by the online scaled delta rule, x [B, T, D] -> [B, T, D].

        q, k, v = silu(conv(q_proj(x))), silu(conv(k_proj(x))), silu(conv(v_proj(x)))     causal, depthwise, width W
        beta    = sigmoid(b_proj(x))                                    [* 2 with allow_neg_eigval]
        g       = -exp(A_log) softplus(a_proj(x) + dt_bias)             log state decay; channel: f_proj for a_proj
        forget  = logsigmoid(forget_proj(x))                            log lambda
        o       = online_scaled_delta_rule(q, k, v, beta, g, forget) from d = d0
        y       = o_proj(RMSNorm(o) [* silu(g_proj(x)) | * sigmoid(g_proj(x))])

    beta, g, forget, d, S and the norm are computed in the work dtype, also in bf16 models and under autocast.

    Args:
        hidden_size: D.
        num_heads: H. head_dim: K; None is hidden_size / num_heads.
        expand_v: V / K. num_v_heads: HV; None is num_heads.
        conv_size: W >= 1. norm_eps: eps of the output norm.
        allow_neg_eigval: beta in (0, 2) in place of (0, 1).
        state_decay: "none" (DeltaNet), "scalar" per head (Gated DeltaNet) or "channel" per key channel (KDA).
        output_gate: "none", "silu" (Gated DeltaNet) or "sigmoid_lowrank" (KDA).
        preconditioner: `osdn.nn.PreconditionerOptions`, or a dict of its fields (missing ones take their defaults);
            None is d == 1, the plain delta rule. Give `d0` no weight decay: it would pull d to 0.
        layer_idx: place of the layer in a cache; needed with `past_key_values` alone.
        backend: as in `osdn.online_scaled_delta_rule`.

    Raises:
        ValueError: naming the argument, what it got and what it takes.

    Source: arXiv 2605.13473; gates as in Gated DeltaNet and Kimi Delta Attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        expand_v: float = 1.0,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        allow_neg_eigval: bool = False,
        state_decay: StateDecay = "none",
        output_gate: OutputGate = "none",
        preconditioner: PreconditionerOptions | Mapping[str, Any] | None = _DEFAULT_PRECONDITIONER,
        layer_idx: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        H, HV, K, V = head_shape(hidden_size, num_heads, head_dim, expand_v, num_v_heads)
        check_size("conv_size", conv_size)
        check_positive("norm_eps", norm_eps)
        if state_decay not in get_args(StateDecay):
            refuse("state_decay", repr(state_decay), f"one of {get_args(StateDecay)}")
        if backend not in get_args(Backend):
            refuse("backend", repr(backend), f"one of {get_args(Backend)}")
        if output_gate not in get_args(OutputGate):
            refuse("output_gate", repr(output_gate), f"one of {get_args(OutputGate)}")
        self.hidden_size, self.H, self.HV, self.K, self.V = hidden_size, H, HV, K, V
        self.allow_neg_eigval, self.layer_idx, self.backend = allow_neg_eigval, layer_idx, backend
        self.state_decay, self.output_gate = state_decay, output_gate
        self.preconditioner = None if preconditioner is None else PreconditionerOptions.parse(preconditioner)

        self.q_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.k_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.v_proj = nn.Linear(hidden_size, HV * V, bias=False)
        self.b_proj = nn.Linear(hidden_size, HV, bias=False)
        # These hold weights; the three convolutions run as one.
        self.q_conv1d = nn.Conv1d(H * K, H * K, conv_size, groups=H * K, bias=False)
        self.k_conv1d = nn.Conv1d(H * K, H * K, conv_size, groups=H * K, bias=False)
        self.v_conv1d = nn.Conv1d(HV * V, HV * V, conv_size, groups=HV * V, bias=False)
        if state_decay == "scalar":
            self.a_proj = nn.Linear(hidden_size, HV, bias=False)
        elif state_decay == "channel":
            self.f_proj = _low_rank(hidden_size, V, HV * K, bias=False)
        if state_decay != "none":
            self.A_log = nn.Parameter(torch.empty(HV))
            self.dt_bias = nn.Parameter(torch.empty(HV if state_decay == "scalar" else HV * K))
        self._add_preconditioner()
        if output_gate == "silu":
            self.g_proj: nn.Module = nn.Linear(hidden_size, HV * V, bias=False)
        elif output_gate == "sigmoid_lowrank":
            self.g_proj = _low_rank(hidden_size, V, HV * V, bias=True)
        self.o_norm = RMSNorm(V, norm_eps)
        self.o_proj = nn.Linear(HV * V, hidden_size, bias=False)
        self.init_special_parameters()

    @torch.no_grad()
    def init_special_parameters(self) -> None:
        """Initial values of d0, forget_proj, A_log and dt_bias; a library's own initialisation must not have the
        last word on them. Parameters that transformers has marked as loaded from a checkpoint are left alone.
        """
        if self.state_decay != "none":
            A = torch.empty_like(self.A_log, dtype=torch.float32)
            A.uniform_(1, 16) if self.state_decay == "channel" else A.uniform_(0, 16).clamp_(min=1e-4)
            dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
            dt = dt.clamp(min=1e-4)
            _assign(self.A_log, A.log())
            _assign(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        super().init_special_parameters()

    def _project(self, x: Tensor) -> Projections:
        return Projections(
            torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1),
            torch.cat([kernel_of(conv, x.device) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]),
            self.b_proj(x),
            self._log_decay(x),
            None if self.output_gate == "none" else self.g_proj(x),
        )

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            gate = gate.to(work_dtype(o)).view_as(o)
            gate = F.silu(gate) if self.output_gate == "silu" else torch.sigmoid(gate)
        return self.o_proj(self.o_norm(o, gate).flatten(2))

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """[B, T, HV] or [B, T, HV, K], work dtype."""
        if self.state_decay == "none":
            return None
        work = work_dtype(x)
        scalar = self.state_decay == "scalar"
        dt = F.softplus((self.a_proj(x) if scalar else self.f_proj(x)).to(work) + self.dt_bias.to(work))
        A = self.A_log.to(work).exp()
        return -A * dt if scalar else -A[:, None] * dt.unflatten(-1, (self.HV, self.K))

    def extra_repr(self) -> str:
        return f"{self.preconditioner}, state_decay={self.state_decay!r}, output_gate={self.output_gate!r}"


class ForgetProjection(nn.Linear):
    """x W^T + b, the logits of lambda, [B, T, D] to [B, T, HV], all in the work dtype: 1 - lambda is near 1e-3, where
    bf16 has steps of 3% through the bias alone. Linear, as what adapts or quantises linear layers takes it to be.
    """

    def forward(self, x: Tensor) -> Tensor:
        work = work_dtype(x)
        with no_autocast(x.device):
            return F.linear(x.to(work), self.weight.to(work), self.bias.to(work))


def is_preconditioner_parameter(name: str) -> bool:
    """Whether a parameter of this name, of a layer or a model, is d0 or belongs to forget_proj."""
    return name.rpartition(".")[2] == "d0" or name.startswith("forget_proj.") or ".forget_proj." in name


def head_shape(
    hidden_size: int, num_heads: int, head_dim: int | None, expand_v: float, num_v_heads: int | None
) -> tuple[int, int, int, int]:
    """(H, HV, K, V), or ValueError where they do not come out whole."""
    check_size("hidden_size", hidden_size)
    check_size("num_heads", num_heads)
    for name, x in (("head_dim", head_dim), ("num_v_heads", num_v_heads)):
        if x is not None:
            check_size(name, x, "an integer >= 1, or None")
    check_number("expand_v", expand_v)
    if head_dim is None and hidden_size % num_heads:
        refuse("head_dim", None, f"an integer, since hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
    K = hidden_size // num_heads if head_dim is None else head_dim
    HV = num_heads if num_v_heads is None else num_v_heads
    if HV % num_heads:
        refuse("num_v_heads", num_v_heads, f"a multiple of num_heads, {num_heads}")
    product = K * float(expand_v)
    V = round(product) if math.isfinite(product) else 0
    if V < 1 or not math.isclose(product, V, rel_tol=1e-9):  # K * (V / K) may be off by rounding
        refuse("expand_v", expand_v, f"a factor that makes head_dim {K} a whole number >= 1")
    return num_heads, HV, K, V


def _low_rank(size: int, rank: int, out: int, *, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, out, bias=bias))


def _assign(parameter: Tensor, value: Tensor) -> None:
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
