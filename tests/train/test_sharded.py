"""Two processes over gloo; where there are GPUs, the sharding by hand on two of them, over NCCL."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from worker import batch, small_config, steps

import osdn
from osdn.train import train
from osdn.train.sharded import load_sharded

pytest.importorskip("osdn.train.run", reason="needs what pip install 'osdn[train]' brings")
WORKER = Path(__file__).with_name("worker.py")
GPUS = torch.cuda.device_count()


def torchrun(task, folder):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), task, str(folder)]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}  # float32 is compared
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(GPUS == 1, reason="needs two CUDA devices, or none to run over gloo; torch sees one")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of dcp.save, here in one process
def test_fully_sharded_training_is_that_of_one_process(tmp_path):
    """Parameters are DTensors; losses agree but for the order of sums in fp32. From the meta device, through shards in
    and out, d_0 and the bias of forgetting stay what they were, and the model what `save_pretrained` takes."""
    torch.manual_seed(0)
    model = osdn.OSDNForCausalLM(small_config())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn.d0.uniform_(0.2, 2)
            layer.attn.forget_proj.bias.uniform_(1, 7)
    names = [n for n, _ in model.named_parameters() if n.endswith(("d0", "forget_proj.bias"))]
    special = {n: model.get_parameter(n).tolist() for n in names}
    start = tmp_path / "start" / "pytorch_model_fsdp_0"
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(start), no_dist=True)

    done = torchrun("sharded", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sharded.json").read_text())
    assert found["special"] == special
    assert len(special) == 4
    # The CPU's operator and the kernels of a GPU order their sums in other ways, too.
    torch.testing.assert_close(found["losses"], steps(model, batch), rtol=1e-3 if GPUS else 1e-5, atol=0)
    assert found["losses"][-1] < found["losses"][0]

    whole = osdn.OSDNForCausalLM(small_config())
    load_sharded(whole, tmp_path / "end")
    whole.save_pretrained(tmp_path / "whole")
    again = osdn.OSDNForCausalLM.from_pretrained(tmp_path / "whole")
    for name, p in model.named_parameters():
        if GPUS:  # AdamW makes whole steps of rounding where a gradient is next to nothing; untrained ones are 0.1 away
            assert (again.get_parameter(name) - p).norm() < 2e-2 * p.norm(), name
        else:
            torch.testing.assert_close(again.get_parameter(name), p, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(again.get_parameter(name), whole.get_parameter(name))
    assert max((again.get_parameter(n) - torch.tensor(special[n])).abs().max() for n in names) > 1e-3  # it was trained


@pytest.fixture
def two_streams(toy, tmp_path):
    config = toy("two", streams=2, micro_batch=2, held_out=0.2, steps=4)
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    return config


def test_two_processes_train_what_one_does(two_streams, toy, tmp_path, console):
    """The same rows, accumulated by one process and shared by two: the order of sums differs."""
    done = torchrun("plain", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "error").exists()
    two = json.loads((two_streams.out / "results.json").read_text())
    one = train(toy("one", streams=2, micro_batch=2, held_out=0.2, steps=4), console=console)
    assert (two["processes"], one["processes"]) == (2, 1)
    losses = [[loss for _, loss in results["losses"]] for results in (two, one)]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=0)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=2e-6)
    assert json.loads((two_streams.out / "checkpoint-4" / "progress.json").read_text())["positions"].keys() == {
        "0",
        "1",
    }
    # What two processes have begun, one goes on with: batches and positions are those of the streams.
    (two_streams.out / "results.json").unlink()
    shutil.rmtree(two_streams.out / "checkpoint-4")
    going_on = train(two_streams, console=console)
    torch.testing.assert_close([loss for _, loss in going_on["losses"]], losses[1], rtol=2e-6, atol=0)


def test_fsdp_that_shards_nothing_is_an_error(two_streams, tmp_path):
    """accelerate ignores FSDP on CPU; such a run would go on as DDP."""
    done = torchrun("fsdp", tmp_path)
    assert done.returncode == 0, done.stderr
    message = (tmp_path / "error").read_text()
    assert message.startswith("fsdp: got parameters that are not sharded, ")
    assert "MULTI_CPU" in message
    assert not list(two_streams.out.glob("checkpoint-*"))
