import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osdn.data.documents import open_documents


def texts(data, **options):
    documents = open_documents("data", [str(d) for d in data], **options)
    return [example[documents.text_field] for example in documents.source]


def write_parquet(path, values, column="text"):
    pq.write_table(pa.table({column: values}), path)
    return path


@pytest.fixture
def three(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwö")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "id": 1}\n\n{"text": "four"}\n')
    write_parquet(tmp_path / "c.parquet", ["five", "six"])
    return tmp_path


def test_formats_directories_and_globs(three):
    everything = ["one\ntwö", "three", "four", "five", "six"]
    assert texts([three]) == everything
    assert texts([three / "*"]) == everything
    assert texts([three / "c.parquet", three / "*.txt"]) == ["one\ntwö", "five", "six"]
    (three / "b.jsonl").write_text('{"body": "three"}\n')
    (three / "b.jsonl").rename(three / "b.JSONL")
    assert texts([three / "b.JSONL"], text_field="body") == ["three"]


def test_names_and_sizes_not_places(three, tmp_path_factory):
    first = open_documents("data", [str(three)])
    other = tmp_path_factory.mktemp("other")
    for path in three.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    second = open_documents("data", [str(other)])
    assert (first.name, first.sizes) == (second.name, second.sizes)
    (other / "a.txt").write_text("longer than it was")
    third = open_documents("data", [str(other)])
    assert first.name == third.name
    assert first.sizes != third.sizes


def test_the_standard_library_is_the_default():
    documents = open_documents("data", [])
    assert re.fullmatch(r"\d{3,} file\(s\) [0-9a-f]{12}", documents.name)
    assert any("def " in example["text"] for example, _ in zip(documents.source, range(20), strict=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.txt": b"ok \xff"}, r"a.txt, which is not UTF-8 at byte 3; takes UTF-8$"),
        (
            {"a.jsonl": b'{"text": "x"}\n{"text": "\xff"}\n'},
            r"a.jsonl, line 2: not UTF-8 at byte 10 of it; takes",
        ),
        ({"a.jsonl": b'{"text": "x"}\n{"te'}, r"a.jsonl, line 2: not JSON \(Unterminated string"),
        ({"a.jsonl": b'{"body": "x"}\n'}, r"a.jsonl, line 1: no text in field 'text'; --text-field names another$"),
        (
            {"a.jsonl": b'{"text": "\\ud83d\\ude00", "id": "\\ud83d"}\n{"text": "\\ud83d"}\n'},
            r"a.jsonl, line 2: '\\ud83d', half of a character; takes Unicode text$",
        ),
        ({"a.jsonl": b"[1]\n"}, r"a.jsonl, line 1: no text in field 'text'"),
        ({"a.parquet": b"PAR1 and no more"}, r"a.parquet, not a whole Parquet file \("),
        ({"a.txt": b""}, r"a directory without non-empty files"),
    ],
)
def test_bad_content_is_named(content, message, tmp_path):
    for name, value in content.items():
        (tmp_path / name).write_bytes(value)
    with pytest.raises(ValueError, match=r"^data: got .*" + message):
        texts([tmp_path])


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        (["x"], "body", "no column 'text' among body; --text-field names another"),
        (pa.array([], pa.string()), "text", "without rows; takes files with text"),
        (["x", None], "text", "row 1 of a batch: None in column 'text'; takes text"),
    ],
)
def test_bad_parquet_is_named(values, column, message, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", values, column)
    with pytest.raises(ValueError, match=f"^data: got {re.escape(str(path))}, {re.escape(message)}$"):
        texts([path])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "which does not exist; takes files and directories"),
        ("part-*.parquet", "which matches nothing; takes files and globs"),
        ("empty.txt", "which is empty; takes files with text"),
    ],
)
def test_what_is_missing_or_empty_is_named(name, message, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=f"^eval_data: got .*{re.escape(name)}.*{message}$"):
        open_documents("eval_data", [str(tmp_path / name)])


def test_a_dataset_by_name_that_cannot_be_loaded(monkeypatch):
    def refuse(*arguments, **options):  # noqa: ARG001
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match=r"^data: got 'owner/name' \(no network\); takes files, globs, or"):
        open_documents("data", ["owner/name"])


def test_a_dataset_by_name_is_streamed(three, monkeypatch):
    import datasets

    seen = {}

    def load(name, subset, **options):
        seen.update(options, name=name, subset=subset)
        lines = [json.loads(line) for line in (three / "b.jsonl").read_text().split("\n") if line]
        return datasets.Dataset.from_list(lines).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    documents = open_documents("data", ["owner/name"], subset="sample", split="validation")
    assert [example["text"] for example in documents.source] == ["three", "four"]
    assert seen == {"name": "owner/name", "subset": "sample", "split": "validation", "streaming": True}
    assert documents.name == "owner/name/sample/validation"
