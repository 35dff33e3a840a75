"""What the decode service tells of a handoff: the span kv.handoff and its figures, of one that lands late and of two that are given up."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from duomo.telemetry.span_file import read_spans
from duomo.wire.messages import GroupLanded
from services.kv_transfer.faults import Fault, ScriptedFaults
from tests.services.decode.rig import configuration, running
from tests.services.decode.scripted_peers import GREEDY, Prompt, ids, until


def test_a_handoff_is_told_with_what_it_exposed_and_one_that_is_given_up_with_its_reason(tmp_path: Path) -> None:
    """Corrupt once: pulled. The last message is sent after D read PrefillDone. One is cancelled half landed, one corrupt for good."""
    late_s = 0.0  # from D's reading of PrefillDone to the last message: taken by the clock that D takes its times by

    async def go() -> None:
        nonlocal late_s
        config = configuration(tmp_path, {"tracing": {"directory": str(tmp_path / "spans")}})
        async with running(config, ScriptedFaults({1: Fault(corrupt_byte=3)} | {w: Fault(corrupt_byte=3) for w in range(11, 60)})) as rig:
            prompt = Prompt("late", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            computed = rig.prefill.compute(prompt)
            *early, last = rig.prefill.open(handle, computed)
            for span in early:
                rig.prefill.push(handle.handle_id, span.message_idx)
            await until(lambda: len(rig.prefill.of(GroupLanded)) == len(early))
            rig.prefill.done(prompt, handle, computed)
            times = rig.service._legs["late", 0].times
            await until(lambda: times.prefill_done_s is not None)
            await asyncio.sleep(0.2)
            late_s = time.monotonic() - (times.prefill_done_s or 0.0)
            rig.prefill.push(handle.handle_id, last.message_idx)
            await rig.gateway.finished("late")
            cancelled = Prompt("cancelled", 0, ids(41, 2), GREEDY)
            rig.gateway.start(cancelled, rig.prefill)
            rig.prefill.announce(cancelled)
            handle = await rig.prefill.granted(cancelled)
            rig.prefill.open(handle, rig.prefill.compute(cancelled))
            for message_idx in range(2):
                rig.prefill.push(handle.handle_id, message_idx)
            await until(lambda: len(rig.prefill.of(GroupLanded, "cancelled")) == 2)
            rig.gateway.cancel("cancelled")
            await rig.at_rest()
            wrong = Prompt("wrong", 0, ids(42, 3), GREEDY)
            rig.gateway.start(wrong, rig.prefill)
            await asyncio.gather(rig.prefill.prefill(wrong), rig.gateway.failed("wrong"))
            await rig.at_rest()
            counters = rig.service.report().counters
            assert (counters["handoffs"], counters["handoffs_given_up"]) == (1, 2)
            assert sum(count for name, count in counters.items() if name.startswith("handoff_exposed_s.le.")) == 1
            assert counters["handoff_exposed_s.sum"] >= int(late_s * 1e6) and counters["handoff_bytes.sum"] == counters["landed_bytes"]

    asyncio.run(go())
    told = [span for span in read_spans(tmp_path / "spans") if span.name == "kv.handoff"]
    good, cancelled, wrong = (span.attributes for span in told)
    assert float(str(good["duomo.exposed_s"])) >= late_s > 0 and float(str(good["duomo.bytes_per_s"])) > 0 and "duomo.given_up" not in good
    assert [good[f"duomo.{name}"] for name in ("landed", "pulled", "refused", "unsent_bytes")] == [good["duomo.messages"], 1, 1, 0]
    assert (cancelled["duomo.given_up"], cancelled["duomo.landed"]) == ("cancelled", 2) and not told[1].error
    assert (wrong["duomo.given_up"], told[2].error) == ("kv_corrupt", "kv_corrupt")
    assert (wrong["duomo.landed"], wrong["duomo.bytes"]) == (0, 0) and int(str(wrong["duomo.refused"])) > int(
        str(wrong["duomo.pulled"])
    ) > 0
