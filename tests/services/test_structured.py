"""Answers under a constraint from real prefill and decode services: one engine's own, whoever samples, and when they are begun again."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import jsonschema
import msgspec
import pytest
import tokenizers

from duomo.config import DuomoConfig
from duomo.wire.messages import Preempted, RequestFailed, RequestFinished, Resume, StartPrefill
from duomo.wire.values import Constraint, Sampling
from services.colocated import Engine
from tests.grammar.schemas import random_schema
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import MODEL_DIR, expected, ids, until
from tests.services.pair_rig import System, address_of, colocated, system

TEXT = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
PROMPT = tuple(TEXT.encode("<|im_start|>user\nTell me of a cat.<|im_end|>\n<|im_start|>assistant\n").ids)
REGEX = Constraint(kind="regex", text="([A-Z][a-z]{2,9} ){3}(cat|dog)")


def held(constraint: Constraint = REGEX, **knobs: object) -> Sampling:
    return Sampling(**{"max_tokens": 200, "temperature": 0.9, "seed": 3, "constraint": constraint, **knobs})  # type: ignore[arg-type]  # fields by their names


def play(tmp_path: Path, scenario: Callable[[System], Awaitable[None]]) -> None:
    async def go() -> None:
        async with system(configuration(tmp_path), 1, 1) as made:
            await scenario(made)
            await made.at_rest()

    asyncio.run(go())


def test_random_schemas_give_the_engines_own_answers_and_valid_ones(tmp_path: Path) -> None:
    async def scenario(made: System) -> None:
        samplings = {}
        for seed in range(10):
            constraint = Constraint(kind="json_schema", text=json.dumps(random_schema(seed)))
            samplings[f"s{seed}"] = held(constraint, max_tokens=512, seed=seed, temperature=float(seed % 3 > 0))
        for name, sampling in samplings.items():
            made.start(name, PROMPT, sampling, p=0, d=0)
        for name, sampling in samplings.items():
            await made.ended(name, p=0, d=0)
            tokens = made.tokens(name, p=0, d=0)
            assert tokens == expected(PROMPT, sampling)
            assert made.decodes[0][1].answers[name].finish == {0: "stop"} and tokens[-1] == 2
            jsonschema.validate(json.loads(TEXT.decode(tokens)), random_schema(int(name[1:])))

    play(tmp_path, scenario)


def test_choices_go_their_own_ways_with_every_other_knob_turned(tmp_path: Path) -> None:
    knobs = held(presence_penalty=0.5, repetition_penalty=1.2, logprobs=3, top_p=0.95, logit_bias=((TEXT.token_to_id("A"), 3.0),))

    async def scenario(made: System) -> None:
        made.start("n", PROMPT, knobs, p=0, d=0, choices=(0, 1, 2))
        await made.ended("n", p=0, d=0)
        answers = [made.tokens("n", p=0, d=0, choice=choice) for choice in range(3)]
        assert answers == [expected(PROMPT, knobs, choice) for choice in range(3)]
        assert len({tuple(answer) for answer in answers}) == 3

    play(tmp_path, scenario)


@pytest.mark.parametrize("knobs", [{"ignore_eos": True}, {"min_tokens": 100}])
def test_an_answer_that_can_only_end_ends_whatever_is_ignored(tmp_path: Path, knobs: dict[str, object]) -> None:
    """Its last token on D; and, where the grammar holds one token alone, on D again; an empty one on P."""

    async def scenario(made: System) -> None:
        for name, regex in (("many", REGEX.text), ("one", "a"), ("none", "")):
            made.start(name, PROMPT, held(Constraint(kind="regex", text=regex), **knobs), p=0, d=0)
            await made.ended(name, p=0, d=0)
            assert made.tokens(name, p=0, d=0)[-1] == 2
        assert made.prefills[0][1].answers["none"].finish == {0: "stop"} and len(made.tokens("none", p=0, d=0)) == 1

    play(tmp_path, scenario)


def test_a_length_may_cut_it(tmp_path: Path) -> None:
    async def scenario(made: System) -> None:
        made.start("short", PROMPT, held(max_tokens=5), p=0, d=0)
        await made.ended("short", p=0, d=0)
        assert made.decodes[0][1].answers["short"].finish == {0: "length"}
        assert made.tokens("short", p=0, d=0) == expected(PROMPT, held())[:5]

    play(tmp_path, scenario)


def test_a_resumed_choice_goes_on_in_its_grammar(tmp_path: Path) -> None:
    sampling = held()
    whole = expected(PROMPT, sampling)

    async def scenario(made: System) -> None:
        prefill, to_prefill = made.prefills[0]
        decode, to_decode = made.decodes[0]
        for num_emitted in (1, 6, len(whole) - 1):
            name = f"r{num_emitted}"
            emitted = tuple(whole[:num_emitted])
            about = {
                "request_id": name,
                "attempt": 1,
                "traceparent": "",
                "remaining_s": 100.0,
                "prompt_ids": PROMPT,
                "emitted_ids": emitted,
            }
            to_prefill.post(StartPrefill(**about, sampling=sampling, choices=(0,), decode=address_of(decode)))  # type: ignore[arg-type]  # one dict for both
            to_decode.post(Resume(**about, sampling=sampling, choice=0, prefill=address_of(prefill)))  # type: ignore[arg-type]  # one dict for both
            await made.ended(name, p=0, d=0)
            first, rest = to_prefill.answers[name].tokens[0], to_decode.answers[name].tokens[0]
            made_here = {index: token.token_id for index, token in (first | rest).items()}
            assert made_here == {index: whole[index] for index in range(num_emitted, len(whole))}

    play(tmp_path, scenario)


def test_who_is_preempted_and_begun_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    sections: dict[str, dict[str, object]] = {
        "decode": {"num_blocks": 24, "watermark_blocks": 1, "admit_ahead_tokens": 1},
        "prefill": {"grant_timeout_s": 30.0},
    }
    constraint = Constraint(kind="regex", text="([a-z]{1,5} ){60}(cat|dog)")

    async def scenario(engine: Engine, made: System) -> None:
        prompts = {f"r{number}": ids(80) + ids(7, 3 + number) for number in range(6)}
        samplings = {name: held(constraint, seed=number, max_tokens=90) for number, name in enumerate(prompts)}
        for name, prompt in prompts.items():
            made.start(name, prompt, samplings[name], p=0, d=0)
        to_prefill, to_decode = made.prefills[0][1], made.decodes[0][1]
        gone: set[str] = set()
        to_decode.on_preempted = lambda message: gone.add(message.request_id)

        def is_over(name: str) -> bool:
            return name in gone or bool(to_decode.of(RequestFinished, name) or to_decode.of(RequestFailed, name))

        for name in prompts:
            await until(functools.partial(is_over, name))
            assert not to_decode.of(RequestFailed, name), to_decode.of(RequestFailed, name)
        assert gone and to_decode.of(Preempted, next(iter(gone)))
        for name in sorted(gone):
            emitted = tuple(made.tokens(name, p=0, d=0))
            again = f"{name} again"
            about = {"request_id": again, "attempt": 1, "traceparent": "", "remaining_s": 100.0, "prompt_ids": prompts[name]}
            to_prefill.post(
                StartPrefill(**about, emitted_ids=emitted, sampling=samplings[name], choices=(0,), decode=address_of(engine.decode))  # type: ignore[arg-type]  # one dict for both
            )
            to_decode.post(Resume(**about, emitted_ids=emitted, sampling=samplings[name], choice=0, prefill=address_of(engine.prefill)))  # type: ignore[arg-type]  # one dict for both
            await made.ended(again, p=0, d=0)
            tokens = to_prefill.answers[again].tokens[0] | to_decode.answers[again].tokens[0]
            assert [*emitted, *(tokens[index].token_id for index in sorted(tokens))] == expected(prompts[name], samplings[name])

    async def go() -> None:
        async with colocated(configuration(tmp_path, sections)) as (engine, made):
            await scenario(engine, made)

    asyncio.run(go())


def test_what_cannot_be_compiled_or_kept_is_a_typed_failure_of_that_request_alone(tmp_path: Path) -> None:
    async def scenario(made: System) -> None:
        dead_end = (
            '{"type":"array","minItems":1,"items":{"type":"number","minimum":-9,"maximum":-1,"multipleOf":0.5}}'  # llguidance's own limit
        )
        bad = {"regex": Constraint(kind="regex", text="("), "dead end": Constraint(kind="json_schema", text=dead_end)}
        for name, constraint in bad.items():
            made.start(name, PROMPT, held(constraint), p=0, d=0)
        made.start("good", PROMPT, held(), p=0, d=0)
        await made.ended("good", p=0, d=0)
        assert made.tokens("good", p=0, d=0) == expected(PROMPT, held())
        gateways = (made.prefills[0][1], made.decodes[0][1])
        for name, code in (("regex", "bad_constraint"), ("dead end", "constraint_not_kept")):
            await until(lambda name=name: all(gateway.of(RequestFailed, name) or gateway.of(RequestFinished, name) for gateway in gateways))  # type: ignore[misc]  # a lambda's default
            failures = [message for gateway in gateways for message in gateway.of(RequestFailed, name)]
            assert failures and all(isinstance(one, RequestFailed) and one.code == code and not one.retryable for one in failures), failures

    play(tmp_path, scenario)


def test_a_model_without_a_tokenizer_serves_all_but_constraints(tmp_path: Path) -> None:
    async def go() -> None:
        config = configuration(tmp_path, {"model": {"path": str(tmp_path / "nowhere")}})
        assert isinstance(config, DuomoConfig)
        async with system(config, 1, 1) as made:
            free = msgspec.structs.replace(held(), constraint=None, max_tokens=9)
            made.start("free", PROMPT, free, p=0, d=0)
            made.start("held", PROMPT, held(), p=0, d=0)
            await made.ended("free", p=0, d=0)
            assert made.tokens("free", p=0, d=0) == expected(PROMPT, free)
            await until(lambda: bool(made.prefills[0][1].of(RequestFailed, "held")))
            failure = made.prefills[0][1].of(RequestFailed, "held")[0]
            assert isinstance(failure, RequestFailed) and failure.code == "unsupported_constraint" and "tokenizer.json" in failure.detail

    asyncio.run(go())
