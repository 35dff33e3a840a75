"""Owns what `duomo bench engine` and `duomo bench prefill` measure: models, cases, prompts, jobs, what a child writes. Knows no engine.

A decode case is a batch of sequences at a context; a prefill case is a wave of prompts up to the first token of each, computed in one of
three ways (docs/decisions/0008-layered-prefill.md). Prompts are random token ids drawn from the case's name without its way and routing, so
that both engines and all ways get the same.

Where all weights are drawn alike ("drawn"), what attention adds is much the same for all positions of a prompt, and outgrows the tokens'
own small embeddings: the router then sends all tokens of one prompt to few experts. With embeddings EMBEDDING_SCALE times as large
("spread") rows stay their own, and a prompt uses the experts that a uniform router would.

A job is one child process: one side, one mode, one model in one format. It writes a Part as JSON after each case, so that what an
interrupted run had measured is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench.engine.arrivals_cases import LoadResult, load_result_from_json
from bench.gpu_stopwatch import Timing

Phase = Literal["decode", "prefill"]
Way = Literal["whole", "layered", "chunked"]
Routing = Literal["drawn", "spread"]
Dtype = Literal["bf16", "fp8"]
Mode = Literal[
    "ours", "ours_deterministic", "ours_arrivals", "vllm_in_process", "vllm_own_process", "vllm_extended", "vllm_count"
]  # fmt: skip
OUR_MODES: tuple[Mode, ...] = ("ours", "ours_deterministic", "ours_arrivals")
VLLM_MODES: tuple[Mode, ...] = ("vllm_in_process", "vllm_count", "vllm_own_process", "vllm_extended")
MODES: tuple[Mode, ...] = (*OUR_MODES, *VLLM_MODES)
TIMED_PEERS = ("vllm_in_process", "vllm_own_process", "vllm_extended")
SHIPPED_PEERS = ("vllm_in_process", "vllm_own_process")
DTYPES: tuple[Dtype, ...] = ("bf16", "fp8")

MODELS_FOLDER = Path(__file__).resolve().parent / "models"
MODELS: Mapping[str, str] = {"olmoe": "olmoe-1b-7b", "qwen3": "qwen3-30b-a3b"}
SEED = 0
STD = 0.02
MAX_TOKENS = 16384  # of a wave; positions of every model are raised to it: OLMoE is published with 4,096
CHUNK_TOKENS = 512  # of the chunked way: what servers that chunk prompts usually take, and as many rows as our graphs have a bucket for
PIECES = 4  # of the layered way: the layer groups of a configuration that names none
EMBEDDING_SCALE = 64.0  # a power of two: put on and taken off in bf16 without a rounding
DECODE_STEPS = 64  # timed
LEAD_STEPS = 6  # before them
CHECK_PROMPTS, CHECK_LENGTH, CHECK_STEPS = 16, 64, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCase:
    """`batch` sequences of `tokens` tokens each: decoded from there on, or prefilled. way: of a prefill of ours."""

    phase: Phase
    batch: int
    tokens: int
    way: Way = "whole"
    routing: Routing = "drawn"

    @property
    def name(self) -> str:
        return self.wave_name + ("" if self.way == "whole" else f" {self.way}")

    @property
    def wave_name(self) -> str:
        """The same for all ways."""
        return self.prompts_name + ("" if self.routing == "drawn" else f" {self.routing}")

    @property
    def prompts_name(self) -> str:
        """The same for all ways and routings of one wave."""
        return f"{self.phase} {self.batch} x {self.tokens}"

    @property
    def step_tokens(self) -> int:
        """Rows of one step."""
        return self.batch if self.phase == "decode" else self.batch * self.tokens

    @property
    def num_waves(self) -> int:
        """Steps that the prompts take where a wave holds MAX_TOKENS."""
        return -(-self.batch * self.tokens // MAX_TOKENS)

    @property
    def lead_steps(self) -> int:
        """Decode steps before the timed ones: a peer that mixes waves with decode has its first prompts this far ahead of its last."""
        return self.num_waves + LEAD_STEPS

    @property
    def last_tokens(self) -> int:
        """Tokens of a sequence when the case ends."""
        return self.tokens + (self.lead_steps + DECODE_STEPS + 4 if self.phase == "decode" else 1)


DECODE = tuple(
    EngineCase(phase="decode", batch=batch, tokens=tokens)
    for batch, tokens in ((1, 1024), (32, 1024), (64, 1024), (16, 1024), (128, 1024), (8, 1024), (256, 1024), (32, 4096), (1, 4096))
)
PREFILL = tuple(
    EngineCase(phase="prefill", batch=batch, tokens=tokens)
    for batch, tokens in ((1, 1024), (1, 2048), (1, 640), (1, 128), (1, 512), (16, 1024), (1, 8192), (1, 32))
)
CASES = DECODE + PREFILL


def prompts(case: EngineCase, vocab: int, repeat: int = 0) -> list[list[int]]:
    """The case's token ids, other ones for each repeat; the same in every process."""
    seed = int.from_bytes(hashlib.blake2b(f"{case.prompts_name} {repeat}".encode(), digest_size=7).digest(), "big")
    return torch.randint(3, vocab, (case.batch, case.tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def embedding_factor(before: Routing, after: Routing) -> float:
    """By what the embeddings are multiplied to come from one routing to another."""
    sizes = {"drawn": 1.0, "spread": EMBEDDING_SCALE}
    return sizes[after] / sizes[before]


def check_prompts(vocab: int) -> list[list[int]]:
    """Short prompts whose first tokens both engines are asked for."""
    return prompts(EngineCase(phase="prefill", batch=CHECK_PROMPTS, tokens=CHECK_LENGTH), vocab, repeat=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One child process. loads: names of the loads (arrivals_cases.py) of a child that plays arrivals; it has no cases."""

    mode: Mode
    model: str
    dtype: Dtype
    cases: tuple[EngineCase, ...]
    repeats: int
    budget_s: float
    loads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.mode} {self.model} {self.dtype}"

    @property
    def num_points(self) -> int:
        return len(self.cases) + len(self.loads)

    @property
    def is_ours(self) -> bool:
        return self.mode in OUR_MODES


def write_config(job: Job, folder: Path) -> Path:
    """A folder whose config.json is the published one with room for long prompts; for a peer in fp8 it says what the numbers are."""
    config = json.loads((MODELS_FOLDER / MODELS[job.model] / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], MAX_TOKENS)
    if job.dtype == "fp8" and not job.is_ours:
        kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(config["num_hidden_layers"]))]
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": kept,
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """One case of one job. timing: microseconds of a step or of a wave up to its tokens; None where only experts were counted.

    distinct: experts that a layer's rows chose, mean over layers (and steps). context: keys of a sequence, mean over the timed steps.
    expert_bytes: of experts' weights, read by one wave of ours as the engine counted them.
    """

    case: EngineCase
    timing: Timing | None = None
    distinct: float | None = None
    context: float | None = None
    expert_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstTokens:
    """Greedy tokens of check_prompts: is_clear where no other token came within a rounding of the first. Ours alone says that."""

    token_ids: tuple[int, ...]
    is_clear: tuple[bool, ...] = ()


@dataclass(kw_only=True, slots=True)
class Part:
    """What a job found. red: why nothing of it counts."""

    job: Job
    facts: dict[str, Any]
    results: list[CaseResult] = field(default_factory=list)
    loads: list[LoadResult] = field(default_factory=list)
    first_tokens: FirstTokens | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    red: str = ""

    def write(self, path: Path) -> None:
        """Whole, each time: a killed process leaves the last state."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        beside.replace(path)


def job_from_json(row: Mapping[str, Any]) -> Job:
    return Job(**(dict(row) | {"cases": tuple(EngineCase(**case) for case in row["cases"]), "loads": tuple(row["loads"])}))


def part_from_json(row: Mapping[str, Any]) -> Part:
    """The inverse of Part.write."""
    results = []
    for one in row["results"]:
        timing = None if one["timing"] is None else Timing(**one["timing"])
        results.append(CaseResult(**(one | {"case": EngineCase(**one["case"]), "timing": timing})))
    first = row["first_tokens"]
    tokens = None if first is None else FirstTokens(token_ids=tuple(first["token_ids"]), is_clear=tuple(first["is_clear"]))
    loads = [load_result_from_json(one) for one in row["loads"]]
    return Part(**(dict(row) | {"job": job_from_json(row["job"]), "results": results, "loads": loads, "first_tokens": tokens}))
