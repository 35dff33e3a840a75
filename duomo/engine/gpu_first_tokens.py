"""Owns the sampling of the first tokens of prompts on one GPU: by the kernels of decode steps, launched as they come. Knows no wave.

A prompt with several choices comes with its logits once for each. Rows beyond MAX_ROWS are sampled in turns: their number is the requests'.
Each turn but the last is waited for, since the host's buffers are few; the last one by whoever wants the tokens.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from duomo.engine.decode_step import DecodeRow, Joining
from duomo.engine.gpu_host_ring import HostBuffer, HostRing
from duomo.engine.gpu_sample_rows import SampleKind
from duomo.engine.gpu_sampler import GpuSampler
from duomo.engine.sampler import RowSampling, SampledToken
from duomo.errors import EngineError
from duomo.wire.messages import Sampling

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


class GpuFirstTokens:
    """Buffers for up to max_rows at once. One stream, one thread at a time."""

    def __init__(self, vocab: int, device: torch.device, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._vocab = vocab
        self._sampler = GpuSampler(max_rows, vocab, 0, device)
        self._places = torch.zeros(POSITIONS + max_rows, dtype=torch.int32, device=device)
        self._up = HostRing(self._places.numel(), device)
        self._down = HostRing(self._sampler.num_host_words, device)

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

    def _launch(self, logits_RV: Tensor, rows: Sequence[RowSampling]) -> Callable[[], list[Answer]]:
        num_rows = len(rows)
        last = [len(row.prompt_ids) + len(row.output_ids) - 1 for row in rows]
        joining = [
            DecodeRow(source=Joining(token_id=0, sampling=row), position=position, table=())
            for row, position in zip(rows, last, strict=True)
        ]
        kind = self._sampler.rows.place(joining)
        up = self._up.take()
        up.array[0] = num_rows
        up.array[POSITIONS : POSITIONS + num_rows] = [position + 1 for position in last]
        up.upload(self._places)
        self._sampler.run(logits_RV, self._places[POSITIONS : POSITIONS + num_rows], self._places[:1], kind)
        down = self._down.take()
        self._sampler.download(down, 0, kind)
        return partial(self._answers, down, kind, rows)

    def _answers(self, down: HostBuffer, kind: SampleKind, rows: Sequence[RowSampling]) -> list[Answer]:
        num_rows = len(rows)
        down.wait()
        errors = self._sampler.errors(down, num_rows)
        ids = self._sampler.tokens(down, num_rows).tolist()
        listed = self._sampler.logprobs(down, num_rows) if kind.has_logprobs else None
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
