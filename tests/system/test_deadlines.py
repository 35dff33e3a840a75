"""A client's own deadline on the real system: the answer ends in time with a typed error, and both pools have everything back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from bench.serve.rest_client import StreamResult, completion_body, post

PROMPT = [10 + (37 * column) % 8000 for column in range(40)]
TIMEOUT = {"x-request-timeout": "6"}  # a busy machine prefills in a second or two; 900 steps take most of a minute


def test_a_clients_deadline_ends_prefill_and_decode(replica_system: Any) -> None:
    system = replica_system(**{"delays.decode_step_s": 0.05})

    async def run() -> list[StreamResult]:
        whole = completion_body(PROMPT[4:], 900) | {"stream": False}
        whole.pop("stream_options", None)
        bodies = [*(completion_body(PROMPT[row:], 900) for row in range(3)), whole]
        late = [asyncio.create_task(post(system.url, "/v1/completions", body, headers=TIMEOUT)) for body in bodies]
        patient = {"x-request-timeout": "120"}
        in_time = asyncio.create_task(post(system.url, "/v1/completions", completion_body(PROMPT[5:], 60), headers=patient))
        return [*(await asyncio.gather(*late)), await in_time]

    *streams, whole, in_time = asyncio.run(run())
    for stream in streams:
        assert stream.is_done and stream.error is not None and stream.error["code"] == "deadline_exceeded"
        assert 0 < stream.num_tokens < 900
    assert whole.status == 408 and json.loads(whole.body)["error"]["code"] == "deadline_exceeded"
    assert in_time.error is None and in_time.num_tokens == 60
    system.assert_quiet()
    assert system.reports("decode")[0]["counters"].get("cancelled", 0) >= 4
