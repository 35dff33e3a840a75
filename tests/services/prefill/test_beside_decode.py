"""Co-located layered prefill: alone a prompt crosses the model in one piece; beside decode it comes in pieces, one between two steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

from duomo.config import DuomoConfig
from duomo.wire.values import Sampling
from services.decode.worker import StepInput, StepOutput
from services.prefill.pending import Over, Pending
from services.prefill.pieces import Piece
from services.prefill.worker import Computation
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import GREEDY, expected, ids, until
from tests.services.pair_rig import colocated

GROUP_S = 0.05
LONG = Sampling(max_tokens=120, temperature=0.0, ignore_eos=True)


def told(folder: Path) -> DuomoConfig:
    """A group is told to take 50 ms: one fits the target, all four fit what a prompt may take that nobody waits for."""
    config = configuration(
        folder,
        {
            "prefill": {"piece_target_s": 0.09, "prefix_cache_blocks": 0, "grant_timeout_s": 30.0},
            "delays": {"decode_step_s": 0.01},
        },
    )
    return DuomoConfig.model_validate(config.model_dump() | {"layout": "colocated"})


def test_pieces_are_large_alone_and_keep_to_the_target_beside_decode(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(60), colocated(told(tmp_path)) as (engine, made):
            ran: list[tuple[int, int] | str] = []
            decode, prefill = engine.decode._steps._worker, engine.prefill._book.waves._worker
            run, run_piece = decode.run, prefill.run_piece

            def seen_step(step: StepInput) -> StepOutput | None:
                ran.append("step")
                return run(step)

            def seen_piece(computation: Computation, piece: Piece) -> Pending[float]:
                ran.append(piece.groups)
                run_piece(computation, piece).wait()
                return Over(GROUP_S * piece.num_groups)  # whatever it took here

            decode.run, prefill.run_piece = seen_step, seen_piece  # type: ignore[method-assign]  # witnesses of the turns

            async def alone(name: str, size: int) -> list[tuple[int, int] | str]:
                ran.clear()
                made.start(name, ids(size, size), GREEDY, p=0, d=0)
                await until(lambda: bool(ran) and "step" in ran)
                pieces = [turn for turn in ran if turn != "step"]
                await made.ended(name, p=0, d=0)
                return pieces

            assert await alone("first", 40) == [(0, 1), (1, 4)], "nothing is known before the first group"
            assert await alone("second", 50) == [(0, 4)]
            ran.clear()
            made.start("long", ids(5), LONG, p=0, d=0)
            await until(lambda: ran.count("step") > 8)
            ran.clear()
            made.start("beside", ids(60, 60), GREEDY, p=0, d=0)
            await made.ended("beside", p=0, d=0)
            turns = ran[: ran.index((3, 4)) + 1]
            assert [turn for turn in turns if turn != "step"] == [(0, 1), (1, 2), (2, 3), (3, 4)]
            assert all("step" in (turn, following) for turn, following in zip(turns, turns[1:], strict=False)), turns
            await made.ended("long", p=0, d=0)
            assert made.tokens("beside", p=0, d=0) == expected(ids(60, 60))
            assert made.tokens("long", p=0, d=0) == expected(ids(5), LONG)

    asyncio.run(scenario())
