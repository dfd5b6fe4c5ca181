"""What each of two processes does; started by the tests through torchrun.

usage: worker.py sharded|plain|fsdp FOLDER, or worker.py cli ARGUMENTS, `osdn ARGUMENTS` with FSDP on CPU, too.
"""

import io
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import osdn
from osdn.nn.decay import parameter_groups
from osdn.runs import RunError
from osdn.train import TrainConfig, train


def small_config():
    """Of a model in which d moves: d_0 is learned, forgetting is on, and the initial values are large."""
    size = {"vocab_size": 50, "hidden_size": 32, "num_heads": 2, "head_dim": 16, "intermediate_size": 64}
    return osdn.OSDNConfig.preset("osdn-apf-tiny", **size, initializer_range=0.3)


def batch(step, rows=4):
    return torch.randint(0, 50, (rows, 24), generator=torch.Generator().manual_seed(step))


def steps(model, ids_of_step, n=4):
    """Losses of n optimizer steps."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    losses = []
    for step in range(n):
        ids = ids_of_step(step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def sharded(folder):
    """fully_shard from the meta device, filled from a checkpoint, trained, and saved in shards."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank)
    with torch.device("meta"):
        model = osdn.OSDNForCausalLM(small_config())
    model = shard(model)
    assert all(isinstance(p, DTensor) and p.is_meta for p in model.parameters())
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():  # what is not loaded is seen
            p.fill_(float("nan"))
    start = {"model": model.state_dict()}
    dcp.load(start, checkpoint_id=folder / "start" / "pytorch_model_fsdp_0")
    model.load_state_dict(start["model"])
    assert all(isinstance(p, DTensor) for p in model.parameters())
    special = {
        n: p.full_tensor().tolist() for n, p in model.named_parameters() if n.endswith(("d0", "forget_proj.bias"))
    }

    losses = torch.tensor(steps(model, lambda step: batch(step)[2 * rank : 2 * rank + 2].to(device)), device=device)
    dist.all_reduce(losses)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "end" / "pytorch_model_fsdp_0")
    if rank == 0:
        (folder / "sharded.json").write_text(json.dumps({"losses": (losses / 2).tolist(), "special": special}))
    dist.destroy_process_group()


def trained(folder, **fields):
    """osdn train, the config on a file."""
    stored = json.loads((folder / "config.json").read_text())
    stored |= {name: tuple(stored[name]) for name in ("data", "eval_data", "betas")} | {"out": Path(stored["out"])}
    try:
        train(TrainConfig(**stored | fields), console=Console(file=io.StringIO()))
    except RunError as error:
        (folder / "error").write_text(str(error))


def fsdp_on_cpu():
    """accelerate ignores FSDP where processes are of its kind MULTI_CPU; let it take them for another."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def renamed(self, *args, **options):
        init(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = renamed


if __name__ == "__main__":
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "cli":
        from osdn.cli import main

        fsdp_on_cpu()
        sys.exit(main(sys.argv[2:]))
    elif task == "sharded":
        sharded(folder)
    else:
        trained(folder, fsdp=task == "fsdp")
