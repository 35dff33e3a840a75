"""The peer's side of `duomo bench engine` without vLLM: an engine of its shape that plays waves and steps, and the weights it is given."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.engine.engine_cases import MAX_TOKENS, EngineCase, Job, Mode, Part
from bench.engine.engine_vllm import LOAD_FORMAT, measure_job
from duomo.models.config import Fp8Blocks
from duomo_kernels._weights import dequantised

VOCAB = 500
LAYERS, TOP_K = 3, 2


@dataclass
class Request:
    """One sequence of the played engine."""

    name: str
    length: int
    left: int
    first_routed: int
    params: Any
    tokens: list[int] = field(default_factory=list)


class PlayedEngine:
    """Prefills whole prompts, as many as a wave holds, and gives every prefilled sequence a token in each step; first an empty output."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=4000, block_size=16))
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCAB)
        self.engine_core = SimpleNamespace(get_output=self._get_output, shutdown=lambda: None)
        self.calls: list[tuple[Any, ...]] = []
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._is_ahead = False

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        assert prompt["type"] == "token" and max(prompt["prompt_token_ids"]) < VOCAB
        length = len(prompt["prompt_token_ids"])
        self._waiting.append(Request(name, length, params.max_tokens, params.routed_experts_prompt_start, params))
        self._is_ahead = False

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[Any]:
        self.engine_core.get_output()
        finished = [one for one in self._running if not one.left]
        self._running = [one for one in self._running if one.left]
        return [self._answer(one) for one in finished]

    def _get_output(self) -> Any:
        if not self._is_ahead:
            self._is_ahead = True
            return SimpleNamespace(outputs=[])
        room = MAX_TOKENS
        while self._waiting and self._waiting[0].length <= room:
            room -= self._waiting[0].length
            self._running.append(self._waiting.pop(0))
        for one in self._running:
            one.left -= 1
            one.tokens.append(len(one.tokens))
        return SimpleNamespace(outputs=[SimpleNamespace(new_token_ids=[0]) for _ in self._running])

    def _answer(self, one: Request) -> Any:
        rows = one.length - one.first_routed + len(one.tokens) - 1
        routed = np.zeros((rows, LAYERS, TOP_K), dtype=np.uint8)
        routed[:, :, 1] = 1 + int(one.name) % 2
        return SimpleNamespace(
            request_id=one.name,
            finished=True,
            outputs=[
                SimpleNamespace(token_ids=one.tokens, routed_experts=routed if self.settings.get("enable_return_routed_experts") else None)
            ],
        )


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[PlayedEngine]:
    """The engines that were asked for."""
    made: list[PlayedEngine] = []

    def llm(**settings: Any) -> Any:
        logging.getLogger("vllm.v1.worker").warning("Graph capturing finished in %.0f secs, took %.2f GiB", 9, 0.5)
        made.append(PlayedEngine(settings))
        calls = made[-1].calls
        return SimpleNamespace(llm_engine=made[-1], collective_rpc=lambda method, args: calls.append((method, *args)))

    def module(name: str, **members: Any) -> None:
        found = ModuleType(name)
        vars(found).update(members)
        monkeypatch.setitem(sys.modules, name, found)

    module("vllm", LLM=llm, SamplingParams=lambda **given: SimpleNamespace(**given), __version__="0.24.0")
    module("vllm.inputs", tokens_input=lambda ids: {"type": "token", "prompt_token_ids": ids})
    module("vllm.sampling_params", RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_DEEP_GEMM", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "unset")
    return made


Run = Callable[..., Part]  # (mode, *cases)


@pytest.fixture
def run(played: list[PlayedEngine], tmp_path: Path) -> Run:
    def one(mode: Mode, *cases: EngineCase) -> Part:
        part = Part(job=Job(mode=mode, model="olmoe", dtype="bf16", cases=cases, repeats=3, budget_s=60), facts={})
        measure_job(part.job, part, tmp_path / "part.json", deadline_s=float("inf"))
        return part

    return one


def test_every_case_is_timed_from_its_core_outputs(run: Run, played: list[PlayedEngine]) -> None:
    cases = (
        EngineCase(phase="decode", batch=1, tokens=1024),
        EngineCase(phase="decode", batch=40, tokens=1024),
        EngineCase(phase="prefill", batch=2, tokens=64),
        EngineCase(phase="decode", batch=256, tokens=1024),
    )
    part = run("vllm_own_process", *cases)
    assert [one.case for one in part.results] == list(cases[:3])
    timings = [one.timing for one in part.results]
    assert [timing.repeats for timing in timings if timing is not None] == [64, 64, 3]
    # the timed steps come after few others: those of ours, which come after lead_steps, have as many keys or more
    for one in part.results[:2]:
        assert one.context is not None and 1024 + 32 < one.context <= 1024 + one.case.lead_steps + 32.5
    assert part.left_out == ["vllm_own_process olmoe bf16 decode 256 x 1024: 285,184 tokens of KV needed, 64,000 there"]
    assert part.first_tokens is not None and part.first_tokens.token_ids == (0,) * 16
    assert part.facts["vllm_graphs"] == "Graph capturing finished in 9 secs, took 0.50 GiB"
    assert part.facts["vllm"] == "0.24.0" and part.facts["vllm_settings"]["load_format"] == LOAD_FORMAT
    assert played[0].settings["model"] and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_routing_is_spread_and_drawn_back_by_the_worker(run: Run, played: list[PlayedEngine]) -> None:
    drawn = EngineCase(phase="prefill", batch=1, tokens=64)
    run("vllm_in_process", drawn, replace(drawn, routing="spread"), replace(drawn, routing="spread", tokens=32), drawn)
    assert played[0].calls == [("scale_embedding", 64.0), ("scale_embedding", 1 / 64.0)]


def test_the_worker_scales_the_embedding_alone(worker: ModuleType) -> None:
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 3), "lm_head": torch.nn.Linear(3, 5)})
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    made = type("Worker", (worker.RandomWeights,), {"get_model": lambda self: model})()
    made.scale_embedding(64.0)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name] * (64.0 if name == "embed_tokens.weight" else 1.0))


def test_experts_are_counted_where_they_are_returned(run: Run, played: list[PlayedEngine]) -> None:
    decode, wave = EngineCase(phase="decode", batch=3, tokens=70), EngineCase(phase="prefill", batch=2, tokens=64)
    part = run("vllm_count", decode, wave)
    assert [(one.timing, one.distinct) for one in part.results] == [(None, 3.0), (None, 3.0)]
    assert played[0].settings["async_scheduling"] is False


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vllm_worker, as vLLM's worker imports it."""
    registered: dict[str, type] = {}
    loaders, base = ModuleType("vllm.model_executor.model_loader"), ModuleType("vllm.model_executor.model_loader.base_loader")
    vars(loaders).update(register_model_loader=lambda name: lambda kind: registered.setdefault(name, kind), registered=registered)
    vars(base).update(BaseModelLoader=object)
    for found in (ModuleType("vllm"), ModuleType("vllm.model_executor"), loaders, base):
        monkeypatch.setitem(sys.modules, found.__name__, found)
    monkeypatch.delitem(sys.modules, "bench.engine.vllm_worker", raising=False)
    import bench.engine.vllm_worker as found_worker

    assert list(registered) == [LOAD_FORMAT]
    return found_worker


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_peer_is_given_our_weights(worker: ModuleType, is_fp8: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the GPU's weights name kernels' types")
    from duomo.models.gpu_random import random_gpu_weights
    from tests.engine.gpu_tiny import TINY

    config = replace(TINY, hidden=256, num_heads=8, num_kv_heads=4, head_dim=32, expert_hidden=128)
    device, half = torch.device("cpu"), torch.bfloat16
    ours = random_gpu_weights(config, device=device, dtype=half, quantise="fp8" if is_fp8 else None)
    theirs_config = replace(config, quantisation=Fp8Blocks(block=(128, 128))) if is_fp8 else config
    monkeypatch.setattr(worker, "load_config", lambda folder, needs_weights: theirs_config)
    theirs = dict(worker.named_tensors(tmp_path, device))

    def wide(name: str) -> torch.Tensor:
        found: torch.Tensor = theirs[name].double()
        if not is_fp8:
            return found
        scale: torch.Tensor = theirs[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1).double()
        return torch.mul(found, scale[: found.shape[0], : found.shape[1]])

    layer = ours.layers[1]
    gate_up_EFD, down_EDF = dequantised(layer.experts)
    at = "model.layers.1"
    for expert in range(config.num_experts):
        parts = [wide(f"{at}.mlp.experts.{expert}.{name}_proj.weight") for name in ("gate", "up")]
        assert torch.equal(gate_up_EFD[expert].double(), torch.cat(parts))
        assert torch.equal(down_EDF[expert].double(), wide(f"{at}.mlp.experts.{expert}.down_proj.weight"))
    heads = torch.cat([wide(f"{at}.self_attn.{name}_proj.weight") for name in "qkv"])
    scale_nk = layer.qkv.scale_nk
    mine = layer.qkv.weight_NK.double()
    mine = mine if scale_nk is None else mine * scale_nk.repeat_interleave(128, 0).repeat_interleave(128, 1)[: mine.shape[0]].double()
    assert torch.equal(mine, heads)
    assert layer.router_ED is not None and torch.equal(layer.router_ED, theirs[f"{at}.mlp.gate.weight"])
    assert torch.equal(ours.embed_VD, theirs["model.embed_tokens.weight"]) and torch.equal(ours.head_VD, theirs["lm_head.weight"])
    assert {tensor.dtype for name, tensor in theirs.items() if not name.endswith("_inv")} == (
        {half, torch.float8_e4m3fn} if is_fp8 else {half}
    )
