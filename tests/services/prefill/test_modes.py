"""Layered, chunked and whole prefill through the service on a CPU: the same KV and tokens, each in its own pieces, seen in its spans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duomo.telemetry.span_file import read_spans
from tests.services.prefill.prefill_rig import expected_kv, first_token, ids, rig, run

NUM_GROUPS = 4
SIZES = (5, 60, 150, 333)
NEVER_TWO_S = 1e-9  # no two groups fit
ALWAYS_ALL_S = 1e3


def pieces_of(run_dir: Path, name: str) -> dict[int, list[tuple[int, int, int]]]:
    """(first group, groups, chunk) of the pieces of every prompt, by its tokens. name: of the event."""
    computes = [span for span in read_spans(run_dir / "spans") if span.name == "prefill.compute"]
    found = {}
    for span in computes:
        events = [event.attributes for event in span.events if event.name == name]
        found[int(str(span.attributes["duomo.prompt_tokens"]))] = [
            tuple(int(str(attributes.get(key, 0))) for key in ("duomo.group", "duomo.groups", "duomo.chunk")) for attributes in events
        ]
    return found  # type: ignore[return-value]  # three keys, three numbers


def serve_one_by_one(run_dir: Path, **prefill: Any) -> dict[int, list[tuple[int, int, int]]]:
    """Prompts of SIZES, each alone; their KV and tokens are checked. Returns the pieces of each."""

    async def scenario(folder: Path) -> None:
        async with rig(folder, prefix_cache_blocks=0, **prefill) as parts:
            for size in SIZES:
                parts.gateway.start(f"r{size}", ids(size, size), parts.decode.address)
                await parts.gateway.finished(f"r{size}")
                assert parts.gateway.tokens(f"r{size}")[0].token_id == first_token(ids(size, size)), size
                assert parts.decode.kv(f"r{size}", size) == expected_kv(ids(size, size)), size
            await parts.is_clean()

    run(scenario, run_dir)
    started, computed = pieces_of(run_dir, "group_started"), pieces_of(run_dir, "group_computed")
    assert started == computed and set(started) == set(SIZES)
    return started


def test_layered_pieces_are_single_groups_where_no_two_fit(tmp_path: Path) -> None:
    found = serve_one_by_one(tmp_path, piece_target_s=NEVER_TWO_S)
    assert all(pieces == [(group, 1, 0) for group in range(NUM_GROUPS)] for pieces in found.values()), found


def test_a_layered_prompt_alone_crosses_the_model_in_one_piece_once_something_is_measured(tmp_path: Path) -> None:
    found = serve_one_by_one(tmp_path, piece_target_s=ALWAYS_ALL_S)
    assert found.pop(SIZES[0]) == [(0, 1, 0), (1, 3, 0)], "nothing is known before the first group"
    assert all(pieces == [(0, NUM_GROUPS, 0)] for pieces in found.values()), found


def test_whole_prompts_are_one_piece(tmp_path: Path) -> None:
    found = serve_one_by_one(tmp_path, mode="whole", piece_target_s=NEVER_TWO_S)
    assert all(pieces == [(0, NUM_GROUPS, 0)] for pieces in found.values()), found


def test_chunks_cross_all_layers_one_after_the_other(tmp_path: Path) -> None:
    found = serve_one_by_one(tmp_path, mode="chunked", chunk_tokens=64)
    assert {size: len(pieces) for size, pieces in found.items()} == {5: 1, 60: 1, 150: 3, 333: 6}
    assert all(pieces == [(0, NUM_GROUPS, chunk) for chunk in range(len(pieces))] for pieces in found.values()), found


@pytest.mark.parametrize(("mode", "num_pieces"), [("layered", NUM_GROUPS), ("whole", 1)])
def test_prompts_beyond_a_wave_cross_each_piece_in_chunks(tmp_path: Path, mode: str, num_pieces: int) -> None:
    found = serve_one_by_one(tmp_path, mode=mode, max_wave_tokens=64, long_chunk_tokens=96, piece_target_s=NEVER_TWO_S)
    assert {len(pieces) for pieces in found.values()} == {num_pieces}
    assert {chunk for pieces in found.values() for _, _, chunk in pieces} == {0}, "no piece begins within a wave's rows"


def test_in_chunked_mode_kv_is_handed_on_after_the_last_chunk(tmp_path: Path) -> None:
    async def scenario(folder: Path) -> None:
        async with rig(folder, mode="chunked", chunk_tokens=32, prefix_cache_blocks=0) as parts:
            parts.gateway.start("r", ids(100), parts.decode.address)
            await parts.gateway.finished("r")
            assert parts.decode.kv("r", 100) == expected_kv(ids(100))

    run(scenario, tmp_path)
    spans = read_spans(tmp_path / "spans")
    (compute,) = [span for span in spans if span.name == "prefill.compute"]
    last = max(event.at_ns for event in compute.events if event.name == "group_computed")
    pushes = [span for span in spans if span.name == "kv.push"]
    assert sorted(int(str(push.attributes["duomo.group"])) for push in pushes) == list(range(NUM_GROUPS))
    assert all(push.start_ns >= last - 1_000_000 for push in pushes), "a group is pushed before its last rows are computed"
