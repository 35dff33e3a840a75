"""The configuration: one schema, checked once, errors that name the option."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from duomo.api_keys import KeyRing, parse_entries
from duomo.config import DuomoConfig, changed, load_config
from duomo.config_gateway import Section
from duomo.errors import ConfigError

ENVIRONMENT = ("DUOMO_REDIS_URL", "DUOMO_SECRET", "DUOMO_API_KEY", "OTEL_EXPORTER_OTLP_ENDPOINT")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_a_model_is_enough() -> None:
    config = load_config(None, {"model.path": "models/tiny-moe"})
    assert config.model.served_name == "tiny-moe"
    assert (config.prefill.replicas, config.decode.replicas) == (1, 1)
    assert config.kv_transfer.transport == "nixl"
    assert not config.tracing.otlp_endpoint and config.tracing.directory is None


def test_options_lie_over_the_file_and_the_environment_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "duomo.yaml"
    file.write_text("model: {path: /m, name: fable}\ndecode: {replicas: 2, max_batch: 32}\nredis: {url: redis://file}\n")
    monkeypatch.setenv("DUOMO_REDIS_URL", "redis://environment")
    monkeypatch.setenv("DUOMO_SECRET", "hush")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    config = load_config(file, {"decode.replicas": 3, "redis.url": "redis://option"})
    assert (config.decode.replicas, config.decode.max_batch, config.model.served_name) == (3, 32, "fable")
    assert config.redis.url == "redis://environment"
    assert (config.wire.secret, config.tracing.otlp_endpoint) == ("hush", "http://collector:4318")


@pytest.mark.parametrize(
    ("host", "secret", "is_taken"),
    [
        ("0.0.0.0", "", False),
        ("10.0.0.7", "", False),
        ("::", "", False),
        ("replica.local", "", False),
        ("0.0.0.0", "shared", True),
        ("127.0.0.1", "", True),
        ("::1", "", True),
    ],
)
@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_a_socket_that_strangers_reach_needs_a_secret(pool: str, host: str, secret: str, is_taken: bool) -> None:
    told = {"model.path": "models/tiny-moe", f"{pool}.listen": "tcp", f"{pool}.host": host, "wire.secret": secret}
    if is_taken:
        load_config(None, told)
    else:
        with pytest.raises(ConfigError, match=rf"{pool}.host {host}.*DUOMO_SECRET"):
            load_config(None, told)
    load_config(None, told | {f"{pool}.listen": "unix"})


def test_keys_of_the_environment_are_hashed_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOMO_API_KEY", "token-abc123, token-def456")
    config = load_config(None, {"model.path": "models/tiny-moe"})
    assert "token-" not in config.model_dump_json() and config.gateway.has_keys
    ring = KeyRing(parse_entries("\n".join(config.gateway.api_keys)))
    holders = [ring.holder(key) for key in ("token-abc123", "token-def456")]
    assert [(holder.name, holder.scopes) for holder in holders if holder] == [
        ("DUOMO_API_KEY.1", ("inference",)),
        ("DUOMO_API_KEY.2", ("inference",)),
    ]
    monkeypatch.setenv("DUOMO_API_KEY", "two words")
    with pytest.raises(ConfigError, match="DUOMO_API_KEY.1") as refusal:
        load_config(None, {"model.path": "models/tiny-moe"})
    assert "two words" not in str(refusal.value)
    for empty in ("", " "):
        monkeypatch.setenv("DUOMO_API_KEY", empty)
        with pytest.raises(ConfigError, match="DUOMO_API_KEY is set but empty"):
            load_config(None, {"model.path": "models/tiny-moe"})


def test_one_kept_answer_is_no_larger_than_all_may_be() -> None:
    told = {"model.path": "models/tiny-moe", "gateway.idempotency_answer_bytes": 2048}
    load_config(None, told | {"gateway.idempotency_total_bytes": 2048})
    with pytest.raises(ConfigError, match=r"gateway.idempotency_answer_bytes is 2048, above gateway.idempotency_total_bytes \(2047\)"):
        load_config(None, told | {"gateway.idempotency_total_bytes": 2047})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gateway.read_timeout_s", 0),
        ("gateway.max_headers", 7),
        ("gateway.admin_port", 0),
        ("gateway.max_prompt_tokens", 0),
        ("decode.replicas", 0),
        ("layout", "beside"),
        ("decode.max_batch", 257),
        ("decode.num_blocks", 7),
        ("model.block_tokens", 17),
        ("gateway.port", 65536),
        ("gateway.max_choices", 129),
        ("kv_transfer.transport", "pigeon"),
        ("kv_transfer.slot_bytes", 65535),
        ("kv_transfer.kv_dtype", "fp8"),
        ("wire.heartbeat_s", 0),
        ("wire.max_send_buffer_bytes", 1),
        ("decode.replica", 2),
        ("decoder", {}),
        ("wire.secret", ["a"]),
        ("prefill.mode", "pieces"),
        ("prefill.piece_target_s", 0),
        ("prefill.long_chunk_tokens", 15),
        ("prefill.ttft_stretch", 0.5),
    ],
)
def test_a_wrong_value_or_an_unknown_key_names_its_option(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^bad_config \\(start\\): {option}: "):
        load_config(None, {"model.path": "/m", option: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill.units_per_group": 5}, "prefill.units_per_group is 5, but model.units is only 4"),
        ({"kv_transfer.kv_dtype": "fp8_e4m3", "deterministic": True}, "kv_transfer.kv_dtype is fp8_e4m3, but deterministic is set"),
        (
            {"kv_transfer.kv_dtype": "fp8_e4m3", "layout": "colocated"},
            "kv_dtype is fp8_e4m3, but layout is colocated, .* set layout to split",
        ),
        ({"layout": "colocated", "decode.replicas": 2}, r"decode.replicas \(2\) must be 1"),
        ({"layout": "colocated", "prefill.torch_threads": 2}, r"prefill.torch_threads \(2\) and decode.torch_threads \(1\) must be equal"),
        ({"decode.num_blocks": 8, "decode.watermark_blocks": 8}, r"decode.watermark_blocks \(8\) must be below decode.num_blocks \(8\)"),
        (
            {"prefill.mode": "chunked", "prefill.max_wave_tokens": 256},
            r"prefill.chunk_tokens \(512\) must be at most prefill.max_wave_tokens \(256\)",
        ),
    ],
)
def test_pools_are_checked_against_each_other(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, {"model.path": "/m"} | options)


@pytest.mark.parametrize("text", ["- a list", "decode: [1, 2", "just text", "\x00"])
def test_a_file_that_is_no_mapping_names_itself(text: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(file, {})


def test_a_missing_file_and_a_section_that_is_a_word_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml", {})
    file = tmp_path / "word.yaml"
    file.write_text("model: {path: /m}\ndecode: many\n")
    with pytest.raises(ConfigError, match="decode"):
        load_config(file, {"decode.replicas": 2})


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="model: Field required"):
        load_config(None, {})


def test_what_was_checked_cannot_change() -> None:
    config = load_config(None, {"model.path": "/m"})
    with pytest.raises(ValidationError, match="frozen"):
        config.decode.replicas = 2  # type: ignore[misc]  # the point of the test


def test_defaults_pass_their_own_checks() -> None:
    sections = [field.default for field in DuomoConfig.model_fields.values() if isinstance(field.default, Section)]
    assert len(sections) >= 8
    for section in sections:
        assert type(section).model_validate(section.model_dump()) == section


def test_a_devices_options_are_checked_across() -> None:
    base: dict[str, object] = {"model.path": "/m"}
    cases: tuple[tuple[dict[str, object], str], ...] = (
        ({"model.device": "cpu", "model.quantize": "fp8"}, "model.quantize"),
        ({"model.device": "cpu", "model.random_weights": True}, "model.random_weights"),
        ({"model.device": "cpu", "decode.gpu_share": 0.6}, "decode.gpu_share is 0.6, but model.device is cpu"),
        (
            {"model.device": "cpu", "prefill.gpu_share": 1.0, "decode.gpu_share": 1.0},
            "prefill.gpu_share is 1 and decode.gpu_share is 1, but",
        ),
        ({"prefill.gpu_share": 0.5, "layout": "colocated"}, "prefill.gpu_share is 0.5, but layout is colocated"),
        ({"model.quantize": "int4"}, "model.quantize"),
        ({"gpu_memory_fraction": 1.0}, "gpu_memory_fraction"),
    )
    for options, words in cases:
        with pytest.raises(ConfigError, match=words):
            load_config(None, base | options)
    config = load_config(None, base)
    assert (config.model.device, config.layout, config.model.quantize, config.deterministic) == ("auto", "auto", "", False)


def test_a_change_is_checked_as_a_whole_and_says_why() -> None:
    config = load_config(None, {"model.path": "/m", "wire.secret": "hush", "model.quantize": "fp8"})
    after = changed(config, {"model.device": "cuda", "layout": "colocated"}, "a card was found")
    assert (after.model.device, after.layout, after.wire.secret) == ("cuda", "colocated", "hush")
    with pytest.raises(ConfigError, match="model.quantize.*no card was found"):
        changed(config, {"model.device": "cpu"}, "no card was found")
