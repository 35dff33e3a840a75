"""Owns compiling many kernels at a time: what is launched inside is compiled by threads and does not run. Knows no kernel.

Compiling is most of an engine's first start, and kernels are compiled one after another where they are launched. Triton's asynchronous mode
compiles in threads, but waits for a kernel to launch it; so launches are turned into what Triton calls warm-ups. Whatever is called inside
must not care about values on the device, only about shapes: they are whatever was there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from duomo_kernels._launch import is_interpreted


@contextmanager
def compiling_ahead(num_threads: int | None = None) -> Iterator[None]:
    """Inside, kernels do not run; at the end all that were asked for are compiled. Nothing, where they are interpreted."""
    if is_interpreted():
        yield
        return
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
