"""Decode steps of a GPU: the eager path in Triton's interpreter against prefill; captured graphs against the eager path on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import DecodeLimits, DecodeRow, DecodeStep, Joining
from duomo.engine.gpu_decode import GpuDecode
from duomo.wire.values import Sampling
from tests.engine.gpu_tiny import TINY, UNROUTED, TinyEngine, engine_of, joining

PROMPTS = {"A": (3, 1, 4, 1, 5), "B": (9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6), "C": (26, 43, 38, 32, 79, 50, 28, 84, 19)}
TABLES = {"A": [0, 1], "B": [5, 2, 7], "C": [4, 3]}
SPARE = [10, 11, 12]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def engine(device: torch.device) -> TinyEngine:
    return engine_of(UNROUTED if device.type == "cuda" else TINY, device, 32, 16)


class Driver:
    """Keeps one step more under way than it has waited for, as a service does, and writes down what each sequence was given."""

    def __init__(self, engine: TinyEngine, max_batch: int = 4) -> None:
        self.decode = GpuDecode(engine.decoder, engine.cache, DecodeLimits(max_batch=max_batch, max_model_tokens=48))
        self.tokens: dict[str, list[int]] = {}
        self.routed: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.int16]]]] = {}
        self._engine = engine
        self._names: Sequence[str] = ()
        self._position: dict[str, int] = {}
        self._pending: list[tuple[Sequence[str], object]] = []

    def join(self, name: str) -> Joining:
        """Prefill the prompt; its first token is what the sequence is fed."""
        ids = PROMPTS[name]
        batch = StepBatch(slices=(PromptSlice(token_ids=ids, start=0, block_table=TABLES[name]),))
        first = int(self._engine.prefill.run(batch)[1][0].argmax())
        self.tokens[name], self.routed[name], self._position[name] = [first], [], len(ids)
        return joining(ids, first)

    def step(self, *names: str) -> None:
        """Launch a step of these sequences in this order; then wait for the one before."""
        rows = []
        for name in names:
            source = self._names.index(name) if name in self._names else self.join(name)
            rows.append(DecodeRow(source=source, position=self._position[name], table=TABLES[name]))
            self._position[name] += 1
        self._pending.append((names, self.decode.launch(DecodeStep(rows=tuple(rows)))))
        self._names = names
        if len(self._pending) > 1:
            self.settle(1)

    def settle(self, num_left: int = 0) -> None:
        while len(self._pending) > num_left:
            names, pending = self._pending.pop(0)
            result = pending.wait()  # type: ignore[attr-defined]  # a PendingStep
            assert not result.errors
            for row, name in enumerate(names):
                self.tokens[name].append(int(result.token_id_R[row]))
                self.routed[name].append(result.routed_LRK[:, row])


def test_rows_that_join_move_and_leave_go_on_as_prefill_would(engine: TinyEngine) -> None:
    driver = Driver(engine)
    for names in ("A", "AB", "ABC", "CB", "C"):
        driver.step(*names)
    driver.settle()
    for name, tokens in driver.tokens.items():
        routed_LTK = engine.judge_greedy(PROMPTS[name], tokens, SPARE)[:, len(PROMPTS[name]) :]
        mine_LTK = np.stack(driver.routed[name], axis=1)
        if engine.decoder.weights.dtype != torch.float32:  # which of two scores as near as bf16's roundings is larger, nobody can say
            mine_LTK, routed_LTK = np.sort(mine_LTK), np.sort(routed_LTK)
        assert np.array_equal(mine_LTK, routed_LTK), name


def test_a_step_that_was_rehearsed_is_the_same(engine: TinyEngine) -> None:
    told = Driver(engine)
    for names in ("A", "A", "AB"):
        told.step(*names)
    told.settle()
    rehearsed = Driver(engine)
    penalised = joining(range(9), 3, Sampling(max_tokens=9, temperature=0.0, presence_penalty=0.5))
    for source, position, table in ((joining(PROMPTS["A"], 0), 5, TABLES["A"]), (penalised, 9, [20, 20]), (joining((5,), 4), 1, [21])):
        rehearsed.decode.rehearse(DecodeStep(rows=(DecodeRow(source=source, position=position, table=table),)))
    for names in ("A", "A", "AB"):
        rehearsed.step(*names)
    rehearsed.settle()
    assert rehearsed.tokens == told.tokens
    assert len(rehearsed.decode._sampler.rows._free_slots) == 4, "a slot that was rehearsed comes back"
    with pytest.raises(AssertionError, match="nobody goes on"):
        told.decode.rehearse(DecodeStep(rows=(DecodeRow(source=0, position=9, table=[0]),)))


def test_a_token_from_the_host_is_as_good_as_the_one_left_on_the_device(engine: TinyEngine) -> None:
    driver = Driver(engine)
    driver.step("A")
    driver.step("A")
    driver.settle()
    again = GpuDecode(engine.decoder, engine.cache, DecodeLimits(max_batch=4, max_model_tokens=48))
    for at, token in enumerate(driver.tokens["A"][:-1]):
        row = DecodeRow(source=joining(PROMPTS["A"], token), position=len(PROMPTS["A"]) + at, table=[0, 1])
        assert again.launch(DecodeStep(rows=(row,))).wait().token_id_R.tolist() == [driver.tokens["A"][at + 1]]


def test_rows_padded_to_a_bucket_write_nothing(engine: TinyEngine) -> None:
    driver = Driver(engine)
    first = driver.join("A")
    before = engine.cache.tensor.clone()
    rows = [DecodeRow(source=first, position=5, table=TABLES["A"])] + [
        DecodeRow(source=joining((), 7), position=0, table=[20 + at]) for at in range(2)
    ]
    driver.decode.launch(DecodeStep(rows=tuple(rows))).wait()
    changed = (engine.cache.tensor != before).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [0, 20, 21]


def test_a_row_without_finite_logits_is_an_error_and_not_a_token(engine: TinyEngine) -> None:
    driver = Driver(engine)
    first = driver.join("A")
    engine.cache.tensor[:, 9] = float("nan")
    rows = (
        DecodeRow(source=first, position=5, table=TABLES["A"]),
        DecodeRow(source=joining((1, 2), 7), position=2, table=[9]),
    )
    result = driver.decode.launch(DecodeStep(rows=rows)).wait()
    assert list(result.errors) == [1] and result.errors[1].code == "bad_logits" and not result.errors[1].retryable
    # the next step, launched before the host knew: the bad row may feed anything, the good one is untouched
    after = tuple(DecodeRow(source=at, position=row.position + 1, table=row.table) for at, row in enumerate(rows))
    second = driver.decode.launch(DecodeStep(rows=after)).wait()
    tokens = [first.token_id, int(result.token_id_R[0]), int(second.token_id_R[0])]
    engine.judge_greedy(PROMPTS["A"], tokens, SPARE)


def test_blocks_are_copied_between_two_steps(engine: TinyEngine) -> None:
    driver = Driver(engine)
    driver.step("A")
    driver.settle()
    driver.decode.enqueue_copies([(0, 13)])
    row = DecodeRow(source=0, position=6, table=[13])
    tokens = driver.tokens["A"] + driver.decode.launch(DecodeStep(rows=(row,))).wait().token_id_R.tolist()
    engine.judge_greedy(PROMPTS["A"], tokens, SPARE)
