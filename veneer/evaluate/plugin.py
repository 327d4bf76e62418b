"""A metric of the user's own: `path/to/file.py:function` or `module:function`, as named on the command line.

The function takes predictions (a list of texts) and references (for each, the list of texts that count as right) and
returns a number for each row, higher is better; their mean is the score. Naming it is consent to run it; nothing that
a data file or an adapter folder says ever gets here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.data.files import kind_of, shortened
from veneer.errors import ConfigError, VeneerError, listed, nearest


@cache  # the file may load much: it runs once
def own_metric(spec: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]:
    """The function, with what it returns checked. ConfigError names whatever is wrong with it."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{spec!r} names no function; wanted file.py:function or module:function")
    module = _module(place)
    if not callable(function := getattr(module, name, None)):
        near = nearest(name, [key for key, value in vars(module).items() if callable(value)])
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{place} has no function {name!r}, which --metrics names.{meant}")

    def rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        try:
            found = function(list(predictions), [list(wanted) for wanted in references])
        except VeneerError:
            raise
        except SystemExit as error:
            raise ConfigError(f"the metric {spec} asked to end the program; wanted a number for each row") from error
        except Exception as error:
            raise ConfigError(f"the metric {spec} failed: {_told(error)}") from error
        return _checked(spec, found, len(predictions))

    return rows


def _module(place: str) -> ModuleType:
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.partition(".")[0] and error.name != place:
            raise ConfigError(f"{place}, which --metrics names, cannot be loaded: {_told(error)}") from error
        raise ConfigError(
            f"no module {place!r} is installed, which --metrics names; for a file write path/to/file.py:function"
        ) from error
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{place}, which --metrics names, cannot be loaded: {_told(error)}") from error


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"{file} does not exist, which --metrics names; wanted a Python file")
    name = f"veneer_metric_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up by its name
    spec.loader.exec_module(module)
    return module


def _told(error: BaseException) -> str:
    """The error with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _checked(spec: str, found: Any, rows: int) -> list[float]:
    wanted = f"wanted a list of {rows:,} numbers, one for each row"
    if isinstance(found, str | bytes | dict) or not hasattr(found, "__len__") or not hasattr(found, "__iter__"):
        raise ConfigError(f"the metric {spec} returned {_kind(found)}, {wanted}")
    if len(found) != rows:
        raise ConfigError(f"the metric {spec} returned {len(found):,} values, {wanted}")
    values = [_number(value) for value in found]
    faults = [
        f"row {number}: {_kind(value)}"
        for number, (value, as_number) in enumerate(zip(found, values, strict=True), start=1)
        if as_number is None
    ]
    if faults:
        raise ConfigError(listed(f"the metric {spec} returned what is no finite number, {wanted}:", shortened(faults)))
    return [value for value in values if value is not None]


def _number(value: Any) -> float | None:
    """The value as a float; None for text, and for what no float can be made of, NaN and infinity among it."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, float) else kind_of(value)
