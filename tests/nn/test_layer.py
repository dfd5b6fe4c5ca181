"""The layer by itself: its formula written out, packing, padding, dtypes, initial values, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionLayer

import osdn
from osdn.nn import OnlineScaledDeltaNet, PreconditionerOptions

ACTIVE = {"eta": 1.0, "d_max": 2.0, "d_init": 0.4, "forget": "data_dependent", "forget_bias": 2.0}
VARIANTS = {
    "plain": {"preconditioner": None},
    "apf": {"preconditioner": ACTIVE},
    "fixed-d0": {"preconditioner": {**ACTIVE, "learn_d_init": False, "forget": "none"}},
    "gdn": {"preconditioner": {**ACTIVE, "feedback": "beta_aware"}, "state_decay": "scalar", "output_gate": "silu"},
    "kda": {"preconditioner": ACTIVE, "state_decay": "channel", "output_gate": "sigmoid_lowrank"},
    "shapes": {"preconditioner": ACTIVE, "num_v_heads": 4, "expand_v": 1.5, "allow_neg_eigval": True, "conv_size": 3},
    "shapes-kda": {
        "preconditioner": ACTIVE,
        "state_decay": "channel",
        "output_gate": "sigmoid_lowrank",
        "num_v_heads": 4,
        "expand_v": 0.5,
    },
}


def make(variant, **kwargs):
    """A layer whose every parameter matters: weights large enough, d0 and forget gates apart from each other."""
    torch.manual_seed(0)
    layer = OnlineScaledDeltaNet(24, 2, 8, layer_idx=0, **{**VARIANTS[variant], **kwargs})
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name == "d0":
                p.uniform_(0.2, 2)
            elif name not in ("A_log", "dt_bias", "forget_proj.bias", "o_norm.weight"):
                p.normal_(std=0.5)
    return layer.double()


def make_cache(states=2):
    return Cache(layers=[LinearAttentionLayer(number_of_states=states)])


def written_out(m, x):
    """One sequence x [T, D], by the formulas of the class's docstring."""
    H, HV, K, V, T = m.H, m.HV, m.K, m.V, len(x)

    def conv(proj, conv1d):
        u, w = x @ proj.weight.T, conv1d.weight[:, 0]
        W = w.shape[1]
        rows = [sum(u[t - W + 1 + j] * w[:, j] for j in range(W) if t - W + 1 + j >= 0) for t in range(T)]
        return F.silu(torch.stack(rows))

    q = conv(m.q_proj, m.q_conv1d).view(1, T, H, K)
    k = conv(m.k_proj, m.k_conv1d).view(1, T, H, K)
    v = conv(m.v_proj, m.v_conv1d).view(1, T, HV, V)
    beta = torch.sigmoid(x @ m.b_proj.weight.T)[None] * (2 if m.allow_neg_eigval else 1)
    g = forget = None
    if m.state_decay == "scalar":
        g = (-m.A_log.exp() * F.softplus(x @ m.a_proj.weight.T + m.dt_bias))[None]
    elif m.state_decay == "channel":
        low = x @ m.f_proj[0].weight.T @ m.f_proj[1].weight.T + m.dt_bias
        g = -m.A_log.exp()[:, None] * F.softplus(low).view(1, T, HV, K)
    p, d = m.preconditioner, None
    if p is not None:
        d = m.d0[None] if p.learn_d_init else torch.full((1, HV, K), p.d_init, dtype=x.dtype)
        if p.forget != "none":
            forget = torch.log(torch.sigmoid(x @ m.forget_proj.weight.T + m.forget_proj.bias))[None]
    o, state = osdn.online_scaled_delta_rule(
        *(q, k, v, beta),
        g=g,
        forget=forget,
        preconditioner=None if p is None else p.rule(),
        initial_state=osdn.DeltaState(d=d),
        output_final_state=True,
        backend="reference",
    )
    o = o[0] / (o[0].square().mean(-1, keepdim=True) + m.o_norm.eps).sqrt() * m.o_norm.weight
    if m.output_gate == "silu":
        o = o * F.silu(x @ m.g_proj.weight.T).view(T, HV, V)
    elif m.output_gate == "sigmoid_lowrank":
        o = o * torch.sigmoid(x @ m.g_proj[0].weight.T @ m.g_proj[1].weight.T + m.g_proj[1].bias).view(T, HV, V)
    return o.flatten(1) @ m.o_proj.weight.T, d, state.d


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_is_its_formula(variant):
    m, x = make(variant), torch.randn(2, 11, 24, dtype=torch.float64)
    y = m(x)
    for row in range(2):
        expected, d_first, d_last = written_out(m, x[row])
        torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-10)
        if d_first is not None:
            assert (d_first - d_last).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_is_looped(variant):
    m, lengths = make(variant), [5, 1, 0, 9, 3]
    x = torch.randn(1, sum(lengths), 24, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = m(x, cu_seqlens=cu_seqlens)
    looped = torch.cat([m(part) for part in x.split(lengths, 1) if part.shape[1]], 1)
    torch.testing.assert_close(packed, looped, rtol=1e-9, atol=1e-10)
    u, inputs = torch.randn_like(packed), [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad((packed * u).sum(), inputs), torch.autograd.grad((looped * u).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", ["apf", "gdn"])
def test_padding_anywhere_changes_nothing(variant):
    m = make(variant)
    x = torch.randn(4, 7, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1], [0] * 7])
    y = m(x, attention_mask=mask)
    for row, keep in enumerate(mask.bool()):
        if keep.any():
            torch.testing.assert_close(y[row, keep], m(x[row, keep][None])[0], rtol=1e-9, atol=1e-10)
        assert (y[row, ~keep] == 0).all()
    gradient = torch.autograd.grad(y.square().sum(), x)[0]
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[mask == 1] != 0).any(-1).all()
    assert (m(x, attention_mask=torch.zeros(4, 7)) == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_continued_from_a_cache_is_one_pass_with_gradients(variant):
    m, x = make(variant), torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    cache, whole = make_cache(), m(x)
    pieces = torch.cat([m(piece, past_key_values=cache) for piece in x.split([2, 1, 5, 1], 1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(pieces.square().sum(), [x, *m.parameters()]),
        torch.autograd.grad(whole.square().sum(), [x, *m.parameters()]),
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.skipif(not hasattr(Cache, "get_recurrent_state"), reason="transformers' accessor came after 5.17")
def test_transformers_finds_d_by_its_own_accessor():
    m, cache = make("apf"), make_cache()
    m(torch.randn(2, 5, 24, dtype=torch.float64), past_key_values=cache)
    assert cache.get_recurrent_state(0, 1).shape == (2, 2, 8)
    assert (cache.get_recurrent_state(0, 1) - m.d0).abs().max() > 0.1
    assert cache.has_previous_state(0)


@pytest.mark.parametrize("autocast", [False, True])
def test_gates_and_states_stay_in_float32(autocast, monkeypatch):
    m, x = make("gdn").float(), torch.randn(2, 12, 24)
    exact, cache = m(x), make_cache()
    seen = {}

    def spy(q, k, v, beta, **kwargs):
        seen.update(beta=beta, g=kwargs["g"], forget=kwargs["forget"])
        return osdn.online_scaled_delta_rule(q, k, v, beta, **kwargs)

    monkeypatch.setattr("osdn.nn.layer.online_scaled_delta_rule", spy)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x, past_key_values=cache)
    else:
        y = m.bfloat16()(x.bfloat16(), past_key_values=cache)
    assert y.dtype == torch.bfloat16
    for name, gate in seen.items():
        assert gate.dtype == torch.float32, name
        assert not torch.equal(gate, gate.bfloat16().float()), f"{name} has been rounded to bf16"
    assert cache.layers[0].recurrent_states[0].dtype == cache.layers[0].recurrent_states[1].dtype == torch.float32
    # bf16 has 8 bits; projections, conv and norm each round once and the recurrence feeds a few of them back.
    assert (y - exact).norm() / exact.norm() < 0.05
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_autocast_does_not_touch_the_forget_gate():
    m, x = make("apf").float(), torch.randn(1, 6, 24)
    exact = m.forget_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.forget_proj(x), exact)


def special_values_hold(layer):
    A = layer.A_log.detach().float().exp()
    dt = F.softplus(layer.dt_bias.detach().float())
    assert ((A > 0) & (A <= 16.1)).all()
    assert ((dt >= 0.99e-3) & (dt <= 0.101)).all()
    assert (layer.forget_proj.weight == 0).all()
    assert (layer.forget_proj.bias == torch.tensor(6.9, dtype=layer.forget_proj.bias.dtype)).all()
    assert (layer.d0 == torch.tensor(0.7, dtype=layer.d0.dtype)).all()


@pytest.mark.parametrize("state_decay", ["scalar", "channel"])
def test_initial_values(state_decay):
    kwargs = {"state_decay": state_decay, "preconditioner": {"d_init": 0.7}}
    special_values_hold(OnlineScaledDeltaNet(24, 2, **kwargs))
    with torch.device("meta"):
        layer = OnlineScaledDeltaNet(24, 2, **kwargs)
    layer.to_empty(device="cpu")
    layer.init_special_parameters()
    special_values_hold(layer)


def test_lambda_begins_at_the_bias_everywhere():
    layer, found = OnlineScaledDeltaNet(24, 2, preconditioner={}), []
    layer.register_write_hook(lambda _, writes: found.append(writes.forget))
    layer(torch.randn(1, 3, 24))
    torch.testing.assert_close(found[0], torch.full((1, 3, 2), -math.log1p(math.exp(-6.9))))


def test_linear_layers_are_linear():
    """So that libraries may put adapters or other linear layers in their place."""
    m, x = make("apf").float(), torch.randn(1, 6, 24)
    y = m(x)
    for name, module in list(m.named_modules()):
        if isinstance(module, torch.nn.Linear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.load_state_dict(module.state_dict())
            m.set_submodule(name, plain)
    assert type(m.forget_proj) is torch.nn.Linear
    assert torch.equal(m(x), y)


def test_d_that_is_not_learned_survives_meta_and_dtype():
    kwargs = {"preconditioner": {"d_init": 0.0, "learn_d_init": False, "d_max": 2.0, "forget": "none"}, "layer_idx": 0}
    layer = OnlineScaledDeltaNet(24, 2, **kwargs)
    with torch.device("meta"):
        other = OnlineScaledDeltaNet(24, 2, **kwargs)
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert "d0" not in layer.state_dict()
    x, cache = torch.randn(1, 3, 24, dtype=torch.float64), make_cache()
    torch.testing.assert_close(other.double()(x), layer.double()(x, past_key_values=cache), rtol=0, atol=0)
    assert (cache.layers[0].recurrent_states[1] > 0).any()


def test_plain_tie_still_warns(monkeypatch):
    monkeypatch.setattr("osdn.ops.api._warned_tie", False)
    layer = OnlineScaledDeltaNet(24, 2, preconditioner={"learn_d_init": False, "forget": "none"})
    with pytest.warns(UserWarning, match="d starts at 1 and lambda is 1"):
        layer(torch.randn(1, 3, 24))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 5}, r"head_dim: got None, takes an integer, since hidden_size 24"),
        ({"num_heads": 0}, r"num_heads: got 0"),
        ({"num_heads": 2.0}, r"num_heads: got 2.0, takes an integer >= 1"),
        ({"hidden_size": -4}, r"hidden_size: got -4, takes an integer >= 1"),
        ({"head_dim": 1.5}, r"head_dim: got 1.5, takes an integer >= 1, or None"),
        ({"expand_v": math.nan}, r"expand_v: got nan, takes a factor"),
        ({"expand_v": math.inf}, r"expand_v: got inf, takes a factor"),
        ({"expand_v": 10**308}, r"expand_v: got 10+, takes a factor"),
        ({"expand_v": -1.0}, r"expand_v: got -1.0, takes a factor"),
        ({"conv_size": 1.5}, r"conv_size: got 1.5, takes an integer >= 1"),
        ({"norm_eps": math.nan}, r"norm_eps: got nan, takes a finite number > 0"),
        ({"head_dim": 0}, r"head_dim: got 0"),
        ({"num_v_heads": 3}, r"num_v_heads: got 3, takes a multiple of num_heads, 2"),
        ({"expand_v": 0.3}, r"expand_v: got 0.3, takes a factor that makes head_dim 12 a whole number"),
        ({"conv_size": 0}, r"conv_size: got 0"),
        ({"state_decay": "vector"}, r"state_decay: got 'vector', takes one of \('none', 'scalar', 'channel'\)"),
        ({"output_gate": "tanh"}, r"output_gate: got 'tanh'"),
        ({"preconditioner": {"etta": 1}}, r"preconditioner: got unknown etta, takes eta, feedback"),
        (
            {"preconditioner": "osdn"},
            r"preconditioner: got 'osdn', takes None, osdn.nn.PreconditionerOptions or a dict",
        ),
    ],
)
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OnlineScaledDeltaNet(**{"hidden_size": 24, "num_heads": 2, **kwargs})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1}, r"preconditioner.eta: got -1.0, takes a finite float >= 0"),
        ({"eta": "1"}, r"preconditioner.eta: got '1', takes a finite number"),
        ({"eta": True}, r"preconditioner.eta: got True"),
        ({"eta": 10**400}, r"preconditioner.eta: got an int of 1329 bits, takes a finite number"),
        ({"feedback": "none"}, r"preconditioner.feedback: got 'none', takes one of"),
        ({"d_min": 1, "d_max": 0.5}, r"preconditioner.d_min, d_max: got \[1.0, 0.5\]"),
        ({"d_min": -math.inf}, r"preconditioner.d_min: got -inf"),
        ({"d_max": math.nan}, r"preconditioner.d_max: got nan, takes a finite number, or None for no upper bound"),
        ({"d_init": None}, r"preconditioner.d_init: got None"),
        ({"learn_d_init": 1}, r"preconditioner.learn_d_init: got 1, takes True or False"),
        ({"forget": "constant"}, r"preconditioner.forget: got 'constant', takes one of \('none', 'data_dependent'\)"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        PreconditionerOptions.parse(options)


def test_infinity_is_no_upper_bound():
    options = PreconditionerOptions(d_max=math.inf)
    assert options.d_max is None
    assert options.rule().d_max == math.inf
    assert PreconditionerOptions.parse(options.to_dict()) == options


def test_refused_calls():
    m, x = make("apf"), torch.randn(2, 5, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cu_seqlens: got B = 2"):
        m(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 4\], takes offsets from 0 to T = 5"):
        m(x[:1], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"attention_mask: got a mask beside cu_seqlens"):
        m(x[:1], torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"past_key_values: got DynamicCache whose layer 0 is missing"):
        m(x, past_key_values=DynamicCache())
    one_state = make_cache(states=1)
    with pytest.raises(ValueError, match=r"takes a linear-attention layer of 2 states"):
        m(x, past_key_values=one_state)
    cache = make_cache()
    m(x, past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values: got a cache of 2 sequences, takes one of 1"):
        m(x[:1], past_key_values=cache)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"past_key_values: got a cache that records the past"):
        m(x, past_key_values=cache)
    m.layer_idx = None
    with pytest.raises(ValueError, match=r"layer_idx: got None"):
        m(x, past_key_values=make_cache())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_write_hook_sees_what_the_operator_uses(variant):
    """In one call, and in prefill and decoding: d by the state that the operator itself leaves behind each token."""
    layer = make(variant)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    seen, states = [], []
    handle = layer.register_write_hook(lambda which, writes: seen.append((which, writes)))
    with torch.no_grad():
        y = layer(x)
        cache = make_cache()
        pieces = []
        for part in x.split([3, 1, 1, 1, 1], dim=1):
            pieces.append(layer(part, past_key_values=cache))
            d = cache.layers[0].recurrent_states[1]
            states.append(None if d is None else d.clone())
    torch.testing.assert_close(torch.cat(pieces, 1), y)
    handle.remove()
    layer(x)
    assert [which is layer for which, _ in seen] == [True] * 6
    whole, *parts = [writes for _, writes in seen]
    for name in ("k", "beta", "forget", "d"):
        if getattr(whole, name) is None:
            assert all(getattr(part, name) is None for part in parts)
            continue
        joined = torch.cat([getattr(part, name) for part in parts], 1)
        torch.testing.assert_close(joined, getattr(whole, name))
        assert joined.shape[:3] == (2, 7, layer.HV)
    torch.testing.assert_close(whole.k.norm(dim=-1), torch.ones_like(whole.beta), atol=1e-3, rtol=0)
    if layer.preconditioner is None:
        assert (whole.d, whole.rule) == (None, None)
    else:
        assert whole.rule == layer.preconditioner.rule()
        for t, state in zip(range(3, 7), states, strict=False):
            torch.testing.assert_close(whole.d[:, t], state)
        assert (whole.d[:, 6] - whole.d[:, 0]).abs().mean() > 0.05
