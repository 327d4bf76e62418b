"""The table of merge methods."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from veneer.errors import ConfigError, nearest

if TYPE_CHECKING:
    from veneer.merge.method import Merge

# name -> "module:Merge"; a method is its file, its line here, its settings in config/merging.py, and the laws in
# tests/contract/test_merges.py.
MERGES: dict[str, str] = {
    "linear": "veneer.merge.linear:LINEAR",
    "cat": "veneer.merge.cat:CAT",
    "svd": "veneer.merge.svd:SVD",
    "magnitude": "veneer.merge.magnitude:MAGNITUDE",
    "ties": "veneer.merge.ties:TIES",
    "dare_linear": "veneer.merge.dare:DARE_LINEAR",
    "dare_ties": "veneer.merge.dare:DARE_TIES",
    "knots": "veneer.merge.knots:KNOTS",
    "core": "veneer.merge.core_space:CORE",
    "tsv_m": "veneer.merge.tsv:TSV_M",
    "iso_c": "veneer.merge.iso:ISO_C",
    "iso_cts": "veneer.merge.iso:ISO_CTS",
    "orthogonal": "veneer.merge.orthogonal:ORTHOGONAL",
    "compress": "veneer.merge.compress:COMPRESS",
    "regmean": "veneer.merge.regmean:REGMEAN",
    "lorahub": "veneer.merge.lorahub:LORAHUB",
    "lora_soups": "veneer.merge.lora_soups:LORA_SOUPS",
}


def merge_named(name: str) -> Merge:
    """The member of MERGES. Raises ConfigError that names the nearest ones."""
    if name not in MERGES:
        alike = nearest(name, MERGES)
        meant = f"did you mean {' or '.join(alike)}?" if alike else f"wanted one of {', '.join(MERGES)}"
        raise ConfigError(f"merge method: got {name!r:.80}; {meant}")
    module, _, attribute = MERGES[name].partition(":")
    return getattr(import_module(module), attribute)
