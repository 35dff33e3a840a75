"""The order by expert against plain Python."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.sort_by_expert import sort_by_expert, sort_by_expert_reference


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (1, 4, 16), (63, 4, 16), (257, 2, 5)])
def test_order(tokens: int, top_k: int, experts: int) -> None:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    order, expected = sort_by_expert(ids, experts), sort_by_expert_reference(ids, experts)
    assert torch.equal(order.routed_R, expected.routed_R)
    assert torch.equal(order.token_R, expected.token_R)
    assert order.counts == expected.counts and sum(order.counts) == tokens * top_k
