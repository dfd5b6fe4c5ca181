"""The model as transformers uses it: names, loss, packing, padding, initial values, loading, checkpointing."""

import json
import math

import accelerate
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import osdn
from osdn.models.configuration import CACHE

LAYER = [
    *("attn_norm.weight", "mlp_norm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    *(f"attn.{x}_proj.weight" for x in "qkvbo"),
    *(f"attn.{x}_conv1d.weight" for x in "qkv"),
    "attn.o_norm.weight",
]
EXTRA = {
    "deltanet": [],
    "gdn": ["attn.a_proj.weight", "attn.A_log", "attn.dt_bias", "attn.g_proj.weight"],
    "kda": [
        *("attn.f_proj.0.weight", "attn.f_proj.1.weight", "attn.A_log", "attn.dt_bias"),
        *("attn.g_proj.0.weight", "attn.g_proj.1.weight", "attn.g_proj.1.bias"),
    ],
    "osdn": [],
    "static": ["attn.d0"],
    "osdn-apf": ["attn.d0", "attn.forget_proj.weight", "attn.forget_proj.bias"],
}


@pytest.mark.parametrize("mixer", EXTRA)
def test_names_are_flash_linear_attention_s(mixer):
    with torch.device("meta"):
        model = osdn.OSDNForCausalLM(osdn.OSDNConfig.preset(f"{mixer}-tiny"))
    names = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"model.layers.{i}.{name}" for i in range(2) for name in LAYER + EXTRA[mixer]}
    assert set(model.state_dict()) == names
    shapes = {name.split("attn.")[-1]: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["q_conv1d.weight"] == (128, 1, 4)
    assert shapes["o_norm.weight"] == (64,)
    if mixer in ("gdn", "kda"):
        assert shapes["A_log"] == (2,)
        assert shapes["dt_bias"] == ((2,) if mixer == "gdn" else (128,))
    if mixer == "kda":
        assert shapes["f_proj.0.weight"] == (64, 128)
    if mixer == "osdn-apf":
        assert shapes["d0"] == (2, 64)


# Packing and padding. Sums run in another order, so float64 agrees to about 1e-12 here, not bitwise.

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def gradients(model, loss, *inputs):
    used = [p for name, p in model.named_parameters() if not inputs or "embeddings" not in name]
    return torch.autograd.grad(loss, [*inputs, *used])


@pytest.mark.parametrize("name", ["deltanet", "apf", "osdn", "os-gdn", "os-kda"])
@pytest.mark.parametrize("how", ["cu_seq_lens_q", "position_ids", "seq_idx"])
def test_packed_is_looped(name, how, make_model, assert_d_moved):
    model, lengths = make_model(name), [4, 1, 7, 2]
    x = torch.randn(1, sum(lengths), 24, dtype=torch.float64, requires_grad=True)
    if how == "cu_seq_lens_q":
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        kwargs = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}
    elif how == "position_ids":
        kwargs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    else:
        kwargs = {"seq_idx": torch.arange(4).repeat_interleave(torch.tensor(lengths))[None].int()}
    packed = model(inputs_embeds=x, **kwargs)
    assert packed.past_key_values is None  # use_cache is True by default, but no cache can hold these
    looped = [model(inputs_embeds=part) for part in x.split(lengths, 1)]
    assert_d_moved(model, looped[2].past_key_values)
    looped = torch.cat([y.logits for y in looped], 1)
    torch.testing.assert_close(packed.logits, looped, **EXACT)
    u = torch.randn_like(looped)
    for a, b in zip(gradients(model, (packed.logits * u).sum(), x), gradients(model, (looped * u).sum(), x)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_packed_rows_by_position_ids(make_model):
    model, x = make_model("os-gdn"), torch.randn(2, 9, 24, dtype=torch.float64)
    rows = [[4, 5], [2, 6, 1]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    mask = torch.ones(2, 9)
    mask[0, 8] = mask[1, 5] = 0  # a hole in a sequence and a padded end
    y = model(inputs_embeds=x, position_ids=positions, attention_mask=mask).logits
    for row, lengths in enumerate(rows):
        for part, keep, out in zip(x[row].split(lengths), mask[row].bool().split(lengths), y[row].split(lengths)):
            torch.testing.assert_close(out[keep], model(inputs_embeds=part[keep][None]).logits[0], **EXACT)


@pytest.mark.parametrize("name", ["deltanet", "apf", "os-gdn", "os-kda"])
def test_padding_changes_nothing(name, make_model):
    model = make_model(name)
    x = torch.randn(5, 8, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1, 1], [1] * 8, [0] * 8]
    )
    out = model(inputs_embeds=x, attention_mask=mask, output_hidden_states=True)
    for row, keep in enumerate(mask.bool()):
        if keep.any():
            alone = model(inputs_embeds=x[row, keep][None], output_hidden_states=True)
            torch.testing.assert_close(out.logits[row, keep], alone.logits[0], **EXACT)
            for a, b in zip(out.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(a[row, keep], b[0], **EXACT)
        assert (out.logits[row, ~keep] == 0).all()
    u = torch.randn_like(out.logits)  # also at the padding: nothing may come back from there
    gradient = torch.autograd.grad((out.logits * u).sum(), x)[0]
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[mask == 1] != 0).any(-1).all()


def test_only_padding(make_model):
    model = make_model()
    out = model(torch.zeros(2, 3, dtype=torch.long), attention_mask=torch.zeros(2, 3))
    assert (out.logits == 0).all()


def test_masks_of_ones_and_running_positions_are_the_dense_path(make_model, tokens):
    model, T = make_model(), tokens.shape[1]
    plain = model(tokens).logits
    masked = model(tokens, attention_mask=torch.ones(3, T + 2), position_ids=torch.arange(T)[None] + 5).logits
    assert torch.equal(plain, masked)


# Outputs and loss.


def test_hidden_states_and_tuples(make_model, tokens):
    model = make_model()
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, rtol=0, atol=0)
    assert torch.equal(out.hidden_states[0], model.model.embeddings(tokens))
    assert torch.equal(model(tokens, return_dict=False)[0], out.logits)
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == 3


def test_logits_to_keep(make_model, tokens):
    model = make_model()
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:], **EXACT)
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]], **EXACT)
    with pytest.raises(ValueError, match="logits_to_keep: got None, takes an int or a tensor"):
        model(tokens, logits_to_keep=None)


def test_loss(make_model, tokens):
    model = make_model()
    labels = tokens.clone()
    labels[0, :6] = -100
    logits, count = model(tokens).logits.float(), (labels[:, 1:] != -100).sum()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels=labels).loss, losses / count)
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=torch.tensor(7)).loss, losses / 7)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(tokens, shift_labels=shifted).loss, losses / count)


def test_micro_batches_sum_to_the_batch(make_model, tokens):
    model, items = make_model(), torch.tensor(3 * 12)
    whole = gradients(model, model(tokens, labels=tokens).loss)
    parts = [gradients(model, model(t[None], labels=t[None], num_items_in_batch=items).loss) for t in tokens]
    for a, *b in zip(whole, *parts):
        # The loss is taken in float32.
        torch.testing.assert_close(a, sum(b), rtol=1e-4, atol=1e-6)


def test_tied_embeddings(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True, double=False)
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = osdn.OSDNForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.get_input_embeddings() is loaded.model.embeddings


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, padded, make_model, tokens):
    model = make_model("os-gdn").train()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 1 - padded
    plain = gradients(model, model(tokens, attention_mask=mask, labels=tokens).loss)
    # transformers is renaming it, and warns under the old name.
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    out = model(tokens, attention_mask=mask, labels=tokens, use_cache=True)
    assert out.past_key_values is None
    out.loss.backward()
    for a, p in zip(plain, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)
    with pytest.raises(ValueError, match=f"{CACHE}: got a cache, takes None with gradient checkpointing"):
        model(tokens, past_key_values=osdn.models.OSDNCache(model.config))


# Initial values and loading.

SPECIAL = {"preconditioner": {"d_init": 0.7}, "vocab_size": 64}


def config_of(decay="scalar", **kwargs):
    return osdn.OSDNConfig.preset("osdn-apf-tiny", state_decay=decay, **{**SPECIAL, **kwargs})


def assert_initial_values(model):
    for name, p in model.named_parameters():
        value = p.detach().float()
        if name.endswith("A_log"):
            assert ((value.exp() > 0) & (value.exp() < 16.1)).all(), name
            assert value.unique().numel() > 1, name
        elif name.endswith("dt_bias"):
            dt = F.softplus(value)
            # bf16 has 8 bits, and dt_bias = log(dt) reaches -7: dt is off by up to 7 / 256.
            assert ((dt > 0.96e-3) & (dt < 0.104)).all(), name
        elif name.endswith("d0"):
            assert (p == torch.tensor(0.7, dtype=p.dtype)).all(), name
        elif name.endswith("forget_proj.bias"):
            assert (p == torch.tensor(6.9, dtype=p.dtype)).all(), name
        elif name.endswith("forget_proj.weight"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            # 3 standard errors of a standard deviation over the smallest matrix here, of 256 entries
            assert abs(value.std() / 0.02 - 1) < 0.15, name


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("path", ["construct", "from_config", "bf16", "meta", "meta-auto"])
def test_initial_values_survive(path, decay):
    torch.manual_seed(0)
    config = config_of(decay)
    if path == "construct":
        model = osdn.OSDNForCausalLM(config)
    elif path == "from_config":
        model = AutoModelForCausalLM.from_config(config)
    elif path == "bf16":
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert model.model.layers[0].attn.d0.dtype == torch.bfloat16
    else:
        with torch.device("meta"):
            model = osdn.OSDNForCausalLM(config) if path == "meta" else AutoModelForCausalLM.from_config(config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)  # what to_empty leaves may look initialised by chance
        model.init_weights() if path == "meta" else model.initialize_weights()
    assert_initial_values(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_missing_from_a_checkpoint_are_initialised(dtype, tmp_path):
    osdn.OSDNForCausalLM(config_of(initializer_range=0.5)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    ours = ("d0", "forget_proj", "A_log", "dt_bias", "a_proj")
    kept = {name: p for name, p in load_file(file).items() if not any(key in name for key in ours)}
    save_file(kept, file, metadata={"format": "pt"})
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "initializer_range": 0.02}))
    model, info = osdn.OSDNForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert len(info["missing_keys"]) == 12
    for name, p in kept.items():
        assert torch.equal(model.get_parameter(name), p.to(dtype)), name
        if "norm" not in name:
            with torch.no_grad():
                model.get_parameter(name).mul_(0.02 / 0.5)  # so that the check below sees the new ones alone
    assert_initial_values(model)


@pytest.mark.parametrize("missing", ["d0", "forget_proj.bias", "forget_proj.weight", "A_log", "dt_bias"])
def test_initialising_one_key_leaves_its_neighbours_as_loaded(missing, tmp_path):
    model = osdn.OSDNForCausalLM(config_of())
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-1, -0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: p for k, p in load_file(file).items() if missing not in k}, file, metadata={"format": "pt"})
    loaded = osdn.OSDNForCausalLM.from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        if missing in name:
            assert (loaded.get_parameter(name) > -0.5).all() or missing == "dt_bias"
            assert not torch.equal(loaded.get_parameter(name), p), name
        else:
            assert torch.equal(loaded.get_parameter(name), p), name


@pytest.mark.parametrize("name", ["deltanet", "apf", "os-gdn", "os-kda"])
def test_save_and_load_bitwise(name, make_model, tokens, tmp_path):
    model = make_model(name, double=False)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is osdn.OSDNForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, p in model.state_dict().items():
        assert torch.equal(p, loaded.state_dict()[key]), key
    assert torch.equal(model(tokens).logits, loaded.eval()(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


# Precision and compilation.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["apf", "os-kda"])
def test_bf16_runs_and_keeps_states_in_float32(name, autocast, make_model, tokens, assert_d_moved):
    model = make_model(name, double=False)
    exact = model(tokens).logits
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens, labels=tokens, use_cache=True)
    else:
        out = model.to(torch.bfloat16)(tokens, labels=tokens, use_cache=True)
    for layer in out.past_key_values.layers:
        assert layer.conv_states[0].dtype == torch.bfloat16
        assert layer.recurrent_states[0].dtype == layer.recurrent_states[1].dtype == torch.float32
    assert_d_moved(model, out.past_key_values)
    # 8 bits a rounding, two layers of a recurrence with weights far larger than a trained model's.
    assert (out.logits - exact).norm() / exact.norm() < 0.1
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_dynamo_finds_no_break_in_the_model(make_model, tokens, monkeypatch):
    """The operator aside, which has its own tests: it is put in the graph as it stands."""
    model = make_model("os-gdn", double=False)
    monkeypatch.setattr("osdn.nn.layer.online_scaled_delta_rule", lambda *qkv, **_: (qkv[2] * qkv[3][..., None], None))
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deltanet", "apf", "os-gdn", "os-kda"])
def test_weights_that_accelerate_keeps_elsewhere(name, make_model, tokens):
    model = make_model(name, double=False)

    def found():
        with torch.no_grad():
            generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
            return model(tokens).logits, generated

    expected = found()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].attn.q_conv1d.weight.is_meta
    assert all(map(torch.equal, found(), expected))


# Refusals.


def test_refused_calls(make_model, tokens):
    model = make_model()
    with pytest.raises(ValueError, match=r"attention_msk, tokens: unknown, forward takes .*cu_seq_lens_q"):
        model(tokens, attention_msk=None, tokens=3)
    with pytest.raises(ValueError, match=r"output_attentions: got True, takes False"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match=r"is_causal: got False"):
        model(tokens, is_causal=False)
    with pytest.raises(ValueError, match=r"output_hidden_states: got \[1\]"):
        model(tokens, output_hidden_states=[1])
    with pytest.raises(ValueError, match=r"input_ids, inputs_embeds: got both"):
        model(tokens, inputs_embeds=model.model.embeddings(tokens))
    with pytest.raises(ValueError, match=r"input_ids, inputs_embeds: got neither"):
        model()
    with pytest.raises(ValueError, match=r"got 3 x 0 tokens"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match=r"got 0 x 13 tokens"):
        model(tokens[:0])
    with pytest.raises(ValueError, match=r"input_ids: got torch.int64 \(13,\), takes an integer torch.Tensor \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"input_ids: got torch.float32 \(3, 13\)"):
        model(tokens.float())
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=rf"^{name}: got \(3, 12\), takes shape \(3, 13\)"):
            model(tokens, **{name: tokens[:, 1:]})
    with pytest.raises(ValueError, match=r"input_ids: got list"):
        model(tokens.tolist())
    with pytest.raises(ValueError, match=r"inputs_embeds: got \(3, 13, 5\), takes \[B, T, \d+\]"):
        model(inputs_embeds=torch.zeros(3, 13, 5))
    with pytest.raises(ValueError, match=r"attention_mask: got \(3, 12\), takes shape \[3, >= 13\]"):
        model(tokens, attention_mask=torch.ones(3, 12))
    with pytest.raises(ValueError, match=r"position_ids: got \(3, 3, 13\)"):
        model(tokens, position_ids=torch.zeros(3, 3, 13))


def test_refused_packing(make_model, tokens):
    model, row = make_model(), tokens[:1]
    cu, restart = torch.tensor([0, 5, 13]), torch.tensor([[*range(5), *range(8)]])
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: got B = 3, takes a packed batch, B = 1"):
        model(tokens, cu_seq_lens_q=cu)
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 5, 12\]"):
        model(row, cu_seq_lens_q=torch.tensor([0, 5, 12]))
    mask = torch.ones(1, 13)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"attention_mask: got zeros beside cu_seq_lens_q"):
        model(row, cu_seq_lens_q=cu, attention_mask=mask)
    for begins in (restart, torch.tensor([[0, *range(12)]])):  # the second with a sequence of one token
        with pytest.raises(ValueError, match=r"position_ids: got a sequence that begins where none of cu_seq_lens_q"):
            model(row, cu_seq_lens_q=cu[[0, 2]], position_ids=begins)
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[0, 5\]"):
        model(row, cu_seq_lens_q=cu[:2], position_ids=restart)
    padded = torch.tensor([[*range(5), *[0] * 8]])
    for known in (restart, torch.arange(13)[None], padded, 0 * restart):  # also of a whole that is cut up, of padding
        assert torch.equal(model(row, cu_seq_lens_q=cu, position_ids=known)[0], model(row, cu_seq_lens_q=cu)[0])
    cache = model(row, use_cache=True).past_key_values
    for kwargs in ({"cu_seq_lens_q": cu}, {"position_ids": restart}):
        with pytest.raises(ValueError, match=rf"{CACHE}: got a cache, takes None with packed sequences"):
            model(row, past_key_values=cache, **kwargs)


@torch.no_grad()
def test_a_sequence_that_begins_beside_the_cache_of_another(make_model, tokens):
    model, goes_on = make_model(), torch.arange(5, 13)[None]
    cache = model(tokens[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids: got a sequence that begins beside the"):
        model(tokens[:, 5:], past_key_values=cache, position_ids=torch.arange(8)[None])
    whole = model(tokens).logits[:, 5:]
    found = model(tokens[:, 5:], past_key_values=cache, position_ids=goes_on).logits
    torch.testing.assert_close(found, whole, **EXACT)
    with pytest.raises(ValueError, match="past_key_values: got tuple whose layer 0 is missing"):
        model(tokens, past_key_values=(), position_ids=goes_on.new_zeros(1, 1) + torch.arange(13))
    # Positions of padding do not count.
    mask = torch.ones_like(tokens)
    mask[0, 5:7] = 0
    positions = torch.arange(13).expand(3, 13) * mask
    cache = model(tokens[:, :5], use_cache=True).past_key_values
    found = model(tokens[:, 5:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 5:]).logits
    whole = model(tokens, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(found[mask[:, 5:] == 1], whole[mask[:, 5:] == 1], **EXACT)
    # A row that was padding until now has no sequence before it.
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(tokens[:, :5], use_cache=True, attention_mask=mask[:, :5]).past_key_values
    found = model(tokens[:, 5:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 5:]).logits
    whole = model(tokens, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(found[mask[:, 5:] == 1], whole[mask[:, 5:] == 1], **EXACT)


def test_a_trainer_of_the_users_own_evaluates(make_model, tokens, tmp_path):
    """Trainer takes every argument of forward that is named like labels for one that its data must have."""
    model = make_model(double=False)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True, per_device_eval_batch_size=3)
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()
    assert found["eval_loss"] == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)
