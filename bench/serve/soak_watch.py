"""Owns what a soak sees of the server from outside: memory of its processes and of the GPU, its counters. Knows no stream.

RSS is read from a counter of the kernel; PSS walks every page of a process under its lock, so it is asked less often: a soak must not be
what disturbs. GPU memory is asked through NVML, which makes no context on the card.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import urllib.request
from collections import Counter
from dataclasses import dataclass, field

import psutil

PERIOD_S = 5.0
PSS_EVERY = 6  # periods
COUNTERS = re.compile(r"kernel_compilations_after_ready|preemptions|failed_|write_timeout|transfer_failed|writer_failed")
SAMPLE_LINE = re.compile(r"^duomo_replica_counter\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE)
COUNTER_LABEL = re.compile(r'counter="(?P<name>[^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Sample:
    """at_s: monotonic. rss, pss by pid of the tree's root, rss of all trees by process name too; what could not be read is not there.
    counters: summed over replicas; None where the server has none."""

    at_s: float
    rss_bytes: dict[int, int] = field(default_factory=dict)
    rss_by_name: dict[str, int] = field(default_factory=dict)
    pss_bytes: dict[int, int] = field(default_factory=dict)
    gpu_bytes: int | None = None
    counters: dict[str, int] | None = None


class Watch:
    """take() now and then. pids: roots of process trees. metrics_url None: the server has no such counters."""

    def __init__(self, pids: list[int], metrics_url: str | None) -> None:
        self._pids = pids
        self._metrics_url = metrics_url
        self._nvml = Nvml.of_this_host()
        self._num_taken = 0

    def take(self, at_s: float) -> Sample:
        wants_pss = self._num_taken % PSS_EVERY == 0
        self._num_taken += 1
        trees = {pid: _tree(pid) for pid in self._pids}
        by_process = {pid: [(_name(each), _bytes(each, "rss")) for each in tree] for pid, tree in trees.items() if tree}
        by_name: Counter[str] = Counter()
        for name, size in itertools.chain.from_iterable(by_process.values()):
            by_name[name] += size
        return Sample(
            at_s=at_s,
            rss_bytes={pid: sum(size for _, size in sizes) for pid, sizes in by_process.items()},
            rss_by_name=dict(by_name),
            pss_bytes={pid: sum(_bytes(each, "pss") for each in tree) for pid, tree in trees.items() if tree} if wants_pss else {},
            gpu_bytes=None if self._nvml is None else self._nvml.used_bytes(),
            counters=None if self._metrics_url is None else _counters(self._metrics_url),
        )


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    """As it calls itself: Ray's replicas change their titles, which the kernel's short name does not show."""
    try:
        title = process.cmdline()[0]
        return title if title.startswith("ray::") else process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
        return "ended"


def _bytes(process: psutil.Process, kind: str) -> int:
    try:
        return int(process.memory_info().rss if kind == "rss" else process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _counters(url: str) -> dict[str, int] | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return counters_in(answer.read().decode())
    except OSError:  # it may be busy, or another server; what it sends to clients is what counts
        return None


def counters_in(exposition: str) -> dict[str, int] | None:
    """Those of COUNTERS in a Prometheus exposition, summed over replicas. Counters that never moved may be missing."""
    if "duomo_replica" not in exposition:
        return None
    totals: dict[str, int] = {}
    for line in SAMPLE_LINE.finditer(exposition):
        label = COUNTER_LABEL.search(line["labels"])
        if label and COUNTERS.search(label["name"]):
            totals[label["name"]] = totals.get(label["name"], 0) + int(float(line["value"]))
    return totals


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The first GPU of this host, through the driver's library."""

    def __init__(self, library: ctypes.CDLL, device: ctypes.c_void_p) -> None:
        self._library = library
        self._device = device

    @classmethod
    def of_this_host(cls) -> Nvml | None:
        """None where there is no driver or no card."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        device = ctypes.c_void_p()
        if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
            return None
        return cls(library, device)

    def name(self) -> str:
        name = ctypes.create_string_buffer(96)
        is_told = self._library.nvmlDeviceGetName(self._device, name, 96) == 0
        return name.value.decode() if is_told else ""

    def used_bytes(self) -> int | None:
        memory = _NvmlMemory()
        if self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)) != 0:
            return None
        return int(memory.used)


def gpu_name() -> str:
    """Of the first card; empty where there is none."""
    nvml = Nvml.of_this_host()
    return "" if nvml is None else nvml.name()
