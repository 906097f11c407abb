"""Plan only: masks to and from FlexAttention's BlockMask, compared with what torch builds from the same rule."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from distattn import mask_flex
from distattn.errors import MaskError
from distattn.mask import Mask

LENGTHS = [70, 300, 3, 150, 0, 40]
N = sum(LENGTHS)
DOC = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))

CASES = {
    "causal": (lambda b, h, q, k: q >= k, Mask.causal(N), 1),
    "window": (lambda b, h, q, k: (q >= k) & (q - k <= 90), Mask.sliding_window(N, 90), 1),
    "documents": (lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k), Mask.documents(LENGTHS), 5),
    "whole_documents": (lambda b, h, q, k: DOC[q] == DOC[k], Mask.documents(LENGTHS, causal=False), 5),
    "prefix": (lambda b, h, q, k: ((q < 201) & (k < 201)) | (q >= k), Mask.prefix_lm(N, 201), 5),
    "global": (
        lambda b, h, q, k: (q < 20) | (k < 20) | ((q - k <= 50) & (k - q <= 30)),
        Mask.global_window(N, 20, 50, 30),
        8,
    ),
    "nothing": (lambda b, h, q, k: q < 0, Mask.from_bands([], N, N), 0),
    "everything": (lambda b, h, q, k: q >= 0, Mask.full(N, N), 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_size", [128, (32, 64)], ids=str)
def test_from_flex_is_exact_and_small(name, block_size):
    rule, expected, max_bands = CASES[name]
    block_mask = create_block_mask(rule, None, None, N, N, device="cpu", BLOCK_SIZE=block_size)
    mask = Mask.from_flex(block_mask)
    assert mask == expected
    assert len(mask.bands) <= max_bands


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_size", [128, 50])
def test_to_flex_has_the_blocks_and_pairs_that_torch_finds(name, block_size):
    rule, mask, _ = CASES[name]
    expected = create_block_mask(rule, None, None, N, N, device="cpu", BLOCK_SIZE=block_size)
    found = mask.to_flex(block_size=block_size)
    for table in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, table), getattr(expected, table)), table
    assert torch.equal(found.to_dense(), expected.to_dense())
    pairs = create_mask(found.mask_mod, 1, 1, N, N, "cpu")[0, 0]
    assert torch.equal(pairs, torch.from_numpy(mask.dense()))
    assert Mask.from_flex(found) == mask


def test_a_rectangle_goes_there_and_back():
    mask = Mask.from_cu_seqlens([0, 40, 45, 45, 170], [0, 100, 101, 130, 300], causal=True)
    block_mask = mask.to_flex(block_size=32)
    assert block_mask.seq_lengths == (170, 300)
    assert Mask.from_flex(block_mask) == mask


def test_causal_at_4k_comes_back_as_one_band():
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 4096, 4096, device="cpu")
    assert Mask.from_flex(block_mask).bands.tolist() == Mask.causal(4096).bands.tolist()


def test_partial_blocks_are_evaluated_in_chunks(monkeypatch):
    monkeypatch.setattr(mask_flex, "_PAIRS_AT_ONCE", 3 * 32 * 32)
    rule, expected, _ = CASES["documents"]
    assert Mask.from_flex(create_block_mask(rule, None, None, N, N, device="cpu", BLOCK_SIZE=32)) == expected


def test_ten_thousand_documents_are_one_look_up_per_pair():
    lengths = torch.full((10_000,), 13)
    mask = Mask.documents(lengths)
    block_mask = mask.to_flex(block_size=1024)
    assert len(mask_flex.key_ranges(mask.num_queries, mask.bands)) == 1
    q = torch.randint(0, 130_000, (1000,))
    k = (q + torch.randint(-13, 14, (1000,))).clamp(0, 129_999)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(block_mask.mask_mod(zero, zero, q, k), (q // 13 == k // 13) & (k <= q))
    assert int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum()) < 3 * 127  # pyright: ignore


def test_a_block_mask_that_is_alike_for_all_heads_is_taken():
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, 2, 3, 100, 100, device="cpu")
    assert Mask.from_flex(block_mask) == Mask.causal(100)


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: q >= k + h,  # differs inside a partial block
        lambda b, h, q, k: (q >= k) & (q - k < 32 + 32 * b),  # differs in the blocks listed
    ],
    ids=["heads", "batch"],
)
def test_a_block_mask_that_differs_between_heads_or_batch_entries_is_refused(rule):
    block_mask = create_block_mask(rule, 2, 2, 128, 128, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(MaskError, match=r"other pairs at batch entry \d, head \d than at 0, 0"):
        Mask.from_flex(block_mask)


def test_a_block_listed_twice_is_refused():
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    with pytest.raises(MaskError, match="lists a block twice"):
        Mask.from_flex(BlockMask.from_kv_blocks(one, zero, one, zero, BLOCK_SIZE=128))


def test_a_mask_without_blocks_in_full_form_is_read():
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(one, zero, BLOCK_SIZE=64, mask_mod=lambda b, h, q, k: q >= k)
    assert Mask.from_flex(block_mask) == Mask.causal(64)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: Mask.from_flex(torch.ones(4, 4)), "takes a torch.nn.attention.flex_attention.BlockMask"),  # pyright: ignore
        (lambda: Mask.causal(64).to_flex(block_size=0), "blocks of 1 to 32768"),
        (lambda: Mask.causal(0).to_flex(), "at least one query and key"),
        (lambda: Mask.causal(1 << 24).to_flex(), "17179869184 blocks and at most 134217728 .* larger block_size"),
        (
            lambda: Mask.from_bands([(0, 400, 2 * k, 2 * k + 1, -400, 400) for k in range(100)], 400, 400).to_flex(),
            "sees 100 separate ranges of keys .* no more than 64",
        ),
    ],
)
def test_refusals(convert, message):
    with pytest.raises(MaskError, match=message):
        convert()
