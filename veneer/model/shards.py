"""The tensors of a safetensors checkpoint, read one at a time: what is in which file, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import ModelError, listed


class Shards:
    """Name -> file and shape, from the headers alone; `read` takes one tensor off the disk.

    Raises ModelError that names every file that is missing, truncated or no safetensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.file_of: dict[str, Path] = {}
        self.shape_of: dict[str, tuple[int, ...]] = {}
        faults = [fault for file in files if (fault := self._index(file))]
        if faults:
            raise ModelError(listed("the checkpoint cannot be read:", faults, "Download these files again."))
        self._open: tuple[Path, safe_open] | None = None

    def name_of(self, wanted: str, prefix: str) -> str | None:
        """How the checkpoint calls the tensor `wanted`: with or without the prefix of the model inside the head; of a
        language model among others, as this or earlier releases of transformers wrote it."""
        spellings = [wanted, wanted.removeprefix(f"{prefix}."), f"{prefix}.{wanted}"]
        whole, inside, rest = wanted.partition("language_model.")
        if inside and whole == f"{prefix}.":
            spellings += [f"language_model.model.{rest}", f"model.{rest}"]
        return next((name for name in spellings if name in self.file_of), None)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU. Only the file read last is kept open."""
        file = self.file_of[name]
        with _told(file):
            if self._open is None or self._open[0] != file:
                self._open = (file, safe_open(file, framework="pt"))
            return self._open[1].get_tensor(name)

    def close(self) -> None:
        """Lets go of the file read last, and of the memory that maps it."""
        self._open = None

    def _index(self, file: Path) -> str | None:
        """Takes in a header; returns what is wrong with the file."""
        try:
            with _told(file), safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, not a dict
                    self.file_of[name] = file
                    self.shape_of[name] = tuple(opened.get_slice(name).get_shape())
        except ModelError as error:
            return str(error)
        return None


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """A damaged file is named; the library's own message names none."""
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{file}: the file is not there") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: truncated or damaged ({error})") from error
