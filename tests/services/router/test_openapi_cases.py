"""schemathesis on the served document: cases that it allows and cases that it forbids, through HTTP; `make test-slow` runs 10,500.

No 500, 502 or 504; every answer as documented; what the document forbids is refused; nothing is held afterwards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.kept_reports import keep
from tests.services.router.openapi_reading import TEMPLATE
from tests.services.router.served_stub import ServedStub, served_stub

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
SIZES = (16, pytest.param(1500, marks=(pytest.mark.slow, pytest.mark.timeout(3600))))
OUR_FAULTS = (500, 502, 504)
load_all_checks()
ALWAYS = ("status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance")
OPTIONS: dict[str, Any] = {"told": "x", "overrides": {"gateway": {"chat_template": str(TEMPLATE)}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStub]:
    with served_stub(tmp_path_factory.mktemp("stub"), **OPTIONS) as stub:
        yield stub


@pytest.fixture(scope="module")
def schema(served: ServedStub) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(served.url + "/openapi.json").json())


def _meant(value: Any) -> Any:
    """What JSON Schema cannot say of a body, put right in one that it allows: texts that are JSON, and numbers written as integers."""
    if isinstance(value, list):
        return [_meant(one) for one in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if not isinstance(value, dict):
        return value
    return {name: "{}" if name in ("arguments", "guided_json") else _meant(one) for name, one in value.items()}


def _meant_body(path: str, body: Any) -> Any:
    """And what one field means for another."""
    body = _meant(body)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if body.get(name):
            body[name] = 9  # two names of one length agree, and the context has room
    if body.get("stream_options") is not None:
        body["stream"] = True
    if not body.get("tools"):
        body.pop("tool_choice", None)
    if path.startswith("/v1/messages"):
        body["messages"].append({"role": "user", "content": "x"})
    return body


def _run(served: ServedStub, schema: schemathesis.BaseSchema, path: str, mode: GenerationMode, num_cases: int) -> None:
    checks = CHECKS.get_by_names([*ALWAYS, *(["negative_data_rejection"] if mode == GenerationMode.NEGATIVE else [])])
    suppressed = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.large_base_example, HealthCheck.data_too_large]
    statuses: Counter[int] = Counter()
    with requests.Session() as session:
        session.trust_env = False

        @settings(
            max_examples=num_cases,
            deadline=None,
            derandomize=num_cases < 100,  # the short lane tries the same cases each time
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=suppressed,
        )
        @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
        def one(case: Case) -> None:
            if mode == GenerationMode.POSITIVE:
                case.body = _meant_body(path, case.body)
            answer = case.call(base_url=served.url, session=session)
            told = answer.content[:500]
            statuses[answer.status_code] += 1
            assert answer.status_code not in OUR_FAULTS, told
            assert answer.status_code != 503 or json.loads(answer.content)["error"]["code"] == "constraint_timeout", told
            case.validate_response(answer, checks=checks)

        one()
    served.assert_quiet()
    keep("fuzz", what=f"schemathesis, {mode.value}", path=path, cases=statuses.total(), statuses=dict(statuses))
    usual = 200 if mode == GenerationMode.POSITIVE else 400
    assert statuses[usual] > num_cases / 8, "cases that all end alike show little"


@pytest.mark.parametrize("num_cases", SIZES)
@pytest.mark.parametrize("path", PATHS)
def test_what_the_document_allows_and_forbids(served: ServedStub, schema: schemathesis.BaseSchema, path: str, num_cases: int) -> None:
    _run(served, schema, path, GenerationMode.POSITIVE, num_cases // 2)
    _run(served, schema, path, GenerationMode.NEGATIVE, num_cases - num_cases // 2)
