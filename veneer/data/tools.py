"""Tools that a conversation may call: their schemas, and the calls in an assistant's message.

Both are brought into the form that chat templates are written for: OpenAI's, with a call's arguments as an object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.data.files import kind_of

Tools = tuple[dict[str, Any], ...]
CALLER_ROLES = ("tool_call", "function_call")  # of messages that are nothing but a call, spelt as JSON


def read_tools(value: Any, faults: list[str]) -> Tools:
    """The schemas in a row's `tools`: a list of objects, or one as JSON text; none where there is nothing."""
    value = _parsed(value)
    if value is None or value == [] or value == "":
        return ()
    if isinstance(value, list) and all(isinstance(tool, Mapping) and _name(tool) for tool in value):
        return tuple({"type": "function", "function": dict(tool)} if "name" in tool else dict(tool) for tool in value)
    got = "a list of other things" if isinstance(value, list) else kind_of(value)
    faults.append(f"`tools` is {got}, wanted a list of JSON schemas, each a function with a `name`")
    return ()


def read_calls(value: Any, field: str, faults: list[str]) -> list[dict[str, Any]]:
    """The calls of an assistant's message: one or several objects of a name and its arguments, or those as JSON."""
    value = _parsed(value)
    if value is None or value == []:
        return []
    calls = value if isinstance(value, list) else [value]
    found = [_call(call) for call in calls]
    if None in found:
        faults.append(f"`{field}` is {kind_of(value)}, wanted calls: objects with `name` and `arguments` (an object)")
    return [call for call in found if call is not None]


def joined_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls that follow one another, as one message: that is how a model makes several at once."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and "tool_calls" in message and "tool_calls" in joined[-1] and not message["content"]:
            joined[-1] = {**joined[-1], "tool_calls": [*joined[-1]["tool_calls"], *message["tool_calls"]]}
        else:
            joined.append(message)
    return joined


def _call(call: Any) -> dict[str, Any] | None:
    """{"type": "function", "function": {"name", "arguments"}}, with what else the call has (its id)."""
    if not isinstance(call, Mapping):
        return None
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = _parsed(function.get("arguments"))  # as text, templates would spell it as JSON a second time
    if not isinstance(arguments if arguments is not None else {}, Mapping):
        return None
    rest = {name: value for name, value in call.items() if name not in ("name", "arguments", "function")}
    function = {"name": function["name"], "arguments": arguments if arguments is not None else {}}
    return {**rest, "type": "function", "function": function}


def _name(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _parsed(value: Any) -> Any:
    """What JSON text spells; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
