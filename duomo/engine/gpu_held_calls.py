"""Owns the CUDA calls of a step that keep Python's interpreter while they run: replay, copy, mark, ask. Knows no step and no tensor.

torch gives the interpreter away in each of its calls, and a thread that computes in Python gives it back when it pleases, or after
sys.getswitchinterval(). A step or a piece of a wave is several such calls; beside a busy event loop each of them may wait, and the GPU
waits with them (docs/decisions/0007-one-process.md). The calls here only queue, so they are made through the driver with the interpreter
in hand. Whatever waits for the device gives it away, as ever; a driver whose queue is full (a thousand launches or so) makes them wait too.

Handles and addresses are integers, as torch's objects tell them: Stream.cuda_stream, Event.cuda_event, CUDAGraph.raw_cuda_graph_exec(),
Tensor.data_ptr(). The calling thread has used torch on that device before, so that the driver knows its context.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_SUCCESS, _NOT_READY = 0, 600  # CUresult


class HeldCalls:
    """The driver's functions. library: as ctypes.PyDLL opens it, or a test's."""

    def __init__(self, library: Any) -> None:
        self._library = library
        handle, size = ctypes.c_void_p, ctypes.c_size_t
        for name, types in {
            "cuGraphLaunch": [handle, handle],
            "cuMemcpyAsync": [handle, handle, size, handle],
            "cuEventRecord": [handle, handle],
            "cuEventQuery": [handle],
        }.items():
            getattr(library, name).argtypes = types
        self._launch, self._copy = library.cuGraphLaunch, library.cuMemcpyAsync
        self._record, self._query = library.cuEventRecord, library.cuEventQuery

    def replay(self, graph_exec: int, stream: int) -> None:
        """Queue a captured graph. Raises RuntimeError, as the others do, with the driver's name for what is wrong."""
        self._check("cuGraphLaunch", self._launch(graph_exec, stream))

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Queue a copy between addresses of the device and of page-locked memory. Both must outlive it."""
        self._check("cuMemcpyAsync", self._copy(target, source, num_bytes, stream))

    def mark(self, event: int, stream: int) -> None:
        """Record an event, which exists: it was recorded through torch once."""
        self._check("cuEventRecord", self._record(event, stream))

    def is_over(self, event: int) -> bool:
        """Whether what was marked last is over."""
        code = self._query(event)
        if code != _NOT_READY:
            self._check("cuEventQuery", code)
        return bool(code == _SUCCESS)

    def _check(self, name: str, code: int) -> None:
        if code != _SUCCESS:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed: {(text.value or b'').decode() or f'CUDA error {code}'}")


@cache
def held_calls() -> HeldCalls:
    """Of this process's driver."""
    return HeldCalls(ctypes.PyDLL("libcuda.so.1"))
