"""The CPU engine's chunks and pieces: any walk of a wave's grid gives the same bytes, counts and bytes read; nothing is quadratic."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.runner import BoundaryState, ModelRunner
from duomo.models.qwen3_moe import Model
from tests.engine.grid_walks import Cell, chunked, drawn, layered

TOKENS = torch.randint(3, 8192, (700,), generator=torch.Generator().manual_seed(5)).tolist()
LAYERS = 8


def waves() -> list[StepBatch]:
    """Several prompts of odd lengths, one of them behind cached keys (of zeros: nobody wrote them), and one long prompt alone."""
    table = torch.randperm(90, generator=torch.Generator().manual_seed(6)).tolist()
    several = (
        PromptSlice(token_ids=TOKENS[:1], start=0, block_table=table[:1]),
        PromptSlice(token_ids=TOKENS[:63], start=0, block_table=table[1:6]),
        PromptSlice(token_ids=TOKENS[40:97], start=40, block_table=table[6:13]),
        PromptSlice(token_ids=TOKENS[:17], start=0, block_table=table[13:15]),
    )
    return [StepBatch(slices=several), StepBatch(slices=(PromptSlice(token_ids=TOKENS[:257], start=0, block_table=table[20:40]),))]


def walked(
    model: Model, batch: StepBatch, chunk_tokens: int | None, walk: Iterable[Cell] | None = None
) -> tuple[BoundaryState, Tensor, Tensor]:
    """State, logits of every row, KV."""
    runner = ModelRunner(model, KvCache(kv_spec(model.config), 100))
    state = runner.begin(batch, chunk_tokens, keeps_routed=True)
    for (lo, hi), chunks in layered(LAYERS, state.num_chunks, LAYERS) if walk is None else walk:
        runner.run_layers(lo, hi, state, chunks)
    return state, runner.logits(state, list(range(batch.num_rows))), runner.cache.tensor


@pytest.mark.parametrize("chunk_tokens", [1, 16, 63, 100])
@pytest.mark.parametrize("wave", [0, 1])
def test_every_walk_of_the_grid_gives_the_same_bytes(model: Model, wave: int, chunk_tokens: int) -> None:
    """Chunked and whole too, since this engine's rows know neither their chunk nor their company."""
    assert model.is_row_exact
    batch, made = waves()[wave], random.Random(chunk_tokens)
    whole, logits, kv = walked(model, batch, None)
    num_chunks = -(-batch.num_rows // chunk_tokens)
    walks = [layered(LAYERS, num_chunks), layered(LAYERS, num_chunks, 3), chunked(LAYERS, num_chunks), drawn(LAYERS, num_chunks, made)]
    for walk in walks[:1] if chunk_tokens == 1 else walks:
        state, their_logits, their_kv = walked(model, batch, chunk_tokens, walk)
        assert state.num_chunks == num_chunks and state.next_layer == LAYERS
        assert torch.equal(their_logits, logits) and torch.equal(their_kv, kv)
        assert torch.equal(state.expert_counts, whole.expert_counts)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(state.routed_ids, whole.routed_ids, strict=True))


@pytest.mark.parametrize("chunk_tokens", [None, 16, 100])
def test_expert_bytes_are_those_of_each_chunks_distinct_experts(model: Model, chunk_tokens: int | None) -> None:
    """Read from the ids themselves: each chunk reads an expert of a layer once."""
    batch, experts = waves()[0], model.layers[0].experts
    state, _, _ = walked(model, batch, chunk_tokens)
    step = batch.num_rows if chunk_tokens is None else chunk_tokens
    distinct = sum(
        len(set(ids_TK[lo : lo + step].flatten().tolist())) for ids_TK in state.routed_ids for lo in range(0, batch.num_rows, step)
    )
    one = 4 * 3 * model.config.hidden * model.config.expert_hidden  # float32: gate, up and down
    assert experts.expert_bytes == one and state.expert_bytes == distinct * one
    use = state.expert_use()
    assert (use.counts_SLE.dtype, use.counts_SLE.is_contiguous(), use.bytes_read) == (torch.int32, True, state.expert_bytes)


def test_counts_are_each_prompts_own(model: Model) -> None:
    batch = waves()[0]
    state, _, _ = walked(model, batch, 50)
    row = 0
    for prompt, part in enumerate(batch.slices):
        rows = slice(row, row + len(part.token_ids))
        for layer, ids_TK in enumerate(state.routed_ids):
            assert torch.equal(state.expert_counts[prompt, layer], torch.bincount(ids_TK[rows].flatten(), minlength=16).int())
        row = rows.stop


def test_a_walk_out_of_order_is_refused(model: Model) -> None:
    runner = ModelRunner(model, KvCache(kv_spec(model.config), 100))
    state = runner.begin(waves()[1], 100)
    with pytest.raises(AssertionError, match="chunk 0 has not run layer 0"):
        runner.run_layers(0, 1, state, (1, 2))
    runner.run_layers(0, 4, state, (0, 2))
    with pytest.raises(AssertionError, match="chunk 2 runs layer 0 next, not 4"):
        runner.run_layers(4, 8, state)
    with pytest.raises(AssertionError):
        runner.logits(state, [256])


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships no types for it
    """The most elements that any operation's result has, where it is not a view of what the operation was given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch ships no types for it
        self.numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, each.numel())
        return result


def largest_of(model: Model, num_tokens: int, chunk_tokens: int) -> int:
    """While the first two layers of a prompt of so many tokens run, of a model that may be asked for 131,072."""
    config = replace(model.config, max_position_tokens=131072)
    long = Model(config, model.embed_VD, model.layers, model.norm_D, model.lm_head_DV)
    runner = ModelRunner(long, KvCache(kv_spec(config), -(-num_tokens // 16)))
    token_ids = (TOKENS * -(-num_tokens // len(TOKENS)))[:num_tokens]
    batch = StepBatch(slices=(PromptSlice(token_ids=token_ids, start=0, block_table=range(runner.cache.num_blocks)),))
    with Largest() as seen:
        state = runner.begin(batch, chunk_tokens)
        runner.run_layers(0, 1, state)
        runner.run_layers(1, 2, state)
    assert (state.expert_counts[0, :2].sum(-1) == num_tokens * config.top_k).all()
    return int(seen.numel)


def test_nothing_grows_faster_than_a_long_prompt(model: Model) -> None:
    """Rows, keys, and the scores of some queries at a time: all in proportion to its tokens, none with their square."""
    short, long = (largest_of(model, num_tokens, 256) for num_tokens in (1024, 4096))
    assert short == 128 * model.config.num_heads * 1024, "the scores of the last queries are what is largest"
    assert long == 4 * short


def test_a_long_prompt_is_the_same_in_chunks(model: Model) -> None:
    """1,500 tokens, as a whole and in chunks of 512, layer group by layer group."""
    batch = StepBatch(slices=(PromptSlice(token_ids=(TOKENS * 3)[:1500], start=0, block_table=range(94)),))
    _, logits, kv = walked(model, batch, None)
    _, their_logits, their_kv = walked(model, batch, 512, layered(LAYERS, 3, 2))
    assert torch.equal(their_logits, logits) and torch.equal(their_kv, kv)
