"""The choice of device, by what a driver answers: no driver, no card, an old card, a torch that cannot use it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duomo.engine.device import Card, Host, _cuda_of_torch, look_at_host, pick_device, resolve_device
from duomo.errors import ConfigError
from tests.engine.scripted_driver import H100, ScriptedDriver


class OldDriver(ScriptedDriver):
    """As ctypes says it of a function that a library lacks."""

    @property
    def cuDeviceTotalMem_v2(self) -> Any:
        raise AttributeError("libcuda.so.1: undefined symbol: cuDeviceTotalMem_v2")


def fine(driver_cuda: int) -> str:
    return ""


def test_a_card_is_read_as_the_driver_tells_it() -> None:
    host = look_at_host(ScriptedDriver([H100, H100]).open, fine)
    assert host.driver == "driver 580.65.06, CUDA 13.0" and not host.problem and len(host.cards) == 2
    card = host.cards[0]
    assert (card.name, card.capability, card.num_sms) == ("NVIDIA H100 80GB HBM3", (9, 0), 132)
    assert (card.total_bytes, card.free_bytes) == (85_000_000_000, 84_000_000_000)
    pick = pick_device("auto", lambda: host)
    assert pick.device == "cuda" and pick.card is card
    for word in ("H100", "85.0 GB", "84.0 free", "9.0", "first of 2"):
        assert word in pick.why


def test_without_nvml_free_memory_is_unknown() -> None:
    for driver in (ScriptedDriver([H100], has_nvml=False), ScriptedDriver([H100], nvml_code=999)):
        host = look_at_host(driver.open, fine)
        assert host.cards[0].free_bytes is None and not host.problem and "unknown version" in host.driver
        assert "free" not in host.cards[0].line()


def test_part_of_a_card_has_no_more_free_than_it_is_large() -> None:
    part = {**H100, "total": 20_000_000_000}
    assert look_at_host(ScriptedDriver([part]).open, fine).cards[0].free_bytes == 20_000_000_000


@pytest.mark.parametrize(
    ("driver", "software", "words"),
    [
        (ScriptedDriver([H100], has_cuda=False), fine, "no NVIDIA driver"),
        (ScriptedDriver([H100], init_code=100), fine, "CUDA_ERROR_NO_DEVICE"),
        (ScriptedDriver([]), fine, "CUDA_VISIBLE_DEVICES"),
        (ScriptedDriver([{**H100, "name": "NVIDIA A100", "capability": (8, 0)}]), fine, "NVIDIA A100 has compute capability 8.0"),
        (ScriptedDriver([H100], attribute_code=999), fine, "driver fails (cuDeviceGetAttribute ends with error 999)"),
        (ScriptedDriver([H100], version_code=3), fine, "driver fails (cuDriverGetVersion ends with error 3)"),
        (OldDriver([H100]), fine, "cuDeviceTotalMem_v2"),
        (ScriptedDriver([H100]), lambda cuda: f"torch knows no CUDA {cuda}", "torch knows no CUDA 13"),
    ],
)
def test_auto_says_why_it_takes_the_cpu_and_cuda_is_refused_with_the_same_words(
    driver: ScriptedDriver, software: Callable[[int], str], words: str
) -> None:
    def look() -> Host:
        return look_at_host(driver.open, software)

    pick = pick_device("auto", look)
    assert pick.device == "cpu" and words in pick.why and pick.card is None
    with pytest.raises(ConfigError, match="--device") as caught:
        pick_device("cuda", look)
    assert words in caught.value.detail


def test_cpu_is_taken_without_a_look() -> None:
    def never() -> Host:
        raise AssertionError("looked")

    assert pick_device("cpu", never).device == "cpu"
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("text", "major"),
    [
        ("cuda: Optional[str] = '13.0'\n", 13),
        ('__version__ = "2.11.0+cu128"\ncuda: str | None = "12.8"\n', 12),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", None),
    ],
)
def test_the_cuda_of_torch_is_read_off_its_file(tmp_path: Path, text: str, major: int | None) -> None:
    (tmp_path / "version.py").write_text(text)
    assert _cuda_of_torch(tmp_path / "version.py") == major


def test_the_installed_torch_is_judged_without_importing_it() -> None:
    code = """
import sys
from duomo.engine.device import _software_problem, look_at_host
from duomo.engine.settle import settle
print(repr(_software_problem(13)))
look_at_host()
print([name for name in ("torch", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said, loaded = done.stdout.splitlines()
    assert loaded == "[]", done.stdout + done.stderr
    torch: Any = pytest.importorskip("torch")
    assert ("CPUs alone" in said) == (torch.version.cuda is None)


@pytest.mark.gpu
def test_the_driver_and_torch_tell_the_same() -> None:
    torch: Any = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    host = look_at_host()
    properties = torch.cuda.get_device_properties(0)
    card = host.cards[0]
    assert (card.name, card.capability) == (properties.name, torch.cuda.get_device_capability(0))
    assert (card.num_sms, card.total_bytes) == (properties.multi_processor_count, properties.total_memory)
    assert card.free_bytes is None or 0 < card.free_bytes <= card.total_bytes
    assert isinstance(card, Card) and ctypes.sizeof(ctypes.c_size_t) == 8
