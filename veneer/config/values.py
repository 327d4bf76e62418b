"""Types that an option can have, and how a value written as text becomes one.

A list may be written `a,b`, a dictionary `a=1,b=2`; both also as JSON. The same spellings work in a YAML file.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Metavar:
    """What stands for the value in `--help`: `--dataset FILE`."""

    text: str


def split_list(value: Any) -> Any:
    """`a,b` or `["a", "b"]` -> list; anything but text is left as it is."""
    if not isinstance(value, str):
        return value
    return _json(value, list) if value.lstrip().startswith("[") else [v.strip() for v in value.split(",") if v.strip()]


def split_files(value: Any, folder: str = "") -> Any:
    """As `split_list`; but what exists under its whole name is one file or folder, commas and all, pinned or not."""
    if isinstance(value, str) and os.path.exists(os.path.join(folder, PIN.sub("", value))):
        return [value]
    return split_list(value)


def files_named(text: str) -> list[str]:
    """What is named there, whether one file or folder, several between commas, or some of them in JSON."""
    try:
        return [str(one) for one in split_files(text)]
    except PydanticCustomError:  # of broken JSON, which is told when it is read
        return [text]


def split_dict(value: Any) -> Any:
    """`a=1,b=2` or `{"a": 1}` -> dict; anything but text is left as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value, dict)
    return dict(_pair(item) for item in value.split(",") if item.strip())


def _columns(value: Any) -> Any:
    """Our names stand first; written the other way round, the right way is told."""
    value = split_dict(value)
    if (
        isinstance(value, dict)
        and value
        and all(their in COLUMNS and our not in COLUMNS for our, their in value.items())
    ):
        right = ",".join(f"{their}={our}" for our, their in value.items())
        raise PydanticCustomError("turned", "{right}: the name that veneer knows stands first", {"right": right})
    return value


def _pair(item: str) -> tuple[str, str]:
    # The last '=': keys may be regular expressions, values of our dictionaries are numbers or folders.
    key, equals, value = item.rpartition("=")
    if not (equals and key.strip() and value.strip()):
        raise PydanticCustomError("pair", "Input should be name=value pairs, such as a=1,b=2")
    return key.strip(), value.strip()


def _json(text: str, wanted: type) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = {"wanted": wanted.__name__, "why": str(error)}
        raise PydanticCustomError("json", "Input should be a {wanted} in JSON: {why}", reason) from None


def _word_or_list(value: Any) -> Any:
    return value if value == "all-linear" else split_list(value)


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.lower().removeprefix("torch.")
    return _DTYPES.get(name, name)


def _optim(value: Any) -> Any:
    return _OPTIMS.get(value, value) if isinstance(value, str) else value


def _whole_or_fraction(value: float) -> float | int:
    if value >= 1 and value != int(value):
        raise PydanticCustomError("split", "Input should be a fraction below 1 or a whole number of rows")
    return int(value) if value >= 1 else float(value)


def _trackers(value: Any) -> Any:
    names = split_list(value)
    return [] if names == ["none"] else names


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


def _unlimited(value: Any) -> Any:
    # transformers writes -1 where it means "no limit"; configurations are copied from there.
    return None if str(value) == "-1" else value


# As transformers and axolotl spell them.
_OPTIMS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw_32bit": "paged_adamw",
}
_OPTIMS |= {"adamw_bnb_8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "paged_adamw8bit": "paged_adamw_8bit"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def _one_or_list(value: Any) -> Any:
    """One stays as it is: settings of a run on one file are those that older runs wrote down."""
    found = split_files(value)
    if isinstance(found, list) and not found:
        raise PydanticCustomError("none", "Input should be at least one file")
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def _token_ids(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return _json(value, dict)
    return split_list(value) if not isinstance(value, int) else [value]


def _counts(value: Any) -> Any:
    found = split_list(value) if not isinstance(value, int) else [value]
    return [None if one in ("none", "all") else one for one in found] if isinstance(found, list) else found


PIN = re.compile(r"@sha256:([0-9a-f]{64})\Z")  # which one it has to be, behind a name
MAX_LENGTH = 1024  # tokens of a row, where nothing else is asked for
LONGEST_ROW = 2**24  # tokens: more than any model reads
Positive = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=1, le=LONGEST_ROW)]
Text = Annotated[str, Metavar("TEXT")]
File = Annotated[str, Field(min_length=1), Metavar("FILE")]
Files = Annotated[File | list[File], BeforeValidator(_one_or_list), Metavar("FILE ...")]
FilesInOrder = Annotated[list[File], BeforeValidator(split_files), Metavar("FILE ...")]
Column = Literal["prompt", "completion", "messages", "text", "chosen", "rejected", "tools", "references"]
COLUMNS = get_args(Column)
Columns = Annotated[dict[Column, str], BeforeValidator(_columns), Metavar("NAME=COLUMN,...")]
Counts = Annotated[list[Annotated[int, Field(ge=1)] | None], BeforeValidator(_counts), Metavar("N,...")]
Shares = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(split_list), Metavar("X,...")]
Weights = Annotated[list[float], BeforeValidator(split_list), Metavar("X,...")]
Folder = Annotated[str, Field(min_length=1), Metavar("FOLDER")]
ModelName = Annotated[str, Field(min_length=1), Metavar("MODEL")]
Names = Annotated[list[str], BeforeValidator(split_list), Metavar("A,B,...")]
Folders = Annotated[list[Folder], BeforeValidator(split_files), Metavar("FOLDER,...")]
Targets = Annotated[Literal["all-linear"] | list[str], BeforeValidator(_word_or_list), Metavar("all-linear|A,B,...")]
Ranks = Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(split_dict), Metavar("MODULE=N,...")]
Alphas = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(split_dict), Metavar("MODULE=X,...")]
_Ids = list[Annotated[int, Field(ge=0)]]
TokenIds = Annotated[_Ids | dict[str, _Ids], BeforeValidator(_token_ids), Metavar("N,...")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)]
Optim = Annotated[Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"], BeforeValidator(_optim)]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Trackers = Annotated[list[Tracker], BeforeValidator(_trackers), Metavar("NAME,...|none")]
Recompute = bool | Literal["auto", "offload"]
RowsOrFraction = Annotated[float, Field(ge=0), AfterValidator(_whole_or_fraction)]
RateOrAuto = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_auto), Metavar("X")]
StepsOrUnlimited = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_unlimited), Metavar("N")]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
