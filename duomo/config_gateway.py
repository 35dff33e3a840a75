"""The REST edge's section of the configuration, and what every section is. Knows no other section (config.py)."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches what listens there. A name other than localhost is asked of nobody, and is not."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class GatewaySection(Section):
    """The REST edge and its limits."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    max_body_bytes: int = Field(default=8 * 1024 * 1024, ge=1024)
    max_choices: int = Field(default=128, ge=1, le=128)
    max_logprobs: int = Field(default=20, ge=0)
    max_stop_strings: int = Field(default=16, ge=1)
    default_max_tokens: int | None = Field(
        default=None, ge=1, description="of a chat that names no length; unnamed: what is left of the context"
    )
    max_queued_requests: int = Field(default=1024, ge=0)
    queue_ttl_s: float = Field(default=60.0, gt=0, description="a request that has waited for room so long is answered 429")
    max_ttft_s: float | None = Field(default=None, gt=0, description="requests whose first token would come later are answered 429")
    request_deadline_s: float = Field(default=300.0, gt=0)
    slow_client_bytes: int = Field(default=256 * 1024, ge=1024, description="a client this far behind is cut off")
    idempotency_ttl_s: float = Field(default=600.0, gt=0, description="how long an answer is kept for repeats of its Idempotency-Key")
    idempotency_answer_bytes: int = Field(default=256 * 1024, ge=1024, description="of one kept answer, packed; a larger one is not kept")
    idempotency_total_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, description="of all of them in Redis; the oldest go first")
    max_prefill_retries: int = Field(default=8, ge=0)
    max_resumes: int = Field(default=8, ge=0, description="of one choice: after preemptions, and after replicas that died or failed it")
    max_lost_replicas: int = Field(default=4, ge=0, description="a request that so many replicas died under, and one more, is ended")
    failover_wait_s: float = Field(default=30.0, ge=0, description="how long requests wait for a pool that has lost its last replica")
    breaker_failures: int = Field(default=3, ge=1, description="in a row: the replica, or pair, is taken only where no other has room")
    breaker_open_s: float = Field(default=5.0, gt=0, description="for so long, and for twice as long after each trial that failed")
    max_breaker_open_s: float = Field(default=60.0, gt=0)
    chat_template: Path | None = Field(default=None, description="a Jinja file in place of the model's own template")
    tool_parser: Literal["auto", "hermes", "none"] = Field(default="auto", description="how tool calls are written; auto: by the template")
    reasoning_parser: Literal["auto", "think", "none"] = Field(default="auto", description="how reasoning is marked; auto: by the template")
    serves_pool_report: bool = Field(default=True, description="GET /admin/pools: the replicas' last reports")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="of one prompt; unnamed: what the model's context holds")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="of one choice; unnamed: what the model's context holds")
    max_headers: int = Field(default=128, ge=8)
    max_header_bytes: int = Field(default=32 * 1024, ge=1024, description="the request's line and headers; more: 431")
    read_timeout_s: float = Field(
        default=30.0, gt=0, description="for a request's head, and for each 16 KiB of its body; slower clients are answered 408"
    )
    keep_alive_timeout_s: float = Field(default=5.0, gt=0, description="an idle connection is closed after it")
    max_connections: int = Field(default=4096, ge=1, description="requests of more connections are answered 503")
    api_keys_file: Path | None = Field(default=None, description="hashed keys (`duomo keys`), read again when it changes; unnamed: no keys")
    api_keys: tuple[str, ...] = Field(default=(), repr=False, description="hashed keys beside the file's, as its lines (DUOMO_API_KEY)")
    metrics_need_key: bool = Field(default=False, description="whether /metrics asks for a key of scope metrics or admin")
    ssl_certfile: Path | None = Field(default=None, description="PEM chain; with ssl_keyfile the gateway speaks TLS")
    ssl_keyfile: Path | None = Field(default=None, description="PEM, without a passphrase")
    ssl_ca_certs: Path | None = Field(default=None, description="PEM: clients must bring a certificate of these authorities")
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(default=None, ge=1, le=65535, description="where the admin API listens; unnamed: nowhere")
    audit_file: Path | None = Field(default=None, description="a JSON line for each call of the admin API that would change something")

    @property
    def has_keys(self) -> bool:
        """Whether calls need a key."""
        return self.api_keys_file is not None or bool(self.api_keys)

    @model_validator(mode="after")
    def _check_kept_answers(self) -> Self:
        if self.idempotency_answer_bytes > self.idempotency_total_bytes:
            raise ValueError(
                f"gateway.idempotency_answer_bytes is {self.idempotency_answer_bytes}, above gateway.idempotency_total_bytes "
                f"({self.idempotency_total_bytes}), which all kept answers share: lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _check_doors(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            missing = "gateway.ssl_keyfile" if self.ssl_keyfile is None else "gateway.ssl_certfile"
            raise ValueError(f"TLS needs a certificate and its key: name {missing} too")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("gateway.ssl_ca_certs asks clients for certificates, which needs gateway.ssl_certfile and gateway.ssl_keyfile")
        if self.admin_port is not None and self.admin_port == self.port:
            raise ValueError(f"gateway.admin_port is {self.admin_port}, which is gateway.port: the admin API has a port of its own")
        if self.admin_port is not None and not is_loopback(self.admin_host) and not self.has_keys:
            raise ValueError(
                f"gateway.admin_host is {self.admin_host}, where anybody could drain and scale: name gateway.api_keys_file, or 127.0.0.1"
            )
        if self.metrics_need_key and not self.has_keys:
            raise ValueError("gateway.metrics_need_key is set, but there are no keys: name gateway.api_keys_file")
        return self
