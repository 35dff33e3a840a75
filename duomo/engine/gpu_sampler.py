"""Owns the sampling of decode steps on one GPU, from logits to tokens and log-probabilities, in buffers that steps share. Knows no model.

    token_R     int32: what each row sampled; the next step's first kernel reads it there
    answer      token_R, then flags, then whatever the step's forward has for the host: one copy brings them all
    logprobs    float32 words: each row's token's, then the likeliest ids (int32) and theirs, copied only where a row asked

Legend: R rows of a bucket, V vocabulary, N likeliest tokens listed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from duomo.engine.decode_step import MAX_LOGPROBS, StepLogprobs
from duomo.engine.gpu_host_ring import HostBuffer
from duomo.engine.gpu_sample_rows import GpuSampleRows, SampleKind
from duomo.errors import EngineError
from duomo_kernels._sampling import INFINITE_FLAG, LOST_FLAG, MODE_FLAG, NAN_FLAG
from duomo_kernels.sample import sample
from duomo_kernels.token_logprobs import token_logprobs

# Captured for each bucket. Whatever has penalties or log-probabilities is launched kernel by kernel: nine more graphs a bucket would save
# the host time that it has while the forward runs.
CAPTURED_KINDS = (SampleKind(mode="greedy"), SampleKind(mode="plain"), SampleKind(mode="limited"))
ALL_KINDS = tuple(
    SampleKind(mode=kind.mode, is_penalised=is_penalised, has_logprobs=has_logprobs)
    for kind in CAPTURED_KINDS
    for is_penalised in (False, True)
    for has_logprobs in (False, True)
)
FAULTS = {
    NAN_FLAG.value: "its logits hold a NaN",
    INFINITE_FLAG.value: "its largest logit is infinite, or all are masked",
    MODE_FLAG.value: "it asks for limits that its step was not launched with",
    LOST_FLAG.value: "its logits changed while it was sampled",
}


class GpuSampler:
    """Buffers and launches. `extra_words`: of the answer, int32, behind tokens and flags."""

    def __init__(self, max_rows: int, vocab: int, extra_words: int, device: torch.device) -> None:
        self.rows = GpuSampleRows(max_rows, vocab, device)
        self._stride = -(-max_rows // 4) * 4  # sections start at multiples of 16 bytes
        self._answer = torch.zeros(2 * self._stride + extra_words, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(self._stride * (1 + 2 * MAX_LOGPROBS), dtype=torch.int32, device=device)

    @property
    def token_R(self) -> Tensor:
        """int32, of all rows."""
        return self._answer[: self._stride]

    @property
    def extra(self) -> Tensor:
        """The words behind tokens and flags."""
        return self._answer[2 * self._stride :]

    @property
    def num_host_words(self) -> int:
        """Of a host buffer that takes everything."""
        return self._answer.numel() + self._logprobs.numel()

    def run(self, logits_RV: Tensor, position_R: Tensor, num_valid: Tensor, kind: SampleKind) -> None:
        """Launch the kernels for the rows as last placed. position_R: of the tokens to sample."""
        num_rows = logits_RV.shape[0]
        token_R, flag_R = self.token_R[:num_rows], self._answer[self._stride : self._stride + num_rows]
        penalties = self.rows.penalties(num_rows) if kind.is_penalised else None
        draws = self.rows.draws(num_rows, position_R, num_valid)
        sample(logits_RV, draws, mode=kind.mode, penalties=penalties, out=(token_R, flag_R))
        if kind.has_logprobs:
            logprob_S, top_id_SN, top_logprob_SN = self._logprob_sections(self._logprobs, num_rows)
            out = (logprob_S.view(torch.float32), top_id_SN, top_logprob_SN.view(torch.float32))
            token_logprobs(logits_RV, token_R, self.rows.num_top(num_rows), num_valid, MAX_LOGPROBS, out)

    def download(self, buffer: HostBuffer, extra_words: int, kind: SampleKind) -> None:
        """Queue the copies of what a step of this kind left; extra_words: how many of the words behind the flags."""
        buffer.download(self._answer[: 2 * self._stride + extra_words])
        if kind.has_logprobs:
            buffer.download(self._logprobs, at=self._answer.numel())
        buffer.mark()

    def tokens(self, buffer: HostBuffer, num_rows: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """A copy of the landed tokens."""
        return buffer.array[:num_rows].copy()

    def errors(self, buffer: HostBuffer, num_rows: int) -> dict[int, EngineError]:
        """Rows without a token, and why."""
        flags = buffer.array[self._stride : self._stride + num_rows]
        return {int(row): _fault(int(flags[row]), int(row)) for row in flags.nonzero()[0]}

    def landed_extra(self, buffer: HostBuffer, extra_words: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The landed words behind the flags: the buffer's own."""
        return buffer.array[2 * self._stride : 2 * self._stride + extra_words]

    def logprobs(self, buffer: HostBuffer, num_rows: int) -> StepLogprobs:
        """Copies of the landed log-probabilities."""
        landed = buffer.words[self._answer.numel() : self.num_host_words]
        logprob_S, top_id_SN, top_logprob_SN = (part.numpy().copy() for part in self._logprob_sections(landed, num_rows))
        return StepLogprobs(logprob_R=logprob_S.view(np.float32), top_id_RN=top_id_SN, top_logprob_RN=top_logprob_SN.view(np.float32))

    def _logprob_sections(self, words: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen [R], likeliest ids [R, N] and their log-probabilities [R, N], as int32 words."""
        listed = words[self._stride :].view(2, self._stride, MAX_LOGPROBS)
        return words[:num_rows], listed[0, :num_rows], listed[1, :num_rows]


def _fault(flags: int, row: int) -> EngineError:
    said = [text for flag, text in FAULTS.items() if flags & flag]
    return EngineError(f"row {row} has no token: {', '.join(said)}", code="bad_logits", phase="decode.stream", retryable=False)
