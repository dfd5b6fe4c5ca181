"""`osdn train --fsdp` under torchrun, two processes, whose way leads through Trainer and accelerate's FSDP2.

On two GPUs, over NCCL, as a user starts it. Without a GPU the same over gloo, with accelerate, which ignores FSDP on
CPU, told that it is not one (worker.py). That parameters are DTensors the run itself sees to: see test_sharded.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import osdn.cli

running = pytest.importorskip("osdn.train.run", reason="needs what pip install 'osdn[train]' brings")
psutil = pytest.importorskip("psutil", reason="needs psutil, which accelerate brings")

GPUS = torch.cuda.device_count()
two_processes = pytest.mark.skipif(GPUS == 1, reason="needs two CUDA devices, or none to run over gloo; torch sees one")
ONE = ["-m", "osdn.cli"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO += ONE if GPUS else [str(Path(__file__).with_name("worker.py")), "cli"]
STEPS, EVERY = 12, 3
RUN = (
    "train tiny_text_cpu --device auto --size num_heads 2 head_dim 64 hidden_size 64 intermediate_size 64 "
    "--context 32 --batch-size 4 --micro-batch 1 --streams 2 --shuffle 4 --held-out 0.2 "
    f"--steps {STEPS} --warmup-steps 2 --lr 1e-2 --log-every 1 --save-every {EVERY}"
)


@pytest.fixture
def command(text, tmp_path):
    return lambda out, options: [*RUN.split(), "--data", str(text), "--out", str(tmp_path / out), *options.split()]


@pytest.fixture
def start(command, tmp_path):
    """Starts a run in the directory `out`; what it prints goes to a file beside it."""

    def start(out, processes, options):
        launch = [sys.executable, *(ONE if processes == 1 else TWO)]
        # float32 is compared: in TF32 the convolutions' rounding would be seen, and nothing below it.
        environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
        with (tmp_path / f"{out}.log").open("w") as log:
            return subprocess.Popen([*launch, *command(out, options)], stdout=log, stderr=log, env=environment)

    return start


@pytest.fixture
def run(start, command, tmp_path, capsys):
    """Results of a run that ends by itself, and what it printed."""

    def run(out, processes, options):
        if processes == 1 and not GPUS:  # here, which saves what importing takes
            assert osdn.cli.main(command(out, options)) == 0
            return json.loads((tmp_path / out / "results.json").read_text()), capsys.readouterr().out
        status = start(out, processes, options).wait(400)
        printed = (tmp_path / f"{out}.log").read_text()
        assert status == 0, printed
        return json.loads((tmp_path / out / "results.json").read_text()), printed

    return run


@pytest.fixture
def kill(start, tmp_path):
    """A run whose processes are all killed, as soon as its first checkpoint is there."""

    def kill(out, processes, options):
        launched = start(out, processes, options)
        manifest = tmp_path / out / f"checkpoint-{EVERY}" / "manifest.json"
        until = time.monotonic() + 400
        while not manifest.exists() and launched.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        victims = [psutil.Process(launched.pid), *psutil.Process(launched.pid).children(recursive=True)]
        for process in victims:
            process.kill()
        launched.wait()
        psutil.wait_procs(victims[1:])
        assert manifest.exists(), (tmp_path / f"{out}.log").read_text()
        assert not (tmp_path / out / "results.json").exists(), "it was over before it was killed"

    return kill


def losses(results):
    assert [step for step, _ in results["losses"]] == list(range(1, STEPS + 1))
    return [loss for _, loss in results["losses"]]


def special(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(("d0", "forget_proj.bias"))}


@two_processes
def test_a_killed_sharded_run_goes_on_and_is_that_of_one_process(run, kill, tmp_path, capsys):
    """Losses before and after the kill are one process's but for the order of sums in fp32; its shards are the model
    that it saves at its end and what `from_pretrained` takes."""
    options = "--preset osdn-apf-tiny"
    one, _ = run("one", 1, options)
    kill("two", 2, f"{options} --fsdp")
    two, printed = run("two", 2, f"{options} --fsdp")
    assert "going on from checkpoint-" in printed
    assert (two["processes"], two["device_type"]) == (2, "cuda" if GPUS else "cpu")
    with capsys.disabled():
        off = max(abs(a / b - 1) for a, b in zip(losses(two), losses(one)))
        print(f"\n2 {two['device_type']} processes, fp32: losses differ by {off:.1e}, losses {losses(two)}")
    # Rounding is 1e-7, and AdamW makes more of it where a gradient is next to nothing. Going on from another place in
    # the data changes the next loss by 2e-3.
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-4, atol=0)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert losses(two)[-1] < losses(two)[0] - 1

    checkpoint = tmp_path / "two" / f"checkpoint-{STEPS}"
    shards = {path.name for path in (checkpoint / "pytorch_model_fsdp_0").glob("*.distcp")}
    assert shards == {"__0_0.distcp", "__1_0.distcp"}
    saved = osdn.OSDNForCausalLM.from_pretrained(tmp_path / "two" / "model")
    whole = osdn.OSDNForCausalLM(saved.config)
    begun = {name: p.detach().clone() for name, p in special(whole).items()}
    running.load_sharded(whole, checkpoint)
    whole.save_pretrained(tmp_path / "whole")
    again = osdn.OSDNForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, saved(ids).logits)
    unsharded = osdn.OSDNForCausalLM.from_pretrained(tmp_path / "one" / "model")
    assert len(begun) == 4
    for name, p in special(again).items():
        way = unsharded.get_parameter(name) - begun[name]
        assert way.norm() > 1e-2
        assert (p - begun[name] - way).norm() < 0.05 * way.norm(), name


@two_processes
def test_bf16_is_that_of_one_process(run, capsys):
    """Also under FSDP parameters, gradients and losses stay in float32, activations are recomputed and evaluations
    between steps change nothing."""
    options = "--preset os-gdn-tiny --bf16"
    one, _ = run("one", 1, options)
    two, _ = run("two", 2, f"{options} --fsdp --checkpoint-activations --eval-every 5")
    with capsys.disabled():
        off = max(abs(a / b - 1) for a, b in zip(losses(two), losses(one)))
        print(f"\n2 {two['device_type']} processes, bf16: losses differ by {off:.1e}, losses {losses(two)}")
    in_bf16 = torch.tensor(losses(two))
    assert not torch.equal(in_bf16.bfloat16().float(), in_bf16)
    # The first losses are of the same weights, and each row's is the same.
    assert losses(two)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    # Later a weight that differs in fp32's last bit may round to another bf16, 2^-8 away.
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-2, atol=0)


@pytest.mark.parametrize("seen", [0, 1, 8])
def test_a_process_takes_one_gpu(toy, tmp_path, seen, monkeypatch):
    """Trainer's default takes all by DataParallel, under which a batch's rows would not be those of its streams."""
    monkeypatch.setattr(running.TrainingArguments, "n_gpu", seen)
    assert running._arguments(toy(), tmp_path, 1)._n_gpu == min(seen, 1)
