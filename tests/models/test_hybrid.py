"""transformers' hybrids with a preconditioner: the same function at first, another once d moves, all else as before."""

import copy
import sys

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import osdn
from osdn.models.configuration import CACHE
from osdn.models.hybrid import FIELD, PreconditionedHost
from osdn.nn.layer import is_preconditioner_parameter
from osdn.ops.api import l2norm

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN = {**HEADS, "head_dim": 16}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
HOSTS = {
    "qwen3_next": ("Qwen3NextConfig", {**QWEN, **MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("Qwen3_5TextConfig", {**QWEN, "intermediate_size": 24}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**QWEN, **MOE, "shared_expert_intermediate_size": 16}),
    "olmo_hybrid": ("OlmoHybridConfig", {**HEADS, "intermediate_size": 24}),
    "kimi_linear": (
        "KimiLinearConfig",
        {**MLA, **MOE, "intermediate_size": 24, "linear_num_heads": 2, "linear_head_dim": 8, "n_group": 1},
    ),
}
ACTIVE = {"feedback": "beta_aware", "eta": 1.0, "d_max": 2.0, "forget": "data_dependent", "forget_bias": 2.0}


def make_host(name):
    config, options = HOSTS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**SIZES, **options)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1 and "A_log" not in key:
                p.normal_(std=0.3)
    return model


def make_active(name):
    """A d_0 far from 1, feedback and forgetting: d moves and the layers differ from the host's."""
    model = osdn.precondition_model(make_host(name), ACTIVE)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("d0"):
                p.uniform_(0.2, 2)
    return model


def make_multimodal():
    text = transformers.Qwen3_5TextConfig(**SIZES, **HOSTS["qwen3_5"][1])
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=vision)
    torch.manual_seed(0)
    return osdn.precondition_model(transformers.Qwen3_5ForConditionalGeneration(config).eval(), ACTIVE)


def layers(model):
    return [m for m in model.modules() if isinstance(m, PreconditionedHost)]


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, **kwargs).logits


def recompute(model):
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


X = torch.randint(3, 53, (2, 75), generator=torch.Generator().manual_seed(1))  # more than a chunk
MASK = torch.ones_like(X)
MASK[0, :20] = 0


@pytest.mark.parametrize("name", HOSTS)
def test_the_same_function_at_first(name):
    model = make_host(name)
    expected, padded = logits(model, X), logits(model, X, attention_mask=MASK)
    generated = model.generate(X[:, :20], max_new_tokens=8, do_sample=False, pad_token_id=0)
    still = osdn.precondition_model(copy.deepcopy(model), {"eta": 0.0})
    assert len(layers(still)) == 2
    # float32; the host inverts triangles where we solve them, and two layers amplify the rounding.
    assert difference(logits(still, X), expected) < 2e-5
    # Keys are of unit length but for the eps of the norm, so that d drifts from 1 by what short keys lack.
    free = osdn.precondition_model(copy.deepcopy(model))
    assert difference(logits(free, X), expected) < 2e-4
    assert difference(logits(free, X, attention_mask=MASK)[MASK == 1], padded[MASK == 1]) < 2e-4
    assert torch.equal(free.generate(X[:, :20], max_new_tokens=8, do_sample=False, pad_token_id=0), generated)
    aware = osdn.precondition_model(model, {"feedback": "beta_aware"})
    assert difference(logits(aware, X), expected) > 5e-3


@pytest.mark.parametrize("name", HOSTS)
def test_weights_that_accelerate_keeps_elsewhere(name):
    model = make_active(name)
    expected = logits(model, X)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert layers(model)[0].conv1d.weight.is_meta
    assert torch.equal(logits(model, X), expected)


@pytest.mark.parametrize("name", HOSTS)
def test_d_scales_the_key_that_is_written(name, monkeypatch):
    """A constant d against the host's own rule with key sqrt(d) k and query sqrt(d) q: docs/math.md, 4."""
    host = make_host(name)
    model = osdn.precondition_model(copy.deepcopy(host), {"eta": 0.0, "d_max": None})
    d0 = iter([torch.rand_like(layer.d0) * 1.8 + 0.2 for layer in layers(model)])
    with torch.no_grad():
        for layer in layers(model):
            layer.d0.copy_(next(d0))
    source = sys.modules[type(host).__module__]
    rule = "chunk_kimi_delta_attention" if name == "kimi_linear" else "torch_chunk_gated_delta_rule"
    chunk, scales = getattr(source, rule), iter([layer.d0.sqrt() for layer in layers(model)])

    def scaled(q, k, v, **options):
        options["use_qk_l2norm_in_kernel"] = False
        scale, repeats = next(scales), v.shape[2] // k.shape[2]
        q, k = (scale * l2norm(y).repeat_interleave(repeats, 2) for y in (q, k))
        return chunk(q, k, v, **options)

    before = logits(host, X)
    monkeypatch.setattr(source, rule, scaled)
    expected = logits(host, X)
    assert difference(before, expected) > 0.05
    assert difference(logits(model, X), expected) < 2e-5


@pytest.mark.parametrize("name", HOSTS)
def test_generation_and_caches_carry_d(name):
    model, x = make_active(name), X[:, :20]
    whole, cache = logits(model, x, use_cache=False), DynamicCache(config=model.config)
    pieces = [logits(model, piece, **{CACHE: cache}) for piece in x.split([9, 1, 1, 7, 2], 1)]
    assert difference(torch.cat(pieces, 1), whole) < 2e-5
    for layer in layers(model):
        d = cache.layers[layer.layer_idx].recurrent_states[1]
        assert d.shape == (2, layer.HV, layer.K)
        assert (d - layer.d0).abs().amax(-1).min() > 0.05
    common = {"attention_mask": MASK[:, 5:25], "max_new_tokens": 6, "pad_token_id": 0}
    for kwargs in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        sequences = [
            model.generate(x, use_cache=use_cache, do_sample=False, **common, **kwargs if use_cache else beams)
            for use_cache, beams in ((True, {}), (False, {k: v for k, v in kwargs.items() if k == "num_beams"}))
        ]
        assert torch.equal(*sequences), kwargs
    with pytest.raises(ValueError, match=r"assisted generation is not supported with stateful models"):
        model.generate(x[:1], prompt_lookup_num_tokens=2, max_new_tokens=4)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(name, dtype, tmp_path):
    model = make_active(name).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = osdn.load_preconditioned(tmp_path, dtype=dtype)
    assert type(loaded) is type(model)
    assert not loaded.training
    state, plain = model.state_dict(), type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert set(loaded.state_dict()) == set(state)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.dtype == plain.get(key, value).dtype, key  # some stay in float32, by class and version
        assert value.dtype == dtype or not is_preconditioner_parameter(key)
    assert all(layer.preconditioner == layers(model)[0].preconditioner for layer in layers(loaded))
    # The same weights, but not always at the same alignment in memory, which libraries of products look at.
    assert difference(logits(loaded, X).float(), logits(model, X).float()) < (1e-5 if dtype == torch.float32 else 0.02)
    loaded.save_pretrained(tmp_path / "again")
    assert set(osdn.load_preconditioned(tmp_path / "again").state_dict()) == set(state)


def test_loading_takes_what_from_pretrained_takes(tmp_path):
    make_active("qwen3_5").save_pretrained(tmp_path / "sub")
    model, info = osdn.load_preconditioned(
        tmp_path, subfolder="sub", use_cache=False, attn_implementation="eager", output_loading_info=True
    )
    assert not model.config.use_cache
    assert (model.config._attn_implementation, len(info["missing_keys"])) == ("eager", 0)
    assert getattr(model.config, FIELD)["forget_bias"] == 2.0


def test_initial_values_are_not_overwritten(tmp_path):
    """transformers initialises every linear layer that it does not know to be done: forget_proj would halve d."""
    model = osdn.precondition_model(make_host("qwen3_5"), {"forget": "data_dependent", "d_init": 0.5})
    model.init_weights()
    for layer in layers(model):
        assert (layer.d0 == 0.5).all()
        assert (layer.forget_proj.weight == 0).all()
        assert (layer.forget_proj.bias == 6.9).all()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.linear_attn.d0"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"path: got \S+ without model.layers.0.linear_attn.d0, takes all weights"):
        osdn.load_preconditioned(tmp_path)


def test_an_osdn_model_without_a_preconditioner(tmp_path):
    torch.manual_seed(0)
    plain = osdn.OSDNForCausalLM(osdn.OSDNConfig.preset("gdn-tiny", vocab_size=53)).eval()
    expected, before = logits(plain, X), copy.deepcopy(plain.state_dict())
    model = osdn.precondition_model(plain, {"eta": 0.0}, train="preconditioner")
    assert model is plain
    assert difference(logits(model, X), expected) < 2e-5  # float32
    after = model.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(after) - set(before)
    assert model.config.preconditioner["eta"] == 0.0
    with torch.no_grad():
        model.model.layers[0].attn.d0.fill_(0.3)
    model.save_pretrained(tmp_path)
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path), X), logits(model, X)) < 1e-6
    with pytest.raises(ValueError, match="model: got a OSDNForCausalLM that has its preconditioner already"):
        osdn.precondition_model(model)


def test_a_text_model_inside_another(tmp_path):
    model = make_multimodal()
    model.save_pretrained(tmp_path)
    loaded = osdn.load_preconditioned(tmp_path)
    assert type(loaded) is transformers.Qwen3_5ForConditionalGeneration
    assert getattr(loaded.config.text_config, FIELD)["forget_bias"] == 2.0
    assert difference(logits(loaded, X), logits(model, X)) < 1e-5
    assert model.generate(X, max_new_tokens=3, do_sample=False).shape == (2, 78)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_bf16_errs_no_more_than_the_host(name):
    host = make_host(name)
    exact = logits(host, X)
    model = osdn.precondition_model(copy.deepcopy(host)).bfloat16()
    ours, theirs = (difference(logits(m, X).float(), exact) for m in (model, host.bfloat16()))
    assert ours < 2 * theirs


@pytest.mark.parametrize("name", HOSTS)
def test_packed_is_looped(name):
    layer, lengths = layers(make_active(name))[0], [4, 1, 70, 2]
    x, cu = torch.randn(1, 77, 32), torch.tensor([0, 4, 5, 75, 77])
    with torch.no_grad():
        looped = torch.cat([layer(part) for part in x.split(lengths, 1)], 1)
        assert difference(layer(x, cu_seq_lens_q=cu, seq_idx=cu), looped) < 1e-5
    with pytest.raises(ValueError, match="seq_idx: got a tensor, takes None, or cu_seq_lens_q or position_ids beside"):
        layer(x, seq_idx=cu)
    with pytest.raises(ValueError, match=rf"{CACHE}: got a cache, takes None with packed .* use_cache=False"):
        layer(x, DynamicCache(), cu_seq_lens_q=cu)


ROWS = [[30, 1, 44], [75]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])


def looped(model):
    return torch.stack([torch.cat([model(part[None]).logits[0] for part in x.split(row)]) for x, row in zip(X, ROWS)])


@pytest.mark.parametrize("name", HOSTS)
def test_packed_by_position_ids_is_looped(name):
    """Attention layers are transformers' own: were it for these alone, logits would be off by half their norm."""
    model = make_active(name)
    with torch.no_grad():
        want = looped(model)
        assert difference(model(X, position_ids=POSITIONS).logits, want) < 1e-5  # float32
        assert difference(model.lm_head(model.model(X, None, POSITIONS).last_hidden_state), want) < 1e-5
        assert difference(model(X).logits, want) > 0.1
        same = torch.tensor([[0] * 30 + [1] + [2] * 44, [3] * 75])
        attends = (same[:, :, None] == same[:, None]).tril()[:, None]
        for mask in (attends, {"full_attention": attends, "linear_attention": None}):
            assert difference(model(X, attention_mask=mask, position_ids=POSITIONS).logits, want) < 1e-5
        real = (torch.arange(75) < torch.tensor([[70], [75]])).long()
        mask = {"full_attention": attends, "linear_attention": real}
        assert (
            difference(model(X, attention_mask=mask, position_ids=POSITIONS).logits[real == 1], want[real == 1]) < 1e-5
        )
        row, offsets = {"position_ids": POSITIONS[:1]}, torch.tensor([0, 30, 31, 75])
        assert difference(model(X[:1], cu_seq_lens_q=offsets, **row).logits, want[:1]) < 1e-5
        with pytest.raises(ValueError, match=r"position_ids: got a sequence that begins where none of cu_seq_lens_q"):
            model(X[:1], cu_seq_lens_q=offsets[[0, 3]], **row)
        assert difference(model(X[:1], cu_seq_lens_q=torch.tensor([0, 15, 30, 31, 75]), **row).logits, want[:1]) > 0.1
        ahead = POSITIONS + 100 * same  # begins later, where transformers begins anew, too
        want = [
            model(x[None], position_ids=p[None]).logits for x, p in zip(X[0].split(ROWS[0]), ahead[0].split(ROWS[0]))
        ]
        assert difference(model(X[:1], position_ids=ahead[:1]).logits, torch.cat(want, 1)) < 1e-5
    recompute(model.train())
    grads = []
    for logits_of in (lambda: model(X, position_ids=POSITIONS).logits, lambda: looped(model)):
        (logits_of() * torch.linspace(-1, 1, 53)).sum().backward()
        grads.append(torch.cat([layer.d0.grad.flatten() for layer in layers(model)]))
        model.zero_grad()
    assert difference(*grads) < 1e-4


def test_packed_by_position_ids_inside_another_model_and_after_loading(tmp_path):
    make_multimodal().save_pretrained(tmp_path)
    model = osdn.load_preconditioned(tmp_path)
    with torch.no_grad():
        want = looped(model)
        for positions in (POSITIONS, POSITIONS.expand(4, -1, -1)):
            assert difference(model(X, position_ids=positions).logits, want) < 1e-5
            assert difference(copy.deepcopy(model)(X, position_ids=positions).logits, want) < 1e-5
        images = POSITIONS.expand(3, -1, -1)
        of_images_alone = model(X, position_ids=images).logits
        model.model.language_model._forward_pre_hooks.clear()
        assert torch.equal(of_images_alone, model(X, position_ids=images).logits)


def test_where_transformers_would_mix_packed_sequences():
    model, kwargs = make_active("qwen3_next"), {"position_ids": POSITIONS}
    for mask in (MASK, torch.ones_like(X)):
        with pytest.raises(
            ValueError, match=r"attention_mask: got a mask beside position_ids of packed .*, takes None"
        ):
            model(X, attention_mask=mask, **kwargs)
    for cache in ({"use_cache": True}, {CACHE: DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match=rf"{CACHE}: got a cache, takes None with packed .* use_cache=False"):
            model(X, **kwargs, **cache)
    padded = (MASK.cumsum(-1) - 1).masked_fill(MASK == 0, 1)  # as generate numbers what is padded
    one, other = (logits(model, X, attention_mask=MASK, **k) for k in ({"position_ids": padded}, {}))
    assert difference(one[MASK == 1], other[MASK == 1]) < 1e-5
    assert model(X[:1], cu_seq_lens_q=torch.tensor([0, 75])).past_key_values is None
    cache = model(X[:1, :30]).past_key_values  # with which a jump begins nothing, there as here
    model(X[:1, 30:], **{CACHE: cache}, position_ids=torch.tensor([[*range(30, 50), *range(60, 85)]]))


def test_position_ids_of_one_sequence():
    model, positions = make_active("qwen3_next"), torch.arange(75)[None]
    want = logits(model, X[:1], use_cache=False)
    assert torch.equal(logits(model, X[:1], position_ids=positions, seq_idx=torch.zeros(1, 75)), want)
    for wrong in (positions[0], positions[:, 1:]):
        with pytest.raises(ValueError, match=r"position_ids: got \(.*\), takes shape \[1, 75\]$"):
            model(X[:1], position_ids=wrong)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(position_ids=positions)


def test_a_decoding_step_compiles_whole():
    model = make_active("qwen3_5")
    with torch.no_grad():
        cache = model(X[:, :20]).past_key_values
    more = {"attention_mask": torch.ones(2, 21, dtype=torch.long), "position_ids": torch.full((1, 1), 20)}
    expected = logits(model, X[:, 20:21], **{CACHE: copy.deepcopy(cache)}, **more)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(logits(compiled, X[:, 20:21], **{CACHE: cache}, **more), expected) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_training_the_preconditioner_alone(name):
    host = make_host(name)
    model = osdn.precondition_model(host, {"forget": "data_dependent"}, train="preconditioner").train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    per_layer = ("d0", "forget_proj.weight", "forget_proj.bias")
    assert {n.split("attn.")[1] for n in trained} == set(per_layer)
    assert len(trained) == 2 * len(per_layer)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=0.05, weight_decay=0.0), []
    for _ in range(6):
        losses.append(model(X, labels=X).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    everything = osdn.precondition_model(make_host(name))
    assert all(p.requires_grad for p in everything.parameters())
    recompute(everything)
    everything.train()(X, labels=X).loss.backward()
    assert all(layer.d0.grad.abs().max() > 0 for layer in layers(everything))


def test_refusals():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model = make_host("qwen3_5")
    names = set(model.state_dict())
    for arguments, message in [
        ((torch.nn.Linear(2, 2),), "model: got Linear, takes a transformers model"),
        ((llama,), "model: got LlamaForCausalLM, takes a model with layers among OnlineScaledDeltaNet, Qwen3N"),
        ((model, {"Eta": 1}), "preconditioner: got unknown Eta, takes eta"),
        ((model, "apf"), "preconditioner: got 'apf', takes None, osdn.nn.PreconditionerOptions or a dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            osdn.precondition_model(*arguments)
    with pytest.raises(ValueError, match="train: got 'd0', takes one of"):
        osdn.precondition_model(model, train="d0")
    with pytest.raises(ValueError, match="train: got 'preconditioner', takes 'all' where neither d0 is learned"):
        osdn.precondition_model(model, {"learn_d_init": False}, train="preconditioner")
    layer = model.model.layers[2].linear_attn
    layer._hf_hook = object()
    with pytest.raises(ValueError, match=r"model: got model.layers.2.linear_attn dispatched by accelerate"):
        osdn.precondition_model(model)
    del layer._hf_hook
    layer.activation = "gelu"
    with pytest.raises(ValueError, match=r"model: got model.layers.2.linear_attn with hidden_act='gelu', takes 'silu'"):
        osdn.precondition_model(model)
    layer.activation = "silu"
    assert set(model.state_dict()) == names
    assert not hasattr(model.config, FIELD)
    osdn.precondition_model(model)
    with pytest.raises(ValueError, match="model: got a Qwen3_5ForCausalLM that has its preconditioner already"):
        osdn.precondition_model(model)


def test_another_model_of_the_same_config_is_left_alone():
    for model in (make_host("qwen3_5"), osdn.OSDNForCausalLM(osdn.OSDNConfig.preset("gdn-tiny", vocab_size=53))):
        other = type(model)(model.config)
        before = other.config.to_dict()
        osdn.precondition_model(model)
        assert other.config.to_dict() == before != model.config.to_dict()
        assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_what_is_no_preconditioned_checkpoint(tmp_path):
    make_host("qwen3_5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"path: got \S+, takes a model saved after osdn.precondition_model"):
        osdn.load_preconditioned(tmp_path)
    with pytest.raises(ValueError, match=r"config: got Qwen3_5TextConfig, takes none: the checkpoint's own is used"):
        osdn.load_preconditioned(tmp_path, config=transformers.AutoConfig.from_pretrained(tmp_path))


def test_the_box_of_a_beta_up_to_2():
    model = osdn.precondition_model(make_host("olmo_hybrid"))
    assert layers(model)[0].allow_neg_eigval
    assert layers(model)[0].preconditioner.d_max == 1.0
    assert layers(osdn.precondition_model(make_host("qwen3_5")))[0].preconditioner.d_max == 2.0
