"""Owns the log-probabilities of a prompt's own tokens on one GPU, from the logits of the rows before them. Knows no wave's course.

LAUNCH_ROWS rows at a time: as many as a wave has prompts, so that products and kernels are those that first tokens are made by, compiled
before the engine is ready, and logits take no more memory than theirs. Nothing waits for the device before PendingScores.wait().

Legend: T rows of one call, R rows of one launch, V vocabulary, K likeliest listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duomo.engine.decode_step import MAX_LOGPROBS
from duomo.engine.prompt_scores import RowsToScore
from duomo.engine.wave_buckets import MAX_WAVE_PROMPTS
from duomo.wire.prompt_logprobs import PromptScores
from duomo_kernels.token_logprobs import token_logprobs

LAUNCH_ROWS = MAX_WAVE_PROMPTS
SCORE_ROWS = 16 * LAUNCH_ROWS  # of one turn of the step thread


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingScores:
    """Scores on their way to the host. words int32 [T, 2 + 2 * MAX_LOGPROBS]: own log-probability, rank, ids and log-probabilities of the
    likeliest; floats as their bits. end: of the copy, None where it is over."""

    asked: RowsToScore
    words: Tensor
    end: torch.cuda.Event | None

    def wait(self) -> PromptScores:
        """When the copy is over; in any thread."""
        if self.end is not None:
            self.end.synchronize()
        words, num_top = self.words.numpy(), self.asked.num_top
        likeliest = words[:, 2:].reshape(-1, 2, MAX_LOGPROBS)[:, :, :num_top]
        return PromptScores(
            first=self.asked.first,
            own_T=words[:, 0].view(np.float32),
            rank_T=words[:, 1],
            top_TK=np.ascontiguousarray(likeliest[:, 1]).view(np.float32),
            top_ids_TK=likeliest[:, 0],
        )


@torch.inference_mode()
def launch_scores(logits_of: Callable[[list[int]], Tensor], asked: RowsToScore, device: torch.device) -> PendingScores:
    """logits_of: float32 [R, V] of so many rows of the wave, on the device. asked.num_top is at most MAX_LOGPROBS, and the vocabulary."""
    assert asked.num_top <= MAX_LOGPROBS, asked.num_top
    is_cuda, num_rows = device.type == "cuda", len(asked.next_ids)
    next_T = torch.tensor(asked.next_ids, dtype=torch.int32, pin_memory=is_cuda).to(device, non_blocking=True)
    num_top_R = torch.full((LAUNCH_ROWS,), asked.num_top, dtype=torch.int32, device=device)
    words = torch.zeros(num_rows, 2 + 2 * MAX_LOGPROBS, dtype=torch.int32, device=device)
    for lo in range(0, num_rows, LAUNCH_ROWS):
        rows = asked.rows[lo : lo + LAUNCH_ROWS]
        logits_RV, next_R = logits_of(rows), next_T[lo : lo + LAUNCH_ROWS]
        num_valid = torch.full((1,), len(rows), dtype=torch.int32, device=device)
        own_R, top_ids_RK, top_RK = token_logprobs(logits_RV, next_R, num_top_R[: len(rows)], num_valid, MAX_LOGPROBS)
        # as vLLM counts it: how many are at least as likely
        rank_R = (logits_RV >= logits_RV.gather(1, next_R.long()[:, None])).sum(1, dtype=torch.int32)
        parts = (own_R[:, None].view(torch.int32), rank_R[:, None], top_ids_RK, top_RK.view(torch.int32))
        words[lo : lo + LAUNCH_ROWS] = torch.cat(parts, dim=1)
    landed = torch.empty(words.shape, dtype=torch.int32, pin_memory=is_cuda).copy_(words, non_blocking=True)
    end = torch.cuda.Event(blocking=True) if is_cuda else None  # type: ignore[no-untyped-call]  # torch ships no types for it
    if end is not None:
        end.record()
    return PendingScores(asked=asked, words=landed, end=end)
