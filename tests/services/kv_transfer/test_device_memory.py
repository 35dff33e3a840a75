"""A device's region is zeroed, sliced where it lies, and says whose memory it is; a card without room is a typed error."""

from __future__ import annotations

import pytest
import torch

from duomo.errors import TransferError
from services.kv_transfer.device_memory import DeviceRegion, put
from services.kv_transfer.memory import Place

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_slice_is_the_memory_itself() -> None:
    region = DeviceRegion(4096, DEVICE)
    assert region.address % 64 == 0 and region.place == (Place("cuda", 0) if DEVICE.type == "cuda" else Place())
    part = region.slice(64, 128)
    assert part.data_ptr() == region.address + 64 and part.numel() == 128 and not part.any()
    put(part, bytes(range(128)))
    assert region.slice(0, 4096).cpu().numpy().tobytes() == bytes(64) + bytes(range(128)) + bytes(4096 - 192)
    with pytest.raises(AssertionError):
        region.slice(4000, 128)


@pytest.mark.gpu
def test_a_card_without_room_says_what_to_lower() -> None:
    with pytest.raises(TransferError, match=r"lower decode.ring_slots") as caught:
        DeviceRegion(1 << 45, torch.device("cuda", 0))
    assert caught.value.code == "no_memory" and not caught.value.retryable
