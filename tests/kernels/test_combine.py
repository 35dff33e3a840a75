"""The weighted sum against its formula."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.combine import combine, combine_reference


@pytest.mark.parametrize(("tokens", "top_k", "dim"), [(1, 4, 256), (17, 1, 63), (257, 4, 64)])
def test_combine(tokens: int, top_k: int, dim: int) -> None:
    rows, weights = torch.randn(tokens * top_k + 16, dim), torch.rand(tokens, top_k)
    routed = torch.randperm(tokens * top_k)
    out = combine(rows, routed, weights)
    assert torch.allclose(out, combine_reference(rows, routed, weights), rtol=0, atol=top_k * 8 * 2.0**-23)


def test_rows_stand_alone() -> None:
    rows, weights = torch.randn(63 * 4, 256), torch.rand(63, 4)
    whole = combine(rows, torch.arange(63 * 4), weights)
    for token in (0, 1, 30, 62):
        part = slice(token * 4, token * 4 + 4)
        assert torch.equal(combine(rows[part], torch.arange(4), weights[token : token + 1]), whole[token : token + 1])
