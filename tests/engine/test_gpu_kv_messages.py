"""Messages between pools of any device: a GPU's are the CPU's byte for byte, and each lands what the other packed."""

from __future__ import annotations

import threading

import pytest
import torch

from duomo.config import KvDtype
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.gpu_kv_messages import GpuKvLander, GpuKvPacker, warm_messages
from duomo.engine.kv_cache import KvCache, KvSpec
from duomo.engine.kv_messages import KvMessages, message_block_bytes
from duomo_kernels.kv_hash_pack import Seal
from services.kv_transfer import layout
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.layout import MessageSpan
from tests.interpreter import prepare

prepare()

SPEC = KvSpec(num_layers=3, num_kv_heads=2, head_dim=16, block_tokens=16)
NUM_BLOCKS = 7
HANDLE_ID = (1 << 62) + 99
KV_DTYPES: tuple[KvDtype, ...] = ("model", "fp8_e4m3")
# (layers, blocks): one, several of several layers in no order, all
MESSAGES = [(range(1, 2), [4]), (range(0, 2), [5, 0, 3]), (range(0, 3), [6, 2, 4, 0, 1])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no streams")
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_message_launched_ahead_is_packed_behind_what_writes_its_blocks(kv_dtype: KvDtype) -> None:
    """By the device alone: the writing has not begun when the message is launched."""
    device, cache = torch.device("cuda"), filled()
    made = on_gpu(cache, device)
    made.tensor.zero_()
    packer, words = GpuKvPacker(made, kv_dtype), cache.tensor.pin_memory()
    layers, blocks = MESSAGES[2]
    span = span_of(layers, blocks, kv_dtype)
    out = torch.zeros(layout.message_bytes(span.num_bytes), dtype=torch.uint8, device=device)
    packer.pack(layers, blocks, seal_of(span), out)  # compiled: what follows is launched while the device sleeps
    began, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
    began.record()
    torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
    made.tensor.copy_(words, non_blocking=True)
    end.record()
    told = list[tuple[bool, float | None]]()

    def write() -> None:
        packing = packer.launch(layers, blocks, seal_of(span), out, end)
        assert packing is not None
        told.append((packing.is_over(), packing.wait()))

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    ((was_over, took_s),) = told
    assert not was_over and took_s is not None
    assert 0 < took_s < began.elapsed_time(end) / 1000, "its own time, not that of what it waited for"
    assert bytes(out.cpu().numpy()) == bytes(of_cpu(cache, span, blocks, kv_dtype))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def filled() -> KvCache:
    cache = KvCache(SPEC, NUM_BLOCKS)
    cache.tensor.copy_(torch.randn(cache.tensor.shape, generator=torch.Generator().manual_seed(3)))
    return cache


def on_gpu(cache: KvCache, device: torch.device) -> GpuKvCache:
    made = GpuKvCache(SPEC, NUM_BLOCKS, device)
    made.tensor.copy_(cache.tensor)
    return made


def span_of(layers: range, blocks: list[int], kv_dtype: KvDtype = "model") -> MessageSpan:
    num_bytes = len(layers) * len(blocks) * message_block_bytes(SPEC, kv_dtype)
    return MessageSpan(message_idx=2, group=1, layers=layers, block_lo=0, block_hi=len(blocks), num_bytes=num_bytes)


def seal_of(span: MessageSpan) -> Seal:
    return Seal(handle_id=HANDLE_ID, group=span.group, message_idx=span.message_idx, start=layout.trailer_start(HANDLE_ID, span))


def room_for(span: MessageSpan) -> memoryview:
    return memoryview(bytearray(b"\xa5" * layout.message_bytes(span.num_bytes)))


def of_cpu(cache: KvCache, span: MessageSpan, blocks: list[int], kv_dtype: KvDtype = "model") -> memoryview:
    """The message as a CPU's replica writes it."""
    message, end = room_for(span), layout.trailer_offset(span.num_bytes)
    assert KvMessages(cache, kv_dtype).pack(span.layers, blocks, message) == span.num_bytes == end
    digest = message_hash(message[: span.num_bytes], HANDLE_ID, span.group, span.message_idx)
    layout.write_trailer(message[end:], layout.trailer_start(HANDLE_ID, span), digest)
    return message


@pytest.mark.parametrize(("layers", "blocks"), MESSAGES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_packed_message_is_the_cpus(layers: range, blocks: list[int], kv_dtype: KvDtype, device: torch.device) -> None:
    cache, span = filled(), span_of(layers, blocks, kv_dtype)
    packer = GpuKvPacker(on_gpu(cache, device), kv_dtype)
    for _ in range(2):  # the second finds scratch and buffer as the first left them
        message = room_for(span)
        packer.pack(layers, blocks, seal_of(span), message)
        assert message == of_cpu(cache, span, blocks, kv_dtype)


@pytest.mark.parametrize(("layers", "blocks"), MESSAGES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_cpus_message_lands_as_on_a_cpu(layers: range, blocks: list[int], kv_dtype: KvDtype, device: torch.device) -> None:
    cache, span = filled(), span_of(layers, blocks, kv_dtype)
    pool, beside = GpuKvCache(SPEC, NUM_BLOCKS, device), KvCache(SPEC, NUM_BLOCKS)
    message = of_cpu(cache, span, blocks, kv_dtype)
    landing = GpuKvLander(pool, kv_dtype).launch(layers, blocks, seal_of(span), message)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert landing.is_over() and landing.is_right()
    KvMessages(beside, kv_dtype).scatter(layers, blocks, message[: span.num_bytes])
    assert torch.equal(pool.tensor.cpu(), beside.tensor)
    is_exact = all(torch.equal(beside.tensor[layer, blocks], cache.tensor[layer, blocks]) for layer in layers)
    assert is_exact == (kv_dtype == "model")


def test_messages_of_falling_and_rising_size_share_a_buffer(device: torch.device) -> None:
    cache, pool = filled(), GpuKvCache(SPEC, NUM_BLOCKS, device)
    lander, kept = GpuKvLander(pool), []
    for layers, blocks in [MESSAGES[1], MESSAGES[0], MESSAGES[2], MESSAGES[0]]:
        span = span_of(layers, blocks)
        message = of_cpu(cache, span, blocks)
        kept.append((message, lander.launch(layers, blocks, seal_of(span), message)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert all(landing.is_over() and landing.is_right() for _, landing in kept)
    blocks = MESSAGES[2][1]
    assert torch.equal(pool.tensor[:, blocks].cpu(), cache.tensor[:, blocks])


@pytest.mark.parametrize("where", [0, 1000, -65, -40, -30])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_changed_byte_is_seen(where: int, kv_dtype: KvDtype, device: torch.device) -> None:
    """Of the payload (in fp8 codes, then exponents), of the trailer's start (handle, length), of its hash; 24 bytes say nothing."""
    layers, blocks = MESSAGES[1]
    cache, span = filled(), span_of(layers, blocks, kv_dtype)
    message = of_cpu(cache, span, blocks, kv_dtype)
    message[where] ^= 1
    landing = GpuKvLander(GpuKvCache(SPEC, NUM_BLOCKS, device), kv_dtype).launch(layers, blocks, seal_of(span), message)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert landing.is_over() and not landing.is_right()


@pytest.mark.parametrize("part", ["prefill", "decode"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_warming_needs_one_block(part: str, kv_dtype: KvDtype, device: torch.device) -> None:
    warm_messages(GpuKvCache(SPEC, 1, device), part, kv_dtype)  # type: ignore[arg-type]  # parametrize knows no Literal


def test_blocks_that_would_need_padding_are_a_programmers_fault(device: torch.device) -> None:
    odd = KvSpec(num_layers=1, num_kv_heads=1, head_dim=4, block_tokens=1)
    with pytest.raises(AssertionError, match="padding"):
        GpuKvPacker(GpuKvCache(odd, 1, device))
