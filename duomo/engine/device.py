"""Owns the choice of device: what NVIDIA's driver says of this machine's cards, and whether our kernels run there. Knows no torch.

Asked through the driver's own libraries, since processes ask that must not load torch: libcuda for the cards that this process may see
(CUDA_VISIBLE_DEVICES counts), NVML for the driver's version and for memory in use, which libcuda tells only inside a context.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from duomo.errors import ConfigError

Device = Literal["cpu", "cuda"]
Wanted = Literal["auto", "cpu", "cuda"]
OpenLibrary = Callable[[str], Any]
"""ctypes.CDLL, or a test's answers: raises OSError where there is no such library."""

LEAST_CAPABILITY = (9, 0)  # Hopper: the kernels copy by its tensor memory accelerator (TMA)
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CUdevice_attribute

log = logging.getLogger(__name__)


class _DriverFault(Exception):
    """A function of the driver returned an error after cuInit had not. Never leaves this file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One GPU. free_bytes: of now; None where the driver does not tell."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    total_bytes: int
    free_bytes: int | None

    @property
    def runs_kernels(self) -> bool:
        return self.capability >= LEAST_CAPABILITY

    def line(self) -> str:
        """For people."""
        free = "" if self.free_bytes is None else f" ({self.free_bytes / 1e9:.1f} free)"
        major, minor = self.capability
        return f"{self.name}, {self.total_bytes / 1e9:.1f} GB{free}, compute capability {major}.{minor}, {self.num_sms} multiprocessors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What this process could compute on. problem: why no card can be used, "" where one can; driver: its versions, "" without one."""

    cards: tuple[Card, ...]
    driver: str
    problem: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """The device, the card on a GPU where it was looked at, how many like it there are, and why: one line."""

    device: Device
    why: str
    card: Card | None = None
    num_cards: int | None = None


def resolve_device(wanted: Wanted) -> Device:
    """The device to compute on; one log line says why. Raises ConfigError where "cuda" cannot be had."""
    pick = pick_device(wanted)
    log.info("%s", pick.why)
    return pick.device


def pick_device(wanted: Wanted, look: Callable[[], Host] | None = None) -> Pick:
    """ "auto": the first card where our kernels run there, else the CPU. Raises ConfigError with the reason where "cuda" cannot be had."""
    if wanted == "cpu":
        return Pick(device="cpu", why="device cpu: model.device says so")
    host = (look_at_host if look is None else look)()
    if not host.problem:
        card = host.cards[0]
        others = f"; the first of {len(host.cards)}" if len(host.cards) > 1 else ""
        return Pick(device="cuda", why=f"device cuda: {card.line()}{others}", card=card, num_cards=len(host.cards))
    if wanted == "cuda":
        raise ConfigError(f"model.device (--device) is cuda, but {host.problem}")
    return Pick(device="cpu", why=f"device cpu: {host.problem}")


def look_at_host(open_library: OpenLibrary = ctypes.CDLL, software: Callable[[int], str] | None = None) -> Host:
    """Ask driver and packages. software: what is wrong with this Python for a driver of so many CUDA (major), "" for nothing."""
    try:
        cuda = open_library("libcuda.so.1")
    except OSError:
        return Host(cards=(), driver="", problem="this machine has no NVIDIA driver (no libcuda.so.1)")
    code = cuda.cuInit(0)
    if code:
        return Host(cards=(), driver="", problem=f"NVIDIA's driver finds no card to use: {_error_name(cuda, code)}")
    nvml = _opened_nvml(open_library)
    driver = f"driver {_nvml_version(nvml)}"
    try:
        version = _number(cuda.cuDriverGetVersion)
        driver += f", CUDA {version // 1000}.{version % 1000 // 10}"
        cards = tuple(_card(cuda, nvml, index) for index in range(_number(cuda.cuDeviceGetCount)))
    except (_DriverFault, AttributeError) as fault:  # ctypes' AttributeError: a driver too old to have the function
        return Host(cards=(), driver=driver, problem=f"NVIDIA's driver fails ({fault}); nvidia-smi may say more")
    problem = _problem_of(cards) or (_software_problem if software is None else software)(version // 1000)
    return Host(cards=cards, driver=driver, problem=problem)


def _problem_of(cards: tuple[Card, ...]) -> str:
    if not cards:
        return "NVIDIA's driver shows no card to this process (CUDA_VISIBLE_DEVICES counts)"
    if not cards[0].runs_kernels:
        major, minor = cards[0].capability
        needed = f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        return f"{cards[0].name} has compute capability {major}.{minor}; the kernels need {needed} (an H100 or later)"
    return ""


def _card(cuda: Any, nvml: Any, index: int) -> Card:
    device = _number(cuda.cuDeviceGet, index)
    name = ctypes.create_string_buffer(128)
    _checked(cuda.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    total = ctypes.c_size_t()
    _checked(cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device), "cuDeviceTotalMem")
    major, minor, num_sms = (_number(cuda.cuDeviceGetAttribute, which, device) for which in (_MAJOR, _MINOR, _MULTIPROCESSORS))
    return Card(
        name=name.value.decode(errors="replace"),
        capability=(major, minor),
        num_sms=num_sms,
        total_bytes=total.value,
        free_bytes=_free_bytes(cuda, nvml, device, total.value),
    )


def _number(call: Any, *arguments: int) -> int:
    """The int that a driver's function writes to where its first argument points."""
    out = ctypes.c_int()
    _checked(call(ctypes.byref(out), *arguments), call.__name__)
    return out.value


def _checked(code: int, what: str) -> None:
    if code:
        raise _DriverFault(f"{what} ends with error {code}")


def _error_name(cuda: Any, code: int) -> str:
    found = ctypes.c_char_p()
    if cuda.cuGetErrorName(code, ctypes.byref(found)) or found.value is None:
        return f"error {code}"
    return found.value.decode(errors="replace")


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _opened_nvml(open_library: OpenLibrary) -> Any:
    """None where it is not installed or does not start, as in some containers: what it would tell is then said to be unknown."""
    try:
        nvml = open_library("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml


def _nvml_version(nvml: Any) -> str:
    text = ctypes.create_string_buffer(96)
    if nvml is None or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return "of unknown version"
    return text.value.decode(errors="replace")


def _free_bytes(cuda: Any, nvml: Any, device: int, total: int) -> int | None:
    """By the card's place on the bus: NVML counts all cards of the machine, whatever this process may see."""
    if nvml is None:
        return None
    bus_id = ctypes.create_string_buffer(32)
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    if cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device) or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)):
        return None
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
        return None
    return min(int(memory.free), total)  # of a part of a card (MIG) NVML tells the whole


def _software_problem(driver_cuda: int) -> str:
    """What keeps this Python from using a card: read off the packages' files, nothing is imported."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "torch is not installed here"
    built = _cuda_of_torch(Path(torch.origin).parent / "version.py")
    if built is None:
        return "torch is a build for CPUs alone: install one with CUDA"
    if built > driver_cuda:
        return f"torch is built for CUDA {built}, the driver knows CUDA {driver_cuda}: update the driver or install another torch"
    if importlib.util.find_spec("triton") is None:
        return "triton, in which the kernels are written, is not installed here"
    return ""


def _cuda_of_torch(version_file: Path) -> int | None:
    """The CUDA (major) that torch was built for; None for a CPU's."""
    found = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)", version_file.read_text(), re.MULTILINE)
    return None if found is None else int(found.group(1))
