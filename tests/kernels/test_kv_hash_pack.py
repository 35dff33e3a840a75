"""Messages packed here are sealed as the CPU's peer seals them, bit for bit, and its messages are verified here; corruption is seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from duomo_kernels import kv_hash_pack as op
from duomo_kernels.kv_hash_pack import (
    CORRUPT,
    GOOD,
    Seal,
    cut_to_heads,
    hash_scratch,
    kv_hash_pack,
    kv_hash_pack_reference,
    kv_verify_scatter,
)
from services.kv_transfer import layout
from services.kv_transfer.hashing import message_hash, splitmix64

NUM_LAYERS, NUM_BLOCKS = 5, 11
BEYOND = 3  # words after the trailer, which nothing may touch
UNTOUCHED = -0x0123_4567_89AB_CDEF


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A message in memory, with the pool it came from."""

    pool_LBW: Tensor
    layers: range
    ids_n: Tensor
    seal: Seal
    message_M: Tensor

    @property
    def num_words(self) -> int:
        return len(self.layers) * self.ids_n.numel() * self.pool_LBW[0, 0].numel()


# (words of a block, blocks, layers): odd widths, tiles that straddle a chunk of 8192 words, one chunk exactly, several, and a last part
SHAPES = [(1, 1, range(0, 1)), (63, 3, range(1, 3)), (257, 3, range(0, 5)), (2880, 3, range(1, 3)), (512, 3, range(0, 3))]
SHAPES += [(1024, 8, range(2, 3)), (4096, 4, range(1, 3))]
# (kv heads of a block, those of the message, words of a head): tiles whole and masked, runs that begin at odd words, runs across chunks
CUTS = [(4, range(1, 3), 512), (4, range(3, 4), 256), (6, range(2, 5), 512), (2, range(1, 2), 4096), (1, range(0, 1), 32)]
CUTS += [(3, range(1, 2), 7), (5, range(0, 2), 63), (3, range(1, 3), 1440)]


def _send(width: int, num_ids: int, layers: range, device: torch.device, cut: tuple[range, int] | None = None) -> Sent:
    """Everything but the launch: the message's memory is not written yet. cut: the heads that go, of how many."""
    make = torch.Generator().manual_seed(width + num_ids)
    pool_LBW = torch.randint(-(2**63), 2**63 - 1, (NUM_LAYERS, NUM_BLOCKS, width), generator=make).to(device)
    if cut is not None:
        pool_LBW = cut_to_heads(pool_LBW, *cut)
    num_words = len(layers) * num_ids * pool_LBW[0, 0].numel()
    span = layout.MessageSpan(message_idx=7, group=3, layers=layers, block_lo=0, block_hi=num_ids, num_bytes=8 * num_words)
    handle_id = (1 << 63) + 12_345
    seal = Seal(handle_id=handle_id, group=3, message_idx=7, start=layout.trailer_start(handle_id, span))
    message_M = torch.full((layout.message_bytes(8 * num_words) // 8 + BEYOND,), UNTOUCHED)
    ids_n = torch.randperm(NUM_BLOCKS, generator=make)[:num_ids].int()
    return Sent(pool_LBW=pool_LBW, layers=layers, ids_n=ids_n.to(device), seal=seal, message_M=message_M.to(device))


def _packed(sent: Sent) -> Sent:
    kv_hash_pack(sent.pool_LBW, sent.layers, sent.ids_n, sent.message_M, sent.seal, hash_scratch(sent.pool_LBW.device))
    return sent


def _verify(sent: Sent) -> tuple[int, Tensor]:
    """(flag, a pool of zeros with the message scattered into it)."""
    pool_LBW = torch.zeros_like(sent.pool_LBW)
    flag_1 = torch.full((1,), -1, dtype=torch.int32, device=pool_LBW.device)
    scratch = hash_scratch(pool_LBW.device)
    kv_verify_scatter(pool_LBW, sent.layers, sent.ids_n, sent.message_M, sent.seal, scratch, flag_1)
    assert scratch.tolist() == [0, 0]
    return int(flag_1), pool_LBW


def _bytes(sent: Sent) -> memoryview:
    return sent.message_M.cpu().numpy().data.cast("B")


@pytest.mark.parametrize(("width", "num_ids", "layers"), SHAPES)
def test_pack_seals_as_the_cpu_does(width: int, num_ids: int, layers: range, device: torch.device) -> None:
    sent = _packed(_send(width, num_ids, layers, device))
    data, num_bytes = _bytes(sent), 8 * sent.num_words
    expected_M, digest = kv_hash_pack_reference(sent.pool_LBW, layers, sent.ids_n, sent.seal)
    assert torch.equal(sent.message_M[: sent.num_words].cpu(), expected_M)
    trailer = bytearray(layout.TRAILER_BYTES)
    of_cpu = message_hash(data[:num_bytes], sent.seal.handle_id, sent.seal.group, sent.seal.message_idx)
    layout.write_trailer(memoryview(trailer), sent.seal.start, of_cpu)
    end = layout.message_bytes(num_bytes)
    assert bytes(data[layout.trailer_offset(num_bytes) : end]) == bytes(trailer) and of_cpu == digest
    rest = torch.cat((sent.message_M[sent.num_words : layout.trailer_offset(num_bytes) // 8], sent.message_M[end // 8 :]))
    assert bool((rest == UNTOUCHED).all())


@pytest.mark.parametrize(("width", "num_ids", "layers"), SHAPES)
def test_scatter_takes_what_the_cpu_sealed(width: int, num_ids: int, layers: range, device: torch.device) -> None:
    sent = _send(width, num_ids, layers, device)
    payload_M, _ = kv_hash_pack_reference(sent.pool_LBW, layers, sent.ids_n, sent.seal)
    message_M = sent.message_M.cpu()
    message_M[: sent.num_words] = payload_M
    data, num_bytes = message_M.numpy().data.cast("B"), 8 * sent.num_words
    digest = message_hash(data[:num_bytes], sent.seal.handle_id, sent.seal.group, sent.seal.message_idx)
    layout.write_trailer(data[layout.trailer_offset(num_bytes) : layout.message_bytes(num_bytes)], sent.seal.start, digest)
    flag, pool_LBW = _verify(replace(sent, message_M=message_M.to(device)))
    assert flag == GOOD
    expected_LBW = torch.zeros_like(pool_LBW)
    for layer in layers:
        expected_LBW[layer, sent.ids_n.long()] = sent.pool_LBW[layer, sent.ids_n.long()]
    assert torch.equal(pool_LBW, expected_LBW)


@pytest.mark.parametrize(("num_heads", "heads", "head_words"), CUTS)
def test_some_heads_of_a_pool_become_a_message(num_heads: int, heads: range, head_words: int, device: torch.device) -> None:
    """[layer][block][k, v][heads][...], sealed as the CPU does, and landed by a rank that holds these heads alone."""
    layers, num_ids = range(1, 4), 3
    sent = _packed(_send(2 * num_heads * head_words, num_ids, layers, device, (heads, num_heads)))
    whole_LBW = sent.pool_LBW.as_strided((NUM_LAYERS, NUM_BLOCKS, width := 2 * num_heads * head_words), (NUM_BLOCKS * width, width, 1), 0)
    pool_LB2HS = whole_LBW.cpu().view(NUM_LAYERS, NUM_BLOCKS, 2, num_heads, head_words)
    expected_LnW = pool_LB2HS[1:4, sent.ids_n.long().cpu(), :, heads.start : heads.stop].flatten(2)
    data, num_bytes = _bytes(sent), 8 * expected_LnW.numel()
    assert torch.equal(sent.message_M[: sent.num_words].cpu(), expected_LnW.flatten())
    payload_M, digest = kv_hash_pack_reference(sent.pool_LBW, layers, sent.ids_n, sent.seal)
    of_cpu = message_hash(data[:num_bytes], sent.seal.handle_id, sent.seal.group, sent.seal.message_idx)
    assert torch.equal(payload_M, expected_LnW.flatten()) and layout.read_hash(data[layout.trailer_offset(num_bytes) :]) == of_cpu == digest

    held_LBW = torch.empty(NUM_LAYERS, NUM_BLOCKS, 2 * len(heads) * head_words, dtype=torch.int64, device=device)
    flag, landed_LBW = _verify(replace(sent, pool_LBW=held_LBW))
    expected_LBW = torch.zeros_like(held_LBW).cpu()
    expected_LBW[1:4, sent.ids_n.long().cpu()] = expected_LnW
    assert flag == GOOD and torch.equal(landed_LBW.cpu(), expected_LBW)


@pytest.mark.parametrize(("num_heads", "heads", "head_words"), CUTS)
def test_a_message_lands_in_some_heads_and_leaves_the_others(num_heads: int, heads: range, head_words: int, device: torch.device) -> None:
    """Packed whole by a rank that holds these heads alone."""
    layers, num_ids = range(0, 2), 4
    sent = _packed(_send(2 * len(heads) * head_words, num_ids, layers, device))
    pool_LBW = torch.full((NUM_LAYERS, NUM_BLOCKS, 2 * num_heads * head_words), UNTOUCHED, device=device)
    expected_LB2HS = pool_LBW.clone().view(NUM_LAYERS, NUM_BLOCKS, 2, num_heads, head_words)
    came_LnW = sent.message_M[: sent.num_words].view(2, num_ids, 2, len(heads), head_words)
    expected_LB2HS[:2, sent.ids_n.long(), :, heads.start : heads.stop] = came_LnW
    flag_1 = torch.full((1,), -1, dtype=torch.int32, device=device)
    cut_LB2R = cut_to_heads(pool_LBW, heads, num_heads)
    kv_verify_scatter(cut_LB2R, layers, sent.ids_n, sent.message_M, sent.seal, hash_scratch(pool_LBW.device), flag_1)
    assert int(flag_1) == GOOD and torch.equal(pool_LBW, expected_LB2HS.flatten(2))
    sent.message_M[sent.num_words - 1] ^= 1
    kv_verify_scatter(cut_LB2R, layers, sent.ids_n, sent.message_M, sent.seal, hash_scratch(pool_LBW.device), flag_1)
    assert int(flag_1) == CORRUPT


def test_all_heads_are_the_pool_itself_and_heads_it_lacks_are_refused(device: torch.device) -> None:
    pool_LBW = torch.zeros(2, 3, 48, dtype=torch.int64, device=device)
    assert cut_to_heads(pool_LBW, range(0, 4), 4) is pool_LBW
    for heads, num_heads in ((range(2, 5), 4), (range(-1, 2), 4), (range(1, 1), 4), (range(0, 4, 2), 4), (range(0, 1), 5)):
        with pytest.raises(AssertionError):
            cut_to_heads(pool_LBW, heads, num_heads)


def test_corruption_is_seen(device: torch.device) -> None:
    sent = _packed(_send(63, 2, range(1, 2), device))
    trailer = layout.trailer_offset(8 * sent.num_words) // 8
    words = [0, 62, sent.num_words - 1, *range(trailer, trailer + 5)]
    for at in words:
        broken_M = sent.message_M.clone()
        broken_M[at] ^= 1 << (at % 63)
        assert _verify(replace(sent, message_M=broken_M))[0] == CORRUPT, at
    swapped_M = sent.message_M.clone()
    swapped_M[[2, 5]] = swapped_M[[5, 2]]
    assert _verify(replace(sent, message_M=swapped_M))[0] == CORRUPT
    assert _verify(sent)[0] == GOOD
    beyond_M = sent.message_M.clone()
    beyond_M[trailer + 5] ^= 1  # the trailer's unused words are nobody's business
    assert _verify(replace(sent, message_M=beyond_M))[0] == GOOD


def test_another_message_is_not_taken_for_this_one(device: torch.device) -> None:
    sent = _packed(_send(63, 2, range(1, 2), device))
    for other in ({"handle_id": 1}, {"group": 4}, {"message_idx": 8}, {"start": bytes(32)}):
        assert _verify(replace(sent, seal=replace(sent.seal, **other)))[0] == CORRUPT, other


def test_one_scratch_serves_launch_after_launch(device: torch.device) -> None:
    scratch = hash_scratch(device)
    sent = _send(512, 2, range(1, 3), device)
    seen = set()
    for _ in range(3):
        message_M = sent.message_M.clone()
        kv_hash_pack(sent.pool_LBW, sent.layers, sent.ids_n, message_M, sent.seal, scratch)
        seen.add(tuple(message_M[sent.num_words :].tolist()))
    assert len(seen) == 1 and scratch.tolist() == [0, 0]
    scratch[0] = 1  # a scratch that someone else left dirty spoils the hash: the check above would have seen it
    kv_hash_pack(sent.pool_LBW, sent.layers, sent.ids_n, sent.message_M, sent.seal, scratch)
    assert tuple(sent.message_M[sent.num_words :].tolist()) not in seen


def test_constants_are_those_of_the_cpu() -> None:
    assert all(op.splitmix64(value) == splitmix64(value) for value in (0, 1, 8191, 1 << 63, (1 << 64) - 1))
    assert all(8 * op.trailer_word(words) == layout.trailer_offset(8 * words) for words in (1, 7, 8, 9, 63, 4096))


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    sent = _send(64, 2, range(1, 3), device)
    wrong = [
        replace(sent, ids_n=sent.ids_n.long()),
        replace(sent, ids_n=sent.ids_n[:0]),
        replace(sent, layers=range(4, 6)),
        replace(sent, layers=range(2, 2)),
        replace(sent, message_M=sent.message_M[: -BEYOND - 1]),
        replace(sent, seal=replace(sent.seal, start=b"short")),
        replace(sent, pool_LBW=sent.pool_LBW.double()),
        replace(sent, pool_LBW=sent.pool_LBW[..., ::2]),
        replace(sent, pool_LBW=sent.pool_LBW.view(5, 11, 4, 16)[..., :8]),
        replace(sent, pool_LBW=sent.pool_LBW.view(5, 11, 2, 32)[:, ::2]),
        replace(sent, pool_LBW=sent.pool_LBW.view(5, 11, 2, 32)[..., ::2]),
    ]
    for each in wrong:
        with pytest.raises(AssertionError):
            _packed(each)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "num_ids", "layers"), [(4096, 128, range(0, 6)), (512, 1000, range(3, 8)), (2880, 64, range(1, 7))])
def test_real_sizes(width: int, num_ids: int, layers: range, device: torch.device) -> None:
    num_words = len(layers) * num_ids * width
    pool_LBW = torch.randint(-(2**63), 2**63 - 1, (8, 1024, width), device=device)
    seal = Seal(handle_id=5, group=0, message_idx=1, start=bytes(range(32)))
    sent = Sent(
        pool_LBW=pool_LBW,
        layers=layers,
        ids_n=torch.randperm(1024, device=device)[:num_ids].int(),
        seal=seal,
        message_M=torch.empty(layout.message_bytes(8 * num_words) // 8, dtype=torch.int64, device=device),
    )
    data = _bytes(_packed(sent))
    assert layout.read_hash(data[layout.trailer_offset(8 * num_words) :]) == message_hash(data[: 8 * num_words], 5, 0, 1)
    flag, scattered_LBW = _verify(sent)
    assert flag == GOOD
    assert torch.equal(
        scattered_LBW[layers.start : layers.stop, sent.ids_n.long()], pool_LBW[layers.start : layers.stop, sent.ids_n.long()]
    )
    sent.message_M[num_words // 2] ^= 1
    assert _verify(sent)[0] == CORRUPT
