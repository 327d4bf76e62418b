"""What a user should know though nothing is wrong: a warning of a kind of its own, which the command line prints as a
note."""

from __future__ import annotations

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


class Note(UserWarning):
    """Told by veneer. `warnings.filterwarnings("error", category=veneer.notes.Note)` makes it an error."""


def tell(text: str) -> None:
    """Warns in the name of the first caller outside of the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, Note, stacklevel=level)
