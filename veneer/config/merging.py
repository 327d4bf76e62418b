"""The settings of each way to make one adapter out of several."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from veneer.config.settings import Settings
from veneer.config.values import Seed

Elementwise = Literal["linear", "magnitude", "ties", "dare_linear", "dare_ties"]


class CatSettings(Settings):
    """Concatenation."""

    group: ClassVar[str] = "Method"


class LinearSettings(CatSettings):
    """What every method has whose result can be brought to a lower rank."""

    rank: int | None = Field(default=None, ge=1, description="highest rank of a layer; default: as high as it takes")
    energy: float | None = Field(
        default=None, gt=0, le=1, description="keep this share of each layer's squared norm, at the lowest rank"
    )
    scale: float = Field(default=1.0, description="multiply the result")
    exact: bool = Field(default=False, description="Householder QR in float64 throughout, two to three times slower")


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
