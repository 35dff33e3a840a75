"""The prefill worker alone: groups, waves of any size, expert counts, packing beside computing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from duomo.engine.sampler import RowSampling
from duomo.errors import ConfigError
from duomo.models.qwen3_moe import Model, load_model
from duomo.wire.values import Sampling
from services.kv_transfer.layout import messages
from services.prefill.pieces import Piece
from services.prefill.worker import PrefillWorker, WaveOutput, WaveRow, WorkerSizes, group_bounds

GREEDY = Sampling(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return load_model(Path(__file__).parents[3] / "models" / "tiny-moe")


@pytest.mark.parametrize(
    ("num_layers", "units", "units_per_group", "expected"),
    [(8, 4, 1, (0, 2, 4, 6, 8)), (8, 4, 3, (0, 6, 8)), (8, 4, 4, (0, 8)), (7, 3, 1, (0, 2, 4, 7)), (48, 8, 2, (0, 12, 24, 36, 48))],
)
def test_groups_cover_the_layers_once(num_layers: int, units: int, units_per_group: int, expected: tuple[int, ...]) -> None:
    assert group_bounds(num_layers, units, units_per_group) == expected


def test_more_units_than_layers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.units is 9"):
        group_bounds(8, 9, 1)


def test_a_wave_says_the_same_of_a_prompt_as_the_prompt_alone(model: Model) -> None:
    sizes = WorkerSizes(num_blocks=32, block_tokens=16, units=4, units_per_group=1, torch_threads=1)
    prompts = [tuple(range(50, 50 + length)) for length in (1, 17, 63)]
    tables = [(0,), (1, 2), (3, 4, 5, 6)]

    def outputs(places: list[int]) -> list[tuple[int, bytes]]:
        worker = PrefillWorker(model, sizes)
        rows = [WaveRow(token_ids=prompts[place], start=0, block_table=tables[place]) for place in places]
        computation = worker.begin(rows)
        for group in range(worker.num_groups):
            worker.run_piece(computation, Piece(groups=(group, group + 1), chunks=(0, 1)))
        samplings = [[RowSampling(sampling=GREEDY, choice=0, prompt_ids=prompts[place], output_ids=())] for place in places]
        found = []
        for place, output in zip(places, worker.sample(computation, samplings).wait(), strict=True):
            assert (output.expert_counts.sum(1) == len(prompts[place]) * model.config.top_k).all()
            packed = b""
            for span in messages(range(len(tables[place])), worker.group_bounds, worker.block_bytes, 64 * 1024):
                out = bytearray(span.num_bytes)
                worker.pack(7, span, tables[place], memoryview(out))
                packed += out
            found.append((output.sampled[0].token_id, packed))
        return found

    together = outputs([0, 1, 2])
    assert together == [outputs([place])[0] for place in range(3)]


def test_prompts_that_nobody_wants_any_more_are_not_sampled(model: Model) -> None:
    worker = PrefillWorker(model, WorkerSizes(num_blocks=8, block_tokens=16, units=1, units_per_group=1, torch_threads=1))
    computation = worker.begin([WaveRow(token_ids=(5, 6), start=0, block_table=(0,)), WaveRow(token_ids=(7,), start=0, block_table=(1,))])
    worker.run_piece(computation, Piece(groups=(0, 1), chunks=(0, 1)))
    wanted = RowSampling(sampling=GREEDY, choice=0, prompt_ids=(7,), output_ids=())
    gone, stays = worker.sample(computation, [[], [wanted]]).wait()
    assert gone.sampled == () and len(stays.sampled) == 1
    assert worker.sample(computation, [[], []]).wait()[1].sampled == ()


def test_a_wave_says_what_it_read_once_and_the_same_in_pieces_and_chunks(model: Model) -> None:
    sizes = WorkerSizes(num_blocks=32, block_tokens=16, units=4, units_per_group=1, torch_threads=1)
    prompts = [tuple(range(50, 50 + length)) for length in (33, 63)]
    rows = [WaveRow(token_ids=prompts[0], start=0, block_table=(0, 1, 2)), WaveRow(token_ids=prompts[1], start=0, block_table=(3, 4, 5, 6))]
    samplings = [[RowSampling(sampling=GREEDY, choice=0, prompt_ids=ids, output_ids=())] for ids in prompts]

    def outputs(chunk_tokens: int | None, *pieces: Piece) -> tuple[WaveOutput, ...]:
        worker = PrefillWorker(model, sizes)
        computation = worker.begin(rows, chunk_tokens)
        assert computation.num_chunks == (1 if chunk_tokens is None else 3)
        for piece in pieces:
            worker.run_piece(computation, piece)
        return worker.sample(computation, samplings).wait()

    whole = outputs(None, Piece(groups=(0, 4), chunks=(0, 1)))
    layered = outputs(40, *(Piece(groups=(lo, lo + 2), chunks=(0, 3)) for lo in (0, 2)))
    chunked = outputs(40, *(Piece(groups=(0, 4), chunks=(chunk, chunk + 1)) for chunk in range(3)))
    assert [each.expert_bytes for each in whole] == [whole[0].expert_bytes, 0] and whole[0].expert_bytes > 0
    for other in (layered, chunked):
        assert other[0].expert_bytes > whole[0].expert_bytes and other[1].expert_bytes == 0
        for mine, theirs in zip(whole, other, strict=True):
            assert mine.expert_counts.dtype == np.dtype(np.int32) and mine.expert_counts.flags.c_contiguous
            assert np.array_equal(mine.expert_counts, theirs.expert_counts)
            assert [token.token_id for token in mine.sampled] == [token.token_id for token in theirs.sampled]
