import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from osdn.data.tokenizer import byte_tokenizer, load_tokenizer

BYTES = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_tokens_are_the_bytes_of_utf8(text):
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_no_text_is_taken_for_the_end_of_a_document():
    # "Ā" is what the tokenizer's own files call byte 0.
    assert BYTES("aĀ<0x00>")["input_ids"] == list("aĀ<0x00>".encode())
    assert BYTES.eos_token_id == BYTES.pad_token_id == 0
    assert BYTES.decode([97, 0, 98], skip_special_tokens=True) == "ab"


def test_it_survives_being_saved(tmp_path):
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, 256)):
        assert tokenizer("Āé\0\n")["input_ids"] == list("Āé\0\n".encode())
        assert tokenizer.eos_token_id == 0


def test_load(tmp_path):
    assert load_tokenizer(tmp_path, 256)("é")["input_ids"] == [195, 169]
    with pytest.raises(ValueError, match=re.escape(f"got {tmp_path}, without tokenizer files and with 255 tokens")):
        load_tokenizer(tmp_path, 255)
    BYTES.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("tokenizer has 256 tokens; takes at most the model's 53")):
        load_tokenizer(tmp_path, 53)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match=re.escape(f"got {tmp_path}, whose tokenizer cannot be read (")):
        load_tokenizer(tmp_path, 256)
