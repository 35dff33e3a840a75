"""Owns the targets that a run of `duomo bench engine` is held against. Knows no engine and no GPU.

The peer that counts is vLLM in its faster mode of the same run; engine_rows.py says where a ratio counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.engine.engine_cases import SHIPPED_PEERS, TIMED_PEERS, Dtype, FirstTokens, Part
from bench.engine.engine_check import agreement
from bench.engine.engine_rows import OURS_BF16, EngineRow
from bench.kernels.targets import OURS, Case, Verdict, mean, worst

SAME_FIRST_TOKENS = 0.75  # of those whose choice was clear: vLLM's router works in bf16, so some experts are others; of other weights, none
LARGE = {"olmoe": (16, 128), "qwen3": (16, 64)}  # batches that the decode target names
TTFT = {"olmoe": 3.0, "qwen3": 2.5}


def _vllm(case: Case) -> float | None:
    return case.ratio(*TIMED_PEERS)


def _shipped(case: Case) -> float | None:
    return case.ratio(*SHIPPED_PEERS)


def _extended(case: Case) -> float | None:
    return case.ratio("vllm_extended")


def _bf16(case: Case) -> float | None:
    return case.ratio(OURS_BF16)


def _floor(case: Case) -> float | None:
    return case.floor_share if OURS in case.times else None


def _select(rows: Sequence[EngineRow], dtype: Dtype, wanted: Callable[[EngineRow], bool]) -> list[Case]:
    return [row.counted for row in rows if row.dtype == dtype and wanted(row)]


def _is_large(row: EngineRow) -> bool:
    lo, hi = LARGE.get(row.model, (16, 64))
    return row.case.phase == "decode" and row.case.tokens == 1024 and lo <= row.case.batch <= hi


def _is_prompt(row: EngineRow, lo: int, hi: int) -> bool:
    return row.case.phase == "prefill" and row.case.batch == 1 and lo <= row.case.tokens <= hi


def verdicts(rows: Sequence[EngineRow], parts: Sequence[Part]) -> list[Verdict]:
    """Every target of performance.md 4 about an engine on one GPU, over whatever was measured."""
    large = _select(rows, "bf16", _is_large)
    single = _select(rows, "bf16", lambda row: row.case.phase == "decode" and row.case.batch == 1 and row.case.tokens == 1024)
    found = [
        mean("decode step, OLMoE 16..128, Qwen3 16..64, against vLLM", 1.05, large, _vllm),
        worst("  the same, never under", 1.02, large, _vllm),
        worst("  the same, share of the measured-D floor", 0.88, large, _floor),
        worst("decode step, batch 1, against vLLM", 1.4, single, _vllm),
    ]
    return [*found, *prompt_verdicts(rows), *_fp8_verdicts(rows), *first_token_verdicts(parts)]


def prompt_verdicts(rows: Sequence[EngineRow]) -> list[Verdict]:
    """The targets about prompts and waves: both settings of vLLM's graphs, always together. rows: of one routing."""
    found = []
    for model, needed in TTFT.items():
        middle = _select([row for row in rows if row.model == model], "bf16", lambda row: _is_prompt(row, 640, 2048))
        found.append(worst(f"first token of 640..2,048 tokens, {model}, vLLM as shipped", needed, middle, _shipped))
        found.append(worst(f"  the same, {model}, vLLM with graphs to 4,096 tokens", 1.25, middle, _extended))
    short = _select(rows, "bf16", lambda row: _is_prompt(row, 16, 512))
    wave = _select(rows, "bf16", lambda row: row.case.phase == "prefill" and row.case.step_tokens == 16384)
    found.append(worst("first token of 16..512 tokens, against vLLM", 1.1, short, _vllm))
    found.append(worst("a wave of 16k tokens, against vLLM", 1.35, wave, _vllm))
    return found


def _fp8_verdicts(rows: Sequence[EngineRow]) -> list[Verdict]:
    decode = _select(rows, "fp8", lambda row: row.case.phase == "decode")
    qwen3 = _select(rows, "fp8", lambda row: row.model == "qwen3" and _is_large(row))
    olmoe = _select(rows, "fp8", lambda row: row.model == "olmoe" and _is_large(row) and row.case.batch <= 64)
    bounds = {row.shown.name(): row.bf16_floor_us / row.shown.floor_us for row in rows if row.bf16_floor_us is not None}

    def of_bound(case: Case) -> float | None:
        """How much faster than our bf16, of how much fewer bytes there are."""
        ratio = _bf16(case)
        return None if ratio is None or case.name() not in bounds else ratio / bounds[case.name()]

    return [
        worst("fp8 decode step, Qwen3 16..64, against our bf16", 1.5, qwen3, _bf16),
        worst("fp8 decode step, OLMoE 16..64, share of its byte bound", 0.9, olmoe, of_bound),
        worst("fp8 decode step, never slower than vLLM's fp8", 1.0, decode, _vllm),
    ]


def first_token_lines(parts: Sequence[Part]) -> list[tuple[str, tuple[int, int, int, int]]]:
    """(model and format, agreement of our first tokens with vLLM's) wherever both were asked; graphs before eager."""
    found = []
    ours = [part for part in parts if part.job.mode == OURS and part.first_tokens is not None and not part.red]
    for part in ours:
        peers = {
            other.job.mode: other.first_tokens
            for other in parts
            if (other.job.model, other.job.dtype) == (part.job.model, part.job.dtype) and other.first_tokens is not None
        }
        theirs: FirstTokens | None = next((peers[mode] for mode in (*TIMED_PEERS, "vllm_count") if mode in peers), None)
        if theirs is not None and part.first_tokens is not None:
            found.append((f"{part.job.model} {part.job.dtype}", agreement(part.first_tokens, theirs)))
    return found


def first_token_verdicts(parts: Sequence[Part]) -> list[Verdict]:
    found = []
    for name, (equal, total, clear_equal, clear) in first_token_lines(parts):
        share = clear_equal / clear if clear else None
        where = f"{clear_equal} of {clear} clear ones, {equal} of {total} of all"
        found.append(Verdict(target=f"first tokens as vLLM's, {name}", needed=SAME_FIRST_TOKENS, reached=share, where=where))
    return found
