"""The one configuration schema: a section for each pool, checks across pools, and the only place that reads the environment.

Validated once at the door (frozen, unknown keys forbidden); services take the section they need. Knows no service and no library
but pydantic and yaml.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from duomo.api_keys import hashed
from duomo.config_gateway import GatewaySection, Section, is_loopback
from duomo.errors import ConfigError

KvDtype = Literal["model", "fp8_e4m3"]
_KEY_VARIABLE = "DUOMO_API_KEY"


class ModelSection(Section):
    """Which model is served, by which device, and under which name the API offers it (default: the folder's name).

    "auto" and an unnamed block_tokens are settled by the host that starts the system: duomo/engine/settle.py.
    """

    path: Path
    name: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantize: Literal["", "fp8"] = Field(default="", description="bf16 weights made fp8 as they are loaded; a GPU's")
    random_weights: bool = Field(default=False, description="draw the weights: config.json suffices; a GPU's")
    random_seed: int = Field(default=0, ge=0, description="of those weights: the same seed draws the same model")
    block_tokens: int = Field(default=16, ge=16, le=256, multiple_of=16, description="16 on a CPU, 64 on a GPU, unless named")
    max_model_tokens: int | None = Field(default=None, ge=1, description="context limit below the model's own")
    units: int = Field(
        default=4, ge=1, description="fixed runs of layers; a layer group is one or more. 16 in one process on a GPU, unless named"
    )

    @property
    def served_name(self) -> str:
        return self.name or self.path.resolve().name


class PoolSection(Section):
    """What prefill and decode have in common."""

    replicas: int = Field(default=1, ge=1)
    num_blocks: int = Field(ge=8)
    torch_threads: int = Field(default=1, ge=1, description="more than one stalls wherever the cores are shared: see docs/operations.md")
    listen: Literal["unix", "tcp"] = "unix"
    host: str = "127.0.0.1"
    hang_timeout_s: float = Field(default=30.0, gt=0, description="a step without progress for this long kills the replica")
    gpu_share: float | None = Field(
        default=None, gt=0, le=1, description="of its card; less than 1: one replica of the other pool has the rest"
    )


class PrefillSection(PoolSection):
    """Waves: how many prompts and tokens cross the layers together, in which order, and whose turn it is.

    mode: what runs of a wave without a break, a piece. layered: layer groups, all rows; chunked: all layers, chunk_tokens rows (a prompt of
    more goes alone); whole: everything. chunked and whole are baselines: docs/decisions/0008-layered-prefill.md.
    piece_target_s: what a layered piece takes at most where somebody waits for it, a group being the least. The default is a third of a
    decode step of a 7B MoE model at batch 32 on an H100 (bench/results/engine_h100.json), so that a step beside prefill is late by no more
    than that; on a CPU nearly every group takes longer, and a piece is one group.
    ttft_floor_s, ttft_stretch: a first token is due ttft_floor_s + ttft_stretch times what its prompt takes alone after its arrival. Due
    times order waves; they refuse nobody.
    """

    num_blocks: int = Field(default=512, ge=8)
    max_wave_tokens: int = Field(default=2048, ge=16)
    max_wave_prompts: int = Field(default=16, ge=1)
    units_per_group: int = Field(default=1, ge=1)
    mode: Literal["layered", "chunked", "whole"] = "layered"
    chunk_tokens: int = Field(default=512, ge=16, description="rows of a piece where mode is chunked")
    long_chunk_tokens: int = Field(
        default=8192, ge=16, description="a prompt of more than max_wave_tokens is computed in chunks of as many"
    )
    piece_target_s: float = Field(default=0.002, gt=0)
    ttft_floor_s: float = Field(default=0.01, ge=0)
    ttft_stretch: float = Field(default=4.0, ge=1)
    grant_timeout_s: float = Field(default=5.0, gt=0, description="no grant from D in this time: the request is re-routed")
    send_slots: int = Field(default=16, ge=1)
    prefix_cache_blocks: int | None = Field(default=None, ge=0, description="as decode's; colocated, where one pool is, decode's counts")


class DecodeSection(PoolSection):
    """The running batch and its admission.

    prefix_cache_blocks: blocks without a reader whose KV is kept for prompts that begin the same. Unnamed, all of them: whoever needs a
    block is given the one that nobody has asked for the longest, so that the cache takes room from no one. 0 keeps none.
    """

    num_blocks: int = Field(default=2048, ge=8)
    max_batch: int = Field(default=64, ge=1, le=256)
    max_itl_s: float | None = Field(
        default=None, gt=0, description="so few sequences run that 4 of 5 steps take no longer; other requests wait for their turn"
    )
    watermark_blocks: int = Field(default=8, ge=0)
    admit_ahead_tokens: int = Field(default=256, ge=1)
    ring_slots: int = Field(default=32, ge=1)
    max_preemptions: int = Field(default=2, ge=0)
    prefix_cache_blocks: int | None = Field(default=None, ge=0, description="unnamed: whatever nobody holds; 0: none")


MAX_WRITE_THREADS = 64


class TransferSection(Section):
    """How KV moves between prefill and decode.

    kv_dtype: as what it moves: "model", bit for bit, or "fp8_e4m3", in half the bytes of bf16 and with the errors of that rounding
    (docs/decisions/0011-fp8-kv-handoff.md). Both pools must be told the same. Pools themselves hold KV as the model computes it.
    """

    transport: Literal["nixl", "loopback"] = "nixl"
    slot_bytes: int = Field(default=1024 * 1024, ge=64 * 1024)
    memory: Literal["device", "host"] = Field(
        default="device", description="where rings and send slots lie: beside the KV they carry, or in the host's memory also on a GPU"
    )
    kv_dtype: KvDtype = "model"
    ucx_tls: str = Field(default="", description="UCX_TLS for NIXL; empty lets UCX choose")
    ucx_net_devices: str = Field(default="", description="UCX_NET_DEVICES for NIXL; set it to the RDMA device in production, lo in tests")
    require_transport: Literal["", "cma", "cuda_ipc", "rc", "dc", "ud", "srd", "tcp"] = Field(
        default="", description="UCX transport that KV must be written by; a start or a write that takes another is refused; empty: any"
    )
    max_bytes_per_s: float = Field(default=0.0, ge=0, description="caps one writer's rate; 0 is no cap")
    write_timeout_s: float = Field(default=5.0, gt=0)
    progress_delay_us: int = Field(default=1000, ge=0, description="pause of NIXL's progress thread; 100 on a GPU, unless named")
    num_write_threads: int = Field(
        default=2,
        ge=1,
        le=MAX_WRITE_THREADS,
        description="threads that copy a message of 16 MiB or more together, where UCX writes by CMA; 1 on a GPU, unless named",
    )


class RedisSection(Section):
    """Coordination. url empty: an embedded server is started on this machine (DUOMO_REDIS_URL overrides); it may hold a password."""

    url: str = Field(default="", repr=False)
    lease_s: float = Field(default=5.0, gt=0)


class WireSection(Section):
    """Sockets between processes."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    heartbeat_s: float = Field(default=1.0, gt=0)
    silence_timeout_s: float = Field(default=10.0, gt=0)
    max_frame_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    max_send_buffer_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, description="a peer this far behind is given up")
    secret: str = Field(default="", repr=False, description="shared secret of the HMAC in Hello (DUOMO_SECRET overrides)")


class TracingSection(Section):
    """Where spans go. Nothing is exported unless an endpoint or a folder is named."""

    otlp_endpoint: str = Field(default="", description="OTLP/HTTP base url (OTEL_EXPORTER_OTLP_ENDPOINT overrides)")
    directory: Path | None = Field(default=None, description="one JSON-lines file of spans for each process")
    service_namespace: str = "duomo"


class DelaySection(Section):
    """Seconds slept on purpose, place by place, so that tests can find them again in the traces and aim their kills. Zero in production."""

    gateway_tokenize_s: float = Field(default=0.0, ge=0)
    gateway_route_s: float = Field(default=0.0, ge=0)
    gateway_emit_s: float = Field(default=0.0, ge=0, description="before each write of a streamed answer")
    prefill_queue_s: float = Field(default=0.0, ge=0)
    prefill_group_s: float = Field(default=0.0, ge=0, description="before each layer group of a wave")
    kv_handoff_s: float = Field(default=0.0, ge=0, description="before each message of a handle is written")
    decode_admit_s: float = Field(default=0.0, ge=0)
    decode_step_s: float = Field(default=0.0, ge=0, description="inside each decode step")


class RaySection(Section):
    """How the four deployments are placed."""

    address: str = Field(default="local", description="'local' starts Ray here; otherwise an existing cluster's address")
    start_timeout_s: float = Field(default=120.0, gt=0)
    pin_by_resource: bool = Field(default=False, description="place each pool on nodes that offer the resource duomo_<pool>")


class DuomoConfig(Section):
    """Everything a Duomo system is told.

    layout: "split" runs prefill and decode as two pools of processes; "colocated" runs both in one process with one copy of the weights
    and one block pool of decode.num_blocks (prefill.num_blocks, prefill.prefix_cache_blocks and kv_transfer say nothing then). "auto" is
    colocated on a GPU, where memory is planned and decode.num_blocks says nothing either, and split on a CPU.
    deterministic: an answer's bytes do not depend on what else runs; a CPU's never do, unless kv_transfer.kv_dtype is fp8_e4m3.
    """

    model: ModelSection
    layout: Literal["auto", "split", "colocated"] = "auto"
    deterministic: bool = False
    gpu_memory_fraction: float = Field(
        default=0.9, gt=0, lt=1, description="of the card, or of a pool's share of it; the rest is a reserve"
    )
    gateway: GatewaySection = GatewaySection()
    prefill: PrefillSection = PrefillSection()
    decode: DecodeSection = DecodeSection()
    kv_transfer: TransferSection = TransferSection()
    redis: RedisSection = RedisSection()
    wire: WireSection = WireSection()
    tracing: TracingSection = TracingSection()
    ray: RaySection = RaySection()
    delays: DelaySection = DelaySection()
    run_dir: Path | None = Field(default=None, description="folder of this run's sockets and files; one is made where none is named")

    @model_validator(mode="after")
    def _check_across_pools(self) -> Self:
        if self.prefill.units_per_group > self.model.units:
            raise ValueError(f"prefill.units_per_group is {self.prefill.units_per_group}, but model.units is only {self.model.units}")
        if self.decode.watermark_blocks >= self.decode.num_blocks:
            raise ValueError(
                f"decode.watermark_blocks ({self.decode.watermark_blocks}) must be below decode.num_blocks ({self.decode.num_blocks})"
            )
        if self.prefill.mode == "chunked" and self.prefill.chunk_tokens > self.prefill.max_wave_tokens:
            raise ValueError(
                f"prefill.chunk_tokens ({self.prefill.chunk_tokens}) must be at most prefill.max_wave_tokens "
                f"({self.prefill.max_wave_tokens}) where prefill.mode is chunked"
            )
        self._check_secret()
        self._check_device()
        if self.deterministic and self.kv_transfer.kv_dtype != "model":
            raise ValueError(
                f"kv_transfer.kv_dtype is {self.kv_transfer.kv_dtype}, but deterministic is set: KV that was rounded on its way differs "
                "from what decode has computed itself, so an answer would depend on which of the two is left; leave one of the options out"
            )
        if self.layout == "colocated":
            self._check_colocated()
        return self

    def _check_secret(self) -> None:
        """Sockets that other machines reach carry prompts, and take whoever holds the secret for a gateway: an empty one is everybody's."""
        for name, pool in (("prefill", self.prefill), ("decode", self.decode)):
            if pool.listen == "tcp" and not is_loopback(pool.host) and not self.wire.secret:
                raise ValueError(
                    f"{name}.listen is tcp and {name}.host {pool.host}, but wire.secret (DUOMO_SECRET) is empty: whoever reaches it could "
                    "send requests and read prompts; give every process the same secret (openssl rand -hex 32), or listen on 127.0.0.1"
                )

    def _check_device(self) -> None:
        model = self.model
        if model.device == "cpu" and model.quantize:
            raise ValueError(f"model.quantize is {model.quantize}, but model.device is cpu: weights are quantised on a GPU alone")
        if model.device == "cpu" and model.random_weights:
            raise ValueError("model.random_weights is set, but model.device is cpu: weights are drawn on a GPU alone")
        self._check_shares()

    def _check_shares(self) -> None:
        named = {"prefill": self.prefill.gpu_share, "decode": self.decode.gpu_share}
        if self.model.device == "cpu" and any(share is not None for share in named.values()):
            said = " and ".join(f"{pool}.gpu_share is {share:g}" for pool, share in named.items() if share is not None)
            raise ValueError(f"{said}, but model.device is cpu: only a GPU is shared; leave gpu_share out")
        parts = {pool: share for pool, share in named.items() if share is not None and share < 1}
        if not parts:
            return
        said = " and ".join(f"{pool}.gpu_share is {share:g}" for pool, share in parts.items())
        if self.layout == "colocated":
            raise ValueError(f"{said}, but layout is colocated: one process has the card; gpu_memory_fraction limits what it takes")
        if (self.prefill.replicas, self.decode.replicas) != (1, 1):
            raise ValueError(
                f"{said}, which is one replica of each pool on one card, but prefill.replicas is {self.prefill.replicas} and "
                f"decode.replicas {self.decode.replicas}: with a card for each leave gpu_share out"
            )
        if sum(share for share in named.values() if share is not None) > 1:
            raise ValueError(f"prefill.gpu_share ({named['prefill']:g}) and decode.gpu_share ({named['decode']:g}) are more than one card")

    def _check_colocated(self) -> None:
        if self.kv_transfer.kv_dtype != "model":
            raise ValueError(
                f"kv_transfer.kv_dtype is {self.kv_transfer.kv_dtype}, but layout is colocated, where KV changes its owner and nothing is "
                "sent: it would change neither bytes nor memory; leave it out, or set layout to split"
            )
        if (self.prefill.replicas, self.decode.replicas) != (1, 1):
            raise ValueError(
                f"layout is colocated, which is one process: prefill.replicas ({self.prefill.replicas}) and decode.replicas "
                f"({self.decode.replicas}) must be 1; layout split has more"
            )
        if self.prefill.torch_threads != self.decode.torch_threads:
            raise ValueError(
                f"layout is colocated, where one thread computes: prefill.torch_threads ({self.prefill.torch_threads}) and "
                f"decode.torch_threads ({self.decode.torch_threads}) must be equal"
            )


def load_config(file: Path | None, overrides: dict[str, object]) -> DuomoConfig:
    """Read `file` (YAML), lay `overrides` ("decode.replicas": 2) over it, then the environment; validate once.

    Raises ConfigError naming the file or the option and what would be right.
    """
    raw: dict[str, object] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read configuration file {file}: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"configuration file {file} must hold a mapping of sections")
        raw = loaded
    for dotted, value in (overrides | _environment()).items():
        _set(raw, dotted, value)
    return validated(raw, f"in {file}" if file else "")


def changed(config: DuomoConfig, changes: dict[str, object], why: str) -> DuomoConfig:
    """`config` with some options ("model.device": "cpu") settled, checked again as a whole. ConfigError ends with `why`."""
    raw = config.model_dump()
    for dotted, value in changes.items():
        _set(raw, dotted, value)
    return validated(raw, why)


def validated(raw: dict[str, object], note: str) -> DuomoConfig:
    """Raises ConfigError naming the first option that is wrong and, behind it, the note."""
    try:
        return DuomoConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "configuration"
        said = _known_options(first["loc"]) if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {said}" + (f" ({note})" if note else "")) from error


def _known_options(where: tuple[int | str, ...]) -> str:
    """For an option that does not exist: those that do, beside it."""
    section: type[BaseModel] = DuomoConfig
    for part in where[:-1]:
        inner = section.model_fields[str(part)].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel), where
        section = inner
    return f"no such option; there are {', '.join(section.model_fields)}"


def _environment() -> dict[str, object]:
    names = {
        "DUOMO_REDIS_URL": "redis.url",
        "DUOMO_SECRET": "wire.secret",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "tracing.otlp_endpoint",
    }
    told: dict[str, object] = {dotted: os.environ[name] for name, dotted in names.items() if os.environ.get(name)}
    keys = os.environ.get(_KEY_VARIABLE)
    if keys is not None and not keys.strip():  # whoever sets it wants a key asked for
        raise ConfigError(f"{_KEY_VARIABLE} is set but empty: name a key, or unset it to serve without")
    if keys is not None:  # hashed here: no configuration holds a key itself
        named = enumerate(keys.split(","), start=1)
        told["gateway.api_keys"] = [hashed(key.strip(), f"{_KEY_VARIABLE}.{number}", ["inference"]).line() for number, key in named]
    return told


def _set(raw: dict[str, object], dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    place = raw
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: section {parent} must be a mapping")
        place = inner
    place[leaf] = value
