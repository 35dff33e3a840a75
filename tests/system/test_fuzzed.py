"""The fuzzer's bodies, headers and leaving clients on the real CPU system: answered as documented, and nothing held afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kept_reports import keep
from tests.services.router.openapi_reading import PARSERS
from tests.services.router.test_http_fuzz import odd_body, odd_headers, send_odd
from tests.system.conftest import TEMPLATE, ReplicaSystem


@pytest.mark.slow
def test_whatever_is_sent_is_answered(replica_system: Callable[..., ReplicaSystem]) -> None:
    system = replica_system(**{"gateway.chat_template": str(TEMPLATE), "gateway.default_max_tokens": 8})
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=system.url, timeout=60, trust_env=False) as client:

        @settings(max_examples=1500, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def one(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from(list(PARSERS)))
            leaves = data.draw(st.integers(0, 9)) == 7
            statuses[send_odd(client, path, odd_body(path, data), data.draw(odd_headers), leaves=leaves)] += 1

        one()
    system.assert_quiet()
    keep("fuzz", what="odd bodies and headers, the CPU system", path="every", cases=statuses.total(), statuses=dict(statuses))
    assert statuses[200] > 50 and statuses[400] > 50, "cases that all end alike show little"
