"""Owns the compilation of Triton kernels before they are timed, on all cores. Knows no kernel: it runs launchers and launches nothing.

Triton compiles on the thread that launches, a second or so a kernel; a bench of a hundred configurations would spend its time there. Here
the launchers run once with every launch turned into a compilation that a pool of threads does (the compiler leaves Python's lock for most
of it). Torch's own operations in between do run, on whatever lies in the buffers: their results are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.errors import TritonError
from triton.runtime.jit import JITFunction


@contextmanager
def _compiling_only() -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with patch.object(JITFunction, "run", compile_only):
        yield


def compile_ahead(calls: Iterable[Callable[[], object]]) -> int:
    """Compile what the calls would launch; returns how many kernels that were.

    What does not compile, or is refused by its launcher, fails again with its own message when it is called.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode(), _compiling_only():
        mode = triton.AsyncCompileMode(pool, ignore_errors=True)
        with mode:
            for call in calls:
                with suppress(RuntimeError, AssertionError, ValueError, TypeError, TritonError):
                    call()
        num_kernels = len(mode.raw_futures)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_kernels
