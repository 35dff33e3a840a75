"""Owns what every Triton launcher needs: argument checks, device facts and programmatic dependent launch. Knows no operation.

Programmatic dependent launch (Hopper): a kernel may start while the one before it still runs. Every kernel launched with `pdl_options`
calls wait_for_previous() before it reads or writes anything that an earlier kernel writes or reads: that waits until the previous
kernel has ended and its writes are visible, and so, since that one waited too, all before it. Constant data (weights) may be read earlier.
start_next() only lets the next kernel's blocks be scheduled as this kernel's leave; it promises nothing about memory.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return major, minor


@functools.cache
def _num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 4 under the interpreter, so that persistent kernels loop there too."""
    return _num_sms(_index(device)) if device.type == "cuda" else 4


def has_pdl(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (compute capability 9.0 and later)."""
    return device.type == "cuda" and _capability(_index(device)) >= (9, 0)


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch: USE_PDL for the kernel body, and launch_pdl for Triton where the device has it."""
    return {"USE_PDL": True, "launch_pdl": True} if has_pdl(device) else {"USE_PDL": False}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@triton.jit
def wait_for_previous(USE_PDL: tl.constexpr):
    if USE_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next(USE_PDL: tl.constexpr):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None, device: torch.device | None = None) -> None:
    """Assert dtype, shape (None: any size), contiguity and device of an argument; the message names it."""
    assert tensor.dtype == dtype, f"{name}: dtype {tensor.dtype}, expected {dtype}"
    is_right = tensor.ndim == len(shape) and all(want is None or want == size for want, size in zip(shape, tensor.shape, strict=False))
    assert is_right, f"{name}: shape {tuple(tensor.shape)}, expected {shape}"
    assert tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, expected contiguous"
    assert device is None or tensor.device == device, f"{name}: on {tensor.device}, expected {device}"
