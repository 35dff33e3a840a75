"""What an operator may ask of a decode replica that goes on: to drain and to take it back, and to forget every prefix."""

from __future__ import annotations

import asyncio
from pathlib import Path

from duomo.wire.messages import CachesFlushed, Drain, FlushCaches, Undrain
from tests.services.decode.rig import Rig, configuration, running, serve
from tests.services.decode.scripted_peers import GREEDY, Prompt, expected, ids, until, with_max

PROMPT = ids(70)  # 4 full blocks


async def first_block(rig: Rig, name: str, prompt_ids: tuple[int, ...]) -> int:
    """Serve the prompt, rightly; the first block that was sent for it."""
    assert await serve(rig, Prompt(name, 0, prompt_ids, GREEDY)) == expected(prompt_ids)
    return rig.prefill.handles[name, 0].first_block


def test_a_drain_that_stays_is_taken_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            serving = asyncio.create_task(rig.service.membership.serve(asyncio.Event()))
            for number in range(2):
                rig.gateway.post(Drain(deadline_s=0.0, ends=False))
                await until(lambda: rig.gateway.report is not None and rig.gateway.report.is_draining)
                rig.gateway.start(Prompt(f"refused {number}", 0, ids(5), GREEDY), rig.prefill)
                assert (await rig.gateway.failed(f"refused {number}")).code == "draining"
                rig.gateway.post(Undrain())
                await until(lambda: rig.gateway.report is not None and not rig.gateway.report.is_draining)
                assert await serve(rig, Prompt(f"taken {number}", 0, ids(20), GREEDY)) == expected(ids(20))
            assert not serving.done()
            await rig.at_rest()
            serving.cancel()

    asyncio.run(go())


def test_a_flush_lets_streams_run_and_nothing_from_before_it_be_found(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        assert await first_block(rig, "before", PROMPT) == 0
        running = Prompt("running", 0, (*PROMPT, 3), with_max(GREEDY, 40))
        rig.gateway.start(running, rig.prefill)
        await rig.prefill.prefill(running)
        assert rig.prefill.handles["running", 0].first_block == 4, "found"
        await until(lambda: len(rig.gateway.answers["running"].ids()) > 3)
        rig.gateway.post(FlushCaches(flush_id=7))
        flushed = await rig.gateway.one(CachesFlushed)
        assert flushed.flush_id == 7 and flushed.num_blocks >= 4
        rig.service.pool.check_integrity()
        await rig.gateway.finished("running")
        assert rig.gateway.answers["running"].ids() == expected(running.prompt_ids, running.sampling)[1:]
        rig.service.pool.check_integrity()
        assert await first_block(rig, "after", (*PROMPT, 3)) == 0, "neither what was cached nor what was in use"
        assert await first_block(rig, "again", (*PROMPT, 3)) == 4
        assert rig.service.report().counters["prefix_blocks_flushed"] == flushed.num_blocks

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            await scenario(rig)
            await rig.at_rest()

    asyncio.run(go())
