"""Owns regions: page-aligned anonymous memory with a fixed address, for rings and send slots. Knows no transport and no device.

A region's pages go back to the system when the last view of it is gone: a region that a stopped writer may still write is kept by
whoever owns it (landing.py), since a write reaches any mapped address, registered or not.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Protocol


class PageLocks(Protocol):
    """Locks memory for a device that reads and writes it without the processor. From any thread."""

    def lock(self, address: int, num_bytes: int) -> None:
        """Before peers learn of the memory. Where it cannot be locked it is still right, and slower: the log says so."""

    def unlock(self, address: int) -> None:
        """Before the memory is freed: waits for the device's copies."""


class Region:
    """num_bytes of zeroed memory at `address`; `view` reads and writes it. Freed with its last reference."""

    def __init__(self, num_bytes: int) -> None:
        assert num_bytes > 0, num_bytes
        self.num_bytes = num_bytes
        self._pages = mmap.mmap(-1, num_bytes)
        self.view = memoryview(self._pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def slice(self, offset: int, num_bytes: int) -> memoryview:
        """A view of [offset, offset + num_bytes)."""
        assert 0 <= offset and offset + num_bytes <= self.num_bytes, (offset, num_bytes, self.num_bytes)
        return self.view[offset : offset + num_bytes]
