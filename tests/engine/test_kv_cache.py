"""The pool's bytes: layout, pack, scatter, copy."""

from __future__ import annotations

import pytest
import torch

from duomo.engine.kv_cache import KvCache, KvSpec, kv_spec
from duomo.models.qwen3_moe import Model

SPEC = KvSpec(num_layers=3, num_kv_heads=2, head_dim=24)


def filled() -> KvCache:
    cache = KvCache(SPEC, 5)
    cache.tensor.copy_(torch.arange(cache.tensor.numel()).view_as(cache.tensor))
    return cache


def test_sizes(model: Model) -> None:
    assert SPEC.block_bytes == 2 * 2 * 16 * 24 * 4
    assert kv_spec(model.config).block_bytes == 16 * 1024
    assert KvCache(SPEC, 5).tensor.shape == (3, 5, 2, 2, 16, 24)


@pytest.mark.parametrize(("layers", "blocks"), [(range(0, 1), [4]), (range(1, 3), [3, 0, 2]), (range(0, 3), [])])
def test_pack_is_layer_then_block(layers: range, blocks: list[int]) -> None:
    cache = filled()
    out = bytearray(b"\xaa" * (len(layers) * len(blocks) * SPEC.block_bytes + 64))
    num_bytes = cache.pack(layers, blocks, memoryview(out))
    assert num_bytes == len(out) - 64
    expected = b"".join(cache.tensor[layer, block].numpy().tobytes() for layer in layers for block in blocks)
    assert bytes(out[:num_bytes]) == expected and out[num_bytes:] == b"\xaa" * 64


def test_scatter_undoes_pack_into_other_blocks() -> None:
    cache, other = filled(), KvCache(SPEC, 7)
    out = bytearray(2 * 3 * SPEC.block_bytes)
    cache.pack(range(1, 3), [3, 0, 2], memoryview(out))
    other.scatter(range(1, 3), [6, 1, 5], memoryview(out))
    assert torch.equal(other.tensor[1:, [6, 1, 5]], cache.tensor[1:, [3, 0, 2]])
    assert not other.tensor[0].any() and not other.tensor[:, [0, 2, 3, 4]].any()


def test_read_only_data_scatters() -> None:
    cache = filled()
    out = bytearray(SPEC.block_bytes)
    cache.pack(range(0, 1), [4], memoryview(out))
    cache.scatter(range(0, 1), [0], memoryview(bytes(out)))
    assert torch.equal(cache.tensor[0, 0], cache.tensor[0, 4])


@pytest.mark.parametrize("heads", [range(0, 1), range(1, 3), range(2, 5), range(0, 5)])
@pytest.mark.parametrize(("layers", "blocks"), [(range(0, 1), [4]), (range(1, 3), [3, 0, 2]), (range(0, 3), [])])
def test_some_heads_pack_and_scatter(heads: range, layers: range, blocks: list[int]) -> None:
    """k and v of those heads alone, into blocks whose other heads nobody touches."""
    spec = KvSpec(num_layers=3, num_kv_heads=5, head_dim=7)
    cache, other = KvCache(spec, 5), KvCache(spec, 7)
    cache.tensor.copy_(torch.randn(cache.tensor.shape))
    cut = cache.tensor[:, :, :, heads.start : heads.stop]
    expected = b"".join(cut[layer, block].contiguous().numpy().tobytes() for layer in layers for block in blocks)
    out = bytearray(b"\xaa" * (len(expected) + 64))
    assert cache.pack(layers, blocks, memoryview(out), heads) == len(expected)
    assert bytes(out[: len(expected)]) == expected and out[len(expected) :] == b"\xaa" * 64

    targets = [6, 1, 5][: len(blocks)]
    other.tensor.fill_(-1.0)
    other.scatter(layers, targets, memoryview(out)[: len(expected)], heads)
    wanted = torch.full_like(other.tensor, -1.0)
    for layer in layers:
        for block, target in zip(blocks, targets, strict=True):
            wanted[layer, target, :, heads.start : heads.stop] = cut[layer, block]
    assert torch.equal(other.tensor, wanted)


@pytest.mark.parametrize("heads", [range(0, 0), range(1, 3), range(-1, 1), range(0, 2, 2)])
def test_heads_that_a_block_lacks_are_a_fault(heads: range) -> None:
    with pytest.raises(AssertionError):
        filled().pack(range(0, 1), [0], memoryview(bytearray(SPEC.block_bytes)), heads)


def test_too_small_a_slot_is_a_fault() -> None:
    with pytest.raises(AssertionError):
        filled().pack(range(0, 1), [0], memoryview(bytearray(8)))
    with pytest.raises(AssertionError):
        filled().scatter(range(0, 1), [0], memoryview(bytearray(8)))


def test_copy_block_copies_every_layer() -> None:
    cache = filled()
    cache.copy_block(1, 4)
    assert torch.equal(cache.tensor[:, 4], cache.tensor[:, 1])
