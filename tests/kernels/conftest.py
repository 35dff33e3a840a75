"""One torch thread for this room's tests: a second one, on cores that others use, waits for a time slice at every product."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
