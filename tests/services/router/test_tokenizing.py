"""/tokenize and /detokenize on the served application; every refusal stands in test_refusals.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.services.router.stub_system import loaded_text, stub_system

WORDS = "Once upon a time there was a naïve fox 🦊."


def test_a_prompt_is_counted_and_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            told = (await system.client.post("/tokenize", json={"model": "tiny-moe", "prompt": WORDS, "return_token_strs": True})).json()
            ids = list(loaded_text().encode(WORDS, add_special_tokens=True))
            assert told == {
                "count": len(ids),
                "max_model_len": 2048,
                "tokens": ids,
                "token_strs": [loaded_text().token_name(token_id) for token_id in ids],
            }
            assert told["token_strs"][0] == "Once" and told["token_strs"][1] == "Ġupon", "as the vocabulary spells them"
            back = (await system.client.post("/detokenize", json={"tokens": ids, "model": None})).json()
            assert back == {"prompt": WORDS}
            long = (await system.client.post("/tokenize", json={"prompt": "a b c " * 20_000})).json()
            assert long["count"] > long["max_model_len"], "counting has no limit of the model's"

    asyncio.run(scenario())


def test_messages_are_counted_as_the_chat_endpoint_counts_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            chat = {"model": "tiny-moe", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": WORDS}]}
            told = (await system.client.post("/tokenize", json=chat)).json()
            answer = (await system.client.post("/v1/chat/completions", json=chat | {"max_tokens": 2})).json()
            assert told["count"] == answer["usage"]["prompt_tokens"] and told["token_strs"] is None
            rendered = (await system.client.post("/detokenize", json={"tokens": told["tokens"]})).json()["prompt"]
            assert rendered.endswith(f"<|im_start|>user\n{WORDS}<|im_end|>\n<|im_start|>assistant\n"), "special tokens are shown"
            without = (await system.client.post("/tokenize", json=chat | {"add_generation_prompt": False})).json()
            assert without["count"] < told["count"] and told["tokens"][: without["count"]] == without["tokens"]

    asyncio.run(scenario())
