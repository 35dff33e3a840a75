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


@pytest.mark.parametrize("columns", [slice(0, 24), slice(40, 63), slice(63, 64)])
def test_rows_may_be_cut(columns: slice) -> None:
    """A pool of halves cut to some heads: what lies beside them stays."""
    pool, ids = torch.randn(14, 64), [12, 1, 2, 7]
    out, expected = (torch.empty(4 * pool[:, columns].shape[1]) for _ in range(2))
    kv_pack(pool[:, columns], torch.tensor(ids), out)
    kv_pack_reference(pool[:, columns], ids, expected)
    assert torch.equal(out, expected)
    other = torch.full_like(pool, -1.0)
    kv_unpack(other[:, columns], torch.tensor(ids), out)
    assert torch.equal(other[ids, columns], pool[ids, columns])
    other[ids, columns] = -1.0
    assert bool((other == -1.0).all())


def test_bytes_are_refused() -> None:
    with pytest.raises(AssertionError):
        kv_pack(torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([0]), torch.zeros(4, dtype=torch.uint8))


def test_rows_that_are_no_runs_are_refused() -> None:
    with pytest.raises(AssertionError):
        kv_pack(torch.zeros(4, 8)[:, ::2], torch.tensor([0]), torch.zeros(4))
    with pytest.raises(AssertionError):
        kv_unpack(torch.zeros(4, 8)[:, ::2], torch.tensor([0]), torch.zeros(4))
