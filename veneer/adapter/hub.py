"""An adapter folder on the Hugging Face Hub: where it may go, and its upload.

Uploaded are the adapter, its card and its model card; never data, metrics or checkpoints. Of the paths in the card the
last part alone goes along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from veneer.adapter.card import Adapter
from veneer.errors import HubError

MODEL_CARD = "README.md"
_FILES = frozenset({"dataset", "eval_dataset", "output_dir"})
_ABSOLUTE = re.compile(r"(?<![\w.:/~])~?(?:/[^\s/,;:'\"()]+){2,}|\b[A-Za-z]:(?:\\[^\s\\,;:'\"()]+)+")
_NEW = frozenset({".gitattributes", MODEL_CARD})  # what a repository may hold before its first adapter


def destination(name: str) -> str:
    """`skill` or `me/skill` as owner/name, once the Hub has said who we are. Raises HubError; uploads nothing."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with _told(f"{name} cannot be uploaded to"):
        validate_repo_id(name)
        me = _api().whoami()
    owner, _, rest = name.rpartition("/")
    owners = [me["name"], *(one["name"] for one in me.get("orgs") or ())]
    if owner and owner not in owners:
        raise HubError(
            f"{name} cannot be uploaded to: this login belongs to {' and '.join(owners)}, not to {owner}; "
            f"next: --hub-model-id {me['name']}/{rest}, or log in as {owner}"
        )
    return name if owner else f"{me['name']}/{name}"


def upload(folder: str | Path, model_card: str, name: str, private: bool = False) -> str:
    """Uploads the adapter of `folder` to `name` (owner/name, made if it is new); returns its address.

    Raises AdapterError where the folder is no whole adapter, HubError for what the Hub refuses, for a name that
    something else than an adapter has, and for a public one where `private` was asked for.
    """
    adapter = _for_others(Adapter.load(folder))
    with tempfile.TemporaryDirectory() as staged:
        adapter.save(staged)
        Path(staged, MODEL_CARD).write_text(model_card, encoding="utf-8")
        with _told(f"{folder} was not uploaded to {name}"):
            api = _api()
            address = str(api.create_repo(name, private=private or None, exist_ok=True))
            _check_there(api.model_info(name), name, private)
            api.upload_folder(repo_id=name, folder_path=staged, commit_message="Adapter and its card")
    return address


def _check_there(info: Any, name: str, private: bool) -> None:
    """Whether what has this name may be written to: a name once given is not changed to private by an upload."""
    if private and not info.private:
        raise HubError(f"{name} exists and is public; make it private there, or choose another --hub-model-id")
    files = {file.rfilename for file in info.siblings or ()}
    if files - _NEW and "adapter_config.json" not in files:
        raise HubError(
            f"{name} is taken: it holds {', '.join(sorted(files - _NEW)[:3])} and no adapter; "
            "choose another --hub-model-id"
        )


def _for_others(adapter: Adapter) -> Adapter:
    """The same adapter, its card without the folders of this machine: the same tensors, the same identity."""
    base, training = adapter.card.base_name, _portable(adapter.card.training)
    card = dataclasses.replace(adapter.card, base_name=base and base_without_folders(base), training=training)
    return Adapter(adapter.tensors, card)


def _portable(value: Any, key: str = "") -> Any:
    if key == "system_prompt":  # part of what the adapter is: word for word
        return value
    if isinstance(value, Mapping):
        return {name: _portable(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if key == "base_model":
        return base_without_folders(value)
    return last_part(value) if key in _FILES else _ABSOLUTE.sub(lambda found: last_part(found[0]), value)


def last_part(path: str) -> str:
    """The name of a file or folder, without where it lies."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def base_without_folders(name: str) -> str:
    """A hub id as it is; of a folder its name."""
    return name if is_hub_id(name) else last_part(name)


def is_hub_id(name: str) -> bool:
    """Whether the name of a base is owner/name on the Hub, and no folder here."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _api() -> Any:
    from huggingface_hub import HfApi  # heavy, and needed by nothing else

    return HfApi()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """What the Hub's client raises, as one HubError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__bases__  # those of its HTTP library, which has changed from version to version
    try:
        yield
    except (*transport, OSError, ValueError) as error:
        raise HubError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        known = "the login is not accepted" if status else "no login is known here"
        return f"{known}; next: hf auth login, with a token that may write, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"no name for the Hub ({_line(error)}); wanted letters, digits, - _ . and one owner/, as me/skill"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network; next: unset it"
    if status == 403:
        return f"this login may not write there ({_line(error)}); next: a token that may write, or another name"
    if status is not None:
        return f"the Hub answers {status} ({_line(error)})"
    return f"the Hub cannot be reached ({_line(error)}); next: try again when there is a network"


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
