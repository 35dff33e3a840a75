"""First tokens by a GPU's kernels against the CPU's sampler, more rows than fit at once."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.gpu_first_tokens import GpuFirstTokens
from duomo.engine.sampler import RowSampling, SampledToken, Sampler
from duomo.errors import EngineError
from duomo.wire.messages import Sampling

VOCAB = 61
ASKED = (
    Sampling(max_tokens=9, temperature=0.0),
    Sampling(max_tokens=9, temperature=0.9, seed=5, logprobs=3),
    Sampling(max_tokens=9, temperature=1.1, top_k=7, top_p=0.9, seed=11),
    Sampling(max_tokens=9, temperature=0.0, repetition_penalty=1.7, min_tokens=6, logprobs=0),
    Sampling(max_tokens=9, temperature=0.7, seed=3, frequency_penalty=0.8, presence_penalty=0.4),
)


def asked(at: int) -> RowSampling:
    """Some continue an answer that another replica began."""
    output_ids = (9, 9, 11)[: at % 4]
    return RowSampling(sampling=ASKED[at % 5], choice=at % 3, prompt_ids=(1, 2, 3, 40 + at), output_ids=output_ids, ending_ids=(2, 5))


def test_tokens_are_the_cpus_and_a_nan_is_an_error_of_its_row() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [asked(at) for at in range(11)]
    logits_RV = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    expected = Sampler().sample(logits_RV, rows)
    logits_RV[6, 3] = float("nan")
    first = GpuFirstTokens(VOCAB, device, max_rows=4)
    first.warm()
    for _ in range(2):  # nothing of one turn is left in the next
        answers = first.sample(logits_RV.to(device), rows)
        assert len(answers) == 11
        for at, (mine, theirs) in enumerate(zip(answers, expected, strict=True)):
            if at == 6:
                assert isinstance(mine, EngineError)
                assert (mine.code, mine.phase, mine.retryable) == ("bad_logits", "prefill.compute", False)
                continue
            assert isinstance(mine, SampledToken) and mine.token_id == theirs.token_id, (at, rows[at].sampling)
            assert mine.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-5))
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in theirs.top], abs=1e-5)
