"""Owns what one prefill rank computes with: model, KV cache, runner, sampler. Knows no request, policy, block count or socket.

Everything but pack() runs in the step thread, one call at a time, and is over, or launched, when it returns; pack() runs in the agent's
writer thread and reads layers that are over, or that a device waits for. WaveWorker is what the services ask of a rank: this one on a
CPU, gpu_worker.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.config import DelaySection, DuomoConfig, KvDtype
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.expert_counts import ExpertUse
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.kv_messages import KvMessages
from duomo.engine.prompt_scores import RowsToScore, prompt_scores
from duomo.engine.runner import BoundaryState, ModelRunner
from duomo.engine.sampler import RowSampling, SampledToken, Sampler, broken_rows
from duomo.errors import ConfigError, EngineError
from duomo.models.config import ModelConfig
from duomo.models.qwen3_moe import Model
from duomo.wire.prompt_logprobs import PromptScores
from duomo.wire.values import Sampling
from services.kv_transfer.layout import MessageSpan
from services.kv_transfer.push_job import Filling
from services.prefill.pending import Over, Pending
from services.prefill.pieces import Piece

if TYPE_CHECKING:  # a CPU serves without Triton
    from duomo.engine.gpu_prefill import GpuBoundaryState

SCORE_ROWS = 64  # four of the tiles that products are made in; of 150,000 tokens' logits 40 MB
WARM_TOKENS = (1, 2, 16, 33)  # torch picks a kernel by the number of rows; fixed 16-row tiles make larger waves repeat these


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSizes:
    """units_per_group of `units` equal runs of layers form a group. kv_dtype: of what is packed."""

    num_blocks: int
    block_tokens: int
    units: int
    units_per_group: int
    torch_threads: int
    kv_dtype: KvDtype = "model"

    @classmethod
    def of(cls, config: DuomoConfig) -> WorkerSizes:
        """The sizes that a configuration asks for."""
        return cls(
            num_blocks=config.prefill.num_blocks,
            block_tokens=config.model.block_tokens,
            units=config.model.units,
            units_per_group=config.prefill.units_per_group,
            torch_threads=config.prefill.torch_threads,
            kv_dtype=config.kv_transfer.kv_dtype,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveRow:
    """One prompt of a wave: token_ids from `start` on are computed, the KV before lies in the blocks."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]


@dataclass(slots=True, kw_only=True)
class Computation:
    """A wave between two pieces; belongs to the step thread."""

    batch: StepBatch
    state: BoundaryState | GpuBoundaryState

    @property
    def num_chunks(self) -> int:
        return self.state.num_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveOutput:
    """One prompt of a finished wave. computed_s, sampled_s: monotonic. error: why it has no tokens.

    expert_counts: computed tokens by the expert they were routed to, int32 [layers, experts], contiguous. expert_bytes: of expert weights
    that the whole wave read, said by its first prompt, 0 by the others.
    """

    sampled: tuple[SampledToken, ...]
    expert_counts: NDArray[np.int32]
    computed_s: float
    sampled_s: float
    expert_bytes: int = 0
    error: EngineError | None = None


class WaveWorker(Protocol):
    """One rank that prefills. All but config, group_bounds, num_groups, block_bytes, check, counters and pack is called in the
    step thread.

    seals_messages: pack() writes whole messages, padding and trailer included, not the payload alone. packs_ahead: pack() may be called
    for a group that is launched and not over. score_rows: see score().
    """

    group_bounds: tuple[int, ...]
    seals_messages: bool
    packs_ahead: bool
    score_rows: int

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_groups(self) -> int: ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer in a message."""

    def check(self, sampling: Sampling) -> None:
        """Raises RequestError for what this worker cannot sample."""

    def counters(self) -> Mapping[str, int]:
        """Event counts of its own, for the replica's report."""

    def enter_step_thread(self) -> None:
        """Called once."""

    def warm(self) -> None: ...

    def begin(self, rows: Sequence[WaveRow], chunk_tokens: int | None = None) -> Computation:
        """Embed a wave whose rows cross the layers in chunks of so many (None: in one)."""

    def run_piece(self, computation: Computation, piece: Piece) -> Pending[float]:
        """Compute the groups of a piece for its chunks. A chunk's group needs that group of all earlier chunks, and the group before of
        itself. When waiting ends their KV is in the cache; it says the seconds that they took, without what ran before them."""

    def score(self, computation: Computation, asked: RowsToScore) -> Pending[PromptScores]:
        """Of at most score_rows rows, after the last layer and before sample()."""

    def sample(self, computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> Pending[tuple[WaveOutput, ...]]:
        """The next token of every choice of every prompt; rows[i] lists the choices of prompt i (none: nobody wants it any more)."""

    def use_of(self, computation: Computation) -> Pending[ExpertUse]:
        """What the pieces run so far have routed and read, of a wave that is not run on."""

    def pack(
        self, handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview, after: Pending[float] | None = None
    ) -> Filling | None:
        """A message of the handle into `out`, from the blocks of a prompt's whole table; its group is over, or where packs_ahead ends with
        `after`. In a thread of the agent, while the step thread computes other layers and other waves. A Filling: by and by."""


def group_bounds(num_layers: int, units: int, units_per_group: int) -> tuple[int, ...]:
    """Layers [b[g], b[g+1]) form group g. Units are runs of layers whose sizes differ by at most one."""
    if units > num_layers:
        raise ConfigError(f"model.units is {units}, but the model has only {num_layers} layers")
    unit_bounds = [num_layers * unit // units for unit in range(units + 1)]
    bounds = unit_bounds[::units_per_group]
    return tuple(bounds if bounds[-1] == num_layers else [*bounds, num_layers])


class PrefillWorker:
    """One rank. delays: slept on purpose, for tests (config.DelaySection). cache: shared with decode; None: one of sizes.num_blocks."""

    seals_messages = packs_ahead = False
    score_rows = SCORE_ROWS

    def __init__(self, model: Model, sizes: WorkerSizes, delays: DelaySection | None = None, cache: KvCache | None = None) -> None:
        self._group_delay_s = delays.prefill_group_s if delays is not None else 0.0
        self._message_delay_s = delays.kv_handoff_s if delays is not None else 0.0
        self.config = model.config
        self.sizes = sizes
        self.cache = cache or KvCache(kv_spec(model.config, sizes.block_tokens), sizes.num_blocks)
        self.group_bounds = group_bounds(model.config.num_layers, sizes.units, sizes.units_per_group)
        self._messages = KvMessages(self.cache, sizes.kv_dtype)
        self._runner = ModelRunner(model, self.cache)
        self._sampler = Sampler()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer in a message."""
        return self._messages.block_bytes

    @property
    def num_groups(self) -> int:
        return len(self.group_bounds) - 1

    def check(self, sampling: Sampling) -> None:
        """Everything that the wire can say can be sampled."""

    def counters(self) -> Mapping[str, int]:
        return {}

    def enter_step_thread(self) -> None:
        """Called once, in the step thread: torch's threads are set per calling thread."""
        torch.set_num_threads(self.sizes.torch_threads)

    def warm(self) -> None:
        """Run waves at sizes that are not the repetition of a smaller one. Nobody holds a block yet, so any may be written."""
        for num_tokens in WARM_TOKENS:
            table = list(range(min(-(-num_tokens // self.sizes.block_tokens), self.cache.num_blocks)))
            fitting = min(num_tokens, len(table) * self.sizes.block_tokens)
            computation = self.begin([WaveRow(token_ids=(0,) * fitting, start=0, block_table=table)])
            self.run_piece(computation, Piece(groups=(0, self.num_groups), chunks=(0, 1)))
            self._runner.logits(_state(computation), computation.batch.last_rows)
        self.cache.tensor.zero_()

    def begin(self, rows: Sequence[WaveRow], chunk_tokens: int | None = None) -> Computation:
        """Embed a wave whose rows cross the layers in chunks of so many (None: in one)."""
        batch = batch_of(rows)
        return Computation(batch=batch, state=self._runner.begin(batch, chunk_tokens))

    def run_piece(self, computation: Computation, piece: Piece) -> Over[float]:
        """Compute the groups of a piece for its chunks; their KV is in the cache afterwards."""
        lo, hi = piece.groups
        began_s = time.monotonic()
        if self._group_delay_s:
            time.sleep(self._group_delay_s * (hi - lo))
        self._runner.run_layers(self.group_bounds[lo], self.group_bounds[hi], _state(computation), piece.chunks)
        return Over(time.monotonic() - began_s)

    def score(self, computation: Computation, asked: RowsToScore) -> Over[PromptScores]:
        """Of rows of the wave, by their logits."""
        return Over(prompt_scores(self._runner.logits(_state(computation), asked.rows), asked))

    def sample(self, computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> Over[tuple[WaveOutput, ...]]:
        """The next token of every choice of every prompt; rows[i] lists the choices of prompt i (none: nobody wants it any more)."""
        logits_SV = self._runner.logits(_state(computation), wanted_rows(computation, rows))
        computed_s = time.monotonic()
        sampled = iter(self._sampler.sample(logits_SV[places_of(rows)], [row for choices in rows for row in choices]))
        tokens = [tuple(next(sampled) for _ in choices) for choices in rows]
        use = computation.state.expert_use()
        counts_SLE: NDArray[np.int32] = use.counts_SLE.numpy()
        sampled_s = time.monotonic()
        outputs = (
            WaveOutput(
                sampled=chosen,
                expert_counts=counts_SLE[place],
                expert_bytes=0 if place else use.bytes_read,
                computed_s=computed_s,
                sampled_s=sampled_s,
                error=next(iter(broken_rows(rows[place]).values()), None),
            )
            for place, chosen in enumerate(tokens)
        )
        return Over(tuple(outputs))

    def use_of(self, computation: Computation) -> Over[ExpertUse]:
        return Over(computation.state.expert_use())

    def pack(self, handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview, after: Pending[float] | None = None) -> None:
        """The payload; the agent seals it."""
        assert after is None, "only a device waits by itself"
        if self._message_delay_s:
            time.sleep(self._message_delay_s)
        num_bytes = self._messages.pack(span.layers, blocks[span.block_lo : span.block_hi], out, span.heads)
        assert num_bytes == span.num_bytes, (num_bytes, span)


def batch_of(rows: Sequence[WaveRow]) -> StepBatch:
    """What a wave of these prompts computes."""
    parts = (PromptSlice(token_ids=row.token_ids[row.start :], start=row.start, block_table=row.block_table) for row in rows)
    return StepBatch(slices=tuple(parts))


def wanted_rows(computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> list[int]:
    """The last row of each prompt that has choices left."""
    return [row for row, choices in zip(computation.batch.last_rows, rows, strict=True) if choices]


def places_of(rows: Sequence[Sequence[RowSampling]]) -> list[int]:
    """For every choice the place of its prompt among those that have any."""
    return [place for place, choices in enumerate(choices for choices in rows if choices) for _ in choices]


def _state(computation: Computation) -> BoundaryState:
    assert isinstance(computation.state, BoundaryState)
    return computation.state
