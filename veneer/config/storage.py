"""How the frozen base is held in memory: the options, and the one name of a storage that they stand for."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.settings import Settings
from veneer.config.values import Dtype

# detail -> the switch that it is a detail of
_SWITCH = {
    "bnb_4bit_quant_type": "load_in_4bit",
    "bnb_4bit_use_double_quant": "load_in_4bit",
    "llm_int8_outliers": "load_in_8bit",
}


# storage -> the switches that choose it, as on the command line
SWITCHES = {
    "nf4": "--load-in-4bit",
    "nf4-dq": "--load-in-4bit --bnb-4bit-use-double-quant",
    "int4": "--load-in-4bit --bnb-4bit-quant-type int4",
    "int8": "--load-in-8bit",
    "int8-outlier": "--load-in-8bit --llm-int8-outliers",
    "fp8": "--load-in-fp8",
}


class StorageSettings(Settings):
    """Storage of the base: dense unless one `load_in_…` is given; every linear layer but the vocabulary head."""

    group: ClassVar[str] = "Storage of the base"

    dtype: Dtype = Field(default="auto", description="of the products, and of what is not quantised")
    load_in_4bit: bool = Field(default=False, description="keep the base in 4 bits a weight")
    load_in_8bit: bool = Field(default=False, description="keep the base in 8-bit integers")
    load_in_fp8: bool = Field(default=False, description="keep the base in 8-bit floats; needs a GPU that has them")
    bnb_4bit_quant_type: Literal["nf4", "int4"] = Field(default="nf4", description="the sixteen values of load_in_4bit")
    bnb_4bit_use_double_quant: bool = Field(default=False, description="nf4: quantise the block scales too")
    llm_int8_outliers: bool = Field(
        default=False, description="load_in_8bit: keep columns of far-out weights as they are"
    )

    @property
    def storage(self) -> str:
        """The name in `veneer.bases.BASES`."""
        if self.load_in_4bit:
            return "nf4-dq" if self.bnb_4bit_use_double_quant else self.bnb_4bit_quant_type
        if self.load_in_8bit:
            return "int8-outlier" if self.llm_int8_outliers else "int8"
        return "fp8" if self.load_in_fp8 else "dense"

    def storage_options(self) -> list[str]:
        """The options that were set, other than dtype."""
        fields = StorageSettings.model_fields.items()
        return [name for name, field in fields if name != "dtype" and getattr(self, name) != field.default]

    @model_validator(mode="after")
    def _one_storage(self) -> StorageSettings:
        asked = [name for name in ("load_in_4bit", "load_in_8bit", "load_in_fp8") if getattr(self, name)]
        if len(asked) > 1:
            raise PydanticCustomError("storages", "one storage: {names}", {"names": _spelt(asked, " or ")})
        lone = [name for name in self.storage_options() if _SWITCH.get(name, name) not in asked]
        if lone:
            reason = {
                "names": _spelt(lone, " and "),
                "switches": _spelt(sorted({_SWITCH[name] for name in lone}), " and "),
            }
            raise PydanticCustomError("storage_detail", "{names} without {switches}", reason)
        if self.bnb_4bit_use_double_quant and self.bnb_4bit_quant_type != "nf4":
            raise PydanticCustomError("double", "`bnb_4bit_use_double_quant` is for `bnb_4bit_quant_type` nf4")
        return self


def _spelt(names: list[str], between: str) -> str:
    return between.join(f"`{name}`" for name in names)
