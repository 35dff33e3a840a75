"""Bodies, headers and connections that nobody means, on every endpoint that takes a body; `make test-slow` sends 10,500.

Each is answered as the OpenAPI document says, never with 500, 502 or 504; a stream that begins ends as it should; a client that leaves
leaves nothing behind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.kept_reports import keep
from tests.services.router.body_places import odd, places, with_value
from tests.services.router.openapi_reading import PARSERS, TEMPLATE, document
from tests.services.router.served_stub import ServedStub, served_stub
from tests.services.router.stub_system import PATIENCE_S
from tests.services.router.test_openapi_bodies import BODIES

SIZES = (42, pytest.param(1500, marks=(pytest.mark.slow, pytest.mark.timeout(3600))))
OUR_FAULTS = (500, 502, 504)
OPTIONS: dict[str, Any] = {"told": "x", "overrides": {"gateway": {"chat_template": str(TEMPLATE)}}}
ENDS = {
    "/v1/chat/completions": ("data: [DONE]",),
    "/v1/completions": ("data: [DONE]",),
    "/v1/responses": ("event: response.completed", "event: response.incomplete"),
    "/v1/messages": ("event: message_stop",),
}
COMPONENTS = {"components": document()["components"]}
ERRORS = {name: Draft202012Validator({"$ref": f"#/components/schemas/{name}", **COMPONENTS}) for name in ("Error", "MessageError")}
odd_headers = st.fixed_dictionaries(
    {},
    optional={
        "X-Request-Timeout": st.sampled_from(["30", "0", "-1", "nan", "1e9", "2000.5", "soon", ""]),
        "Idempotency-Key": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300).map(str.strip),
        "Content-Type": st.sampled_from(["application/json", "text/plain", "application/json; charset=utf-16", ""]),
        "Authorization": st.sampled_from(["Bearer x", "Basic x", "x", ""]),
        "traceparent": st.sampled_from(["00-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-x", "", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"]),
        "Accept": st.sampled_from(["text/event-stream", "image/png"]),
    },
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStub]:
    with served_stub(tmp_path_factory.mktemp("stub"), **OPTIONS) as stub:
        yield stub


def odd_body(path: str, data: st.DataObject) -> bytes:
    """One that is meant, with up to three values in places where nobody would put them; now and then broken as bytes."""
    body: Any = data.draw(st.sampled_from([body for one, body in BODIES if one == path]))
    for _ in range(data.draw(st.integers(0, 3))):
        at = places(body)
        body = with_value(body, data.draw(st.sampled_from(at)), data.draw(odd)) if at else body
    raw = json.dumps(body, ensure_ascii=data.draw(st.booleans())).encode(errors="surrogatepass")
    match data.draw(st.sampled_from(["whole", "whole", "whole", "cut", "spoilt", "bytes"])):
        case "cut":
            return raw[: data.draw(st.integers(0, len(raw)))]
        case "spoilt":
            at = data.draw(st.integers(0, len(raw) - 1))
            return raw[:at] + data.draw(st.binary(max_size=4)) + raw[at + 1 :]
        case "bytes":
            return data.draw(st.binary(max_size=50))
        case _:
            return raw


def send_odd(client: httpx.Client, path: str, body: bytes, told: dict[str, str], *, leaves: bool) -> int:
    with client.stream("POST", path, content=body, headers=told) as answer:
        if leaves:
            assert answer.status_code not in OUR_FAULTS, answer.status_code
            return answer.status_code
        answer.read()
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert any(end in answer.text for end in ENDS[path]), answer.text[-500:]
        else:
            assert isinstance(answer.json(), dict)
        return 200
    assert answer.status_code not in OUR_FAULTS, answer.text
    assert str(answer.status_code) in document()["paths"][path]["post"]["responses"], answer.text
    ERRORS["MessageError" if path.startswith("/v1/messages") else "Error"].validate(answer.json())
    assert answer.status_code != 503 or "compiled within" in answer.text, answer.text
    return answer.status_code


@pytest.mark.parametrize("num_cases", SIZES)
@pytest.mark.parametrize("path", list(PARSERS))
def test_whatever_is_sent_is_answered(served: ServedStub, path: str, num_cases: int) -> None:
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=served.url, timeout=PATIENCE_S, trust_env=False) as client:

        @settings(
            max_examples=num_cases,
            deadline=None,
            derandomize=num_cases < 100,  # the short lane tries the same cases each time
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def one(data: st.DataObject) -> None:
            leaves = data.draw(st.integers(0, 19)) == 7
            statuses[send_odd(client, path, odd_body(path, data), data.draw(odd_headers), leaves=leaves)] += 1

        one()
    served.assert_quiet()
    keep("fuzz", what="odd bodies and headers", path=path, cases=statuses.total(), statuses=dict(statuses))
    assert statuses[200] > num_cases / 20 and statuses[400] > num_cases / 20, "cases that all end alike show little"
