"""A server's rules as data, and the check of a folder by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veneer.measure.servers.traits import ADVICE, PeftFiles, traits


@dataclass(frozen=True)
class Server:
    """What a server makes of the traits of a folder.

    version: that the rules were read from. refused: trait -> why it does not load. wrong: trait -> what it computes in
    its place, without a word; such a folder counts as one that does not load. told: trait -> what to know, though it
    loads. ranks: the limits that it can be started with, smallest first; () for any. started: the limit unless told
    another, None for that of the adapters given at the start. flag: the option that sets it. layers: the last parts
    of the paths of layers that it adapts; () for any. starts: init_lora_weights that leave the base as it is.
    """

    name: str
    version: str
    refused: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    started: int | None = None
    flag: str = ""
    layers: tuple[str, ...] = ()
    starts: tuple[str, ...] = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    first: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a server of that version loads the folder and computes what it should; faults say what to do."""

    server: str
    version: str
    loads: bool
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "server": self.server,
            "version": self.version,
            "loads": self.loads,
            "faults": list(self.faults),
            "notes": list(self.notes),
        }


def check(
    server: Server, files: PeftFiles, adapter: str, limit: int | None = None, tied: bool | None = None
) -> Verdict:
    """adapter: how the folder is called in what to do. limit: the highest rank that the server is started for."""
    found = traits(files, server.starts, tied) | _layers(server, files)
    faults = [
        f"{where}: {reasons[trait]}; next: {ADVICE[trait].format(adapter=adapter)}"
        for reasons in (server.refused, server.wrong)
        for trait, where in found.items()
        if trait in reasons
    ]
    rank_faults, rank_notes = _rank(server, files, adapter, limit)
    notes = [f"{where}: {server.told[trait]}" for trait, where in found.items() if trait in server.told]
    first = [server.first.format(adapter=adapter)] if server.first else []
    faults += rank_faults
    return Verdict(server.name, server.version, not faults, tuple(faults), (*rank_notes, *notes, *first))


def _layers(server: Server, files: PeftFiles) -> dict[str, str]:
    if not server.layers:
        return {}
    ends = {module.rpartition(".")[2] for module in files.ranks()} - {"base_layer", "experts"}
    return {"unknown_layers": ", ".join(odd[:8])} if (odd := sorted(ends - set(server.layers))) else {}


def _rank(server: Server, files: PeftFiles, adapter: str, limit: int | None) -> tuple[list[str], list[str]]:
    """Faults and notes on the highest rank."""
    told = files.config.get("r")
    experts = ("experts", "base_layer")  # their factors stand side by side
    seen = [rank for module, rank in files.ranks().items() if module.rpartition(".")[2] not in experts]
    rank = max([*seen, *([told] if isinstance(told, int) else [])], default=0)
    allowed = limit if limit is not None else server.started
    if not server.flag or (allowed is not None and rank <= allowed and (not server.ranks or rank <= server.ranks[-1])):
        return [], []
    enough = next((choice for choice in server.ranks if choice >= rank), None) if server.ranks else rank
    if enough is None:
        most = server.ranks[-1]
        do = ADVICE["rank"].format(adapter=adapter, limit=most)
        return [f"rank {rank}: {server.name} has no more than {most}; next: {do}"], []
    start = f"start {server.name} with {server.flag} {enough}"
    if allowed is None:
        return [], [f"rank {rank}: if adapters are loaded later, {start} or more"]
    do = ADVICE["rank"].format(adapter=adapter, limit=allowed)
    return [f"rank {rank}: above {allowed}, which {server.name} is started for; next: {start}, or {do}"], []
