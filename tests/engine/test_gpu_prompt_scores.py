"""Scores of prompt tokens by a GPU's kernels: against the definition, of any rows of a wave, and from graphs as when launched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_engine import EngineStart, start_engine
from duomo.engine.gpu_prefill import GpuBoundaryState, GpuPrefill
from duomo.engine.gpu_prompt_scores import LAUNCH_ROWS, launch_scores
from duomo.engine.memory_plan import MemoryLimits
from duomo.engine.prompt_scores import RowsToScore, prompt_scores
from duomo.engine.startup import Startup
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.prompt_logprobs import PromptScores
from duomo_kernels._bounds import bound, error
from tests.engine.gpu_tiny import TINY, WIDE, tiny_engine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def asked(num_rows: int, num_top: int, vocab: int, row_lo: int = 0) -> RowsToScore:
    next_ids = torch.randint(0, vocab, (num_rows,), generator=torch.Generator().manual_seed(num_rows)).tolist()
    return RowsToScore(row_lo=row_lo, next_ids=next_ids, first=7, num_top=num_top)


def assert_as_defined(found: PromptScores, logits_TV: torch.Tensor, rows: RowsToScore) -> None:
    """Rows of probabilities: a logprob near 0 is right when its probability is."""
    wanted = prompt_scores(logits_TV.cpu(), rows)
    assert found.first == wanted.first and found.own_T.dtype == np.float32
    assert np.array_equal(found.rank_T, wanted.rank_T) and np.array_equal(found.top_ids_TK, wanted.top_ids_TK)
    assert error(torch.from_numpy(found.own_T), torch.from_numpy(wanted.own_T)) <= bound(torch.float32)
    if rows.num_top:
        assert error(torch.from_numpy(found.top_TK).exp(), torch.from_numpy(wanted.top_TK).exp()) <= bound(torch.float32)


@pytest.mark.parametrize(("num_rows", "vocab", "num_top"), [(1, 61, 0), (17, 61, 20), (33, 2100, 3)])
def test_scores_are_the_cpus(num_rows: int, vocab: int, num_top: int) -> None:
    logits_TV = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    on_device, rows = logits_TV.to(DEVICE), asked(num_rows, num_top, vocab)
    assert_as_defined(launch_scores(lambda some: on_device[some], rows, DEVICE).wait(), logits_TV, rows)


def test_a_nan_is_seen_in_its_row() -> None:
    logits_TV = torch.randn(5, 61, generator=torch.Generator().manual_seed(2))
    logits_TV[3, 9] = torch.nan
    found = launch_scores(lambda some: logits_TV.to(DEVICE)[some], asked(5, 2, 61), DEVICE).wait()
    assert found.has_nan and np.isnan(found.own_T).tolist() == [False, False, False, True, False]


def crossed(prefill: GpuPrefill, chunk_tokens: int | None) -> GpuBoundaryState:
    """A wave of three prompts, behind its last layer."""
    lengths, tables = (18, 5, 3), (range(2), range(2, 3), range(3, 4))
    parts = (PromptSlice(token_ids=tuple(range(9, 9 + size)), start=0, block_table=at) for size, at in zip(lengths, tables, strict=True))
    state = prefill.begin(StepBatch(slices=tuple(parts)), chunk_tokens)
    return prefill.run_layers(0, prefill.decoder.config.num_layers, state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 layers are for the interpreter")
@pytest.mark.parametrize(("chunk_tokens", "is_captured"), [(None, True), (16, False)])
def test_any_rows_of_a_wave_are_scored_and_left_as_they_are(chunk_tokens: int | None, is_captured: bool) -> None:
    """Rows of two prompts over the borders of launches and chunks; the first tokens' logits keep their bits."""
    engine = tiny_engine(DEVICE, is_deterministic=True)
    prefill = engine.prefill
    untouched = prefill.logits(crossed(prefill, chunk_tokens), [17, 22, 25])
    if is_captured:
        prefill.capture(CapturedLimits(max_rows=64, max_sequences=4, max_sequence_tokens=64))
    state = crossed(prefill, chunk_tokens)
    every = prefill.logits(state, list(range(26)))
    for row_lo, num_rows in ((18, 4), (5, LAUNCH_ROWS + 1)):
        rows = asked(num_rows, 4, TINY.vocab, row_lo)
        found = launch_scores(lambda some: prefill.logits(state, some), rows, DEVICE).wait()
        assert_as_defined(found, every[row_lo : row_lo + num_rows], rows)
    assert torch.equal(prefill.logits(state, [17, 22, 25]), untouched)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs")
def test_on_a_gpu_scores_are_the_definitions_and_nothing_is_compiled_for_them() -> None:
    """Short waves from graphs and a long one that is launched, every number of rows of a launch."""
    free, total = torch.cuda.mem_get_info()
    limits = MemoryLimits(
        max_batch=16,
        max_wave_tokens=2048,
        max_model_tokens=2048,
        block_tokens=64,
        dtype_bytes=2,
        gpu_memory_fraction=(total - free + 2 * 10**9) / total,  # leave the card to others
    )
    config = replace(WIDE, max_position_tokens=2048)
    load = partial(random_gpu_weights, config, device=DEVICE, std=config.hidden**-0.5)
    engine = start_engine(EngineStart(config=config, load=load, limits=limits, device=DEVICE, is_deterministic=True), Startup())
    prefill, made = engine.prefill, torch.Generator().manual_seed(3)
    try:
        for length in (2, 17, 300, 2000):
            ids = torch.randint(3, WIDE.vocab, (length,), generator=made).tolist()
            part = PromptSlice(token_ids=ids, start=0, block_table=range(-(-length // 64)))
            state = prefill.run_layers(0, WIDE.num_layers, prefill.begin(StepBatch(slices=(part,))))
            for num_rows in {1, min(length - 1, LAUNCH_ROWS + 5), length - 1}:
                rows = asked(num_rows, 20, WIDE.vocab)
                found = launch_scores(lambda some, state=state: prefill.logits(state, some), rows, DEVICE).wait()  # type: ignore[misc]  # a default binds it
                exact = torch.cat([prefill.logits(state, rows.rows[lo : lo + LAUNCH_ROWS]) for lo in range(0, num_rows, LAUNCH_ROWS)])
                assert_as_defined(found, exact, rows)
        assert engine.compilations.num_after_ready == 0
    finally:
        engine.compilations.close()
