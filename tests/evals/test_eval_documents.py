import json
import re
from itertools import islice

import pytest

from osdn.data.documents import open_documents
from osdn.data.packed import PackedRows
from osdn.data.tokenizer import byte_tokenizer
from osdn.evals.documents import digest, read_jsonl, read_texts

BYTES = byte_tokenizer()


def test_documents_of_files_and_lines(tmp_path):
    (tmp_path / "b.txt").write_text("B\n")
    (tmp_path / "a.jsonl").write_text('{"text": "ä", "more": 1}\n\n{"text": "two\\n"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    documents, data = read_texts("text", [str(tmp_path / "*")])
    assert documents == ["ä", "two\n", "B\n"]
    assert data == {"sha256": digest(documents), "sources": "3 file(s)"}
    assert digest(["ab", "c"]) != digest(["a", "bc"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "t"}', "line 3, with nothing as 'value'; takes a string that is not blank"),
        (b'{"text": "t", "value": 7}', "line 3, with 7 as 'value'"),
        (b'{"text": " ", "value": "v"}', "line 3, with ' ' as 'text'"),
        (b'{"text": "t", "va', "line 3: not JSON (Invalid control character at); takes an object a line"),
        (b"[1]", "line 3, which is no JSON object; takes one with text, value"),
        (b" \xff", "line 3: not UTF-8 at byte 1 of it; takes UTF-8"),
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
        read_texts("text", [str(tmp_path / "none")])
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"text: got 1 file\(s\), without a document; takes files with text"):
        read_texts("text", [str(tmp_path / "x.jsonl")])


def test_what_training_left_out(tmp_path):
    texts = [f"document {i}" for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    options = {"text_field": "body", "held_out": 0.3}
    held, origin = read_texts("text", [str(tmp_path)], **options)
    documents = open_documents("data", [str(tmp_path)], text_field="body")
    rows = PackedRows(documents, BYTES, context=8, shuffle=5, seed=0, held_out=0.3)
    seen = bytes(token for row in islice(rows, 200) for token in row["input_ids"].tolist()).decode().split("\0")
    assert 4 < len(held) < 20
    assert set(held) == set(texts) - set(seen)
    assert origin == {"sha256": digest(held), "sources": "1 file(s), held-out share 0.3"}
