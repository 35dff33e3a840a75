"""One torch thread for this room's tests: a second one, on cores that others use, waits for a time slice at every product.
The same random numbers in every run: a failure comes again, alone or among others.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter: the same tests, the `device` fixture says where.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


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

    def patch(fn: Any) -> Any:
        if fn not in seen_by:
            values = list(fn.__globals__.values())
            seen_by[fn] = tuple(any(value is module for value in values) for module in (language, language.core))
        if seen_by[fn] in patched:
            return interpreter._LangPatchScope()
        patched.add(seen_by[fn])
        return patch_lang(fn)

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launched


if os.environ.get("TRITON_INTERPRET") == "1":
    _let_tensors_bound_loops()
    _patch_the_language_once_a_launch()


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
