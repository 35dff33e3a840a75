"""The count of compilations: it sees one that Triton really makes, here for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="it counts Triton's compilations")

import triton

from duomo.engine.compile_counter import CompileCounter

# A process of its own: this one's kernels may be interpreted. warmup() compiles and does not launch.
COMPILES = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from duomo.engine.compile_counter import CompileCounter

class Absent:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

@triton.jit
def body(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i, mask=i < n)

driver.set_active(Absent())
counter = CompileCounter()
body.warmup(torch.int32, 5, BLOCK=32, grid=(1,))
counter.ready()
body.warmup(torch.int32, 5, BLOCK=32, grid=(1,))
print(counter.num_before_ready, counter.num_after_ready)
body.warmup(torch.int32, 5, BLOCK=64, grid=(1,))
print(counter.num_before_ready, counter.num_after_ready)
counter.close()
body.warmup(torch.int32, 5, BLOCK=128, grid=(1,))
print(counter.num_before_ready, counter.num_after_ready)
"""


def test_a_real_compilation_is_counted_on_its_side_of_ready(tmp_path: Path) -> None:
    script = tmp_path / "compiles.py"
    script.write_text(COMPILES)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n")[:3] == ["1 0", "1 1", "1 1"], done.stderr
    assert "compiled after ready: body[" in done.stderr


def test_a_hook_that_was_there_still_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def hears(**told: Any) -> None:
        heard.append(told["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hears)
    counter = CompileCounter()
    triton.knobs.runtime.jit_post_compile_hook(repr="body")
    assert (heard, counter.num_before_ready, counter.num_after_ready) == (["body"], 1, 0)
    counter.close()
    assert triton.knobs.runtime.jit_post_compile_hook is hears
