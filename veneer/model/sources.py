"""Where the files of a checkpoint lie on this machine; never the network."""

from __future__ import annotations

import json
from pathlib import Path

from veneer.errors import ModelError


def checkpoint_files(name_or_path: str, revision: str | None = None) -> list[Path]:
    """The local files of a checkpoint: a file itself, a folder's, or the hub cache's. Empty if there are none."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return [path] if path.suffix in (".safetensors", ".gguf") else []
    if path.is_dir():
        return _files_in(path)
    return _files_in_hub_cache(name_or_path, revision)


def _files_in(folder: Path) -> list[Path]:
    """A folder's checkpoint in transformers' order of preference: one file, shards by their index, a lone file."""
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if (index := folder / "model.safetensors.index.json").is_file():
        return [folder / name for name in _shards(index)]
    lone = [file for suffix in ("safetensors", "gguf") for file in folder.glob(f"*.{suffix}")]
    lone = [file for file in lone if file.name != "adapter_model.safetensors"]
    return lone if len(lone) == 1 else []


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if all(Path(name).name == name for name in names):  # an index must not point out of its folder
            return names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from error
    raise ModelError(f"{index}: names files outside its own folder")


def _files_in_hub_cache(repository: str, revision: str | None) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache  # heavy; looks at the disk only
    from huggingface_hub.errors import HFValidationError

    try:
        for name in ("model.safetensors", "model.safetensors.index.json"):
            found = try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(found, str):
                return _files_in(Path(found).parent)
    except HFValidationError:
        pass
    return []
