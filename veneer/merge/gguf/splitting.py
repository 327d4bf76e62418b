"""How a byte-level BPE cuts a text into words before it merges, and llama.cpp's name of that (`tokenizer.ggml.pre`).

llama.cpp has each way built in, under a name; a GGUF with the wrong one gives other ids without a word. So the way is
read from tokenizer.json itself, and one that is not known is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import ModelError, listed

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = "byte level"  # with the expression of GPT-2, which `tokenizers` has inside

# The steps of the pre-tokenizer -> llama.cpp's name.
SPLITTINGS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    ("digits", GPT2): "smollm",
    (_WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
}
_WHOLE_WORDS = ("llama-bpe",)  # where a word that is a token is taken whole, without merges


def splitting_of(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way of cutting in a tokenizer.json. Raises ModelError with everything it has no name for.

    Unicode normalisation (NFC) is left out, as llama.cpp's own converter does.
    """
    model = parts["model"]
    steps = tuple(_step(one) for one in _flat(parts["pre_tokenizer"]))
    name = SPLITTINGS.get(steps, "")
    faults = [f"pre_tokenizer: {' then '.join(steps) or 'none'}"] if not name else []
    if model["type"] != "BPE" or model.get("byte_fallback"):
        faults = [
            f"model: {model['type']}{' of characters' if model.get('byte_fallback') else ''}, wanted BPE of bytes"
        ]
    elif bool(model.get("ignore_merges")) != (name in _WHOLE_WORDS):
        faults.append(f"ignore_merges: {bool(model.get('ignore_merges'))} beside {name or 'this pre_tokenizer'}")
    if (normalizer := parts["normalizer"]) and normalizer["type"] != "NFC":
        faults.append(f"normalizer: {normalizer['type']}, wanted none or NFC")
    if faults:
        known = ", ".join(SPLITTINGS.values())
        next_step = (
            f"Known are those of {known}. Next: merge into a folder (without --format gguf), and give that to "
            "llama.cpp's convert_hf_to_gguf.py"
        )
        raise ModelError(
            listed("tokenizer.ggml.pre: no known name for how this tokenizer cuts texts:", faults, next_step)
        )
    return name


def _flat(step: Any) -> list[Mapping[str, Any]]:
    if not step:
        return []
    return [one for inner in step["pretokenizers"] for one in _flat(inner)] if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> str:
    """A step in a word: what is not one of those known is told as it stands."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return str(step["pattern"]["Regex"])
    return str(dict(step))
