"""A region is zeroed, page-aligned, written through its address, and lives as long as a view of it."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest

from services.kv_transfer.memory import HUGE_PAGE_BYTES, Region


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


@pytest.mark.parametrize("num_bytes", [HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1, 3 * HUGE_PAGE_BYTES - 1])
def test_a_large_region_begins_on_a_huge_page_and_holds_all_its_bytes(num_bytes: int) -> None:
    region = Region(num_bytes)
    assert region.address % HUGE_PAGE_BYTES == 0 and len(region.view) == num_bytes
    region.view[0], region.view[-1] = 1, 2
    assert ctypes.string_at(region.address, 1) == b"\1" and ctypes.string_at(region.address + num_bytes - 1, 1) == b"\2"
    with pytest.raises(AssertionError):
        region.slice(num_bytes - 1, 2)


def test_a_large_region_lies_on_huge_pages_where_the_kernel_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no huge pages")
    region = Region(4 * HUGE_PAGE_BYTES)
    region.view[:] = bytes(region.num_bytes)
    assert _of_mapping(region.address, "AnonHugePages") >= HUGE_PAGE_BYTES // 1024


def test_a_child_does_not_get_the_pages() -> None:
    """It would share them until somebody writes, and then one of the two would have a copy: not what peers write into."""
    region = Region(4096)
    child = os.fork()
    if child == 0:
        try:
            os._exit(int(_of_mapping(region.address, "Size") > 0))
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _of_mapping(region.address, "Size") > 0


def _of_mapping(address: int, what: str) -> int:
    """KiB that /proc/self/smaps tells of the mapping that holds `address`; 0 where none does."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and ":" not in first:
            lo, hi = (int(end, 16) for end in first.split("-"))
            is_there = lo <= address < hi
        elif is_there and first == f"{what}:":
            return int(rest.split()[0])
    return 0
