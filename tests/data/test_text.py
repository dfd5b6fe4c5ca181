import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.data import ByteText, ar_hits


def brute_force(row):
    hits = [False]
    for t in range(1, len(row)):
        hits.append(any((row[u - 1], row[u]) == (row[t - 1], row[t]) for u in range(1, t)))
    return hits


@given(st.integers(1, 4), st.integers(2, 40), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_ar_hits_against_brute_force(rows, length, tokens, seed):
    ids = torch.randint(0, tokens, (rows, length), generator=torch.Generator().manual_seed(seed))
    assert ar_hits(ids).tolist() == [brute_force(row) for row in ids.tolist()]


def test_ar_hits_by_hand():
    assert ar_hits(torch.tensor([list(b"abcab ab")])).tolist() == [[0, 0, 0, 0, 1, 0, 0, 1]]


@pytest.fixture
def folder(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02d}.txt").write_bytes(bytes([i + 65]) * (20 + i))
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_bytes(b"z" * 50)
    return tmp_path


def test_held_out_files_are_disjoint_and_chosen_by_name_alone(folder):
    text = ByteText.load([folder])
    train, held = set(text.train.tolist()) - {0}, set(text.held_out.tolist()) - {0}
    assert not train & held
    assert train | held == set(range(65, 90))
    assert len(held) == 2
    assert held != {65, 66}
    assert held != {88, 89}
    shuffled = ByteText.load(sorted(folder.glob("[0-9]*"), reverse=True))
    assert shuffled.digest == text.digest
    assert text.sources.startswith("23 file(s), ")


def test_one_file_is_cut_at_its_last_tenth(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(range(255, 55, -1)))
    text = ByteText.load([file])
    assert np.concatenate([text.train, text.held_out]).tobytes() == file.read_bytes() + b"\0"
    assert len(text.held_out) == 20


def test_eval_data_is_held_out_whole(folder):
    text = ByteText.load([folder / "01.txt"], [folder / "02.txt", folder / "03.txt"])
    assert set(text.train.tolist()) == {0, 66}
    assert set(text.held_out.tolist()) == {0, 67, 68}


def test_crops_and_blocks(folder):
    text = ByteText.load([folder])
    batch = text.batch(6, 16, seed=0, step=4)
    assert batch.shape == (6, 16)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, text.batch(6, 16, seed=0, step=4))
    assert not torch.equal(batch, text.batch(6, 16, seed=0, step=5))
    whole = text.train.tobytes()
    assert all(bytes(row) in whole for row in batch.tolist())
    ends = ByteText(np.arange(16, dtype=np.uint8), np.arange(100, dtype=np.uint8), "")
    assert {tuple(r) for r in ends.batch(50, 15, seed=0).tolist()} == {tuple(range(15)), tuple(range(1, 16))}
    assert ends.blocks(3, 20)[:, 0].tolist() == [0, 20, 60]
    assert ends.blocks(99, 30).shape == (3, 30)


def test_the_default_is_the_standard_library():
    text = ByteText.load()
    assert b"def dumps(" in text.train.tobytes() + text.held_out.tobytes()
    assert len(text.train) > 5 * len(text.held_out) > 100_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ([p / "none"], []), "data: got {p}/none, which does not exist; takes files and directories"),
        (lambda p: ([p / "empty.txt"], []), "data: got {p}/empty.txt, which is empty"),
        (lambda p: ([p / "void"], []), "data: got {p}/void, a directory without non-empty files"),
        (lambda p: ([p / "00.txt"], [p / "none"]), "eval_data: got {p}/none, which does not exist"),
        (lambda p: ([p], [p / "03.txt"]), "eval_data: got {p}/03.txt, which is in data too"),
    ],
)
def test_refusals(folder, make, message):
    (folder / "void").mkdir()
    with pytest.raises(ValueError, match=re.escape(message.format(p=folder))):
        ByteText.load(*make(folder))


def test_too_short_names_what_it_got(folder):
    text = ByteText.load([folder / "00.txt"], [folder / "20.txt"])
    text.require(21)
    with pytest.raises(ValueError, match=re.escape("data: got 21 bytes (1 file(s), 21 bytes; held out")):
        text.require(22)
    text = ByteText.load([folder / "20.txt"], [folder / "00.txt"])
    with pytest.raises(ValueError, match="eval_data: got 21 bytes"):
        text.require(22)


def test_unreadable_is_refused_by_path(folder, monkeypatch):
    def deny(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    with pytest.raises(ValueError, match=r"data: got .*00\.txt, which cannot be read \(Permission denied\)"):
        ByteText.load([folder / "00.txt"])
