"""One torch thread for this room's tests: a second one, on cores that others use, waits for a time slice at every product.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter: the same tests, the `device` fixture says where.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def _let_tensors_bound_loops() -> None:
    """Triton 3.6's interpreter turns a loop's bound, an array of one element, into an int in a way that numpy 2.4 refuses; 3.9 does as here."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    _let_tensors_bound_loops()


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
