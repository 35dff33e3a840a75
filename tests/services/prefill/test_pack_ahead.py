"""Messages that a device is given when their layer group is launched: when, when not, and what holds the blocks that it reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.sealing import seal
from services.prefill.pieces import Piece
from services.prefill.worker import Computation
from tests.services.prefill.late_device import NUM_GROUPS, PROMPT, Behind, Late, groups_landed, num_wanted, opened
from tests.services.prefill.prefill_rig import expected_kv, ids, rig, run
from tests.services.prefill.scripted_peers import until

LONGER = ids(1200, seed=2)


def test_a_device_is_given_a_group_s_messages_behind_it_while_others_wait_for_their_turn(tmp_path: Path) -> None:
    """A longer prompt has more messages than slots, and decode gives none back: they would wait behind what cannot be packed yet."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=10.0) as parts:
            parts.gateway.start("first", ids(40), parts.decode.address)  # measured: the next one is a piece alone
            await parts.gateway.finished("first")
            parts.decode.is_draining = False
            parts.gateway.start("longer", LONGER, parts.decode.address)
            await until(lambda: parts.agent.num_waiting() > 0, "none waits")
            gates, afters = [threading.Event() for _ in range(NUM_GROUPS)], list[object]()
            run_piece, pack = parts.worker.run_piece, parts.worker.pack

            def late(computation: Computation, piece: Piece) -> Late[float]:
                return Late(run_piece(computation, piece).result, partial(opened, gates[piece.groups[0]]))

            def packed(handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview, after: object = None) -> None:
                afters.append(after)
                pack(handle_id, span, blocks, out[: span.num_bytes])
                seal(out, handle_id, span)

            parts.worker.run_piece = late  # type: ignore[method-assign,assignment]  # a device's
            parts.worker.pack = packed  # type: ignore[method-assign,assignment]  # as a device packs
            parts.worker.seals_messages = parts.worker.packs_ahead = True  # type: ignore[misc]  # as a device's worker says
            parts.gateway.start("told", PROMPT, parts.decode.address)
            for gate in gates:
                gate.set()
            await until(lambda: len(afters) > 0, "nothing was packed")
            parts.decode.is_draining = True
            for name, prompt in (("told", PROMPT), ("longer", LONGER)):
                await parts.gateway.finished(name)
                assert parts.decode.kv(name, len(prompt)) == expected_kv(prompt)
            assert set(afters) == {None}
            await parts.is_clean()

    run(scenario, tmp_path)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_device_is_given_a_group_s_messages_before_the_group_is_over(tmp_path: Path, is_cancelled: bool) -> None:
    """Once each, and none leaves before its group is: the device waits for that by itself. Of a prompt that ends meanwhile the blocks are
    held until it has packed: others' keys would be written into what it reads."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=10.0) as parts:
            parts.gateway.start("first", ids(40), parts.decode.address)  # measured: the next one is a piece alone
            await parts.gateway.finished("first")
            gates, packing = [threading.Event() for _ in range(NUM_GROUPS)], [threading.Event() for _ in range(NUM_GROUPS)]
            run_piece, pack, begun = parts.worker.run_piece, parts.worker.pack, dict[int, list[tuple[int, bool]]]()

            def late(computation: Computation, piece: Piece) -> Late[float]:
                return Late(run_piece(computation, piece).result, partial(opened, gates[piece.groups[0]]))

            def pack_sealed(handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview) -> None:
                pack(handle_id, span, blocks, out[: span.num_bytes])
                seal(out, handle_id, span)

            def ahead(handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview, after: Late[float]) -> Behind:
                begun.setdefault(span.message_idx, []).append((span.group, gates[span.group].is_set()))
                return Behind(after, packing[span.group], partial(pack_sealed, handle_id, span, blocks, out))

            parts.worker.run_piece = late  # type: ignore[method-assign,assignment]  # a device's
            parts.worker.pack = ahead  # type: ignore[method-assign,assignment]  # as a device packs
            parts.worker.seals_messages = parts.worker.packs_ahead = True  # type: ignore[misc]  # as a device's worker says
            parts.gateway.start("told", PROMPT, parts.decode.address)
            for group in range(NUM_GROUPS - is_cancelled):
                await until(lambda group=group: [(group, False)] in begun.values(), f"group {group} was not begun before it was over")
                assert groups_landed(parts, "told") == set(range(group))
                gates[group].set()
                packing[group].set()
                await until(lambda group=group: group in groups_landed(parts, "told"), f"group {group} did not land")
            if is_cancelled:
                await until(lambda: [(NUM_GROUPS - 1, False)] in begun.values(), "the last group was not begun before it was over")
                parts.gateway.cancel("told")
                parts.decode.abort("told")
                await until(lambda: num_wanted(parts) == 0, "the cancel did not arrive")
                gates[-1].set()
                await until(lambda: not parts.service._book.waves._waves, "the wave did not end")
                await until(lambda: parts.service._book.handoffs.num_open == 0, "no fence: a write is in flight")
                report = parts.service.report()
                assert report.num_free_blocks + report.num_cached_blocks < report.num_blocks, "the device has still to read them"
                packing[-1].set()
                await parts.is_clean()
                return
            await parts.gateway.finished("told")
            assert sorted(begun) == list(range(len(begun))) and {len(each) for each in begun.values()} == {1}
            assert parts.decode.kv("told", len(PROMPT)) == expected_kv(PROMPT)
            await parts.is_clean()

    run(scenario, tmp_path)
