"""Owns what one decode rank on a GPU computes with: the engine's captured steps, one of them always ahead. Knows no request and no policy.

    run(step n + 1)     copies, launch n + 1, wait for n: its tokens come back while n + 1 runs
    finish()            wait for the step that is still under way

A row under a grammar may be fed its token of step n before the host knows it, but its mask may not be made before: n + 1 is launched as far
as its logits, n is waited for while they are computed, the masks are made, and the sampler of n + 1 is launched behind them.

Copies, steps and prefill's groups are queued by one thread on one stream, in the order of its calls: owners of blocks rely on that order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from duomo.config import KvDtype
from duomo.engine.decode_step import DecodeRow, DecodeStep, Joining, StepResult, check_sampling
from duomo.engine.gpu_decode import PendingStep
from duomo.engine.gpu_engine import GpuEngine
from duomo.engine.kv_messages import message_block_bytes
from duomo.engine.sampler import RowSampling, SampledToken, broken_rows, ending_ids
from duomo.errors import EngineError
from duomo.wire.values import Sampling
from services.decode.gpu_lander import GpuLander
from services.decode.landers import Lander
from services.decode.worker import StepInput, StepOutput

LOOKING_SWITCH_INTERVAL_S = 0.0001


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launched:
    """A step under way; pending None: it has no rows. rows: how each of them is sampled. broken: those whose grammar failed."""

    pending: PendingStep | None
    rows: tuple[RowSampling, ...]
    started_s: float
    broken: Mapping[int, EngineError] = field(default_factory=dict)
    _results: list[StepResult] = field(default_factory=list)

    def is_over(self) -> bool:
        """Copies alone are waited for by nobody."""
        return self.pending is None or bool(self._results) or self.pending.is_over()

    def result(self) -> StepResult:
        """Of a step with rows, when it is over; any number of times."""
        assert self.pending is not None, "a step without rows has no tokens"
        if not self._results:
            self._results.append(self.pending.wait())
        return self._results[0]

    def output(self) -> StepOutput:
        """Of the step, when it is over."""
        if self.pending is None:
            return StepOutput.of_no_rows(self.started_s)
        result = self.result()
        return StepOutput(
            tokens=_tokens(result, self.rows),
            routed_RE=result.routed_RE,
            started_s=self.started_s,
            ended_s=time.monotonic(),
            errors={**result.errors, **self.broken},
        )


class GpuDecodeWorker:
    """One rank over an engine that is warm, and that prefill may share. Whoever made the engine closes what it counts with."""

    def __init__(self, engine: GpuEngine, step_delay_s: float = 0.0, kv_dtype: KvDtype = "model") -> None:
        self.config = engine.decode.decoder.config
        self._decode = engine.decode
        self._cache = engine.cache
        self._compilations = engine.compilations
        self._step_delay_s = step_delay_s
        self._kv_dtype = kv_dtype
        self._is_alone = engine.prefill_part is None
        self._under_way: _Launched | None = None
        self._last_rows: tuple[RowSampling, ...] = ()

    @property
    def block_bytes(self) -> int:
        return message_block_bytes(self._cache.spec, self._kv_dtype)

    def check(self, sampling: Sampling) -> None:
        check_sampling(sampling, len(ending_ids(sampling, self.config.eos_ids)))

    def lander(self) -> Lander:
        return GpuLander(self._cache, self._kv_dtype)

    def counters(self) -> Mapping[str, int]:
        return {"kernel_compilations_after_ready": self._compilations.num_after_ready}

    def warm(self) -> None:
        """Nothing is left to do, but that a step thread that looks for messages, and gives the interpreter away at each look, has it back
        at once."""
        if self._is_alone:
            sys.setswitchinterval(LOOKING_SWITCH_INTERVAL_S)

    def run(self, step: StepInput) -> StepOutput | None:
        before, self._under_way = self._under_way, self._launch(step)
        return None if before is None else before.output()

    def rehearse(self, step: StepInput) -> None:
        assert self._under_way is None, "a step is under way"
        self._decode.enqueue_copies(step.copies)
        self._decode.rehearse(DecodeStep(rows=step.rows))

    def is_over(self) -> bool:
        assert self._under_way is not None, "no step is under way"
        return self._under_way.is_over()

    def finish(self) -> StepOutput:
        before, self._under_way = self._under_way, None
        assert before is not None, "no step is under way"
        return before.output()

    def _launch(self, step: StepInput) -> _Launched:
        if self._step_delay_s:
            time.sleep(self._step_delay_s)
        started_s = time.monotonic()
        self._decode.enqueue_copies(step.copies)
        if not step.rows:
            return _Launched(pending=None, rows=(), started_s=started_s)
        rows = self._last_rows = tuple(self._sampling(row) for row in step.rows)
        pending = self._decode.launch(DecodeStep(rows=step.rows), partial(_fill_masks, step.rows, rows, self._under_way))
        return _Launched(pending=pending, rows=rows, started_s=started_s, broken=broken_rows(rows))

    def _sampling(self, row: DecodeRow) -> RowSampling:
        return row.source.sampling if isinstance(row.source, Joining) else self._last_rows[row.source]


def _fill_masks(rows: tuple[DecodeRow, ...], asked: tuple[RowSampling, ...], before: _Launched | None, masks_MW: NDArray[np.int32]) -> None:
    """Of the rows under a grammar, behind their tokens of the step before, which is waited for where any goes on from it."""
    held = [(row.source, one.output_ids, one.grammar) for row, one in zip(rows, asked, strict=True) if one.grammar is not None]
    for mask_W, (source, output_ids, grammar) in zip(masks_MW, held, strict=True):
        following = None
        if not isinstance(source, Joining):
            assert before is not None, "a row goes on from a step that is over"
            following = int(before.result().token_id_R[source])
        grammar.fill(mask_W, output_ids, following)


def _tokens(result: StepResult, rows: tuple[RowSampling, ...]) -> list[SampledToken]:
    """One for each row; that of a row in result.errors is none, and is not looked at."""
    ids, listed = result.token_id_R.tolist(), result.logprobs
    if listed is None:
        return [SampledToken(token_id=token_id) for token_id in ids]
    return [
        SampledToken(token_id=ids[at])
        if row.sampling.logprobs is None
        else SampledToken(token_id=ids[at], logprob=float(listed.logprob_R[at]), top=listed.top(at, row.sampling.logprobs))
        for at, row in enumerate(rows)
    ]
