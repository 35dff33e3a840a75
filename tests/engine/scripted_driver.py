"""A driver library that answers as told, for tests: the functions of libcuda and NVML that duomo/engine/device.py calls."""

from __future__ import annotations

from typing import Any

H100: dict[str, Any] = {
    "name": "NVIDIA H100 80GB HBM3",
    "capability": (9, 0),
    "sms": 132,
    "total": 85_000_000_000,
    "free": 84_000_000_000,
}


class ScriptedDriver:
    """`open` stands for ctypes.CDLL. Codes other than 0 are errors, as the driver counts them."""

    def __init__(
        self,
        cards: list[dict[str, Any]],
        *,
        has_cuda: bool = True,
        has_nvml: bool = True,
        init_code: int = 0,
        attribute_code: int = 0,
        version_code: int = 0,
        nvml_code: int = 0,
    ) -> None:
        self.cards = cards
        self._has = {"libcuda.so.1": has_cuda, "libnvidia-ml.so.1": has_nvml}
        self._init_code = init_code
        self._attribute_code = attribute_code
        self._version_code = version_code
        self._nvml_code = nvml_code

    def open(self, name: str) -> Any:
        if not self._has[name]:
            raise OSError(f"{name}: cannot open shared object file")
        return self

    def cuInit(self, flags: int) -> int:
        return self._init_code

    def cuGetErrorName(self, code: int, out: Any) -> int:
        out._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}[code]
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 13000
        return self._version_code

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, size: int, device: int) -> int:
        out.value = self.cards[device]["name"].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: int) -> int:
        out._obj.value = self.cards[device]["total"]
        return 0

    def cuDeviceGetAttribute(self, out: Any, which: int, device: int) -> int:
        card = self.cards[device]
        out._obj.value = {75: card["capability"][0], 76: card["capability"][1], 16: card["sms"]}[which]
        return self._attribute_code

    def cuDeviceGetPCIBusId(self, out: Any, size: int, device: int) -> int:
        out.value = f"0000:{device + 4:02x}:00.0".encode()
        return 0

    def nvmlInit_v2(self) -> int:
        return self._nvml_code

    def nvmlSystemGetDriverVersion(self, out: Any, size: int) -> int:
        out.value = b"580.65.06"
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: Any, out: Any) -> int:
        out._obj.value = int(bus_id.value.split(b":")[1], 16)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> int:
        out._obj.free = self.cards[handle.value - 4]["free"]
        return 0
