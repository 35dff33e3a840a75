"""Messages in fp8: their bytes are the CPU's and the definition's, each side lands the other's; corruption is seen, and a wrong kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._bounds import bound, error
from duomo_kernels.kv_fp8_pack import _e4m3_codes, kv_fp8_land, kv_fp8_pack, kv_fp8_pack_reference
from duomo_kernels.kv_hash_pack import CORRUPT, GOOD, Seal, hash_scratch
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8, kv_rows_of_fp8, packed_bytes
from services.kv_transfer import layout
from services.kv_transfer.hashing import message_hash

FP8 = torch.float8_e4m3fn
NUM_LAYERS, NUM_BLOCKS = 3, 7
BEYOND = 3  # words after the trailer, which nothing may touch
UNTOUCHED = -0x0123_4567_89AB_CDEF
# (rows of a block, head dim, blocks, layers): odd sizes, payloads with and without padding behind them, tiles that are whole and not,
# chunks of 8192 words that end within a tile and with one, more tiles than programs
SHAPES = [
    (8, 8, 1, range(0, 1)),
    (24, 16, 3, range(1, 3)),
    (32, 64, 3, range(0, 3)),
    (40, 80, 2, range(1, 2)),
    (64, 128, 2, range(1, 3)),
    (96, 128, 3, range(0, 3)),
    (72, 96, 5, range(0, 3)),
    (256, 128, 3, range(0, 2)),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A message in memory, with the pool it came from."""

    pool_LBRD: Tensor
    layers: range
    ids_n: Tensor
    seal: Seal
    message_M: Tensor

    @property
    def num_words(self) -> int:
        return len(self.layers) * self.ids_n.numel() * packed_bytes(*self.pool_LBRD.shape[2:]) // 8

    def rows(self, pool_LBRD: Tensor) -> Tensor:
        """Those of the message, in its order."""
        return torch.cat([pool_LBRD[layer, self.ids_n.long()].flatten(0, 1) for layer in self.layers])

    def numbers(self) -> Tensor:
        """What the message's rows stand for, by the CPU."""
        x_ND = torch.empty(self.rows(self.pool_LBRD).shape)
        kv_rows_of_fp8(self.message_M[: self.num_words].cpu().view(torch.uint8), x_ND)
        return x_ND.to(self.message_M.device)


def _send(rows: int, head_dim: int, num_ids: int, layers: range, device: torch.device, dtype: torch.dtype = torch.float32) -> Sent:
    """Everything but the launch: the message's memory is not written yet."""
    shape = (NUM_LAYERS, NUM_BLOCKS, rows, head_dim)
    spread = torch.randint(-18, 1, shape).float() + torch.randint(-8, 8, (*shape[:3], 1)).float()
    pool_LBRD = (torch.randn(shape) * torch.exp2(spread)).to(dtype)
    num_bytes = len(layers) * num_ids * packed_bytes(rows, head_dim)
    span = layout.MessageSpan(message_idx=7, group=3, layers=layers, block_lo=0, block_hi=num_ids, num_bytes=num_bytes)
    handle_id = (1 << 63) + 12_345
    seal = Seal(handle_id=handle_id, group=3, message_idx=7, start=layout.trailer_start(handle_id, span))
    message_M = torch.full((layout.message_bytes(num_bytes) // 8 + BEYOND,), UNTOUCHED)
    ids_n = torch.randperm(NUM_BLOCKS)[:num_ids].int()
    return Sent(pool_LBRD=pool_LBRD.to(device), layers=layers, ids_n=ids_n.to(device), seal=seal, message_M=message_M.to(device))


def _packed(sent: Sent) -> Sent:
    kv_fp8_pack(sent.pool_LBRD, sent.layers, sent.ids_n, sent.message_M, sent.seal, hash_scratch(sent.pool_LBRD.device))
    return sent


def _of_cpu(sent: Sent) -> Sent:
    """The message as a CPU's replica writes it."""
    message_M, num_bytes = sent.message_M.cpu().clone(), 8 * sent.num_words
    kv_rows_fp8(sent.rows(sent.pool_LBRD).cpu(), message_M[: sent.num_words].view(torch.uint8))
    data = message_M.numpy().data.cast("B")
    digest = message_hash(data[:num_bytes], sent.seal.handle_id, sent.seal.group, sent.seal.message_idx)
    layout.write_trailer(data[layout.trailer_offset(num_bytes) : layout.message_bytes(num_bytes)], sent.seal.start, digest)
    return replace(sent, message_M=message_M.to(sent.message_M.device))


def _land(sent: Sent, dtype: torch.dtype | None = None) -> tuple[int, Tensor]:
    """(flag, a pool of zeros with the message landed in it)."""
    pool_LBRD = torch.zeros_like(sent.pool_LBRD, dtype=dtype or sent.pool_LBRD.dtype)
    flag_1 = torch.full((1,), -1, dtype=torch.int32, device=pool_LBRD.device)
    scratch = hash_scratch(pool_LBRD.device)
    kv_fp8_land(pool_LBRD, sent.layers, sent.ids_n, sent.message_M, sent.seal, scratch, flag_1)
    assert scratch.tolist() == [0, 0]
    return int(flag_1), pool_LBRD


@pytest.mark.parametrize(("rows", "head_dim", "num_ids", "layers"), SHAPES)
def test_a_packed_message_is_the_cpus_and_the_definitions(
    rows: int, head_dim: int, num_ids: int, layers: range, device: torch.device
) -> None:
    sent = _packed(_send(rows, head_dim, num_ids, layers, device))
    assert torch.equal(sent.message_M, _of_cpu(replace(sent, message_M=torch.full_like(sent.message_M, UNTOUCHED))).message_M)
    payload_M, digest = kv_fp8_pack_reference(sent.pool_LBRD, layers, sent.ids_n, sent.seal)
    assert torch.equal(sent.message_M[: sent.num_words].cpu(), payload_M)
    trailer = layout.trailer_offset(8 * sent.num_words) // 8
    assert int(sent.message_M[trailer + 4]) & ((1 << 64) - 1) == digest
    assert bool((sent.message_M[-BEYOND:] == UNTOUCHED).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_pools_pack_the_cpus_bytes(dtype: torch.dtype, device: torch.device) -> None:
    sent = _packed(_send(64, 64, 3, range(0, 2), device, dtype))
    assert torch.equal(sent.message_M, _of_cpu(sent).message_M)


@pytest.mark.parametrize(("rows", "head_dim", "num_ids", "layers"), SHAPES)
def test_a_cpus_message_lands_as_its_numbers(rows: int, head_dim: int, num_ids: int, layers: range, device: torch.device) -> None:
    sent = _of_cpu(_send(rows, head_dim, num_ids, layers, device))
    flag, pool_LBRD = _land(sent)
    assert flag == GOOD
    assert torch.equal(sent.rows(pool_LBRD), sent.numbers())
    assert error(sent.rows(pool_LBRD), sent.rows(sent.pool_LBRD).double()) <= bound(FP8)
    for layer in range(NUM_LAYERS):
        pool_LBRD[layer, sent.ids_n.long() if layer in layers else slice(0)] = 0
    assert not pool_LBRD.any(), "a block was written that is none of the message's"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pool_of_another_dtype_lands_the_same_numbers(dtype: torch.dtype, device: torch.device) -> None:
    sent = _packed(_send(32, 64, 2, range(0, 2), device))
    flag, pool_LBRD = _land(sent, dtype)
    assert flag == GOOD and torch.equal(pool_LBRD, _land(sent)[1].to(dtype))


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # the interpreter's numpy on zero times infinity
def test_poisoned_rows_are_the_cpus_and_land_as_nan(device: torch.device) -> None:
    sent = _send(24, 80, 2, range(0, 1), device)
    for place, poison in enumerate((float("nan"), float("inf"), -float("inf"))):
        sent.pool_LBRD[0, sent.ids_n[0], 2 + 9 * place, 79 - place] = poison
    _packed(sent)
    assert torch.equal(sent.message_M, _of_cpu(sent).message_M)
    flag, pool_LBRD = _land(sent)
    poisoned_N = sent.rows(pool_LBRD).isnan().any(dim=1)
    assert flag == GOOD and poisoned_N.nonzero().flatten().tolist() == [2, 11, 20]
    assert bool(sent.rows(pool_LBRD)[poisoned_N].isnan().all())


def test_zeros_and_subnormal_numbers(device: torch.device) -> None:
    sent = _send(8, 16, 1, range(0, 1), device)
    sent.pool_LBRD[:] = 0
    row_8D = sent.pool_LBRD[0, int(sent.ids_n[0])]
    row_8D[1, 0], row_8D[2, 0], row_8D[3, 0], row_8D[4, 0] = -0.0, 2.0**-149, 2.0**-127, 2.0**-108
    row_8D[5] = torch.exp2(-torch.arange(16.0)) * 448  # down into e4m3's subnormals
    _packed(sent)
    assert torch.equal(sent.message_M, _of_cpu(sent).message_M)
    flag, pool_LBRD = _land(sent)
    assert flag == GOOD and torch.equal(sent.rows(pool_LBRD)[4:6], row_8D[4:6]) and not sent.rows(pool_LBRD)[:4].any()


@triton.jit
def _codes_of(x_ptr, codes_ptr, N: tl.constexpr):
    i_N = tl.arange(0, N)
    tl.store(codes_ptr + i_N, _e4m3_codes(tl.load(x_ptr + i_N)))


def test_codes_are_torchs_for_every_bf16_number_and_on_both_sides_of_every_tie(device: torch.device) -> None:
    bf16 = torch.arange(0, 65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    held = torch.arange(0, 256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    held = held[~held.isnan()].sort().values
    ties = (held[1:] + held[:-1]) / 2
    x_N = torch.zeros(1 << 17)
    told = torch.cat([bf16[bf16.abs() <= 448], held, ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))])
    x_N[: len(told)] = told
    codes_N = torch.empty(len(x_N), dtype=torch.uint8, device=device)
    _codes_of[(1,)](x_N.to(device), codes_N, len(x_N))
    assert torch.equal(codes_N.cpu(), x_N.to(torch.float8_e4m3fn).view(torch.uint8))


def test_ties_and_the_last_number_below_a_scale(device: torch.device) -> None:
    """The middle of every two numbers of e4m3, both signs, in rows whose largest is just in reach, and just beyond."""
    number_C = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle_C = (number_C[1:] + number_C[:-1]) / 2
    sent = _send(8, 256, 1, range(0, 1), device)
    row_8D = sent.pool_LBRD[0, int(sent.ids_n[0])]
    row_8D[:] = torch.cat((middle_C, -middle_C, torch.zeros(3), torch.tensor([448.0])))
    row_8D[3:, 255] = torch.nextafter(torch.tensor(448.0), torch.tensor(1e9))
    _packed(sent)
    assert torch.equal(sent.message_M, _of_cpu(sent).message_M)
    exponents_R = sent.message_M[: sent.num_words].view(torch.uint8)[-8:]
    assert exponents_R.tolist() == [127] * 3 + [128] * 5


def test_more_tiles_than_a_program_hashes_exponents_of_at_once(device: torch.device) -> None:
    """Of 16 programs at least, 32 tiles each."""
    sent = _send(8, 8, 1, range(0, 1), device)
    pool_LBRD = torch.randn(1, 1, 16 * 32 * 32 + 320, 128, device=device).half()
    num_words = packed_bytes(*pool_LBRD.shape[2:]) // 8
    message_M = torch.full((layout.message_bytes(8 * num_words) // 8,), UNTOUCHED, device=device)
    sent = replace(sent, pool_LBRD=pool_LBRD, ids_n=torch.zeros_like(sent.ids_n), message_M=message_M)
    assert torch.equal(_packed(sent).message_M, _of_cpu(sent).message_M)
    sent.message_M[num_words - 1] ^= 1 << 62  # the last rows' exponents
    assert _land(sent)[0] == CORRUPT


def test_corruption_is_seen(device: torch.device) -> None:
    """Of codes, of exponents, of the trailer; the padding and the trailer's unused words are nobody's business."""
    sent = _packed(_send(24, 16, 2, range(1, 2), device))
    trailer = layout.trailer_offset(8 * sent.num_words) // 8
    assert (sent.num_words, trailer) == (96 + 6, 104)
    for at in (0, 47, 48, 95, 96, 101, *range(trailer, trailer + 5)):
        broken_M = sent.message_M.clone()
        broken_M[at] ^= 1 << (at % 63)
        assert _land(replace(sent, message_M=broken_M))[0] == CORRUPT, at
    swapped_M = sent.message_M.clone()
    swapped_M[[2, 5]] = swapped_M[[5, 2]]
    assert _land(replace(sent, message_M=swapped_M))[0] == CORRUPT
    unread_M = sent.message_M.clone()
    unread_M[[102, 103, trailer + 5]] ^= 1
    assert _land(sent)[0] == GOOD == _land(replace(sent, message_M=unread_M))[0]


def test_another_message_is_not_taken_for_this_one(device: torch.device) -> None:
    sent = _packed(_send(8, 16, 2, range(1, 2), device))
    for other in ({"handle_id": 1}, {"group": 4}, {"message_idx": 8}, {"start": bytes(32)}):
        assert _land(replace(sent, seal=replace(sent.seal, **other)))[0] == CORRUPT, other


def test_wrong_scales_are_noticed(device: torch.device) -> None:
    """A kernel that gave each row its neighbour's scale, sealed with the right hash, would be seen by its error."""
    sent = _send(32, 64, 1, range(0, 1), device)
    sent.pool_LBRD[:] = torch.randn(32, 64, device=device) * torch.exp2(torch.arange(32.0, device=device))[:, None]
    wrong = _of_cpu(replace(sent, pool_LBRD=sent.pool_LBRD))
    data_P = wrong.message_M[: sent.num_words].view(torch.uint8)
    data_P[32 * 64 : 32 * 65] = data_P[32 * 64 : 32 * 65].roll(1)
    _, pool_LBRD = _land(wrong)
    assert error(sent.rows(pool_LBRD), sent.rows(sent.pool_LBRD).double()) > bound(FP8)


def test_one_scratch_serves_launch_after_launch(device: torch.device) -> None:
    scratch, seen = hash_scratch(device), set()
    sent = _send(64, 64, 2, range(1, 3), device)
    for _ in range(3):
        kv_fp8_pack(sent.pool_LBRD, sent.layers, sent.ids_n, sent.message_M, sent.seal, scratch)
        seen.add(tuple(sent.message_M.tolist()))
    assert len(seen) == 1 and scratch.tolist() == [0, 0]


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    sent = _send(8, 16, 2, range(1, 3), device)
    wrong = [
        replace(sent, ids_n=sent.ids_n.long()),
        replace(sent, ids_n=sent.ids_n[:0]),
        replace(sent, layers=range(2, 4)),
        replace(sent, layers=range(2, 2)),
        replace(sent, message_M=sent.message_M[: -BEYOND - 1]),
        replace(sent, seal=replace(sent.seal, start=b"short")),
        replace(sent, pool_LBRD=sent.pool_LBRD.double()),
        replace(sent, pool_LBRD=sent.pool_LBRD[:, :, :4].contiguous()),
        replace(sent, pool_LBRD=sent.pool_LBRD[:, :, :, :12].contiguous()),
        replace(sent, pool_LBRD=sent.pool_LBRD[:, :, :, :8]),
    ]
    for each in wrong:
        with pytest.raises(AssertionError):
            _packed(each)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "head_dim", "num_ids"), [(512, 128, 128), (2048, 128, 16), (256, 64, 200), (96, 80, 33)])
def test_real_sizes(rows: int, head_dim: int, num_ids: int, device: torch.device) -> None:
    """bf16 pools of a GPU against the CPU, byte for byte and number for number."""
    layers, num_bytes = range(1, 5), 4 * num_ids * packed_bytes(rows, head_dim)
    pool_LBRD = torch.randn(6, 256, rows, head_dim, device=device).bfloat16()
    sent = Sent(
        pool_LBRD=pool_LBRD,
        layers=layers,
        ids_n=torch.randperm(256, device=device)[:num_ids].int(),
        seal=Seal(handle_id=5, group=0, message_idx=1, start=bytes(range(32))),
        message_M=torch.full((layout.message_bytes(num_bytes) // 8 + BEYOND,), UNTOUCHED, device=device),
    )
    assert torch.equal(_packed(sent).message_M, _of_cpu(sent).message_M)
    flag, landed_LBRD = _land(sent)
    assert flag == GOOD and torch.equal(sent.rows(landed_LBRD).float(), sent.numbers())
    sent.message_M[sent.num_words // 2] ^= 1
    assert _land(sent)[0] == CORRUPT
