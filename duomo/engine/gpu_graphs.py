"""Owns CUDA graphs by key over one memory pool: captured once, replayed in any order. Knows nothing of what is in them.

Graphs share a pool because no two run at once: what one leaves in it is gone when another has run. Results that outlive a replay lie in
tensors of their owner's. Where there is no GPU (tests in Triton's interpreter) nothing is captured, and the body itself runs each time.

A replay keeps Python's interpreter (gpu_held_calls.py). Bodies draw nothing from torch's generators: a replay would draw the same again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from duomo.engine.gpu_held_calls import held_calls

Body = Callable[[], None]


class GpuGraphs:
    """One thread at a time. Bodies launch on the current stream, wait for nothing, and have run once before they are captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, int]] = {}  # and the handle of what the driver runs
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.pool_bytes = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, capture() may be called, and bodies run on the stream that captures. Measures what the device has less afterwards."""
        if self._device.type != "cuda":
            yield
            return
        caller = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch ships no types for it
        gc.collect()
        gc.disable()  # a collection would free tensors, and so call CUDA, in the middle of a capture
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what others left in the allocator's hands: given back below, it would hide what graphs take
        free_bytes = torch.cuda.mem_get_info(self._device)[0]
        try:
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                yield
            caller.wait_stream(stream)
        finally:
            gc.enable()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what bodies used before they were captured
        self.pool_bytes = max(0, free_bytes - torch.cuda.mem_get_info(self._device)[0])

    def capture(self, key: Hashable, body: Body) -> None:
        """Record what the body launches. torch.cuda.graph would collect garbage and empty the allocator's cache for every graph."""
        if self._device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
        self._graphs[key] = (graph, graph.raw_cuda_graph_exec())

    def run(self, key: Hashable, body: Body) -> None:
        """Replay what was captured under this key, on the current stream; the body itself where nothing was."""
        captured = self._graphs.get(key)
        if captured is None:
            body()
        else:
            held_calls().replay(captured[1], torch.cuda.current_stream(self._device).cuda_stream)
