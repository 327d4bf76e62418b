"""Every deliberate error of veneer.

* VeneerError                 exit code 2, one message, no traceback
  + ConfigError               a setting: unknown, out of range, contradictory
  + DataError                 a data file: missing, empty, broken, nothing to train on
  + ModelError                a base model: unknown, unsupported, fails the probe
  + AdapterError              an adapter folder or value: broken, incomplete, not understood
    - WrongBaseError          an adapter meets a base that it was not trained on
    - NotMergeable            a method without an exact merged form
  + TrainingError             a run that cannot go on
    - NonFiniteLossError      loss or gradient became NaN or infinite
    - NotEnoughMemoryError    a step that does not fit
    - CheckpointError         a checkpoint that cannot be resumed from
  + HubError                  an upload: no credentials, a name that is taken, no network

A message names what was wrong, what was expected and the next step, and lists all faults at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class VeneerError(Exception):
    """Root of the tree: the user can do something about it."""

    told_elsewhere = False
    """Whether another process of the same run tells the user."""


class ConfigError(VeneerError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(VeneerError, ValueError):
    """A data file is missing, broken, or leaves nothing to train on."""


class ModelError(VeneerError):
    """A base model is unknown, unsupported, or fails the probe at load."""


class AdapterError(VeneerError):
    """An adapter is broken, incomplete, or of a kind that is not understood."""


class WrongBaseError(AdapterError):
    """An adapter meets a base model that it was not trained on."""


class NotMergeable(AdapterError):
    """The method has no exact merged form."""


class TrainingError(VeneerError):
    """A training run cannot go on."""


class NonFiniteLossError(TrainingError, ArithmeticError):
    """Loss or gradient became NaN or infinite."""


class NotEnoughMemoryError(TrainingError, MemoryError):
    """A step of training does not fit into memory."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, incomplete, or belongs to another run."""


class HubError(VeneerError):
    """An adapter cannot be uploaded; it is whole where it was."""


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """The choices most like `word`, best first; for 'did you mean'."""
    return difflib.get_close_matches(word, list(choices), n=limit, cutoff=0.5)


def listed(headline: str, faults: Sequence[str], next_step: str = "") -> str:
    """One message for many faults: headline, a line a fault, what to do next."""
    lines = [headline, *(f"  - {fault}" for fault in faults)]
    return "\n".join(lines + ([next_step] if next_step else []))
