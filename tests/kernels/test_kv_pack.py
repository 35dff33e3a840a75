"""Pack and unpack are inverses, byte for byte."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.kv_pack import kv_pack, kv_pack_reference, kv_unpack


@pytest.mark.parametrize("ids", [[0], [6, 0, 3], list(range(7))[::-1]])
@pytest.mark.parametrize("width", [1, 63, 4096])
def test_there_and_back(ids: list[int], width: int) -> None:
    pool = torch.randn(7, width)
    out, expected = torch.empty(len(ids) * width), torch.empty(len(ids) * width)
    kv_pack(pool, torch.tensor(ids), out)
    kv_pack_reference(pool, ids, expected)
    assert torch.equal(out, expected)
    other = torch.zeros(7, width)
    kv_unpack(other, torch.tensor(ids), out)
    assert torch.equal(other[ids], pool[ids])
    untouched = [block for block in range(7) if block not in ids]
    assert not other[untouched].any()


def test_bytes_are_refused() -> None:
    with pytest.raises(AssertionError):
        kv_pack(torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([0]), torch.zeros(4, dtype=torch.uint8))
