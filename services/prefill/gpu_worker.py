"""Owns what one prefill rank on a GPU computes with: the engine's prefill and its sampler of first tokens. Knows no request and no policy.

A piece's kernels are queued and left behind: the step thread goes on to launch the decode step behind them, and who waits for the
piece's end is another thread. The next piece is launched when that end has been told, so a step waits for one piece at most. The engine
was warm before there was a worker.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.config import DelaySection
from duomo.engine.decode_step import check_sampling
from duomo.engine.expert_counts import ExpertUse, PendingUse
from duomo.engine.gpu_engine import GpuEngine
from duomo.engine.gpu_first_tokens import PendingTokens
from duomo.engine.gpu_kv_messages import GpuKvPacker
from duomo.engine.gpu_prefill import GpuBoundaryState
from duomo.engine.gpu_prompt_scores import SCORE_ROWS, launch_scores
from duomo.engine.gpu_wave import upload_rows
from duomo.engine.kv_messages import message_block_bytes
from duomo.engine.prompt_scores import RowsToScore
from duomo.engine.sampler import RowSampling, SampledToken, ending_ids
from duomo.errors import EngineError
from duomo.wire.prompt_logprobs import PromptScores
from duomo.wire.values import Sampling
from duomo_kernels.kv_hash_pack import Seal
from services.kv_transfer.layout import MessageSpan, trailer_start
from services.kv_transfer.push_job import Filling
from services.prefill.pending import Pending
from services.prefill.pieces import Piece
from services.prefill.worker import Computation, WaveOutput, WaveRow, WorkerSizes, batch_of, group_bounds, places_of, wanted_rows

WRITER_SWITCH_INTERVAL_S = 0.0001


class GpuPrefillWorker:
    """One rank over an engine that decode may share. delays: slept on purpose, for tests (config.DelaySection)."""

    seals_messages = packs_ahead = True
    score_rows = SCORE_ROWS

    def __init__(self, engine: GpuEngine, sizes: WorkerSizes, delays: DelaySection | None = None) -> None:
        self.config = engine.prefill.decoder.config
        self.group_bounds = group_bounds(self.config.num_layers, sizes.units, sizes.units_per_group)
        self._prefill = engine.prefill
        self._first_tokens = engine.first_tokens
        self._device = engine.cache.device
        self._torch_threads = sizes.torch_threads
        self._group_delay_s = delays.prefill_group_s if delays is not None else 0.0
        self._message_delay_s = delays.kv_handoff_s if delays is not None else 0.0
        self._cache = engine.cache
        self._compilations = engine.compilations
        self._is_alone = engine.decode_part is None
        self._kv_dtype = sizes.kv_dtype
        self._packer = GpuKvPacker(engine.cache, sizes.kv_dtype) if self._is_alone else None  # nothing leaves an engine that decode shares

    @property
    def num_groups(self) -> int:
        return len(self.group_bounds) - 1

    @property
    def block_bytes(self) -> int:
        return message_block_bytes(self._cache.spec, self._kv_dtype)

    def check(self, sampling: Sampling) -> None:
        check_sampling(sampling, len(ending_ids(sampling, self.config.eos_ids)))

    def counters(self) -> Mapping[str, int]:
        """Decode tells of an engine that both share."""
        return {"kernel_compilations_after_ready": self._compilations.num_after_ready} if self._is_alone else {}

    def enter_step_thread(self) -> None:
        torch.set_num_threads(self._torch_threads)
        if self._packer is not None:  # the writer thread gives the interpreter away in each of its calls, and wants it back at once
            sys.setswitchinterval(WRITER_SWITCH_INTERVAL_S)

    def warm(self) -> None:
        """Nothing is left to do."""

    def begin(self, rows: Sequence[WaveRow], chunk_tokens: int | None = None) -> Computation:
        batch = batch_of(rows)
        return _GpuComputation(batch=batch, state=self._prefill.begin(batch, chunk_tokens))

    def run_piece(self, computation: Computation, piece: Piece) -> Pending[float]:
        lo, hi = piece.groups
        stopwatch = _Stopwatch(self._device)
        if self._group_delay_s:
            time.sleep(self._group_delay_s * (hi - lo))
        mine, state = _state(computation)
        self._prefill.run_layers(self.group_bounds[lo], self.group_bounds[hi], state, piece.chunks)
        stopwatch.stop()
        mine.last_piece = stopwatch
        return stopwatch

    def score(self, computation: Computation, asked: RowsToScore) -> Pending[PromptScores]:
        state = _state(computation)[1]
        return launch_scores(lambda rows: self._prefill.logits(state, rows), asked, self._device)

    def sample(self, computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> Pending[tuple[WaveOutput, ...]]:
        mine, state = _state(computation)
        assert mine.last_piece is not None, "a wave that has run nothing"
        tokens = self._tokens(computation, rows) if any(rows) else None
        return _PendingOutputs(mine.last_piece, tokens, state.fetch_use(), tuple(len(each) for each in rows))

    def _tokens(self, computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> PendingTokens:
        """Of a row each prompt where graphs leave their logits; of other rows by copies of theirs."""
        state, choices = _state(computation)[1], [row for each in rows for row in each]
        left = self._prefill.leave_logits(state) if all(len(each) == 1 for each in rows) else None
        if left is not None:
            ends = [part.end for part in computation.batch.slices]
            assert ends == [len(row.prompt_ids) + len(row.output_ids) for row in choices], "a row is sampled behind its prompt's last"
            return self._first_tokens.launch_last(left, choices)
        logits_SV, places = self._prefill.logits(state, wanted_rows(computation, rows)), places_of(rows)
        logits_RV = logits_SV if len(places) == len(logits_SV) else logits_SV[upload_rows(places, self._device)]
        return self._first_tokens.launch(logits_RV, choices)

    def use_of(self, computation: Computation) -> Pending[ExpertUse]:
        return _state(computation)[1].fetch_use()

    def pack(
        self,
        handle_id: int,
        span: MessageSpan,
        blocks: Sequence[int],
        out: memoryview | torch.Tensor,
        after: Pending[float] | None = None,
    ) -> Filling | None:
        """The whole message, hashed on the device, on a stream of its own, which waits for the end of what writes its blocks."""
        if self._message_delay_s:
            time.sleep(self._message_delay_s)
        assert self._packer is not None, "an engine that decode shares pushes nothing"
        start = trailer_start(handle_id, span)
        seal = Seal(handle_id=handle_id, group=span.group, message_idx=span.message_idx, start=start)
        assert after is None or isinstance(after, _Stopwatch), after
        end = None if after is None else after.end
        return self._packer.launch(span.layers, blocks[span.block_lo : span.block_hi], seal, out, end)


@dataclass(frozen=True, slots=True)
class _PendingOutputs:
    """A wave whose first tokens are being sampled. computed: its last piece. num_choices: of each prompt."""

    computed: _Stopwatch
    tokens: PendingTokens | None
    use: PendingUse
    num_choices: tuple[int, ...]

    def wait(self) -> tuple[WaveOutput, ...]:
        """Of every prompt."""
        self.computed.wait()
        computed_s = time.monotonic()
        answers = iter(self.tokens.wait() if self.tokens is not None else ())
        chosen = [[next(answers) for _ in range(num)] for num in self.num_choices]
        use = self.use.wait()
        counts_SLE: NDArray[np.int32] = use.counts_SLE.numpy()
        sampled_s = time.monotonic()
        return tuple(
            WaveOutput(
                sampled=tuple(one for one in tokens if isinstance(one, SampledToken)),
                expert_counts=counts_SLE[place],
                expert_bytes=0 if place else use.bytes_read,
                computed_s=computed_s,
                sampled_s=sampled_s,
                error=next((one for one in tokens if isinstance(one, EngineError)), None),
            )
            for place, tokens in enumerate(chosen)
        )


class _Stopwatch:
    """From here to stop(), by the device's clock: a decode step still under way does not count, nor one launched behind.

    end: the event at stop(); None without a device.
    """

    def __init__(self, device: torch.device) -> None:
        self._began_s = time.monotonic()
        self._ended_s = self._began_s
        self.end: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._begin, self.end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch ships no types for it
            self._begin.record()

    def stop(self) -> None:
        """Behind all that was launched."""
        self._ended_s = time.monotonic()
        if self.end is not None:
            self.end.record()

    def wait(self) -> float:
        """Seconds. Gives the core away while it waits, as Event.synchronize does where the event blocks; in any thread."""
        if self.end is None:
            return self._ended_s - self._began_s
        self.end.synchronize()
        return float(self._begin.elapsed_time(self.end)) / 1000


@dataclass(slots=True, kw_only=True)
class _GpuComputation(Computation):
    """last_piece: the piece launched last."""

    last_piece: _Stopwatch | None = None


def _state(computation: Computation) -> tuple[_GpuComputation, GpuBoundaryState]:
    assert isinstance(computation, _GpuComputation) and isinstance(computation.state, GpuBoundaryState)
    return computation, computation.state
