"""What the settings of the smaller verbs refuse."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.config import ChatSettings, ConvertSettings, EvalSettings, GenerateSettings, MergeSettings, Settings
from veneer.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        (EvalSettings, {"dataset": "d"}, "give base_model, an adapter"),
        (EvalSettings, {"dataset": "d", "adapter": "a", "metrics": ""}, "metrics"),
        (EvalSettings, {"dataset": "d", "adapter": "a", "limit": 0}, "limit: got 0"),
        (GenerateSettings, {"adapter": "a"}, "either prompt or dataset"),
        (GenerateSettings, {"adapter": "a", "prompt": "p", "dataset": "d"}, "either prompt or dataset"),
        (GenerateSettings, {"prompt": "p"}, "give base_model"),
        (GenerateSettings, {"adapter": "a", "prompt": "p", "num_return_sequences": 2}, "temperature"),
        (GenerateSettings, {"adapter": "a", "prompt": "p", "top_p": 0}, "top_p: got 0"),
        (GenerateSettings, {"adapter": "a", "prompt": "p", "temperature": "inf"}, "temperature"),
        (ChatSettings, {}, "give base_model"),
        (MergeSettings, {"adapters": "a", "output": "o"}, "add into_base"),
        (MergeSettings, {"adapters": "a,b", "output": "o", "into_base": True}, "one adapter"),
        (MergeSettings, {"adapters": "", "output": "o", "into_base": True}, "adapters"),
        (
            MergeSettings,
            {"adapters": "a", "output": "o.gguf", "into_base": True},
            "give o; add format gguf",
        ),
        (MergeSettings, {"adapters": "a,b", "output": "o", "max_length": 9}, "max_length: with dataset only"),
        (MergeSettings, {"adapters": "a,b", "output": "o.gguf"}, "give o; then veneer convert it to gguf"),
        (ConvertSettings, {"extract": "m", "base_model": "b", "rank": 4, "output": "o.gguf"}, "give o; then"),
        (ConvertSettings, {"adapter": "a", "output": "x/o.GGUF/"}, "give x/o; add to gguf"),
        (EvalSettings, {"harness": "x", "base_model": "m", "max_length": 9}, "max_length"),
    ],
)
def test_refused(settings: type[Settings], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings.from_flat(options)


def test_one_word_is_understood_by_the_verb_it_is_said_to() -> None:
    assert EvalSettings.from_flat({"dataset": "d", "adapters": "a,b"}).adapter == ["a", "b"]
    assert ChatSettings.from_flat({"adapter": "x=a"}).adapters == {"x": "a"}
    assert MergeSettings.from_flat({"adapter": "a", "output_dir": "o", "into_base": True}).output == "o"
