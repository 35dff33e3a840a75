"""Requests to services over a GPU's engine, and what the engine alone answers. Knows no layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.config import KvDtype
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import DecodeRow, DecodeStep, Joining
from duomo.engine.gpu_engine import GpuEngine
from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.engine.sampler import RowSampling, SampledToken, ending_ids
from duomo.grammar.cache import TOKENIZER, compiled
from duomo.grammar.state import GrammarState
from duomo.models.config import ModelConfig
from duomo.wire.values import Sampling
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8, kv_rows_of_fp8, packed_bytes
from tests.engine.gpu_tiny import TINY
from tests.services.decode.scripted_peers import model
from tests.services.pair_rig import System


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    choices: tuple[int, ...] = (0,)


def known(config: ModelConfig) -> ModelConfig:
    """By the fingerprint that scripted gateways serve."""
    return replace(config, fingerprint=model().config.fingerprint)


def alone(
    engine: GpuEngine, asked: Asked, choice: int, num_tokens: int, kv_dtype: KvDtype = "model", folder: Path | None = None
) -> list[int]:
    """So many tokens of one choice, by the engine without services; nobody else may hold blocks. kv_dtype: of a handoff after the
    first one. folder: where the tokenizer lies, for constraints."""
    ids, block_tokens = asked.prompt_ids, engine.plan.block_tokens
    table = range(-(-(len(ids) + num_tokens) // block_tokens))
    ends = ending_ids(asked.sampling, engine.prefill.decoder.config.eos_ids)
    state = _grammar_state(engine, asked.sampling, folder)
    row = RowSampling(sampling=asked.sampling, choice=choice, prompt_ids=ids, output_ids=(), ending_ids=ends, grammar=state)

    def fill(masks_MW: NDArray[np.int32]) -> None:
        assert state is not None and len(masks_MW) == 1
        state.fill(masks_MW[0], tokens)

    _, logits = engine.prefill.run(StepBatch(slices=(PromptSlice(token_ids=ids, start=0, block_table=table),)))
    (first,) = engine.first_tokens.sample(logits, [row])
    assert isinstance(first, SampledToken)
    if kv_dtype == "fp8_e4m3":
        _round(engine.cache, table)
    tokens = [first.token_id]
    source: int | Joining = Joining(token_id=first.token_id, sampling=replace(row, output_ids=tuple(tokens)))
    while len(tokens) < num_tokens:
        step = DecodeStep(rows=(DecodeRow(source=source, position=len(ids) + len(tokens) - 1, table=table),))
        tokens.append(int(engine.decode.launch(step, fill).wait().token_id_R[0]))
        source = 0
    return tokens


def _grammar_state(engine: GpuEngine, sampling: Sampling, folder: Path | None) -> GrammarState | None:
    if sampling.constraint is None:
        return None
    assert folder is not None, "a constraint needs a tokenizer"
    config = engine.prefill.decoder.config
    return compiled((folder / TOKENIZER, config.vocab, config.eos_ids), sampling.constraint).state(sampling)


def _round(cache: GpuKvCache, blocks: range) -> None:
    """What landing in fp8 makes of these blocks."""
    rows_RD = cache.tensor[:, : blocks.stop].reshape(-1, cache.spec.head_dim).cpu()
    packed_P, rounded_RD = torch.empty(packed_bytes(*rows_RD.shape), dtype=torch.uint8), torch.empty(rows_RD.shape)
    kv_rows_fp8(rows_RD, packed_P)
    kv_rows_of_fp8(packed_P, rounded_RD)
    cache.tensor[:, : blocks.stop] = rounded_RD.view(cache.tensor[:, : blocks.stop].shape).to(cache.tensor)


async def serve(system: System, asked: Sequence[Asked]) -> dict[tuple[int, int], list[int]]:
    """All at once; tokens by request and choice."""
    for number, each in enumerate(asked):
        system.start(f"r{number}", each.prompt_ids, each.sampling, p=0, d=0, choices=each.choices)
    for number in range(len(asked)):
        await system.ended(f"r{number}", p=0, d=0)
    return {
        (number, choice): system.tokens(f"r{number}", p=0, d=0, choice=choice)
        for number, each in enumerate(asked)
        for choice in each.choices
    }


def judge(
    engine: GpuEngine, asked: Sequence[Asked], tokens: dict[tuple[int, int], list[int]], every: int = 1, folder: Path | None = None
) -> None:
    for (number, choice), mine in list(tokens.items())[::every]:
        each = asked[number]
        assert mine == alone(engine, each, choice, len(mine), folder=folder), (number, choice, each.sampling)
        is_stop = (not each.sampling.ignore_eos or each.sampling.constraint is not None) and mine[-1] in TINY.eos_ids
        assert len(mine) == each.sampling.max_tokens or is_stop


def prompt(length: int, seed: int, vocab: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randrange(3, vocab) for _ in range(length))
