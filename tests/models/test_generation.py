"""Continuing from a cache, and `generate`: always what one pass without a cache gives."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import osdn
from osdn.models import OSDNCache
from osdn.models.configuration import CACHE, MIXERS
from osdn.ops.step import online_scaled_delta_step

NAMES = ["deltanet", "apf", "osdn", "os-gdn", "os-kda"]
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64; sums run in another order


def caches(config):
    return [OSDNCache(config), DynamicCache(config=config), StaticCache(config=config, max_cache_len=20)]


def in_pieces(model, x, lengths, cache, mask=None):
    out, seen = [], 0
    for piece in x.split(lengths, 1):
        seen += piece.shape[1]
        part_mask = None if mask is None else mask[:, :seen]
        out.append(model(piece, attention_mask=part_mask, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", NAMES)
def test_any_cache_continues_as_one_pass(name, make_model, tokens, assert_d_moved):
    model = make_model(name)
    whole = model(tokens, use_cache=False)
    assert whole.past_key_values is None
    with torch.no_grad():
        for cache in caches(model.config):
            torch.testing.assert_close(in_pieces(model, tokens, [3, 1, 1, 6, 2], cache), whole.logits, **EXACT)
            assert_d_moved(model, cache)


@pytest.mark.parametrize("name", MIXERS)
def test_every_preset_decodes_by_steps_as_in_one_pass(name, make_model, tokens, monkeypatch):
    model, steps = make_model(name, double=False), []

    def spy(*args, **kwargs):
        steps.append(args)
        return online_scaled_delta_step(*args, **kwargs)

    monkeypatch.setattr("osdn.nn.layer.online_scaled_delta_step", spy)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        pieces = in_pieces(model, tokens, [8, 1, 1, 1, 1, 1], OSDNCache(model.config))
    # float32; through both layers, whose sums run in another order.
    assert (pieces - whole).norm() / whole.norm() < 1e-5
    assert len(steps) == 5 * model.config.num_hidden_layers


def test_any_split_and_any_padding(make_model):
    models = {name: make_model(name) for name in NAMES}

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def check(data):
        model = models[data.draw(st.sampled_from(NAMES))]
        B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
        x = torch.randint(0, 53, (B, T), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
        cuts = sorted(data.draw(st.sets(st.integers(1, T - 1)))) if T > 1 else []
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, T])]
        mask = torch.tensor(
            data.draw(st.lists(st.lists(st.integers(0, 1), min_size=T, max_size=T), min_size=B, max_size=B))
        )
        with torch.no_grad():
            whole = model(x, attention_mask=mask, use_cache=False).logits
            pieces = in_pieces(model, x, lengths, OSDNCache(model.config), mask)
        torch.testing.assert_close(pieces, whole, **EXACT)

    check()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradients_through_a_cache(backend, make_model, tokens, monkeypatch):
    """The cache is overwritten in place, under what backends save for the backward pass, each in its own way."""
    monkeypatch.setenv("OSDN_BACKEND", backend)
    model = make_model("os-gdn")
    whole, pieces = model(tokens).logits, in_pieces(model, tokens, [5, 1, 7], OSDNCache(model.config))
    u = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad((whole * u).sum(), list(model.parameters())),
        torch.autograd.grad((pieces * u).sum(), list(model.parameters())),
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["apf", "osdn", "os-kda"])
def test_a_reset_cache_is_a_fresh_one(name, make_model, tokens):
    """`reset` zeroes d, which is no initial value of it."""
    model = make_model(name)
    with torch.no_grad():
        for cache in caches(model.config):
            first = in_pieces(model, tokens, [6, 7], cache)
            cache.reset()
            assert not isinstance(cache, OSDNCache) or cache.get_seq_length() == 0
            assert torch.equal(in_pieces(model, tokens, [6, 7], cache), first)


def test_a_copied_cache_is_a_snapshot(make_model, tokens):
    model, cache = make_model(), OSDNCache(make_model().config)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=cache)
        snapshot = copy.deepcopy(cache)
        first = model(tokens[:, 6:], past_key_values=cache).logits
        assert torch.equal(model(tokens[:, 6:], past_key_values=snapshot).logits, first)
    assert snapshot.get_seq_length() == 13


@pytest.mark.parametrize("name", NAMES)
def test_many_continuations_share_one_prefix(name, make_model, tokens, tmp_path, assert_d_moved):
    model, ends = make_model(name), torch.randint(0, 53, (6, 5), generator=torch.Generator().manual_seed(2))
    cache = OSDNCache(model.config)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=cache)
        assert_d_moved(model, cache)
        snapshot = cache.snapshot()
        save_file(snapshot, tmp_path / "prefix.safetensors")
        model(tokens[:, 6:], past_key_values=cache)  # leaves the snapshot as it is
        whole = model(torch.cat([tokens[:, :6].repeat_interleave(2, 0), ends], 1), use_cache=False).logits[:, 6:]
        for used in (cache, OSDNCache(model.config), cache):
            for source in (snapshot, load_file(tmp_path / "prefix.safetensors")):
                used.restore(source, copies=2)
                assert used.get_seq_length() == 6
                torch.testing.assert_close(model(ends, past_key_values=used).logits, whole, **EXACT)
    layers = range(model.config.num_hidden_layers)
    parts = ("conv", "S") if name == "deltanet" else ("conv", "S", "d")
    assert set(snapshot) == {"seen_tokens"} | {f"{i}.{part}" for i in layers for part in parts}
    K = model.config.head_dim
    assert snapshot["0.S"].shape[:3] == (3, model.config.num_v_heads or 2, K)


def test_a_snapshot_before_any_token(make_model, tokens):
    model, cache = make_model(), OSDNCache(make_model().config)
    empty = cache.snapshot()
    assert set(empty) == {"seen_tokens"}
    with torch.no_grad():
        first = model(tokens, past_key_values=cache).logits
        cache.restore(empty)
        assert torch.equal(model(tokens, past_key_values=cache).logits, first)
    cache.reset()  # leaves zeros where the states were
    assert set(cache.snapshot()) == {"seen_tokens"}


def test_a_cache_without_d_is_refused(make_model, tokens):
    model, cache = make_model("apf"), OSDNCache(make_model("apf").config)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=cache)
        cache.layers[1].recurrent_states[1] = None
        for piece in (tokens[:, 6:], tokens[:, 6:7]):
            with pytest.raises(ValueError, match="past_key_values: got a cache with S and without d, takes one that a"):
                model(piece, past_key_values=copy.deepcopy(cache))


def test_a_snapshot_under_gradients_is_cut_from_the_graph(make_model, tokens):
    cache = make_model("os-gdn")(tokens, use_cache=True).past_key_values
    assert not any(x.requires_grad for x in cache.snapshot().values())


@pytest.mark.parametrize("name", ["deltanet", "apf", "os-gdn"])
def test_beams_from_a_restored_prefix(name, make_model, tokens):
    """Beams reorder S, d and conv alike."""
    model, cache = make_model(name), OSDNCache(make_model(name).config)
    with torch.no_grad():
        model(tokens[:, :12], past_key_values=cache)
    snapshot = cache.snapshot()
    kwargs = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False}
    for _ in range(2):
        cache.restore(snapshot, copies=4)
        out = model.generate(tokens, **{CACHE: cache}, **kwargs)
        assert torch.equal(out, model.generate(tokens, use_cache=False, **kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_cache(name, make_model, tokens):
    model, cache = make_model(name), OSDNCache(make_model(name).config)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        ends = tokens[[2, 2, 0, 0], 6:].flip(1)
        whole = model(torch.cat([tokens[[2, 2, 0, 0], :6], ends], 1), use_cache=False).logits[:, 6:]
        torch.testing.assert_close(model(ends, past_key_values=cache).logits, whole, **EXACT)
    with pytest.raises(ValueError, match="crop: S and d cannot be rolled back; take a snapshot"):
        cache.crop(3)


def test_padding_at_the_right_is_refused(make_model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="attention_mask: got padding in the last column, takes a token there"):
        make_model().generate(tokens, attention_mask=mask, max_new_tokens=2)


def test_a_cache_of_a_layer_alone_goes_back():
    """Its config says how many layers, and need not say of which size."""
    torch.manual_seed(0)
    layer = osdn.OnlineScaledDeltaNet(24, 3, layer_idx=0)
    x, cache = torch.randn(2, 9, 24), OSDNCache(osdn.OSDNConfig(num_hidden_layers=1))
    layer(x[:, :5], past_key_values=cache)
    snapshot, first = cache.snapshot(), layer(x[:, 5:], past_key_values=cache)
    cache.restore(snapshot)
    assert torch.equal(layer(x[:, 5:], past_key_values=cache), first)


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize(
    ("name", "change", "got"),
    [
        ("1.conv", lambda x: x[:, 1:], r"conv torch.float64 \(3, 71, 4\), takes \(3, 72, 4\)"),
        ("0.S", lambda x: x.mT[..., 1:], r"S torch.float64 \(3, 2, 12, 11\), takes torch.float64 \(3, 2, 12, 12\)"),
        ("0.d", torch.Tensor.float, r"d torch.float32 \(3, 2, 12\), takes torch.float64"),
        ("1.S", lambda x: x[:2], r"S torch.float64 \(2, 2, 12, 12\)"),
    ],
)
def test_states_of_other_shapes(name, change, got, T, make_model, tokens):
    model = make_model()
    cache = model(tokens, use_cache=True).past_key_values
    snapshot = cache.snapshot()
    snapshot[name] = change(snapshot[name])
    cache.restore(snapshot)
    with torch.no_grad(), pytest.raises(ValueError, match=f"past_key_values: got {got}"):
        model(tokens[:, :T], past_key_values=cache)


@pytest.mark.parametrize("change", ["layers", "count", "part", "d", "name"])
def test_snapshots_that_do_not_fit(change, make_model, tokens):
    model = make_model(num_hidden_layers=3 if change == "layers" else 2)
    cache = OSDNCache(make_model().config)
    snapshot = model(tokens, use_cache=True).past_key_values.snapshot()
    if lost := {"count": "seen_tokens", "part": "1.S", "d": "1.d"}.get(change):
        del snapshot[lost]
    if change == "name":
        snapshot["x"] = tokens
    with pytest.raises(ValueError, match=r"snapshot: got keys 0.S, .*, takes a snapshot of 2 layers"):
        cache.restore(snapshot)
    for copies in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"copies: got {copies}, takes an integer >= 1"):
            cache.restore(cache.snapshot(), copies=copies)


def greedy_without_cache(model, x, steps, mask=None):
    mask = torch.ones_like(x) if mask is None else mask
    with torch.no_grad():
        for _ in range(steps):
            nxt = model(x, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            x, mask = torch.cat([x, nxt], 1), torch.cat([mask, torch.ones_like(nxt)], 1)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name, make_model, tokens, assert_d_moved):
    model = make_model(name)
    out = model.generate(tokens, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy_without_cache(model, tokens, 8))
    assert isinstance(out.past_key_values, OSDNCache)
    assert_d_moved(model, out.past_key_values)
    assert len(out.sequences[:, 13:].unique()) > 3  # a constant continuation would prove little


@pytest.mark.parametrize(
    "kwargs", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]
)
def test_greedy_by_other_ways(kwargs, make_model, tokens):
    model = make_model("os-gdn")
    out = model.generate(tokens, max_new_tokens=6, do_sample=False, **kwargs)
    assert torch.equal(out, greedy_without_cache(model, tokens, 6))


@pytest.mark.parametrize("kwargs", [{}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("name", ["deltanet", "apf", "os-kda"])
def test_left_padded_batch_is_its_rows(name, kwargs, make_model, tokens):
    model, mask = make_model(name), torch.ones_like(tokens)
    mask[0, :5] = mask[2, :11] = 0
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0, **kwargs)
    for row, keep in enumerate(mask.bool()):
        alone = model.generate(tokens[row, keep][None], max_new_tokens=7, do_sample=False)
        assert torch.equal(batch[row, 13:], alone[0, -7:])


@pytest.mark.parametrize("name", ["deltanet", "apf", "os-gdn"])
@pytest.mark.parametrize("padded", [False, True])
def test_beams_and_samples_are_those_without_a_cache(name, padded, make_model, tokens):
    model, mask = make_model(name), torch.ones_like(tokens)
    mask[1, :4] = 1 - padded
    common = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    for kwargs in ({"num_beams": 4, "num_return_sequences": 2, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        sequences = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            sequences.append(model.generate(tokens, use_cache=use_cache, **common, **kwargs))
        assert torch.equal(*sequences)


def test_generation_continues_from_a_cache(make_model, tokens):
    model, cache = make_model(), OSDNCache(make_model().config)
    expected = greedy_without_cache(model, tokens, 9)
    first = model.generate(tokens, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    assert cache.get_seq_length() == 16
    assert torch.equal(model.generate(first, **{CACHE: cache}, max_new_tokens=5, do_sample=False), expected)


def test_a_cache_has_two_names(make_model, tokens):
    """transformers' before 5.24 and since; with the installed one, either way and in outputs."""
    model = make_model()
    with torch.no_grad():
        cache, kept = (model(tokens[:, :6], use_cache=True).past_key_values for _ in range(2))
    old, new = model(tokens[:, 6:], past_key_values=cache), model(tokens[:, 6:], cache=kept)
    assert torch.equal(new.logits, old.logits)
    assert (old[CACHE], new[CACHE]) == (cache, kept)
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"^past_key_values, cache: got both, takes one of the two$"):
            part(tokens, past_key_values=cache, cache=kept)
    assert not any(cache.is_linear)  # or `generate` reads from the beginning on again


def test_generation_fills_the_caller_s_own_cache(make_model, tokens):
    model = make_model()
    expected = greedy_without_cache(model, tokens, 4)
    for cache in caches(model.config):
        assert torch.equal(model.generate(tokens, **{CACHE: cache}, max_new_tokens=4, do_sample=False), expected)
        assert cache.has_previous_state(0, 0)
    with pytest.raises(ValueError, match=rf"{CACHE}: got a filled StaticCache, whose length is unknown"):
        model.generate(expected, **{CACHE: cache}, max_new_tokens=2)


def test_generation_from_embeddings(make_model, tokens):
    model = make_model()
    embeddings = model.model.embeddings(tokens)
    out = model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, greedy_without_cache(model, tokens, 5)[:, 13:])


def test_assisted_decoding_is_refused(make_model, tokens):
    model, row = make_model(double=False), tokens[:1]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models, such as OSDN"):
        model.generate(row, assistant_model=make_model(double=False), max_new_tokens=4)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models, such as OSDN"):
        model.generate(row, prompt_lookup_num_tokens=2, max_new_tokens=4)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=53, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="assistant_model: got OSDNForCausalLM, takes a model whose state can be"):
        llama.generate(row, assistant_model=model, max_new_tokens=4)
    for cache in caches(model.config):
        cache.activate_past_recording()
        with pytest.raises(ValueError, match="past_key_values: got a cache that records the past"):
            model(row, past_key_values=cache)


def test_caches_that_do_not_fit(make_model, tokens):
    model = make_model()
    with pytest.raises(ValueError, match="past_key_values: got DynamicCache whose layer 0 is missing"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values: got tuple whose layer 0 is missing"):
        model(tokens, past_key_values=())
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: got a cache of 3 sequences, takes one of 1"):
        model(tokens[:1], past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="past_key_values: got a cache of 3 sequences, takes one of 1"):
        model(tokens[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation: got 'quantized', takes None"):
        model.generate(tokens, cache_implementation="quantized", max_new_tokens=2)
