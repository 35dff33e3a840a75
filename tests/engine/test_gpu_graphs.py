"""What graphs are said to take, on a card that is told by the test: others' memory in the allocator's hands is not theirs."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from duomo.engine.gpu_graphs import GpuGraphs

GB = 10**9


class Card:
    """free as the driver says it; idle: what the allocator holds and nobody uses."""

    def __init__(self, free: int, idle: int) -> None:
        self.free, self.idle = free, idle

    def empty_cache(self) -> None:
        self.free, self.idle = self.free + self.idle, 0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, 80 * GB


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card, stream = Card(free=10 * GB, idle=3 * GB), SimpleNamespace(wait_stream=lambda other: None)
    told = {"graph_pool_handle": lambda: (0, 1), "empty_cache": card.empty_cache, "mem_get_info": card.mem_get_info}
    told |= {"current_stream": lambda device: stream, "Stream": lambda device: stream, "stream": lambda of: nullcontext()}
    for name, answer in (told | {"synchronize": lambda device: None}).items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return card


def test_graphs_are_measured_beside_what_others_left_idle(card: Card) -> None:
    graphs = GpuGraphs(torch.device("cuda"))
    with graphs.capturing():
        assert not gc.isenabled()
        card.free -= 3 * GB  # 2 GB for graphs, and what bodies used before they were captured
        card.idle += GB
    assert graphs.pool_bytes == 2 * GB
    assert gc.isenabled()
