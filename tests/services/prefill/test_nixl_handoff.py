"""A prefill replica in a process of its own hands KV to a scripted decode replica here, over real NIXL, found through a real directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from duomo.config import DuomoConfig
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.runner import ModelRunner
from duomo.models.qwen3_moe import Model, load_model
from duomo.telemetry.span_file import read_spans
from duomo.wire.messages import PrefillDone, ReplicaReport, TransferFenced
from services.kv_transfer.directory import Directory, Member
from services.kv_transfer.embedded_redis import EmbeddedRedis
from services.kv_transfer.transport_nixl import NixlTransport
from tests.services.prefill.scripted_peers import ScriptedDecode, ScriptedGateway, kv_bytes, until

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(ROOT / "models" / "tiny-moe")


@dataclass
class System:
    """A directory, a prefill process, a scripted decode replica and gateway here."""

    process: subprocess.Popen[bytes]
    decode: ScriptedDecode
    gateway: ScriptedGateway
    directory: Directory
    run_dir: Path

    async def report(self) -> ReplicaReport:
        """The next report that P sends, ten a second."""
        reports = self.gateway.reports
        num_before = len(reports)
        await until(lambda: len(reports) > num_before + 1, "no report comes")
        return reports[-1]


def config_for(run_dir: Path, url: str) -> DuomoConfig:
    raw = {
        "model": {"path": str(ROOT / "models" / "tiny-moe")},
        "prefill": {"num_blocks": 128, "torch_threads": 1, "grant_timeout_s": 60.0},
        "kv_transfer": {"slot_bytes": 128 * 1024, "ucx_net_devices": "lo", "write_timeout_s": 30.0},
        "redis": {"url": url, "lease_s": 30.0},
        "tracing": {"directory": str(run_dir / "spans")},
        "run_dir": str(run_dir),
    }
    return DuomoConfig.model_validate(raw)


@contextlib.asynccontextmanager
async def system(run_dir: Path, model: Model) -> AsyncIterator[System]:
    redis = EmbeddedRedis(run_dir)
    redis.start()
    config = config_for(run_dir, redis.url)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("prefill_process.py")), config.model_dump_json()]
    process = subprocess.Popen(program, env=environment, cwd=run_dir)
    directory = Directory(redis.url, config.redis.lease_s)
    decode = ScriptedDecode(model.config, config, NixlTransport(f"d-{os.getpid()}-{run_dir.name}", config.kv_transfer))
    gateway: ScriptedGateway | None = None
    try:
        await decode.start()
        gateway = await ScriptedGateway.dial((await member_of(directory, process)).address, model.config, config)
        yield System(process, decode, gateway, directory, run_dir)
    finally:
        if gateway is not None:
            await gateway.close()
        process.kill()
        process.wait()
        await decode.close()
        await directory.close()
        redis.stop()


async def member_of(directory: Directory, process: subprocess.Popen[bytes]) -> Member:
    async with asyncio.timeout(60):
        while True:
            assert process.poll() is None, "the prefill process ended"
            members = [member for member in await directory.members() if member.role == "prefill"]
            if members:
                return members[0]
            await asyncio.sleep(0.05)


def ids(num_tokens: int, seed: int) -> tuple[int, ...]:
    return tuple((seed * 131 + place * 17 + place * place) % 8000 + 5 for place in range(num_tokens))


def expected(model: Model, token_ids: tuple[int, ...]) -> tuple[bytes, int]:
    """(KV, most likely next token) by the engine alone."""
    num_blocks = -(-len(token_ids) // 16)
    cache = KvCache(kv_spec(model.config, 16), num_blocks)
    table = list(range(num_blocks))
    _, logits_SV = ModelRunner(model, cache).run(StepBatch(slices=(PromptSlice(token_ids=token_ids, start=0, block_table=table),)))
    return kv_bytes(cache, table, len(token_ids)), int(logits_SV[0].argmax())


@pytest.mark.timeout(150)
def test_kv_goes_from_process_to_process_over_nixl(tmp_path: Path, model: Model) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(120), system(tmp_path, model) as parts:
            prompts = {f"r{length}": ids(length, length) for length in (1, 17, 63, 257)}
            for name, prompt in prompts.items():
                parts.gateway.start(name, prompt, parts.decode.address)
            for name, prompt in prompts.items():
                await parts.gateway.finished(name)
                kv, token = expected(model, prompt)
                assert parts.gateway.tokens(name)[0].token_id == token, name
                assert parts.decode.kv(name, len(prompt)) == kv, name
            assert len(parts.decode.inbox.of(PrefillDone)) == 4 and not parts.decode.inbox.of(TransferFenced)
            assert parts.decode.agent.transport_name == "nixl/UCX"
            report = await parts.report()
            assert (report.transport, report.pid) == ("nixl/UCX", parts.process.pid) and report.pid != os.getpid()
            assert (report.num_free_blocks + report.num_cached_blocks, report.num_open_handles, report.num_running) == (128, 0, 0)
            parts.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(parts.process.wait, 60) == 0, "SIGTERM drains and ends the replica"
            assert not [member for member in await parts.directory.members() if member.role == "prefill"], "it is still registered"
            assert not list(tmp_path.glob("prefill-0.*")), "its socket file is left behind"
            counters = report.counters
            assert counters["transport_descriptors"] == counters["messages_pushed"] and counters["transport_transfer_us"] > 0

    asyncio.run(scenario())
    pushes = [span.attributes for span in read_spans(tmp_path / "spans") if span.name == "kv.push"]
    assert len(pushes) == 4 * 4, "four groups of four prompts"
    for push in pushes:
        assert (push["duomo.way"], push["duomo.transport.backends"]) == ("nixl/UCX", ("UCX",))
        assert push["duomo.transport.lanes"] in (("cma/memory",), ("tcp/lo",))  # as this kernel allows
        sealed_bytes = int(str(push["duomo.bytes"])) + 64 * int(str(push["duomo.messages"]))
        assert push["duomo.transport.bytes"] == sealed_bytes, "payloads, each with its trailer"
        assert push["duomo.transport.descriptors"] == push["duomo.messages"]
        assert 0 < float(str(push["duomo.transport.post_s"])) <= float(str(push["duomo.transport.transfer_s"]))


@pytest.mark.timeout(150)
def test_a_cancel_in_the_middle_of_a_handoff_is_fenced_over_nixl(tmp_path: Path, model: Model) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(120), system(tmp_path, model) as parts:
            parts.decode.is_draining = False
            parts.gateway.start("gone", ids(300, 3), parts.decode.address)
            await until(lambda: bool(parts.gateway.tokens("gone")), "no first token")
            parts.gateway.cancel("gone")
            parts.decode.abort("gone")
            await parts.decode.inbox.one(TransferFenced, "gone")
            parts.decode.is_draining = True
            parts.gateway.start("stays", ids(90, 4), parts.decode.address)
            await parts.gateway.finished("stays")
            kv, token = expected(model, ids(90, 4))
            assert (parts.decode.kv("stays", 90), parts.gateway.tokens("stays")[0].token_id) == (kv, token)
            counts = parts.decode.agent.counts()
            assert (counts.num_quarantined_slots, counts.num_free_slots) == (0, counts.num_slots)
            report = await parts.report()
            assert (report.num_free_blocks + report.num_cached_blocks, report.num_open_handles, report.num_running) == (128, 0, 0)

    asyncio.run(scenario())
