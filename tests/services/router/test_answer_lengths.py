"""The mean of the last answers."""

from __future__ import annotations

from services.router.answer_lengths import NUM_ANSWERS, AnswerLengths


def test_the_mean_of_the_last_and_nothing_of_a_few() -> None:
    answers = AnswerLengths()
    for _ in range(7):
        answers.ended(10)
    assert answers.mean_tokens == 0.0
    answers.ended(90)
    assert answers.mean_tokens == 20.0
    for _ in range(NUM_ANSWERS):
        answers.ended(33)
    assert answers.mean_tokens == 33.0
