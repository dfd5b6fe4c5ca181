import copy
import io
import json
import re

import pytest
from rich.console import Console

from osdn.evals.report import Report, read_results, show


def metric(value, stderr=0.01, **more):
    return {"value": value, "stderr": stderr, "examples": 9, **more}


def result(task, metrics, model="one", kind="recall", **policy):
    return {
        "task": task,
        "kind": kind,
        "version": 1,
        "context_policy": {"window": 1000, **policy},
        "cut": {"documents": 3, "answers_lost": 0},
        "data": {"sha256": "d" * 64, "sources": "x"},
        "metrics": metrics,
        "checkpoint": {"name": model, "sha256": model * 9},
    }


def perplexity(model, *values):
    metrics = {"perplexity": metric(9.0), "loss": metric(2.2)}
    metrics |= {f"perplexity {i}-{i + 1}": metric(v, x=i + 0.5) for i, v in enumerate(values)}
    return result("perplexity", metrics, model, "perplexity")


RESULTS = [
    result("fda", {"contains": metric(0.25)}),
    result("fda_twice", {"contains": metric(0.5, None)}),
    result("fda", {"contains": metric(0.75)}, "two"),
    perplexity("one", 8.0, 12345.678),
    perplexity("two", 7.0, 6.0),
]


def test_tables():
    report = Report(RESULTS)
    assert report.table("recall") == (
        ["recall", "one", "two"],
        [["fda contains", "0.25 ± 0.01", "0.75 ± 0.01"], ["fda_twice contains", "0.5", ""]],
    )
    header, rows = report.table("perplexity")
    assert header == ["perplexity", "one", "two"]
    assert rows[-1] == ["perplexity 1-2", "1.235e+04 ± 0.01", "6 ± 0.01"]
    assert "fda, version 1, one: window 1000; cut: documents 3." in report.markdown()
    assert "| fda contains | 0.25 ± 0.01 | 0.75 ± 0.01 |" in report.markdown()
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    report.print(console)
    assert "0.75 ± 0.01" in console.file.getvalue()


def test_dtypes_are_told_where_they_differ():
    results = [copy.deepcopy(RESULTS[i]) for i in (0, 0, 2)]
    results[0]["checkpoint"]["dtype"] = results[2]["checkpoint"]["dtype"] = "float32"
    results[1]["checkpoint"]["dtype"] = "bfloat16"
    assert Report(results).table("recall")[0] == ["recall", "one (float32)", "one (bfloat16)", "two (float32)"]
    results[0]["checkpoint"]["sha256"] = "123456789"
    assert Report(results).table("recall")[0][1:3] == ["one (123456, float32)", "one (oneone, bfloat16)"]
    results[1]["checkpoint"]["dtype"] = "float32"
    assert Report(results).table("recall")[0] == ["recall", "one (123456)", "one (oneone)", "two"]


@pytest.mark.parametrize("kind", ["recall", "perplexity"])
def test_figures(kind):
    assert Report(RESULTS).figure(kind).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "table: got fda of one and two with version 1 and 2; takes results of one protocol"),
        ({"context_policy": {"window": 500}}, "with window 1000 and 500"),
        ({"context_policy": {"window": 1000, "limit": 5}}, "with limit None and 5"),
        ({"data": {"sha256": "e", "sources": "x"}}, f"with data '{'d' * 64}' and 'e'"),
    ],
)
def test_results_of_different_protocols_are_not_compared(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Report([RESULTS[0], copy.deepcopy(RESULTS[2]) | change])
    Report([RESULTS[1], RESULTS[2] | change])  # other tasks may differ


def test_one_result_of_each():
    with pytest.raises(ValueError, match="table: got fda of one twice, takes one result of each"):
        Report([RESULTS[0], RESULTS[0]])
    other = copy.deepcopy(RESULTS[0])
    other["checkpoint"]["sha256"] = "f" * 64
    assert Report([RESULTS[0], other]).table("recall")[0] == ["recall", "one (oneone)", "one (ffffff)"]


def harness(version=1.0, max_length=2048, examples=9):
    return {
        "results": {"copa": {"alias": "copa", "acc,none": 0.5, "acc_stderr,none": 0.1}, "group": {"acc,none": 0.4}},
        "versions": {"copa": version},
        "n-shot": {"copa": 0},
        "n-samples": {"copa": {"original": 9, "effective": examples}},
        "task_hashes": {"copa": "a"},
        "model_name": f"models/m{version}",
        "max_length": max_length,
    }


def test_results_of_the_harness(tmp_path):
    contents = {
        "a": harness(),
        "d": RESULTS[0],
        "b": harness(2.0),
        "c": harness(1.0, 4096),
        "e": harness(1.0, examples=5),
    }
    contents["f"] = harness() | {"model_name": "models/other", "task_hashes": {}}
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    console = Console(file=io.StringIO(), width=100)
    show([tmp_path / "a", tmp_path / "d"], tmp_path / "out", console)
    assert "| copa acc | 0.5 ± 0.1 |" in console.file.getvalue()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"table.md", "harness.png", "recall.png"}
    assert "| copa acc | 0.5 ± 0.1 |" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(ValueError, match=re.escape("got copa of models/m1.0 and models/m2.0 with version 1.0 and 2.0")):
        show([tmp_path / "a", tmp_path / "b"], None, console)
    with pytest.raises(ValueError, match="with max_length 2048 and 4096"):
        show([tmp_path / "a", tmp_path / "c"], None, console)
    with pytest.raises(ValueError, match="with examples 9 and 5"):
        show([tmp_path / "a", tmp_path / "e"], None, console)
    show([tmp_path / "a", tmp_path / "f"], None, console)
    assert "| harness | models/m1.0 | models/other |" in console.file.getvalue()


def whole_harness(model, **changes):
    """What lm-eval 0.4.13 writes of one task, `changes` by path: {"config.gen_kwargs": {}}."""
    arguments = {"pretrained": model, "backend": "causal", "tokenizer": f"/tmp/{model}"}
    content = harness() | {"model_name": model, "lm_eval_version": "0.4.13", "fewshot_as_multiturn": None}
    content |= {"chat_template_sha": None, "system_instruction_sha": None, "tokenizer_eos_token": ["</s>", "2"]}
    content |= {"eot_token_id": 2, "task_hashes": {}}
    content["config"] = {"model_args": arguments, "model_sha": "", "gen_kwargs": {}, "fewshot_seed": 1234}
    content["configs"] = {
        "copa": {
            "dataset_path": "super_glue",
            "num_fewshot": 0,
            "fewshot_config": {"doc_to_text": f"<function text at 0x7f{len(model)}>"},
            "metadata": {"version": 1.0, "config_source": f"/home/{model}/copa.yaml", **arguments},
        }
    }
    for path, value in changes.items():
        *folders, name = path.split("/")
        at = content
        for folder in folders:
            at = at[folder]
        at[name] = value
    return content


def harness_report(tmp_path, *contents):
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_text(json.dumps(content))
    return Report([result for i in range(len(contents)) for result in read_results(tmp_path / str(i))])


def test_results_of_the_harness_are_of_one_protocol(tmp_path):
    report = harness_report(tmp_path, whole_harness("a/last"), whole_harness("bb/last"))
    assert report.table("harness")[0] == ["harness", "a/last", "bb/last"]
    assert "lm_eval_version '0.4.13'" in report.notes[0]
    assert "configs" not in report.notes[0]


def test_lengths_that_ruler_has_not_run_are_left_out(tmp_path):
    scores = {"alias": "niah", "4096,none": 0.9, "4096_stderr,none": "N/A", "8192,none": -1, "mcc,none": -1.0}
    report = harness_report(tmp_path, whole_harness("a", **{"results/copa": scores}))
    assert report.table("harness")[1] == [["copa 4096", "0.9"], ["copa mcc", "-1"]]


def test_a_task_that_cuts_answers_out_in_two_ways_has_two_scores(tmp_path):
    scores = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    report = harness_report(tmp_path, whole_harness("a", **{"results/copa": scores}))
    rows = [["copa exact_match strict-match", "0.25"], ["copa exact_match flexible-extract", "0.5"]]
    assert report.table("harness")[1] == rows


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lm_eval_version", "0.4.9", "with lm_eval_version '0.4.13' and '0.4.9'"),
        ("chat_template_sha", "abc", "with chat_template_sha None and 'abc'"),
        ("system_instruction_sha", "abc", "with system_instruction_sha None and 'abc'"),
        ("fewshot_as_multiturn", True, "with fewshot_as_multiturn None and True"),
        ("tokenizer_eos_token", ["<eos>", "0"], "with tokenizer_eos_token ['</s>', '2'] and ['<eos>', '0']"),
        ("eot_token_id", 0, "with eot_token_id 2 and 0"),
        ("config/gen_kwargs", {"temperature": 1}, "with gen_kwargs None and {'temperature': 1}"),
        ("config/fewshot_seed", 1, "with fewshot_seed 1234 and 1"),
        ("config/model_args", "pretrained=b,add_bos_token=True", "with add_bos_token None and 'True'"),
        ("configs/copa/dataset_path", "x", "with configs.dataset_path 'super_glue' and 'x'"),
        ("configs/copa/num_fewshot", 5, "with configs.num_fewshot 0 and 5"),
        ("configs/copa/metadata/max_seq_lengths", [4096], "with configs.metadata.max_seq_lengths None and [4096]"),
    ],
)
def test_results_of_the_harness_of_other_protocols_are_refused(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        harness_report(tmp_path, whole_harness("a"), whole_harness("b", **{path: value}))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read (No such file"), (b"{", "cannot be read (no JSON)"), (b'{"task": 1}', "is no result")],
)
def test_what_is_no_result(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"table: got {tmp_path}/x, which {message}")):
        read_results(tmp_path / "x")
