"""Owns what one decode rank computes with: model, KV cache, sampler, the agent's landed messages. Knows no request, policy or socket.

Everything but expect() and forget() runs in the step thread, one call at a time. Blocks of a handle may be given to others once forget()
has returned: no scatter into them is under way then, and none follows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.runner import BoundaryState, ModelRunner
from duomo.engine.sampler import RowSampling, SampledToken, Sampler
from duomo.errors import TransferError
from duomo.models.qwen3_moe import Model
from services.decode.policy import blocks_for
from services.kv_transfer.agent import TransferAgent

WARM_BATCHES = (1, 2, 3, 4, 8, 16)  # torch picks a kernel by the number of rows; the fixed 16-row tiles make larger ones repeat these
WARM_TOKENS = 33


@dataclass(frozen=True, kw_only=True, slots=True)
class LandedMessage:
    """A message of a handle that is in its blocks (error None) or lay wrong in its slot. landed_s: monotonic."""

    handle_id: int
    message_idx: int
    group: int
    num_bytes: int
    landed_s: float
    error: TransferError | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One token of one sequence: it is fed at `position`, its KV goes into `table`, and one token is sampled after it."""

    token_id: int
    position: int
    table: Sequence[int]
    sampling: RowSampling


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """copies: (from, to) blocks to copy before anything else; rows may be empty."""

    copies: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """One token and one row of routed expert ids [R, layers * top_k] for each row; times are monotonic."""

    landed: tuple[LandedMessage, ...]
    tokens: list[SampledToken]
    routed_RE: NDArray[np.int16]
    started_s: float
    ended_s: float


class DecodeWorker:
    """One rank. The agent is its creator's to close. step_delay_s: slept in each step on purpose, for tests (config.DelaySection)."""

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_tokens: int,
        torch_threads: int,
        agent: TransferAgent,
        step_delay_s: float = 0.0,
    ) -> None:
        self.config = model.config
        self.cache = KvCache(kv_spec(model.config, block_tokens), num_blocks)
        self.runner = ModelRunner(model, self.cache)
        self._sampler = Sampler()
        self._agent = agent
        self._torch_threads = torch_threads
        self._step_delay_s = step_delay_s
        self._tables: dict[int, Sequence[int]] = {}
        self._scattering = threading.Lock()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.cache.spec.block_bytes

    def expect(self, handle_id: int, table: Sequence[int]) -> None:
        """Messages of this handle go into these blocks. From any thread, before the handle is offered."""
        self._tables[handle_id] = table

    def forget(self, handle_id: int) -> None:
        """Nothing of this handle is, or will be, scattered once this returns. From any thread; waits for a message being scattered."""
        with self._scattering:
            self._tables.pop(handle_id, None)

    def warm(self) -> None:
        """Take one step at every size that is not the repetition of a smaller one. Nobody holds a block yet, so any may be written."""
        torch.set_num_threads(self._torch_threads)
        block_tokens = self.cache.spec.block_tokens
        num_tables = self.cache.num_blocks // blocks_for(WARM_TOKENS, block_tokens)
        for num_rows in WARM_BATCHES:
            width = blocks_for(WARM_TOKENS, block_tokens)
            tables = [list(range(row * width, (row + 1) * width)) for row in range(min(num_rows, num_tables))]
            slices = tuple(PromptSlice(token_ids=(0,), start=WARM_TOKENS - 1, block_table=table) for table in tables)
            self.runner.run(StepBatch(slices=slices))
        self.cache.tensor.zero_()

    def land(self) -> tuple[LandedMessage, ...]:
        """Verify and scatter whatever has landed, and free its slots."""
        messages: list[LandedMessage] = []
        for landed in self._agent.poll():
            span = landed.span
            if landed.error is None:
                with self._scattering:
                    table = self._tables.get(landed.handle_id)
                    if table is None:
                        continue  # given up meanwhile: the agent has quarantined or freed the slot
                    self.cache.scatter(span.layers, table[span.block_lo : span.block_hi], landed.payload)
                self._agent.release(landed.handle_id, span.message_idx)
            messages.append(
                LandedMessage(
                    handle_id=landed.handle_id,
                    message_idx=span.message_idx,
                    group=span.group,
                    num_bytes=span.num_bytes,
                    landed_s=time.monotonic(),
                    error=landed.error,
                )
            )
        return tuple(messages)

    def run(self, step: StepInput) -> StepOutput:
        """Land, copy, then one token for each row."""
        landed = self.land()
        started_s = time.monotonic()
        for source, target in step.copies:
            self.cache.copy_block(source, target)
        if not step.rows:
            return StepOutput(landed=landed, tokens=[], routed_RE=np.empty((0, 0), np.int16), started_s=started_s, ended_s=started_s)
        if self._step_delay_s:
            time.sleep(self._step_delay_s)
        slices = tuple(PromptSlice(token_ids=(row.token_id,), start=row.position, block_table=row.table) for row in step.rows)
        state, logits_RV = self.runner.run(StepBatch(slices=slices))
        tokens = self._sampler.sample(logits_RV, [row.sampling for row in step.rows])
        routed_RE = _routed(state, len(step.rows))
        return StepOutput(landed=landed, tokens=tokens, routed_RE=routed_RE, started_s=started_s, ended_s=time.monotonic())


def _routed(state: BoundaryState, num_rows: int) -> NDArray[np.int16]:
    """Expert ids of each row, all layers side by side: [R, layers * top_k]."""
    ids_LRK = torch.stack(state.routed_ids)[:, :num_rows]
    routed: NDArray[np.int16] = ids_LRK.transpose(0, 1).reshape(num_rows, -1).to(torch.int16).numpy()
    return routed
