"""A prompt's own log-probabilities through REST, split and colocated, against transformers' float32 logits and against decode steps.

Engine and reference sum in another order. bench/reference/compare.py lets a token differ where two logits lie within LOGIT_GAP, so each is
taken to be right within half of it; a log-probability is a logit less a mean of logits: within LOGIT_GAP together. As there, a position is
excused where at one that it attends to the router's choice was as close as ROUTER_GAP.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.reference.compare import LOGIT_GAP, ROUTER_GAP
from bench.reference.fifty_prompts import Prompt, fifty_prompts
from bench.reference.tiny_moe import build_reference
from bench.serve.rest_client import completion_body, post
from tests.system.conftest import ReplicaSystem

MODEL = Path(__file__).parents[2] / "models" / "tiny-moe"
NAMES = ("completion-1", "completion-2", "completion-17", "completion-65", "completion-513", "chat-13", "chat-240")
NUM_TOP = 5
MOST_EXCUSED = 2  # of the 946 positions of all prompts together


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    chosen = [one for one in fifty_prompts(MODEL) if one.name in NAMES]
    assert len(chosen) == len(NAMES) and sum(one.is_chat for one in chosen) == 2
    return chosen


def bodies(prompts: list[Prompt]) -> list[tuple[str, dict[str, Any]]]:
    """By endpoint; every second completion has two choices."""
    asked = {"model": "tiny-moe", "max_tokens": 2, "temperature": 0, "prompt_logprobs": NUM_TOP}
    return [
        ("/v1/chat/completions", asked | {"messages": [{"role": role, "content": said} for role, said in one.messages]})
        if one.is_chat
        else ("/v1/completions", asked | {"prompt": list(one.prompt_ids), "n": 1 + row % 2})
        for row, one in enumerate(prompts)
    ]


def scores(url: str, prompts: list[Prompt]) -> list[list[dict[str, Any] | None]]:
    """All asked at once, so that they share waves."""

    async def one(path: str, body: dict[str, Any]) -> list[dict[str, Any] | None]:
        result = await post(url, path, body)
        assert result.status == 200, result.body
        answer = json.loads(result.body)
        assert (answer["usage"]["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"] == 0
        told = [answer["prompt_logprobs"]] if "messages" in body else [choice["prompt_logprobs"] for choice in answer["choices"]]
        assert all(other == told[0] for other in told), "one scoring for all choices"
        return list(told[0])

    async def every() -> list[list[dict[str, Any] | None]]:
        return list(await asyncio.gather(*(one(path, body) for path, body in bodies(prompts))))

    return asyncio.run(every())


def faults(model: Any, prompt: Prompt, told: list[dict[str, Any] | None]) -> tuple[list[str], int]:
    """What differs from the reference beyond the bound, and at how many positions it is excused."""
    ids, found, excused = prompt.prompt_ids, [], 0
    assert told[0] is None and len(told) == len(ids)
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_router_logits=True, use_cache=False)
    logprobs_TV = torch.log_softmax(out.logits[0].double(), -1)
    top_k = model.config.num_experts_per_tok
    gaps = [layer.float().softmax(-1).sort(-1, descending=True).values for layer in out.router_logits]
    gap_T = torch.stack([each[:, top_k - 1] - each[:, top_k] for each in gaps]).amin(0).cummin(0).values
    for position, entry in enumerate(told[1:], 1):
        assert entry is not None
        row_V, own = logprobs_TV[position - 1], entry[str(ids[position])]
        shown = sorted(((one["rank"], int(key), one["logprob"]) for key, one in entry.items()), key=lambda one: one[0])
        likeliest = row_V.topk(NUM_TOP).values.tolist()
        # ranks are right within ties: as many are above own by more than the bound as its rank says, at the most
        least = int((row_V > row_V[ids[position]] + LOGIT_GAP).sum()) + 1
        most = int((row_V >= row_V[ids[position]] - LOGIT_GAP).sum())
        is_right = (
            all(abs(value - float(row_V[token_id])) <= LOGIT_GAP for _, token_id, value in shown)
            and all(abs(value - best) <= LOGIT_GAP for (_, _, value), best in zip(shown, likeliest, strict=False))
            and least <= own["rank"] <= most
            and [rank for rank, _, _ in shown][:NUM_TOP] == list(range(1, NUM_TOP + 1))
            and len(shown) == NUM_TOP + (own["rank"] > NUM_TOP)
            and list(entry)[0] == str(ids[position])
        )
        if not is_right and float(gap_T[position - 1]) < ROUTER_GAP:
            excused += 1
        elif not is_right:
            found.append(f"{prompt.name}[{position}]: {entry}, rank {least} to {most}, own {float(row_V[ids[position]])}, best {likeliest}")
    return found, excused


def test_every_prompt_position_is_the_references_in_both_layouts(
    pair_system: ReplicaSystem, replica_system: Callable[..., ReplicaSystem], prompts: list[Prompt]
) -> None:
    split = scores(pair_system.url, prompts)
    pair_system.assert_quiet()
    model = build_reference(MODEL)
    results = [faults(model, prompt, told) for prompt, told in zip(prompts, split, strict=True)]
    assert not [fault for found, _ in results for fault in found]
    assert sum(excused for _, excused in results) <= MOST_EXCUSED
    wrong = [dict(entry) if entry is not None else None for entry in split[2]]
    token_id = str(prompts[2].prompt_ids[9])
    assert wrong[9] is not None
    wrong[9][token_id] = wrong[9][token_id] | {"logprob": wrong[9][token_id]["logprob"] - 2 * LOGIT_GAP}
    assert faults(model, prompts[2], wrong)[0], "the comparison sees a wrong one"
    colocated = replica_system(layout="colocated")
    assert scores(colocated.url, prompts) == split, "to the bit"
    assert scores(colocated.url, prompts) == split, "and behind what the first time left in the prefix cache"
    for one, other in zip(echoed(colocated.url, prompts, 0), echoed(pair_system.url, prompts, 0), strict=True):
        assert (one["choices"], one["usage"]) == (other["choices"], other["usage"]), "the prompts alone, too"
    colocated.assert_quiet()


def test_a_generated_token_is_told_alike_as_part_of_a_prompt(pair_system: ReplicaSystem, prompts: list[Prompt]) -> None:
    """By decode steps, by the prefill of all of it, and echoed, streamed too: the same numbers."""
    prompt = list(prompts[3].prompt_ids)

    async def run() -> None:
        async def ask(body: dict[str, Any]) -> Any:
            result = await post(pair_system.url, "/v1/completions", body)
            assert result.status == 200, result.body
            return result

        sampled = completion_body(prompt, 40, stream=False) | {"temperature": 1.0, "seed": 3, "logprobs": NUM_TOP}
        (generated,) = json.loads((await ask(sampled)).body)["choices"]
        whole = prompt + generated["token_ids"]
        asked = completion_body(whole, 1, stream=False) | {"echo": True, "logprobs": NUM_TOP, "prompt_logprobs": 2}
        (echoed,) = json.loads((await ask(asked)).body)["choices"]
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert echoed["logprobs"][name][len(prompt) : -1] == generated["logprobs"][name]
        own = [entry[str(token_id)]["logprob"] for token_id, entry in zip(whole[1:], echoed["prompt_logprobs"][1:], strict=True)]
        assert echoed["logprobs"]["token_logprobs"][:-1] == [None, *own]
        streamed = await ask({key: value for key, value in asked.items() if key != "prompt_logprobs"} | {"stream": True})
        assert streamed.is_done and streamed.error is None and streamed.text[0] == echoed["text"]

    asyncio.run(run())
    pair_system.assert_quiet()


def echoed(url: str, prompts: list[Prompt], max_tokens: int) -> list[dict[str, Any]]:
    """Answers of completions that show their prompt in all forms, asked at once; every second with two choices."""
    shown = {"echo": True, "logprobs": NUM_TOP, "prompt_logprobs": 2}

    async def one(prompt: Prompt, num_choices: int) -> dict[str, Any]:
        body = completion_body(list(prompt.prompt_ids), max_tokens, stream=False) | shown | {"n": num_choices}
        result = await post(url, "/v1/completions", body)
        assert result.status == 200, result.body
        return dict(json.loads(result.body))

    async def every() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(one(prompt, 1 + row % 2) for row, prompt in enumerate(prompts) if not prompt.is_chat)))

    return asyncio.run(every())


def test_a_prompt_alone_is_told_as_the_one_before_a_token(pair_system: ReplicaSystem, prompts: list[Prompt]) -> None:
    """`max_tokens: 0`: to the bit what `max_tokens: 1` says of the prompt; nothing is left behind."""
    for one, none in zip(echoed(pair_system.url, prompts, 1), echoed(pair_system.url, prompts, 0), strict=True):
        for with_token, without in zip(one["choices"], none["choices"], strict=True):
            assert without["logprobs"] == {name: values[:-1] for name, values in with_token["logprobs"].items()}
            assert without["prompt_logprobs"] == with_token["prompt_logprobs"] and without["finish_reason"] == "length"
            assert with_token["text"].startswith(without["text"]) and without["token_ids"] == []
        assert none["usage"]["completion_tokens"] == 0 and none["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    pair_system.assert_quiet()
