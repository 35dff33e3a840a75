"""One torch thread for this room's tests: a second one, on cores that others use, waits for a time slice at every product.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter: the same tests, the `device` fixture says where.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def half() -> torch.dtype:
    """The 16-bit format of tests with matrix products: the interpreter multiplies bf16 by its bit patterns."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float16
