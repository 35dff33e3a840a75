"""An engine for one service alone: it plans for that one, has what that one runs, and nothing of the other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.card_shares import CONTEXT_BYTES, share_of
from duomo.engine.decode_step import DecodeRow, DecodeStep
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.memory_plan import DeviceBytes, EnginePart, MemoryLimits, plan_memory
from duomo.engine.startup import Startup
from duomo.errors import ConfigError
from duomo.models.gpu_random import random_gpu_weights
from tests.engine.gpu_tiny import TINY, joining
from tests.interpreter import prepare

prepare()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
CPU = torch.device("cpu")
ROOM = DeviceBytes(total=40_000_000, free=40_000_000)
LIMITS = MemoryLimits(max_batch=4, max_wave_tokens=64, max_model_tokens=64, block_tokens=16, dtype_bytes=4)


def started(part: EnginePart) -> GpuEngine:
    load = partial(random_gpu_weights, TINY, device=CPU, dtype=torch.float32, std=0.125)
    engine = start_engine(
        EngineStart(config=TINY, load=load, limits=replace(LIMITS, part=part), device=CPU, memory=ROOM, is_shared=True), Startup()
    )
    engine.compilations.close()
    return engine


def test_a_pair_of_engines_answers_as_one_that_is_both() -> None:
    """KV of the one's pool in the other's, as a handoff leaves it."""
    both, prefill, decode = started("both"), started("prefill"), started("decode")
    ids, table = (5, 6, 7, 8, 9), (2,)
    batch = StepBatch(slices=(PromptSlice(token_ids=ids, start=0, block_table=table),))
    _, logits = both.prefill.run(batch)
    _, of_prefill = prefill.prefill.run(batch)
    assert torch.equal(logits, of_prefill)
    decode.cache.tensor[:, 3].copy_(prefill.cache.tensor[:, 2])
    token = int(logits[0].argmax())
    answers = []
    for engine, block in ((both, 2), (decode, 3)):
        step = DecodeStep(rows=(DecodeRow(source=joining(ids, token), position=len(ids), table=(block,)),))
        answers.append(int(engine.decode.launch(step).wait().token_id_R[0]))
    assert answers[0] == answers[1]


def test_each_part_has_nothing_of_the_other() -> None:
    with pytest.raises(AssertionError, match="for prefill alone"):
        assert started("prefill").decode
    decode = started("decode")
    for name in ("prefill", "first_tokens"):
        with pytest.raises(AssertionError, match="for decode alone"):
            getattr(decode, name)


def test_a_part_leaves_more_room_than_both_and_a_share_less_than_a_card() -> None:
    card = DeviceBytes(total=100_000_000_000, free=99_000_000_000)
    blocks = {part: plan_memory(TINY, card, replace(LIMITS, part=part)).num_blocks for part in ("both", "prefill", "decode")}
    assert blocks["prefill"] > blocks["both"] and blocks["decode"] > blocks["both"]
    half = share_of(card, 0.5)
    assert (half.total, half.free) == (50_000_000_000, 50_000_000_000 - CONTEXT_BYTES)
    assert plan_memory(TINY, half, LIMITS).num_blocks < blocks["both"]


def test_a_share_too_small_is_refused_with_words_of_its_part() -> None:
    nothing = share_of(DeviceBytes(total=1_000_000_000, free=1_000_000_000), 0.5)
    with pytest.raises(ConfigError, match=r"needed \(64 tokens of one sequence\)") as caught:
        plan_memory(TINY, nothing, replace(LIMITS, part="prefill"))
    assert "max_batch" not in caught.value.detail
    with pytest.raises(ConfigError, match="4 sequences of 2 blocks"):
        plan_memory(TINY, nothing, replace(LIMITS, part="decode"))
