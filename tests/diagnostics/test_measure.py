import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from osdn import OnlineScaledDeltaNet, OSDNConfig, OSDNForCausalLM
from osdn.diagnostics.measure import LEVELS, _Histogram, diagnose
from osdn.diagnostics.residual import observed

SIZE = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 6, "num_v_heads": 4}
B, T = 3, 40
PRESETS = ["deltanet", "beta2", "static", "forget-only", "osdn", "osdn-apf", "os-gdn", "os-kda"]


def a_model(preset):
    """Steps over all of (0, 1), d from U[0.2, 2], lambda that differs from token to token."""
    torch.manual_seed(0)
    model = OSDNForCausalLM(OSDNConfig.preset(f"{preset}-tiny", **SIZE)).double()
    for layer in model.model.layers:
        nn.init.normal_(layer.attn.b_proj.weight)
        if hasattr(layer.attn, "d0"):
            nn.init.uniform_(layer.attn.d0, 0.2, 2)
        if hasattr(layer.attn, "forget_proj"):
            nn.init.normal_(layer.attn.forget_proj.weight)
            nn.init.constant_(layer.attn.forget_proj.bias, 3.0)
    return model


def some_tokens(n=B, length=T):
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(1))


def whole(model, ids):
    """What every layer writes with, of one call on all tokens."""
    seen = []
    with observed(model, lambda _, writes: seen.append(writes)), torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize("preset", PRESETS)
def test_means_are_those_of_all_tokens(preset):
    model, ids = a_model(preset), some_tokens()
    by_layer = diagnose(model, {"task": ids}, chunk_size=T, batch_size=B)["tasks"]["task"]["layers"]
    for layer, w in zip(by_layer, whole(model, ids), strict=True):
        s = w.k.square()
        d = torch.ones_like(w.k) if w.d is None else w.d
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        assert order.tolist() != list(range(6))
        step = w.beta * (d * s).sum(-1)
        expected = {"ratio": (1 - step) ** 2, "step": step, "x": step / w.beta, "overshoot": (step > 1).double()}
        if w.d is not None:
            expected["ratio_d_one"] = (1 - w.beta * s.sum(-1)) ** 2
            expected["ratio_d_mean"] = (1 - w.beta * s.sum(-1) * d.mean(-1)) ** 2
            expected["ratio_d_permuted"] = (1 - w.beta * sum(d[..., j] * s[..., i] for i, j in enumerate(order))) ** 2
            expected["d"] = d.mean(-1)
            expected["at_min"] = (d <= w.rule.d_min).double().mean(-1)
            expected["at_max"] = (d >= w.rule.d_max).double().mean(-1)
        if w.forget is not None:
            expected["lambda"] = w.forget.exp()
        got = dict(layer["all"])
        assert got.pop("geometric") == pytest.approx(float(expected["ratio"].log().mean().exp()))
        assert got == {name: pytest.approx(float(y.mean()), abs=1e-12) for name, y in expected.items()}
        for name, y in expected.items():
            heads = [head[name] for head in layer["heads"]]
            assert heads == pytest.approx(y.mean((0, 1)).tolist(), abs=1e-12)
            bins = [torch.arange(T) * 32 // T == p for p in range(32)]
            positions = [point[name] for point in layer["positions"]]
            assert positions == pytest.approx([float(y[:, rows].mean()) for rows in bins], abs=1e-12)
        quantities = {"x": expected["x"], "step": step} | {n: d for n in ("d",) if w.d is not None}
        quantities |= {"lambda": expected["lambda"]} if w.forget is not None else {}
        assert layer["positions"][0]["quantiles"].keys() == quantities.keys()
        for name, y in quantities.items():
            for p in (0, 31):
                sample, levels = y[:, bins[p]].flatten(), torch.tensor(LEVELS).double()
                low, high = (torch.quantile(sample, levels, interpolation=which) for which in ("lower", "higher"))
                got = torch.tensor(layer["positions"][p]["quantiles"][name]).double()
                # Between two neighbours of the sample, give or take a cell: 1% of the value, for lambda of 1 - lambda.
                slack = 0.0101 * (1 - low if name == "lambda" else high) + 1e-5
                assert (low - slack <= got).all()
                assert (got <= high + slack).all()
    if preset in ("osdn", "osdn-apf", "os-gdn", "os-kda"):
        d = torch.stack([w.d for w in whole(model, ids)])
        assert (d[:, :, -1] - d[:, :, 0]).abs().mean() > 0.1


@pytest.mark.parametrize("preset", ["osdn-apf", "os-kda", "deltanet"])
@pytest.mark.parametrize("chunk_size", [1, 7, 39])
def test_chunks_change_nothing(preset, chunk_size):
    """At 1 every token but the first goes through the decode step; 39 leaves a last chunk of one."""
    model, tasks = a_model(preset), {"task": some_tokens()}
    at_once = diagnose(model, tasks, chunk_size=T)
    in_chunks = diagnose(model, tasks, chunk_size=chunk_size, batch_size=2)
    flat = [pytest.approx(x, rel=1e-9, abs=1e-12) for x in _numbers(at_once)]
    assert _numbers(in_chunks) == flat


def _numbers(x):
    if isinstance(x, dict | list):
        return [y for inside in (x.values() if isinstance(x, dict) else x) for y in _numbers(inside)]
    return [x] if isinstance(x, float) else []


def test_nothing_kept_grows_with_the_length(monkeypatch):
    from osdn.diagnostics import measure

    kept, sizes = [], []
    monkeypatch.setattr(measure._Layer, "summary", lambda layer: kept.append(layer) or {})
    model = a_model("osdn-apf")
    for length in (64, 512):
        calls = []
        with observed(model, lambda _, writes: calls.append(writes.k.shape[1])):  # noqa: B023
            diagnose(model, {"task": some_tokens(1, length)}, chunk_size=16)
        assert max(calls) == 16
        tensors = [*kept[-1].sums.values(), kept[-1].count, *(h.counts for h in kept[-1].histograms.values())]
        sizes.append(sum(x.numel() for x in tensors))
    assert sizes[0] == sizes[1]


def test_short_sequences_have_fewer_bins():
    layer = diagnose(a_model("osdn"), {"task": some_tokens(2, 5)})["tasks"]["task"]["layers"][0]
    assert len(layer["positions"]) == 5
    assert layer["all"]["ratio"] == pytest.approx(sum(p["ratio"] for p in layer["positions"]) / 5)


def test_quantiles_of_any_magnitude_and_sign():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(8, 500, 6, generator=generator).double() * 10 ** torch.linspace(-5, 4, 500)[:, None]
    bins = torch.arange(500) // 250
    histogram = _Histogram(2, 1e-3)
    for rows in y.split(3):
        histogram.add(rows, bins)
    for p in (0, 1):
        exact = torch.quantile(y[:, bins == p].flatten(), torch.tensor(LEVELS).double())
        torch.testing.assert_close(torch.tensor(histogram.quantiles(p)).double(), exact, rtol=0.02, atol=3e-5)


class Elsewhere(nn.Module):
    """A model of somebody else around the layer, whose blocks are of two kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.plain = OnlineScaledDeltaNet(16, 2, layer_idx=0, preconditioner=None)
        self.online = OnlineScaledDeltaNet(16, 2, layer_idx=1)
        self.config = OSDNConfig.preset("osdn-tiny", num_hidden_layers=2)

    def forward(self, input_ids, past_key_values, use_cache):
        cache = past_key_values or DynamicCache(config=self.config)
        x = self.embed(input_ids)
        for layer in (self.plain, self.online):
            x = x + layer(x, past_key_values=cache)
        return SimpleNamespace(past_key_values=cache if use_cache else None)


def test_models_from_elsewhere():
    torch.manual_seed(0)
    model = Elsewhere().train()
    layers = diagnose(model, {"task": some_tokens()}, chunk_size=16)["tasks"]["task"]["layers"]
    assert [layer["name"] for layer in layers] == ["plain", "online"]
    assert [layer["rule"].startswith("Preconditioner(eta=1.0") for layer in layers] == [False, True]
    assert ["d" in layer["all"] for layer in layers] == [False, True]
    assert model.training
    assert not model.online._write_hooks
    json.dumps(layers)


def test_a_model_that_fails_is_left_as_it_was():
    model = a_model("osdn").train()
    handle = model.model.layers[1].attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diagnose(model, {"task": some_tokens()})
    handle.remove()
    assert model.training
    assert not model.model.layers[0].attn._write_hooks


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 4), 11), r"tasks: got 'a' with tokens 11 to 11, takes those of a vocabulary of 11"),
        (torch.full((1, 4), -1), r"tasks: got 'a' with tokens -1 to -1"),
        (torch.zeros(0, 4, dtype=torch.long), r"tasks: got 'a' of torch.int64 \(0, 4\), takes integers \[n, T\]"),
        (torch.zeros(4, dtype=torch.long), r"tasks: got 'a' of torch.int64 \(4,\)"),
        (torch.zeros(1, 4), r"tasks: got 'a' of torch.float32"),
    ],
)
def test_refused_tasks(ids, message):
    with pytest.raises(ValueError, match=message):
        diagnose(a_model("osdn"), {"a": ids})


def test_other_refusals():
    with pytest.raises(ValueError, match=r"model: got Linear, takes a model with osdn\.OnlineScaledDeltaNet"):
        diagnose(nn.Linear(2, 2), {"a": some_tokens()})
    with pytest.raises(ValueError, match="chunk_size, batch_size: got 0, 4, takes ints >= 1"):
        diagnose(a_model("osdn"), {"a": some_tokens()}, chunk_size=0)
