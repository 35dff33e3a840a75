"""One torch thread for this room's tests: a second one, on cores that others use, waits for a time slice at every product.
The same random numbers in every run: a failure comes again, alone or among others.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter: the same tests, the `device` fixture says where.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import prepare

prepare()


@pytest.fixture(autouse=True)
def _one_thread_one_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()  # other workers' tests may want it


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def half() -> torch.dtype:
    """The 16-bit format of tests with matrix products: the interpreter multiplies bf16 by its bit patterns."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float16
