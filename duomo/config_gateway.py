"""The REST edge's section of the configuration, and what every section is. Knows no other section (config.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewaySection(Section):
    """The REST edge and its limits."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    max_body_bytes: int = Field(default=8 * 1024 * 1024, ge=1024)
    max_choices: int = Field(default=128, ge=1, le=128)
    max_logprobs: int = Field(default=20, ge=0)
    max_stop_strings: int = Field(default=16, ge=1)
    default_max_tokens: int = Field(default=512, ge=1, description="completion length where a chat request names none")
    max_queued_requests: int = Field(default=1024, ge=0)
    request_deadline_s: float = Field(default=300.0, gt=0)
    slow_client_bytes: int = Field(default=256 * 1024, ge=1024, description="a client this far behind is cut off")
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
