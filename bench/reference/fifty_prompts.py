"""The fifty prompts that every layout must answer alike: 1 to 1,500 tokens, half chats and half completions. Knows only the tokenizer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

NEW_TOKENS = 64
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 255, 257, 511, 513, 1023, 1500)
CHAT_WORDS = (1, 2, 3, 5, 8, 12, 13, 14, 15, 20, 27, 28, 40, 60, 90, 120, 150, 200, 240, 300, 400, 500, 700, 900, 1100)

PEOPLE = ("Lily", "Tom", "the old farmer", "a small dragon", "my sister", "the teacher", "a brave mouse", "the baker")
DEEDS = (
    "found a red ball",
    "went to the park",
    "asked a question",
    "made a big cake",
    "ran up the hill",
    "lost a key",
    "read a book",
    "sang a song",
)
ENDS = (
    "and was happy.",
    "but it was late.",
    "because the sun was warm.",
    "and then it rained.",
    "so everyone laughed.",
    "and nobody knew why.",
)
QUESTIONS = ("What should we do?", "Tell me a story about it.", "Why did that happen?", "Can you explain it simply?")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request: chat messages or token ids; `prompt_ids` is what the model sees either way."""

    name: str
    messages: tuple[tuple[str, str], ...]
    prompt_ids: tuple[int, ...]

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


def _story(rng: random.Random, num_words: int) -> str:
    words: list[str] = []
    while len(words) < num_words:
        words += f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} {rng.choice(ENDS)}".split()
    return " ".join(words[:num_words])


def _render(messages: tuple[tuple[str, str], ...]) -> str:
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return turns + "<|im_start|>assistant\n"


def fifty_prompts(model_dir: Path) -> list[Prompt]:
    """The list, the same on every machine. The chat template is written out here on purpose: a second opinion on the gateway's."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    rng = random.Random(20)
    prompts = []
    for length in LENGTHS:
        ids = tokenizer.encode(_story(rng, 2 * length + 8), add_special_tokens=False).ids[:length]
        prompts.append(Prompt(name=f"completion-{length}", messages=(), prompt_ids=tuple(ids)))
    for row, words in enumerate(CHAT_WORDS):
        messages: tuple[tuple[str, str], ...] = (("user", f"{_story(rng, words)} {rng.choice(QUESTIONS)}"),)
        if row % 5 == 4:
            messages = (("system", "You answer in short words."), *messages)
        if row % 7 == 6:
            messages = (*messages, ("assistant", _story(rng, 12)), ("user", rng.choice(QUESTIONS)))
        ids = tokenizer.encode(_render(messages), add_special_tokens=False).ids
        prompts.append(Prompt(name=f"chat-{words}", messages=messages, prompt_ids=tuple(ids)))
    assert len(prompts) == 50 and max(len(one.prompt_ids) for one in prompts) <= 1500
    return prompts
