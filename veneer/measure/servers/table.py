"""The table of servers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.measure.servers.server import Server

# name -> "module:Server"; a server is its file and its line here, and in `Target` of config/verbs.py.
SERVERS: dict[str, str] = {
    "peft": "veneer.measure.servers.peft:PEFT",
    "vllm": "veneer.measure.servers.vllm:VLLM",
    "sglang": "veneer.measure.servers.sglang:SGLANG",
    "llama.cpp": "veneer.measure.servers.llama_cpp:LLAMA_CPP",
}


def server_named(name: str) -> Server:
    """The member of SERVERS. Raises KeyError."""
    module, _, attribute = SERVERS[name].partition(":")
    server: Server = getattr(import_module(module), attribute)
    return server
