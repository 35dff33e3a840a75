"""Text to tokens and back: the model's tokenizer, exact incremental detokenisation and stop strings. Knows no request.

A token is a run of bytes (spelling.py), so the text of a stream is the incremental UTF-8 decoding of its bytes, and equals the tokenizer's
own decoding of all ids (invalid bytes become U+FFFD in both; with byte fallback fewer of them).
"""

from __future__ import annotations

import asyncio
import codecs
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import tokenizers

from duomo.config import ModelSection
from duomo.config_gateway import GatewaySection
from duomo.errors import ModelError, RequestError
from services.router.chat_template import ChatTemplate, Rendered, template_of
from services.router.conversation import Conversation
from services.router.markup import MARKERS
from services.router.spelling import Spelling, spelling_of

# Text of at least this many characters is tokenised on a thread, so that the loop's other streams do not stall (0.5 us a character).
THREAD_CHARS: Final = 16 * 1024
# A normalizer may shorten text (NFC: three bytes to two) before it is cut into tokens; the early length check leaves this much room.
_NORMALIZER_SLACK: Final = 4
# As long as THREAD_CHARS, where a token has four characters.
THREAD_TOKENS: Final = THREAD_CHARS // 4
# Long texts of all requests wait for one of these, and for nothing else that runs on threads.
_LONG_TEXTS: Final = ThreadPoolExecutor(max_workers=2, thread_name_prefix="long-text")
# The embedded model's folder, in a checkout or where the process started, lends its tokenizer and template to drawn models without.
_EMBEDDED: Final = Path("models") / "tiny-moe"
_TOKENIZER: Final = "tokenizer.json"


class ModelText:
    """The text side of one model folder. Immutable after loading; shared by all requests and threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, spelling: Spelling, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self.template = template
        self._strips_space = spelling.strips_space
        self._pieces = spelling.pieces(tokenizer)
        self.vocab_size = len(self._pieces)
        self.note = ""  # for the operator: whose tokenizer this is, where it is not the model's own
        # Marks of reasoning and tool calls are read further on, also where a tokenizer calls them special.
        added = tokenizer.get_added_tokens_decoder().items()
        skipped = {idx for idx, token in added if token.special and token.content not in MARKERS}
        self._visible = [b"" if idx in skipped else piece for idx, piece in enumerate(self._pieces)]
        self._whole = [_whole_text(piece) for piece in self._visible]
        self._longest_bytes = max(map(len, self._pieces), default=1)

    @classmethod
    def of(cls, section: ModelSection, vocab_size: int, options: GatewaySection | None = None) -> ModelText:
        """The text side of a served model with so many ids: of its folder, or, where weights are drawn and it has none, lent.

        With a lent tokenizer ids beyond its vocabulary read as `<id>`. options: gateway.chat_template and the parsers beside it. Raises
        ModelError, also where the model has fewer ids than the tokenizer, and ConfigError for the template.
        """
        is_lent = section.random_weights and not (section.path / _TOKENIZER).exists()
        folder = _embedded_folder(section.path) if is_lent else section.path
        text = cls.load(folder, options)
        if vocab_size < text.vocab_size:
            whose = f"{folder / _TOKENIZER}" + (f", lent to {section.path}, which has none," if is_lent else "")
            raise ModelError(f"{whose} has ids up to {text.vocab_size - 1}, but the model only 0 to {vocab_size - 1} (vocab_size)")
        if is_lent:
            text.note = f"{section.path} has no {_TOKENIZER}: the embedded model's is used, ids from {text.vocab_size} on read as <id>"
            text._name_ids_up_to(vocab_size)
        return text

    @classmethod
    def load(cls, folder: Path, options: GatewaySection | None = None) -> ModelText:
        """Raises ModelError naming the file that is missing or cannot be served."""
        file = folder / _TOKENIZER
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises bare Exception for every fault
            raise ModelError(f"cannot read {file}: {error}") from error
        spelling = spelling_of(tokenizer, file)
        settings = _read_json(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: _token_text(settings[name]) for name in names if settings.get(name)}
        return cls(tokenizer, spelling, template_of(folder, settings, special, options))

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> Rendered:
        """As ChatTemplate.render; RequestError naming `messages` also where there is no template."""
        if self.template is None:
            raise RequestError("This model has no chat template; use /v1/completions.", param="messages", code="unsupported_endpoint")
        return self.template.render(conversation, add_generation_prompt=add_generation_prompt)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            if len(text) < THREAD_CHARS:
                return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
            # encode() holds the GIL to its end, so that on a thread it would stall the loop all the same; a batch, also of one, lets it go.
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
            return tuple(encoding.ids)
        except (TypeError, UnicodeError) as error:
            raise RequestError(f"The text cannot be tokenised: {error}.", param="body", code="invalid_utf8") from error

    async def encode_aside(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """encode(); of a long text on a thread, while the loop goes on."""
        if len(text) < THREAD_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        work = functools.partial(self.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(_LONG_TEXTS, work)

    async def decode_aside(self, token_ids: Sequence[int]) -> str:
        """decode(); of many tokens on a thread, while the loop goes on: joining pieces is Python's own work, which takes turns."""
        if len(token_ids) < THREAD_TOKENS:
            return self.decode(token_ids)
        return await asyncio.get_running_loop().run_in_executor(_LONG_TEXTS, self.decode, token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        text = b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text

    def token_name(self, token_id: int) -> str:
        """How the tokenizer's vocabulary spells it."""
        name = self._tokenizer.id_to_token(token_id)
        return name if name is not None else self.token_bytes(token_id).decode("utf-8", "replace")

    def fewest_tokens(self, text: str) -> int:
        """No encoding of `text` has fewer tokens: tells hopelessly long prompts apart without tokenising them."""
        return len(text) // (self._longest_bytes * _NORMALIZER_SLACK)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of any token, special ones included; nothing for an id beyond the vocabulary."""
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._visible, self._whole, strips_space=self._strips_space)

    def _name_ids_up_to(self, vocab_size: int) -> None:
        """While it is loaded: ids that the tokenizer does not know read as their numbers. Nothing encodes to them."""
        names = [f"<{token_id}>".encode() for token_id in range(self.vocab_size, vocab_size)]
        self._pieces += names
        self._visible += names
        self._whole += [_whole_text(name) for name in names]


class Detokenizer:
    """The text of one growing choice, special tokens left out. Bytes that do not yet end a character are held back.

    Nearly every token is whole characters by itself: between characters its text is looked up (whole; None where it is not).
    """

    __slots__ = ("_decoder", "_is_between", "_strips_space", "_visible", "_whole")

    def __init__(self, visible: list[bytes], whole: list[str | None], *, strips_space: bool = False) -> None:
        self._visible = visible
        self._whole = whole
        self._is_between = True  # nothing is held back
        self._strips_space = strips_space  # until the first character is out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        if token_id >= len(self._visible):
            return ""
        text = self._whole[token_id] if self._is_between else None
        if text is None:
            text = self._decoder.decode(self._visible[token_id])
            self._is_between = not self._decoder.getstate()[0]
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """What the held-back bytes read as, now that nothing follows: U+FFFD."""
        self._is_between = True
        return self._decoder.decode(b"", True)


class StopScanner:
    """Finds the stop string that completes first in a growing text, and holds back what may yet become one.

    The answer does not depend on how the text is cut into pieces: of all occurrences the one that ends first wins, of those the longest.
    """

    __slots__ = ("_held", "_longest", "_stops", "found")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.found: str | None = None  # the stop string that ended the text
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string ended it)."""
        if not self._stops:
            return text, False
        window = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := window.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self._held, self.found = "", window[at:end]
            return window[:at], True
        keep = self._may_begin_stop(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], False

    def release(self) -> str:
        """The held-back text, once no stop string can end it any more."""
        held, self._held = self._held, ""
        return held

    def _may_begin_stop(self, window: str) -> int:
        """Length of the longest tail of `window` that begins a stop string."""
        for size in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[len(window) - size :]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


def _whole_text(piece: bytes) -> str | None:
    """None where it begins or ends within a character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _embedded_folder(for_folder: Path) -> Path:
    """Raises ModelError where neither a checkout nor the working folder holds it."""
    places = [root / _EMBEDDED for root in (Path(__file__).resolve().parents[2], Path.cwd())]
    found = next((place for place in places if (place / _TOKENIZER).exists()), None)
    if found is None:
        raise ModelError(f"{for_folder} has no {_TOKENIZER}, and the embedded model's is not in {places[0]} either: give the folder one")
    return found


def _token_text(value: object) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read_json(file: Path) -> dict[str, object]:
    if not file.exists():
        return {}
    try:
        value: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return value
