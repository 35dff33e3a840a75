"""The loopback medium does what its plan says, when its clock says, and keeps NIXL's hard edges."""

from __future__ import annotations

import pytest

from duomo.errors import PeerError
from services.kv_transfer.faults import Fault, ScriptedFaults
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Span, Write, WriteState
from services.kv_transfer.transport_loopback import LoopbackHub


class Medium:
    """Two agents on a hub with a clock that stands still until it is moved."""

    def __init__(self, *faults: Fault) -> None:
        self.now_s = 0.0
        self.hub = LoopbackHub(ScriptedFaults(dict(enumerate(faults))), clock=lambda: self.now_s)
        self.left, self.right = self.hub.agent("left"), self.hub.agent("right")
        self.source, self.target = Region(4096), Region(4096)
        self.left.register(self.source)
        self.right.register(self.target)
        assert self.left.add_peer(self.right.metadata()) == "right"

    def write(self, content: bytes, at: int = 0) -> Write:
        self.source.view[at : at + len(content)] = content
        remote = Span(self.target.address + at, len(content))
        return self.left.write(Span(self.source.address + at, len(content)), "right", remote, b"note " + content)

    def landed(self, num_bytes: int, at: int = 0) -> bytes:
        self.hub.pump()
        return bytes(self.target.slice(at, num_bytes))


def test_a_write_lands_and_its_notification_follows_the_writers_poll() -> None:
    medium = Medium()
    write = medium.write(b"abc")
    assert medium.landed(3) == b"abc" and medium.right.notifications() == []
    assert medium.left.poll(write) is WriteState.DONE and medium.right.notifications() == [b"note abc"]
    assert medium.left.poll(write) is WriteState.DONE and medium.right.notifications() == []


def test_delays_reorder_and_the_source_is_read_when_the_bytes_move() -> None:
    medium = Medium(Fault(delay_s=2.0), Fault(delay_s=1.0))
    slow, fast = medium.write(b"abc"), medium.write(b"xyz", at=8)
    medium.now_s = 1.0
    assert (medium.landed(3), medium.landed(3, 8)) == (bytes(3), b"xyz")
    assert (medium.left.poll(slow), medium.left.poll(fast)) == (WriteState.IN_FLIGHT, WriteState.DONE)
    medium.source.view[:3] = b"ABC"
    medium.now_s = 2.0
    assert medium.landed(3) == b"ABC"


@pytest.mark.parametrize(
    ("fault", "content", "notes"),
    [
        (Fault(drops_data=True), bytes(5), []),
        (Fault(drops_notification=True), b"hello", []),
        (Fault(corrupt_byte=1), b"h\x9allo", [b"note hello"]),
        (Fault(truncate_bytes=2), b"he\0\0\0", [b"note hello"]),
        (Fault(duplicate_after_s=0.0), b"hello", [b"note hello"] * 2),
    ],
)
def test_faults(fault: Fault, content: bytes, notes: list[bytes]) -> None:
    medium = Medium(fault)
    write = medium.write(b"hello")
    assert medium.left.poll(write) is WriteState.DONE, "no fault of the medium is the writer's to see"
    assert medium.landed(5) == content and medium.right.notifications() == notes


def test_a_notification_can_overtake_its_bytes() -> None:
    medium = Medium(Fault(announces_early=True, delay_s=1.0))
    write = medium.write(b"abc")
    assert medium.right.notifications() == [b"note abc"] and medium.landed(3) == bytes(3)
    medium.now_s = 1.0
    assert medium.left.poll(write) is WriteState.DONE and medium.landed(3) == b"abc" and medium.right.notifications() == []


def test_a_late_write_lands_in_memory_that_was_deregistered_and_dropped() -> None:
    medium = Medium(Fault(delay_s=1.0))
    medium.write(b"late")
    medium.right.deregister(medium.target)
    medium.now_s = 1.0
    assert medium.landed(4) == b"late"


def test_a_duplicate_does_not_overtake_a_newer_write_to_its_place() -> None:
    medium = Medium(Fault(duplicate_after_s=1.0))
    first = medium.write(b"old")
    medium.left.poll(first)
    second = medium.write(b"new")
    medium.left.poll(second)
    medium.now_s = 1.0
    assert medium.landed(3) == b"new" and medium.right.notifications() == [b"note old", b"note new", b"note old"]


def test_a_stopped_peer_keeps_a_write_in_flight_until_it_goes_on_or_dies() -> None:
    medium = Medium()
    medium.hub.stop("right")
    one, two = medium.write(b"abc"), medium.write(b"xyz", at=8)
    medium.now_s = 1e6
    assert medium.left.poll(one) is WriteState.IN_FLIGHT and medium.landed(3) == bytes(3)
    medium.hub.resume("right")
    assert medium.left.poll(one) is WriteState.DONE is medium.left.poll(two) and medium.landed(3) == b"abc"
    medium.hub.stop("right")
    three = medium.write(b"123")
    medium.hub.kill("right")
    assert medium.left.poll(three) is WriteState.FAILED and medium.landed(3) == b"abc"


def test_dead_agents_neither_write_nor_are_written() -> None:
    medium = Medium(Fault(), Fault(kills_writer=True, truncate_bytes=1))
    medium.write(b"abc")
    dying = medium.write(b"xyz", at=8)
    assert medium.left.poll(dying) is WriteState.FAILED and dying.detail and medium.landed(3, 8) == b"x\0\0"
    with pytest.raises(PeerError):
        medium.write(b"more")
    with pytest.raises(PeerError):
        medium.right.add_peer(b"left")


def test_memory_that_nobody_registered_is_a_programmers_fault() -> None:
    medium = Medium()
    with pytest.raises(AssertionError):
        medium.left.write(Span(medium.source.address, 4), "right", Span(medium.target.address + 4094, 4), b"")
