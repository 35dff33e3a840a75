"""Waves that nobody wants any more run no further, and what they read is counted; a long prompt's chunks are signs of life."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from duomo.errors import TransferError
from duomo.wire.messages import RequestFailed
from services.prefill.leg import Leg
from services.prefill.pending import Over
from services.prefill.pieces import Piece
from services.prefill.worker import Computation, PrefillWorker, WaveRow, WorkerSizes
from tests.services.prefill.prefill_rig import Rig, config_for, ids, model, rig, run
from tests.services.prefill.scripted_peers import until

NEVER_TWO_S = 1e-9  # no two groups fit a piece
PROMPT = ids(150)
NUM_GROUPS = 4


class Witness:
    """What of a rig's waves ran. after: called in the step thread behind each piece."""

    def __init__(self, parts: Rig, after: Callable[[], object] = lambda: None) -> None:
        self.pieces: list[Piece] = []
        run_piece = parts.worker.run_piece

        def seen(computation: Computation, piece: Piece) -> Over[float]:
            self.pieces.append(piece)
            seconds = run_piece(computation, piece)
            after()
            return seconds

        parts.worker.run_piece = seen  # type: ignore[method-assign]  # a witness of what runs


def bytes_of_groups(num_groups: int, run_dir: Path) -> int:
    """What so many groups of PROMPT read."""
    worker = PrefillWorker(model(), WorkerSizes.of(config_for(run_dir)))
    computation = worker.begin([WaveRow(token_ids=PROMPT, start=0, block_table=range(10))])
    worker.run_piece(computation, Piece(groups=(0, num_groups), chunks=(0, 1)))
    return worker.use_of(computation).result.bytes_read


def counted(parts: Rig) -> int:
    return parts.service.report().counters["expert_bytes_read"]


def num_wanted(parts: Rig) -> int:
    return parts.service._book.waves.num_running


def test_a_wave_cancelled_before_its_piece_began_runs_nothing(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            witness, gate = Witness(parts), threading.Event()
            busy = parts.service._thread.run("group", gate.wait)
            parts.gateway.start("gone", PROMPT, parts.decode.address)
            await until(lambda: num_wanted(parts) == 1, "never in a wave")
            parts.gateway.cancel("gone")
            await until(lambda: num_wanted(parts) == 0, "never cancelled")
            gate.set()
            await busy
            parts.decode.abort("gone")
            await parts.is_clean()
            assert (witness.pieces, counted(parts)) == ([], 0)

    run(scenario, tmp_path)


def test_a_wave_cancelled_while_a_piece_runs_ends_with_it_and_its_bytes_are_counted(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=NEVER_TWO_S) as parts:
            gate = threading.Event()
            witness = Witness(parts, after=gate.wait)
            parts.gateway.start("gone", PROMPT, parts.decode.address)
            await until(lambda: bool(witness.pieces), "no piece ran")
            parts.gateway.cancel("gone")
            await until(lambda: num_wanted(parts) == 0, "never cancelled")
            gate.set()
            parts.decode.abort("gone")
            await until(lambda: counted(parts) > 0, "what it read is not counted")
            await parts.is_clean()
            assert witness.pieces == [Piece(groups=(0, 1), chunks=(0, 1))]
            assert counted(parts) == bytes_of_groups(1, run_dir)

    run(scenario, tmp_path)


def test_a_wave_whose_handoff_fails_behind_a_piece_runs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=NEVER_TWO_S) as parts:
            witness, book = Witness(parts), parts.service._book
            group_computed = book.handoffs.group_computed

            def fails_after_two(leg: Leg, group: int) -> None:
                group_computed(leg, group)
                if group == 1:
                    book.fail(leg, TransferError("planted", code="transfer_timeout"))

            monkeypatch.setattr(book.handoffs, "group_computed", fails_after_two)
            parts.gateway.start("fails", PROMPT, parts.decode.address)
            await parts.gateway.failed("fails")
            await until(lambda: counted(parts) > 0, "what it read is not counted")
            parts.decode.abort("fails")
            await parts.is_clean()
            assert [piece.groups for piece in witness.pieces] == [(0, 1), (1, 2)]
            assert counted(parts) == bytes_of_groups(2, run_dir)
            monkeypatch.undo()
            parts.gateway.start("stays", PROMPT, parts.decode.address)
            await parts.gateway.finished("stays")
            assert len(witness.pieces) == 2 + NUM_GROUPS and counted(parts) == bytes_of_groups(2, run_dir) + bytes_of_groups(4, run_dir)
            assert len(parts.gateway.inbox.of(RequestFailed)) == 1
            await parts.is_clean()

    run(scenario, tmp_path)


@dataclass
class LateSeconds:
    """A device's chunk: over when somebody has waited for it."""

    result: float
    wait_for: Callable[[], None]

    def wait(self) -> float:
        self.wait_for()
        return self.result


@pytest.mark.parametrize("is_launched", [False, True])
def test_each_chunk_of_a_long_prompt_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_launched: bool) -> None:
    """Chunks that take most of hang_timeout_s each, and several pieces of many of them: alive by every look of the watchdog."""
    now_s, ages_s = 0.0, []

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, max_wave_tokens=64, long_chunk_tokens=32, piece_target_s=NEVER_TWO_S) as parts:
            progress, run_piece = parts.service.progress, parts.worker.run_piece
            monkeypatch.setattr(progress, "_clock", lambda: now_s)

            def take(num_chunks: int) -> None:
                nonlocal now_s
                now_s += 0.8 * progress.hang_timeout_s * num_chunks
                ages_s.append(progress.age_s())

            def slow(computation: Computation, piece: Piece) -> Over[float] | LateSeconds:
                num_chunks = piece.chunks[1] - piece.chunks[0]
                seconds = run_piece(computation, piece)
                if is_launched:
                    return LateSeconds(seconds.result, lambda: take(num_chunks))
                take(num_chunks)
                return seconds

            parts.worker.run_piece = slow  # type: ignore[method-assign,assignment]  # chunks that take long
            parts.gateway.start("long", ids(333), parts.decode.address)
            await parts.gateway.finished("long")
            await until(lambda: progress.age_s() == 0, "not idle")
            progress.check()
            assert len(ages_s) == NUM_GROUPS * 11 and max(ages_s) < progress.hang_timeout_s
            await parts.is_clean()

    run(scenario, tmp_path)
