"""Waves that nobody wants any more run no further, and what they read is counted; a long prompt's chunks are signs of life."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from duomo.engine.sampler import RowSampling
from duomo.errors import TransferError
from duomo.wire.connection import Connection
from duomo.wire.messages import Message, PrefillDone, RequestFailed, TokensEmitted
from services.prefill import leg_book
from services.prefill.leg import Leg
from services.prefill.pending import Over
from services.prefill.pieces import Piece
from services.prefill.worker import Computation, PrefillWorker, WaveOutput, WaveRow, WorkerSizes
from tests.services.prefill.late_device import NUM_GROUPS, PROMPT, Late, groups_landed, num_wanted, opened
from tests.services.prefill.prefill_rig import Rig, config_for, expected_kv, ids, model, rig, run
from tests.services.prefill.scripted_peers import until

NEVER_TWO_S = 1e-9  # no two groups fit a piece


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


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_groups_of_one_piece_leave_while_those_behind_them_are_computed(tmp_path: Path, is_cancelled: bool) -> None:
    """Launched at once, each over when a device says so: its KV is with decode before the next group is, the last before a first token."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=10.0) as parts:
            parts.gateway.start("first", ids(40), parts.decode.address)  # measured: the next one is a piece alone
            await parts.gateway.finished("first")
            gates, is_sampled = [threading.Event() for _ in range(NUM_GROUPS)], threading.Event()
            pieces, run_piece, sample = [], parts.worker.run_piece, parts.worker.sample

            def late(computation: Computation, piece: Piece) -> Late[float]:
                pieces.append(piece)
                gate = gates[piece.groups[0]]
                return Late(run_piece(computation, piece).result, partial(opened, gate))

            def sampled_late(computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> Late[tuple[WaveOutput, ...]]:
                return Late(sample(computation, rows).result, partial(opened, is_sampled))

            parts.worker.run_piece = late  # type: ignore[method-assign,assignment]  # a device's
            parts.worker.sample = sampled_late  # type: ignore[method-assign,assignment]  # its first tokens
            parts.gateway.start("told", PROMPT, parts.decode.address)
            for group in range(NUM_GROUPS - is_cancelled):
                assert groups_landed(parts, "told") == set(range(group))
                gates[group].set()
                await until(lambda group=group: group in groups_landed(parts, "told"), f"group {group} did not land")
            assert [piece.groups for piece in pieces] == [(group, group + 1) for group in range(NUM_GROUPS)]
            assert not parts.gateway.inbox.of(TokensEmitted)[1:], "a first token before it is sampled"
            if is_cancelled:
                parts.gateway.cancel("told")
                parts.decode.abort("told")
            gates[-1].set()
            is_sampled.set()
            if not is_cancelled:
                await parts.gateway.finished("told")
                assert parts.decode.kv("told", len(PROMPT)) == expected_kv(PROMPT)
            await parts.is_clean()

    run(scenario, tmp_path)


def test_groups_are_told_behind_the_last_rows_of_a_wave_alone(tmp_path: Path) -> None:
    """Chunked: each piece has all groups of some rows, and none of them is whole before the last one."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, mode="chunked", chunk_tokens=64, prefix_cache_blocks=0) as parts:
            launched, told, run_piece = [], [], parts.worker.run_piece
            group_computed = parts.service._book.handoffs.group_computed

            def late(computation: Computation, piece: Piece) -> Late[float]:
                launched.append(piece)
                return Late(run_piece(computation, piece).result, lambda: None)

            def seen(leg: Leg, group: int) -> None:
                told.append((group, launched[-1].chunks))
                group_computed(leg, group)

            parts.worker.run_piece = late  # type: ignore[method-assign,assignment]  # a device's
            parts.service._book.handoffs.group_computed = seen  # type: ignore[method-assign]  # a witness of what is told
            parts.gateway.start("told", PROMPT, parts.decode.address)
            await parts.gateway.finished("told")
            assert told == [(group, (2, 3)) for group in range(NUM_GROUPS)]
            assert parts.decode.kv("told", len(PROMPT)) == expected_kv(PROMPT)
            await parts.is_clean()

    run(scenario, tmp_path)


def test_decode_hears_of_a_prompt_alone_before_its_first_token_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several, every first token leaves before decode hears of any: their clients would wait for each other's messages."""
    told = list[str]()

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=10.0) as parts:
            parts.decode.num_ring_slots = 3 * NUM_GROUPS
            parts.gateway.start("first", ids(40), parts.decode.address)  # measured: the next one is a piece alone
            await parts.gateway.finished("first")
            book, may_run, run_piece = parts.service._book, threading.Event(), parts.worker.run_piece
            post_decode, post_gateway = book.peers.post, leg_book._post

            def to_decode(boot_id: str, message: Message) -> None:
                if isinstance(message, PrefillDone):
                    told.append(message.request_id)
                post_decode(boot_id, message)

            def to_gateway(gateway: Connection, message: Message) -> None:
                if isinstance(message, TokensEmitted):
                    told.append("tokens of " + " ".join(token.request_id for token in message.tokens))
                post_gateway(gateway, message)

            def held(computation: Computation, piece: Piece) -> Over[float]:
                opened(may_run)
                return run_piece(computation, piece)

            monkeypatch.setattr(book.peers, "post", to_decode)
            monkeypatch.setattr(leg_book, "_post", to_gateway)
            parts.worker.run_piece = held  # type: ignore[method-assign]  # until the next wave's prompts are here
            parts.gateway.start("alone", ids(40, 1), parts.decode.address)
            await until(lambda: num_wanted(parts) == 1, "it does not run")
            for name in ("one", "two"):
                parts.gateway.start(name, ids(40, len(name)), parts.decode.address)
            await until(lambda: sum(leg.view.is_granted for leg in book.waves.waiting.values()) == 2, "the others have no grants")
            may_run.set()
            for name in ("alone", "one", "two"):
                await parts.gateway.finished(name)
            await parts.is_clean()

    run(scenario, tmp_path)
    assert told == ["alone", "tokens of alone", "tokens of one two", "one", "two"]


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

            def slow(computation: Computation, piece: Piece) -> Over[float] | Late[float]:
                num_chunks = piece.chunks[1] - piece.chunks[0]
                seconds = run_piece(computation, piece)
                if is_launched:
                    return Late[float](seconds.result, lambda: take(num_chunks))
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
