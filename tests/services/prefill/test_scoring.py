"""Prompts whose own log-probabilities are asked for, through the service on a CPU: bits, order, company, the prefix cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from duomo.engine.monolith import GenerateRequest, Monolith, MonolithLimits
from duomo.engine.prompt_scores import RowsToScore
from duomo.wire.messages import PromptScored, TokensEmitted
from duomo.wire.prompt_logprobs import PromptScores, unpacked
from services.prefill.pending import Over
from services.prefill.scoring import rows_to_score
from services.prefill.worker import SCORE_ROWS, Computation
from tests.services.prefill.prefill_rig import Rig, expected_kv, first_token, ids, model, rig, run
from tests.services.prefill.scripted_peers import GREEDY, until

SCORED = msgspec.structs.replace(GREEDY, prompt_logprobs=4)
NEVER_TWO_S = 1e-9


def scores_of(parts: Rig, request_id: str) -> list[PromptScores]:
    found = parts.gateway.inbox.of(PromptScored, request_id)
    return [unpacked(one.scores) for one in found if isinstance(one, PromptScored)]


def told(parts: list[PromptScores]) -> dict[int, tuple[float, int, list[tuple[int, float]]]]:
    """By position: own log-probability, rank, the likeliest."""
    found = {}
    for part in parts:
        for at in range(part.num_tokens):
            likeliest = list(zip(part.top_ids_TK[at].tolist(), part.top_TK[at].tolist(), strict=True))
            found[part.first + at] = (float(part.own_T[at]), int(part.rank_T[at]), likeliest)
    return found


def generated(prompt_ids: Sequence[int], num_tokens: int) -> tuple[tuple[int, ...], list[tuple[float, list[tuple[int, float]]]]]:
    """A prompt with what the monolithic loop's decode steps made of it, and the log-probabilities that they gave."""
    sampling = msgspec.structs.replace(GREEDY, max_tokens=num_tokens, temperature=1.2, seed=5, logprobs=4)
    num_blocks = -(-(len(prompt_ids) + num_tokens) // 16)
    request = GenerateRequest(prompt_ids=prompt_ids, sampling=sampling)
    tokens = Monolith(model(), MonolithLimits(), num_blocks).generate([request])[0]
    assert all(one.logprob is not None for one in tokens)
    return (*prompt_ids, *(one.token_id for one in tokens)), [(one.logprob or 0.0, list(one.top)) for one in tokens]


MODES = [
    {"mode": "layered"},
    {"mode": "layered", "piece_target_s": NEVER_TWO_S},
    {"mode": "layered", "max_wave_tokens": 64, "long_chunk_tokens": 48},
    {"mode": "chunked", "chunk_tokens": 48},
    {"mode": "whole"},
]


@pytest.mark.parametrize("prefill", MODES, ids=lambda prefill: "-".join(map(str, prefill.values())))
def test_scores_have_the_bits_of_decode_steps(tmp_path: Path, prefill: dict[str, Any]) -> None:
    """What a prompt token would have come with, had it been sampled: more rows than one turn scores, beside prompts that do not ask."""
    prompt_ids, by_steps = generated(ids(9, 4), 140)
    assert len(prompt_ids) > 2 * SCORE_ROWS

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, **prefill) as parts:
            parts.gateway.start("before", ids(33, 2), parts.decode.address)
            parts.gateway.start("scored", prompt_ids, parts.decode.address, sampling=SCORED, choices=(0, 1))
            parts.gateway.start("after", ids(70, 3), parts.decode.address)
            for name in ("before", "scored", "after"):
                await parts.gateway.finished(name)
            found = told(scores_of(parts, "scored"))
            assert list(found) == list(range(1, len(prompt_ids)))
            assert [found[9 + at][::2] for at in range(140)] == by_steps
            for own, rank, likeliest in found.values():
                assert len(likeliest) == 4 and (rank > 4 or likeliest[rank - 1][1] == own)
            assert parts.gateway.tokens("scored")[0].token_id == first_token(prompt_ids)
            assert parts.decode.kv("scored", len(prompt_ids)) == expected_kv(prompt_ids)
            for name, others in (("before", ids(33, 2)), ("after", ids(70, 3))):
                assert not scores_of(parts, name) and parts.gateway.tokens(name)[0].token_id == first_token(others)
                assert parts.decode.kv(name, len(others)) == expected_kv(others)
            messages = parts.gateway.inbox.messages
            frames = [at for at, one in enumerate(messages) if isinstance(one, PromptScored)]
            firsts = [at for at, one in enumerate(messages) if isinstance(one, TokensEmitted) and one.tokens[0].request_id == "scored"]
            assert max(frames) < min(firsts, default=len(messages)), "all of them before a first token"
            assert parts.service.report().counters["prompt_tokens_scored"] == len(prompt_ids) - 1
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_scored_prompt_is_computed_whole_and_found_by_others(tmp_path: Path) -> None:
    prompt_ids = ids(100)

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, prefix_cache_blocks=64) as parts:
            cached = {}
            for name, sampling in (("cold", GREEDY), ("warm", GREEDY), ("scored", SCORED), ("again", SCORED), ("last", GREEDY)):
                parts.gateway.start(name, prompt_ids, parts.decode.address, sampling=sampling)
                cached[name] = (await parts.gateway.finished(name)).cached_tokens
                assert parts.gateway.tokens(name)[0].token_id == first_token(prompt_ids)
            assert cached == {"cold": 0, "warm": 96, "scored": 0, "again": 0, "last": 96}
            assert told(scores_of(parts, "scored")) == told(scores_of(parts, "again"))
            assert len(told(scores_of(parts, "again"))) == 99
            await parts.is_clean()

    run(scenario, tmp_path)


def test_of_one_token_nothing_is_scored_and_of_a_resume_the_prompt_alone(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.gateway.start("one", ids(1), parts.decode.address, sampling=SCORED)
            parts.gateway.start("resume", ids(20), parts.decode.address, sampling=SCORED, emitted_ids=(5, 6))
            await parts.gateway.finished("one")
            await parts.gateway.finished("resume")
            assert not scores_of(parts, "one") and parts.gateway.tokens("one")[0].token_id == first_token(ids(1))
            assert list(told(scores_of(parts, "resume"))) == list(range(1, 20))
            await parts.is_clean()

    run(scenario, tmp_path)


@dataclass
class LateScores:
    """A device's: there when somebody has waited for them, in another thread than the step's."""

    scores: PromptScores
    waited_in: list[str]

    def wait(self) -> PromptScores:
        self.waited_in.append(threading.current_thread().name)
        return self.scores


def test_a_devices_scores_are_waited_for_aside(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            score, waited_in = parts.worker.score, list[str]()

            def launched(computation: Computation, asked: RowsToScore) -> LateScores:
                return LateScores(score(computation, asked).result, waited_in)

            parts.worker.score = launched  # type: ignore[method-assign,assignment]  # as a GPU's worker answers
            parts.gateway.start("scored", ids(100), parts.decode.address, sampling=SCORED)
            await parts.gateway.finished("scored")
            assert list(told(scores_of(parts, "scored"))) == list(range(1, 100)) and waited_in == ["prefill-waits"] * 2
            assert parts.gateway.tokens("scored")[0].token_id == first_token(ids(100))
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_prompt_cancelled_while_it_is_scored_is_scored_no_further(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            seen: list[RowsToScore] = []
            score = parts.worker.score

            def watched(computation: Computation, asked: RowsToScore) -> Over[PromptScores]:
                seen.append(asked)
                return score(computation, asked)

            parts.worker.score = watched  # type: ignore[method-assign]  # a witness of what is scored
            scored, leg_of = parts.service._book.scored, parts.service._book._legs

            def ends_it(leg: Any, scores: PromptScores) -> None:
                scored(leg, scores)
                parts.service._book._end(leg, "cancelled")

            parts.service._book.waves._scoring._scored = ends_it
            parts.gateway.start("gone", ids(5 * SCORE_ROWS), parts.decode.address, sampling=SCORED)
            await until(lambda: bool(seen) and not leg_of, "never over")
            assert len(seen) == 1 and not parts.gateway.tokens("gone")
            parts.decode.abort("gone")
            await parts.is_clean()

    run(scenario, tmp_path)


def test_scores_that_are_no_numbers_fail_their_request_alone(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            score = parts.worker.score

            def broken(computation: Computation, asked: RowsToScore) -> Over[PromptScores]:
                scores = score(computation, asked).result
                return Over(replace(scores, own_T=np.full_like(scores.own_T, np.nan)) if asked.num_top == 4 else scores)

            parts.worker.score = broken  # type: ignore[method-assign]  # what a broken layer would give
            fine = msgspec.structs.replace(SCORED, prompt_logprobs=1)
            parts.gateway.start("broken", ids(30, 2), parts.decode.address, sampling=SCORED)
            parts.gateway.start("fine", ids(30, 3), parts.decode.address, sampling=fine)
            failure = await parts.gateway.failed("broken")
            assert (failure.code, failure.retryable) == ("bad_logits", False) and not parts.gateway.tokens("broken")
            await parts.gateway.finished("fine")
            assert len(told(scores_of(parts, "fine"))) == 29
            parts.decode.abort("broken")
            await parts.is_clean()

    run(scenario, tmp_path)


def leg(num_prompt: int, num_top: int | None, num_emitted: int = 0, cached: int = 0) -> Any:
    request = SimpleNamespace(prompt_ids=ids(num_prompt), sampling=msgspec.structs.replace(GREEDY, prompt_logprobs=num_top))
    return SimpleNamespace(request=request, token_ids=ids(num_prompt + num_emitted), cached_tokens=cached)


def test_rows_are_those_before_each_prompt_token() -> None:
    """Behind other prompts' rows, cached ones left out; at most so many at a time."""
    legs = [leg(40, None, cached=16), leg(8, 2, num_emitted=3), leg(1, 5), leg(4, 0)]
    found = [(asked.row_lo, tuple(asked.next_ids), asked.first, asked.num_top) for _, asked in rows_to_score(legs, 3)]
    assert found == [
        (24, ids(8)[1:4], 1, 2),
        (27, ids(8)[4:7], 4, 2),
        (30, ids(8)[7:], 7, 2),
        (24 + 11 + 1, ids(4)[1:], 1, 0),
    ]
    assert [asked.rows for _, asked in rows_to_score(legs, 3)][1] == [27, 28, 29]
