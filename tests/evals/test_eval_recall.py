import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from osdn.data.tokenizer import byte_tokenizer
from osdn.evals import recall
from osdn.evals.checkpoint import Checkpoint
from osdn.evals.recall import Cloze

KIND = {"key": "color", "value": "Deep Blue"}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(save, tmp_path):
    checkpoint = Checkpoint.open(save())

    def task(name, *rows, **options):
        return Cloze(checkpoint, name, jsonl(tmp_path / "data.jsonl", *rows), **options)

    task.checkpoint = checkpoint
    return task


def prompts(task):
    return [bytes(p).decode() for p in task.prompts]


class Says:
    """A model that continues every prompt with the same text, as long as it is let."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, text):
        self.text = text.encode()

    def generate(self, ids, *, attention_mask, generation_config, stopping_criteria):
        assert generation_config.do_sample is False
        assert torch.equal(attention_mask, (attention_mask.cumsum(1) > 0).long()), "padding on the left"
        for byte in self.text[: generation_config.max_new_tokens]:
            ids = torch.cat([ids, torch.full((len(ids), 1), byte)], 1)
            if stopping_criteria(ids, None).all():
                break
        return ids


def test_prompts(make):
    row = {"text": "It is deep blue. \nAnd large.. Color:color:", **KIND}
    assert prompts(make("fda", row)) == ["It is deep blue. \nAnd large. Color:"]
    document = "It is deep blue. \nAnd large."
    assert prompts(make("fda_twice", row)) == [f"Information about Color. {document}\n{document} Color:"]
    asked = {"text": f"{document}\nSummary of information above... Title: x. Color:", **KIND}
    assert prompts(make("swde", asked)) == [f"{document} Color:"]
    assert prompts(make("swde_twice", asked)) == [f"Information about Color. {document}\n{document} Color:"]
    squad = {"text": "It is deep blue. The color is ", "question": "What color?", "context": "C1 Question: x", **KIND}
    assert prompts(make("squad", squad)) == ["It is deep blue. The color is"]
    assert prompts(make("squad_twice", squad)) == ["What color? C1\nIt is deep blue. The color is"]


def test_the_window_begins_half_its_length_before_the_first_answer(make):
    text = "a" * 300 + "deep BLUE" + "b" * 100 + "deep blue" + "c" * 300
    task = make("fda", {"text": text, **KIND}, window=150)
    assert prompts(task) == [text[250:350] + ". Color:"]
    assert task.cut == {"documents": 1, "answers_lost": 0, "left_out": 0}
    # As Just Read Twice does: a text shorter than the window loses what stands far before its answer.
    task = make("fda", {"text": text[:309], **KIND}, window=550)
    assert prompts(task) == [text[50:309] + ". Color:"]
    task = make("fda", {"text": text, **KIND, "value": "green"}, window=150)
    assert prompts(task) == ["c" * 100 + ". Color:"]
    task = make("fda", {"text": text[:200] + "deep blue", **KIND}, window=1000)
    assert task.cut == {"documents": 0, "answers_lost": 0, "left_out": 0}


def test_twice_cuts_before_it_repeats(make):
    text = "x" * 500 + "deep blue" + "y" * 500
    (prompt,) = prompts(make("fda_twice", {"text": text, **KIND}, window=150))
    document = text[450:550] + "."
    assert prompt == f"Information about Color. {document}\n{document} Color:"


def test_squad_keeps_the_sentence_to_complete_and_counts_the_answers_this_costs(make):
    task = make("squad", {"text": "deep blue " + "z" * 200 + " The color is", **KIND}, window=150)
    assert prompts(task) == ["z" * 87 + " The color is"]
    assert task.cut == {"documents": 1, "answers_lost": 1, "left_out": 0}


def test_a_window_of_characters_of_several_bytes(make):
    # 101 tokens from inside of one to inside of another: the halves are replaced, not lost in an error.
    (prompt,) = prompts(make("fda", {"text": "ö" * 300 + "deep blue" + "ö" * 300, **KIND}, window=151))
    assert "deep blue" in prompt
    assert prompt.count("ö") >= 44


@pytest.mark.parametrize(
    ("said", "continuation", "contains"),
    [
        (" dEEp blue, or so\nwhat", " dEEp blue, or so", 1),
        (" deep\nblue", " deep", 0),
        ("\ndeep blue", "", 0),
        ("x" * 39 + "deep blue", "x" * 39 + "deep blue", 1),
        ("x" * 40 + "deep blue", "x" * 40 + "deep blu", 0),
    ],
)
def test_the_score_is_whether_the_answer_is_contained(make, said, continuation, contains):
    task = make("fda", {"text": "t", **KIND}, {"text": "longer", "key": "k", "value": "green"})
    records = task.score(Says(said), [1, 0])
    assert [r["index"] for r in records] == [1, 0]
    assert [r["contains"] for r in records] == [0, contains]
    assert records[1]["continuation"] == continuation
    assert records[1]["answer"] == "Deep Blue"
    assert records[1]["prompt_end"] == "t. Color:"
    found = task.metrics(records)["contains"]
    assert found["value"] == contains / 2
    assert found["stderr"] == pytest.approx(contains / 2)  # of (0, 1): .707 / sqrt 2


def test_it_stops_at_a_line_break():
    stop = recall._LineBreak(byte_tokenizer(), 2)
    assert stop(torch.tensor([list(b"a\nbcd"), list(b"abcd\n")]), None).tolist() == [False, True]


def test_a_prompt_is_not_closed(make, tmp_path):
    """As ByT5's tokenizer closes every text: what stands behind would be asked for, not the answer."""
    closing = replace(make.checkpoint, tokenizer=ByT5Tokenizer())
    (prompt,) = Cloze(closing, "fda", jsonl(tmp_path / "x", {"text": "It is deep blue.", **KIND})).prompts
    assert prompt[-1] == ord(":") + 3


class Ends(Says):
    """A model that has an end-of-text token of its own, `!`, behind which a row of a batch is filled up."""

    generation_config = SimpleNamespace(eos_token_id=[ord("!")])

    def generate(self, ids, *, generation_config, **options):  # noqa: ARG002
        new = [*self.text, ord("!")] + [generation_config.pad_token_id] * 3
        return torch.cat([ids, torch.tensor([new] * len(ids))], 1)


def test_what_fills_a_row_up_behind_its_end_is_no_answer(make):
    """GPT-2's tokenizer has no padding token, and its token 0 is text."""
    task = make("fda", {"text": "It is deep blue.", **KIND, "value": "deep blue\0"})
    task.tokenizer.pad_token = task.tokenizer.eos_token = None
    [record] = task.score(Ends("deep blue"), [0])
    assert (record["continuation"], record["contains"]) == ("deep blue", 0)


@pytest.mark.parametrize("name", ["deltanet", "osdn-apf", "os-gdn", "os-kda", "gpt2"])
def test_a_batch_and_its_padding_change_nothing(name, save, tmp_path):
    if name == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
        GPT2LMHeadModel(config).double().save_pretrained(tmp_path / name)
    checkpoint = Checkpoint.open(tmp_path / name if name == "gpt2" else save(name))
    rows = [{"text": "abc. " * n, "key": "it", "value": "no"} for n in (30, 1, 7, 12)]
    task = Cloze(checkpoint, "fda", jsonl(tmp_path / "d", *rows))
    model = checkpoint.load("cpu", "auto")
    together = task.score(model, task.order())
    assert task.order() == [0, 3, 2, 1]
    assert together == [task.score(model, [i])[0] for i in task.order()]
    assert len({r["continuation"] for r in together}) > 1


def test_what_a_model_cannot_read_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    data = jsonl(tmp_path / "d", {"text": "abcdefgh", **KIND})
    # 16 tokens of prompt and 48 new ones.
    assert len(Cloze(Checkpoint.open(tmp_path), "fda", data)) == 1
    jsonl(data, {"text": "abcdefghi", **KIND})
    with pytest.raises(ValueError, match="window: needs 65 tokens, takes at most the 64 that"):
        Cloze(Checkpoint.open(tmp_path), "fda", data)


def test_short_answers_and_limits(make):
    rows = [{"text": "t", **KIND, "value": v} for v in ("x", "no", " y ", "", "yes", "may")]
    task = make("fda", *rows, limit=2)
    assert task.answers == ["no", "yes"]
    assert task.cut["left_out"] == 3
    with pytest.raises(ValueError, match=re.escape("cloze: got data.jsonl, without an answer of two characters")):
        make("fda", rows[0])
    with pytest.raises(ValueError, match=re.escape("window: got 50, takes more than the 50 tokens kept")):
        make("fda", rows[1], window=50)


def test_a_data_set_of_the_hub(make, monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        return [{"text": "It is deep blue", **KIND}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prompts(Cloze(make.checkpoint, "swde")) == ["It is deep blue. Color:"]
    assert asked == [("hazyresearch/based-swde-v2", "validation")]
    with pytest.raises(ValueError, match="tasks: got hazyresearch/based-squad, row 0, with nothing as 'question'"):
        Cloze(make.checkpoint, "squad_twice")

    def offline(name, split):  # noqa: ARG001
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = "tasks: hazyresearch/based-fda cannot be loaded (no route); takes a network, or --cloze FILE"
    with pytest.raises(ValueError, match=re.escape(message)):
        Cloze(make.checkpoint, "fda")
