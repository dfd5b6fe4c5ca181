"""Where sequences begin and end, from masks and position ids."""

import pytest
import torch

from osdn.nn.packing import find_packing


def test_full_rows_need_no_packing():
    assert find_packing(2, 3) is None
    assert find_packing(2, 3, torch.ones(2, 3)) is None
    assert find_packing(2, 3, torch.ones(2, 7), torch.arange(3)[None]) is None
    assert find_packing(2, 1, None, torch.tensor([[5], [0]])) is None


def test_mask_keeps_rows_apart_and_takes_its_last_columns():
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    packing = find_packing(4, 3, mask)
    assert packing.per_row
    assert packing.cu_seqlens.tolist() == [0, 2, 4, 4, 6]
    assert packing.tokens.tolist() == [1, 2, 3, 5, 9, 10]
    x = torch.randn(4, 3, 2)
    torch.testing.assert_close(packing.unpack(packing.pack(x)), x * mask[:, 2:, None], rtol=0, atol=0)


def test_positions_that_do_not_rise_begin_a_sequence():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 7, 7]])
    packing = find_packing(2, 6, None, positions)
    assert not packing.per_row
    assert packing.tokens is None
    assert packing.cu_seqlens.tolist() == [0, 3, 5, 6, 11, 12]
    x = torch.randn(2, 6, 3)
    assert packing.pack(x).shape == (1, 12, 3)
    torch.testing.assert_close(packing.unpack(packing.pack(x)), x, rtol=0, atol=0)


def test_holes_are_no_boundaries_but_resets_among_real_tokens_are():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1]])
    generated = torch.tensor([[0, 0, 0, 1, 0, 2, 3]])  # as `generate` numbers them: 0 at padding
    assert find_packing(1, 7, mask, generated).per_row
    assert find_packing(1, 7, mask, torch.arange(7)[None]).per_row
    reset = find_packing(1, 7, mask, torch.tensor([[9, 9, 0, 1, 5, 0, 1]]))
    assert not reset.per_row
    assert reset.cu_seqlens.tolist() == [0, 2, 4]
    assert reset.tokens.tolist() == [2, 3, 5, 6]


def test_seq_idx_says_the_same():
    packing = find_packing(1, 5, None, None, torch.tensor([[0, 0, 1, 1, 2]]))
    assert packing.cu_seqlens.tolist() == [0, 2, 4, 5]


def test_nothing_but_padding():
    packing = find_packing(2, 3, torch.zeros(2, 3))
    assert packing.is_empty
    assert packing.cu_seqlens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(1, 3), torch.ones(2, 1, 3, 3), {"full_attention": None}])
def test_masks_that_do_not_fit(mask):
    with pytest.raises(ValueError, match=r"attention_mask: got .* takes shape \[2, >= 3\]"):
        find_packing(2, 3, mask)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 0]])])
def test_a_packing_moves_with_what_it_packs(mask):
    packing = find_packing(1, 3, mask, torch.tensor([[0, 0, 1]])).to(torch.device("meta"))
    assert packing.unpack(packing.pack(torch.zeros(1, 3, 2, device="meta"))).shape == (1, 3, 2)
    assert packing.cu_seqlens.device.type == "meta"


def test_ids_that_do_not_fit():
    with pytest.raises(ValueError, match=r"position_ids: got \(3, 2, 3\), takes shape \[2, 3\] or \[1, 3\]"):
        find_packing(2, 3, None, torch.zeros(3, 2, 3))
    with pytest.raises(ValueError, match=r"seq_idx: got \(1, 4\)"):
        find_packing(2, 3, None, None, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"position_ids: got list, takes shape \[1, 2\]$"):
        find_packing(1, 2, None, [[0, 1]])
