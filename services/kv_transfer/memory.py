"""Owns regions: page-aligned anonymous memory with a fixed address, for rings and send slots. Knows no transport.

A region's pages go back to the system when the last view of it is gone: a region that a stopped writer may still write is kept by whoever
owns it (landing.py), since a write reaches any mapped address, registered or not. A GPU's memory is device_memory.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # a CPU's agent runs without torch
    from torch import Tensor

HUGE_PAGE_BYTES = 2 * 1024 * 1024


MemoryKind = Literal["host", "cuda"]


class Place(NamedTuple):
    """Where memory lies, as its own process counts devices."""

    kind: MemoryKind = "host"
    device_idx: int = 0


HOST = Place()


class Memory(Protocol):
    """num_bytes at `address` in `place`, which whoever holds it may give to a transport; freed with its last reference."""

    num_bytes: int
    address: int
    place: Place

    def slice(self, offset: int, num_bytes: int) -> memoryview | Tensor:
        """[offset, offset + num_bytes) itself: of the host's memory a memoryview, of a device's a uint8 tensor."""


Allocate = Callable[[int], Memory]
"""Makes zeroed memory of so many bytes. Raises TransferError where there is none."""


class PageLocks(Protocol):
    """Locks memory for a device that reads and writes it without the processor. From any thread."""

    def lock(self, address: int, num_bytes: int) -> None:
        """Before peers learn of the memory. Where it cannot be locked it is still right, and slower: the log says so."""

    def unlock(self, address: int) -> None:
        """Before the memory is freed: waits for the device's copies."""


class Region:
    """num_bytes of zeroed memory at `address`; `view` reads and writes it. Freed with its last reference.

    From 2 MiB on it asks for huge pages: the kernel then pins 512 pages as one, and the processor misses fewer of them. It is this
    process's alone: a child would turn its pages into copies, and a write that a peer makes would land where nobody reads.
    """

    place = HOST

    def __init__(self, num_bytes: int) -> None:
        assert num_bytes > 0, num_bytes
        self.num_bytes = num_bytes
        # Private: most systems give huge pages to private memory alone. Room to begin on a huge page's boundary.
        room = HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else 0
        self._pages = mmap.mmap(-1, num_bytes + room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages.madvise(mmap.MADV_DONTFORK)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        offset = -start % HUGE_PAGE_BYTES if room else 0
        if room:
            _ask_for_huge_pages(self._pages)
        self.address = start + offset
        self.view = memoryview(self._pages)[offset : offset + num_bytes]

    def slice(self, offset: int, num_bytes: int) -> memoryview:
        """A view of [offset, offset + num_bytes)."""
        assert 0 <= offset and offset + num_bytes <= self.num_bytes, (offset, num_bytes, self.num_bytes)
        return self.view[offset : offset + num_bytes]


def _ask_for_huge_pages(pages: mmap.mmap) -> None:
    """A wish: a kernel without them (EINVAL) serves small pages, and everything is right, and slower."""
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
