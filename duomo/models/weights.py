"""Owns the safetensors files of a model folder: which file has which tensor, its shape and its quantisation. Knows no architecture."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from duomo.errors import ModelError
from duomo.models.config import Fp8Blocks
from duomo.models.config_json import read_json
from duomo_kernels.quant_fp8 import num_scales, quant_fp8

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_IN_HEADERS = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"  # DeepSeek-V3's spelling: the factor that undoes the quantisation


class WeightFolder:
    """The tensors of a folder, taken one by one, as float32 or as stored. A context manager: leaving it closes files and progress bar.

    count: told of each tensor taken, and of how many there are.
    """

    def __init__(
        self,
        folder: Path,
        quantisation: Fp8Blocks | None,
        *,
        num_tensors: int,
        progress: bool,
        count: Callable[[int, int], None] | None = None,
    ) -> None:
        self._folder = folder
        self._quantisation = quantisation
        self._files = contextlib.ExitStack()
        self._open: dict[str, safetensors.safe_open] = {}
        self._file_of = self._read_index()
        self._bar = tqdm(total=num_tensors, desc="loading weights", unit="tensor", file=sys.stderr, disable=not progress, leave=False)
        self._num_taken, self._num_tensors, self._count = 0, num_tensors, count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._bar.close()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name` as contiguous float32, dequantised where it is fp8. Raises ModelError: missing, wrong shape or dtype."""
        tensor, scale = self.take_stored(name, shape)
        if scale is None:
            return tensor.to(torch.float32).contiguous()
        assert self._quantisation is not None
        return quant_fp8(tensor, scale, self._quantisation.block)

    def take_stored(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """The tensor `name` as it is stored, in host memory, and the float32 scales of its blocks where it is fp8. Raises as take."""
        tensor = self._read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"tensor {name} of {self._folder} has shape {tuple(tensor.shape)}, the configuration asks for {shape}",
                code="bad_tensor_shape",
            )
        self._bar.update(1)
        self._num_taken += 1
        if self._count is not None:
            self._count(self._num_taken, self._num_tensors)
        if tensor.dtype in PLAIN_DTYPES:
            return tensor, None
        if tensor.dtype is not torch.float8_e4m3fn or self._quantisation is None or len(shape) != 2:
            wanted = "float32, bfloat16, float16, or a matrix in float8_e4m3fn with a quantization_config"
            raise ModelError(f"tensor {name} of {self._folder} is {tensor.dtype}; supported: {wanted}", code="bad_quantisation")
        return tensor, self._scale(name, (shape[0], shape[1]), self._quantisation.block)

    def is_fp8(self, name: str) -> bool:
        """Whether the file holds this tensor in fp8: a model may leave some of its products wide. Reads the file's header alone."""
        with self._file_with(name) as file:
            return bool(file.get_slice(name).get_dtype() == FP8_IN_HEADERS)  # type: ignore[no-untyped-call]  # safetensors ships no types

    def _scale(self, name: str, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
        scale = self._read(name + SCALE_SUFFIX)
        wanted = num_scales(shape, block)
        if tuple(scale.shape) != wanted:
            raise ModelError(
                f"tensor {name}{SCALE_SUFFIX} of {self._folder} has shape {tuple(scale.shape)}, must be {wanted}", code="bad_tensor_shape"
            )
        return scale.to(torch.float32)

    def _read(self, name: str) -> Tensor:
        with self._file_with(name) as file:
            tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]  # safetensors ships no types
        assert isinstance(tensor, Tensor)
        return tensor

    @contextlib.contextmanager
    def _file_with(self, name: str) -> Iterator[safetensors.safe_open]:
        """The open file that holds a tensor; what safetensors raises inside names both."""
        file_name = self._file_of.get(name)
        if file_name is None:
            raise ModelError(f"tensor {name} is missing from {self._folder}", code="missing_tensor")
        try:
            yield self._handle(file_name)
        except safetensors.SafetensorError as error:
            raise ModelError(f"cannot read tensor {name} from {self._folder / file_name}: {error}", code="bad_model_file") from error

    def _handle(self, file_name: str) -> safetensors.safe_open:
        if file_name not in self._open:
            try:
                opened = safetensors.safe_open(self._folder / file_name, framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise ModelError(f"cannot read weights {self._folder / file_name}: {error}", code="bad_model_file") from error
            self._open[file_name] = self._files.enter_context(opened)
        return self._open[file_name]

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name, from the index of a split model or the one file."""
        index = self._folder / "model.safetensors.index.json"
        if not index.exists():
            names: list[str] = self._handle("model.safetensors").keys()  # type: ignore[no-untyped-call]  # safetensors ships no types
            return dict.fromkeys(names, "model.safetensors")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
            raise ModelError(f"{index} lacks a weight_map of tensor names to file names", code="bad_model_file")
        return {str(name): str(file_name) for name, file_name in weight_map.items()}
