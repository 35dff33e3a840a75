"""`duomo serve` with keys, TLS and the admin API, all at once: it becomes ready, answers who may ask, drains, flushes, scales."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from services.cli_keys import add_key
from tests.system.conftest import MODEL, ROOT, environment, free_port, launch

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "Tell me about a dog."}], "max_tokens": 16, "temperature": 0}


class Doors:
    """The running system, its certificate's authority and its keys."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], wants_certificates: bool) -> None:
        self.folder, self.port, self.admin_port = folder, free_port(), free_port()
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        if wants_certificates:
            authority.issue_cert("client@example.org").configure_cert(self.context)
        self.keys = {}
        for name in ("inference", "admin"):
            add_key(folder / "keys", name, [name])
            self.keys[name] = capsys.readouterr().out.strip()
        options = ["--port", str(self.port), "--run-dir", str(folder / "run"), "--admin-port", str(self.admin_port)]
        options += [
            "--api-key-file",
            str(folder / "keys"),
            "--ssl-certfile",
            str(folder / "cert.pem"),
            "--ssl-keyfile",
            str(folder / "key.pem"),
        ]
        options += ["--ssl-ca-certs", str(folder / "ca.pem")] if wants_certificates else []
        options += ["--set", f"gateway.audit_file={folder / 'audit'}", "--set", "model.device=cpu", "--set", "redis.lease_s=2"]
        self.log = folder / "serve.log"
        self.process = launch(["serve", str(MODEL), *options], self.log)
        try:
            end_s = time.monotonic() + 110
            while "Try:" not in self.log.read_text():
                assert self.process.poll() is None and time.monotonic() < end_s, self.log.read_text()
                time.sleep(0.1)
        except AssertionError:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
            raise

    def call(self, port: int, path: str, key: str = "", body: dict[str, Any] | None = None, method: str | None = None) -> tuple[int, Any]:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.keys[key]}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://127.0.0.1:{port}{path}", data, headers, method=method)
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.context))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="duomo-d-"))  # short: sockets lie below it
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("wants_certificates", [False, True])
def test_all_doors_at_once(folder: Path, capsys: pytest.CaptureFixture[str], wants_certificates: bool) -> None:
    doors = Doors(folder, capsys, wants_certificates)
    try:
        end_s = time.monotonic() + 10
        while doors.call(doors.port, "/health/ready")[0] != 200:  # with certificates the start waits only until it is asked for one
            assert wants_certificates and time.monotonic() < end_s
            time.sleep(0.05)
        assert [doors.call(doors.port, "/v1/chat/completions", key, CHAT)[0] for key in ("", "admin", "inference")] == [401, 403, 200]
        assert [doors.call(doors.admin_port, "/admin/pools", key)[0] for key in ("", "inference", "admin")] == [401, 403, 200]
        _, report = doors.call(doors.admin_port, "/admin/pools", "admin")
        (decode,) = (one["replica_id"] for one in report["replicas"] if one["role"] == "decode")
        for verb in ("drain", "undrain"):
            assert doors.call(doors.admin_port, f"/admin/replicas/{decode}/{verb}", "admin", method="POST")[0] == 200
        status, flushed = doors.call(doors.admin_port, "/admin/pools/all/flush", "admin", method="POST")
        assert status == 200 and len(flushed["flushed_blocks"]) == 2
        assert doors.call(doors.port, "/v1/chat/completions", "inference", CHAT)[0] == 200
        assert doors.call(doors.admin_port, "/admin/pools/decode/scale", "admin", {"replicas": 2})[0] == 200
        end_s = time.monotonic() + 60
        while sum(one["role"] == "decode" for one in doors.call(doors.admin_port, "/admin/pools", "admin")[1]["replicas"]) != 2:
            assert time.monotonic() < end_s, doors.log.read_text()
            time.sleep(0.2)
        command = [sys.executable, "-m", "services.cli", "admin", "list", "--url", f"https://127.0.0.1:{doors.admin_port}"]
        told = environment() | {"SSL_CERT_FILE": str(folder / "ca.pem"), "DUOMO_ADMIN_KEY": doors.keys["admin"]}
        if not wants_certificates:  # the command brings none
            done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 and done.stdout.count("\n") == 3, done.stderr
        results = [json.loads(line)["result"] for line in (folder / "audit").read_text().splitlines()]
        assert results == ["ok"] * 4
    finally:
        doors.stop()
