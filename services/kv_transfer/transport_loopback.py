"""Owns the loopback transport: agents of one process that write into each other's memory, with the faults of a plan. Knows no NIXL.

It keeps NIXL's hard edges: a write cannot be taken back and lands even after the memory was deregistered or its handle given up; the
source is read when the bytes move; the notification is sent by the poll that sees the end; a stopped peer keeps a write in flight for ever.
Bytes move when any agent of the hub is called, so that a test with a virtual clock decides exactly what lands when.
"""

from __future__ import annotations

import ctypes
import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from duomo.errors import PeerError
from services.kv_transfer.faults import Fault, FaultPlan, ScriptedFaults
from services.kv_transfer.memory import Memory
from services.kv_transfer.transport import Span, Transport, Write, WriteState


@dataclass(eq=False, kw_only=True)
class _LoopbackWrite:
    writer: str
    peer: str
    local: Span
    remote: Span
    notification: bytes
    fault: Fault
    state: WriteState = WriteState.IN_FLIGHT
    detail: str = ""
    is_notified: bool = False
    report: None = None


@dataclass(order=True)
class _Due:
    due_s: float
    order: int
    act: Callable[[], None] = field(compare=False)
    peer: str = field(compare=False)


class LoopbackHub:
    """The medium: its agents, what is under way between them, who is dead or stopped. clock: monotonic seconds."""

    def __init__(self, faults: FaultPlan | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.faults: FaultPlan = faults if faults is not None else ScriptedFaults()
        self.num_writes = 0
        self._lock = threading.RLock()
        self._agents: dict[str, LoopbackTransport] = {}
        self._inbox: dict[str, list[bytes]] = {}
        self._under_way: list[_Due] = []
        self._order = 0
        self._stopped: set[str] = set()
        self._newest: dict[int, _LoopbackWrite] = {}
        # A late write must find its pages: every region that was ever registered stays mapped as long as the hub lives.
        self._regions: list[Memory] = []

    def agent(self, name: str) -> LoopbackTransport:
        """A new agent called `name` (unused so far)."""
        with self._lock:
            assert name not in self._agents, f"agent {name} exists"
            transport = LoopbackTransport(self, name)
            self._agents[name] = transport
            self._inbox[name] = []
            return transport

    def kill(self, name: str) -> None:
        """The agent's process dies: it writes nothing more, and writes to it fail."""
        with self._lock:
            self._agents.pop(name, None)
            self._inbox.pop(name, None)
            self._stopped.discard(name)

    def stop(self, name: str) -> None:
        """The agent's process is stopped: writes to it stay in flight."""
        with self._lock:
            self._stopped.add(name)

    def resume(self, name: str) -> None:
        """The stopped process goes on: everything that waited for it lands."""
        with self._lock:
            self._stopped.discard(name)
            self.pump()

    def pump(self) -> None:
        """Let everything land that is due."""
        with self._lock:
            now_s, waiting = self.clock(), []
            while self._under_way and self._under_way[0].due_s <= now_s:
                due = heapq.heappop(self._under_way)
                if due.peer in self._stopped:
                    waiting.append(due)
                else:
                    due.act()
            for due in waiting:
                heapq.heappush(self._under_way, due)

    def register(self, region: Memory) -> None:
        with self._lock:
            self._regions.append(region)

    def is_alive(self, name: str) -> bool:
        """Whether the agent exists and was not killed."""
        return name in self._agents

    def post(self, writer: str, local: Span, peer: str, remote: Span, notification: bytes) -> _LoopbackWrite:
        with self._lock:
            if not self.is_alive(writer) or not self.is_alive(peer):
                raise PeerError(f"agent {peer} is gone")
            assert self._is_mapped(local) and self._is_mapped(remote), (local, remote)
            fault = self.faults.fault(self.num_writes, local.length)
            self.num_writes += 1
            write = _LoopbackWrite(writer=writer, peer=peer, local=local, remote=remote, notification=notification, fault=fault)
            self._newest[remote.base] = write
            if fault.announces_early:
                self._notify(write)
            self._later(fault.delay_s, peer, lambda: self._land(write))
            self.pump()
            return write

    def poll(self, write: _LoopbackWrite) -> WriteState:
        with self._lock:
            self.pump()
            if write.state is WriteState.DONE and not write.is_notified:
                self._notify(write)
            return write.state

    def take_notifications(self, name: str) -> list[bytes]:
        with self._lock:
            self.pump()
            inbox = self._inbox.get(name, [])
            taken = list(inbox)
            inbox.clear()
            return taken

    def _land(self, write: _LoopbackWrite) -> None:
        fault = write.fault
        if fault.kills_writer:
            self._copy(write.local, write.remote.base, fault.truncate_bytes or 0)
            self.kill(write.writer)
        if not self.is_alive(write.writer) or not self.is_alive(write.peer):
            write.state, write.detail = WriteState.FAILED, "remote disconnected"
            return
        if not fault.drops_data:
            num_bytes = write.local.length if fault.truncate_bytes is None else fault.truncate_bytes
            self._copy(write.local, write.remote.base, num_bytes)
            if fault.corrupt_byte is not None:
                ctypes.c_uint8.from_address(write.remote.base + fault.corrupt_byte).value ^= 0xFF
            if fault.duplicate_after_s is not None:
                content = ctypes.string_at(write.remote.base, write.remote.length)
                self._later(fault.duplicate_after_s, write.peer, lambda: self._land_again(write, content))
        write.state = WriteState.DONE

    def _land_again(self, write: _LoopbackWrite, content: bytes) -> None:
        # No medium repeats a write behind a newer one to the same place that its writer began after the first had ended: only the
        # notification comes again then.
        if self._newest.get(write.remote.base) is write:
            ctypes.memmove(write.remote.base, content, len(content))
        if write.peer in self._inbox:
            self._inbox[write.peer].append(write.notification)

    def _notify(self, write: _LoopbackWrite) -> None:
        write.is_notified = True
        if not write.fault.drops_notification and not write.fault.drops_data and write.peer in self._inbox:
            self._inbox[write.peer].append(write.notification)

    def _later(self, delay_s: float, peer: str, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._under_way, _Due(self.clock() + delay_s, self._order, act, peer))

    def _copy(self, local: Span, base: int, num_bytes: int) -> None:
        ctypes.memmove(base, local.base, min(num_bytes, local.length))

    def _is_mapped(self, span: Span) -> bool:
        return any(r.address <= span.base and span.base + span.length <= r.address + r.num_bytes for r in self._regions)


class LoopbackTransport:
    """One agent on a hub; a Transport."""

    transport_name = "loopback"
    measures_writes = False

    def __init__(self, hub: LoopbackHub, name: str) -> None:
        self.name = name
        self._hub = hub
        self._peers: set[str] = set()

    def register(self, region: Memory) -> None:
        self._hub.register(region)

    def deregister(self, region: Memory) -> None:
        """Nothing: as with NIXL, writes under way land all the same."""

    def metadata(self) -> bytes:
        return self.name.encode()

    def add_peer(self, metadata: bytes) -> str:
        name = metadata.decode()
        if not self._hub.is_alive(name):
            raise PeerError(f"agent {name} is gone")
        self._peers.add(name)
        return name

    def remove_peer(self, name: str) -> None:
        self._peers.discard(name)

    def lanes(self, peer: str) -> tuple[str, ...]:
        return ()

    def write(self, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        assert peer in self._peers and local.length == remote.length, (peer, local, remote)
        return self._hub.post(self.name, local, peer, remote, notification)

    def poll(self, write: Write) -> WriteState:
        assert isinstance(write, _LoopbackWrite), write
        return self._hub.poll(write)

    def notifications(self) -> list[bytes]:
        return self._hub.take_notifications(self.name)

    def sibling(self, name: str) -> Transport:
        return self._hub.agent(name)

    def close(self) -> None:
        self._hub.kill(self.name)
