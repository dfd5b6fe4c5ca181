import json
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from torch.utils.data import DataLoader

from osdn.data.documents import is_held_out, open_documents
from osdn.data.mqar import IGNORE
from osdn.data.packed import PackedRows, collate, fills_streams, held_out_rows, training_texts, unigram_entropy
from osdn.data.tokenizer import byte_tokenizer, encoder

BYTES = byte_tokenizer()


@pytest.fixture
def documents(tmp_path):
    """23 documents in three files, of 1 to 67 bytes, all different."""
    lines = [json.dumps({"text": f"{i}:" + "abcdefghij"[: i % 7] * i}) for i in range(23)]
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines[i::3]))
    return open_documents("data", [str(tmp_path)])


def packed(documents, **options):
    return PackedRows(documents, BYTES, **{"context": 16, "shuffle": 5, "seed": 1, **options})


def pieces(rows):
    """Runs of tokens with rising positions."""
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["input_ids"])]
        for a, b in pairwise(starts):
            yield bytes(row["input_ids"][a:b].tolist())


def one_epoch(documents, **options):
    """The documents of the first epoch, put together again from their pieces, and the rows."""
    total = sum(len(encoder(BYTES)(example["text"])) for example in documents.source)
    rows = list(islice(packed(documents, **options), total // 16))
    return b"".join(pieces(rows)).split(b"\0"), rows


def test_a_long_document_is_copied_once(documents, monkeypatch):
    """Not its whole rest for every row, which takes 20 ms a row for 5 MB, and grows with the length."""
    copied = []

    class Tokens(list):
        def __getitem__(self, key):
            part = super().__getitem__(key)
            copied.append(len(part))
            return part

    monkeypatch.setattr("osdn.data.packed.encoder", lambda _: lambda _: Tokens(range(1600)))
    rows = list(islice(packed(documents), 100))
    assert [i for row in rows for i in row["input_ids"].tolist()] == list(range(1600))
    assert sum(copied) == 1600


def test_every_document_once_an_epoch_in_a_new_order(documents):
    want = {example["text"].encode() for example in documents.source}
    found, rows = one_epoch(documents)
    assert set(found[:-1]) <= want
    assert len(found[:-1]) == len(set(found[:-1])) >= 22
    in_order, _ = one_epoch(documents, shuffle=1)
    assert in_order[:-1] != found[:-1]
    assert {len(row["input_ids"]) for row in rows} == {16}
    other, _ = one_epoch(documents, seed=2)
    assert other != found
    assert sorted(other[:5]) == sorted(found[:5])  # the same block, shuffled within itself
    ended = b"".join(pieces(islice(packed(documents, shuffle=23), 150))).split(b"\0")
    first, second = ended[:23], ended[23:46]
    assert first != second
    assert sorted(first) == sorted(second) == sorted(want)


def test_labels_and_positions(documents):
    _, rows = one_epoch(documents)
    for row in rows:
        first = row["position_ids"] == 0
        assert first[0]
        assert torch.equal(row["labels"] == IGNORE, first)
        assert torch.equal(row["labels"][~first], row["input_ids"][~first])
        assert torch.equal(row["position_ids"][1:][~first[1:]], row["position_ids"][:-1][~first[1:]] + 1)
        ends = (row["input_ids"] == 0).nonzero()[:, 0]
        assert first[[i + 1 for i in ends.tolist() if i < 15]].all()


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_taken_up_at_any_row(documents, streams):
    whole = list(islice(packed(documents, streams=streams, own=range(streams)), 150))  # more than two epochs
    assert max(row["position"][1]["epoch"] for row in whole) >= 2
    for n in range(0, 140, 4 * streams):
        positions = dict(row["position"] for row in whole[:n])
        positions = {int(k): v for k, v in json.loads(json.dumps(positions)).items()}
        rest = islice(packed(documents, streams=streams, own=range(streams), positions=positions), 9)
        for row, expected in zip(rest, whole[n : n + 9], strict=True):
            assert torch.equal(row["input_ids"], expected["input_ids"])
            assert row["position"] == expected["position"]


def test_processes_share_the_rows_of_one(documents):
    alone = list(islice(packed(documents, streams=4, own=range(4)), 32))
    two = [list(islice(packed(documents, streams=4, own=range(rank, 4, 2)), 16)) for rank in range(2)]
    shared = [row for pair in zip(*two, strict=True) for row in pair]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(alone, shared, strict=True))
    assert [row["position"] for row in alone] == [row["position"] for row in shared]


def test_a_process_beside_changes_nothing(documents):
    first = packed(documents, streams=2, own=range(2))
    plain = list(islice(DataLoader(first, batch_size=4, collate_fn=collate), 7))
    later = packed(documents, streams=2, own=range(2), positions=plain[2]["positions"])
    for start, rows in ((0, first), (3, later)):
        beside = DataLoader(rows, batch_size=4, collate_fn=collate, num_workers=1, prefetch_factor=3)
        for a, b in zip(plain[start:], islice(beside, 7 - start), strict=True):
            assert a["positions"] == b["positions"]
            assert torch.equal(a["input_ids"], b["input_ids"])


def test_held_out_documents_are_never_trained_on(documents):
    texts = [example["text"] for example in documents.source]
    held = {text for text in texts if is_held_out(text, 0.4)}
    assert 4 < len(held) < 15
    rows = list(islice(packed(documents, held_out=0.4), 60))
    trained = {piece.rstrip(b"\0").decode() for piece in pieces(rows) if piece.endswith(b"\0")}
    assert not trained & held
    evaluated = held_out_rows(documents, BYTES, context=16, rows=100, share=0.4)
    assert b"".join(pieces(evaluated))[:20] in b"".join(t.encode() + b"\0" for t in texts if t in held)
    assert len(held_out_rows(documents, BYTES, context=16, rows=3, share=0.4)) == 3


def test_one_long_document_fills_every_held_out_row(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    one = open_documents("data", [str(tmp_path)])
    assert len(held_out_rows(one, BYTES, context=16, rows=10, share=1.0)) == 10
    (tmp_path / "b.txt").write_text("y" * 1000)
    both = held_out_rows(open_documents("data", [str(tmp_path)]), BYTES, context=16, rows=10, share=1.0)
    assert Counter(int(row["input_ids"][0]) for row in both) == {ord("x"): 5, ord("y"): 5}


def test_no_documents_is_an_error(documents):
    with pytest.raises(ValueError, match=r"^data: got no documents to train on for stream 23 of 24 \(3 file"):
        next(iter(packed(documents, streams=24, own=[23])))


def test_whether_every_stream_gets_a_document(documents):
    # Of 23 documents 23 parts get one each.
    assert [n for n in range(1, 27) if fills_streams(documents, n, 0.0)] == list(range(1, 24))
    kept = len(list(training_texts(documents.source, documents, 0.5)))
    assert 0 < kept < 23
    assert not fills_streams(documents, kept + 1, 0.5)


def test_unigram_entropy():
    labels = torch.tensor([[IGNORE, 1, 1, 2], [7, 2, IGNORE, IGNORE]])
    assert unigram_entropy([{"labels": row} for row in labels]) == pytest.approx(0.6931472)
