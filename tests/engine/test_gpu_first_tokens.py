"""First tokens by a GPU's kernels against the CPU's sampler, more rows than fit at once; by graphs as when launched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.expert_counts import ExpertCounts, ExpertUse
from duomo.engine.gpu_captured_counts import GpuCapturedCounts
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.gpu_first_tokens import Answer, GpuFirstTokens, LastLogits
from duomo.engine.gpu_graphs import GpuGraphs
from duomo.engine.gpu_host_ring import DEPTH
from duomo.engine.gpu_sampler import GpuSampler
from duomo.engine.memory_plan import MemoryLimits
from duomo.engine.sampler import RowSampling, SampledToken, Sampler
from duomo.engine.startup import Startup
from duomo.errors import EngineError
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.values import Sampling
from tests.engine.gpu_tiny import WIDE

VOCAB = 61
ASKED = (
    Sampling(max_tokens=9, temperature=0.0),
    Sampling(max_tokens=9, temperature=0.9, seed=5, logprobs=3),
    Sampling(max_tokens=9, temperature=1.1, top_k=7, top_p=0.9, seed=11),
    Sampling(max_tokens=9, temperature=0.0, repetition_penalty=1.7, min_tokens=6, logprobs=0),
    Sampling(max_tokens=9, temperature=0.7, seed=3, frequency_penalty=0.8, presence_penalty=0.4),
)


def asked(at: int) -> RowSampling:
    """Some continue an answer that another replica began."""
    output_ids = (9, 9, 11)[: at % 4]
    return RowSampling(sampling=ASKED[at % 5], choice=at % 3, prompt_ids=(1, 2, 3, 40 + at), output_ids=output_ids, ending_ids=(2, 5))


def test_tokens_are_the_cpus_and_a_nan_is_an_error_of_its_row() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [asked(at) for at in range(11)]
    logits_RV = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    expected = Sampler().sample(logits_RV, rows)
    logits_RV[6, 3] = float("nan")
    first = GpuFirstTokens(VOCAB, device, max_rows=4)
    first.warm()
    for _ in range(2):  # nothing of one turn is left in the next
        answers = first.sample(logits_RV.to(device), rows)
        assert len(answers) == 11
        for at, (mine, theirs) in enumerate(zip(answers, expected, strict=True)):
            if at == 6:
                assert isinstance(mine, EngineError)
                assert (mine.code, mine.phase, mine.retryable) == ("bad_logits", "prefill.compute", False)
                continue
            assert isinstance(mine, SampledToken) and mine.token_id == theirs.token_id, (at, rows[at].sampling)
            assert mine.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-5))
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in theirs.top], abs=1e-5)


def left(device: torch.device, num_rows: int) -> LastLogits:
    """Room for so many rows, and nothing in it."""
    logits_SV = torch.full((num_rows, VOCAB), torch.nan, device=device)
    position_S, num_valid = (torch.zeros(size, dtype=torch.int32, device=device) for size in (num_rows, 1))
    return LastLogits(logits_SV, position_S, num_valid, GpuGraphs(device))


def leave(last: LastLogits, logits_RV: Tensor, rows: list[RowSampling]) -> None:
    """As a wave does: what stands behind its rows is another's."""
    last.logits_SV[: len(rows)] = logits_RV
    last.position_S[: len(rows)] = torch.tensor([len(row.prompt_ids) + len(row.output_ids) for row in rows], dtype=torch.int32)
    last.num_valid.fill_(len(rows))


def told(answer: Answer) -> SampledToken | tuple[str, str]:
    return answer if isinstance(answer, SampledToken) else (answer.code, answer.detail)


@pytest.mark.parametrize("is_captured", [True, False])
def test_what_graphs_have_left_is_sampled_as_when_launched(is_captured: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mine, theirs, last = GpuFirstTokens(VOCAB, device), GpuFirstTokens(VOCAB, device), left(device, 4)
    if is_captured:
        with last.graphs.capturing():
            mine.capture(last)
    made, kinds = torch.Generator().manual_seed(3), (0, 1, 2, 3, 4)
    waves = [[kind] for kind in kinds] + [[0, 0, 0, 0], [0, 2], [2, 0, 2], [4, 1, 2, 3], [0]]
    for wave in waves:
        rows = [replace(asked(at), choice=at) for at in wave]
        logits_RV = (torch.randn(len(rows), VOCAB, generator=made) * 4).to(device)
        if len(rows) == 3:
            logits_RV[1, 5] = float("nan")
        leave(last, logits_RV, rows)
        expected = theirs.sample(logits_RV, rows)
        assert [told(answer) for answer in mine.launch_last(last, rows).wait()] == [told(answer) for answer in expected], wave


def test_tokens_that_nobody_took_in_time_are_not_anothers() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first, last, rows = GpuFirstTokens(VOCAB, device), left(device, 2), [asked(0)]
    leave(last, torch.zeros(1, VOCAB, device=device), rows)
    pending = [first.launch_last(last, rows) for _ in range(DEPTH + 1)]
    with pytest.raises(AssertionError, match="waited for too late"):
        pending[0].wait()
    assert [told(answer) for each in pending[1:] for answer in each.wait()] == [SampledToken(token_id=0)] * DEPTH


def ended(engine: GpuEngine, batches: list[StepBatch], sampling: Sampling) -> list[tuple[list[SampledToken | tuple[str, str]], ExpertUse]]:
    """Tokens and counts of waves that take turns, layer by layer, and end one behind the other before anyone waits."""
    prefill, pending = engine.prefill, []
    states = [prefill.begin(batch) for batch in batches]
    for layer in range(prefill.decoder.config.num_layers):
        for state in states:
            prefill.run_layers(layer, layer + 1, state)
    for state in states:
        rows = [
            RowSampling(sampling=sampling, choice=0, prompt_ids=(5,) * part.end, output_ids=(), ending_ids=(2,))
            for part in state.batch.slices
        ]
        last = prefill.leave_logits(state)
        assert (last is None) == (prefill.captured is None)
        first = engine.first_tokens
        tokens = first.launch(prefill.logits(state, state.batch.last_rows), rows) if last is None else first.launch_last(last, rows)
        pending.append((tokens, state.fetch_use()))
    return [([told(answer) for answer in tokens.wait()], use.wait()) for tokens, use in pending]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs")
def test_ends_of_waves_replayed_on_a_gpu_are_those_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic: the same bits both ways, so the same tokens and experts. Every kind of sampling, prefixes, waves between others."""
    free, total = torch.cuda.mem_get_info()
    limits = MemoryLimits(
        max_batch=16,
        max_wave_tokens=2048,
        max_model_tokens=512,
        block_tokens=64,
        dtype_bytes=2,
        gpu_memory_fraction=(total - free + 2 * 10**9) / total,  # leave the card to others
    )
    load = partial(random_gpu_weights, WIDE, device=torch.device("cuda"), std=WIDE.hidden**-0.5)
    start = EngineStart(config=WIDE, load=load, limits=limits, device=torch.device("cuda"), is_deterministic=True)
    engine = start_engine(start, Startup())
    made = torch.Generator().manual_seed(4)
    drawn_by_graphs = (ASKED[0], Sampling(max_tokens=9, temperature=0.9, seed=5), ASKED[2])  # greedy, plain, limited

    def refused(*_: object) -> None:
        raise AssertionError("launched by itself")

    def wave(*lengths: int, start: int = 0, table: int = 0) -> StepBatch:
        """start: of a prefix, that is, of what an earlier wave left in those blocks."""
        tables = [range(8 * (table + at), 8 * (table + at) + 8) for at in range(len(lengths))]
        ids = [torch.randint(3, WIDE.vocab, (length,), generator=made).tolist() for length in lengths]
        return StepBatch(
            slices=tuple(PromptSlice(token_ids=each, start=start, block_table=blocks) for each, blocks in zip(ids, tables, strict=True))
        )

    turns = [
        [wave(1)],
        [wave(512)],
        [wave(7, 300, 12)],
        [wave(9, 5, start=64)],
        [wave(*range(3, 19))],  # as many prompts as a wave from graphs has
        [wave(512, 512, 512, 500)],
        [wave(40), wave(333, 12, table=1), wave(2, 3, 4, table=3)],
    ]
    try:
        assert engine.prefill.captured is not None
        with monkeypatch.context() as patched:
            patched.setattr(GpuSampler, "run", refused)
            patched.setattr(GpuCapturedCounts, "count", refused)
            patched.setattr(ExpertCounts, "add", refused)
            replayed = [ended(engine, batches, sampling) for sampling in drawn_by_graphs for batches in turns]
        replayed += [ended(engine, batches, sampling) for sampling in ASKED for batches in turns]
        assert engine.compilations.num_after_ready == 0
        engine.prefill.captured = None
        launched = [ended(engine, batches, sampling) for sampling in (*drawn_by_graphs, *ASKED) for batches in turns]
        for mine, theirs in zip(replayed, launched, strict=True):
            for (tokens, use), (their_tokens, their_use) in zip(mine, theirs, strict=True):
                assert tokens == their_tokens
                assert torch.equal(use.counts_SLE, their_use.counts_SLE) and use.bytes_read == their_use.bytes_read > 0
    finally:
        engine.compilations.close()
