"""A kernel launched again as it was compiled: which launches share a form, what is refused. Real kernels: test_kv_hash_pack.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's kernels are Triton's")

from duomo_kernels import _relaunch
from duomo_kernels._relaunch import Relaunch

CONSTANTS = {"W": 64, "PACK": True}


class Compiled:
    """A compiled form: what it was launched with, beyond Triton's own call."""

    packed_metadata = ()

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments, stream: self.launches.append((grid, arguments, stream))


class Kernel:
    """Triton's own call makes another compiled form each time."""

    def __init__(self, *, do_not_specialize: bool = True) -> None:
        names = ("words_ptr", "num_words", "W", "PACK", "USE_PDL")
        self.params = [SimpleNamespace(name=each, do_not_specialize=do_not_specialize, annotation_type="i32") for each in names]
        self.made: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def call(*arguments: object, **options: object) -> Compiled:
            assert options == {**CONSTANTS, "W": options["W"], "USE_PDL": False, "num_warps": options["num_warps"]}
            self.made.append(Compiled())
            return self.made[-1]

        return call


@pytest.fixture(autouse=True)
def _a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_relaunch.torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))


def test_a_second_launch_is_of_what_was_compiled() -> None:
    kernel, words = Kernel(), torch.zeros(8, dtype=torch.int64)
    launch = Relaunch(kernel)
    launch[(3,)]((words, 8), CONSTANTS, 4)
    launch[(5,)]((words, 9), CONSTANTS, 4)
    assert [each.launches for each in kernel.made] == [[((5, 1, 1), (words, 9, 64, True, False), 77)]]


@pytest.mark.parametrize(
    ("words", "constants", "num_warps"),
    [
        (torch.zeros(9, dtype=torch.int64)[1:], CONSTANTS, 4),  # 8 bytes past where Triton takes 16-byte loads
        (torch.zeros(8, dtype=torch.int32), CONSTANTS, 4),
        (torch.zeros(8, dtype=torch.int64), CONSTANTS | {"W": 32}, 4),
        (torch.zeros(8, dtype=torch.int64), CONSTANTS, 8),
    ],
)
def test_another_form_is_compiled_for_itself(words: torch.Tensor, constants: dict[str, int], num_warps: int) -> None:
    kernel = Kernel()
    launch = Relaunch(kernel)
    launch[(1,)]((torch.zeros(8, dtype=torch.int64), 8), CONSTANTS, 4)
    launch[(1,)]((words, 8), constants, num_warps)
    assert [each.launches for each in kernel.made] == [[], []]


def test_a_number_that_triton_would_compile_for_is_a_programmers_fault() -> None:
    launch = Relaunch(Kernel(do_not_specialize=False))
    with pytest.raises(AssertionError, match="num_words: a number that Triton would compile for"):
        launch[(1,)]((torch.zeros(8, dtype=torch.int64), 8), CONSTANTS, 4)


def test_constants_stand_in_the_kernels_order() -> None:
    with pytest.raises(AssertionError, match=r"expected \['W', 'PACK', 'USE_PDL'\] in this order"):
        Relaunch(Kernel())[(1,)]((torch.zeros(8, dtype=torch.int64), 8), {"PACK": True, "W": 64}, 4)
