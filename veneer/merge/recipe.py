"""What to merge and how: plain data, saved with the result."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.config.merging import CatSettings
from veneer.errors import ConfigError
from veneer.merge.table import merge_named


@dataclass(frozen=True)
class Recipe:
    """A method of MERGES, a weight for each adapter in the order they are given, and the method's options.

    Weights may be negative: (1, -1) takes the second away from the first, (1, -1, 1) is A - B + C. Raises ConfigError
    for an unknown method, options that it has not, and weights that are not finite numbers.
    """

    method: str
    weights: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = [weight for weight in self.weights if not _finite(weight)]
        if bad or not self.weights:
            raise ConfigError(f"weights: got {bad or 'none'}; wanted a finite number for each adapter")
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        object.__setattr__(self, "options", dict(self.options))
        _ = self.settings  # raises

    @property
    def settings(self) -> CatSettings:
        """The options with their defaults, checked."""
        return merge_named(self.method).settings.from_flat(self.options)

    @property
    def reads_data(self) -> bool:
        """Whether it cannot be followed without rows."""
        return bool(self.what_reads_data)

    @property
    def what_reads_data(self) -> str:
        """The method or the option that needs rows, else nothing."""
        if self.settings.reads_data:
            return self.method
        return "activation_aware" if getattr(self.settings, "activation_aware", False) else ""

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "weights": list(self.weights), "options": self.settings.to_flat()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`. Raises ConfigError."""
        unknown = sorted(value.keys() - {"method", "weights", "options"})
        missing = sorted({"method", "weights"} - value.keys())
        if unknown or missing:
            told = [f"unknown {', '.join(unknown)}"] * bool(unknown) + [f"missing {', '.join(missing)}"] * bool(missing)
            raise ConfigError(f"recipe: {'; '.join(told)}. Wanted method, weights and, if any, options")
        weights, options = value["weights"], value.get("options", {})
        if not isinstance(weights, Sequence) or isinstance(weights, str) or not isinstance(options, Mapping):
            raise ConfigError("recipe: weights must be a list of numbers, and options a mapping")
        return cls(str(value["method"]), tuple(weights), options)


def _finite(weight: Any) -> bool:
    return isinstance(weight, numbers.Real) and not isinstance(weight, bool) and math.isfinite(weight)
