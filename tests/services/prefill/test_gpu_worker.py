"""The prefill worker over a GPU's engine, in Triton's interpreter where there is none: pieces, chunks, what a wave
read, and its end from graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.expert_counts import ExpertCounts
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.gpu_first_tokens import GpuFirstTokens
from duomo.engine.memory_plan import DeviceBytes, MemoryLimits
from duomo.engine.prompt_scores import RowsToScore
from duomo.engine.sampler import RowSampling
from duomo.engine.startup import Startup
from duomo.errors import RequestError
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.prompt_logprobs import PromptScores
from duomo.wire.values import Sampling
from services.prefill.gpu_worker import GpuPrefillWorker
from services.prefill.pieces import Piece
from services.prefill.worker import WaveOutput, WaveRow, WorkerSizes
from tests.engine.gpu_tiny import TINY
from tests.interpreter import prepare

prepare()

CPU = torch.device("cpu")
PROMPTS = [tuple(range(10, 43)), tuple(range(20, 29))]
ROWS = [WaveRow(token_ids=PROMPTS[0], start=0, block_table=(4, 1, 3)), WaveRow(token_ids=PROMPTS[1], start=0, block_table=(0,))]
GREEDY = Sampling(max_tokens=4, temperature=0.0)
DRAWS = (
    GREEDY,
    Sampling(max_tokens=4, temperature=0.9, seed=5),
    Sampling(max_tokens=4, temperature=1.1, top_k=7, top_p=0.9, seed=11),
    Sampling(max_tokens=4, temperature=0.7, seed=3, presence_penalty=0.4, logprobs=2),
)
Waves = Sequence[tuple[list[WaveRow], list[list[RowSampling]]]]


@pytest.fixture(scope="module")
def engine() -> GpuEngine:
    limits = MemoryLimits(max_batch=2, max_wave_tokens=32, max_model_tokens=64, block_tokens=16, dtype_bytes=4)
    load = partial(random_gpu_weights, TINY, device=CPU, dtype=torch.float32, std=0.125)
    memory = DeviceBytes(total=14_250_000, free=14_250_000)
    start = EngineStart(config=TINY, load=load, limits=limits, device=CPU, memory=memory, is_deterministic=True)
    made = start_engine(start, Startup())
    made.compilations.close()
    return made


def outputs(engine: GpuEngine, chunk_tokens: int | None, *pieces: Piece) -> tuple[WaveOutput, ...]:
    sizes = WorkerSizes(num_blocks=engine.plan.num_blocks, block_tokens=16, units=2, units_per_group=1, torch_threads=1)
    worker = GpuPrefillWorker(engine, sizes)
    computation = worker.begin(ROWS, chunk_tokens)
    for piece in pieces:
        worker.run_piece(computation, piece).wait()
    samplings = [[RowSampling(sampling=GREEDY, choice=0, prompt_ids=ids, output_ids=())] for ids in PROMPTS]
    return worker.sample(computation, samplings).wait()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_pieces_and_chunks_say_the_same_and_what_they_read(engine: GpuEngine) -> None:
    """float32: rows of other chunks sum in another order by too little to choose otherwise."""
    whole = outputs(engine, None, Piece(groups=(0, 2), chunks=(0, 1)))
    layered = outputs(engine, 16, *(Piece(groups=(group, group + 1), chunks=(0, 3)) for group in (0, 1)))
    chunked = outputs(engine, 16, *(Piece(groups=(0, 2), chunks=(chunk, chunk + 1)) for chunk in range(3)))
    experts = engine.prefill.decoder.weights.layers[0].expert_bytes
    assert whole[0].expert_bytes % experts == 0 and whole[1].expert_bytes == 0
    assert 0 < whole[0].expert_bytes <= 2 * TINY.num_experts * experts
    assert layered[0].expert_bytes == chunked[0].expert_bytes > whole[0].expert_bytes
    for other in (layered, chunked):
        for mine, theirs, prompt in zip(whole, other, PROMPTS, strict=True):
            assert theirs.error is None and [token.token_id for token in mine.sampled] == [token.token_id for token in theirs.sampled]
            assert theirs.expert_counts.dtype == np.dtype(np.int32) and theirs.expert_counts.flags.c_contiguous
            assert np.array_equal(mine.expert_counts, theirs.expert_counts)
            assert (mine.expert_counts.sum(1) == len(prompt) * TINY.top_k).all()


@pytest.fixture
def captured(engine: GpuEngine) -> Iterator[GpuEngine]:
    """Where nothing is captured graphs' bodies run: what they read and write is the same."""
    engine.prefill.capture(CapturedLimits(max_rows=64, max_sequences=4, max_sequence_tokens=64), engine.first_tokens)
    yield engine
    engine.prefill.captured = None


def asked(*samplings: Sampling, ids: tuple[int, ...]) -> list[RowSampling]:
    """A row for each choice of one prompt, whose last token is one that another replica sampled."""
    return [RowSampling(sampling=each, choice=at, prompt_ids=ids[:-1], output_ids=ids[-1:]) for at, each in enumerate(samplings)]


def prompts(seed: int, *lengths: int, cached: int = 0) -> list[WaveRow]:
    """In blocks of their own for each seed; `cached` tokens of each are in the pool, if a wave of the same seed has run."""
    made, rows = random.Random(seed), []
    for at, length in enumerate(lengths):
        ids = tuple(made.randrange(3, TINY.vocab) for _ in range(60))[:length]
        first = 16 * seed + 4 * at
        rows.append(WaveRow(token_ids=ids, start=cached, block_table=range(first, first + 4)))
    return rows


def ends(engine: GpuEngine, waves: Waves) -> list[tuple[WaveOutput, ...]]:
    """Waves that take turns between their groups, and end one behind the other before anyone waits."""
    sizes = WorkerSizes(num_blocks=engine.plan.num_blocks, block_tokens=16, units=2, units_per_group=1, torch_threads=1)
    worker = GpuPrefillWorker(engine, sizes)
    computations = [worker.begin(rows) for rows, _ in waves]
    for group in range(2):
        for computation in computations:
            worker.run_piece(computation, Piece(groups=(group, group + 1), chunks=(0, 1)))
    pending = [worker.sample(computation, samplings) for computation, (_, samplings) in zip(computations, waves, strict=True)]
    return [each.wait() for each in pending]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_a_wave_that_stops_half_way_says_what_it_read(engine: GpuEngine) -> None:
    """Of the layers that ran, and of no others."""
    sizes = WorkerSizes(num_blocks=engine.plan.num_blocks, block_tokens=16, units=2, units_per_group=1, torch_threads=1)
    worker = GpuPrefillWorker(engine, sizes)
    computation = worker.begin(ROWS, 16)
    assert worker.use_of(computation).wait().bytes_read == 0
    worker.run_piece(computation, Piece(groups=(0, 1), chunks=(0, 3))).wait()
    use = worker.use_of(computation).wait()
    per_layer = use.counts_SLE.sum(dim=(0, 2)).tolist()
    num_rows = sum(len(row.token_ids) - row.start for row in ROWS)
    assert per_layer == [num_rows * TINY.top_k, *[0] * (TINY.num_layers - 1)] and TINY.num_layers == 2
    whole = outputs(engine, 16, *(Piece(groups=(group, group + 1), chunks=(0, 3)) for group in (0, 1)))
    assert 0 < use.bytes_read < whole[0].expert_bytes


def assert_same(mine: list[tuple[WaveOutput, ...]], theirs: list[tuple[WaveOutput, ...]]) -> None:
    for outputs, their_outputs in zip(mine, theirs, strict=True):
        for one, other in zip(outputs, their_outputs, strict=True):
            assert one.sampled == other.sampled and one.error is None and other.error is None
            assert np.array_equal(one.expert_counts, other.expert_counts) and one.expert_counts.flags.c_contiguous
            assert one.expert_bytes == other.expert_bytes


def turns() -> list[Waves]:
    """Waves that run beside each other."""

    def each(rows: list[WaveRow], *kinds: int) -> tuple[list[WaveRow], list[list[RowSampling]]]:
        return rows, [asked(DRAWS[kind], ids=tuple(row.token_ids)) for row, kind in zip(rows, kinds, strict=True)]

    return [
        [each(prompts(1, 17), 0)],
        [each(prompts(1, 20, 16, 3, 20), 0, 1, 2, 0)],
        [each(prompts(1, 33, 20, cached=16), 1, 0)],  # behind what the wave before left
        [each(prompts(2, 40, 7), 3, 1)],
        [each(prompts(1, 30, 30), 0, 1), each(prompts(2, 12), 2), each(prompts(3, 8, 9, 10), 0, 0, 0)],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_ends_of_waves_from_graphs_are_those_that_are_launched(captured: GpuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic layers: the same bits, so the same tokens and counts. From graphs nothing is launched by itself."""

    def refused(*_: object) -> None:
        raise AssertionError("launched by itself")

    with monkeypatch.context() as patched:
        patched.setattr(GpuFirstTokens, "launch", refused)
        patched.setattr(ExpertCounts, "add", refused)
        patched.setattr(ExpertCounts, "fetch", refused)
        mine = [ends(captured, waves) for waves in turns()]
    captured.prefill.captured = None
    for outputs, waves in zip(mine, turns(), strict=True):
        assert_same(outputs, ends(captured, waves))
        for wave, (rows, _) in zip(outputs, waves, strict=True):
            for output, row in zip(wave, rows, strict=True):
                assert (output.expert_counts.sum(1) == (len(row.token_ids) - row.start) * TINY.top_k).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_prompts_that_nobody_wants_and_several_choices(captured: GpuEngine) -> None:
    """Their tokens are launched; what the wave has routed is counted from graphs all the same, of the unwanted too."""
    rows = prompts(1, 20, 9, 3)
    one, two, three = (asked(DRAWS[at], ids=tuple(row.token_ids)) for at, row in enumerate(rows))
    cases: list[list[list[RowSampling]]] = [
        [one, [], three],
        [[], [], []],
        [one, asked(DRAWS[1], DRAWS[1], DRAWS[1], ids=tuple(rows[1].token_ids)), three],
    ]
    mine = [ends(captured, [(rows, samplings)]) for samplings in cases]
    captured.prefill.captured = None
    for outputs, samplings in zip(mine, cases, strict=True):
        assert_same(outputs, ends(captured, [(rows, samplings)]))
        assert [len(output.sampled) for output in outputs[0]] == [len(each) for each in samplings]
        assert all(output.expert_counts.any() for output in outputs[0]) and outputs[0][0].expert_bytes > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_prompts_are_scored_between_layers_and_first_tokens(captured: GpuEngine) -> None:
    """From graphs as when launched, to the bit; the tokens sampled behind it are those of a wave that is not scored."""
    sizes = WorkerSizes(num_blocks=captured.plan.num_blocks, block_tokens=16, units=2, units_per_group=1, torch_threads=1)
    samplings = [[RowSampling(sampling=GREEDY, choice=0, prompt_ids=ids, output_ids=())] for ids in PROMPTS]
    asked = [
        RowsToScore(row_lo=0, next_ids=PROMPTS[0][1:], first=1, num_top=3),
        RowsToScore(row_lo=len(PROMPTS[0]), next_ids=PROMPTS[1][1:], first=1, num_top=20),
    ]

    def ended() -> tuple[list[PromptScores], tuple[WaveOutput, ...]]:
        worker = GpuPrefillWorker(captured, sizes)
        computation = worker.begin(ROWS)
        worker.run_piece(computation, Piece(groups=(0, 2), chunks=(0, 1))).wait()
        pending = [worker.score(computation, one) for one in asked]
        return [one.wait() for one in pending], worker.sample(computation, samplings).wait()

    scores, sampled = ended()
    captured.prefill.captured = None
    launched, by_launches = ended()
    assert_same([sampled], [by_launches])
    unscored = outputs(captured, None, Piece(groups=(0, 2), chunks=(0, 1)))
    assert [one.sampled for one in sampled] == [one.sampled for one in unscored]
    for one, other, wanted in zip(scores, launched, asked, strict=True):
        assert one.top_TK.shape == (len(wanted.next_ids), wanted.num_top) and not one.has_nan
        for name in ("own_T", "rank_T", "top_TK", "top_ids_TK"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_more_than_a_kernel_lists_is_refused_by_name(engine: GpuEngine) -> None:
    worker = GpuPrefillWorker(engine, WorkerSizes(num_blocks=8, block_tokens=16, units=2, units_per_group=1, torch_threads=1))
    worker.check(Sampling(max_tokens=1, prompt_logprobs=20))
    with pytest.raises(RequestError, match="21 prompt_logprobs: at most 20") as refusal:
        worker.check(Sampling(max_tokens=1, prompt_logprobs=21))
    assert refusal.value.param == "prompt_logprobs"
