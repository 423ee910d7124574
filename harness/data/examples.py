"""What an example is, whatever its row looked like: a text, a pair or a conversation; and the numbers that tell examples apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from harness.config.schema import Data

VERSION = 1
"""Another one where the same bytes of a source would give other examples, or another side of a split."""
PARTS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}
OPTIONAL_PARTS = {"messages": ("tools",)}
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}
WHITESPACE = b" \t\n\r\x0b\x0c"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
HALF_A_PAIR = "holds half a surrogate pair"


class Unreadable(ValueError):
    """A row whose value is none that its column may hold; the text says which, to follow the place of the row."""


@dataclass(frozen=True)
class Conversation:
    """Turns as chat templates read them.

    Attributes:
        turns: dicts with `role` and `content`; an assistant's turn may have `tool_calls` instead. Other keys are as in the row.
        tools: the functions that the assistant could call, as `{"type": "function", "function": {...}}`; None without any.
    """

    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    def as_json(self) -> str:
        """The same conversation always gives the same text."""
        return json.dumps({"turns": self.turns, "tools": self.tools}, ensure_ascii=False, sort_keys=True, default=str)


Example = str | tuple[str, str] | Conversation


def columns_of(data: Data) -> tuple[str, ...]:
    """The columns that the shape of the examples needs."""
    return tuple(getattr(data.columns, name) for name in PARTS[data.shape])


def optional_columns_of(data: Data) -> tuple[str, ...]:
    """The columns that are read where a source has them."""
    return tuple(getattr(data.columns, name) for name in OPTIONAL_PARTS.get(data.shape, ()))


def reader(data: Data) -> Callable[[dict[str, Any]], Example | None]:
    """What gives the example in a row; None where a part is missing, empty, or not what it should be.

    A conversation is a list of turns, or JSON text of one, with the keys `role` and `content` or, as ShareGPT has them, `from` and `value`.
    The keys that Arrow filled with None are dropped, and content in parts of text is joined. Elsewhere numbers are written out, and bytes are UTF-8;
    for other values than these it raises Unreadable.
    """
    first, last, tools = columns_of(data)[0], columns_of(data)[-1], data.columns.tools

    def conversation(row: dict[str, Any]) -> Example | None:
        return _conversation(row.get(first), row.get(tools))

    def text(row: dict[str, Any]) -> Example | None:
        return _text(row, first)

    def pair(row: dict[str, Any]) -> Example | None:
        prompt, completion = _text(row, first), _text(row, last)
        return None if prompt is None or completion is None else (prompt, completion)

    return {"messages": conversation, "text": text, "prompt_completion": pair}[data.shape]


def _text(row: dict[str, Any], column: str) -> str | None:
    """Text with something to read in it."""
    value = row.get(column)
    if not isinstance(value, str):
        value = _written(value, column)
    return value if value and not value.isspace() else None


def _written(value: Any, column: str) -> str:
    """What is no text, as text; NaN is nothing, as None is."""
    if value is None or isinstance(value, float) and value != value:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, bytes):
        raise Unreadable(f"holds a {type(value).__name__} instead of text in column {column!r}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable(f"holds bytes that are not UTF-8 in column {column!r}") from None


def is_text(value: Any) -> bool:
    """Whether no text in a JSON value holds half a surrogate pair, which stands for no character and cannot be tokenised."""
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode("utf-8"))
    except UnicodeEncodeError:
        return False


def key_of(example: Example) -> int:
    """What must not stand on both sides of a split, as 64 bits: the question, or the beginning of the text.

    Case and white space do not count. Of a conversation it is what stands before the first answer to a user, the system's turn too (else all of it);
    of a text its first 1,000 characters.
    """
    if isinstance(example, str):
        return _hash(_plain(example[:1000]))
    if isinstance(example, tuple):
        return _hash(_plain(example[0]))
    return _hash(_plain(_question(example.turns) or example.as_json()))


def _question(turns: list[dict[str, Any]]) -> str:
    """What stands before the first answer to a user, without greetings of the assistant; empty where no user says anything."""
    said, asked = [], False
    for turn in turns:
        if turn["role"] != "assistant":
            said.append(turn.get("content", ""))
            asked = asked or turn["role"] == "user" and not said[-1].isspace() and said[-1] != ""
        elif asked:
            break
    return "".join(said) if asked else ""


def _hash(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _plain(text: str) -> bytes:
    """Without case and white space: removing it is several times faster than collapsing it."""
    return text.lower().encode("utf-8", "surrogatepass").translate(None, WHITESPACE)


def _conversation(turns: Any, tools: Any) -> Conversation | None:
    turns, tools = _parsed(turns), _parsed(tools)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(turns, list) or not turns or not (tools is None or isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return None
    read = [_turn(turn) for turn in turns]
    if None in read:
        return None
    return Conversation([turn for turn in read if turn], [_tool(_without_none(tool)) for tool in tools] if tools else None)


def _parsed(value: Any) -> Any:
    """The value, or what its JSON says; empty text is nothing, and text that is not JSON stays what it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value) if value.strip() else None
    except ValueError:
        return value
    if SURROGATE.search(value) and not is_text(parsed):
        raise Unreadable(HALF_A_PAIR)
    return parsed


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(held) for key, held in value.items() if held is not None}
    return [_without_none(held) for held in value] if isinstance(value, list | tuple) else value


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A bare function is wrapped, as chat templates expect it."""
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool and "type" not in tool else tool


def _turn(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, dict):
        return None
    turn = _without_none(given)
    if "role" not in turn and isinstance(turn.get("from"), str):
        turn = _from_sharegpt(turn)
    if not turn.get("tool_calls", True):  # some chat templates count an empty list as calls
        del turn["tool_calls"]
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined(turn["content"])
    calls = turn.get("role") == "assistant" and "tool_calls" in turn
    valid = isinstance(turn.get("role"), str) and (isinstance(turn.get("content"), str) or calls and "content" not in turn)
    return turn if valid else None


def _joined(parts: list[Any]) -> str | None:
    """The text of parts, as multimodal chat templates write it; None where one is not text."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    said = turn["from"].lower()
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    rest = {"role": SHAREGPT_ROLES.get(said, said), **({"content": turn["value"]} if "value" in turn else {}), **rest}
    if said == "function_call":
        calls = _parsed(turn.get("value"))
        calls = calls if isinstance(calls, list) else [calls]
        if all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            rest.pop("content", None)
            rest["tool_calls"] = [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]
    return rest
