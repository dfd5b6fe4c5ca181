"""Whatever ends a run, the same command goes on from the last whole checkpoint, with the same losses to the bit."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from osdn.runs import RunError
from osdn.runs.store import claim
from osdn.train import checkpoint as checkpoints
from osdn.train import train

# Trains the config on stdin. Kills itself on the n-th fsync of a file or directory; writes no file larger than m bytes.
TRAINS = """
import io, json, os, resource, signal, sys
from pathlib import Path
from rich.console import Console
from osdn.runs import RunError
from osdn.train import TrainConfig, train
fields, last, limit, fsync = json.load(sys.stdin), int(sys.argv[1]), int(sys.argv[2]), os.fsync
fields |= {name: tuple(fields[name]) for name in ("data", "eval_data", "betas")} | {"out": Path(fields["out"])}
calls = 0
def count(descriptor):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = count
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    train(TrainConfig(**fields), console=Console(file=io.StringIO()))
except RunError as error:
    sys.exit(str(error))
"""


def train_apart(config, kill_at=0, largest_file=2**40):
    command = [sys.executable, "-c", TRAINS, str(kill_at), str(largest_file)]
    return subprocess.run(command, input=json.dumps(config.as_dict()), text=True, capture_output=True)


def steps_kept(out):
    return checkpoints._steps(out)


@pytest.fixture
def uninterrupted(toy, console):
    return train(toy("whole", streams=2, micro_batch=2), console=console)


def same(results, other):
    assert results["losses"] == other["losses"]
    assert [step for step, _ in results["losses"]] == list(range(1, 7))


@pytest.mark.parametrize("at", [9, 28])
def test_kill_9_and_the_same_command(toy, console, uninterrupted, at, tmp_path):
    """The fsyncs: config.json, then for each checkpoint its 8 files, progress.json among them twice, the manifest and
    two directories. The 9th is within the first checkpoint, the 28th within the third."""
    config = toy("killed", streams=2, micro_batch=2)
    done = train_apart(config, kill_at=at)
    assert done.returncode == -9, done.stderr
    assert not (config.out / "results.json").exists()
    assert steps_kept(config.out) == ([] if at == 9 else [2, 4])
    assert (config.out / "checkpoint.part").exists()
    same(train(config, console=console), uninterrupted)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert all((p == weights[1][name]).all() for name, p in weights[0].items())
    assert not (config.out / "checkpoint.part").exists()


@pytest.mark.parametrize("step", [2, 4, 6])
def test_from_each_checkpoint(toy, console, said, uninterrupted, step):
    """2 and 4 go on; 6 is a run that was killed between its last step and its results."""
    config = toy("whole", streams=2, micro_batch=2, keep=3)
    other = toy("other", streams=2, micro_batch=2, keep=3)
    train(other, console=console)
    for later in {2, 4, 6} - set(range(step + 1)):
        shutil.rmtree(other.out / f"checkpoint-{later}")
    (other.out / "results.json").unlink()
    again = train(replace(other, keep=1), console=console)
    assert f"going on from checkpoint-{step}" in said()
    same(again, uninterrupted)
    assert steps_kept(other.out) == ([6] if step < 6 else [2, 4, 6])
    assert config.identity("x", "y") == other.identity("x", "y")


@pytest.mark.parametrize("step", [2, 4])
def test_losses_that_are_not_logged_at_every_step(toy, console, step):
    """A logged loss is a mean over steps, of which some may lie before the checkpoint to go on from."""
    config = toy("often", log_every=3, keep=3)
    losses = train(config, console=console)["losses"]
    (config.out / "results.json").unlink()
    for later in range(step + 2, 7, 2):
        shutil.rmtree(config.out / f"checkpoint-{later}")
    assert steps_kept(config.out)[-1] == step
    assert train(config, console=console)["losses"] == losses
    one = dict(train(toy("every"), console=console)["losses"])
    assert dict(losses) == pytest.approx({2: (one[1] + one[2]) / 2, 3: one[3], 4: one[4], 6: (one[5] + one[6]) / 2})


def test_a_run_that_only_has_to_be_concluded_evaluates_as_it_trained(toy, console):
    """In bf16, which Trainer turns on for a model when it begins to train it."""
    config = toy(bf16=True, held_out=0.2)
    whole = train(config, console=console)
    (config.out / "results.json").unlink()
    assert train(config, console=console)["eval_loss"] == whole["eval_loss"]


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "how"),
    [("model.safetensors", "truncated"), ("optimizer.pt", "flipped"), ("rng_state.pth", "missing")],
)
def test_a_damaged_checkpoint_is_set_aside(toy, console, said, name, how):
    config = toy()
    whole = train(config, console=console)
    (config.out / "results.json").unlink()
    damage(config.out / "checkpoint-6" / name, how)
    same(train(config, console=console), whole)
    assert f"checkpoint-6 cannot be used ({name} is " in said()
    assert "going on from checkpoint-4" in said()
    assert (config.out / "checkpoint-6.damaged-1").is_dir()


def test_all_damaged_is_an_error_that_loses_nothing(toy, console):
    config = toy()
    train(config, console=console)
    (config.out / "results.json").unlink()
    for step in (4, 6):
        damage(config.out / f"checkpoint-{step}" / "scheduler.pt", "truncated")
    with pytest.raises(
        RunError, match=r"no checkpoint is whole, all are set aside; the same command begins at step 0$"
    ):
        train(config, console=console)
    assert len(list(config.out.glob("checkpoint-*.damaged-1/model.safetensors"))) == 2


def test_a_foreign_checkpoint_is_an_error(toy, console):
    config, other = toy("one"), toy("other", seed=1)
    for c in (config, other):
        train(c, console=console)
    (config.out / "results.json").unlink()
    shutil.copytree(other.out / "checkpoint-6", config.out / "checkpoint-8")
    with pytest.raises(RunError, match=r"checkpoint-8: belongs to another run \(\w+, not \w+\); move it away$"):
        train(config, console=console)
    (config.out / "checkpoint-8" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"checkpoint-8: has no manifest.json, so `osdn train` did not write it"):
        train(config, console=console)
    (config.out / "checkpoint-8" / "manifest.json").write_text("{}")
    train(config, console=console)  # what cannot be read is damaged
    assert (config.out / "checkpoint-8.damaged-1" / "model.safetensors").is_file()


def test_a_changed_config_is_an_error(toy, console):
    config = toy()
    train(config, console=console)
    with pytest.raises(ValueError, match=r"a run of another config \(lr: 0.01 there, 0.5 here\); takes a new path"):
        train(replace(config, lr=0.5), console=console)
    assert steps_kept(config.out) == [4, 6]


def test_a_directory_in_which_another_works_is_refused(toy, console):
    config = toy()
    with claim(config.out, {}, print), pytest.raises(RunError, match="another process works there"):
        train(config, console=console)


def test_data_that_has_grown_is_told(toy, console, said, text):
    config = toy()
    train(config, console=console)
    (config.out / "results.json").unlink()
    shutil.rmtree(config.out / "checkpoint-6")
    with text.open("a") as file:
        file.write('\n{"text": "one more"}')
    train(config, console=console)
    assert "files of data have other sizes than before" in said()


def test_a_full_disk(toy, console):
    """Files larger than 50,000 bytes are refused, as a full disk refuses them: those of weights and optimizer."""
    config = toy()
    whole = train(config, console=console)
    (config.out / "results.json").unlink()
    shutil.rmtree(config.out / "checkpoint-6")
    done = train_apart(config, largest_file=50_000)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{config.out / 'checkpoint-6'}: cannot be written (")
    assert line.endswith("; checkpoints before it are intact")
    assert steps_kept(config.out) == [4]
    assert not (config.out / "checkpoint.part").exists()
    same(train(config, console=console), whole)


def test_a_disk_that_takes_no_log(toy, console, monkeypatch):
    config = toy()
    with monkeypatch.context() as patch:

        def add_scalar(self, name, value, step):  # noqa: ARG001
            if step == 3:
                raise OSError(28, "No space left on device")

        patch.setattr("osdn.train.run.SummaryWriter.add_scalar", add_scalar)
        stopped = r"run: stopped by \[Errno 28\] No space left on device; the same command goes on from the last"
        with pytest.raises(RunError, match=stopped):
            train(config, console=console)
    assert steps_kept(config.out) == [2]
    train(config, console=console)


def test_a_disk_that_is_full_at_the_end(toy, console):
    """All steps are done, and the model cannot be written: only that is left to be done."""
    config = toy()
    whole = train(config, console=console)
    (config.out / "results.json").unlink()
    done = train_apart(config, largest_file=50_000)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"{config.out / 'model'}: cannot be written (")
    same(train(config, console=console), whole)


def test_a_bad_shard_on_the_way_keeps_what_was_saved(toy, console, tmp_path):
    lines = "\n".join(json.dumps({"text": f"document {i} " * 9}) for i in range(40))
    (tmp_path / "shard-0.jsonl").write_text(lines)
    (tmp_path / "shard-1.jsonl").write_bytes(b'{"text": "\xff"}')
    config = toy(data=(str(tmp_path / "shard-*.jsonl"),), steps=60, save_every=5)
    with pytest.raises(ValueError, match=r"^data: got .*shard-1.jsonl, line 1: not UTF-8 at byte 10 of it; "):
        train(config, console=console)
    last = steps_kept(config.out)[-1]
    assert last >= 10
    (tmp_path / "shard-1.jsonl").write_text(lines.replace("document", "other"))
    results = train(config, console=console)
    assert len(results["losses"]) == 60


def test_half_deleted_checkpoints_are_not_taken_for_whole_ones(tmp_path, monkeypatch):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def killed(path, **options):  # noqa: ARG001
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(tmp_path, keep=2)
    assert steps_kept(tmp_path) == [4, 10]
