import json
import re

import pytest

from osdn.evals.documents import digest, read_documents, read_jsonl


def test_documents_of_files_and_lines(tmp_path):
    (tmp_path / "b.txt").write_text("B\n")
    (tmp_path / "a.jsonl").write_text('{"text": "ä", "more": 1}\n\n{"text": "two\\n"}\n')
    documents, data = read_documents("text", [tmp_path])
    assert documents == ["ä", "two\n", "B\n"]
    assert data == {"sha256": digest(documents), "sources": "2 file(s)"}
    assert digest(["ab", "c"]) != digest(["a", "bc"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "t"}', "line 3, with nothing as 'value'; takes a string that is not blank"),
        (b'{"text": "t", "value": 7}', "line 3, with 7 as 'value'"),
        (b'{"text": " ", "value": "v"}', "line 3, with ' ' as 'text'"),
        (b'{"text": "t", "va', "line 3, which is no JSON object; takes one with text, value"),
        (b"[1]", "line 3, which is no JSON object"),
        (b"\xff", "which is not UTF-8 at byte 30; takes UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    good = json.dumps({"text": "t", "value": "v" * 2}).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"cloze: got {path}, {message}")):
        read_jsonl("cloze", path, ("text", "value"))


def test_what_may_be_blank(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "t", "value": ""}')
    (row,) = read_jsonl("cloze", tmp_path / "x.jsonl", ("text", "value"), ("value",))
    assert row == {"text": "t", "value": ""}
    with pytest.raises(ValueError, match="with '' as 'value'; takes a string that is not blank"):
        read_jsonl("cloze", tmp_path / "x.jsonl", ("text", "value"))


def test_nothing_to_read(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"cloze: got .*x.jsonl, without a line; takes JSON objects with text"):
        read_jsonl("cloze", tmp_path / "x.jsonl", ("text",))
    with pytest.raises(ValueError, match=r"cloze: got .*none, which cannot be read \(No such file"):
        read_jsonl("cloze", tmp_path / "none", ("text",))
    with pytest.raises(ValueError, match=r"text: got .*none, which does not exist"):
        read_documents("text", [tmp_path / "none"])
