"""A region is zeroed, page-aligned, written through its address, and lives as long as a view of it."""

from __future__ import annotations

import ctypes
import gc

from services.kv_transfer.memory import Region


def test_address_and_view_are_the_same_bytes() -> None:
    region = Region(4097)
    assert region.address % 4096 == 0 and bytes(region.view) == bytes(4097)
    ctypes.memmove(region.address + 4090, b"abc", 3)
    assert bytes(region.slice(4089, 5)) == b"\0abc\0"


def test_a_view_keeps_the_pages() -> None:
    view = Region(8192).slice(100, 8)
    gc.collect()
    view[:] = b"12345678"
    assert bytes(view) == b"12345678"
