"""Owns launching a kernel again as it was compiled, without Triton's look at every argument. Knows no kernel.

Triton's own call binds, specialises and compares what the kernel was compiled with at every launch, which takes the host several times the
driver's part of it (docs/decisions/0014-handoff-between-cards.md). A kernel whose numbers are not specialised has one compiled form for
each set of constants, dtypes and alignments of its tensors; it is looked up by those here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from duomo_kernels._launch import has_pdl, pdl_options

_ALIGNMENT = 16  # bytes: what Triton specialises pointers by


class Relaunch:
    """One kernel's launches. Its parameters: tensors and numbers, then constants, USE_PDL last; every number is in do_not_specialize."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[[Sequence[Tensor | int], Mapping[str, int | bool], int], None]:
        """(arguments, constants in the kernel's order but for USE_PDL, num_warps): on the current stream of the tensors' device."""
        return partial(self._launch, (*grid, 1, 1))

    def _launch(
        self, grid: tuple[int, int, int], arguments: Sequence[Tensor | int], constants: Mapping[str, int | bool], num_warps: int
    ) -> None:
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        key = (num_warps, *constants.values(), *((each.dtype, each.device, each.data_ptr() % _ALIGNMENT == 0) for each in tensors))
        compiled = self._compiled.get(key)
        if compiled is not None:
            stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
            compiled[grid](*arguments, *constants.values(), has_pdl(tensors[0].device), stream=stream)
            return
        found = self._kernel[grid](*arguments, **constants, num_warps=num_warps, **pdl_options(tensors[0].device))
        if hasattr(found, "packed_metadata"):  # not where it is interpreted, or compiled ahead by another thread
            self._check(arguments, constants)
            self._compiled[key] = found

    def _check(self, arguments: Sequence[Tensor | int], constants: Mapping[str, int | bool]) -> None:
        parameters = self._kernel.params
        names = [each.name for each in parameters[len(arguments) :]]
        assert names == [*constants, "USE_PDL"], f"constants {list(constants)} and USE_PDL, expected {names} in this order"
        for parameter, value in zip(parameters, arguments, strict=False):
            is_free = isinstance(value, Tensor) or (parameter.do_not_specialize and parameter.annotation_type)
            assert is_free, f"{parameter.name}: a number that Triton would compile for; expected in do_not_specialize, with a type"
