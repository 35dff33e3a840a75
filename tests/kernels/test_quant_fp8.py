"""fp8 with block scales: every edge, and exactly one rounding."""

from __future__ import annotations

import pytest
import torch

from duomo_kernels.quant_fp8 import num_scales, quant_fp8, quant_fp8_reference


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (127, 257), (300, 63)])
def test_equal_to_the_reference(shape: tuple[int, int]) -> None:
    q = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(num_scales(shape, (128, 128)))
    out = quant_fp8(q, scale, (128, 128))
    assert out.dtype is torch.float32 and torch.equal(out, quant_fp8_reference(q, scale, (128, 128)))
    assert torch.equal(
        out, (q.double() * scale.double().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]).float()
    )


def test_wrong_number_of_scales() -> None:
    with pytest.raises(AssertionError):
        quant_fp8(torch.zeros(130, 1).to(torch.float8_e4m3fn), torch.ones(1, 1), (128, 128))
