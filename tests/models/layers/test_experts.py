"""The expert layer against a plain loop over tokens."""

from __future__ import annotations

import torch

from duomo.models.layers.experts import ExpertWeights, expert_layer
from duomo_kernels.row_gemm import RowGemm


def test_against_a_loop() -> None:
    gate, up_gate, down = torch.randn(48, 6), torch.randn(6, 48, 40) / 5, torch.randn(6, 20, 48) / 5
    x = torch.randn(17, 48)
    weights = ExpertWeights(gate, list(up_gate), list(down))
    out, ids = expert_layer(RowGemm(is_chain=False), x, weights, 2, True)
    assert ids.shape == (17, 2)
    for token in range(17):
        probs = torch.softmax(x[token] @ gate, -1)
        top = probs.topk(2)
        assert torch.equal(top.indices, ids[token])
        expected = torch.zeros(48)
        for weight, expert in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            g, u = (x[token] @ up_gate[expert]).chunk(2)
            expected += weight * ((torch.nn.functional.silu(g) * u) @ down[expert])
        assert torch.allclose(out[token], expected, rtol=0, atol=48 * 20 * 2.0**-24 * float(expected.abs().max() + 1))
