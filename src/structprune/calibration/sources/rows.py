"""What a row of a file says: its text, a prompt with its completion, or a chat by the model's own template."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from structprune.errors import InputError
from structprune.types import Render

_CHATS = ("messages", "conversations")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
COLUMNS = frozenset({"text", "input", *_CHATS, *itertools.chain.from_iterable(_PAIRS)})
"""Columns of a table that may be text; others may hold what Python has no value for."""


def join_turns(turns: Sequence[Mapping[str, Any]]) -> str:
    """Return a chat as plain text: what was said and called, turn by turn, for models without a chat template."""
    calls = [json.dumps(turn["tool_calls"], ensure_ascii=False) if "tool_calls" in turn else "" for turn in turns]
    said = ([turn["content"], called] for turn, called in zip(turns, calls, strict=True))
    return "\n\n".join("\n".join(part for part in parts if part) for parts in said)


def row_text(row: Any, where: str, field: str | None, render: Render) -> str | None:
    """Return what the row says; None where the field is there and null."""
    if isinstance(row, str) and field is None:
        return row
    name = field or "text"
    if isinstance(row, dict):
        value = row.get(name)
        # An empty text beside a chat is a column that another part of the file uses.
        if isinstance(value, str) and (value or field is not None):
            return value
        if field is None:
            for chat in _CHATS:
                if isinstance(row.get(chat), list):
                    return _chat_text(row[chat], where, render)
            for first, second in _PAIRS:
                if isinstance(row.get(first), str) and isinstance(row.get(second), str):
                    return _pair_text(row[first], row.get("input"), row[second])
        elif isinstance(value, list):
            return _chat_text(value, where, render)
        if isinstance(value, str):
            return value
        if name in row and value is None:
            return None
    raise InputError(
        "the row has no text",
        where=where,
        got=f"fields {', '.join(map(str, row))}"[:200] if isinstance(row, dict) else type(row).__name__,
        wanted=f"a field {field!r} with a text"
        if field
        else 'a field "text", a chat in "messages" or "conversations", or "prompt" and "completion"',
        do="name the field that holds the text: FILE#FIELD",
    )


def _pair_text(prompt: str, extra: Any, completion: str) -> str:
    return "\n".join(part for part in (prompt, extra, completion) if isinstance(part, str) and part)


def _chat_text(messages: Sequence[Any], where: str, render: Render) -> str:
    """Render the chat by the model's template, whichever of the usual names its turns have."""
    try:
        return render([_turn(message) for message in messages])
    except InputError as error:
        raise error.inside(where) from None


def _no_turn(message: Any) -> InputError:
    return InputError(
        "a turn of the chat has no role or no content",
        got=repr(message)[:80],
        wanted='{"role": "user", "content": "..."}',
    )


def _turn(message: Any) -> dict[str, Any]:
    """Return role and content as text, and calls of tools where there are some. Raises InputError."""
    if not isinstance(message, dict):
        raise _no_turn(message)
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    calls = message.get("tool_calls")
    if isinstance(content, list):
        # Those that are no text (images) say nothing to a language model.
        content = "".join(_part_text(part, message) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise _no_turn(message)
    turn: dict[str, Any] = {"role": _ROLES.get(role, role), "content": content}
    if isinstance(calls, list) and calls:
        turn["tool_calls"] = [_call(call, message) for call in calls]
    return turn


def _part_text(part: Any, message: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, dict):
        # Of threads: the value beside its annotations.
        text = text.get("value")
    if text is None and isinstance(part, dict):
        return ""
    if not isinstance(text, str):
        raise _no_turn(message)
    return text


def _call(call: Any, message: Any) -> Any:
    """Return the call with its arguments as the values that templates expect, where they are JSON in a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise _no_turn(message)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            function = {**function, "arguments": json.loads(arguments)}
    return {**call, "function": function}
