"""Owns regions in a GPU's memory, for rings and send slots between GPUs. Knows no transport, ring or message.

torch allocates them, so they count where the rest of the card does. A peer on the same host maps the whole allocation that a region lies in
(CUDA's IPC handles know nothing smaller), and its writes land whatever this process has queued: nothing of a region is given to others
while a writer of it may live (landing.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.errors import TransferError
from services.kv_transfer.memory import Place


class DeviceRegion:
    """num_bytes of zeroed memory on `device`. On a CPU, for tests: the host's memory that is used as a device's is.

    Raises TransferError where the device has no room for it.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        assert num_bytes > 0, num_bytes
        self.num_bytes = num_bytes
        try:
            self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise TransferError(
                f"{device} has no room for {num_bytes} bytes of KV on their way: lower decode.ring_slots, prefill.send_slots or"
                f" kv_transfer.slot_bytes, or name kv_transfer.memory host ({error})",
                code="no_memory",
                retryable=False,
            ) from error
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # zeroed before a peer writes
        self.address = self._bytes.data_ptr()
        self.place = Place("cuda", self._bytes.device.index) if device.type == "cuda" else Place()

    def slice(self, offset: int, num_bytes: int) -> Tensor:
        assert 0 <= offset and offset + num_bytes <= self.num_bytes, (offset, num_bytes, self.num_bytes)
        return self._bytes[offset : offset + num_bytes]


def put(room: Tensor, content: bytes) -> None:
    """Copy the host's bytes into a region's, whole. Returns when they are there."""
    room.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
