"""PURE: owns what the step thread runs of a wave without a break, and how large that is. Knows no tensor and no prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.prefill.snapshot import Limits, WaveView
from services.prefill.wave_costs import CostCurve

# A wave that nobody could overtake runs to its end as one piece where all of it takes so many targets at most: a short prompt's launches
# never wait for the host then. A longer one keeps its boundaries to the last, for the prompt that comes while it runs.
ALONE_TARGETS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Layer groups [lo, hi) of row chunks [lo, hi) of a wave; one chunk after the other, each through all layers of the piece."""

    groups: tuple[int, int]
    chunks: tuple[int, int]

    @property
    def num_groups(self) -> int:
        return self.groups[1] - self.groups[0]


def next_piece(wave: WaveView, limits: Limits, costs: CostCurve, *, may_run_on: bool) -> Piece:
    """What of the wave runs next.

    layered: as many groups as fit the target, one at least, all chunks; all groups that are left where the wave may run on and would take
    ALONE_TARGETS targets at most from its first. chunked: the next chunk. whole: all.
    """
    assert wave.has_more, wave
    if limits.mode == "chunked":
        return Piece(groups=(0, wave.num_groups), chunks=(wave.next_chunk, wave.next_chunk + 1))
    num_groups = wave.num_groups - wave.next_group
    if limits.mode == "layered":
        group_s, target_s = costs.at_most_s(wave.num_tokens), limits.piece_target_s
        is_short = group_s is not None and wave.num_groups * group_s <= ALONE_TARGETS * target_s
        num_groups = num_groups if may_run_on and is_short else min(num_groups, _num_fitting(num_groups, group_s, target_s))
    return Piece(groups=(wave.next_group, wave.next_group + num_groups), chunks=(0, wave.num_chunks))


def _num_fitting(num_left: int, group_s: float | None, target_s: float) -> int:
    if group_s is None:
        return 1
    return max(int(target_s / group_s), 1) if group_s > 0 else num_left


def advanced(wave: WaveView, piece: Piece) -> WaveView:
    """The wave once the piece has begun: all chunks of some groups, then the next groups."""
    assert (piece.groups[0], piece.chunks[0]) == (wave.next_group, wave.next_chunk), (wave, piece)
    if piece.chunks[1] == wave.num_chunks:
        return replace(wave, next_group=piece.groups[1], next_chunk=0)
    return replace(wave, next_chunk=piece.chunks[1])


def finished_groups(wave: WaveView, piece: Piece) -> range:
    """The groups whose KV is complete after the piece: those of its last chunk."""
    return range(*piece.groups) if piece.chunks[1] == wave.num_chunks else range(0)


def parts_of(piece: Piece, *, by_group: bool) -> list[tuple[Piece, int | None]]:
    """What is launched one by one: its chunks, each through all of its groups; by_group: the last chunk group by group, so that their ends
    can be told while what is behind them is computed (of the last group the logits and the first tokens), of a piece with the wave's last
    rows alone (finished_groups). Beside each part the group that it ends.
    """
    parts = [replace(piece, chunks=(chunk, chunk + 1)) for chunk in range(*piece.chunks)]
    if not by_group:
        return [(part, None) for part in parts]
    last, (lo, hi) = parts.pop(), piece.groups
    return [(part, None) for part in parts] + [(replace(last, groups=(group, group + 1)), group) for group in range(lo, hi)]


def num_rows(wave: WaveView, piece: Piece, limits: Limits) -> int:
    """Rows that the piece computes in each of its layers."""
    chunk_tokens = limits.chunk_tokens_of(wave.num_tokens)
    if chunk_tokens is None:
        return wave.num_tokens
    first = piece.chunks[0] * chunk_tokens
    return min(piece.chunks[1] * chunk_tokens, wave.num_tokens) - first
