"""Conversion: the same function as the source, measured where it is another, refused where it cannot be."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import osdn
from osdn.cli import main
from osdn.convert.checkpoint import convert
from osdn.convert.fla import translate
from osdn.models.checkpoint import load_model
from osdn.runs import RunError

X = torch.randint(257, (2, 75), generator=torch.Generator().manual_seed(1))  # more than a chunk
KINDS = ["delta_net", "gated_deltanet", "kda"]


def logits(model):
    with torch.no_grad():
        return model(X, use_cache=False).logits.float()


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def measured(report):
    return float(re.search(r"differ by (\S+) of their norm", report)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_function_as_another_implementation(kind, make_fla, tmp_path):
    other, source = make_fla(kind)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    expected = logits(other)
    # float32 in both. With feedback, d drifts from 1 by what the norm's eps leaves keys short of unit length.
    for options, bound in (({"eta": 0.0}, 2e-5), ({}, 2e-4)):
        out = tmp_path / f"out-{len(options)}"
        report = convert(source, out, options)
        model = load_model(out)
        assert type(model) is osdn.OSDNForCausalLM
        assert model.config.preconditioner["d_init"] == 1.0
        assert difference(logits(model), expected) < bound
        assert measured(report) < bound
        assert "1,024 random tokens" in report
        d0 = model.model.layers[0].attn.d0
        assert (d0 == 1).all()
        assert f"{2 * d0.numel():,} new" in report
    aware = convert(source, tmp_path / "aware", {"feedback": "beta_aware"})
    change = difference(logits(load_model(tmp_path / "aware")), expected)
    assert change > 0.01
    assert change / 3 < measured(aware) < change * 3  # other tokens
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in (tmp_path / "aware").iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert (tmp_path / "aware").stat().st_mode == source.stat().st_mode
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_kept_to_the_bit(kind, make_fla, tmp_path):
    _, source = make_fla(kind, torch.bfloat16, torch_dtype="bfloat16")
    convert(source, tmp_path / "out", {"forget": "data_dependent"})
    given = {k: x for path in source.glob("*.safetensors") for k, x in load_file(path).items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert given.keys() < written.keys()
    assert all(torch.equal(x, written[name]) for name, x in given.items())
    assert {x.dtype for x in written.values()} == {torch.bfloat16}
    assert {k.split("attn.")[1] for k in written.keys() - given.keys()} == {
        "d0",
        "forget_proj.weight",
        "forget_proj.bias",
    }
    assert (written["model.layers.1.attn.forget_proj.weight"] == 0).all()
    assert torch.allclose(written["model.layers.1.attn.forget_proj.bias"].float(), torch.tensor(6.9), atol=0.02)  # bf16


def fine_decays(path):
    """In a bf16 checkpoint's file, decays that bf16 has not; returns their values in order."""
    tensors = load_file(path)
    fine = {k: x.float() + 1e-3 for k, x in tensors.items() if k.endswith(("A_log", "dt_bias"))}
    save_file(tensors | fine, path, metadata={"format": "pt"})
    return [x for _, x in sorted(fine.items())]


def test_decays_stay_in_float32_where_all_else_is_bf16(make_fla, tmp_path):
    _, source = make_fla("gated_deltanet", torch.bfloat16, torch_dtype="bfloat16")
    for path in source.glob("*.safetensors"):
        fine_decays(path)
    convert(source, tmp_path / "out", {})
    given = {k: x for path in source.glob("*.safetensors") for k, x in load_file(path).items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in given.values()} == {torch.float32, torch.bfloat16}
    assert all(x.dtype == written[name].dtype and torch.equal(x, written[name]) for name, x in given.items())


@pytest.mark.parametrize("pickled", [False, True])
def test_decays_of_a_hybrid_by_whatever_names(pickled, make_fla, tmp_path):
    """Kimi-Linear's decays have other names in its files than in transformers' model."""
    model, _ = make_fla("kda")
    model.bfloat16().save_pretrained(tmp_path / "kimi")
    file = tmp_path / "kimi" / "model.safetensors"
    fine = fine_decays(file)
    assert len(fine) == 4  # two layers
    if pickled:
        torch.save(load_file(file), tmp_path / "kimi" / "pytorch_model.bin")
        file.unlink()
    convert(tmp_path / "kimi", tmp_path / "out", {})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(map(torch.equal, fine, [x for k, x in sorted(tensors.items()) if k.endswith(("A_log", "dt_bias"))]))


def test_weights_that_are_not_numbers(make_fla, tmp_path):
    _, source = make_fla("kda")
    weights_changed(source, lambda tensors: next(x for k, x in tensors.items() if "q_proj" in k).fill_(math.nan))
    with pytest.raises(ValueError, match=r"source: got \S+kda, whose model\S+q_proj.weight is not finite"):
        convert(source, tmp_path / "out", {})


@pytest.mark.parametrize(
    ("kind", "changed", "expected"),
    [
        ("delta_net", {}, {"head_dim": 8, "expand_v": 1.5, "output_gate": "none", "state_decay": "none"}),
        ("delta_net", {"use_gate": True}, {"output_gate": "silu"}),
        ("delta_net", {"allow_neg_eigval": True}, {"allow_neg_eigval": True}),
        ("delta_net", {"intermediate_size": None}, {"intermediate_size": 256}),
        ("delta_net", {"intermediate_size": None, "hidden_ratio": 24}, {"intermediate_size": 512}),
        ("delta_net", {"intermediate_size": None, "hidden_ratio": 13.5}, {"intermediate_size": 512}),
        (
            "delta_net",
            {"hidden_ratio": None, "intermediate_size": None, "hidden_size": 320},
            {"intermediate_size": 1024},
        ),
        ("gated_deltanet", {}, {"num_v_heads": 4, "expand_v": 1.5, "output_gate": "silu", "state_decay": "scalar"}),
        ("gated_deltanet", {"use_gate": False}, {"output_gate": "none"}),
        # 55 * 7 * 2 / 3 = 256.67 is cut to an integer first
        (
            "gated_deltanet",
            {"hidden_size": 55, "hidden_ratio": 7, "intermediate_size": None},
            {"intermediate_size": 256, "hidden_size": 55},
        ),
        ("kda", {"expand_v": 2}, {"expand_v": 2, "output_gate": "sigmoid_lowrank", "state_decay": "channel"}),
        ("kda", {"norm_eps": 1e-5, "conv_size": 3, "attn": []}, {"norm_eps": 1e-5, "conv_size": 3}),
        (
            "delta_net",
            {"norm_first": False, "use_rope": False, "elementwise_affine": True, "norm_eps": 1},
            {"norm_eps": 1},
        ),
        ("kda", {"_name_or_path": "x", "is_decoder": False, "rope_scaling": None, "hidden_ratio": None}, {}),
    ],
)
def test_translation(kind, changed, expected, fla_config):
    config = translate({**fla_config(kind), **changed})
    assert config.preconditioner is None
    assert config.vocab_size == 257
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_config_json_leaves_out(kind):
    config = translate({"model_type": kind})
    heads = {"delta_net": (16, 128, 1.0), "gated_deltanet": (6, 256, 2.0), "kda": (16, 128, 1.0)}[kind]
    assert (config.num_heads, config.head_dim, config.expand_v) == heads
    assert (config.hidden_size, config.vocab_size, config.intermediate_size) == (2048, 32000, 5632)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("kda", {"lower_bound": -5.0}, "lower_bound: got -5.0, takes None"),
        ("kda", {"safe_gate": True}, "safe_gate: got True, takes False"),
        ("delta_net", {"use_beta": False}, "use_beta: got False, takes True"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm: got 'sum', takes 'l2'"),
        ("delta_net", {"qk_activation": "elu"}, "qk_activation: got 'elu', takes 'silu'"),
        ("gated_deltanet", {"use_short_conv": False}, "use_short_conv: got False, takes True"),
        ("gated_deltanet", {"attn": {"layers": [1]}}, r"attn: got \{'layers': \[1\]\}, takes None or \[\]"),
        ("kda", {"hidden_act": "gelu"}, "hidden_act: got 'gelu', takes 'swish' or 'silu'"),
        ("kda", {"attnres_block_size": 1}, "attnres_block_size: got 1, takes None"),
        (
            "kda",
            {"allow_neg": 1, "use_beta": False},
            "use_beta: .*; allow_neg: got 1, a field that is not known",
        ),
        ("delta_net", {"num_v_heads": 4}, "num_v_heads: got 4, a field that is not known"),
        ("delta_net", {"norm_first": True}, "norm_first: got True, takes False"),
        ("kda", {"quantization_config": {}}, r"quantization_config: got \{\}, takes None"),
        ("kda", {"num_heads": None}, "num_heads: got None, takes int"),
        ("delta_net", {"expand_k": "1"}, "expand_k: got '1', takes int or float"),
        (
            "kda",
            {"vocab_size": 257.0, "num_v_heads": "2"},
            "vocab_size: got 257.0, takes int; num_v_heads: got '2', takes int or None",
        ),
        ("kda", {"eos_token_id": "x"}, "eos_token_id: got 'x', takes int or list or None"),
        ("kda", {"allow_neg_eigval": 1}, "allow_neg_eigval: got 1, takes bool"),
    ],
)
def test_unsupported_fields_are_refused_by_name(kind, changed, message, make_fla, tmp_path, capsys):
    _, source = make_fla(kind, **changed)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert re.search(rf"^osdn: {kind} config: {message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def set_json(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def weights_changed(source, change):
    path = source / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def lack(tensors):
    for name in [name for name in tensors if "mlp" in name]:
        del tensors[name]


def enlarge(tensors):
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = torch.zeros(3, 32)


def add(tensors):
    tensors["model.layers.0.attn.extra"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lack, r"the weights are not those of OSDNForCausalLM: \S+ is missing, and \d+ more"),
        (enlarge, r"the weights are not those of OSDNForCausalLM: \S+q_proj.weight is \(3, 32\), takes \(16, 32\)"),
    ],
)
def test_weights_that_do_not_fit(change, message, make_fla, tmp_path):
    _, source = make_fla("kda")
    weights_changed(source, change)
    with pytest.raises(RunError, match=message):
        convert(source, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_weight_too_many(make_fla, tmp_path):
    _, source = make_fla("kda")
    weights_changed(source, add)
    index = source / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    set_json(index, weight_map=files | {"model.layers.0.attn.extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(RunError, match=r"model.layers.0.attn.extra is unknown"):
        convert(source, tmp_path / "out", {})


def test_one_line_for_what_cannot_be_read(make_fla, tmp_path, capsys, monkeypatch):
    def fails(source, message, out=None):
        assert main(["convert", str(source), str(out or tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"osdn: {message}\n", error), error
        assert out is not None or not (tmp_path / "out").exists()

    _, source = make_fla("delta_net")
    fails(tmp_path / "none", r"\S+none: does not exist, takes the directory of a checkpoint")
    fails(source / "config.json", r"\S+: is a file, takes the directory of a checkpoint")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"\S+empty: not a checkpoint, there is no config.json in it")
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("kept")
    fails(source, r"out: got \S+full, which is not empty, takes a new directory", full)
    fails(source, r"out: got \S+kept, which is a file, takes a new directory", full / "kept")
    fails(source, r"\S+kept/x: cannot be written \(.+\)", full / "kept" / "x")
    assert [path.read_text() for path in full.iterdir()] == ["kept"]
    assert main(["convert", str(source), str(tmp_path / "out"), "--eta", "-1"]) == 2
    assert capsys.readouterr().err == "osdn: preconditioner.eta: got -1.0, takes a finite float >= 0\n"
    assert main(["convert", str(source), str(tmp_path / "empty")]) == 0  # an empty directory will do
    assert (tmp_path / "empty" / "config.json").is_file()
    capsys.readouterr()

    def no_space(_, path, **__):
        (path / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(osdn.OSDNForCausalLM, "save_pretrained", no_space)
        fails(source, r"\S+out: cannot be written \(No space left on device\)")
    assert not list(tmp_path.glob(".*"))
    whole = (source / "model-00001-of-00002.safetensors").read_bytes()
    (source / "model-00001-of-00002.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(source, r"\S+delta_net: weights cannot be read \(.+\)")
    (source / "model-00001-of-00002.safetensors").unlink()
    fails(source, r"\S+delta_net: weights cannot be read \(.+\)")
    index = (source / "model.safetensors.index.json").read_text()
    for wrong in ("{", "{}", "[]"):
        (source / "model.safetensors.index.json").write_text(wrong)
        fails(source, r"\S+delta_net: weights cannot be read \(.+\)")
    (source / "model.safetensors.index.json").unlink()
    (source / "pytorch_model.bin").write_bytes(b"no weights")
    fails(source, r"\S+delta_net: weights cannot be read \(.+\)")
    (source / "model.safetensors.index.json").write_text(index)
    (source / "tokenizer.json").symlink_to(source / "nowhere")
    fails(source, r"source: got \S+delta_net, where tokenizer.json is a link to nothing; takes whole checkpoints")
    (source / "tokenizer.json").unlink()
    set_json(source / "config.json", model_type="mamba9", architectures=["Mamba9ForCausalLM"])
    fails(
        source, r"source: got model_type mamba9 of class Mamba9ForCausalLM, takes flash-linear-attention's delta_net.+"
    )
    transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(source)
    set_json(source / "config.json", architectures=["LlamaForCausalLM"])
    fails(source, r"model: got LlamaForCausalLM, takes a model with layers among .+")
    (source / "config.json").write_text("{")
    fails(source, r"\S+config.json: cannot be read \(.+\)")
    (source / "config.json").write_text("{}")
    fails(source, r"\S+config.json: not a model's, it names no model_type")


def test_what_has_a_preconditioner_is_refused_and_what_has_none_is_not(tmp_path):
    for mixer in ("gdn", "os-gdn"):
        torch.manual_seed(0)
        osdn.OSDNForCausalLM(osdn.OSDNConfig.preset(f"{mixer}-tiny", vocab_size=257)).save_pretrained(tmp_path / mixer)
    with pytest.raises(ValueError, match="model: got a OSDNForCausalLM that has its preconditioner already"):
        convert(tmp_path / "os-gdn", tmp_path / "out", {})
    assert measured(convert(tmp_path / "gdn", tmp_path / "out", {"eta": 0.0})) < 1e-5
    assert load_model(tmp_path / "out").config.preconditioner["feedback"] == "beta_free"
    # Initial weights make short keys, of which the norm's eps is a larger part than of trained ones.
    assert measured(convert(tmp_path / "gdn", tmp_path / "free", {})) < 1e-3


def test_a_hybrid_of_transformers(make_fla, tmp_path, capsys):
    model, _ = make_fla("gated_deltanet")
    model.save_pretrained(tmp_path / "hybrid")
    path, more = (
        tmp_path / "hybrid" / "model.safetensors",
        {"mtp.0.fc.weight": torch.ones(2), "mtp.1.fc.weight": torch.ones(2)},
    )
    save_file(load_file(path) | more, path, metadata={"format": "pt"})  # which transformers would ignore without a word
    expected = logits(model)
    arguments = ["convert", str(tmp_path / "hybrid"), str(tmp_path / "out"), "--eta", "0.5", "--d-max", "1.5"]
    assert main(arguments) == 0
    report = capsys.readouterr().out
    assert measured(report) < 2e-4
    assert report.startswith(f"left out, as {type(model).__name__} has no such weights: mtp.*\n")
    upgraded = load_model(tmp_path / "out")
    assert type(upgraded) is type(model)
    assert difference(logits(upgraded), expected) < 2e-4
    assert upgraded.config.osdn_preconditioner["eta"] == 0.5
    assert upgraded.config.osdn_preconditioner["d_max"] == 1.5
    with pytest.raises(ValueError, match=r"source: got \S+out, which has its preconditioner already"):
        convert(tmp_path / "out", tmp_path / "again", {})
    with pytest.raises(ValueError, match=r"got a model of type qwen3_next, takes an OSDN one \(see osdn convert\)"):
        load_model(tmp_path / "hybrid")


def test_the_tokenizer_goes_along_and_measures(make_fla, tmp_path, capsys):
    _, source = make_fla("kda")
    words = {word: i for i, word in enumerate(["[UNK]", *(f"w{i}" for i in range(250))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(source)
    text = tmp_path / "text"
    text.write_text("w3 w4 w5 " * 500)
    others = ("tokenization_own.py", "LICENSE", "additional_chat_templates/a.jinja", "tokenizer_old/tokenizer.json")
    for name in others:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    assert main(["convert", str(source), str(tmp_path / "out"), "--probe", str(text), "--feedback", "beta_aware"]) == 0
    report = capsys.readouterr().out
    assert "1,024 tokens of" in report
    assert measured(report) > 0.01
    assert [(tmp_path / "out" / name).exists() for name in others] == [True, True, True, False]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert type(AutoConfig.from_pretrained(tmp_path / "out")) is osdn.OSDNConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is osdn.OSDNForCausalLM
    assert main(["convert", str(source), str(tmp_path / "b"), "--probe", str(tmp_path / "none")]) == 2
    assert "none, which cannot be read (No such file or directory)" in capsys.readouterr().err


def naive_arguments(shape_of_g):
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 20, 3, 8) + 0.5, dim=-1) for _ in range(2))
    g = -torch.rand(2, 20, 3, *shape_of_g)
    return q, k, torch.randn(2, 20, 3, 6), torch.rand(2, 20, 3), g


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_flash_linear_attention_s(kind):
    """Its naive functions run on a CPU; it is no dependency of this library."""
    names = {
        "delta_net": ("delta_rule", "delta_rule_recurrence"),
        "gated_deltanet": ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
        "kda": ("kda", "naive_recurrent_kda"),
    }
    package, name = names[kind]
    if (found := importlib.util.find_spec("fla")) is None or not found.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed (pip install fla-core einops)")
    # The file alone: the package around it would compile kernels.
    file = Path(found.submodule_search_locations[0]) / "ops" / package / "naive.py"
    spec = importlib.util.spec_from_file_location("naive", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    naive = getattr(module, name)
    q, k, v, beta, g = naive_arguments((8,) if kind == "kda" else ())
    if kind == "delta_net":
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        expected = naive(*heads_first, beta.transpose(1, 2))[0].transpose(1, 2)
        g = None
    else:
        expected = naive(q, k, v, g=g, beta=beta)[0]
    rule = osdn.Preconditioner(feedback="beta_free", d_max=2.0)
    for preconditioner in (None, rule):
        state = None if preconditioner is None else osdn.DeltaState(d=torch.ones(2, 3, 8))
        o, _ = osdn.online_scaled_delta_rule(
            *(q, k, v, beta),
            g=g,
            preconditioner=preconditioner,
            initial_state=state,
            qk_l2norm=False,
        )
        assert difference(o, expected) < 1e-5  # float32
