"""What a configuration becomes on a host: by device, with what was named left alone, and refusals that give the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from duomo.config import DuomoConfig, load_config
from duomo.engine.card_shares import Pool
from duomo.engine.device import Host, look_at_host
from duomo.engine.settle import SLOT_TRAILER_BYTES, memory_limits, settle
from duomo.errors import ConfigError, ModelError
from tests.engine.scripted_driver import H100, ScriptedDriver

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-moe"
OLMOE, QWEN = ROOT / "bench/engine/models/olmoe-1b-7b", ROOT / "bench/engine/models/qwen3-30b-a3b"


def gpu() -> Host:
    return look_at_host(ScriptedDriver([H100]).open, lambda cuda: "")


def small_gpu() -> Host:
    return look_at_host(ScriptedDriver([{**H100, "total": 16_000_000_000, "free": 15_500_000_000}]).open, lambda cuda: "")


def no_gpu() -> Host:
    return look_at_host(ScriptedDriver([], has_cuda=False).open, lambda cuda: "")


def config(path: Path = TINY, /, **options: object) -> DuomoConfig:
    return load_config(None, {"model.path": str(path)} | options)


def test_on_a_cpu_nothing_but_names_changes() -> None:
    asked = config()
    settled = settle(asked, no_gpu)
    assert settled.plan is None and settled.card is None
    assert (settled.config.model.device, settled.config.layout) == ("cpu", "split")
    back = settled.config.model_copy(update={"layout": "auto", "model": settled.config.model.model_copy(update={"device": "auto"})})
    assert back == asked
    assert "no NVIDIA driver" in settled.why and "layout split" in settled.why


def test_on_a_gpu_one_process_large_blocks_and_a_plan() -> None:
    settled = settle(config(OLMOE, **{"model.random_weights": True}), gpu)
    assert (settled.config.model.device, settled.config.layout, settled.config.model.block_tokens) == ("cuda", "colocated", 64)
    assert settled.config.model.units == 16, "as many groups as OLMoE has layers: a decode step waits for one"
    assert settle(config(TINY), gpu).config.model.units == 8 and settle(config(TINY, layout="split"), gpu).config.model.units == 4
    assert settled.config.ray.start_timeout_s > 120
    assert (config(OLMOE).kv_transfer.num_write_threads, settled.config.kv_transfer.num_write_threads) == (2, 1)
    assert settled.plan is not None and settled.plan.block_tokens == 64 and settled.plan.num_tokens > 100_000
    assert settled.card is not None and "H100" in settled.why
    assert settle(settled.config, gpu).config == settled.config
    limits = memory_limits(settled.config, settled.model)
    assert (limits.max_model_tokens, limits.max_wave_tokens, limits.long_chunk_tokens, limits.quantise) == (4096, 2048, 8192, None)
    assert limits.most_rows == 4096, "the longest prompt is one chunk"


def test_what_is_named_stays() -> None:
    named = {
        "model.random_weights": True,
        "model.units": 2,
        "model.block_tokens": 128,
        "ray.start_timeout_s": 60.0,
        "model.max_model_tokens": 2048,
        "kv_transfer.num_write_threads": 3,
    }
    settled = settle(config(OLMOE, **named, **{"decode.max_batch": 8}), gpu)
    assert (settled.config.model.block_tokens, settled.config.ray.start_timeout_s, settled.config.model.units) == (128, 60.0, 2)
    assert settled.plan is not None and settled.plan.block_tokens == 128
    assert settled.config.kv_transfer.num_write_threads == 3


def test_fp8_leaves_more_for_kv() -> None:
    plain = settle(config(OLMOE, **{"model.random_weights": True}), gpu).plan
    small = settle(config(OLMOE, **{"model.random_weights": True, "model.quantize": "fp8"}), gpu).plan
    assert plain is not None and small is not None and small.num_blocks > plain.num_blocks


def test_drawn_weights_are_as_wide_as_was_asked_whatever_the_folder_was_quantised_to(tmp_path: Path) -> None:
    published = json.loads((OLMOE / "config.json").read_text())
    published["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(published))
    plans = [settle(config(path, **{"model.random_weights": True}), gpu).plan for path in (OLMOE, tmp_path)]
    assert plans[0] is not None and plans[0] == plans[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model.block_tokens": 48}, "block_tokens is 48: on a GPU a power of two"),
        ({"model.block_tokens": 32, "deterministic": True}, "block_tokens is 32: deterministic on a GPU needs at least 64"),
        ({"prefill.long_chunk_tokens": 8200, "deterministic": True}, r"long_chunk_tokens is 8200.*multiple of model.block_tokens \(64\)"),
        ({"prefill.mode": "chunked", "prefill.chunk_tokens": 500, "deterministic": True}, "prefill.chunk_tokens is 500: deterministic"),
        ({"prefill.max_wave_prompts": 17}, "max_wave_prompts is 17.*for 16 at most"),
    ],
)
def test_a_gpu_refuses_sizes_that_its_kernels_do_not_have(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settle(config(OLMOE, **{"model.random_weights": True}, **options), gpu)


def test_a_gpu_refuses_heads_that_are_no_power_of_two(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((QWEN / "config.json").read_text()) | {"head_dim": 96}))
    with pytest.raises(ModelError, match="head_dim 96.*a power of two"):
        settle(config(tmp_path, **{"model.random_weights": True}), gpu)


def test_what_does_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match="GB too much.*weights.*What would fit") as caught:
        settle(config(QWEN, **{"model.random_weights": True}), small_gpu)
    assert caught.value.code == "does_not_fit"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model.quantize": "fp8"}, "model.quantize is fp8.*no NVIDIA driver"),
        ({"model.random_weights": True}, "model.random_weights is set.*no NVIDIA driver"),
        ({"model.device": "cuda"}, "--device.*no NVIDIA driver"),
    ],
)
def test_a_cpu_refuses_what_only_a_gpu_does_and_says_why_it_is_one(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settle(config(**options), no_gpu)


def test_a_cpu_refuses_other_families_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((OLMOE / "config.json").read_text())
    with pytest.raises(ModelError, match="OlmoeForCausalLM runs on a GPU only"):
        settle(config(tmp_path), no_gpu)


def test_a_share_of_a_card_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="prefill.gpu_share is 0.4, but model.device is cpu: .*no NVIDIA driver"):
        settle(config(TINY, layout="split", **{"prefill.gpu_share": 0.4}), no_gpu)


def test_split_on_one_card_is_two_plans_and_on_two_a_card_each() -> None:
    asked = config(OLMOE, layout="split", **{"model.random_weights": True})
    one = settle(asked, gpu)
    assert one.config.model.device == "cuda" and "layout split: prefill.gpu_share 0.4; decode.gpu_share 0.6" in one.why
    assert one.config.kv_transfer.slot_bytes == 64 * 1024 * 1024
    assert one.plan is not None and one.prefill_plan is not None
    assert one.plan.total + one.prefill_plan.total == pytest.approx(H100["total"], abs=2)
    assert one.prefill_plan.num_blocks < one.plan.num_blocks and one.prefill_plan.weights == one.plan.weights
    lines = one.memory_lines()
    assert len(lines) == len(one.plan.lines()) + len(one.prefill_plan.lines())
    assert lines[0].startswith("prefill device") and lines[-1].startswith("decode  reserve")
    slot_bytes = one.config.kv_transfer.slot_bytes + SLOT_TRAILER_BYTES
    assert (one.prefill_plan.handoff, one.plan.handoff) == (5 * slot_bytes, 10 * slot_bytes)
    assert sum("handoff" in line for line in lines) == 2
    of_host = settle(config(OLMOE, layout="split", **{"model.random_weights": True, "kv_transfer.memory": "host"}), gpu)
    assert of_host.plan is not None and of_host.plan.handoff == 0 and of_host.plan.num_blocks > one.plan.num_blocks
    again = settle(one.config, gpu)
    assert again.config == one.config

    two = settle(asked, lambda: look_at_host(ScriptedDriver([H100, H100]).open, lambda cuda: ""))
    assert "a card for each replica" in two.why and two.config.decode.gpu_share == two.config.prefill.gpu_share == 1.0
    assert two.plan is not None and two.plan.num_blocks > one.plan.num_blocks and two.plan.total == H100["total"]
    alone = settle(asked, gpu, own="decode")
    assert alone.config.prefill.gpu_share == 1.0 and (alone.plan, alone.prefill_plan) == (two.plan, None)


def test_a_replica_starts_beside_the_one_that_has_the_rest_of_its_card() -> None:
    """The other has taken its share by then: only this one's must be free."""
    asked = config(OLMOE, layout="split", **{"model.random_weights": True, "prefill.gpu_share": 0.4, "decode.gpu_share": 0.6})

    def beside(free: int) -> Callable[[], Host]:
        return lambda: look_at_host(ScriptedDriver([{**H100, "free": free}]).open, lambda cuda: "")

    total = int(H100["total"])
    replicas: tuple[tuple[Pool, float], ...] = (("decode", 0.6), ("prefill", 0.4))
    for own, rest in replicas:
        settled = settle(asked, beside(int(rest * total)), own=own)
        assert settled.config.decode.gpu_share == 0.6 and settled.plan is not None
        with pytest.raises(ConfigError, match=rf"{own}.gpu_share {rest} is .* GB of it are free") as caught:
            settle(asked, beside(int(0.8 * rest * total)), own=own)
        assert caught.value.code == "does_not_fit"
    with pytest.raises(ConfigError, match="prefill.gpu_share 0.4 and decode.gpu_share 0.6 are"):
        settle(asked, beside(int(0.6 * total)))


def test_a_replica_is_not_refused_for_what_the_other_pool_needs() -> None:
    asked = config(OLMOE, layout="split", **{"model.random_weights": True, "prefill.max_wave_tokens": 1_000_000})
    decode = settle(asked, gpu, own="decode")
    assert decode.plan is not None and decode.memory_lines() == decode.plan.lines()
    with pytest.raises(ConfigError, match="prefill with gpu_share 1"):
        settle(asked, gpu, own="prefill")


def test_kv_goes_in_fp8_between_pools_on_a_gpu() -> None:
    asked = config(OLMOE, layout="split", **{"model.random_weights": True, "kv_transfer.kv_dtype": "fp8_e4m3"})
    settled = settle(asked, gpu)
    assert settled.config.kv_transfer.kv_dtype == "fp8_e4m3" and settled.plan is not None and settled.prefill_plan is not None


def test_split_is_refused_with_figures_where_both_do_not_fit_one_card() -> None:
    with pytest.raises(ConfigError, match="prefill with gpu_share 0.4: .*GB too much.*weights") as caught:
        settle(config(QWEN, layout="split", **{"model.random_weights": True}), gpu)
    assert caught.value.code == "does_not_fit"
    with pytest.raises(ConfigError, match=r"prefill.replicas \(3\).*need a card each, 4 in all; this host shows 1"):
        settle(config(OLMOE, layout="split", **{"model.random_weights": True, "prefill.replicas": 3}), gpu)


def test_what_colocated_refuses() -> None:
    with pytest.raises(ConfigError, match=r"decode.replicas \(2\) must be 1.*H100"):
        settle(config(**{"decode.replicas": 2}), gpu)
    with pytest.raises(ConfigError, match=r"kv_dtype is fp8_e4m3, but layout is colocated.*or set layout to split.*H100"):
        settle(config(**{"kv_transfer.kv_dtype": "fp8_e4m3"}), gpu)


def test_cards_of_another_machines_ray_are_not_looked_at() -> None:
    def never() -> Host:
        raise AssertionError("looked")

    there = {"ray.address": "10.0.0.1:6379"}
    settled = settle(config(**there), never)
    assert settled.config.model.device == "cpu" and "not looked at" in settled.why
    settled = settle(config(**there, **{"model.device": "cuda"}), never)
    assert (settled.config.layout, settled.plan) == ("colocated", None)
