"""Owns what a load learns of a server before it begins: models, limits, version, which prompts and fields it takes. Knows no load.

Everything is asked of the server itself, by a few requests of two tokens. Whatever stands in the way is a SystemExit that says what to do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bench.serve.rest_client import StreamResult, post
from bench.serve.serve_client import Target
from bench.serve.serve_plan import Piece, Request
from bench.serve.serve_prompts import FIRST_ID, Api, Counting, Dialect, body_of
from bench.serve.soak_client import fault_of

TIMEOUT_S = 60.0
DEFAULT_VOCAB = 8000  # fewer than any model served here has
REFUSALS = (400, 404, 405, 415, 422, 501)  # of a field or an endpoint; others are faults of the moment
_COUNTINGS: tuple[Counting, ...] = ("usage", "ids", "events")  # best first
_PROBE_WORDS = (64, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server said of itself. model: its entry in /v1/models; notes: what a reader of the figures should know."""

    target: Target
    model: Mapping[str, Any]
    version: str
    notes: tuple[str, ...] = field(default=())

    @property
    def context_tokens(self) -> int | None:
        """Of prompt and answer together; None where it does not say."""
        told = self.model.get("max_model_len")
        return told if isinstance(told, int) else None


def models_at(url: str, headers: Mapping[str, str] | None = None, named: str = "") -> list[dict[str, Any]]:
    """At least one; `named` where the server has no such page, as proxies before other servers may have none.

    Raises SystemExit where nobody answers, or something else does.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=dict(headers or {})), timeout=10) as answer:
            found = [dict(each) | {"id": str(each["id"])} for each in json.load(answer)["data"]]
    except urllib.error.HTTPError as error:
        if error.code == 404 and named:
            return [{"id": named}]
        raise SystemExit(f"--url {url}: /v1/models answers {error.code} {error.reason}; is it an OpenAI-compatible server?") from error
    except OSError as error:
        raise SystemExit(f"--url {url}: no server answers there ({error}); start one first, such as `duomo serve MODEL`") from error
    except (ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"--url {url}: /v1/models is no list of models ({error!r}); is it an OpenAI-compatible server?") from error
    if not found:
        raise SystemExit(f"--url {url}: /v1/models names no model yet; wait until the server is ready")
    return found


def served_model(url: str) -> str:
    """The first that it names. Raises SystemExit where nobody answers."""
    return str(models_at(url)[0]["id"])


def meet(urls: Sequence[str], model: str, api: Api | Literal["auto"], vocab: int | None, headers: Mapping[str, str]) -> Server:
    """Ask a server everything. urls: its replicas'; the first is asked, of the others that they have the model.

    model: "" for its first; vocab: None for what it says, or else DEFAULT_VOCAB.
    """
    entry = _entry(urls[0], model, headers)
    for url in urls[1:]:
        _entry(url, entry["id"], headers)
    told = entry.get("vocab_size")
    size = vocab or (told if isinstance(told, int) else DEFAULT_VOCAB)
    target = Target(urls=tuple(urls), headers=headers, dialect=Dialect(model=entry["id"], api="completions", vocab=size))
    return _with_dialect(Server(target=target, model=entry, version=_version(urls[0], headers)), api)


def _entry(url: str, model: str, headers: Mapping[str, str]) -> dict[str, Any]:
    models = models_at(url, headers, model)
    entry = next((each for each in models if model in ("", each["id"])), None)
    if entry is None:
        raise SystemExit(f"--model {model}: {url} has {', '.join(repr(each['id']) for each in models)}")
    return entry


def _with_dialect(server: Server, api: Api | Literal["auto"]) -> Server:
    target, notes, why_no_ids = server.target, list[str](), ""
    if api != "chat":
        found, why_no_ids = _first_taken(target)
        if found is not None:
            return replace(server, target=_with_sure_vocab(found), notes=_missing(found.dialect))
        if api == "completions":
            raise SystemExit(f"--api completions: the server takes no token ids at /v1/completions ({why_no_ids}); --api chat sends text")
        notes.append(f"prompts are text through chat, their lengths about right: no token ids at /v1/completions ({why_no_ids})")
    found, why_no_chat = _first_taken(replace(target, dialect=replace(target.dialect, api="chat")))
    if found is None:
        said = f"/v1/completions: {why_no_ids}; " if why_no_ids else ""
        raise SystemExit(f"--url {target.urls[0]}: no way to ask for tokens is taken; {said}/v1/chat/completions: {why_no_chat}")
    return replace(server, target=_measured(found), notes=(*notes, *_missing(found.dialect)))


def _first_taken(target: Target) -> tuple[Target | None, str]:
    """The target with the best of the fields that the server takes and heeds; else why it refused the first."""
    why = ""
    for ignores, counting in itertools.product((True, False), _COUNTINGS):
        tried = replace(target, dialect=replace(target.dialect, counting=counting, ignores_eos=ignores))
        result = _ask(tried, 4, [FIRST_ID, FIRST_ID + 1])
        if result.status == 200:
            if fault := fault_of(result, 2 if ignores else result.num_tokens):
                raise SystemExit(f"--url {target.urls[0]}: a request of two tokens fails: {fault}")
            if {"usage": result.counted_tokens, "ids": result.num_tokens, "events": 1}[counting]:
                return tried, ""
            continue  # it knows nothing of the field, and let it pass
        if result.status not in REFUSALS:
            raise SystemExit(f"--url {target.urls[0]}: a request of two tokens fails: status {result.status}, {_reason(result)}")
        why = why or _reason(result)
    return None, why


def _with_sure_vocab(target: Target) -> Target:
    """Raises SystemExit where ids up to the vocabulary are not all taken."""
    result = _ask(target, 4, [FIRST_ID, target.dialect.vocab - 1])
    if fault := fault_of(result, 2 if target.dialect.ignores_eos else result.num_tokens):
        raise SystemExit(f"--vocab {target.dialect.vocab}: the server refuses prompts of ids below it ({_reason(result) or fault})")
    return target


def _ask(target: Target, prompt_tokens: int, ids: Sequence[int] = ()) -> StreamResult:
    """Two tokens for a prompt of about so many; of these ids, where the server is asked with ids."""
    body = json.loads(body_of(Request(0, 0.0, 2, (Piece("probe", prompt_tokens),)), target.dialect))
    if "prompt" in body and ids:
        body["prompt"] = list(ids)
    try:
        return asyncio.run(post(target.urls[0], target.dialect.path, body, timeout_s=TIMEOUT_S, headers=target.headers))
    except (OSError, asyncio.IncompleteReadError, ValueError, LookupError) as error:
        raise SystemExit(f"--url {target.urls[0]}: a request of two tokens fails: {error!r}") from error


def _measured(target: Target) -> Target:
    """How many tokens its template and its words are, by two prompts and what it says that they came to."""
    counts = []
    for words in _PROBE_WORDS:
        told = (_ask(target, words).usage or {}).get("prompt_tokens")
        if not isinstance(told, int):
            raise SystemExit(f"--url {target.urls[0]}: a chat's usage does not say prompt_tokens; prompts of a length cannot be made")
        counts.append(told)
    per_word = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    if per_word <= 0.0:
        raise SystemExit(
            f"--url {target.urls[0]}: prompts of {_PROBE_WORDS} words are {counts} tokens by its usage; lengths cannot be made"
        )
    fixed = counts[0] - per_word * _PROBE_WORDS[0]
    return replace(target, dialect=replace(target.dialect, tokens_per_word=per_word, fixed_tokens=fixed))


def _missing(dialect: Dialect) -> tuple[str, ...]:
    notes = []
    if dialect.counting == "events":
        notes.append("events do not say how many tokens they bring: one each, where there is text; the last one tells how many there were")
    if not dialect.ignores_eos:
        notes.append("the server takes no ignore_eos: answers end where the model ends them")
    return tuple(notes)


def _reason(result: StreamResult) -> str:
    """What a refusal says, in a line."""
    said: Any = result.error or result.body.decode(errors="replace")
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:
            return str(said).strip().split("\n")[0][:200]
    while isinstance(said, dict):
        said = said.get("error") or said.get("message") or said.get("detail") or json.dumps(said)
    return str(said).strip()[:300]


def _version(url: str, headers: Mapping[str, str]) -> str:
    """As vLLM tells it at /version; "" where the server has no such page."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/version", headers=dict(headers)), timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
