"""Owns NIXL agents: registered memory, peers and one-sided writes over UCX. Knows no slot and no handle; its names and states end here.

NIXL's rules kept here: a write is polled to its end, because the notification is sent by the initiator's poll that sees it; a released
handle is never used again (it would end the process); a write to a stopped peer stays in progress for ever: deadlines are the caller's.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from duomo.config import TransferSection
from duomo.errors import PeerError, TransferError
from services.kv_transfer import ucx_log, ucx_routes
from services.kv_transfer.memory import Memory, MemoryKind, PageLocks
from services.kv_transfer.transport import Span, Transport, Write, WriteReport, WriteState
from services.kv_transfer.transport_nixl_config import BACKEND, import_nixl, make_agent
from services.kv_transfer.write_pieces import has_threads, pieces_of

_SEGMENTS: dict[MemoryKind, str] = {"host": "DRAM", "cuda": "VRAM"}

log = logging.getLogger(__name__)


class _NixlWrite:
    """A transfer handle with its state; dropped from here the moment it is released."""

    def __init__(self, handle: Any, peer: str, kinds: tuple[MemoryKind, MemoryKind]) -> None:
        self.handle = handle
        self.peer, self.kinds = peer, kinds
        self.state = WriteState.IN_FLIGHT
        self.detail = ""
        self.report: WriteReport | None = None
        self.lock = threading.Lock()


class NixlTransport:
    """One NIXL agent in this process; a Transport. The creator calls close(). locks: for a GPU that copies registered memory."""

    measures_writes = True

    def __init__(self, name: str, section: TransferSection, locks: PageLocks | None = None) -> None:
        self.name = name
        self._section = section
        self._locks = locks
        self._api, self.version = import_nixl(section)
        self._num_threads = section.num_write_threads if has_threads(section.num_write_threads, section.slot_bytes) else 1
        self._agent = make_agent(self._api, name, section.progress_delay_us, self._num_threads)
        self.transport_name = f"nixl/{BACKEND}"
        # What its calls raise: the binding's own exception classes, all derived from Exception directly.
        names = [n for n in dir(self._api.nixlBind) if n.startswith("nixl") and n.endswith("Error")]
        self._errors: tuple[type[Exception], ...] = tuple(getattr(self._api.nixlBind, n) for n in names)
        # Telemetry that it has not, or tells in a shape of another version.
        self._telemetry_errors: tuple[type[Exception], ...] = (*self._errors, AttributeError, TypeError, ValueError)
        self._lock = threading.Lock()
        self._registered: dict[int, Any] = {}
        self._peers: dict[str, bytes] = {}
        self._ucx_log = ucx_log.of_process()
        self._num_tables: dict[str, int] = {}  # of UCX's log, before the peer connected
        self._lanes: dict[str, dict[tuple[MemoryKind, MemoryKind], tuple[str, ...]]] = {}  # by peer
        self._ucx_log.routes()  # what UCX said of its settings goes into our log
        self._siblings: set[str] = set()
        self._has_told_unmeasured = False

    def register(self, region: Memory) -> None:
        kind, device_idx = region.place
        has_lock = self._locks is not None and kind == "host"
        if self._locks is not None and has_lock:
            self._locks.lock(region.address, region.num_bytes)
        try:
            descs = self._agent.register_memory([(region.address, region.num_bytes, device_idx, "")], _SEGMENTS[kind])
        except self._errors as error:
            if self._locks is not None and has_lock:
                self._locks.unlock(region.address)  # nobody deregisters it: it would be freed locked, and its addresses given to others
            raise TransferError(
                f"{region.num_bytes} bytes of {kind} memory cannot be registered: {error}", code="register_failed", retryable=False
            ) from error
        with self._lock:
            self._registered[region.address] = descs

    def deregister(self, region: Memory) -> None:
        with self._lock:
            descs = self._registered.pop(region.address, None)
        if descs is not None:
            self._forget(region.address, descs)

    def metadata(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def add_peer(self, metadata: bytes) -> str:
        with self._lock:
            known = next((name for name, held in self._peers.items() if held == metadata), None)
            if known is not None:
                return known
            num_tables = len(self._ucx_log.routes())
            try:
                loaded = self._agent.add_remote_agent(metadata)
            except self._errors as error:
                self._ucx_log.routes()  # what UCX said of it goes into our log
                raise PeerError(f"a peer's metadata cannot be loaded: {error}", phase="kv.handoff") from error
            name = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
            self._peers[name], self._num_tables[name] = metadata, num_tables
            return name

    def remove_peer(self, name: str) -> None:
        with self._lock:
            if self._peers.pop(name, None) is None:
                return
            self._lanes.pop(name, None)
            try:
                self._agent.remove_remote_agent(name)
            except self._errors:
                # It was gone already, which is what was asked for.
                return

    def lanes(self, peer: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(lane for lanes in self._lanes.get(peer, {}).values() for lane in lanes))

    def write(self, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        if peer not in self._peers:
            raise PeerError(f"agent {peer} is not known", phase="kv.handoff")
        kinds = (local.place.kind, remote.place.kind)
        pieces = pieces_of(local.length, self._num_threads, self._lanes.get(peer, {}).get(kinds, ()))
        source, target = self._descs(local, pieces), self._descs(remote, pieces)
        try:
            handle = self._agent.initialize_xfer("WRITE", source, target, peer, notification)
        except self._errors as error:
            raise PeerError(f"a write to {peer} cannot be prepared: {error}", phase="kv.handoff") from error
        write = _NixlWrite(handle, peer, kinds)
        try:
            status = self._agent.transfer(handle)
        except self._errors as error:
            self._end(write, WriteState.FAILED, str(error))
            raise PeerError(f"a write to {peer} failed: {error}", phase="kv.handoff") from error
        if status == "DONE":
            self._end(write, WriteState.DONE, "")
        elif status == "ERR":
            self._end(write, WriteState.FAILED, "the backend reports an error")
        return write

    def poll(self, write: Write) -> WriteState:
        assert isinstance(write, _NixlWrite), write
        with write.lock:
            if write.state is not WriteState.IN_FLIGHT:
                return write.state
            try:
                status = self._agent.check_xfer_state(write.handle)
            except self._errors as error:
                self._end(write, WriteState.FAILED, str(error))
                return write.state
            if status == "DONE":
                self._end(write, WriteState.DONE, "")
            elif status == "ERR":
                self._end(write, WriteState.FAILED, "the backend reports an error")
            return write.state

    def notifications(self) -> list[bytes]:
        return [data for messages in self._agent.get_new_notifs().values() for data in messages]

    def sibling(self, name: str) -> Transport:
        self._siblings.add(name)
        return NixlTransport(name, self._section, self._locks)

    def close(self) -> None:
        """Forget peers and memory; the agent ends with its last reference."""
        for name in list(self._peers):
            self.remove_peer(name)
        with self._lock:
            registered, self._registered = self._registered, {}
        for address, descs in registered.items():
            self._forget(address, descs)

    def _descs(self, span: Span, pieces: tuple[tuple[int, int], ...]) -> Any:
        cut = [(span.base + offset, length, span.place.device_idx) for offset, length in pieces]
        return self._agent.get_xfer_descs(cut, _SEGMENTS[span.place.kind])

    def _forget(self, address: int, descs: Any) -> None:
        try:
            self._agent.deregister_memory(descs)
        finally:
            if self._locks is not None:
                self._locks.unlock(address)

    def _end(self, write: _NixlWrite, state: WriteState, detail: str) -> None:
        """Release the handle and remember how it ended."""
        if state is WriteState.DONE:
            lanes = self._lanes_of(write.peer, write.kinds)
            write.report = self._report(write.handle, lanes)
            is_one_process = write.peer in self._siblings  # the proof, which looks at the lanes itself
            if not is_one_process and (refusal := ucx_routes.refusal(self._section.require_transport, lanes, is_one_process=False)):
                state, detail = WriteState.FAILED, refusal
        else:
            self._ucx_log.routes()
        write.state, write.detail = state, detail
        handle, write.handle = write.handle, None
        try:
            self._agent.release_xfer_handle(handle)
        except self._errors as error:
            write.detail = f"{detail}; its handle cannot be released: {error}"

    def _lanes_of(self, peer: str, kinds: tuple[MemoryKind, MemoryKind]) -> tuple[str, ...]:
        """What UCX said when it chose; looked up after the first write between memory of these kinds, and told then."""
        known = self._lanes.setdefault(peer, {})
        if kinds not in known:
            tables = self._ucx_log.routes()
            num_before = self._num_tables.get(peer, 0)
            known[kinds] = ucx_routes.of_peer(tables, self.name, kinds=kinds, num_before=num_before)
            log.info("%s: UCX writes to %s by %s", self.name, peer, " + ".join(known[kinds]) or "what it does not tell")
        return known[kinds]

    def _report(self, handle: Any, lanes: tuple[str, ...]) -> WriteReport | None:
        """NIXL's telemetry of a transfer that is done; its times are whole microseconds.

        None where NIXL has none, or tells it in a shape that we do not know: the bytes are there, and no write fails for a figure.
        """
        try:
            telemetry = self._agent.get_xfer_telemetry(handle)
            return WriteReport(
                backend=str(self._agent.query_xfer_backend(handle)),
                num_bytes=int(telemetry.totalBytes),
                num_descriptors=int(telemetry.descCount),
                post_s=int(telemetry.postDuration) * 1e-6,
                transfer_s=int(telemetry.xferDuration) * 1e-6,
                lanes=lanes,
            )
        except self._telemetry_errors as error:
            if not self._has_told_unmeasured:
                self._has_told_unmeasured = True
                log.warning("writes are not measured: NIXL %s does not tell of one that is done: %r", self.version, error)
            return None
