"""Owns the page locks on host memory that one GPU copies from and to by itself. Knows not whose memory it is.

Locked memory is copied at the bus' speed and without the processor, and a copy that is queued returns at once; of other memory CUDA makes a
copy first, while its caller waits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: for every context of this process

log = logging.getLogger(__name__)


class GpuPageLocks:
    """Any thread. What is still locked at the process' end ends with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._locked: set[int] = set()

    def lock(self, address: int, num_bytes: int) -> None:
        """Page-aligned memory of this process. Where CUDA refuses, the log says why and copies are slower."""
        with torch.cuda.device(self._device):
            answer = int(_cudart().cudaHostRegister(address, num_bytes, _PORTABLE))
            if answer:
                _take_error(self._device)
        if answer:
            log.warning("CUDA locks no page of %d bytes at %#x (error %d): KV is copied by way of other memory", num_bytes, address, answer)
            return
        with self._lock:
            self._locked.add(address)

    def unlock(self, address: int) -> None:
        """Memory that was not locked is left alone."""
        with self._lock:
            if address not in self._locked:
                return
            self._locked.discard(address)
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # copies that are queued still read it
            answer = int(_cudart().cudaHostUnregister(address))
            if answer:
                _take_error(self._device)
        if answer:
            log.warning("CUDA does not unlock the memory at %#x (error %d)", address, answer)


def _take_error(device: torch.device) -> None:
    """CUDA keeps what it has refused as this thread's last error, and torch raises that at the thread's next launch: so at this one. Its
    bindings have no cudaGetLastError."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch ships no types for it
