"""The configuration: presets, parameter counts, JSON, refusals."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

import osdn

MIXERS = [
    *("deltanet", "osdn", "osdn-apf", "osdn-apf-paper", "static", "beta2", "forget-only", "gdn", "os-gdn"),
    *("os-gdn-paper", "kda", "os-kda", "os-kda-paper"),
]
SIZES = ["tiny", "340m", "1.3b"]


@pytest.mark.parametrize(
    ("size", "deltanet", "d_0", "apf"),
    [("340m", 374_362_112, 374_386_688, 374_583_488), ("1.3b", 1_365_677_056, 1_365_726_208, 1_366_513_024)],
)
def test_parameter_counts(size, deltanet, d_0, apf):
    counts = {"deltanet": deltanet, "osdn": deltanet, "beta2": deltanet, "static": d_0}
    counts |= {"osdn-apf": apf, "osdn-apf-paper": apf, "forget-only": apf}
    for mixer, count in counts.items():
        with torch.device("meta"):
            model = osdn.OSDNForCausalLM(osdn.OSDNConfig.preset(f"{mixer}-{size}"))
        assert sum(p.numel() for p in model.parameters()) == count, mixer
        assert model.config.intermediate_size == {"340m": 2816, "1.3b": 5632}[size]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_preset_runs_and_trains(mixer):
    torch.manual_seed(0)
    model = osdn.OSDNForCausalLM(osdn.OSDNConfig.preset(f"{mixer}-tiny"))
    x = torch.randint(0, 512, (2, 10))
    loss = model(x, labels=x).loss
    # Initial weights are small, so the first prediction is uniform over the vocabulary up to a tenth or two.
    assert abs(loss.item() - math.log(512)) < 0.5
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    for size in SIZES:
        assert osdn.OSDNConfig.preset(f"{mixer}-{size}").vocab_size == (512 if size == "tiny" else 32000)


def test_presets_are_the_table():
    def values(mixer, *keys):
        p = osdn.OSDNConfig.preset(f"{mixer}-340m").preconditioner
        return tuple(p[key] for key in keys)

    rule = ("feedback", "eta", "d_min", "d_max", "d_init", "learn_d_init", "forget")
    assert values("osdn", *rule) == ("beta_free", 1.0, 0.0, 2.0, 0.0, False, "none")
    assert values("osdn-apf", *rule) == ("beta_free", 1.0, 0.0, None, 1.0, True, "data_dependent")
    assert values("osdn-apf-paper", *rule) == ("beta_free", 1.0, 0.0, None, 0.0, True, "data_dependent")
    assert values("static", "eta", "d_init", "learn_d_init", "forget") == (0.0, 1.0, True, "none")
    assert values("forget-only", *rule) == ("beta_free", 0.0, 0.0, None, 1.0, True, "data_dependent")
    assert values("osdn-apf", "forget_bias", "normalize_step") == (6.9, False)
    for mixer in ("os-gdn", "os-kda"):
        assert values(mixer, *rule) == ("beta_aware", 1.0, 0.0, 2.0, 1.0, True, "none")
        assert values(f"{mixer}-paper", *rule) == ("beta_aware", 0.003, 2 / 3, 1.5, 1.0, True, "none")
    for mixer in MIXERS:
        config = osdn.OSDNConfig.preset(f"{mixer}-340m")
        gates = {"gdn": ("scalar", "silu"), "kda": ("channel", "sigmoid_lowrank")}
        kind = next((kind for kind in gates if kind in mixer), None)
        assert (config.state_decay, config.output_gate) == gates.get(kind, ("none", "none"))
        assert config.allow_neg_eigval == (mixer == "beta2")
        assert (config.preconditioner is None) == (mixer in ("deltanet", "beta2", "gdn", "kda"))
    assert osdn.OSDNConfig().preconditioner == osdn.OSDNConfig.preset("osdn-apf-340m").preconditioner


def test_overrides():
    config = osdn.OSDNConfig.preset("osdn-tiny", hidden_size=64, head_dim=None, preconditioner={"eta": 0.5})
    assert config.hidden_size == 64
    assert config.preconditioner["eta"] == 0.5
    assert config.preconditioner["d_max"] == 2.0
    assert osdn.OSDNConfig.preset("osdn-tiny", preconditioner=None).preconditioner is None
    with pytest.raises(ValueError, match=r"preset: got 'osdn-2b', takes <mixer>-<size> .*osdn-apf-paper.*340m"):
        osdn.OSDNConfig.preset("osdn-2b")
    with pytest.raises(ValueError, match=r"preset: got None, takes <mixer>-<size>"):
        osdn.OSDNConfig.preset(None)
    with pytest.raises(ValueError, match=r"hiden_size, layers: OSDNConfig has no such field, takes vocab_size"):
        osdn.OSDNConfig.preset("osdn-tiny", hiden_size=64, layers=2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_json_round_trip_is_strict_json(mixer, tmp_path):
    config = osdn.OSDNConfig.preset(f"{mixer}-tiny", eos_token_id=3)
    config.save_pretrained(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    saved = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert saved["preconditioner"] == config.preconditioner
    assert "__float__" not in json.dumps(saved)
    loaded = osdn.OSDNConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is osdn.OSDNConfig


def test_the_preconditioner_is_always_whole(tmp_path):
    config = osdn.OSDNConfig(preconditioner={"d_max": math.inf})
    assert config.preconditioner["d_max"] is None
    assert len(config.preconditioner) == 9
    config.preconditioner = {"eta": 0.5}
    assert config.preconditioner["forget_bias"] == 6.9
    config.save_pretrained(tmp_path)
    other = osdn.OSDNConfig.from_pretrained(tmp_path, preconditioner={"eta": 0.25})
    assert other.preconditioner["eta"] == 0.25
    assert other.preconditioner["feedback"] == "beta_free"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lower_bound": -5.0}, r"lower_bound: got -5.0, takes None"),
        ({"use_beta": False}, r"use_beta: got False, takes True"),
        ({"qk_norm": "sum"}, r"qk_norm: got sum, takes 'l2'"),
        ({"attn": {"layers": [1]}}, r"attn: got \{'layers': \[1\]\}, takes None"),
        ({"num_layers": 3}, r"num_layers: OSDNConfig has no such field, takes vocab_size, hidden_size"),
        ({"preconditioner": {"Eta": 1}}, r"preconditioner: got unknown Eta, takes eta, feedback, d_min"),
        ({"preconditioner": {"eta": -1}}, r"preconditioner.eta: got -1.0"),
        ({"preconditioner": "apf"}, r"preconditioner: got 'apf', takes None, osdn.nn.PreconditionerOptions or a dict"),
        ({"hidden_size": 0}, r"hidden_size: got 0, takes an integer >= 1"),
        ({"hidden_ratio": -1}, r"hidden_ratio: got -1"),
        ({"norm_eps": 0.0}, r"norm_eps: got 0.0"),
        ({"num_heads": 7}, r"head_dim: got None, takes an integer, since hidden_size 1024"),
        ({"num_v_heads": 12}, r"num_v_heads: got 12, takes a multiple of num_heads, 8"),
        ({"state_decay": "head"}, r"state_decay: got 'head', takes one of"),
        ({"output_gate": "gelu"}, r"output_gate: got 'gelu', takes one of"),
        ({"vocab_size": 3.5}, r"vocab_size: got 3.5, takes int$"),
        ({"norm_eps": True}, r"norm_eps: got True, takes float \| int$"),
        ({"allow_neg_eigval": 1}, r"allow_neg_eigval: got 1, takes bool$"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings: got 'yes', takes bool$"),
        ({"pad_token_id": "a"}, r"pad_token_id: got 'a', takes int \| None$"),
    ],
)
def test_refused_fields(kwargs, message):
    with pytest.raises(ValueError, match=message):
        osdn.OSDNConfig(**kwargs)


def test_fields_are_checked_on_assignment_too():
    class Derived(osdn.OSDNConfig):
        pass

    for config in (osdn.OSDNConfig(), Derived()):
        with pytest.raises(ValueError, match=r"vocab_size: got 'x', takes int$"):
            config.vocab_size = "x"


@pytest.mark.parametrize(("K", "V"), [(88, 120), (88, 200), (88, 240), (56, 232)])
def test_a_factor_whose_product_is_rounded(K, V):
    assert K * (V / K) != V
    config = osdn.OSDNConfig(hidden_size=8 * K, num_heads=8, num_hidden_layers=1, vocab_size=8, expand_v=V / K)
    with torch.device("meta"):
        model = osdn.OSDNForCausalLM(config)
    assert model.model.layers[0].attn.v_proj.out_features == 8 * V
    with pytest.raises(ValueError, match=f"expand_v: got .*, takes a factor that makes head_dim {K} a whole number"):
        osdn.OSDNConfig(hidden_size=8 * K, num_heads=8, expand_v=V / K * (1 + 1e-7))


def test_an_eps_may_be_an_int():
    config = osdn.OSDNConfig.preset("osdn-tiny", norm_eps=1)
    assert osdn.OSDNForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_neutral_foreign_fields_pass():
    config = osdn.OSDNConfig(lower_bound=None, use_beta=True, qk_norm="l2", attn=None)
    assert not hasattr(config, "qk_norm")


@pytest.mark.parametrize("mixer", ["deltanet", "osdn-apf", "os-kda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_the_cache_s(mixer, dtype):
    config = osdn.OSDNConfig.preset(f"{mixer}-tiny", num_v_heads=4, expand_v=0.5)
    model = osdn.OSDNForCausalLM(config).to(dtype).eval()
    cache = model(torch.zeros(3, 2, dtype=torch.long), use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.conv_states[0], *layer.recurrent_states.values())]
    assert 3 * config.state_bytes(dtype) == sum(t.nbytes for t in tensors if t is not None)


def test_import_registers_and_stays_light():
    script = """
import sys, osdn
assert "transformers.modeling_utils" not in sys.modules, "import osdn must not import transformers' models"
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("osdn", vocab_size=8, hidden_size=16, num_hidden_layers=1, num_heads=2)
assert type(AutoModel.from_config(config)) is osdn.OSDNModel
assert type(AutoModelForCausalLM.from_config(config)) is osdn.OSDNForCausalLM
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
