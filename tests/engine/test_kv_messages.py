"""What blocks look like in a message: the pool's bytes, or rows in fp8 that land as the numbers they stand for."""

from __future__ import annotations

import pytest
import torch

from duomo.config import KvDtype
from duomo.engine.kv_cache import KvCache, KvSpec
from duomo.engine.kv_messages import KvMessages, message_block_bytes
from duomo_kernels._bounds import bound, error
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8_reference

SPEC = KvSpec(num_layers=3, num_kv_heads=2, head_dim=24)
# (layers, blocks): one, several of several layers in no order, none
MESSAGES = [(range(0, 1), [4]), (range(1, 3), [3, 0, 2]), (range(0, 3), [])]
AFTER = b"\xaa" * 64


def filled() -> KvCache:
    cache = KvCache(SPEC, 5)
    cache.tensor.copy_(torch.randn(cache.tensor.shape, generator=torch.Generator().manual_seed(1)))
    return cache


def payload(cache: KvCache, kv_dtype: KvDtype, layers: range, blocks: list[int], heads: range | None = None) -> bytearray:
    """What pack writes, and nothing behind it."""
    num_bytes = len(layers) * len(blocks) * message_block_bytes(SPEC, kv_dtype, heads)
    out = bytearray(b"\xaa" * num_bytes + AFTER)
    assert KvMessages(cache, kv_dtype).pack(layers, blocks, memoryview(out), heads) == num_bytes
    assert out[num_bytes:] == AFTER
    return out[:num_bytes]


def test_sizes() -> None:
    assert message_block_bytes(SPEC, "model") == SPEC.block_bytes == 64 * 24 * 4
    assert message_block_bytes(SPEC, "fp8_e4m3") == KvMessages(KvCache(SPEC, 1), "fp8_e4m3").block_bytes == 64 * 25
    halves = KvSpec(num_layers=1, num_kv_heads=4, head_dim=128, block_tokens=64, dtype=torch.bfloat16)
    assert message_block_bytes(halves, "fp8_e4m3") / message_block_bytes(halves, "model") == 129 / 256
    assert message_block_bytes(halves, "fp8_e4m3", range(1, 2)) == message_block_bytes(halves, "fp8_e4m3") // 4


@pytest.mark.parametrize(("layers", "blocks"), MESSAGES)
def test_the_models_are_the_pools_bytes(layers: range, blocks: list[int]) -> None:
    cache, other = filled(), KvCache(SPEC, 5)
    data = payload(cache, "model", layers, blocks)
    assert bytes(data) == b"".join(cache.tensor[layer, block].numpy().tobytes() for layer in layers for block in blocks)
    KvMessages(other, "model").scatter(layers, blocks, memoryview(data))
    assert all(torch.equal(other.tensor[layer, blocks], cache.tensor[layer, blocks]) for layer in layers)


@pytest.mark.parametrize(("layers", "blocks"), MESSAGES)
@pytest.mark.parametrize("is_read_only", [False, True])
def test_in_fp8_rows_are_packed_in_the_same_order(layers: range, blocks: list[int], is_read_only: bool) -> None:
    cache, other = filled(), KvCache(SPEC, 5)
    data = payload(cache, "fp8_e4m3", layers, blocks)
    if blocks:
        rows_RD = torch.cat([cache.tensor[layer, block].reshape(-1, 24) for layer in layers for block in blocks])
        assert bytes(data) == kv_rows_fp8_reference(rows_RD).numpy().tobytes()
    KvMessages(other, "fp8_e4m3").scatter(layers, blocks, memoryview(bytes(data) if is_read_only else data))
    for layer in range(SPEC.num_layers):
        mine = blocks if layer in layers else []
        assert error(other.tensor[layer, mine], cache.tensor[layer, mine].double()) <= bound(torch.float8_e4m3fn)
        other.tensor[layer, mine] = 0
    assert not other.tensor.any(), "a block was written that is none of the message's"


def test_in_fp8_some_heads_are_what_they_are_among_all() -> None:
    cache, whole, other = filled(), KvCache(SPEC, 5), KvCache(SPEC, 5)
    KvMessages(whole, "fp8_e4m3").scatter(range(3), [3, 1], memoryview(payload(cache, "fp8_e4m3", range(3), [3, 1])))
    KvMessages(other, "fp8_e4m3").scatter(
        range(3), [3, 1], memoryview(payload(cache, "fp8_e4m3", range(3), [3, 1], range(1, 2))), range(1, 2)
    )
    assert torch.equal(other.tensor[:, :, :, 1], whole.tensor[:, :, :, 1]) and not other.tensor[:, :, :, 0].any()


@pytest.mark.parametrize("kv_dtype", ["model", "fp8_e4m3"])
def test_sizes_that_do_not_fit_are_a_fault(kv_dtype: KvDtype) -> None:
    messages = KvMessages(filled(), kv_dtype)
    with pytest.raises(AssertionError):
        messages.pack(range(1), [0, 1], memoryview(bytearray(2 * messages.block_bytes - 1)))
    with pytest.raises(AssertionError):
        messages.scatter(range(1), [0], memoryview(bytearray(messages.block_bytes + 8)))
