import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from osdn.data.tokenizer import byte_tokenizer, checkpoint_tokenizer, digest, encoder, load_tokenizer
from osdn.generate.text import Codec

BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes, written and read again in each way."""
    path = tmp_path_factory.mktemp("bytes")
    BYTES.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path), checkpoint_tokenizer(path, 256), load_tokenizer(str(path))


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_tokens_are_the_bytes_of_utf8(saved, text):
    for tokenizer in (BYTES, *saved):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert encoder(tokenizer)(text) == [*ids, 0]


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_are_marked_as_python_marks_them(content):
    assert BYTES.decode(list(content)) == content.decode(errors="replace")


@pytest.mark.parametrize("text", ["aĀ<0x00>", "naïve Āā\n\t€ <|endoftext|> \x7f", "Āé\0\n"])
def test_no_text_is_taken_for_the_end_of_a_document(saved, text):
    # "Ā" is what the tokenizer's own files call byte 0.
    for tokenizer in (BYTES, *saved):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
        assert tokenizer.decode([97, 0, 98], skip_special_tokens=True) == "ab"
        assert len(tokenizer) == 256
        assert sorted(tokenizer.get_vocab().values()) == list(range(256))


def words(**special):
    model = WordLevel({"a": 0, "?": 1, "end": 300}, unk_token="?")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="?", **special)


def closed(opens, closes):
    """Every text between special tokens, as by a tokenizer of Llama's or BERT's."""
    tokenizer = words(eos_token="end")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{opens} $A {closes}".strip(), special_tokens=[("?", 1), ("end", 300)]
    )
    return tokenizer


@pytest.mark.parametrize("template", ["", "?-", "-end", "? ?-end", "end-", "-?"])
def test_documents_and_prompts_begin_alike(template):
    opens, _, closes = template.partition("-")
    tokenizer = closed(opens, closes)
    before = [{"?": 1, "end": 300}[name] for name in opens.split()]
    assert encoder(tokenizer)("a") == [*before, 0, 300]
    assert encoder(tokenizer)("end") == [*before, 300, 300]
    assert Codec(tokenizer).encode("a") == [*before, 0]


def test_the_digest_knows_how_texts_are_split(saved):
    assert {digest(tokenizer) for tokenizer in (BYTES, *saved)} == {digest(BYTES)}
    lowered, opened = (PreTrainedTokenizerFast(tokenizer_object=bpe(2)) for _ in range(2))
    lowered.backend_tokenizer.normalizer = Lowercase()
    opened.backend_tokenizer.post_processor = TemplateProcessing(single="e $A", special_tokens=[("e", 1)])
    merged = PreTrainedTokenizerFast(tokenizer_object=bpe(1))  # the same tokens, one of them never made
    special = PreTrainedTokenizerFast(tokenizer_object=bpe(2), pad_token="n")
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe(2), padding_side="left", model_max_length=7)
    assert digest(plain) == digest(PreTrainedTokenizerFast(tokenizer_object=bpe(2)))
    assert len({digest(x) for x in (plain, lowered, merged, opened, special)}) == 5


def test_an_alphabet_without_a():
    tokenizer = Tokenizer(BPE({"<s>": 0, "C": 1, "G": 2}, []))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert encoder(tokenizer)("CG") == Codec(tokenizer).encode("CG") == [0, 1, 2]
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({}, [])))
    assert encoder(nothing)("CG") == []


def test_a_tokenizer_that_draws(tmp_path):
    model = BPE({letter: i for i, letter in enumerate(["a", "b", "ab"])}, [("a", "b")], dropout=0.5)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="b").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer: got .* \(it splits texts at random, dropout 0.5\); takes bytes"):
        load_tokenizer(str(tmp_path))


def bpe(merges):
    vocab = {letter: i for i, letter in enumerate("aeThFoxdn")}
    return Tokenizer(BPE(vocab | {"Th": 20, "Fo": 21}, [("T", "h"), ("F", "o")][:merges]))


def test_a_document_without_an_end():
    assert encoder(words())("a") == [0]
    assert encoder(words(eos_token="end"))("a") == [0, 300]


@pytest.mark.parametrize("name", ["/nowhere/at/all", ""])
def test_no_such_tokenizer(name):
    with pytest.raises(ValueError, match=r"^tokenizer: got '.*takes bytes, or a path or name$"):
        load_tokenizer(name)


def test_training_needs_an_end_of_text(tmp_path):
    words().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer: got '.*', which has no end-of-text token; takes one with eos_"):
        load_tokenizer(str(tmp_path))


def test_of_a_checkpoint(tmp_path):
    assert checkpoint_tokenizer(tmp_path, 256)("é")["input_ids"] == [195, 169]
    assert checkpoint_tokenizer(tmp_path / "job.pt", 512)("é")["input_ids"] == [195, 169]
    with pytest.raises(ValueError, match=re.escape(f"got {tmp_path}, without tokenizer files and with 255 tokens")):
        checkpoint_tokenizer(tmp_path, 255)
    BYTES.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("tokenizer has 256 tokens; takes at most the model's 53")):
        checkpoint_tokenizer(tmp_path, 53)
    words().save_pretrained(tmp_path)  # three tokens, the last of which is number 300
    with pytest.raises(ValueError, match=re.escape("tokenizer has 301 tokens; takes at most the model's 300")):
        checkpoint_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match=re.escape(f"got {tmp_path}, whose tokenizer cannot be read (")):
        checkpoint_tokenizer(tmp_path, 256)


def test_a_tokenizer_without_tokenizer_json(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert checkpoint_tokenizer(tmp_path, 384)("a")["input_ids"] == [100, 1]
