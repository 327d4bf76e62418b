"""The settings of each way to make one adapter out of several, and all of them together, as the command line has them.

An option is a field of the methods that have it. `MethodOptions` is made of those fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.settings import Settings
from veneer.config.values import Seed

Elementwise = Literal["linear", "magnitude", "ties", "dare_linear", "dare_ties"]


class CatSettings(Settings):
    """Concatenation."""

    group: ClassVar[str] = "Method"
    reads_data: ClassVar[bool] = False  # whether the method cannot do without rows of each parent


class CutSettings(Settings):
    """How much stays of what is brought to a lower rank."""

    group: ClassVar[str] = "Rank"

    rank: int | None = Field(default=None, ge=1, description="highest rank of a layer; default: as high as it takes")
    energy: float | None = Field(
        default=None, gt=0, le=1, description="keep this share of each layer's squared norm, at the lowest rank"
    )


class LinearSettings(CutSettings, CatSettings):
    """What every method has whose result can be brought to a lower rank."""

    scale: float = Field(default=1.0, description="multiply the result")
    exact: bool = Field(default=False, description="Householder QR in float64 throughout, two to three times slower")
    activation_aware: bool = Field(
        default=False,
        description="cut to `rank` by what changes on the rows of `dataset`, not by the weights alone",
    )

    @model_validator(mode="after")
    def _aware_of_something(self) -> LinearSettings:
        if self.activation_aware and (self.rank is None or self.energy is not None):
            raise PydanticCustomError(
                "aware", "`activation_aware` is how to cut to a `rank`; give that, and no `energy`"
            )
        return self


class SvdSettings(LinearSettings):
    """Sum at a lower rank."""

    rank: int | None = Field(default=None, ge=1, description="highest rank of a layer; default: that of the parents")


class MagnitudeSettings(LinearSettings):
    """The largest entries of each adapter."""

    density: float = Field(default=0.5, gt=0, le=1, description="share of each adapter's entries that is kept")


class TiesSettings(MagnitudeSettings):
    """Trim, elect a sign, mean of those that agree."""

    density: float = Field(default=0.2, gt=0, le=1, description="share of each adapter's entries that is kept")


class DareSettings(MagnitudeSettings):
    """Random entries of each adapter, the rest scaled up."""

    seed: Seed = Field(default=0, description="of the entries that are dropped")


class KnotsSettings(DareSettings):
    """An element-wise method in a basis that all adapters share."""

    inner: Elementwise = Field(default="ties", description="how entries are merged in the shared basis")


class CoreSettings(KnotsSettings):
    """An element-wise method in the bases that all adapters share."""


class CompressSettings(KnotsSettings):
    """First the shared subspaces, then the merge."""

    rank: int | None = Field(default=None, ge=1, description="rank of the shared spaces; default: that of the parents")
    inner: Elementwise = Field(default="linear", description="how entries are merged in the shared spaces")

    @model_validator(mode="after")
    def _cuts_nothing(self) -> CompressSettings:
        if self.activation_aware:
            raise PydanticCustomError(
                "aware", "`activation_aware`: compress has its rank before it merges, and cuts nothing"
            )
        return self


class TsvSettings(LinearSettings):
    """Task singular vectors, made orthogonal."""


class IsoSettings(LinearSettings):
    """All singular values of the sum become their mean."""


class IsoCtsSettings(IsoSettings):
    """The same, with directions of each task beside the common ones."""

    common: float = Field(default=0.8, gt=0, le=1, description="share of the directions that is common to all tasks")


class OrthogonalSettings(LinearSettings):
    """Each adapter without what overlaps with those before it."""

    protect: float = Field(
        default=1.0, gt=0, le=1, description="share of the squared norm so far whose directions are kept free"
    )


class RegmeanSettings(LinearSettings):
    """The update that comes nearest to each adapter's outputs on its own rows."""

    reads_data: ClassVar[bool] = True

    ridge: float = Field(
        default=1e-3, gt=0, description="added to the diagonal of what a layer reads, in parts of its mean"
    )


class LorahubSettings(LinearSettings):
    """Weights that are found by trying."""

    reads_data: ClassVar[bool] = True

    evaluations: int = Field(default=40, ge=1, description="how many weightings are tried, those given first")
    seed: Seed = Field(default=0, description="of what is tried")


class LoraSoupsSettings(LinearSettings):
    """Weights for each layer that are learned."""

    reads_data: ClassVar[bool] = True

    max_steps: int = Field(default=40, ge=1, description="steps of Adam, each on some rows of every file")
    learning_rate: float = Field(default=0.02, gt=0, description="of the weights")


# method -> its settings; veneer.merge.table has the methods themselves.
SETTINGS: dict[str, type[CatSettings]] = {
    "linear": LinearSettings,
    "cat": CatSettings,
    "svd": SvdSettings,
    "magnitude": MagnitudeSettings,
    "ties": TiesSettings,
    "dare_linear": DareSettings,
    "dare_ties": DareSettings,
    "knots": KnotsSettings,
    "core": CoreSettings,
    "tsv_m": TsvSettings,
    "iso_c": IsoSettings,
    "iso_cts": IsoCtsSettings,
    "orthogonal": OrthogonalSettings,
    "compress": CompressSettings,
    "regmean": RegmeanSettings,
    "lorahub": LorahubSettings,
    "lora_soups": LoraSoupsSettings,
}


def data_methods() -> list[str]:
    """The methods that read rows of each parent."""
    return [method for method, settings in SETTINGS.items() if settings.reads_data]


def methods_with(option: str) -> list[str]:
    """The methods that have this option."""
    return [method for method, settings in SETTINGS.items() if option in settings.model_fields]


def spelt(methods: list[str]) -> str:
    """Their names; of nearly all, the names of the others."""
    others = [method for method in SETTINGS if method not in methods]
    return ", ".join(methods) if len(others) > 2 else f"all but {', '.join(others)}" if others else "all"


def _described(option: str) -> str:
    """What the option does in each method that has it, and its default there."""
    told: dict[str, list[str]] = {}
    for method in methods_with(option):
        field = SETTINGS[method].model_fields[option]
        default = "" if field.default is None or field.default is False else f" [{field.default}]"
        told.setdefault(f"{field.description}{default}", []).append(method)
    return " / ".join(f"{text} ({spelt(methods)})" for text, methods in told.items())


def _options() -> dict[str, Any]:
    """Every option of every method as a field that need not be given."""
    found: dict[str, Any] = {}
    for settings in SETTINGS.values():
        for name, field in settings.model_fields.items():
            kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            found.setdefault(name, (kind | None, Field(default=None, description=_described(name))))
    return found


OPTIONS = tuple(_options())

if TYPE_CHECKING:

    class MethodOptions(Settings):
        """All options of all methods, None where not given."""
else:
    MethodOptions = create_model("MethodOptions", __base__=Settings, __module__=__name__, **_options())
    MethodOptions.group = "Options of the methods"
