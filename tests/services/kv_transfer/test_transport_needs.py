"""What a system lacks for a transport is found in the kernel's files, told with what to do, and fails only where it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from duomo.config import TransferSection
from services.kv_transfer.transport_needs import Finding, System, findings


class FakeRoot:
    """A tree of the kernel's files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, path: str, text: str = "") -> FakeRoot:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")
        return self

    def with_port(self, name: str = "mlx5_0", state: str = "4: ACTIVE") -> FakeRoot:
        at = f"sys/class/infiniband/{name}/ports/1"
        self.put(f"{at}/state", state).put(f"{at}/rate", "400 Gb/sec (4X NDR)").put(f"{at}/link_layer", "InfiniBand")
        return self.put("dev/infiniband/uverbs0")


@pytest.fixture
def tree(tmp_path: Path) -> FakeRoot:
    return FakeRoot(tmp_path).put("sys/class/net/lo/mtu", "65536").put("sys/class/net/eth0/mtu", "9000")


def found(tree: FakeRoot, *, memlock_bytes: int | None = None, has_gpu: bool = False, **section: str) -> list[Finding]:
    system = System(root=tree.root, has_gpu=has_gpu)
    if memlock_bytes is not None:
        system = System(root=tree.root, has_gpu=has_gpu, memlock_bytes=memlock_bytes)
    return list(findings(system, TransferSection.model_validate(section)))


def wrong(among: list[Finding]) -> list[str]:
    return [finding.text for finding in among if not finding.is_fine]


def test_a_host_without_rdma_is_fine_until_rdma_is_required(tree: FakeRoot) -> None:
    assert wrong(found(tree)) == [] and "no RDMA device" in found(tree)[0].text
    (problem,) = wrong(found(tree, require_transport="rc"))
    assert "no RDMA device" in problem and "mlx5_ib" in problem


def test_a_working_device_is_named_with_its_rate(tree: FakeRoot) -> None:
    tree.with_port().with_port("mlx5_1", "1: DOWN").put("sys/module/nvidia_peermem/refcnt", "1")
    told = found(tree, has_gpu=True, require_transport="rc", ucx_net_devices="mlx5_0:1")
    assert wrong(told) == []
    text = "\n".join(finding.text for finding in told)
    for word in (
        "mlx5_0:1 400 Gb/sec (4X NDR) InfiniBand",
        "not active: mlx5_1:1",
        "uverbs0",
        "unlimited",
        "nvidia_peermem is loaded",
        "mlx5_0:1 is here",
    ):
        assert word in text, text


def test_ports_that_are_down_say_so(tree: FakeRoot) -> None:
    (problem,) = wrong(found(tree.with_port(state="2: INIT")))
    assert "no active port (mlx5_0:1 is 2: INIT)" in problem and "subnet manager" in problem


def test_a_container_without_its_devices(tree: FakeRoot) -> None:
    tree.with_port()
    (tree.root / "dev/infiniband/uverbs0").unlink()
    (problem,) = wrong(found(tree))
    assert "--device=/dev/infiniband" in problem


def test_little_locked_memory_matters_where_rdma_is(tree: FakeRoot) -> None:
    assert wrong(found(tree, memlock_bytes=8 << 20)) == []
    (problem,) = wrong(found(tree.with_port(), memlock_bytes=8 << 20))
    assert "8,388,608 bytes" in problem and "--ulimit memlock=-1" in problem


def test_gpu_direct_is_peermem_or_dma_buf_or_missing(tree: FakeRoot) -> None:
    (problem,) = wrong(found(tree.with_port(), has_gpu=True))
    assert "modprobe nvidia_peermem" in problem
    tree.put("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06")
    assert len(wrong(found(tree, has_gpu=True))) == 1
    tree.put("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06")
    assert wrong(found(tree, has_gpu=True)) == [] and wrong(found(tree, has_gpu=False)) == []


@pytest.mark.parametrize(("wanted", "is_here"), [("lo", True), ("eth0,lo", True), ("mlx5_0:1", True), ("mlx5_0", True), ("^eth0", True)])
def test_devices_that_are_here(tree: FakeRoot, wanted: str, is_here: bool) -> None:
    assert (wrong(found(tree.with_port(), ucx_net_devices=wanted)) == []) is is_here


@pytest.mark.parametrize("wanted", ["mlx5_9:1", "mlx5_0:2", "eth1", "eth0,ib0"])
def test_devices_that_are_not_here_are_told_with_those_that_are(tree: FakeRoot, wanted: str) -> None:
    (problem,) = wrong(found(tree.with_port(), ucx_net_devices=wanted))
    assert wanted.rpartition(",")[2] in problem and "there are mlx5_0:1, eth0, lo" in problem


def test_a_named_port_that_is_down(tree: FakeRoot) -> None:
    tree.with_port().with_port("mlx5_1", "1: DOWN")
    (problem,) = wrong(found(tree, ucx_net_devices="mlx5_1:1"))
    assert "mlx5_1:1, whose port is not active" in problem


@pytest.mark.parametrize(
    ("scope", "cap_eff", "is_allowed"),
    [
        ("0", "0", True),
        ("1", "0", True),
        ("2", "0000000000000000", False),
        ("2", "000001ffffffffff", True),
        ("3", "000001ffffffffff", False),
    ],
)
def test_what_yama_lets_ucx_do(tree: FakeRoot, scope: str, cap_eff: str, is_allowed: bool) -> None:
    tree.put("proc/sys/kernel/yama/ptrace_scope", scope).put("proc/self/status", f"Name:\tpython\nCapEff:\t{cap_eff}")
    assert (wrong(found(tree, require_transport="cma")) == []) is is_allowed
    assert wrong(found(tree)) == [], "told, and no fault, where CMA is not required"
    assert ("forbids" in found(tree)[-1].text) is not is_allowed


def test_this_machine_can_be_looked_at() -> None:
    assert list(findings(System.here(has_gpu=False), TransferSection()))
