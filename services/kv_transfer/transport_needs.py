"""Owns what KV transports need from a system, and whether this one has it: RDMA devices, locked memory, GPUDirect, CMA. Knows no agent.

Looks at files of the kernel and changes nothing. Each finding is good, or says what to do; a need of a transport that is not asked for is
told as it is and fails nothing.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duomo.config import TransferSection

_ANY_DEVICE = {"all", ""}
_RDMA = {"rc", "dc", "ud", "srd"}
_CAP_SYS_PTRACE = 19
_UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `duomo doctor`; where it is not fine, text says what to do."""

    is_fine: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of an RDMA device, as UCX_NET_DEVICES names it: mlx5_0:1."""

    device: str
    number: int
    state: str
    rate: str
    link_layer: str

    @property
    def name(self) -> str:
        return f"{self.device}:{self.number}"

    @property
    def is_active(self) -> bool:
        return "ACTIVE" in self.state


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where the kernel's files are ("/" but in tests), and what cannot be read there. memlock_bytes: this process' soft limit."""

    root: Path = Path("/")
    memlock_bytes: int = _UNLIMITED
    has_gpu: bool = False

    @staticmethod
    def here(*, has_gpu: bool) -> System:
        return System(memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_gpu=has_gpu)

    def read(self, path: str) -> str:
        """A file of the kernel, without white space around; "" where there is none."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return ""

    def ports(self) -> list[Port]:
        """Every port of every RDMA device."""
        found = []
        for folder in sorted((self.root / "sys/class/infiniband").glob("*/ports/*")):
            at = str(folder.relative_to(self.root))
            state, rate, layer = (self.read(f"{at}/{name}") for name in ("state", "rate", "link_layer"))
            found.append(Port(device=folder.parts[-3], number=int(folder.name), state=state, rate=rate, link_layer=layer))
        return found

    def interfaces(self) -> list[str]:
        return sorted(path.name for path in (self.root / "sys/class/net").glob("*") if path.name != "bonding_masters")


def findings(system: System, section: TransferSection) -> Iterator[Finding]:
    """What the section's transport needs, in the order in which it is put right."""
    ports = system.ports()
    wants_rdma = section.require_transport in _RDMA
    yield _devices(ports, wants_rdma=wants_rdma)
    if ports:
        yield _character_devices(system)
        yield _locked_memory(system)
        if system.has_gpu:
            yield _gpu_direct(system)
    if section.ucx_net_devices not in _ANY_DEVICE:
        yield _named_devices(system, ports, section.ucx_net_devices)
    yield _cma(system, is_required=section.require_transport == "cma")


def _devices(ports: list[Port], *, wants_rdma: bool) -> Finding:
    active = [f"{port.name} {port.rate} {port.link_layer}" for port in ports if port.is_active]
    if active:
        down = [port.name for port in ports if not port.is_active]
        return Finding(is_fine=True, text=f"RDMA: {', '.join(active)}" + (f"; not active: {', '.join(down)}" if down else ""))
    if ports:
        states = ", ".join(f"{port.name} is {port.state or 'without a state'}" for port in ports)
        return Finding(is_fine=False, text=f"RDMA: no active port ({states}): look at cable, switch and subnet manager (ibstat)")
    text = "no RDMA device in /sys/class/infiniband: hosts are joined by TCP"
    todo = "; load the card's driver (mlx5_ib), and give a container the host's devices"
    return Finding(is_fine=not wants_rdma, text=text + (todo if wants_rdma else ""))


def _character_devices(system: System) -> Finding:
    verbs = sorted(path.name for path in (system.root / "dev/infiniband").glob("uverbs*"))
    if verbs:
        return Finding(is_fine=True, text=f"/dev/infiniband holds {', '.join(verbs)}")
    return Finding(
        is_fine=False, text="/dev/infiniband/uverbs* is missing: in a container add --device=/dev/infiniband (else modprobe ib_uverbs)"
    )


def _locked_memory(system: System) -> Finding:
    if system.memlock_bytes == _UNLIMITED:
        return Finding(is_fine=True, text="locked memory: unlimited")
    todo = "set it to unlimited (--ulimit memlock=-1, LimitMEMLOCK=infinity, /etc/security/limits.conf)"
    return Finding(is_fine=False, text=f"locked memory: limited to {system.memlock_bytes:,} bytes, rings may not be registered: {todo}")


def _gpu_direct(system: System) -> Finding:
    if (system.root / "sys/module/nvidia_peermem").is_dir():
        return Finding(is_fine=True, text="GPUDirect RDMA: nvidia_peermem is loaded")
    if "Open Kernel Module" in system.read("proc/driver/nvidia/version"):
        return Finding(is_fine=True, text="GPUDirect RDMA: by dma-buf (open kernel modules of the driver; Linux 5.12 or later)")
    todo = "modprobe nvidia_peermem on the host, or use the driver's open kernel modules (dma-buf)"
    return Finding(is_fine=False, text=f"GPUDirect RDMA: neither nvidia_peermem nor dma-buf, KV would go through the host's memory: {todo}")


def _named_devices(system: System, ports: list[Port], wanted: str) -> Finding:
    """kv_transfer.ucx_net_devices names ports (mlx5_0:1) and interfaces (eth0). ^ excludes."""
    names = [name.strip() for name in wanted.removeprefix("^").split(",")]
    by_name = {port.name: port for port in ports} | {port.device: port for port in ports}
    known = [*(port.name for port in ports), *system.interfaces()]
    if missing := [name for name in names if name not in by_name and name not in known]:
        said = f"kv_transfer.ucx_net_devices names {', '.join(missing)}, which is not here: there are {', '.join(known) or 'none'}"
        return Finding(is_fine=False, text=said)
    if down := [name for name in names if name in by_name and not by_name[name].is_active]:
        return Finding(is_fine=False, text=f"kv_transfer.ucx_net_devices names {', '.join(down)}, whose port is not active")
    return Finding(is_fine=True, text=f"kv_transfer.ucx_net_devices: {wanted} is here")


def _cma(system: System, *, is_required: bool) -> Finding:
    """UCX writes into another process' memory where Yama lets it; with scope 1 it asks to be let (PR_SET_PTRACER)."""
    scope = system.read("proc/sys/kernel/yama/ptrace_scope")
    if scope in ("", "0", "1"):
        return Finding(is_fine=True, text=f"CMA between processes: allowed (kernel.yama.ptrace_scope {scope or 'is not in this kernel'})")
    status = system.read("proc/self/status")
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    if scope == "2" and int(effective, 16) >> _CAP_SYS_PTRACE & 1:
        return Finding(is_fine=True, text="CMA between processes: allowed by CAP_SYS_PTRACE (kernel.yama.ptrace_scope 2)")
    todo = "sysctl kernel.yama.ptrace_scope=1, or CAP_SYS_PTRACE with scope 2"
    return Finding(
        is_fine=not is_required,
        text=f"CMA between processes: kernel.yama.ptrace_scope {scope} forbids it, so memory of the host goes by TCP: {todo}",
    )
