"""Owns the count of Triton kernels that this process has compiled, and of those that it should not have: after ready. Knows no kernel.

A kernel that is compiled (or read from Triton's cache on disk) in a running service stalls every request of its batch; whatever a step may
run is run once before ready. Triton tells its hook of each new variant of a kernel, whichever way it came; the hook that was there is kept.
"""

from __future__ import annotations

import logging
from typing import Any

import triton

log = logging.getLogger(__name__)


class CompileCounter:
    """Counts from its making until close(). ready(): from here on every compilation is one too many, and is logged by name."""

    def __init__(self) -> None:
        self.num_before_ready = 0
        self.num_after_ready = 0
        self._is_ready = False
        self._previous = triton.knobs.runtime.jit_post_compile_hook
        self._hook = self._compiled  # one bound method, so that close() can tell whether it is still the hook
        triton.knobs.runtime.jit_post_compile_hook = self._hook

    def ready(self) -> None:
        """Everything that may run has run."""
        self._is_ready = True

    def close(self) -> None:
        """Count no more."""
        if triton.knobs.runtime.jit_post_compile_hook is self._hook:
            triton.knobs.runtime.jit_post_compile_hook = self._previous

    def _compiled(self, **told: Any) -> Any:  # Triton's versions tell the hook different things, all by name
        if self._is_ready:
            self.num_after_ready += 1
            log.warning("compiled after ready: %s", told.get("repr", "a kernel"))
        else:
            self.num_before_ready += 1
        return None if self._previous is None else self._previous(**told)
