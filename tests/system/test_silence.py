"""What clients send and are told stays out of every process' log and span file: real replicas, good requests and bad ones."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

MARK = "zq7secretzq7"
BASE = {"model": "tiny-moe", "max_tokens": 24, "temperature": 0, "user": MARK}
CHAT = BASE | {"messages": [{"role": "user", "content": f"Tell me about {MARK}."}]}
SCHEMA = {"type": "object", "properties": {MARK: {"type": "string", "maxLength": 8}}, "required": [MARK], "additionalProperties": False}
REQUESTS: list[tuple[str, dict[str, Any] | bytes]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/chat/completions", CHAT | {"guided_choice": [MARK, MARK * 2]}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": MARK, "schema": SCHEMA}}}),
    ("/v1/chat/completions", CHAT | {"guided_regex": f"({MARK}"}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": MARK, "content": MARK}]}),
    ("/v1/chat/completions", CHAT | {MARK: MARK}),
    ("/v1/chat/completions", f"[{MARK}]".encode()),
    ("/v1/completions", BASE | {"prompt": f"{MARK} " * 4000}),
    ("/v1/completions", BASE | {"prompt": MARK, "stop": [MARK]}),
    ("/v1/messages", {"model": "tiny-moe", "max_tokens": 5, "system": MARK, "messages": [{"role": "user", "content": MARK}]}),
]


def post(url: str, body: dict[str, Any] | bytes) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer sesame-{MARK}"}
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data, headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def written(*folders: Path) -> dict[str, str]:
    """Every log and span file by name."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix in (".log", ".jsonl", ".json", "")]
    return {file.name: file.read_text(errors="replace") for file in files}


def test_no_process_writes_down_what_is_said(pair_system: Any) -> None:
    told = [post(pair_system.url + path, body) for path, body in REQUESTS]
    assert {status for status, _ in told} == {200, 400} and [status for status, _ in told[:4]] == [200] * 4, told
    answers = [json.loads(text)["choices"][0]["message"]["content"] for _, text in (told[0], told[2])]
    assert MARK in answers[1] and len(answers[0]) > 20
    pair_system.assert_quiet()
    texts = written(pair_system.run_dir, pair_system.trace_dir)
    assert any(name.startswith("router") for name in texts) and any("gateway.request" in text for text in texts.values()), list(texts)
    for name, text in texts.items():
        for said in (MARK, answers[0][:20]):
            at = text.find(said)
            assert at < 0, f"{name}: {text[max(at - 300, 0) : at + 100]}"
