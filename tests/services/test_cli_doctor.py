"""What `duomo doctor` says of this machine: which implementation runs, and whose the port is."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from duomo.config import DuomoConfig, load_config
from duomo.engine.device import look_at_host
from duomo.engine.settle import settle
from duomo.errors import ConfigError, TransferError
from services.cli_doctor import _device, _kernels, _nixl, _parts, _plan, _port
from tests.engine.scripted_driver import H100, ScriptedDriver

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-moe"


def config(**options: object) -> DuomoConfig:
    return load_config(None, {"model.path": str(MODEL), "model.device": "cpu"} | options)


def on_port(port: int) -> DuomoConfig:
    return config(**{"gateway.port": port})


@contextmanager
def answering(body: bytes) -> Iterator[int]:
    """A server that answers everything with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Not into the test's output."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_names_the_implementation_that_runs() -> None:
    settled = settle(config())
    line = _kernels(settled)
    assert "products by chain" in line or "products by tile" in line, line
    assert "2048 KV blocks of 16 tokens" in _plan(settled)


def test_a_gpu_is_shown_with_its_kernels_and_the_plan() -> None:
    pytest.importorskip("triton")
    host = look_at_host(ScriptedDriver([H100]).open, lambda cuda: "")
    assert "card 0: NVIDIA H100 80GB HBM3" in _device(host) and "580.65.06" in _device(host)
    olmoe = {"model.path": str(ROOT / "bench/engine/models/olmoe-1b-7b"), "model.random_weights": True, "model.device": "auto"}
    settled = settle(config(**olmoe), lambda: host)
    lines = _kernels(settled)
    for word in (
        "Triton",
        "nvidia_h100_80gb_hbm3.json",
        "decode_attention",
        "cuDNN",
        "expert_gemm",
        "measured at 1,",
        "linear",
        "sampler",
        "from 1024 tokens on",
        "decode steps of up to",
    ):
        assert word in lines, lines
    assert "weights" in _plan(settled) and "blocks of 64 tokens" in _plan(settled)
    exact = _kernels(settle(config(**olmoe, deterministic=True), lambda: host))
    assert "cuDNN" not in exact and "measured at" not in exact, exact
    old = look_at_host(ScriptedDriver([{**H100, "name": "NVIDIA H900"}]).open, lambda cuda: "")
    assert "no nvidia_h900.json: heuristics choose" in _kernels(settle(config(**olmoe), lambda: old))
    fp8 = _kernels(settle(config(**olmoe, **{"model.quantize": "fp8"}), lambda: host))
    assert "expert_gemm_fp8" in fp8


def test_a_host_without_card_says_so_and_one_process_needs_no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    host = look_at_host(ScriptedDriver([], has_cuda=False).open, lambda cuda: "")
    assert "cpu, float32" in _device(host) and "no GPU to serve on: this machine has no NVIDIA driver" in _device(host)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not needed" in _nixl(config(), is_needed=False)


def test_nixl_moves_a_message_and_says_by_what() -> None:
    told = {"kv_transfer.ucx_net_devices": "lo", "layout": "split"}
    assert re.search(
        r"^1\.5\.\d+, nixl/UCX: (cma/memory|tcp/lo) moved and verified one message in the host's memory",
        _nixl(config(**told), is_needed=True),
    )
    with pytest.raises(TransferError, match="require_transport is rc|is not available") as caught:
        _nixl(config(**told, **{"kv_transfer.require_transport": "rc", "kv_transfer.ucx_tls": "tcp,self,cuda_copy"}), is_needed=True)
    assert caught.value.code == "wrong_transport"


def test_a_device_that_is_not_here_is_one_failing_line() -> None:
    looks = [look for name, look in _parts(config(**{"layout": "split", "kv_transfer.ucx_net_devices": "mlx5_77:1"})) if name == "network"]
    failed = []
    for look in looks:
        try:
            look()
        except ConfigError as error:
            failed.append(error.detail)
    assert len(looks) >= 3 and len(failed) == 1 and "names mlx5_77:1, which is not here" in failed[0]


def test_where_the_driver_breaks_the_other_parts_are_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli_doctor.look_at_host", lambda: look_at_host(ScriptedDriver([H100], attribute_code=1).open))
    parts = dict(_parts(config(**{"model.device": "auto"})))
    assert "no GPU to serve on" in parts["device"]() and "cuDeviceGetAttribute" in parts["device"]()
    layout = dict(_parts(config(**{"model.device": "auto"})))["layout"]()
    assert layout.startswith("device cpu: NVIDIA's driver fails (cuDeviceGetAttribute")
    with pytest.raises(ConfigError, match="cuDeviceGetAttribute"):
        dict(_parts(config(**{"model.device": "cuda"})))["layout"]()
    assert "torch" in parts["packages"]()


def test_a_port_of_a_running_duomo_is_no_fault() -> None:
    with answering(json.dumps({"data": [{"id": "tiny-moe", "owned_by": "duomo"}]}).encode()) as port:
        assert "tiny-moe" in _port(on_port(port))


@pytest.mark.parametrize("body", [b"hello", b"[]", b'{"data": []}', b'{"data": [{"id": "x", "owned_by": "vllm"}]}'])
def test_a_port_of_somebody_else_is(body: bytes) -> None:
    with answering(body) as port, pytest.raises(ConfigError, match=f"--port {port}"):
        _port(on_port(port))
