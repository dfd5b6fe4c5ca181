import json
import os
import subprocess
import sys

import pytest
import torch

import osdn
from osdn.cli import main
from osdn.evals.checkpoint import Checkpoint

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
target_delimiter: ""
doc_to_target: 0
metric_list: [{metric: acc}]
metadata: {version: 3.0}
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["@"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
QUESTIONS = [
    {"q": "The sky is", "a": " blue", "b": " greenish, mostly"},
    {"q": "Grass is", "a": " green", "b": " of a deep blue"},
    {"q": "Döner", "a": " x", "b": " y"},
]

# One process for all, since the harness takes long to import. The first call is that of a user who has never imported
# osdn: lm_eval alone, with trust_remote_code.
PROGRAM = """
import sys
from functools import partialmethod
import torch.utils.collect_env
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

# What takes most of the harness' time: to read its thousands of own tasks, and to ask pip for all packages.
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
torch.utils.collect_env.get_pretty_env_info = str

folder, model = sys.argv[1:]
tasks = ["--include_path", folder, "--device", "cpu", "--batch_size", "2", "--output_path"]
assert "osdn" not in sys.modules
sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}/auto,trust_remote_code=True",
            "--tasks", "local_choice", *tasks, f"{folder}/alone"]
cli_evaluate()

from osdn.cli import main

both = ["eval", f"{model}/plain", "--harness", "--tasks", "local_choice,local_generate", *tasks, f"{folder}/out"]
assert main([*both, "--log_samples"]) == 0
for task in ("local_choice", "local_generate"):
    assert main([*both[:3], "--tasks", task, "--model_args", "max_length=17", *tasks, f"{folder}/short"]) == 2
"""


@pytest.fixture
def models(save, tmp_path):
    plain, auto = save(name="plain"), save(name="auto")
    assert main(["eval", str(auto), "--export-auto-map"]) == 0
    return tmp_path, plain, auto


def test_a_local_task(models, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, text in {"choice": CHOICE, "generate": GENERATE}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE")}
    environment = os.environ | caches | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    refusals = [line for line in done.stderr.splitlines() if "osdn: harness: " in line]
    assert len(refusals) == 2
    assert all("Takes --model_args max_length=N for longer prompts." in line for line in refusals)
    assert not (folder / "short").exists()

    # The same score, worked out here: the likelier of the two continuations, by the sum of its bytes' losses.
    model = Checkpoint.open(models[1]).load("cpu", "auto")

    def loss(q, continuation):
        ids = torch.tensor([list((q + continuation).encode())])
        log_p = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        return -log_p[-len(continuation.encode()) :].sum().item()

    losses = [(loss(x["q"], x["a"]), loss(x["q"], x["b"])) for x in QUESTIONS]
    expected = sum(a < b for a, b in losses) / len(losses)
    for name in ("alone", "out"):
        (file,) = (folder / name).rglob("results_*.json")
        content = json.loads(file.read_text())
        assert content["results"]["local_choice"]["acc,none"] == pytest.approx(expected)
        assert content["versions"]["local_choice"] == 3.0
    (file,) = (folder / "out").rglob("samples_local_choice_*.jsonl")
    for line in map(json.loads, file.read_text().splitlines()):
        found = [-float(response[0][0]) for response in line["resps"]]
        assert found == pytest.approx(losses[line["doc_id"]], rel=1e-9)
    (file,) = (folder / "out").rglob("samples_local_generate_*.jsonl")
    for line in map(json.loads, file.read_text().splitlines()):
        ids = torch.tensor([list(line["doc"]["q"].encode())])
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        text = Checkpoint.open(models[1]).tokenizer.decode(new, skip_special_tokens=True).partition("@")[0]
        assert line["resps"] == [[text]]


def test_auto_map_leaves_the_model_as_it_is(models):
    _, plain, auto = models
    before, after = (json.loads((path / "config.json").read_text()) for path in (plain, auto))
    assert after.pop("auto_map") == {
        "AutoConfig": "osdn_auto.OSDNConfig",
        "AutoModelForCausalLM": "osdn_auto.OSDNForCausalLM",
    }
    assert after == before
    assert Checkpoint.open(auto).sha256 == Checkpoint.open(plain).sha256
    assert {file.name for file in auto.iterdir()} - {file.name for file in plain.iterdir()} == {
        *("osdn_auto.py", "tokenizer.json", "tokenizer_config.json")
    }
    model = osdn.OSDNForCausalLM.from_pretrained(auto)
    for name, w in osdn.OSDNForCausalLM.from_pretrained(plain).state_dict().items():
        assert torch.equal(w, model.state_dict()[name])


def test_auto_map_says_what_it_wrote(save, capsys):
    path = save()
    before = {file.name for file in path.iterdir()} - {"config.json"}
    assert main(["eval", str(path), "--export-auto-map"]) == 0
    where, _, names = capsys.readouterr().out.strip().partition(": ")
    assert where == f"written in {path}"
    assert {file.name for file in path.iterdir()} - before == set(names.split(", "))


def test_another_model_needs_no_auto_map(tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["eval", str(tmp_path), "--export-auto-map"]) == 2
    assert f"osdn: checkpoint: got {tmp_path} of type 'gpt2', takes one of type 'osdn'" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
