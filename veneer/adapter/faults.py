"""What can be wrong with an adapter: each function names all faults of its kind, one line for those that are alike.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.config.values import LONGEST_ROW
from veneer.methods import METHODS

SHOWN = 8  # places named in one fault; the rest is counted
LONGEST = 512  # characters of a module path
_MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_FLOAT32_MAX = torch.finfo(torch.float32).max


def is_module(path: str) -> bool:
    """Whether a text can be a module's path: of the letters of code, so that it can stand in a log."""
    return len(path) <= LONGEST and bool(_MODULE.fullmatch(path))


def add_fault(faults: list[str], what: str, where: Sequence[str], shown: int = SHOWN) -> None:
    """Append one fault for all the places that share it, if there are any."""
    if where:
        more = f" and {len(where) - shown} more" if len(where) > shown else ""
        faults.append(f"{what}: {', '.join(where[:shown])}{more}")


def chains(a: Tensor, b: Tensor, *vectors: Tensor) -> bool:
    """Whether a (R, I) and b (O, R) are matrices without an empty side and of one rank R, and all vectors are (O)."""
    if not (a.dim() == b.dim() == 2 and len(a) == b.shape[1] and min(*a.shape, *b.shape) > 0):
        return False
    return all(vector.shape == b.shape[:1] for vector in vectors)


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return bool(tensor.isfinite().all())
    low, high = torch.aminmax(tensor.detach())  # NaN if any value is; a fifteenth of the time of isfinite
    return math.isfinite(low) and math.isfinite(high)


def overflows(a: Tensor, b: Tensor) -> bool:
    """Whether the largest values could add up to more than float32 holds: no update is that large."""
    return a.abs().max().item() * b.abs().max().item() * len(a) > _FLOAT32_MAX


def training_faults(training: Mapping[str, Any]) -> list[str]:
    """Whether what a card says of how rows were read can be followed."""
    options = training.get("options", {})
    if not isinstance(options, dict) or not isinstance(options.get("system_prompt"), (str, type(None))):
        return ["training.options: wanted an object whose system_prompt, if any, is text"]
    faults, length, columns = [], options.get("max_length"), options.get("columns")
    if length is not None and not (type(length) is int and 1 <= length <= LONGEST_ROW):
        faults.append(f"training.options: max_length is {length!r:.80}, wanted 1 to {LONGEST_ROW:,} tokens")
    if columns is not None and not (isinstance(columns, dict) and all(isinstance(c, str) for c in columns.values())):
        faults.append(f"training.options: columns are {columns!r:.80}, wanted text by text")
    return faults


def method_faults(method: str) -> list[str]:
    """Whether a card's method is one that we have."""
    if method in METHODS:
        return []
    return [f"card.method: got {method!r:.80}, wanted one of {', '.join(METHODS)}; a later veneer may know it"]


def tensor_faults(tensors: Mapping[str, Tensor], kinds: Sequence[str] = ("a", "b")) -> list[str]:
    """Faults of an adapter's tensors: names, missing ones of those kinds, shapes, types, values."""
    faults: list[str] = []
    parts = {name: name.rpartition(".") for name in tensors}
    odd = [name for name, (module, _, kind) in parts.items() if kind not in kinds or not is_module(module)]
    found = {module for name, (module, _, _) in parts.items() if name not in odd}
    whole = sorted(module for module in found if all(f"{module}.{kind}" in tensors for kind in kinds))
    shapes = {module: [tensors[f"{module}.{kind}"] for kind in kinds] for module in whole}
    wanted = f"<module path>.{', .'.join(kinds[:-1])} or .{kinds[-1]}"
    add_fault(faults, f"names (wanted {wanted})", [f"{name!r:.200}" for name in odd])
    add_fault(faults, f"not all of {', '.join(kinds)}", sorted(found - set(whole)))
    told = "a [R, I] and b [O, R]" + "".join(f", {kind} [O]" for kind in kinds[2:])
    unchained = [
        f"{module} ({', '.join(f'{kind} {list(t.shape)}' for kind, t in zip(kinds, held, strict=True))})"
        for module, held in shapes.items()
        if not chains(*held)
    ]
    add_fault(faults, f"shapes do not chain (wanted {told})", unchained)
    add_fault(faults, "not floating point", [n for n, t in tensors.items() if not t.is_floating_point()])
    add_fault(faults, "NaN or infinite values", [n for n, t in tensors.items() if not finite(t)])
    huge = [m for m, (a, b, *_) in shapes.items() if chains(a, b) and finite(a) and finite(b) and overflows(a, b)]
    add_fault(faults, "values so large that b @ a can overflow float32", huge)
    return faults if tensors else ["no tensors"]


def module_faults(tensors: Mapping[str, Tensor], ranks: Mapping[str, int], scales: Mapping[str, float]) -> list[str]:
    """Where a card's ranks and scales are not those of the tensors."""
    faults: list[str] = []
    found = {name[:-2]: len(tensor) for name, tensor in tensors.items() if name.endswith(".a") and tensor.dim()}
    wrong = [m for m in sorted(found.keys() | ranks.keys()) if found.get(m) != ranks.get(m)]
    add_fault(faults, "card.ranks", [f"{m} (card {ranks.get(m)}, tensors {found.get(m)})" for m in wrong])
    add_fault(faults, "card.scales lacks", sorted(found.keys() - scales.keys()))
    add_fault(faults, "card.scales names modules without tensors", sorted(scales.keys() - found.keys()))
    bad = [f"{m} ({s})" for m, s in scales.items() if s == 0 or not math.isfinite(s)]
    add_fault(faults, "card.scales must be finite and not 0", bad)
    return faults


def json_faults(value: Mapping[str, Any], kinds: Mapping[str, str], needed: Sequence[str]) -> list[str]:
    """Keys of a JSON object that are missing, unknown or of another kind.

    kinds: key -> the declared type of the dataclass field that it fills.
    """
    faults = [f"{name}: missing" for name in needed if name not in value]
    faults += [f"{name!r:.80}: not a known key" for name in value if name not in kinds]
    for name, kind in kinds.items():
        if name in value and not _is(kind, value[name]):
            faults.append(f"{name}: got {value[name]!r:.80}, wanted {kind}")
    return faults


def _is(kind: str, value: Any) -> bool:
    """Whether a JSON value fits a declared type."""
    if kind.endswith(" | None"):
        return value is None or _is(kind.removesuffix(" | None"), value)
    if kind.startswith("dict[str, "):
        return isinstance(value, dict) and all(_is(kind[len("dict[str, ") : -1], item) for item in value.values())
    if kind == "tuple[str, ...]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return kind == "Any" or isinstance(value, str if kind == "str" else dict)
