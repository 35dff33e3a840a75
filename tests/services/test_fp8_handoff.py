"""KV handed over in fp8: fewer bytes, the very tokens of rounded KV, corruption caught, pairs that disagree refused by name."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duomo.config import DuomoConfig, TransferSection
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.runner import ModelRunner
from duomo.engine.sampler import RowSampling, Sampler
from duomo.wire.messages import RequestFailed
from duomo.wire.values import Sampling
from duomo_kernels._bounds import bound, error
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8, kv_rows_of_fp8, packed_bytes
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import Fault, FaultPlan, ScriptedFaults
from services.kv_transfer.transport import Transport
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import GREEDY, expected, ids, model, until
from tests.services.pair_rig import System, system

DRAWS = Sampling(max_tokens=9, temperature=0.9, seed=5, ignore_eos=True)


def fp8(folder: Path, transport: str = "loopback") -> DuomoConfig:
    return configuration(folder, {"kv_transfer": {"kv_dtype": "fp8_e4m3", "transport": transport, "ucx_net_devices": "lo"}})


class RoundedEngine:
    """One engine that rounds a prompt's KV as a handoff does, once the first token is chosen from what it was. Its rows are exact."""

    def __init__(self, prompt_ids: tuple[int, ...], num_tokens: int) -> None:
        self._prompt_ids = prompt_ids
        self._table = list(range(-(-(len(prompt_ids) + num_tokens) // 16)))
        self._cache = KvCache(kv_spec(model().config, 16), len(self._table))
        self._runner = ModelRunner(model(), self._cache)
        self.logits = self.fed(prompt_ids, 0)

    def fed(self, token_ids: tuple[int, ...], start: int) -> Tensor:
        """Logits behind the last of these."""
        _, logits_SV = self._runner.run(StepBatch(slices=(PromptSlice(token_ids=token_ids, start=start, block_table=self._table),)))
        return logits_SV

    def round(self) -> None:
        x_RD = self._cache.tensor.view(-1, self._cache.spec.head_dim)
        packed_P = torch.empty(packed_bytes(*x_RD.shape), dtype=torch.uint8)
        kv_rows_fp8(x_RD, packed_P)
        kv_rows_of_fp8(packed_P, x_RD)

    def generate(self, sampling: Sampling, choice: int) -> list[int]:
        tokens: list[int] = []
        logits = self.logits
        while True:
            row = RowSampling(sampling=sampling, choice=choice, prompt_ids=self._prompt_ids, output_ids=tuple(tokens))
            tokens.append(Sampler().sample(logits, [row])[0].token_id)
            if len(tokens) == sampling.max_tokens:
                return tokens
            if len(tokens) == 1:
                self.round()
            logits = self.fed((tokens[-1],), len(self._prompt_ids) + len(tokens) - 1)


@functools.cache
def rounded(prompt_ids: tuple[int, ...], sampling: Sampling = GREEDY, choice: int = 0) -> list[int]:
    torch.set_num_threads(1)
    return RoundedEngine(prompt_ids, sampling.max_tokens).generate(sampling, choice)


def played(config: DuomoConfig, faults: FaultPlan | None = None) -> dict[str, int]:
    """A pair serves prompts of odd sizes and two choices, all tokens right; decode's counters."""
    found: dict[str, int] = {}

    async def go() -> None:
        async with system(config, 1, 1, faults) as made:
            sizes = (1, 15, 16, 17, 63, 257)
            for size in sizes:
                made.start(f"r{size}", ids(size, size), GREEDY, p=0, d=0)
            made.start("n", ids(40, 9), DRAWS, p=0, d=0, choices=(0, 1))
            for size in sizes:
                await made.ended(f"r{size}", p=0, d=0)
                assert made.tokens(f"r{size}", p=0, d=0) == rounded(ids(size, size)), size
            await made.ended("n", p=0, d=0)
            for choice in (0, 1):
                assert made.tokens("n", p=0, d=0, choice=choice) == rounded(ids(40, 9), DRAWS, choice)
            await made.at_rest()
            found.update(made.decodes[0][0].report().counters)
            found["kv_pulls"] = made.prefills[0][0].report().counters.get("kv_pulls", 0)

    asyncio.run(go())
    return found


@pytest.mark.parametrize("transport", ["loopback", "nixl"])
def test_a_pair_answers_as_an_engine_whose_prompts_kv_was_rounded(tmp_path: Path, transport: str) -> None:
    counters = played(fp8(tmp_path, transport))
    spec = kv_spec(model().config, 16)
    num_blocks = sum(-(-size // 16) for size in (1, 15, 16, 17, 63, 257, 40))
    assert counters["landed_bytes"] == num_blocks * spec.num_layers * (2 * spec.num_kv_heads * 16) * (spec.head_dim + 1)
    assert counters["landed_bytes"] * 3.9 < num_blocks * spec.num_layers * spec.block_bytes, "of float32; of bf16 half as much"
    assert not counters.get("messages_corrupt") and not counters["kv_pulls"]


def test_corrupt_codes_and_exponents_are_pulled_again(tmp_path: Path) -> None:
    """Byte 5 is a code. A payload ends in exponents: 64 rows of 65 bytes a block of a layer, and two layers a group."""
    faults = ScriptedFaults({1: Fault(corrupt_byte=5), 3: Fault(corrupt_byte=2 * 64 * 65 - 1)})
    counters = played(fp8(tmp_path), faults)
    assert counters["messages_corrupt"] == 2 == counters["kv_pulls"]


def test_logits_differ_by_less_than_what_kv_was_rounded_by() -> None:
    """Of the step behind the prompt: not the same, and off by less than e4m3's own bound."""
    for size in (15, 40, 200):
        exact, off = (RoundedEngine(ids(size, size), 1) for _ in range(2))
        off.round()
        token = (int(exact.logits.argmax()),)
        wrong = error(off.fed(token, size), exact.fed(token, size).double())
        assert 0 < wrong < bound(torch.float8_e4m3fn), wrong


def test_most_tokens_are_those_of_exact_kv() -> None:
    """Of the embedded model, greedily: an argmax changes where two tokens are nearly as likely, and then what follows does."""
    prompts = [ids(size, size) for size in (1, 15, 16, 17, 63, 257)]
    same = sum(a == b for prompt in prompts for a, b in zip(rounded(prompt), expected(prompt), strict=True))
    assert same / (len(prompts) * GREEDY.max_tokens) > 0.5


def test_a_pair_that_disagrees_never_pairs_and_says_which_option(tmp_path: Path) -> None:
    """The pool that is told later, or not at all."""

    def agent(boot_id: str, transport: Transport, section: TransferSection, num_send_slots: int) -> TransferAgent:
        is_decode = num_send_slots == 1
        told = section.model_copy(update={"kv_dtype": "model"}) if is_decode else section
        return TransferAgent(boot_id, transport, told, num_send_slots=num_send_slots)

    def failures(made: System) -> list[RequestFailed]:
        return made.prefills[0][1].of(RequestFailed)

    async def go() -> None:
        async with system(fp8(tmp_path), 1, 1, make_agent=agent) as made:
            for number in range(2):  # the second meets a peer that is known to differ
                made.start(f"r{number}", ids(20), GREEDY, p=0, d=0)
                await until(lambda: len(failures(made)) == number + 1)  # noqa: B023 - awaited before the next round
            for failure in failures(made):
                assert (failure.code, failure.phase, failure.retryable) == ("kv_dtype_mismatch", "kv.handoff", True)
                assert "kv_transfer.kv_dtype is fp8_e4m3 in prefill and model in decode: both need the same" in failure.detail
            made.decodes[0][1].cancel("r0")
            made.decodes[0][1].cancel("r1")
            await made.at_rest()

    asyncio.run(go())
