"""Owns what Triton's interpreter needs before it runs kernels on the CPU, once a process. Knows no test."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any


@functools.cache
def prepare() -> None:
    """Nothing, where kernels run on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _let_tensors_bound_loops()
        _patch_the_language_once_a_launch()


def _let_tensors_bound_loops() -> None:
    """Triton 3.6's interpreter makes an int of a loop's bound, an array of one element, as numpy 2.4 refuses to; 3.9 does as here."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _patch_the_language_once_a_launch() -> None:
    """The interpreter lists and patches triton.language at each call of a jit function by another, which nothing undoes before the launch
    ends: over a third of the time of kernels made of small functions."""
    from triton import language
    from triton.runtime import interpreter

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen_by: dict[Any, tuple[bool, ...]] = {}
    patched: set[tuple[bool, ...]] = set()
    launching = threading.RLock()  # the interpreter's place in the grid is one of the process: threads of a test take turns

    def patch(fn: Any) -> Any:
        if fn not in seen_by:
            values = list(fn.__globals__.values())
            seen_by[fn] = tuple(any(value is module for value in values) for module in (language, language.core))
        if seen_by[fn] in patched:
            return interpreter._LangPatchScope()
        patched.add(seen_by[fn])
        return patch_lang(fn)

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        with launching:
            patched.clear()
            launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launched
