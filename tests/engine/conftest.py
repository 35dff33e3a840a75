"""One torch thread for this room's tests: a second one, on cores that others use, waits for a time slice at every product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duomo.models.qwen3_moe import Model, load_model
from tests.interpreter import prepare

prepare()  # GPU kernels run in the interpreter here

TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Model:
    """The embedded model, loaded once."""
    return load_model(TINY_MOE)
