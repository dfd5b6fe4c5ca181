import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from osdn.compare import Experiment, RunError, compare, grid, runner
from osdn.compare import train as training
from osdn.compare.train import Job, build, learning_rate, parameter_groups, train
from osdn.data import MQAR
from osdn.runs import fingerprint
from osdn.runs.store import claim, previous, read_json

TOY = Experiment(
    models=("deltanet", "osdn-apf"),
    steps=6,
    batch_size=4,
    seq_len=16,
    num_pairs=2,
    eval_pairs=(1, 2, 4, 9),
    vocab_size=20,
    hidden_size=16,
    head_dim=8,
    eval_every=3,
    eval_sequences=8,
    warmup_steps=2,
)
ONE = replace(TOY, models=("osdn-apf",), seeds=1).resolved()


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def said(console):
    return console.file.getvalue()


def run(out, console, experiment=TOY, **options):
    return compare(experiment, out=out, console=console, **{"workers": 0, **options})


def a_job(directory, experiment=ONE, every=2):
    return Job(experiment, experiment.models[0], 0, directory, fingerprint(experiment.identity(None)), every)


def ignore(*event):
    pass


def never():
    return False


def test_end_to_end(tmp_path, console, monkeypatch):
    content = run(tmp_path / "a", console)
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == content
    assert content["experiment"] == TOY.resolved().as_dict()
    assert content["versions"].keys() == {"python", "osdn", "torch", "transformers"}
    assert content["device"].startswith("cpu")
    here = {"commit", "source_sha256", "versions", "device", "threads"}
    assert here | {"workers", "wall_seconds", "date", "stamp"} <= content.keys()
    assert [(r["model"], r["seed"]) for r in content["runs"]] == [(m, s) for m in TOY.models for s in (0, 1)]
    for result in content["runs"]:
        assert len(result["losses"]) == 6
        assert [point["step"] for point in result["history"]] == [0, 3, 6]
        assert result["final"]["by_pairs"].keys() == {"1", "2", "4"}
        assert result["final"]["by_pairs"]["2"]["accuracy"] == result["final"]["accuracy"]
        assert len(result["residual"]["layers"]) == 2
        assert result["parameters"] > 1000
        assert result["tokens_per_second"] > 0
        assert result["origin"] == [{"from_step": 0, **{name: content[name] for name in here}}]
    apf, deltanet = (next(r for r in content["runs"] if r["model"] == m) for m in ("osdn-apf", "deltanet"))
    assert apf["state_bytes"] - deltanet["state_bytes"] == 2 * 8 * 4
    assert (tmp_path / "a" / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "a" / "table.md").read_text()
    assert "| model | n | 1 pairs | 2 pairs | 4 pairs | residual ratio |" in table
    assert "osdn-apf, seed 1: done" in said(console)
    assert table.strip() in said(console)

    monkeypatch.setattr(runner, "train", None)
    again = Console(file=io.StringIO(), width=100)
    assert run(tmp_path / "a", again) == content
    assert "4 of 4 runs done, 0 to do" in said(again)
    assert table.strip() in said(again)


def test_text_end_to_end_in_a_terminal(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i} ababab\n" * 9)
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    experiment = replace(TOY, task="text", models=("osdn", "beta2"), data=(tmp_path,), num_pairs=24, seeds=1)
    experiment = replace(experiment, eval_lengths=(1, 2))
    content = run(tmp_path / "a", console, experiment)
    final = content["runs"][0]["final"]
    hits = final["hit_fraction"]
    assert final["loss"] == pytest.approx(hits * final["hit_loss"] + (1 - hits) * final["rest_loss"])
    assert final["by_length"]["16"] == {name: final[name] for name in final if name != "by_length"}
    assert final["by_length"]["32"]["loss"] != final["loss"]
    assert content["data"]["sources"].startswith("11 file(s)")
    assert "AR-hit" in said(console)
    assert "6/6" in said(console)

    (tmp_path / "3.txt").write_text("something else\n" * 9)
    with pytest.raises(ValueError, match="a run of another config \\(data_sha256: "):
        run(tmp_path / "a", console, experiment)


def test_models_differ_in_the_mixer_alone():
    experiment = replace(TOY, models=("deltanet", "osdn-apf", "gdn", "os-gdn")).resolved()
    plain, apf, gdn, os_gdn = (dict(build(experiment, m, 3).named_parameters()) for m in experiment.models)
    for small, large in ((plain, apf), (plain, gdn), (gdn, os_gdn)):
        assert small.keys() < large.keys()
        assert all(torch.equal(p, large[name]) for name, p in small.items())
    assert {name.rpartition("attn.")[2] for name in apf.keys() - plain} == {
        "d0",
        "forget_proj.weight",
        "forget_proj.bias",
    }
    assert apf["model.layers.0.attn.d0"].eq(1).all()
    assert apf["model.layers.0.attn.forget_proj.bias"].eq(6.9).all()
    again = dict(build(experiment, "deltanet", 4).named_parameters())
    first, second = (f"model.layers.{i}.attn.q_proj.weight" for i in (0, 1))
    assert not torch.equal(plain[first], plain[second])
    assert not torch.equal(plain[first], again[first])


def test_variants():
    names = ("deltanet", "osdn[feedback=beta_aware,d_init=0|1]", "gdn[head_dim=4|8]")
    resolved = Experiment(models=names).resolved()
    assert resolved.models == (
        "deltanet",
        "osdn[d_init=0,feedback=beta_aware]",
        "osdn[d_init=1,feedback=beta_aware]",
        "gdn[head_dim=4]",
        "gdn[head_dim=8]",
    )
    assert resolved == resolved.resolved()
    one = training.model_config(TOY, resolved.models[2])
    preset = training.model_config(TOY, "osdn")
    assert one.preconditioner == preset.preconditioner | {"d_init": 1.0, "feedback": "beta_aware"}
    assert [training.model_config(TOY, m).head_dim for m in resolved.models] == [8, 8, 8, 4, 8]
    learned = training.model_config(TOY, "osdn[d_max=null,learn_d_init=True]").preconditioner
    assert (learned["d_max"], learned["learn_d_init"]) == (None, True)
    assert training.model_config(TOY, "os-gdn[state_decay=channel]").state_decay == "channel"


def test_the_grid_is_what_its_names_say():
    parts = Experiment().grid()
    sizes = {name: (part.seq_len, part.passes, part.seeds, part.steps) for name, part in parts.items()}
    assert sizes == {"1-pass": (128, 1, 5, 600), "2-passes": (192, 2, 5, 600)}
    for part in parts.values():
        assert part.resolved().eval_pairs == (4, 8, 16, 24, 32)
    rules = {name: training.model_config(Experiment(), name) for name in parts["1-pass"].models}
    assert len(rules) == 13
    seen = [config.to_dict() for config in rules.values()]
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    online = [rule.preconditioner for rule in rules.values() if rule.preconditioner and rule.preconditioner["eta"]]
    choices = {(p["feedback"], p["forget"], p["d_init"]) for p in online}
    assert len(choices) == len(online) == 8
    assert {(p["eta"], p["d_min"], p["d_max"], p["normalize_step"]) for p in online} == {(1.0, 0.0, 2.0, False)}
    # Each differs from the paper's rule of its kind in what its name says, so that a difference has one cause.
    assert {p["learn_d_init"] for p in online if p["d_init"] == 1} == {True}
    given = Experiment(models=("osdn", "beta2"), seeds=3, seq_len=32).grid()["2-passes"]
    assert (given.models, given.seeds, given.seq_len) == (("osdn", "beta2"), 3, 48)


def test_a_grid_is_resumed_elsewhere(tmp_path, console, monkeypatch):
    experiment = replace(TOY, models=("osdn", "beta2"), seeds=1)
    calls = []

    def killed(job, *rest):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(job, *rest)

    monkeypatch.setattr(runner, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        grid(experiment, out=tmp_path / "here", workers=0, console=console)
    monkeypatch.setattr(runner, "train", train)
    (tmp_path / "here").rename(tmp_path / "there")
    contents = grid(experiment, out=tmp_path / "there", workers=0, console=console)
    assert "1-pass: 2 of 2 runs done, 0 to do" in said(console)
    assert contents.keys() == {"1-pass", "2-passes"}
    tables = (tmp_path / "there" / "grid.md").read_text()
    assert tables.count(" than beta2, by an interval") == 2 * 3  # the control, not the first
    assert "pairs listed twice, T = 24" in tables
    final = contents["2-passes"]["runs"][0]["final"]
    assert final["by_length"].keys() == {"48", "96", "192"}
    model = build(experiment.grid()["2-passes"].resolved(), "osdn", 0)
    model.load_state_dict(torch.load(tmp_path / "there" / "2-passes" / "jobs" / "osdn-seed0.pt")["model"])
    ids, labels = MQAR(2, 96, 20, passes=2).batch(2, seed=0, split="test")  # 8 / 4 sequences
    losses, _ = training.token_losses(model, ids, labels)
    assert final["by_length"]["96"]["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_a_failure_in_one_setting_does_not_stop_the_other(tmp_path, console, monkeypatch):
    def crash(experiment, name, seed):
        if experiment.passes == 1:
            raise ZeroDivisionError("one over nothing")
        return build(experiment, name, seed)

    monkeypatch.setattr(training, "build", crash)
    with pytest.raises(RunError, match=r"^1 of 1 runs failed, first deltanet, seed 0: ZeroDivisionError"):
        grid(replace(TOY, models=("deltanet",), seeds=1), out=tmp_path, workers=0, console=console)
    assert (tmp_path / "2-passes" / "table.md").exists()
    assert not (tmp_path / "grid.md").exists()


def test_results_say_where_they_were_made(tmp_path, console, monkeypatch):
    job = a_job(tmp_path)
    stops = iter([False] * 2 + [True])
    train(job, ignore, lambda: next(stops))
    elsewhere = training.provenance() | {"device": "another", "commit": None}
    monkeypatch.setattr(training, "provenance", lambda: elsewhere)
    stops = iter([False, True])
    train(job, ignore, lambda: next(stops))
    train(job, ignore, never)
    origin = read_json(job.result, set(), print)["origin"]
    assert [(part["from_step"], part["device"] == "another") for part in origin] == [(0, False), (3, True)]
    content = run(tmp_path, console, ONE)
    assert "another, python" in content["remarks"][-1]
    assert "no commit known" in content["remarks"][-1]


def test_the_box_is_the_same_for_all():
    boxes = [training.model_config(TOY, m).preconditioner["d_max"] for m in ("osdn", "osdn-apf", "os-gdn-paper")]
    assert boxes == [2.0, 2.0, 2.0]
    assert training.model_config(replace(TOY, d_max=None), "osdn-apf").preconditioner["d_max"] is None
    assert training.model_config(TOY, "gdn").preconditioner is None
    assert training.model_config(TOY, "osdn[d_max=3]").preconditioner["d_max"] == 3.0


def test_what_is_decayed():
    model = build(replace(TOY, models=("os-gdn",)).resolved(), "os-gdn", 0)
    model.model.layers[0].attn.register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))
    decayed, others = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    kept = {names[id(p)].split("layers.0.")[-1] for p in others["params"] if "layers.1" not in names[id(p)]}
    norms = {"attn_norm.weight", "mlp_norm.weight", "attn.o_norm.weight", "model.norm.weight"}
    assert kept == norms | {"attn.d0", "attn.A_log", "attn.dt_bias", "attn.bias"}


def test_learning_rate():
    experiment = replace(TOY, steps=100, warmup_steps=2, lr=1.0)
    rates = [learning_rate(experiment, step) for step in range(100)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[80] == 1.0
    assert rates[90] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.145)


def test_resume_is_bitwise(tmp_path):
    whole, parts = a_job(tmp_path / "whole"), a_job(tmp_path / "parts")
    assert train(whole, ignore, never)
    stops = iter([False, False, False, True])  # after step 4, one behind an evaluation
    assert not train(parts, ignore, lambda: next(stops))
    seen = []
    assert train(parts, lambda *event: seen.append(event[1]), never)
    assert seen == [4, 5, 6]
    one, other = (json.loads(job.result.read_text()) for job in (whole, parts))
    assert all(one[name] == other[name] for name in ("losses", "history", "final", "residual"))
    one, other = (torch.load(job.checkpoint, weights_only=True)["model"] for job in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_config_is_refused_by_its_fields(tmp_path, console):
    run(tmp_path, console, ONE)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.json")}
    with pytest.raises(ValueError, match=r"a run of another config \(lr: 0.003 there, 0.1 here; clip: 1.0 there"):
        run(tmp_path, console, replace(ONE, lr=0.1, clip=2.0))
    assert before == {f: f.read_bytes() for f in tmp_path.rglob("*.json")}


@pytest.mark.parametrize(
    "files",
    [
        {"results.json": "[1]"},
        {"results.json": '{"date": "of a theory run"}', "table.md": "x"},
        {"table.md": "x", "notes.txt": "x"},
        {"figure.png": "x", "config.json": "[]"},
        {"1-pass/table.md": "x"},
        {"grid.md": "x"},
    ],
)
def test_what_no_run_wrote_is_not_replaced(files, tmp_path, console, monkeypatch):
    monkeypatch.setattr(runner, "train", None)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    command = grid if {"grid.md", "1-pass/table.md"} & files.keys() else compare
    with pytest.raises(ValueError, match=r"^out: got \S+, which holds (\w+\.\w+(, )?)+ of another origin(;|,) takes"):
        command(ONE, out=tmp_path, console=console, workers=0)
    assert {str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("*") if f.is_file()} == files


def test_a_directory_with_other_files_is_taken_and_known_without_its_config(tmp_path, console):
    (tmp_path / "notes.txt").write_text("kept")
    run(tmp_path, console, ONE)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"a run of another config \(lr: 0.003 there, 0.1 here\)"):
        run(tmp_path, console, replace(ONE, lr=0.1))
    run(tmp_path, console, ONE)
    assert "1 of 1 runs done, 0 to do" in said(console)
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_directory_in_which_another_works_is_refused(tmp_path, console, monkeypatch):
    with (
        claim(tmp_path, {}, print),
        pytest.raises(RunError, match="another process works there; wait for its end, or take another path"),
    ):
        run(tmp_path, console, ONE)
    (tmp_path / "config.json").unlink()
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=NotImplementedError("no flock")))
    run(tmp_path, console, ONE)
    assert f"note: {tmp_path} cannot be locked (no flock)" in said(console)


def test_a_full_disk_leaves_what_was_there(tmp_path, console, monkeypatch):
    real, writes = os.fsync, []

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) > 6:  # config; checkpoint, result of each of two runs, then no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("osdn.runs.store.os.fsync", fsync)
    with pytest.raises(RunError, match=r"2 of 4 runs failed, first .*No space left on device.*the same command"):
        run(tmp_path, console)
    assert "Traceback" not in said(console)
    files = {f.relative_to(tmp_path).as_posix(): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    kept = {"config.json", *(f"jobs/{model}-seed0.{kind}" for model in TOY.models for kind in ("json", "pt"))}
    assert kept <= files.keys()
    assert not [name for name in files if ".part" in name]
    monkeypatch.setattr("osdn.runs.store.os.fsync", real)
    run(tmp_path, console)
    assert all((tmp_path / name).read_bytes() == files[name] for name in kept)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "other config"])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage):
    job = a_job(tmp_path)
    stops = iter([False] * 3 + [True])
    train(job, ignore, lambda: next(stops))
    assert previous(job.checkpoint).exists()
    content = job.checkpoint.read_bytes()
    if damage == "truncated":
        job.checkpoint.write_bytes(content[:-700])
    elif damage == "overwritten":
        job.checkpoint.write_bytes(b"\xff" * len(content))
    else:
        torch.save(torch.load(job.checkpoint, weights_only=True) | {"stamp": "another"}, job.checkpoint)
    damaged = job.checkpoint.read_bytes()
    events = []
    assert train(job, lambda *event: events.append(event), never)
    assert "set aside as osdn-apf-seed0.pt.damaged-1" in events[0][1]
    assert events[1][:2] == ("step", 2)  # the checkpoint before
    assert job.checkpoint.with_name("osdn-apf-seed0.pt.damaged-1").read_bytes() == damaged
    whole = a_job(tmp_path / "whole")
    train(whole, ignore, never)
    assert json.loads(job.result.read_text())["losses"] == json.loads(whole.result.read_text())["losses"]


@pytest.mark.parametrize(("field", "value"), [("stamp", "another"), ("model", "deltanet"), ("seed", 1)])
def test_a_result_of_another_run_is_not_taken(field, value, tmp_path, console):
    """As when jobs/ was copied from a run of other steps."""
    first = run(tmp_path, console, ONE)
    result = tmp_path / "jobs" / "osdn-apf-seed0.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {field: value, "losses": [9.0]}))
    second = run(tmp_path, console, ONE)
    assert f"(it belongs to another {field}); set aside as osdn-apf-seed0.json.damaged-1" in said(console)
    assert second["runs"][0]["losses"] == first["runs"][0]["losses"]


def test_a_damaged_result_is_made_again(tmp_path, console):
    first = run(tmp_path, console, ONE)
    result = tmp_path / "jobs" / "osdn-apf-seed0.json"
    damaged = result.read_bytes()[:-99]
    result.write_bytes(damaged)
    second = run(tmp_path, console, ONE)
    assert "set aside as osdn-apf-seed0.json.damaged-1" in said(console)
    assert result.with_name("osdn-apf-seed0.json.damaged-1").read_bytes() == damaged
    assert [first["runs"][0][k] for k in ("losses", "final")] == [second["runs"][0][k] for k in ("losses", "final")]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b'{"b": 1}', b"\xff\xfe"])
def test_what_is_no_result_is_set_aside(tmp_path, content):
    for number in (1, 2):
        (tmp_path / "x.json").write_bytes(content)
        notes = []
        assert read_json(tmp_path / "x.json", {"a"}, notes.append) is None
        assert f"set aside as x.json.damaged-{number}" in notes[0]
        assert not (tmp_path / "x.json").exists()
    assert read_json(tmp_path / "x.json", {"a"}, notes.append) is None
    assert len(notes) == 1


def test_one_crash_keeps_the_others(tmp_path, console, monkeypatch):
    def crash(experiment, name, seed):
        if (name, seed) == ("deltanet", 1):
            raise ZeroDivisionError("one over nothing")
        return build(experiment, name, seed)

    monkeypatch.setattr(training, "build", crash)
    with pytest.raises(RunError, match="1 of 4 runs failed, first deltanet, seed 1: ZeroDivisionError: one over"):
        run(tmp_path, console)
    assert "Traceback" in said(console)
    assert len(list((tmp_path / "jobs").glob("*.json"))) == 3


def test_a_loss_that_is_no_number_is_reported(tmp_path, console):
    with pytest.raises(RunError, match="the loss is nan at step 3; a smaller --lr may help"):
        run(tmp_path, console, replace(ONE, lr=1e30, clip=1e30, warmup_steps=0))


class ThreadWorker:
    """Stands for a worker process."""

    exitcode = -9

    def __init__(self, target, connection):
        self.thread = threading.Thread(target=self.work, args=(target, connection))
        self.thread.start()

    def work(self, target, connection):
        target(connection)
        connection.close()

    def is_alive(self):
        return self.thread.is_alive()

    def join(self, timeout=None):
        self.thread.join(timeout)

    def terminate(self):
        assert not self.is_alive()


@pytest.fixture
def started(monkeypatch):
    """Targets of the workers that are started; the last one serves all later ones."""
    targets, workers, lock = [runner._worker], [], threading.Lock()

    def one_at_a_time(*arguments):  # threads share torch's random state
        with lock:
            return train(*arguments)

    monkeypatch.setattr(runner, "train", one_at_a_time)

    def start():
        here, there = Pipe()
        workers.append(ThreadWorker(targets[min(len(workers), len(targets) - 1)], there))
        return here, workers[-1]

    monkeypatch.setattr(runner, "_start_worker", start)
    return targets, workers


def test_workers_share_the_jobs(tmp_path, console, started):
    content = run(tmp_path / "a", console, workers=2)
    alone = run(tmp_path / "b", console)
    assert [r["losses"] for r in content["runs"]] == [r["losses"] for r in alone["runs"]]
    assert len(started[1]) == 2
    assert not any(worker.is_alive() for worker in started[1])


def test_a_worker_that_dies_loses_one_run(tmp_path, console, started):
    started[0].insert(0, lambda connection: connection.recv())
    with pytest.raises(
        RunError, match="1 of 4 runs failed, first deltanet, seed 0: its worker process ended with exit"
    ):
        run(tmp_path, console, workers=2)
    assert len(list((tmp_path / "jobs").glob("*.json"))) == 3


def test_an_interrupt_stops_workers_at_a_checkpoint(tmp_path, started):
    jobs = [a_job(tmp_path / name, every=100) for name in "ab"]

    def listen(_, event):
        if event[:2] == ("step", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_jobs(jobs, 2, listen)
    assert not any(worker.is_alive() for worker in started[1])
    assert any(job.checkpoint.exists() for job in jobs)


def test_an_interrupt_behind_the_last_checkpoint_stops_the_jobs_to_come(tmp_path):
    """In the last step or the evaluation at the end, where the job itself is finished."""
    jobs, events = [a_job(tmp_path / name, every=100) for name in "ab"], []
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs the tests in the background

    def listen(job, event):
        events.append((job, event))
        if event[:2] == ("step", ONE.steps):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        runner.run_jobs(jobs, 1, listen)
    assert events[-1] == (jobs[0], ("done",))
    assert jobs[0].result.exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_shell(tmp_path):
    """The real thing: a process of its own, worker processes, SIGINT to the whole group."""
    experiment = replace(TOY, models=("deltanet",), steps=1000, eval_every=1000)
    names = ("steps", "batch_size", "seq_len", "num_pairs", "vocab_size", "hidden_size", "head_dim")
    names += ("eval_every", "eval_sequences", "warmup_steps")
    flags = [f"--{name.replace('_', '-')}={getattr(experiment, name)}" for name in names]
    flags += ["--models", "deltanet", "--checkpoint-every=5", f"--out={tmp_path / 'a'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "osdn.cli", "compare", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 120
    while len(list(tmp_path.glob("a/jobs/*.pt"))) < 2 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err == "osdn: interrupted; the same command goes on from the last checkpoints\n"
    state = torch.load(tmp_path / "a" / "jobs" / "deltanet-seed1.pt", weights_only=True)
    assert 5 <= state["step"] < 1000

    short = a_job(tmp_path / "b", replace(experiment, seeds=2).resolved(), every=100)
    stops = iter([False] * (state["step"] - 1) + [True])
    train(replace(short, seed=1), ignore, lambda: next(stops))
    assert torch.load(tmp_path / "b" / "jobs" / "deltanet-seed1.pt", weights_only=True)["losses"] == state["losses"]
    assert Path(tmp_path / "a" / "config.json").exists()


def test_refusals_of_the_experiment():
    for fields, message in (
        ({"seeds": -1}, "seeds: got -1, takes a number >= 0"),
        ({"eval_lengths": (2, 0)}, "eval_lengths: got 2 0, takes ints >= 1"),
        ({"eval_pairs": (0, 4)}, "eval_pairs: got 0 4, takes ints >= 1"),
        ({"steps": -1}, "steps: got -1, takes a number >= 0"),
        ({"lr": 0.0}, "lr: got 0.0, takes a finite float > 0"),
        ({"lr": float("inf")}, "lr: got inf, takes a finite float > 0"),
        ({"weight_decay": float("nan")}, "weight_decay: got nan, takes a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Experiment(**fields).resolved()
    with pytest.raises(ValueError, match="models: got osdn osdn, takes different names"):
        Experiment(models=("osdn", "osdn")).resolved()


def test_more_passes_lengthen_the_sequence():
    assert Experiment().resolved().seq_len == 128
    assert Experiment(passes=2).resolved().seq_len == 176
    assert Experiment(passes=2).resolved().eval_pairs == (4, 8, 16, 24)


def test_pairs_without_tokens_of_their_own_are_not_evaluated(tmp_path, console):
    content = run(tmp_path, console, replace(ONE, vocab_size=12, eval_pairs=(2, 4, 5, 6), seq_len=32))
    assert content["runs"][0]["final"]["by_pairs"].keys() == {"2", "4", "5"}
