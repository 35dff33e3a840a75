"""PURE: owns the cut of a wave's rows into chunks, and the order in which chunks cross the layers. Knows no tensor and no request.

A wave is a grid: layers one way, chunks of its packed rows the other. Layer l of a chunk attends over the keys that layer l of all earlier
chunks wrote, and takes what layer l - 1 of its own rows gave: any walk of the grid that keeps both gives the same rows.

Every chunk has exactly chunk_tokens rows but the last, which has the rest: even shorter chunks would be as many, and the last one of fewer
rows reads fewer experts. A prompt may lie in several chunks: its later slices start where the one before ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from duomo.engine.batch import PromptSlice, StepBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class RowChunk:
    """Rows [row_lo, row_hi) of a wave as a batch of their own; its slices belong to the wave's prompts from first_prompt on."""

    batch: StepBatch
    first_prompt: int
    row_lo: int
    row_hi: int

    @property
    def num_rows(self) -> int:
        return self.row_hi - self.row_lo

    @property
    def prompts(self) -> slice:
        """The places of its slices in the wave."""
        return slice(self.first_prompt, self.first_prompt + len(self.batch.slices))


@dataclass(slots=True)
class GridWalk:
    """How far each of num_chunks chunks is: next_layers[c] is the layer that chunk c runs next."""

    num_chunks: int
    num_layers: int
    next_layers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.next_layers = [0] * self.num_chunks

    @property
    def next_layer(self) -> int:
        """The first layer that is not over for all chunks."""
        return self.next_layers[-1]

    @property
    def is_over(self) -> bool:
        return self.next_layer == self.num_layers

    def check(self, layers: tuple[int, int], chunks: tuple[int, int]) -> None:
        """Whether these layers of these chunks, one chunk after the other, may run now: else an AssertionError that says why not."""
        (lo, hi), (first, end) = layers, chunks
        assert 0 <= lo < hi <= self.num_layers, f"layers {lo}..{hi} of {self.num_layers}"
        assert 0 <= first < end <= self.num_chunks, f"chunks {first}..{end} of {self.num_chunks}"
        behind = [(chunk, layer) for chunk, layer in enumerate(self.next_layers[first:end], first) if layer != lo]
        assert not behind, f"chunk {behind[0][0]} runs layer {behind[0][1]} next, not {lo}"
        assert not first or self.next_layers[first - 1] >= hi, (
            f"chunk {first - 1} has not run layer {hi - 1}, whose keys chunk {first} needs"
        )

    def advance(self, layers: tuple[int, int], chunk: int) -> None:
        """One chunk has run these layers."""
        self.next_layers[chunk] = layers[1]


def num_chunks(num_rows: int, chunk_tokens: int | None) -> int:
    """Chunks of a wave of so many rows; None: one."""
    return 1 if chunk_tokens is None else max(1, -(-num_rows // chunk_tokens))


def cut_rows(batch: StepBatch, chunk_tokens: int | None) -> tuple[RowChunk, ...]:
    """The wave's chunks of chunk_tokens rows each; None: one of all rows."""
    assert chunk_tokens is None or chunk_tokens > 0, f"chunk_tokens {chunk_tokens}: at least one row"
    num_rows = batch.num_rows
    if chunk_tokens is None or num_rows <= chunk_tokens:
        return (RowChunk(batch=batch, first_prompt=0, row_lo=0, row_hi=num_rows),)
    chunks, parts, first_prompt, row_lo, row = [], list[PromptSlice](), 0, 0, 0
    for prompt, part in enumerate(batch.slices):
        taken = 0
        while taken < len(part.token_ids):
            count = min(len(part.token_ids) - taken, row_lo + chunk_tokens - row)
            if not parts:
                first_prompt = prompt
            parts.append(_rows_of(part, taken, count))
            taken, row = taken + count, row + count
            if row == row_lo + chunk_tokens or row == num_rows:
                chunks.append(RowChunk(batch=StepBatch(slices=tuple(parts)), first_prompt=first_prompt, row_lo=row_lo, row_hi=row))
                parts, row_lo = [], row
    return tuple(chunks)


def _rows_of(part: PromptSlice, taken: int, count: int) -> PromptSlice:
    if count == len(part.token_ids):
        return part
    return PromptSlice(token_ids=part.token_ids[taken : taken + count], start=part.start + taken, block_table=part.block_table)
