import errno
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osdn.evals.results import ExampleLog, ratio
from osdn.runs import RunError

IDENTITY = {"task": "t", "version": 1, "window": 5}


def test_ratio_by_hand():
    # r = 6/8; deviations 1 - 1.5, 5 - 4.5: sqrt(2 (.25 + .25)) / 8
    assert ratio([1.0, 5.0], [2, 6]) == {"value": 0.75, "stderr": 0.125, "examples": 2}
    assert ratio([1.0], [2]) == {"value": 0.5, "stderr": None, "examples": 1}


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=20), st.integers(1, 9))
def test_with_equal_counts_it_is_the_standard_error_of_the_mean(sums, n):
    found, N = ratio(sums, [n] * len(sums)), len(sums)
    mean = sum(sums) / N
    variance = sum((x - mean) ** 2 for x in sums) / (N - 1)
    assert found["value"] == pytest.approx(mean / n, abs=1e-12)
    assert found["stderr"] == pytest.approx((variance / N) ** 0.5 / n, abs=1e-9)


def test_a_log_goes_on_where_it_was(tmp_path):
    path = tmp_path / "a" / "t.jsonl"
    log = ExampleLog(path, IDENTITY)
    log.append([{"index": 3, "x": "ä\n"}, {"index": 0}])
    whole = path.read_bytes()
    log.append([{"index": 1, "x": 1.5}])
    for content, records in (
        (path.read_bytes(), {0, 1, 3}),
        (path.read_bytes()[:-1], {0, 3}),
        (whole + b'{"i', {0, 3}),
    ):
        path.write_bytes(content)
        again = ExampleLog(path, IDENTITY)
        assert again.records.keys() == records
        assert again.records[3] == {"index": 3, "x": "ä\n"}
        again.append([{"index": 9}])
        assert ExampleLog(path, IDENTITY).records.keys() == records | {9}


@pytest.mark.parametrize("left", [b"", b'{"task": "t", "ver', b'{"task": "other"}\n', b'{"task": "other"}\n{"index"'])
def test_a_log_without_an_example_starts_over(tmp_path, left):
    path = tmp_path / "t.jsonl"
    path.write_bytes(left)
    ExampleLog(path, IDENTITY).append([{"index": 0}])
    assert ExampleLog(path, IDENTITY).records == {0: {"index": 0}}
    assert path.read_bytes().count(b"\n") == 2


def test_another_evaluation_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    ExampleLog(path, IDENTITY).append([{"index": 0}])
    before = path.read_bytes()
    message = f"out: got {path}, of another evaluation (window: 5 there, 6 here); takes a new path"
    with pytest.raises(ValueError, match=re.escape(message)):
        ExampleLog(path, IDENTITY | {"window": 6})
    for line in (b"{}\n", b"nonsense\n", b"[1]\n"):
        path.write_bytes(before + line)
        with pytest.raises(ValueError, match=re.escape(f"out: got {path}, whose line 3 is damaged")):
            ExampleLog(path, IDENTITY)
        assert path.read_bytes() == before + line


@pytest.mark.parametrize("content", [b'{"text": "one line"}', b'{"text": "t"}\n{"text": "u"}\n', b"[1]\n", b"\n"])
def test_a_file_of_another_kind_is_left_alone(tmp_path, content):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"out: got {path}, which is no log of examples; takes a new path")):
        ExampleLog(path, IDENTITY)
    assert path.read_bytes() == content


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    log = ExampleLog(path, IDENTITY)
    log.append([{"index": 0}])

    def full(descriptor):  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="cannot be written \\(No space left on device\\)"):
        log.append([{"index": 1}])
    assert 1 not in log.records
    assert json.loads(path.read_bytes().splitlines()[1]) == {"index": 0}


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=re.escape("file/t.jsonl: cannot be written (")):
        ExampleLog(tmp_path / "file" / "t.jsonl", IDENTITY)
