"""The runner: the same bytes in any company, by any cut; units; expert counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.runner import ModelRunner
from duomo.models.qwen3_moe import Model
from duomo_kernels.row_gemm import RowGemm

TOKENS = torch.randint(3, 8192, (400,), generator=torch.Generator().manual_seed(5)).tolist()
TABLE = torch.randperm(90, generator=torch.Generator().manual_seed(6)).tolist()[:26]


def runner_of(model: Model) -> ModelRunner:
    return ModelRunner(model, KvCache(kv_spec(model.config), 200))


def part(lo: int, hi: int, table: list[int] = TABLE, tokens: list[int] = TOKENS) -> PromptSlice:
    return PromptSlice(token_ids=tokens[lo:hi], start=lo, block_table=table)


def kv_of(runner: ModelRunner, num_tokens: int, table: list[int] = TABLE) -> Tensor:
    """Keys and values of the first tokens, [layers, 2, heads, tokens, dim]."""
    blocks = runner.cache.tensor[:, table]
    return blocks.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :num_tokens].clone()


@pytest.fixture(scope="module")
def whole(model: Model) -> tuple[Tensor, Tensor]:
    """Logits of every position and the KV, from one prefill of 300 tokens."""
    torch.set_num_threads(1)
    runner = runner_of(model)
    state = runner.run_layers(0, 8, runner.begin(StepBatch(slices=(part(0, 300),))))
    return runner.logits(state, list(range(300))), kv_of(runner, 300)


@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 15, 16, 17, 63, 129, 257]),
    others=st.lists(st.tuples(st.integers(0, 120), st.integers(1, 40)), max_size=4),
    data=st.data(),
)
def test_bytes_do_not_depend_on_company_or_cuts(
    model: Model, whole: tuple[Tensor, Tensor], num_tokens: int, others: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Prefilled in drawn chunks, at a drawn place among other sequences, the last tokens one by one: logits and KV as in one prefill."""
    logits, kv = whole
    runner = runner_of(model)
    cuts = sorted({0, num_tokens, max(num_tokens - 2, 0), *data.draw(st.lists(st.integers(0, num_tokens), max_size=3))})
    company = [
        PromptSlice(token_ids=TOKENS[start : start + count], start=start, block_table=[100 + 11 * at + block for block in range(11)])
        for at, (start, count) in enumerate(others)
    ]
    for lo, hi in zip(cuts, cuts[1:], strict=False):
        place = data.draw(st.integers(0, len(company)))
        batch = StepBatch(slices=(*company[:place], part(lo, hi), *company[place:]))
        _, last = runner.run(batch)
        assert torch.equal(last[place], logits[hi - 1]), f"logits after token {hi} of cuts {cuts}"
    assert torch.equal(kv_of(runner, num_tokens), kv[:, :, :, :num_tokens])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 15, 16, 17, 33])
def test_decode_is_the_same_in_every_batch(model: Model, whole: tuple[Tensor, Tensor], batch_size: int) -> None:
    logits, _ = whole
    runner = runner_of(model)
    runner.run(StepBatch(slices=(part(0, 200),)))
    company = [PromptSlice(token_ids=[at + 3], start=at * 3, block_table=[100 + at] * 8) for at in range(batch_size - 1)]
    for place in {0, batch_size // 2, batch_size - 1}:
        _, last = runner.run(StepBatch(slices=(*company[:place], part(200, 201), *company[place:])))
        assert torch.equal(last[place], logits[200])


def test_padding_of_the_context_and_stale_blocks_do_not_matter(model: Model, whole: tuple[Tensor, Tensor]) -> None:
    runner = runner_of(model)
    runner.cache.tensor.normal_()  # what other sequences left behind
    runner.run(StepBatch(slices=(part(0, 100),)))
    long = PromptSlice(token_ids=[5], start=250, block_table=list(range(100, 116)))  # the same bucket, far longer
    _, last = runner.run(StepBatch(slices=(long, part(100, 101))))
    assert torch.equal(last[1], whole[0][100])


def test_tiles_give_one_result_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for machines whose BLAS is no chain: slower, close to it, and as exact by row."""
    chain = runner_of(model).run(StepBatch(slices=(part(0, 40),)))[1]
    monkeypatch.setattr(model, "gemm", RowGemm(is_chain=False))
    runner = runner_of(model)
    _, once = runner.run(StepBatch(slices=(part(0, 40),)))
    assert torch.allclose(once, chain, atol=1e-3)
    other = PromptSlice(token_ids=TOKENS[50:83], start=0, block_table=[100, 101, 102])
    runner.run(StepBatch(slices=(other, part(0, 17))))
    runner.run(StepBatch(slices=(part(17, 39),)))
    _, last = runner.run(StepBatch(slices=(part(39, 40),)))
    assert torch.equal(last[0], once[0])


@pytest.mark.parametrize("bounds", [[0, 8], [0, 1, 8], [0, 2, 4, 6, 8]])
def test_units(model: Model, whole: tuple[Tensor, Tensor], bounds: list[int]) -> None:
    runner = runner_of(model)
    state = runner.begin(StepBatch(slices=(part(0, 63),)))
    for lo, hi in zip(bounds, bounds[1:], strict=False):
        state = runner.run_layers(lo, hi, state)
    assert torch.equal(runner.logits(state, [62])[0], whole[0][62])


def test_two_steps_may_be_under_way_at_once(model: Model, whole: tuple[Tensor, Tensor]) -> None:
    runner = runner_of(model)
    first = runner.run_layers(0, 4, runner.begin(StepBatch(slices=(part(0, 63),))))
    other = PromptSlice(token_ids=TOKENS[:17], start=0, block_table=[150, 151])
    _, logits = runner.run(StepBatch(slices=(other,)))
    assert torch.equal(logits[0], whole[0][16])
    assert torch.equal(runner.logits(runner.run_layers(4, 8, first), [62])[0], whole[0][62])


def test_layers_run_in_order(model: Model) -> None:
    runner = runner_of(model)
    state = runner.begin(StepBatch(slices=(part(0, 3),)))
    with pytest.raises(AssertionError):
        runner.run_layers(1, 2, state)
    with pytest.raises(AssertionError):
        runner.logits(state, [0])


def test_expert_counts(model: Model) -> None:
    runner = runner_of(model)
    other = PromptSlice(token_ids=[9], start=0, block_table=[150])
    state = runner.begin(StepBatch(slices=(part(0, 17), other)))
    runner.run_layers(0, 5, state)
    counts = state.expert_counts
    assert counts.shape == (2, 8, 16) and not counts[:, 5:].any()
    assert (counts[0, :5].sum(-1) == 17 * 4).all() and (counts[1, :5].sum(-1) == 4).all() and counts[1].max() == 1
    alone = runner.run_layers(0, 5, runner.begin(StepBatch(slices=(other,)))).expert_counts
    assert torch.equal(alone[0], counts[1])


def test_no_rows_no_logits(model: Model) -> None:
    runner = runner_of(model)
    state = runner.run_layers(0, 8, runner.begin(StepBatch(slices=(part(0, 3),))))
    assert runner.logits(state, []).shape == (0, 8192)


@pytest.mark.slow
def test_a_second_torch_thread_changes_nothing(model: Model, whole: tuple[Tensor, Tensor]) -> None:
    torch.set_num_threads(2)
    runner = runner_of(model)
    state = runner.run_layers(0, 8, runner.begin(StepBatch(slices=(part(0, 300),))))
    assert torch.equal(runner.logits(state, list(range(300))), whole[0])
