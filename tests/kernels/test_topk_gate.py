"""The gate against a full sort."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.topk_gate import topk_gate, topk_gate_reference


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 4), (63, 16, 16), (257, 5, 1)])
def test_gate(tokens: int, experts: int, top_k: int, normalise: bool) -> None:
    logits = torch.randn(tokens, experts) * 3
    weights, ids = topk_gate(logits, top_k, normalise)
    expected_weights, expected_ids = topk_gate_reference(logits, top_k, normalise)
    assert torch.equal(ids, expected_ids)
    # an exp, a sum over E and two divisions
    assert torch.allclose(weights, expected_weights, rtol=(experts + 8) * 2.0**-23, atol=0)
    if normalise:
        assert torch.allclose(weights.sum(-1), torch.ones(tokens), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 15, 17])
def test_rows_stand_alone(rows: int) -> None:
    logits = torch.randn(257, 16)
    weights, ids = topk_gate(logits, 4, True)
    part_weights, part_ids = topk_gate(logits[3 : 3 + rows], 4, True)
    assert torch.equal(part_ids, ids[3 : 3 + rows]) and torch.equal(part_weights, weights[3 : 3 + rows])
