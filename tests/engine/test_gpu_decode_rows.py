"""Decode steps of a GPU through hundreds of joins and leaves, buckets and graphs: what a row is given depends on none of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.compile_counter import CompileCounter
from duomo.engine.decode_step import DecodeLimits, DecodeRow, DecodeStep
from duomo.engine.gpu_decode import GpuDecode, PendingStep
from duomo.wire.values import Sampling
from tests.engine.gpu_tiny import GREEDY, TinyEngine, joining, tiny_engine

CUDA = torch.device("cuda")
MAX_TOKENS = 256


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runner(engine: TinyEngine, max_batch: int = 64) -> GpuDecode:
    is_deterministic = engine.decoder.is_deterministic
    return GpuDecode(
        engine.decoder, engine.cache, DecodeLimits(max_batch=max_batch, max_model_tokens=MAX_TOKENS, is_deterministic=is_deterministic)
    )


@dataclass
class Running:
    """One sequence, which starts with a single token and an empty KV."""

    table: list[int]
    tokens: list[int]
    sampling: Sampling = GREEDY
    position: int = 0
    row: int | None = None
    logits: list[Tensor] = field(default_factory=list)

    def next_row(self) -> DecodeRow:
        source = self.row if self.row is not None else joining((), self.tokens[0], self.sampling)
        self.position += 1
        return DecodeRow(source=source, position=self.position - 1, table=self.table)


def run_together(decode: GpuDecode, sequences: Sequence[Running], num_steps: int) -> None:
    """Steps of all of them, each waited for; writes down tokens and logits."""
    for _ in range(num_steps):
        pending = decode.launch(DecodeStep(rows=tuple(each.next_row() for each in sequences)))
        result = pending.wait()
        assert not result.errors
        for row, each in enumerate(sequences):
            each.row = row
            each.tokens.append(int(result.token_id_R[row]))
            each.logits.append(decode._logits_RV[row].clone())


def started(count: int, blocks_each: int) -> list[Running]:
    return [
        Running(table=list(range(at * blocks_each, (at + 1) * blocks_each)), tokens=[random.Random(at).randrange(90)])
        for at in range(count)
    ]


def test_a_deterministic_row_has_the_same_bits_alone_and_among_others(device: torch.device) -> None:
    engine = tiny_engine(device, num_blocks=256, block_tokens=64 if device.type == "cuda" else 16, is_deterministic=True)
    count, num_steps = (64, 20) if device.type == "cuda" else (3, 2)
    decode = runner(engine, count)
    if device.type == "cuda":
        decode.capture()
    alone, *_ = started(1, 4)
    run_together(decode, [alone], num_steps)
    others = started(count, 4)
    company = [*others[1:], others[0]]
    run_together(decode, company, num_steps)
    assert company[-1].tokens == alone.tokens
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(company[-1].logits, alone.logits, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_a_captured_step_gives_the_bits_of_the_launched_one() -> None:
    engine = tiny_engine(CUDA, num_blocks=256, block_tokens=64)
    captured, launched = runner(engine), runner(engine)
    before = engine.cache.tensor.clone()
    captured.capture()
    assert torch.equal(engine.cache.tensor, before), "capturing wrote keys"
    for count in (1, 2, 3, 8, 9, 33, 64):
        both = []
        for decode in (captured, launched):
            engine.cache.tensor.zero_()
            sequences = started(count, 4)
            run_together(decode, sequences, 6)
            both.append(sequences)
        for mine, theirs in zip(*both, strict=True):
            assert mine.tokens == theirs.tokens, count
            assert all(torch.equal(a, b) for a, b in zip(mine.logits, theirs.logits, strict=True)), count


class Crowd:
    """Joins and leaves at random, one step always under way when the next is launched. Blocks come back when the step after the last is
    behind; a new sequence finds whatever was left in them."""

    def __init__(self, decode: GpuDecode, num_blocks: int, seed: int) -> None:
        self._decode = decode
        self._random = random.Random(seed)
        self._free = list(range(num_blocks))
        self._running: list[Running] = []
        self._under_way: list[tuple[list[Running], PendingStep]] = []
        self._leaving: list[tuple[int, Running]] = []
        self._num_steps = 0
        self.ended: list[Running] = []

    def step(self) -> None:
        for each in [each for each in self._running if each.position >= 24 and self._random.random() < 0.06]:
            self._leave(each)
        while len(self._running) < 64 and len(self._free) >= 4 and (not self._running or self._random.random() < 0.4):
            table = [self._free.pop() for _ in range(4)]
            self._running.append(Running(table=table, tokens=[self._random.randrange(90)], sampling=self._sampling()))
        self._random.shuffle(self._running)
        rows = tuple(each.next_row() for each in self._running)
        for row, each in enumerate(self._running):
            each.row = row
        self._under_way.append((list(self._running), self._decode.launch(DecodeStep(rows=rows))))
        self._num_steps += 1
        self.settle(1)

    def settle(self, num_left: int) -> None:
        while len(self._under_way) > num_left:
            sequences, pending = self._under_way.pop(0)
            result = pending.wait()
            assert not result.errors
            for row, each in enumerate(sequences):
                each.tokens.append(int(result.token_id_R[row]))
        done = self._num_steps - len(self._under_way)
        for last, each in [gone for gone in self._leaving if gone[0] < done]:
            self._free += each.table
            self._leaving.remove((last, each))
            self.ended.append(each)

    def _leave(self, each: Running) -> None:
        self._running.remove(each)
        self._leaving.append((self._num_steps, each))

    def _sampling(self) -> Sampling:
        seed = self._random.randrange(2**64)
        return self._random.choice(
            [
                GREEDY,
                Sampling(max_tokens=300, temperature=0.9, seed=seed),
                Sampling(max_tokens=300, top_k=20, top_p=0.9, seed=seed),
                Sampling(max_tokens=300, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4),
                Sampling(max_tokens=300, temperature=0.7, seed=seed, min_tokens=5, logprobs=3),
            ]
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.timeout(400)
def test_hundreds_of_joins_and_leaves_change_nobodys_tokens_and_compile_nothing() -> None:
    engine = tiny_engine(CUDA, num_blocks=256, block_tokens=64, is_deterministic=True)
    engine.cache.tensor.fill_(float("nan"))  # nobody may look at a slot that it has not written
    counter = CompileCounter()
    try:
        decode = runner(engine)
        decode.capture()
        assert len(decode.graphs) == 4 * len(decode.buckets)
        counter.ready()
        crowd = Crowd(decode, 256, seed=5)
        memory = None
        for at in range(300):
            crowd.step()
            if at == 100:
                memory = torch.cuda.memory_allocated()
        crowd.settle(0)
        assert torch.cuda.memory_allocated() == memory, "memory grew"
        assert counter.num_after_ready == 0
        assert len(crowd.ended) > 50
        for each in crowd.ended[::8]:
            again = Running(table=[0, 1, 2, 3], tokens=each.tokens[:1], sampling=each.sampling)
            run_together(decode, [again], len(each.tokens) - 1)
            assert again.tokens == each.tokens
    finally:
        counter.close()
