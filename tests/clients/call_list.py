"""What the lists of calls are made of: one client library's calls by the names of docs/api.md's table. Knows no client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

MODEL: Final = "tiny-moe"
KEY: Final = "none"
TIMEOUT_S: Final = 60.0
STORY: Final = "Once upon a time there was a naïve fox 🦊 who liked tea."
ASKED: Final[list[Any]] = [{"role": "user", "content": "Weather in Rome?"}]
TURNS: Final[list[Any]] = [
    {"role": "system", "content": "Be brief."},
    *ASKED,
    {"role": "assistant", "content": "Rain."},
    {"role": "user", "content": "And tomorrow?"},
]
SCHEMA: Final[dict[str, Any]] = {
    "title": "weather",
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: Final = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
TOOL: Final[dict[str, Any]] = {"type": "function", "function": FUNCTION}
JSON: Final = '{"city": "Rome", "days": 3}'
CALLED: Final = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'
NO_THINKING: Final = {"chat_template_kwargs": {"enable_thinking": False}}
MOST: Final = 200  # tokens that a call or an object of the schema never needs
TIMEOUT: Final = "a timeout"  # the call's name: a stub holds its answer back
LONG: Final = 1500  # tokens that no model says in LATE_S
LATE_S: Final = 0.02


@dataclass(frozen=True)
class Target:
    """The gateway that is called. told: what a stub's model says; None where a model says what it says."""

    url: str
    told: str | None

    def is_told(self, text: str | None) -> bool:
        """Whether an answer that ended by itself is what was said; any text is, of a real model."""
        return text is not None and (self.told is None or text == self.told)


def is_weather(arguments: Any) -> bool:
    """Whether it is an object of SCHEMA."""
    return set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9


@dataclass
class CallList:
    """One client's calls: name to what is done and asserted, and to what a stub's model has to say for it; "" is a story without end."""

    client: str
    calls: dict[str, tuple[Callable[[Target], None], str]] = field(default_factory=dict)

    def add(self, name: str, told: str = STORY) -> Callable[[Callable[[Target], None]], Callable[[Target], None]]:
        def added(call: Callable[[Target], None]) -> Callable[[Target], None]:
            assert name not in self.calls, name
            self.calls[name] = (call, told)
            return call

        return added
