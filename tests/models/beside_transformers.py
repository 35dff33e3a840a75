"""An OLMoE of drawn weights twice on one device, ours by waves and captured decode steps and transformers', row by row against float64.

Which experts a row takes is a jump: two that are nearly level swap under any rounding, and everything after differs. So experts are chosen
once, by our engine; float64 and transformers are given its choice in every layer, and compute only the weights of those experts. Whether
the choice was right is asked apart: what float64 would have chosen instead, at the same place, may differ no more often than transformers'
own choice there does, and never by more than the bound can explain (Float64Run.misrouted).

Legend: T rows of a sequence (its prompt, then each token that was fed in decode), V vocabulary, K experts a token, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, OlmoeForCausalLM

from bench.reference.float64_decoder import Float64Run
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import DecodeLimits, DecodeRow, DecodeStep, Joining
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_decode import GpuDecode
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuPrefill
from duomo.engine.gpu_warm import warm_prefill
from duomo.engine.memory_plan import MemoryLimits
from duomo.engine.sampler import RowSampling
from duomo.models.config import ModelConfig
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_random import random_checkpoint
from duomo.models.gpu_weights import GpuWeights
from duomo.wire.values import Sampling

SEED = 5
# Weights' deviation times the root of the model's width. Much less, and the residual is attention's alone, whatever experts say; much
# more, and a rounding of the router's inputs moves its shares by a multiple of itself, where decoder_bound takes ratios as handed on.
SPREAD = 1.5
GREEDY = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)


def std_of(config: ModelConfig) -> float:
    """Deviation of the drawn weights."""
    return float(SPREAD * config.hidden**-0.5)


@dataclass(frozen=True)
class Computed:
    """One sequence as our engine computed it: token_ids of all rows, num_prompt of them prefill's; logits_TV float32; ids_LTK int64."""

    num_prompt: int
    token_ids: list[int]
    logits_TV: Tensor
    ids_LTK: list[Tensor]


class OurEngine:
    """Waves and decode steps over one pool, captured as in serving. Prompts' blocks lie scattered."""

    def __init__(self, weights: GpuWeights, prompts: Sequence[Sequence[int]], num_new: int, block_tokens: int = 64) -> None:
        self.config, self.prompts, self.num_new = weights.config, prompts, num_new
        longest = max(map(len, prompts)) + num_new
        blocks_each = [-(-(len(prompt) + num_new) // block_tokens) for prompt in prompts]
        order = torch.randperm(sum(blocks_each), generator=torch.Generator().manual_seed(SEED)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in blocks_each]
        decoder = GpuDecoder(weights)
        spec = gpu_kv_spec(weights.config, block_tokens=block_tokens, dtype=weights.dtype)
        cache = GpuKvCache(spec, sum(blocks_each), weights.device)
        self.prefill = GpuPrefill(decoder, cache)
        self.decode = GpuDecode(decoder, cache, DecodeLimits(max_batch=len(prompts), max_model_tokens=longest))
        self.decode.capture()
        num_rows = sum(map(len, prompts))
        self._captured = CapturedLimits(max_rows=num_rows, max_sequence_tokens=longest)
        if weights.device.type == "cuda":  # by threads, and as an engine's start does
            sizes = MemoryLimits(
                max_batch=len(prompts),
                max_wave_tokens=num_rows,
                max_model_tokens=longest,
                long_chunk_tokens=num_rows,
                block_tokens=block_tokens,
            )
            warm_prefill(self.prefill, sizes)

    def prompts_launched(self, chunk_tokens: int) -> list[Computed]:
        """Each prompt in a wave of its own, kernel by kernel; longer ones in chunks that attend over those before."""
        assert self.prefill.captured is None, "before capture()"
        return [self._wave([at], chunk_tokens)[0] for at in range(len(self.prompts))]

    def capture(self) -> None:
        """The graphs of short waves, on a GPU: an interpreter has none."""
        if self.prefill.cache.device.type == "cuda":
            self.prefill.capture(self._captured)

    def prompts_replayed(self) -> list[Computed]:
        """Each prompt in a wave of its own, by its graphs."""
        assert self.prefill.captured is not None, "after capture()"
        return [self._wave([at])[0] for at in range(len(self.prompts))]

    def prompts_and_steps(self) -> list[Computed]:
        """All prompts in one wave, by graphs where there are any; then num_new captured steps of all sequences together."""
        answers = self._wave(range(len(self.prompts)))
        tokens = [int(answer.logits_TV[-1].argmax()) for answer in answers]
        for step in range(self.num_new):
            rows = tuple(self._row(at, step, tokens[at]) for at in range(len(answers)))
            result = self.decode.launch(DecodeStep(rows=rows)).wait()
            assert not result.errors, result.errors
            logits_RV = self.decode._logits_RV[: len(rows)].clone()  # what the sampler read: nobody is given them in serving
            routed_LRK = torch.from_numpy(result.routed_LRK.astype("int64")).to(logits_RV.device)
            for at, answer in enumerate(answers):
                answers[at] = Computed(
                    answer.num_prompt,
                    [*answer.token_ids, tokens[at]],
                    torch.cat((answer.logits_TV, logits_RV[at : at + 1])),
                    [torch.cat((ids_TK, routed_RK[at : at + 1])) for ids_TK, routed_RK in zip(answer.ids_LTK, routed_LRK, strict=True)],
                )
            tokens = result.token_id_R.tolist()
        return answers

    @torch.inference_mode()
    def _wave(self, which: Sequence[int], chunk_tokens: int | None = None) -> list[Computed]:
        slices = tuple(PromptSlice(token_ids=self.prompts[at], start=0, block_table=self.tables[at]) for at in which)
        batch = StepBatch(slices=slices)
        state = self.prefill.begin(batch, chunk_tokens, keeps_routed=True)
        self.prefill.run_layers(0, self.config.num_layers, state)
        last_SV = self.prefill.logits(state, batch.last_rows)  # by a graph of its own where there are any
        logits_TV = self.prefill.logits(state, list(range(batch.num_rows)))
        logits_TV[batch.last_rows] = last_SV
        answers, lo = [], 0
        for part in batch.slices:
            rows = slice(lo, lo := lo + len(part.token_ids))
            ids_LTK = [ids_TK[rows].long() for ids_TK in state.routed_ids]
            answers.append(Computed(len(part.token_ids), list(part.token_ids), logits_TV[rows], ids_LTK))
        return answers

    def _row(self, at: int, step: int, token: int) -> DecodeRow:
        """A sequence stays in its row; what it is fed lies there from the second step on."""
        sampling = RowSampling(sampling=GREEDY, choice=0, prompt_ids=self.prompts[at], output_ids=(token,))
        source = Joining(token_id=token, sampling=sampling) if step == 0 else at
        return DecodeRow(source=source, position=len(self.prompts[at]) + step, table=self.tables[at])


@dataclass
class Peer:
    """transformers' model over the same checkpoint; its routers take what they are given, and write down what they would have taken."""

    model: Any
    forced_LTK: list[Tensor] = field(default_factory=list)
    own_LTK: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Peer:
        """folder: with config.json. Tensors are drawn where they stay; nothing passes through the host."""
        their_config = AutoConfig.from_pretrained(folder)
        their_config._attn_implementation = "sdpa"
        their_config._experts_implementation = "eager"  # a loop over experts: others pick kernels by device and type
        with torch.device("meta"):
            model = OlmoeForCausalLM(their_config)
        checkpoint = dict(random_checkpoint(config, device=device, dtype=dtype, seed=SEED, std=std_of(config)))
        model.load_state_dict({name: _taken(checkpoint, name) for name in model.state_dict()}, strict=True, assign=True)
        assert not checkpoint, f"transformers has no place for {sorted(checkpoint)[:3]}"
        model.model.rotary_emb = type(model.model.rotary_emb)(their_config).to(device)  # its frequencies are in no checkpoint
        model.train(False)
        peer = cls(model)
        for layer_idx, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(peer._hook(layer_idx))
        return peer

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], forced_LTK: list[Tensor]) -> Tensor:
        """[T, V] with these experts; own_LTK are afterwards those that it would have taken."""
        self.forced_LTK, self.own_LTK = forced_LTK, []
        ids = torch.tensor([token_ids], device=self.model.device)
        logits_TV: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        assert len(self.own_LTK) == len(forced_LTK), "a router did not run"
        return logits_TV

    def _hook(self, layer_idx: int) -> Any:
        def force(router: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            """In place of (router's logits, weights of the chosen, the chosen): OLMoE's weights are shares of all, not normalised."""
            first, weight_TK, own_TK = output
            forced_TK = self.forced_LTK[layer_idx]
            assert weight_TK.shape == own_TK.shape == forced_TK.shape, (weight_TK.shape, own_TK.shape, forced_TK.shape)
            logits_TE = nn.functional.linear(inputs[0].reshape(own_TK.shape[0], -1), router.weight)
            share_TE = logits_TE.softmax(-1, dtype=torch.float32)
            torch.testing.assert_close(share_TE.gather(1, own_TK).to(weight_TK.dtype), weight_TK)  # it weighs as this hook does
            self.own_LTK.append(own_TK)
            return first, share_TE.gather(1, forced_TK).to(weight_TK.dtype), forced_TK

        return force


def _taken(checkpoint: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of that name, taken out; experts of a layer stacked, gate over up."""
    stem, _, kind = name.rpartition(".experts.")
    if kind not in ("gate_up_proj", "down_proj"):
        return checkpoint.pop(name)
    sides = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    experts: list[Tensor] = []
    while f"{stem}.experts.{len(experts)}.{sides[0]}.weight" in checkpoint:
        experts.append(torch.cat([checkpoint.pop(f"{stem}.experts.{len(experts)}.{side}.weight") for side in sides]))
    return torch.stack(experts)


def row_errors(logits_TV: Tensor, expected_TV: Tensor) -> Tensor:
    """[T]: of each row the length of what is wrong over the length of what is right; infinite where it is not finite."""
    wrong_T: Tensor = (logits_TV.double() - expected_TV).norm(dim=-1) / expected_TV.norm(dim=-1)
    return wrong_T.nan_to_num(nan=torch.inf)


def num_rerouted(chosen_LTK: Sequence[Tensor], reference: Float64Run) -> int:
    """Rows and layers where float64, after the same experts below, would have taken another set."""
    pairs = zip(chosen_LTK, reference.router_logits, strict=True)
    best = ((ids_TK, logits_TE.topk(ids_TK.shape[1]).indices) for ids_TK, logits_TE in pairs)
    return sum(int((ids_TK.sort().values != best_TK.sort().values).any(-1).sum()) for ids_TK, best_TK in best)


def clear_rows(expected_TV: Tensor, relative: float) -> Tensor:
    """bool [T]: rows whose best token leads by more than errors of `relative` in the row can take away: each logit is one term of V among
    equals, so it is off by `relative` of their root mean square, and four times that for two of them is next to never exceeded."""
    best_T2 = expected_TV.topk(2).values
    return best_T2[:, 0] - best_T2[:, 1] > 4 * relative * expected_TV.square().mean(-1).sqrt()
