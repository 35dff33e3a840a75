"""OLMoE against transformers with the same drawn weights, all rows of prompts and decode steps: small here, at full size on a GPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from bench.reference.float64_decoder import float64_run
from duomo.models.config import load_config
from duomo.models.gpu_random import random_gpu_weights
from duomo.models.gpu_weights import GpuWeights
from tests.models.beside_transformers import SEED, Computed, OurEngine, Peer, clear_rows, num_rerouted, row_errors, std_of
from tests.models.small_decoders import decoder_bound

FULL_SIZE = Path(__file__).parents[2] / "bench" / "engine" / "models" / "olmoe-1b-7b"
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
SMALL |= {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 97, "eos_token_id": 2}
# Kernels of a GPU want tiles of what a model has; wide enough for tensor cores.
WIDE = SMALL | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 256, "vocab_size": 1000}
NOT_WORSE = 1.5  # than transformers in the same precision, by the root mean square over rows


@dataclass(frozen=True)
class Rig:
    """Both models, and what ours answered."""

    folder: Path
    weights: GpuWeights
    peer: Peer
    engine: OurEngine
    launched: list[Computed]
    whole: list[Computed]

    @property
    def limit(self) -> float:
        return decoder_bound(self.weights.dtype, self.weights.config.num_layers)


def rig_of(folder: Path, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...], chunk_tokens: int, *, num_new: int) -> Rig:
    config = load_config(folder, needs_weights=False)
    weights = random_gpu_weights(config, device=device, dtype=dtype, seed=SEED, std=std_of(config))
    drawn = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(3, config.vocab, (length,), generator=drawn).tolist() for length in lengths]
    engine = OurEngine(weights, prompts, num_new)
    launched = engine.prompts_launched(chunk_tokens)
    engine.capture()
    return Rig(folder, weights, Peer.of(folder, config, device, dtype), engine, launched, engine.prompts_and_steps())


def judge(rig: Rig, sequences: list[Computed]) -> dict[str, float]:
    """Hold all rows against float64, and how wrong they are against how wrong transformers' are. Returns figures."""
    ours, theirs, clear, agree, rerouted, their_rerouted = [], [], [], [], 0, 0
    for sequence in sequences:
        reference = float64_run(rig.weights, sequence.token_ids, sequence.ids_LTK)
        their_TV = rig.peer.logits(sequence.token_ids, sequence.ids_LTK)
        ours.append(row_errors(sequence.logits_TV, reference.logits_TV))
        theirs.append(row_errors(their_TV, reference.logits_TV))
        clear.append(clear_rows(reference.logits_TV, rig.limit))
        best_T = reference.logits_TV.argmax(-1)
        agree.append((sequence.logits_TV.argmax(-1) == best_T) & (their_TV.argmax(-1) == best_T))
        assert not reference.misrouted(rig.limit), f"experts far behind were taken, prompt of {sequence.num_prompt}"
        rerouted += num_rerouted(sequence.ids_LTK, reference)
        their_rerouted += num_rerouted(rig.peer.own_LTK, reference)
    ours_T, theirs_T, clear_T, agree_T = (torch.cat(parts) for parts in (ours, theirs, clear, agree))
    rms, their_rms = (float(errors_T.square().mean().sqrt()) for errors_T in (ours_T, theirs_T))
    figures = {
        "rows": float(len(ours_T)), "limit": rig.limit, "ours_max": float(ours_T.max()), "theirs_max": float(theirs_T.max()),
        "ours_rms": rms, "theirs_rms": their_rms, "clear_share": float(clear_T.double().mean()),
        "rerouted": float(rerouted), "their_rerouted": float(their_rerouted),
    }  # fmt: skip
    print({name: float(f"{value:.4g}") for name, value in figures.items()})
    assert figures["ours_max"] <= rig.limit, figures
    assert figures["theirs_max"] <= 2 * rig.limit, f"transformers' own rows are not what they should be: {figures}"
    assert rms <= NOT_WORSE * their_rms, figures
    assert figures["clear_share"] >= 0.1, f"too few rows say anything of their best token: {figures}"
    assert bool(agree_T[clear_T].all()), f"best tokens of rows {(clear_T & ~agree_T).nonzero().flatten().tolist()}"
    assert rerouted <= NOT_WORSE * their_rerouted + 3 * their_rerouted**0.5 + 1, figures
    return figures


def judge_broken(rig: Rig, sequence: Computed) -> None:
    """The bound sees one layer of all whose experts answer for each other."""
    middle = rig.weights.config.num_layers // 2
    layer = rig.weights.layers[middle]
    swapped = replace(layer, experts=replace(layer.experts, down_EDF=layer.experts.down_EDF.roll(1, 0)))
    broken = replace(rig.weights, layers=(*rig.weights.layers[:middle], swapped, *rig.weights.layers[middle + 1 :]))
    expected = float64_run(broken, sequence.token_ids, sequence.ids_LTK)
    assert float(row_errors(sequence.logits_TV, expected.logits_TV).median()) > rig.limit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """float32 on a CPU, whose interpreter multiplies nothing shorter right."""
    folder, on_gpu = tmp_path_factory.mktemp("olmoe"), torch.cuda.is_available()
    (folder / "config.json").write_text(json.dumps(json.loads((FULL_SIZE / "config.json").read_text()) | (WIDE if on_gpu else SMALL)))
    return rig_of(folder, torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32, (1, 3, 13), 8, num_new=2)


@pytest.fixture(scope="module")
def full() -> Iterator[Rig]:
    rig = rig_of(FULL_SIZE, torch.device("cuda"), torch.bfloat16, (1, 17, 200, 640), 256, num_new=8)
    yield rig
    del rig
    gc.collect()
    torch.cuda.empty_cache()


def test_a_small_olmoe(small: Rig) -> None:
    judge(small, small.launched)
    judge(small, small.whole)
    judge_broken(small, small.whole[-1])


def test_a_peer_that_is_given_no_wrong_experts_is_transformers_itself(small: Rig) -> None:
    """What it would have taken, given to it: the logits of a model without hooks."""
    sequence = small.whole[-1]
    own_LTK = sequence.ids_LTK
    for _ in own_LTK:  # a layer's own choice holds once those below it are its own
        logits_TV = small.peer.logits(sequence.token_ids, own_LTK)
        own_LTK = small.peer.own_LTK
    free = Peer.of(small.folder, small.weights.config, small.weights.device, small.weights.dtype)
    for layer in free.model.model.layers:
        layer.mlp.gate._forward_hooks.clear()
    with torch.inference_mode():
        expected_TV = free.model(input_ids=torch.tensor([sequence.token_ids], device=small.weights.device), use_cache=False).logits[0]
    assert torch.equal(logits_TV, expected_TV)


@pytest.mark.gpu
def test_olmoe_at_full_size(full: Rig) -> None:
    """Prompts alone kernel by kernel, the longest in three chunks; alone by graphs; in one wave by graphs, then eight captured steps."""
    judge(full, full.launched)
    judge(full, full.engine.prompts_replayed())
    judge(full, full.whole)
    judge_broken(full, full.whole[2])
