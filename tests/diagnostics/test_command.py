import csv
import errno
import json
import os
import re
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from osdn import OSDNConfig, OSDNForCausalLM, precondition_model
from osdn.cli import main
from osdn.compare import Experiment, compare
from osdn.data.tokenizer import byte_tokenizer
from osdn.diagnostics.command import load_any, load_tasks
from osdn.diagnostics.config import Diagnose

FILES = {"diagnosis.json", "heads.csv", "positions.csv", "index.html"}


def save(path, preset="osdn-apf", **size):
    torch.manual_seed(0)
    size = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8} | size
    OSDNForCausalLM(OSDNConfig.preset(f"{preset}-tiny", **size)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("abc, abd, abe. " * 40)
    return tmp_path / "text.txt"


def diagnosed(*arguments):
    """Exit status of small measurements."""
    return main(["diagnose", "--seq-len=64", "--sequences=3", "--chunk-size=24", *map(str, arguments)])


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]


def test_end_to_end(checkpoint, text, tmp_path, capsys):
    out = tmp_path / "made" / "here"
    assert diagnosed(checkpoint, "--data", f"prose={text}", "mqar:4x2", "--out", out) == 0
    assert {f.name for f in out.iterdir()} == FILES
    result = json.loads((out / "diagnosis.json").read_text())
    assert list(result["tasks"]) == ["prose", "mqar:4x2"]
    assert {"checkpoint", "date", "data", "commit", "source_sha256", "versions", "device"} <= result.keys()
    assert [(task["sequences"], task["tokens"]) for task in result["tasks"].values()] == [(3, 64)] * 2
    said = capsys.readouterr().out
    for name, task in result["tasks"].items():
        ratios = " ".join(f"{layer['all']['ratio']:.3f}" for layer in task["layers"])
        assert f"{name}: residual ratio by layer {ratios}\n" in said
    heads = table(out / "heads.csv")
    assert len(heads) == 2 * 2 * 2
    second = result["tasks"]["mqar:4x2"]["layers"][0]["heads"][1]
    row = next(
        row for row in heads if (row["task"], row["layer"], row["head"]) == ("mqar:4x2", "model.layers.0.attn", "1")
    )
    assert {name: float(row[name]) for name in second} == second
    positions = table(out / "positions.csv")
    assert len(positions) == 2 * 2 * 32
    assert float(positions[0]["position"]) == 0.5 / 32
    first = result["tasks"]["prose"]["layers"][0]["positions"][0]
    assert [float(positions[0][f"d_{p}%"]) for p in (5, 25, 50, 75, 95)] == first["quantiles"]["d"]

    page = Page((out / "index.html").read_text())
    assert page.sources.count("data:,") == 1
    assert all(source.startswith("data:") for source in page.sources)  # nothing is fetched
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("img") == 1 + 2 * 8
    assert "script" not in page.tags


def test_a_job_of_compare_gives_compares_own_ratio(tmp_path, capsys, monkeypatch):
    experiment = Experiment(
        models=("osdn-apf[d_init=0|1]",),
        seeds=1,
        steps=3,
        batch_size=4,
        seq_len=16,
        num_pairs=2,
        eval_pairs=(2,),
        vocab_size=20,
        hidden_size=16,
        head_dim=8,
        eval_sequences=4,
    )
    runs = compare(experiment, out=tmp_path / "run", workers=0)["runs"]
    for run in runs:
        job = tmp_path / "run" / "jobs" / f"{run['model']}-seed0.pt"
        flags = ["--seq-len", "16", "--sequences", "4", "--out", str(tmp_path / "out")]
        assert main(["diagnose", str(job), "--data", "mqar:2x1", *flags]) == 0
        layers = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["tasks"]["mqar:2x1"]["layers"]
        expected = [layer["mean"] for layer in run["residual"]["layers"]]
        assert [layer["all"]["ratio"] for layer in layers] == pytest.approx(expected, rel=1e-5)
    assert runs[0]["residual"] != runs[1]["residual"]
    monkeypatch.chdir(job.parent)
    assert main(["diagnose", job.name, "--data", "mqar:2x1", *flags]) == 0
    job.with_name("osdn-apf[d_init=1]-seedbest.pt").write_bytes(job.read_bytes())
    capsys.readouterr()
    assert main(["diagnose", "osdn-apf[d_init=1]-seedbest.pt", "--data", "mqar:2x1", *flags]) == 2
    assert "seedbest.pt, takes jobs/<model>-seed<i>.pt below an osdn compare run's config" in capsys.readouterr().err
    job.write_bytes(job.read_bytes()[:-500])
    assert main(["diagnose", str(job), "--data", "mqar:2x1", *flags]) == 2
    assert f"checkpoint: got {job}, which cannot be loaded (" in capsys.readouterr().err


@pytest.mark.parametrize("config", ['{"model_type": "osdn"}', "[]", "{"])
def test_a_config_that_is_no_compare_runs_is_left_where_it_is(config, text, tmp_path, capsys):
    (tmp_path / "hf" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hf" / "config.json").write_text(config)
    weights = tmp_path / "hf" / "checkpoints" / "weights-seed0.pt"
    torch.save({"a": 1}, weights)
    assert diagnosed(weights, "--data", text, "--out", tmp_path / "out") == 2
    assert f"osdn: checkpoint: got {weights}, takes jobs/<model>-seed<i>.pt below an osdn" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "hf").iterdir() if f.is_file()] == ["config.json"]
    assert (tmp_path / "hf" / "config.json").read_text() == config


def test_missing_weights_are_not_made_up(tmp_path, text, capsys):
    path = save(tmp_path / "m") / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.attn.d0"]
    save_file(weights, path, metadata={"format": "pt"})
    assert diagnosed(tmp_path / "m", "--data", text, "--out", tmp_path / "out") == 2
    assert "model.layers.1.attn.d0 is missing" in capsys.readouterr().err


def test_without_a_preconditioner(tmp_path, text, capsys):
    assert diagnosed(save(tmp_path / "m", "gdn"), "--data", text, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "text.txt: residual ratio by layer 0." in said
    assert "the checkpoint has no preconditioner (d = 1): there is a residual ratio, and no d to show" in said
    page = (tmp_path / "out" / "index.html").read_text()
    assert "This checkpoint has no preconditioner" in page
    assert Page(page).tags.count("figure") == 3 + 2  # ratios; x and step
    assert "d_t, the preconditioner" not in page


def test_a_tokenizer_of_ones_own(tmp_path, text):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"abc": 0, "abd": 1, ",": 2, ".": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = save(tmp_path / "m", "deltanet", vocab_size=5)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    flags = ["--out", tmp_path / "out", "--data", text]
    assert diagnosed(model, *flags, "--tokenizer", tmp_path / "words") == 0
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["tasks"]["text.txt"]["sequences"] == 3
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model)
    assert diagnosed(model, *flags) == 0


def test_a_saved_tokenizer_of_bytes_gives_the_bytes(tmp_path, checkpoint):
    """As `osdn train` saves it; byte 0 closes every document."""
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).write_text(f"Größe <|endoftext|> {name} " * 9)
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    model, found = load_any(checkpoint), []
    for tokenizer in (None, "bytes", str(tmp_path / "bytes")):
        config = Diagnose(checkpoint, (f"x={tmp_path / 'data'}",), tokenizer=tokenizer, seq_len=32)
        found.append(load_tasks(config, model)["x"])
    assert (found[0] == 0).any()
    assert all(torch.equal(ids, found[0]) for ids in found)


def test_an_upgraded_hybrid_is_measured_with_its_preconditioner(tmp_path, text):
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    host = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads))
    precondition_model(host, {"d_init": 0.5, "eta": 0.0}).save_pretrained(tmp_path / "hybrid")
    assert diagnosed(tmp_path / "hybrid", "--data", text, "--out", tmp_path / "out") == 0
    layers = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["tasks"]["text.txt"]["layers"]
    assert [layer["all"]["d"] for layer in layers] == pytest.approx([0.5] * 3)


def test_a_path_may_hold_what_parts_a_name_from_it(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "date=2024").mkdir()
    text.rename("date=2024/a=b.txt")
    data = ("date=2024/a=b.txt", "x=date=2024/a=b.txt", "y=mqar:4x1", "mqar:4x1")
    tasks = load_tasks(Diagnose(checkpoint, data, seq_len=64, sequences=3), load_any(checkpoint))
    assert list(tasks) == ["a=b.txt", "x", "y", "mqar:4x1"]
    assert torch.equal(tasks["a=b.txt"], tasks["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere --data {text}", "nowhere: does not exist, takes the directory of a checkpoint"),
        (
            "nowhere/jobs/osdn-seed0.pt --data {text}",
            "checkpoint: got nowhere/jobs/osdn-seed0.pt, which does not exist",
        ),
        ("{broken} --data {text}", "{broken}: weights cannot be read ("),
        ("{model} --data nowhere.txt", "data: got nowhere.txt, which does not exist"),
        ("{model} --data {empty}", "data: got {empty}, which is empty"),
        ("{model} --data {text} --seq-len 9999", "data: got '{text}' of 601 tokens, takes at least seq_len = 9999"),
        ("{model} --data {long}", "data: got {long} of 67,108,865 bytes, takes at most 67,108,864; a sample"),
        ("{model} --data {text} {text}", "data: got 'text.txt' twice, takes different names"),
        ("{model} --data mqar:40x1", "seq_len: got 64, takes at least 2 * num_pairs * (passes + 1) = 160"),
        ("{model} --data mqar:200x1 --seq-len 800", "vocab_size: got 256, takes at least 402"),
        ("{model} --data", "data: got nothing, takes paths or mqar:<pairs>x<passes>"),
        ("{model} --data x=", "data: got 'x=', takes a path, mqar:<pairs>x<passes>, or one of them behind 'name='"),
        ("{model} --data {text} --sequences 0", "sequences: got 0, takes an int >= 1"),
        (
            "{model} --data {text} --tokenizer nowhere",
            "tokenizer: got nowhere, without a tokenizer's files; takes",
        ),
        ("{small} --data {text}", "tokenizer: got none for a vocabulary of 20, takes a directory with one; bytes need"),
        ("{small} --data {text} --tokenizer bytes", "tokenizer: got bytes for a vocabulary of 20"),
        ("{model} --data {text} --out {text}", "out: got {text}, which cannot be written to (File exists)"),
        ("{model} --data {text} --out {text}/x", "out: got {text}/x, which cannot be written to (Not a directory)"),
    ],
)
def test_a_bad_request_is_one_line(arguments, message, checkpoint, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    with (tmp_path / "long").open("wb") as file:
        file.truncate((1 << 26) + 1)
    save(tmp_path / "small", vocab_size=20)
    save(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    paths = {name: tmp_path / name for name in ("empty", "long", "small", "broken")}
    paths |= {"model": checkpoint, "text": text}
    capsys.readouterr()
    assert diagnosed(*arguments.format(**paths).split()) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"osdn: {message.format(**paths)}")
    assert all("Loading weights" in line for line in filter(None, before))  # transformers' bar
    assert not list(tmp_path.rglob("index.html*"))


def test_a_full_disk_leaves_the_page_that_was_there(text, tmp_path, capsys, monkeypatch):
    checkpoint = save(tmp_path / "m", "deltanet")
    out, writes, real = tmp_path / "out", [], os.fsync
    assert diagnosed(checkpoint, "--data", text, "--out", out) == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) == len(FILES):  # the page comes last: where it stands, all else does
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("osdn.runs.store.os.fsync", fsync)
    assert diagnosed(checkpoint, "--data", "mqar:2x1", "--out", out) == 2
    error = capsys.readouterr().err
    assert re.search(r"osdn: \S+index.html: cannot be written \(No space left on device\)", error)
    assert {f.name for f in out.iterdir()} == FILES
    assert (out / "index.html").read_bytes() == before["index.html"]
