"""Owns the checks of the command line: every operator's mistake is one line on stderr that names the option, with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-moe"


def duomo(*arguments: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DUOMO_")}
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("serve",), "MODEL_DIR"),
        (("serve", "/no/such/folder"), "MODEL_DIR"),
        (("serve", str(ROOT / "deploy")), "config.json"),
        (("serve", str(MODEL), "--config", "/no/such.yaml"), "/no/such.yaml"),
        (("serve", str(MODEL), "--set", "decode.num_blocks"), "--set"),
        (
            ("serve", str(MODEL), "--set", "decode.no_such_option=1"),
            "decode.no_such_option: no such option; there are replicas, num_blocks",
        ),
        (("serve", str(MODEL), "--set", "decode.num_blocks={"), "--set 'decode.num_blocks={'"),
        (("serve", str(MODEL), "--set", "model.max_model_tokens=4096"), "model.max_model_tokens"),
        (("serve", str(MODEL), "--decode-replicas", "0"), "decode.replicas"),
        (("serve", str(MODEL), "--port", "70000"), "gateway.port"),
        (("serve", str(MODEL), "--device", "cpu", "--quantize", "fp8"), "model.quantize"),
        (("serve", str(MODEL), "--device", "cpu", "--random-weights"), "model.random_weights"),
        (("serve", str(MODEL), "--max-model-tokens", "4096"), "model.max_model_tokens"),
        (("serve", str(MODEL), "--device", "cpu", "--layout", "colocated", "--decode-replicas", "2"), "decode.replicas"),
        (("serve", str(MODEL), "--set", "gateway.chat_template=no/such.jinja"), "gateway.chat_template"),
        (("serve", str(MODEL), "--set", "gateway.tool_parser=mistral"), "gateway.tool_parser"),
        (("serve", str(MODEL), "--api-key-file", "/no/such/keys"), "--api-key-file"),
        (("serve", str(MODEL), "--ssl-certfile", "/no/cert.pem"), "gateway.ssl_keyfile"),
        (("serve", str(MODEL), "--ssl-certfile", "/no/cert.pem", "--ssl-keyfile", "/no/key.pem"), "/no/cert.pem"),
        (("serve", str(MODEL), "--port", "8000", "--admin-port", "8000"), "gateway.admin_port"),
        (("admin", "list", "--url", "http://127.0.0.1:9"), "--url"),
        (("keys", "remove", "nobody", "--file", "/no/such/keys"), "--file"),
        (("replica", "decode", "--set", f"model.path={MODEL}"), "redis.url"),
        (("chat", "hello", "--url", "http://127.0.0.1:9"), "--url"),
        (("chat", "hello", "--url", "nonsense"), "--url"),
        (("bench", "no_such_bench"), "NAME"),
        (("trace", "/no/such/folder"), "DIRECTORY"),
        (("scale", "--decode", "1", "--port", "1"), "--port"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(arguments: tuple[str, ...], named: str) -> None:
    done = duomo(*arguments)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert done.stderr.startswith("duomo: error: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_taken_port_names_the_option_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = duomo("serve", str(MODEL), "--port", str(port))
    assert done.returncode == 2
    assert f"--port {port}" in done.stderr and "in use" in done.stderr


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}', "supported: Qwen3MoeForCausalLM"),
        ("config.json", (ROOT / "bench/engine/models/olmoe-1b-7b/config.json").read_text(), "OlmoeForCausalLM runs on a GPU only"),
        ("config.json", "{", "config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("model.safetensors", None, "--random-weights"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused_before_anything_starts(
    tmp_path: Path, file: str, content: str | None, named: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    port = free_port()
    done = duomo("serve", str(folder), "--device", "cpu", "--port", str(port))
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_version() -> None:
    assert duomo("--version").stdout.startswith("duomo ")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json, services.cli; print(json.dumps([m for m in ('torch', 'ray', 'fastapi', 'nixl', 'redis') if m in sys.modules]))"
    )
    environment = os.environ
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert json.loads(done.stdout) == [], done.stderr
    assert "serve" in duomo("--help").stdout


def test_doctor_says_what_is_configured_and_fails_where_it_cannot_be() -> None:
    fine = duomo("doctor", str(MODEL), "--device", "cpu", "--layout", "colocated")
    assert "device cpu: model.device says so; layout colocated" in fine.stdout, fine.stdout + fine.stderr
    assert "KV blocks" in fine.stdout and "torch on the CPU" in fine.stdout
    broken = duomo("doctor", str(MODEL), "--device", "cpu", "--set", "model.quantize=fp8")
    assert broken.returncode == 2 and "model.quantize" in broken.stderr
    other = duomo("doctor", "bench/engine/models/olmoe-1b-7b", "--device", "cpu")
    assert other.returncode == 1 and "FAIL  layout" in other.stdout and "ok    redis" in other.stdout, other.stdout


@pytest.mark.parametrize("name", ["bench_echo", "echo", "serve/bench_echo"])
def test_bench_runs_a_script_of_the_checkout(tmp_path: Path, name: str) -> None:
    (tmp_path / "bench" / "serve").mkdir(parents=True)
    (tmp_path / "bench" / "serve" / "bench_echo.py").write_text("import sys, services.cli; print('echo', sys.argv[1:])\n")
    environment = os.environ
    command = [sys.executable, "-m", "services.cli", "bench", name, "--repeats", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "echo ['--repeats', '3']", done.stderr
