"""Owns what one decode rank computes with: model, KV cache, sampler. Knows no request, policy, socket or handoff.

Everything runs in the step thread, one call at a time. StepWorker is what the services ask of a rank: this one on a CPU, gpu_worker.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.config import KvDtype
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import DecodeRow, Joining
from duomo.engine.kv_cache import KvCache
from duomo.engine.kv_messages import message_block_bytes
from duomo.engine.runner import BoundaryState, ModelRunner
from duomo.engine.sampler import SampledToken, Sampler, broken_rows
from duomo.errors import EngineError
from duomo.models.config import ModelConfig
from duomo.models.qwen3_moe import Model
from duomo.wire.values import Sampling
from services.decode.landers import CpuLander, Lander
from services.decode.policy import blocks_for

WARM_BATCHES = (1, 2, 3, 4, 8, 16)  # torch picks a kernel by the number of rows; the fixed 16-row tiles make larger ones repeat these
WARM_TOKENS = 33


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """copies: (from, to) blocks to copy before anything else; rows may be empty.

    A row names a row of the step before where that step's token is not known yet, which happens where a worker answers late.
    """

    copies: tuple[tuple[int, int], ...]
    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """One token and one row of routed expert ids [R, layers * top_k] for each row; times are monotonic. A row in `errors` has no token."""

    tokens: list[SampledToken]
    routed_RE: NDArray[np.int16]
    started_s: float
    ended_s: float
    errors: Mapping[int, EngineError] = field(default_factory=dict)

    @classmethod
    def of_no_rows(cls, started_s: float) -> StepOutput:
        """Of a step that only copied blocks."""
        return cls(tokens=[], routed_RE=np.empty((0, 0), np.int16), started_s=started_s, ended_s=started_s)


class StepWorker(Protocol):
    """One rank that decodes. warm, run and finish are called in the step thread."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer in a message."""

    def check(self, sampling: Sampling) -> None:
        """Raises RequestError for what no step of this worker can sample."""

    def lander(self) -> Lander:
        """What writes messages of other processes into its blocks. Asked for once, where KV comes from other processes."""

    def counters(self) -> Mapping[str, int]:
        """Event counts of its own, for the replica's report."""

    def warm(self) -> None: ...

    def run(self, step: StepInput) -> StepOutput | None:
        """Begin this step. Returns its output; a worker that is a step ahead of its host that of the step before, None for the first."""

    def rehearse(self, step: StepInput) -> None:
        """Do what goes before the launch of such a step, of rows that join, so that it takes less time then. Computes nothing. Called in
        the step thread where no step is under way."""

    def is_over(self) -> bool:
        """Whether finish() would wait no more. Only where a step is under way."""

    def finish(self) -> StepOutput:
        """The output of the step that is still under way. Only where one is."""


class DecodeWorker:
    """One rank. step_delay_s: slept in each step on purpose, for tests (config.DelaySection). kv_dtype: of the messages that it lands."""

    def __init__(self, model: Model, cache: KvCache, *, torch_threads: int, step_delay_s: float = 0.0, kv_dtype: KvDtype = "model") -> None:
        self.config = model.config
        self.cache = cache
        self.runner = ModelRunner(model, cache)
        self._kv_dtype = kv_dtype
        self._sampler = Sampler()
        self._torch_threads = torch_threads
        self._step_delay_s = step_delay_s

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer in a message."""
        return message_block_bytes(self.cache.spec, self._kv_dtype)

    def check(self, sampling: Sampling) -> None:
        """Everything that the wire can say can be sampled."""

    def lander(self) -> Lander:
        return CpuLander(self.cache, self._kv_dtype)

    def counters(self) -> Mapping[str, int]:
        return {}

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

    def run(self, step: StepInput) -> StepOutput:
        """Copy, then one token for each row."""
        started_s = time.monotonic()
        for source, target in step.copies:
            self.cache.copy_block(source, target)
        if not step.rows:
            return StepOutput.of_no_rows(started_s)
        if self._step_delay_s:
            time.sleep(self._step_delay_s)
        fed = [_known(row) for row in step.rows]
        slices = tuple(
            PromptSlice(token_ids=(token.token_id,), start=row.position, block_table=row.table)
            for token, row in zip(fed, step.rows, strict=True)
        )
        state, logits_RV = self.runner.run(StepBatch(slices=slices), keeps_routed=True)
        rows = [token.sampling for token in fed]
        tokens = self._sampler.sample(logits_RV, rows)
        routed_RE = _routed(state, len(step.rows))
        return StepOutput(tokens=tokens, routed_RE=routed_RE, started_s=started_s, ended_s=time.monotonic(), errors=broken_rows(rows))

    def rehearse(self, step: StepInput) -> None:
        """Its step takes far longer than what goes before."""

    def is_over(self) -> bool:
        return True

    def finish(self) -> StepOutput:
        raise AssertionError("a CPU's step is over when run() returns")


def _known(row: DecodeRow) -> Joining:
    assert isinstance(row.source, Joining), "a CPU's step knows every token"
    return row.source


def _routed(state: BoundaryState, num_rows: int) -> NDArray[np.int16]:
    """Expert ids of each row, all layers side by side: [R, layers * top_k]."""
    ids_LRK = torch.stack(state.routed_ids)[:, :num_rows]
    routed: NDArray[np.int16] = ids_LRK.transpose(0, 1).reshape(num_rows, -1).to(torch.int16).numpy()
    return routed
