"""What becomes of producers that stand still: stuck rings are replaced, lost processes judged, all in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from duomo.wire.messages import HandleOffered
from services.decode.producer_rings import GIVEN_UP_WITHOUT_DIRECTORY_S, Fate, LostProducer, ProducerRings
from services.decode.producers import Producers
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.policy import MAX_RETIRED_RINGS
from tests.services.decode.rig import configuration, running, serve
from tests.services.decode.scripted_peers import GREEDY, Prompt, expected, ids, until

LEASE_S = 4.0


def member(replica_id: str, boot_id: str) -> Member:
    return Member(replica_id=replica_id, boot_id=boot_id, role="prefill", address="", model_fingerprint="", model_name="")


def test_a_ring_whose_writes_never_end_is_replaced_and_the_next_prompt_lands(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path, {"decode": {"ring_slots": 8}})) as rig:
            first_ring = rig.agent.ring_name(rig.prefill.identity.boot_id)
            rig.hub.stop(rig.service.card.boot_id)  # a write to it stays in flight
            stuck = Prompt("stuck", 0, ids(70), GREEDY)
            rig.gateway.start(stuck, rig.prefill)
            rig.prefill.announce(stuck)
            handle = await rig.prefill.granted(stuck)
            for span in rig.prefill.open(handle, rig.prefill.compute(stuck)):
                rig.prefill.push(handle.handle_id, span.message_idx)
            await until(lambda: rig.prefill.agent.counts().num_writes_in_flight > 0)
            rig.gateway.cancel("stuck")
            await until(lambda: rig.agent.counts().num_quarantined_slots == len(handle.slots))
            await until(lambda: rig.agent.ring_name(rig.prefill.identity.boot_id) not in ("", first_ring))
            prompt = Prompt("next", 0, ids(90), GREEDY)
            assert await serve(rig, prompt) == expected(prompt.prompt_ids)
            assert rig.prefill.handles["next", 0].ring_name != first_ring
            assert rig.service.report().counters["rings_replaced"] == 1
            await rig.at_rest(quarantined=len(handle.slots))
            rig.hub.resume(rig.service.card.boot_id)
            await rig.at_rest()
            assert rig.agent.counts().num_retired_rings == 0

    asyncio.run(go())


@pytest.mark.parametrize(
    ("was_silent", "after_s", "fate"),
    [
        (False, 1.9, Fate.UNKNOWN),
        (False, 2.0, Fate.DEAD),
        (True, 11.9, Fate.UNKNOWN),
        (True, 12.0, Fate.GIVEN_UP),
    ],
)
def test_a_producer_without_a_lease_is_waited_for_so_long(was_silent: bool, after_s: float, fate: Fate) -> None:
    lost = LostProducer(replica_id="p0", was_silent=was_silent, lost_s=100.0)
    assert lost.fate("boot", [member("p0", "boot")], LEASE_S, 200.0) is Fate.UNKNOWN, "its lease runs"
    assert lost.fate("boot", [member("p1", "other")], LEASE_S, 300.0) is Fate.UNKNOWN
    assert lost.fate("boot", [member("p1", "other")], LEASE_S, 300.0 + after_s) is fate
    assert lost.fate("boot", [member("p0", "newer")], LEASE_S, 300.1) is Fate.DEAD, "restarted"


def test_without_a_directory_a_silent_producer_is_given_up_too() -> None:
    lost = LostProducer(replica_id="p0", was_silent=True, lost_s=100.0)
    assert lost.fate("boot", None, LEASE_S, 99.9 + GIVEN_UP_WITHOUT_DIRECTORY_S) is Fate.UNKNOWN
    assert lost.fate("boot", None, LEASE_S, 100.0 + GIVEN_UP_WITHOUT_DIRECTORY_S) is Fate.GIVEN_UP


class DeafDirectory(Directory):
    """Loses the first cancellation of each call, as redis-py on Python 3.11 may, and answers."""

    def __init__(self) -> None:
        super().__init__("unix:///nowhere", LEASE_S)
        self.is_asked = asyncio.Event()

    async def members(self) -> list[Member]:
        self.is_asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return []


def test_rings_close_while_the_directory_is_asked_for_a_lost_producer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode replica whose producers left just before it once waited for ever for this watch, which went on looking."""
    monkeypatch.setattr("services.decode.producer_rings.LOOK_PERIOD_S", 0.01)

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            directory = DeafDirectory()
            rings = ProducerRings(Producers(), rig.agent, 4, LEASE_S, directory, lambda: None)
            producer = rig.prefill.connection
            assert producer is not None
            rings.joined(producer)
            rings.left(producer)
            async with asyncio.timeout(40):
                await directory.is_asked.wait()
                await rings.close()
            await directory.close()

    asyncio.run(go())


def test_a_stopped_producer_gives_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls silent with a write under way, and no fence ever comes."""
    monkeypatch.setattr("services.decode.producer_rings.GIVEN_UP_WITHOUT_DIRECTORY_S", 0.5)

    async def go() -> None:
        async with running(configuration(tmp_path, {"wire": {"heartbeat_s": 0.1, "silence_timeout_s": 0.5}})) as rig:
            rig.hub.stop(rig.service.card.boot_id)
            prompt = Prompt("r", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            rig.prefill.open(handle, rig.prefill.compute(prompt))
            rig.prefill.push(handle.handle_id, 0)
            connection = rig.prefill.connection
            assert connection is not None
            assert connection._transport is not None and connection._timer is not None
            connection._transport.pause_reading()  # the socket stays open and says nothing, as a stopped process' does
            connection._timer.cancel()
            failure = await rig.gateway.failed("r")
            assert failure.retryable and failure.phase == "kv.handoff"
            await rig.at_rest()
            counts = rig.agent.counts()
            assert (counts.num_retired_rings, counts.num_open_handles) == (0, 0)

    asyncio.run(go())


def test_a_producer_that_connects_again_is_asked_for_every_fence_that_was_lost_with_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never fences what it has not heard of; more often than rings may wait for that, or it would be granted nothing any more."""
    monkeypatch.setattr("services.decode.producer_rings.DEAD_WITHOUT_DIRECTORY_S", 60.0)  # it is not taken for dead, however late it comes

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            for number in range(MAX_RETIRED_RINGS + 2):
                prompt = Prompt(f"r{number}", 0, ids(40), GREEDY)
                rig.gateway.start(prompt, rig.prefill)
                rig.prefill.announce(prompt)
                handle = await rig.prefill.granted(prompt)
                connection, ring_name = rig.prefill.connection, rig.agent.ring_name(handle.producer_boot_id)
                assert connection is not None
                await connection.close()
                assert (await rig.gateway.failed(prompt.request_id)).code == "peer_gone"
                assert rig.agent.counts().num_quarantined_slots == len(handle.slots)
                await rig.prefill.connect(rig.service.membership.identity.address)
                await until(lambda: len(rig.prefill.of(HandleOffered, prompt.request_id)) == 2)  # noqa: B023  # called in this round
                assert {one.handle for one in rig.prefill.of(HandleOffered, prompt.request_id)} == {handle}
                assert rig.agent.ring_name(handle.producer_boot_id) != ring_name, "its slots are others'"
                await rig.prefill.fence(handle)
                await rig.at_rest()
                assert rig.agent.counts().num_retired_rings == 0
            prompt = Prompt("last", 0, ids(90), GREEDY)
            assert await serve(rig, prompt) == expected(prompt.prompt_ids)

    asyncio.run(go())
