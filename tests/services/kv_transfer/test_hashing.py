"""The hash sees what it promises to see, sums in any order, and its plain definition agrees with the vectorised one."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from services.kv_transfer import hashing
from services.kv_transfer.hashing import message_hash, payload_sum, splitmix64

_MASK = (1 << 64) - 1
_SIZES = (1, 7, 8, 9, 63, 257, 4096, 65_536, 65_544, 200_003, 262_144, 262_152, 600_001)


def _payload(num_bytes: int, seed: int = 0) -> bytearray:
    return bytearray(np.random.default_rng(seed).bytes(num_bytes))


def _defined_sum(payload: bytes) -> int:
    """The docstring, word by word."""
    total = 0
    padded = payload + bytes(-len(payload) % 8)
    for i in range(len(padded) // 8):
        chunk, j = divmod(i, 8192)
        key = (splitmix64((1 << 63) + chunk) | 1) * (splitmix64(j) | 1)
        y = (int.from_bytes(padded[i * 8 : i * 8 + 8], "little") * 0x9E3779B97F4A7C15) & _MASK
        total += key * (y ^ (y >> 32))
    return total & _MASK


@pytest.mark.parametrize("num_bytes", _SIZES)
def test_equals_its_definition(num_bytes: int) -> None:
    payload = bytes(_payload(num_bytes))
    assert payload_sum(memoryview(payload)) == _defined_sum(payload)


@pytest.mark.parametrize("num_bytes", _SIZES)
@pytest.mark.parametrize("content", ["random", "zeros", "ones"])
def test_any_single_corrupted_byte_is_seen(num_bytes: int, content: str) -> None:
    payload = {"random": _payload(num_bytes), "zeros": bytearray(num_bytes), "ones": bytearray(b"\xff" * num_bytes)}[content]
    right = message_hash(memoryview(payload), 1, 2, 3)
    draw = random.Random(num_bytes)
    for _ in range(min(num_bytes, 200)):
        at, flip = draw.randrange(num_bytes), 1 << draw.randrange(8)
        payload[at] ^= flip
        assert message_hash(memoryview(payload), 1, 2, 3) != right
        payload[at] ^= flip
    assert message_hash(memoryview(payload), 1, 2, 3) == right


def test_swapped_words_are_seen_also_where_they_differ_in_one_high_bit() -> None:
    words = np.zeros(20_000, dtype=np.uint64)
    draw = random.Random(1)
    for _ in range(500):
        i, j = draw.sample(range(len(words)), 2)
        words[:] = draw.getrandbits(64)
        words[i], words[j] = words[i] ^ np.uint64(1 << draw.randrange(48, 64)), words[j]
        before = payload_sum(memoryview(words.tobytes()))
        words[i], words[j] = words[j], words[i]
        assert payload_sum(memoryview(words.tobytes())) != before


def test_truncated_payload_and_other_places_are_seen() -> None:
    payload = memoryview(bytes(_payload(4096)[:4000]) + bytes(96))
    right = message_hash(payload, 7, 1, 5)
    assert message_hash(payload[:4000], 7, 1, 5) != right
    assert len({right, message_hash(payload, 8, 1, 5), message_hash(payload, 7, 2, 5), message_hash(payload, 7, 1, 6)}) == 4


def test_sums_of_parts_commute() -> None:
    """Words of two halves, each with the other half zeroed, sum to the whole: any thread may sum any part."""
    payload = _payload(100_000)
    left, right = bytearray(payload), bytearray(payload)
    left[40_000:] = bytes(60_000)
    right[:40_000] = bytes(40_000)
    assert (payload_sum(memoryview(left)) + payload_sum(memoryview(right))) & _MASK == payload_sum(memoryview(payload))


def test_a_bijection_for_every_position() -> None:
    """key * g(w): keys are odd and g can be undone."""
    assert all(int(key) % 2 == 1 for key in hashing._word_keys()[:100])
    inverse = pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    for w in (0, 1, _MASK, 0x0123456789ABCDEF):
        y = (w * 0x9E3779B97F4A7C15) & _MASK
        g = y ^ (y >> 32)
        assert ((g ^ (g >> 32)) * inverse) & _MASK == w


def test_hashes_a_mebibyte_in_milliseconds() -> None:
    payload = memoryview(_payload(1 << 20))
    message_hash(payload, 1, 1, 1)
    best_s = min(_timed(payload) for _ in range(5))
    assert best_s < 0.02, f"{best_s * 1e3:.2f} ms for 1 MiB"


def _timed(payload: memoryview) -> float:
    started_s = time.thread_time()
    message_hash(payload, 1, 1, 1)
    return time.thread_time() - started_s
