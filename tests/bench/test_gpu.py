"""The GPU suite on the CPU: the chunked backend on tiny shapes, and a clock that says what it is told."""

import dataclasses
import json
import math
import sys
import time

import pytest
import torch

from osdn.bench import __main__ as bench
from osdn.bench import bars, gpu
from osdn.bench.cases import SUITES, Shape, check_claim, compare, gate, gpu_cases, osdn_run
from osdn.bench.device import Device
from osdn.bench.measure import MODES
from osdn.bench.report import add

GPU = SUITES["gpu"]
FORWARD, BOTH = MODES
LONG, MANY = Shape(1, 128, 2, 16, 16), Shape(3, 1, 2, 16, 16, state=True)
SECONDS = {"osdn": 2e-3, "osdn-plain": 1.92e-3, "osdn-clips": 9e-3, "fla-deltanet": 4e-3}


def peer(case, run):
    """Ours in place of a package that is not here; `torch` is what has to be installed."""
    return dataclasses.replace(case, run=run, function="torch." + case.function, tuning=0.0)


def plain(x):
    return osdn_run(None)(x)[:1]


def suite(**runs):
    """With other implementations by name, "_" for "-"."""
    runs = {name.replace("_", "-"): run for name, run in runs.items()}
    cases = [case for case in gpu_cases("chunked") if not case.function]
    cases = [dataclasses.replace(case, run=runs.get(case.name, case.run)) for case in cases]
    peers = [peer(case, runs[case.name]) if case.name in runs else case for case in GPU.cases if case.function]
    return dataclasses.replace(
        GPU,
        device="cpu",
        cases=(*cases, *peers),
        shapes={"long": LONG, "packed": dataclasses.replace(LONG, packed=(64, 64)), "decode": MANY},
        gates=(Shape(2, 20, 1, 16, 16, state=True), Shape(1, 24, 1, 16, 16, packed=(1, 23), state=True)),
        step_gates=(Shape(2, 3, 1, 16, 16, state=True),),
    )


class Fake(Device):
    """Every call takes what SECONDS says of its case, and a tenth of that on the host."""

    cases = ()

    def clock(self, call):
        call()
        run = getattr(call, "args", (None,))[0]
        seconds = next((SECONDS.get(case.name, 1e-3) for case in self.cases if case.run is run), 1e-3)
        return seconds, seconds / 10

    def peak(self, call):
        call()
        return 3 << 20

    def kernels(self, call):
        call()
        return [("a_kernel", 1.0)]

    def in_a_row(self, calls, repeats):
        for call in calls:
            call()
        return [1e-6] * repeats


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command on a suite with a user's arguments; returns the result and its tables, as written."""

    def run(measured, *arguments):
        monkeypatch.setitem(SUITES, "gpu", measured)
        monkeypatch.setattr(gpu, "Device", Fake)
        monkeypatch.setattr(Fake, "cases", measured.cases)
        monkeypatch.setenv("FLA_FLASH_QLA", "0")
        monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--repeats", "3", "--out", str(tmp_path)])
        bench.main()
        (path,) = tmp_path.glob("*.json")
        result, tables = json.loads(path.read_text()), path.with_suffix(".md").read_text()
        printed = capsys.readouterr().out
        assert printed.startswith(bars.verdicts(result))
        assert tables == bars.markdown(result)
        return result, tables

    return run


def only_run(result):
    (run,) = result["runs"]
    return run


def test_a_run_measures_gates_and_reports(command):
    result, tables = command(suite(fla_deltanet=plain), "--suite", "gpu", "--decays", "none", "--commit", "abc")
    run = only_run(result)
    assert {"date", "device", "versions", "environment", "config", "ceilings", "tolerances", "seconds"} < set(run)
    assert (run["commit"], run["red"], run["environment"]["FLA_FLASH_QLA"]) == ("abc", {}, "0")
    assert run["tolerances"] == {"*": 2e-2, "d_T": 1e-3, "dforget, osdn-clips": 5e-2}
    assert set(run["gate"]["osdn, none"]) == {
        "o",
        "S_T",
        "d_T",
        *(f"d{n}" for n in ("q", "k", "v", "beta", "d", "S")),
    } | {"dforget"}
    assert set(run["gate"]["osdn-step, none"]) == {"o", "S_T", "d_T"}
    assert run["gate"]["osdn-clips, packed"]["chunks_clipped"] == 1
    assert run["gate"]["osdn, long"]["chunks_clipped"] == 0
    assert [entry["shape"] for entry in run["entries"]] == ["long", "packed", "decode"]
    long, _, decode = run["entries"]
    assert list(long["contestants"]) == ["osdn", "osdn-plain", "osdn-clips", "fla-deltanet"]
    assert list(decode["contestants"]) == ["osdn-step", "osdn-step-plain"]
    of_peer = long["contestants"]["fla-deltanet"]
    assert of_peer["times"][FORWARD] == {"median": 4e-3, "p10": 4e-3, "p90": 4e-3, "samples": [4e-3] * 3, "host": 4e-4}
    assert (of_peer["peak"], of_peer["kernels"]) == ({FORWARD: 3 << 20, BOTH: 3 << 20}, [["a_kernel", 1.0]])
    assert max(of_peer["differs"].values()) == 0
    assert len(of_peer["differs"]) == 7
    assert (
        "| OSDN over FLA DeltaNet, forward | <= 1.15 | <= 0.6 | 0.50 | aim met | long 0.50 (1), packed 0.50 (1) |"
        in tables
    )
    assert "share of forward+backward, decay none | <= 0.12 | <= 0.05 | 0.04 | aim met |" in tables
    assert "| gated OSDN over FLA GDN, forward | <= 1.15 | <= 0.8 |  | open | long not measured, packed not" in tables
    assert "| none | long | osdn | 2 | 1.00 | 0.2 |" in tables
    assert "| none | long | fla-deltanet | 4 | 0.50 | 0.4 |" in tables
    assert "- fla-deltanet, decay none, ran `a_kernel`" in tables


def test_runs_of_a_day_go_into_one_file_and_choose_what_they_measure(command, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "datetime", clock := Clock())
    measured = suite(fla_deltanet=plain)
    command(measured, "--suite", "gpu", "--shapes", "l*", "--decays", "none", "scalar", "--only", "osdn", "osdn-s*")
    clock.now = "2031-05-06T08:00:00+00:00"
    result, _ = command(measured, "--suite", "gpu", "--only", "fla*", "--decays", "none", "--shapes", "long")
    first, second = result["runs"]
    assert [(entry["decay"], list(entry["contestants"])) for entry in first["entries"]] == [
        ("none", ["osdn"]),
        ("scalar", ["osdn"]),
    ]
    assert [list(entry["contestants"]) for entry in second["entries"]] == [["fla-deltanet"]]
    # Times of ours and of the peer, but of different runs: no ratio.
    assert bars.BARS[0].judge(result)[0] == "open"
    (path,) = tmp_path.glob("*.json")
    before = path.read_text()
    assert path.stem.endswith("_2031-05-06")
    again, tables = command(measured, "--merge", str(path))
    assert (again, path.read_text()) == (result, before)
    assert tables == bars.markdown(again)


class Clock:
    """Stands in for the module datetime."""

    UTC = None
    now = "2031-05-06T07:00:00+00:00"

    @property
    def datetime(self):
        clock = self

        class Now:
            @staticmethod
            def now(_):
                return Now()

            def isoformat(self, **_):
                return clock.now

        return Now


def wrong(x):
    o, S, d = gpu_cases("chunked")[0].run(x)
    return o, S, d * 1.01


def test_a_red_case_is_not_timed_and_fails_the_command(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"red gate, no times are reported of: osdn, none$"):
        command(suite(osdn=wrong, fla_deltanet=plain), "--suite", "gpu", "--decays", "none", "--shapes", "long")
    (path,) = tmp_path.glob("*.json")
    run = only_run(json.loads(path.read_text()))
    (entry,) = run["entries"]
    assert list(entry["contestants"]) == ["osdn-plain", "osdn-clips", "fla-deltanet"]
    assert entry["left_out"] == {"osdn": "red"}
    assert "d_T" in run["red"]["osdn, none"]
    assert "RED osdn, none: RedGateError" in path.with_suffix(".md").read_text()
    assert "RED: osdn, none: RedGateError" in capsys.readouterr().err


def test_a_case_whose_inputs_are_not_what_it_claims_is_red(command, tmp_path):
    measured = suite()
    cases = tuple(dataclasses.replace(case, claim=1.0) if case.name == "osdn" else case for case in measured.cases)
    with pytest.raises(SystemExit, match="osdn, long"):
        command(dataclasses.replace(measured, cases=cases), "--suite", "gpu", "--only", "osdn", "--shapes", "long")
    (path,) = tmp_path.glob("*.json")
    assert all(not entry["contestants"] for entry in only_run(json.loads(path.read_text()))["entries"])


def test_a_case_that_fails_on_a_real_shape_is_red_and_its_peers_are_not_called(command, tmp_path):
    ours = gpu_cases("chunked")[0].run

    def fails(x):
        if x.q.shape[1] == LONG.T:
            raise RuntimeError("out of memory")
        return ours(x)

    with pytest.raises(SystemExit, match="osdn, long, none"):
        command(
            suite(osdn=fails, fla_deltanet=wrong),
            *("--suite", "gpu", "--only", "osdn", "fla-deltanet", "--shapes", "long", "--decays", "none"),
        )
    (path,) = tmp_path.glob("*.json")
    (entry,) = only_run(json.loads(path.read_text()))["entries"]
    assert (entry["contestants"], entry["left_out"]) == (
        {},
        {"osdn": "red", "fla-deltanet": "nothing to compare it with"},
    )


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        raise NotImplementedError("not on\nthis device")


def test_peers_may_refuse_or_be_missing(command):
    def no_backward(x):
        return (Refuses.apply(plain(x)[0]),)

    result, tables = command(
        suite(fla_gdn=no_backward),
        *("--suite", "gpu", "--shapes", "long", "--decays", "scalar", "--only", "osdn"),
        *("osdn-plain", "fla-gdn", "fla-precond-gdn"),
    )
    (entry,) = only_run(result)["entries"]
    refused = {name: x["refused"] for name, x in entry["contestants"].items()}
    assert refused == {"osdn": {}, "osdn-plain": {}, "fla-gdn": {BOTH: "NotImplementedError: not on this device"}}
    assert list(entry["contestants"]["fla-gdn"]["times"]) == [FORWARD]
    assert "do" not in entry["contestants"]["fla-gdn"]["differs"]
    assert entry["left_out"] == {"fla-precond-gdn": "fla is not installed"}
    assert (
        "- fla-gdn, decay scalar, refused forward+backward: NotImplementedError: not on this device; on long" in tables
    )
    assert "- fla-precond-gdn, decay scalar, left out: fla is not installed; on long" in tables


def test_a_slow_peer_is_stopped_and_ours_is_not(command):
    def slow(_):
        time.sleep(5)
        raise RuntimeError("it came to its end")

    result, _ = command(
        suite(flashqla_gdn=slow),
        *("--suite", "gpu", "--shapes", "long", "--decays", "scalar", "--only", "osdn", "flashqla-gdn"),
        *("--peer-limit", "0.05"),
    )
    (entry,) = only_run(result)["entries"]
    refused = {name: x["refused"] for name, x in entry["contestants"].items()}
    message = "TimeoutError: its first calls took more than 0.05 s"
    assert refused == {"osdn": {}, "flashqla-gdn": {FORWARD: message, BOTH: message}}


def test_nothing_is_started_that_would_not_end_in_time(command):
    measured = suite(fla_deltanet=plain)
    late = tuple(dataclasses.replace(c, tuning=1e4) if c.name == "fla-deltanet" else c for c in measured.cases)
    arguments = ("--suite", "gpu", "--decays", "none", "--only", "osdn", "fla-deltanet", "--shapes", "long", "packed")
    result, _ = command(dataclasses.replace(measured, cases=late), *arguments, "--limit", "1000")
    for entry in only_run(result)["entries"]:
        assert "10000 s" in entry["left_out"]["fla-deltanet"]
    result, tables = command(measured, *arguments, "--limit", "0")
    assert "before long, decay none: 0 s had passed" in result["runs"][-1]["stopped"]
    assert "Stopped before long" in tables


def test_peers_are_tuned_at_each_shape(command):
    triton = pytest.importorskip("triton")

    def tuner(package):
        def kernel(x):
            """Never compiled."""

        kernel.__module__ = f"{package}.ops"
        return triton.autotune([triton.Config({})], key=["x"])(triton.jit(kernel))

    theirs, other = tuner("torch"), tuner("torchvision")
    found = []

    def first(x):
        found.append(("long" if x.cu_seqlens is None else "packed", list(theirs.cache), list(other.cache)))
        for kernel in (theirs, other):
            kernel.cache["tuned"] = kernel.configs[0]
        return plain(x)

    arguments = ("--suite", "gpu", "--decays", "scalar", "--only", "osdn", "fla-*gdn", "--shapes", "long", "packed")
    command(suite(fla_gdn=first, fla_precond_gdn=plain), *arguments)
    untuned = [shape for shape, theirs, _ in found if not theirs]
    assert untuned == ["long", "packed"]  # once each: a second peer of the package does not undo the first one's
    assert next(other for shape, _, other in found if shape == "packed") == ["tuned"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--suite", "gpu", "--shapes", "b9"), "--shapes: got 'b9', takes long, packed, decode"),
        (("--suite", "gpu", "--decays", "none", "half"), "--decays: got 'half', takes none, scalar, channel"),
        (("--suite", "gpu", "--only", "fla"), "--only: got 'fla', takes osdn, "),
        (("--limit", "3"), "belong to --suite gpu"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(command, capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        command(suite(), *arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_without_a_gpu_it_says_so(command, capsys):
    with pytest.raises(SystemExit):
        command(GPU, "--suite", "gpu")
    assert "needs a CUDA device" in capsys.readouterr().err


def made_up(*runs, date="2031-05-06T07:00:00+00:00"):
    """A result whose runs took these seconds: {(shape, decay, contestant): (forward, both) or a step}."""
    shapes = {name: dataclasses.asdict(shape) for name, shape in GPU.shapes.items()}
    made = []
    for n, times in enumerate(runs):
        entries = {}
        for (shape, decay, who), seconds in times.items():
            modes = MODES if isinstance(seconds, tuple) else ("rotated",)
            seconds = seconds if isinstance(seconds, tuple) else (seconds,)
            entry = entries.setdefault((shape, decay), {"shape": shape, "decay": decay, "contestants": {}})
            entry["contestants"][who] = {
                "times": {mode: {"median": t} for mode, t in zip(modes, seconds)},
                "bytes": {"rotated": 300.0},
                "kept": 100.0 * seconds[0],
            }
        made.append(
            {
                "date": date.replace("07", f"{10 + n}", 1),
                "device": "Some GPU",
                "config": {"quick": False},
                "ceilings": {"copy_bytes_per_second": 100.0},
                "shapes": shapes,
                "entries": list(entries.values()),
            }
        )
    return {"device": "Some GPU", "runs": made}


def verdict(what, result):
    (bar,) = (bar for bar in bars.BARS if bar.what == what)
    return bar.judge(result)


LONG_SHAPES = [name for name, shape in GPU.shapes.items() if shape.T > 1]


@pytest.mark.parametrize(
    ("forward", "both", "said"),
    [
        (1.0, 0.5, ("met", "aim met", "met")),
        (1.15, 1.10, ("met", "met", "met")),
        (1.2, 1.11, ("missed", "missed", "missed")),
    ],
)
def test_verdicts_over_a_peer(forward, both, said):
    times = {(shape, "none", "fla-deltanet"): (1.0, 1.0) for shape in LONG_SHAPES}
    ours = {(shape, "none", "osdn"): (0.5, 0.5) for shape in LONG_SHAPES}
    result = made_up(times | ours | {("b1-t8192-h16", "none", "osdn"): (forward, both)})
    names = (
        f"OSDN over FLA DeltaNet, {FORWARD}",
        f"OSDN over FLA DeltaNet, {BOTH}",
        "saved activations over FLA DeltaNet's",
    )
    found = [verdict(name, result) for name in names]
    assert found[0][1]["b1-t8192-h16"] == (forward, 1)
    assert (found[0][0], found[1][0]) == said[:2]
    assert found[2][0] == ("missed" if said[2] == "missed" else "aim met")
    # A shape that was not measured leaves it open, unless another one misses it already.
    del result["runs"][0]["entries"][0]
    assert verdict(names[1], result)[0] == ("missed" if said[1] == "missed" else "open")
    assert verdict(names[1], result)[2] == [LONG_SHAPES[0]]


def test_a_later_run_counts_and_no_ratio_spans_two():
    ours, theirs = ("b8-t4096-h8", "scalar", "osdn"), ("b8-t4096-h8", "scalar", "fla-gdn")
    result = made_up(
        {ours: (1, 1), theirs: (1, 1)}, {ours: (5, 5)}, {ours: (1, 3), theirs: (2, 1)}, {theirs: (0.1, 0.1)}
    )
    assert verdict(f"gated OSDN over FLA GDN, {FORWARD}", result)[1] == {"b8-t4096-h8": (0.5, 3)}
    assert verdict(f"gated OSDN over FLA GDN, {BOTH}", result)[:2] == ("missed", {"b8-t4096-h8": (3, 3)})


def test_verdicts_within_ours():
    shapes = {(s, "channel", w): (9, t) for s in LONG_SHAPES for w, t in (("osdn", 10.0), ("osdn-plain", 9.0))}
    steps = {("decode-b1", "channel", "osdn-step"): 100.0}
    steps |= {(f"decode-b{B}", "channel", "osdn-step"): t for B, t in ((64, 3.0), (256, 300 / 80))}
    long = {("b8-t4096-h8", "channel", w): (9, t) for w, t in (("osdn", 20.0), ("osdn-plain", 18.0))}
    long |= {("b1-t65536-h8", "channel", "osdn"): (9, 12.0)}
    result = made_up(shapes | steps | long)
    said, values, _ = verdict(f"preconditioner's share of {BOTH}, decay channel", result)
    assert said == "missed"
    assert values["b1-t65536-h8"][0] == 0.25
    assert values["b8-t4096-h8"][0] == pytest.approx(0.1)
    said, values, _ = verdict("decode, state bytes / time over copy, decay channel", result)
    assert (said, set(values)) == ("met", {"decode-b64", "decode-b256"})
    assert values["decode-b256"][0] == pytest.approx(0.8)
    assert verdict(f"T 4096 -> 65,536, {BOTH}, decay channel", result)[:2] == ("met", {"b1-t65536-h8": (1.2, 1)})
    assert verdict(f"T 4096 -> 65,536, {BOTH}, decay none", result)[0] == "open"


def test_runs_are_added_once_by_day_and_device(tmp_path):
    first, second = made_up({}, {})["runs"]
    path, _ = add([second], tmp_path)
    _, result = add([first, {**second, "red": {"x": "later"}}], tmp_path)
    assert path.name == "some-gpu_2031-05-06.json"
    assert result == json.loads(path.read_text())
    assert [run.get("red") for run in result["runs"]] == [None, {"x": "later"}]
    assert list(tmp_path.iterdir()) == [path]
    for other in ({"device": "Another"}, {"date": "2031-05-07T01:00:00+00:00"}, {"config": {"quick": True}}):
        with pytest.raises(ValueError, match="one device and day"):
            add([first, {**second, **other}], tmp_path)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_inputs_of_the_gpu_suite(decay):
    cpu = dataclasses.replace(GPU, device="cpu")
    shape = Shape(1, 256, 2, 128, 128, packed=(128, 128), state=True)
    x = cpu.inputs(shape, 0, decay)
    assert (x.d.shape, x.S.shape, x.cu_seqlens.tolist()) == ((2, 2, 128), (2, 2, 128, 128), [0, 128, 256])
    assert (x.q.dtype, x.beta.dtype, x.forget.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    if decay == "none":
        assert x.g is None
        assert check_claim(cpu.case("osdn"), x)["d_moved"] > 0.1
        check_claim(cpu.case("osdn-clips"), x)
    else:
        assert x.g.shape == ((1, 256, 2) if decay == "scalar" else (1, 256, 2, 128))
        assert float(x.g.detach().max()) < 0
        assert 0.2 < float(x.g.detach().mean().exp()) < 0.999


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("name", ["osdn", "osdn-plain", "osdn-step", "osdn-step-plain"])
def test_ours_pass_the_gate_and_mutants_do_not(name, decay):
    tiny = suite()
    case = tiny.case(name)
    gate(tiny, case, decay=decay)

    def ignores_g(x):
        return case.run(dataclasses.replace(x, g=None))

    def ignores_sequences(x):
        return case.run(dataclasses.replace(x, beta=x.beta * 0.9))

    mutants = [ignores_sequences, *([] if decay == "none" else [ignores_g])]
    for run in mutants:
        with pytest.raises(bench.RedGateError):
            gate(tiny, dataclasses.replace(case, run=run), decay=decay)


def test_errors_are_those_of_the_worst_sequence_and_head():
    want = {
        "o": torch.ones(1, 10, 2, 4),
        "dbeta": torch.ones(1, 10, 2),
        "S_T": torch.ones(2, 2, 3, 3),
        "dd": torch.zeros(2, 2, 3),
    }
    got = {name: y.clone() for name, y in want.items()}
    got["o"][0, 8:, 1] *= 1.5
    got["S_T"][1, 0] *= 0.75
    assert compare(got, want, packed=(8, 2)) == {"o": 0.5, "dbeta": 0.0, "S_T": 0.25, "dd": 0.0}
    # What is next to nothing counts against a tenth of the largest.
    want["dbeta"][0, 8:] = 1e-9
    got["dbeta"][0, 8:] = 0.1
    assert compare(got, want, packed=(8, 2))["dbeta"] == pytest.approx(0.1 * math.sqrt(2) / (0.1 * math.sqrt(8)))
    got["o"][0, 0, 0, 0] = torch.nan
    assert math.isnan(compare(got, want, packed=(8, 2))["o"])


def test_flop_bytes_and_ceilings():
    # Per token and head, in chunks of 64: q and k with w, and the solve, for K and V; then three products with S.
    assert gpu._flop(Shape(2, 70, 3, 16, 8)) == {FORWARD: 420 * 8960, BOTH: 3 * 420 * 8960}
    assert 2 * 64 * 16 * 3 + 2 * 64 * 8 * 2 + 3 * 2 * 16 * 8 == 8960
    assert gpu._flop(MANY)["rotated"] == 3 * 2 * 6 * 16 * 16
    x = suite().inputs(LONG, 0)
    tokens = 128 * 2
    vectors, gates, d = 2 * tokens * 16, 4 * tokens, 4 * 2 * 16
    osdn, plain_, *_ = gpu_cases("chunked")
    assert gpu._bytes(osdn, x)[FORWARD] == 4 * vectors + 2 * gates + d
    assert gpu._bytes(plain_, x) == {FORWARD: 4 * vectors + gates, BOTH: 11 * vectors + 3 * gates}
    y = suite().inputs(MANY, 0)
    assert gpu._bytes(suite().case("osdn-step"), y)["rotated"] == 2 * 4 * 3 * 2 * (16 * 16 + 16)

    class Slow(Device):
        def clock(self, call):
            call()
            return 2.0, 0.0

    assert Slow("cpu").ceilings() == {
        "copy_bytes_per_second": Device.COPIED,
        "matmul_flop_per_second": Device.MATMUL**3,
    }
