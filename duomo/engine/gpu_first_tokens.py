"""Owns the sampling of the first tokens of prompts on one GPU, by the kernels of decode steps. Knows no wave.

Two ways. Logits that graphs leave in tensors of fixed places (LastLogits), one row each prompt: a replay samples them there, for the kinds
that decode steps capture too. Any other logits: launched as they come. A prompt with several choices comes with its logits once for each.
Rows beyond MAX_ROWS are sampled in turns: their number is the requests'. Each turn but the last is waited for, since the host's buffers are
few; the last one by whoever wants the tokens.

Legend: R rows, S rows of what graphs leave, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duomo.engine.decode_step import DecodeRow, Joining
from duomo.engine.gpu_graphs import GpuGraphs
from duomo.engine.gpu_host_ring import HostBuffer, HostRing
from duomo.engine.gpu_sample_rows import SampleKind
from duomo.engine.gpu_sampler import CAPTURED_KINDS, GpuSampler
from duomo.engine.sampler import RowSampling, SampledToken, broken_rows
from duomo.errors import EngineError
from duomo.wire.values import Sampling

Answer = SampledToken | EngineError
MAX_ROWS = 64
POSITIONS = 4  # word where they start: the number of valid rows stands before them, and both at multiples of 16 bytes


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens that are being sampled. At most DEPTH - 1 more may be launched before they are waited for."""

    done: tuple[Answer, ...]
    last: Callable[[], list[Answer]] | None

    def wait(self) -> list[Answer]:
        """One for each row, an error where it has none; in any thread, once."""
        return [*self.done, *(self.last() if self.last is not None else ())]


@dataclass(frozen=True, slots=True, eq=False)
class LastLogits:
    """What graphs leave of a wave's last rows, until the next wave's: logits_SV float32; position_S int32, of the tokens to sample;
    num_valid int32 [1]: rows from there on are nobody's."""

    logits_SV: Tensor
    position_S: Tensor
    num_valid: Tensor
    graphs: GpuGraphs


class GpuFirstTokens:
    """Buffers for up to max_rows at once. One stream, one thread at a time."""

    def __init__(self, vocab: int, device: torch.device, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._vocab = vocab
        self._sampler = GpuSampler(max_rows, vocab, 0, device)
        self._places = torch.zeros(POSITIONS + max_rows, dtype=torch.int32, device=device)
        self._up = HostRing(self._places.numel(), device)
        self._down = HostRing(self._sampler.num_host_words, device)

    def capture(self, last: LastLogits) -> None:
        """Inside last.graphs.capturing(): the sampling of what will lie there."""
        for kind in CAPTURED_KINDS:
            body = partial(self._sample_last, last, kind)
            body()
            last.graphs.capture((self, kind), body)

    def warm(self) -> None:
        """Sample in every way once."""
        for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 5)):
            for penalty in (0.0, 0.5):
                for logprobs in (None, 2):
                    sampling = Sampling(max_tokens=1, temperature=temperature, top_k=top_k, presence_penalty=penalty, logprobs=logprobs)
                    row = RowSampling(sampling=sampling, choice=0, prompt_ids=(0,), output_ids=())
                    self.sample(torch.zeros(1, self._vocab, device=self._places.device), [row])

    def sample(self, logits_RV: Tensor, rows: Sequence[RowSampling]) -> list[Answer]:
        """logits float32 [R, V], one row each. Waits for the tokens; an error stands where a row has none."""
        return self.launch(logits_RV, rows).wait()

    @torch.inference_mode()
    def launch(self, logits_RV: Tensor, rows: Sequence[RowSampling]) -> PendingTokens:
        """The same, to be waited for elsewhere."""
        assert logits_RV.shape[0] == len(rows), (logits_RV.shape, len(rows))
        done: list[Answer] = []
        last: Callable[[], list[Answer]] | None = None
        for start in range(0, len(rows), self._max_rows):
            if last is not None:
                done += last()
            end = start + self._max_rows
            last = self._launch(logits_RV[start:end], rows[start:end])
        return PendingTokens(tuple(done), last)

    @torch.inference_mode()
    def launch_last(self, last: LastLogits, rows: Sequence[RowSampling]) -> PendingTokens:
        """What launch() does, for logits where graphs have left them on this stream: row i of `last` is that of rows[i], and its position
        is theirs. Replayed where capture(last) was called and what they ask for was captured; else launched."""
        assert len(rows) <= last.logits_SV.shape[0], (len(rows), last.logits_SV.shape)
        kind = self._placed(rows)
        last.graphs.run((self, kind), partial(self._sample_last, last, kind))
        return PendingTokens((), self._fetch(kind, rows))

    def _launch(self, logits_RV: Tensor, rows: Sequence[RowSampling]) -> Callable[[], list[Answer]]:
        num_rows, kind = len(rows), self._placed(rows)
        up = self._up.take()
        up.array[0] = num_rows
        up.array[POSITIONS : POSITIONS + num_rows] = [_position(row) for row in rows]
        up.upload(self._places)
        self._sampler.run(logits_RV, self._places[POSITIONS : POSITIONS + num_rows], self._places[:1], kind)
        return self._fetch(kind, rows)

    def _placed(self, rows: Sequence[RowSampling]) -> SampleKind:
        """Queue the copy of what they ask for; `position` of a decode row is that of the token that is fed. Masks are made here, while the
        wave whose logits they are for still runs."""
        joining = [DecodeRow(source=Joining(token_id=0, sampling=row), position=_position(row) - 1, table=()) for row in rows]
        kind = self._sampler.rows.place(joining)
        self._sampler.rows.fill_masks(partial(_fill_masks, rows))
        return kind

    def _sample_last(self, last: LastLogits, kind: SampleKind) -> None:
        """Only launches."""
        self._sampler.run(last.logits_SV, last.position_S, last.num_valid, kind)

    def _fetch(self, kind: SampleKind, rows: Sequence[RowSampling]) -> Callable[[], list[Answer]]:
        """Queue the copy of the tokens to the host."""
        down = self._down.take()
        self._sampler.download(down, 0, kind)
        return partial(self._answers, down, down.turn, kind, rows)

    def _answers(self, down: HostBuffer, turn: int, kind: SampleKind, rows: Sequence[RowSampling]) -> list[Answer]:
        num_rows = len(rows)
        down.wait()
        errors = {**self._sampler.errors(down, num_rows), **broken_rows(rows)}
        ids = self._sampler.tokens(down, num_rows).tolist()
        listed = self._sampler.logprobs(down, num_rows) if kind.has_logprobs else None
        assert down.turn == turn, "waited for too late: later tokens took this buffer"
        answers: list[Answer] = []
        for at, row in enumerate(rows):
            num_top = row.sampling.logprobs
            if at in errors:
                error = errors[at]
                answers.append(EngineError(error.detail, code=error.code, phase="prefill.compute", retryable=False))
            elif listed is None or num_top is None:
                answers.append(SampledToken(token_id=ids[at]))
            else:
                answers.append(SampledToken(token_id=ids[at], logprob=float(listed.logprob_R[at]), top=listed.top(at, num_top)))
        return answers


def _fill_masks(rows: Sequence[RowSampling], masks_MW: NDArray[np.int32]) -> None:
    held = [row for row in rows if row.grammar is not None]
    for mask_W, row in zip(masks_MW, held, strict=True):
        assert row.grammar is not None
        row.grammar.fill(mask_W, row.output_ids)


def _position(row: RowSampling) -> int:
    """Of the token to sample."""
    return len(row.prompt_ids) + len(row.output_ids)
