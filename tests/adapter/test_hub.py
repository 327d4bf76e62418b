"""Uploads, against a stand-in of the Hub's client: what goes there, what does not, and what is said when it fails."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from veneer.adapter import hub
from veneer.adapter.card import Adapter
from veneer.errors import HubError

# The HTTP library of the Hub's client, which is another one from version to version.
http = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def answered(status: int) -> Exception:
    request = http.Request("POST", "https://hub.invalid/api")
    return HfHubHTTPError(f"{status} from the Hub", response=http.Response(status, request=request))


class FakeHub:
    """Remembers repositories: name -> (private, files with their bytes). `fails`: call -> what it raises."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.fails: dict[str, Exception] = {}
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return {"name": "me", "orgs": [{"name": "lab"}]}

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        self._called("create_repo")
        assert exist_ok
        self.repositories.setdefault(repo_id, (bool(private), {".gitattributes": b""}))
        return f"https://hub.invalid/{repo_id}"

    def model_info(self, repo_id: str) -> Any:
        private, files = self.repositories[repo_id]
        return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=name) for name in files])

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self._called("upload_folder")
        found = {path.name: path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()}
        self.repositories[repo_id][1].update(found)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "_api", lambda: fake)
    return fake


@pytest.fixture
def folder(pico: Any, adapter_for: Callable[..., Adapter], tmp_path: Path) -> Path:
    """An adapter whose record is full of this machine's folders, among files that are nobody's business."""
    adapter = adapter_for(pico())
    training = {
        "options": {"dataset": "/srv/secret/train.jsonl", "output_dir": "../secret/skill", "system_prompt": "/srv/a/b"},
        "notes": ["the earlier run in /srv/secret/out was moved to C:\\Users\\me\\out", r"as {a}\n\n{b}, 1 / 576"],
    }
    card = dataclasses.replace(adapter.card, base_name="/srv/secret/base", training=training)
    path = Adapter(adapter.tensors, card).save(tmp_path / "skill")
    for name in ("metrics.jsonl", "report.html", "run.yaml"):
        (path / name).write_text("private")
    return path


def test_the_stand_in_takes_what_the_client_takes() -> None:
    for name in ("whoami", "create_repo", "model_info", "upload_folder"):
        ours = inspect.signature(getattr(FakeHub, name)).parameters
        inspect.signature(getattr(HfApi, name)).bind(**dict.fromkeys(ours, None))


def test_the_adapter_and_its_cards_are_all_that_goes(there: FakeHub, folder: Path) -> None:
    address = hub.upload(folder, "# skill", "me/skill", private=True)
    private, files = there.repositories["me/skill"]
    wanted = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json"}
    assert (address, private, files.keys()) == ("https://hub.invalid/me/skill", True, wanted)
    assert files["README.md"] == b"# skill"
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_folders_of_this_machine_stay_here(there: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.upload(folder, "", "me/skill")
    files = there.repositories["me/skill"][1]
    card = json.loads(files["veneer.json"])
    assert b"secret" not in b"".join(files.values())
    assert card["base_name"] == json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert card["training"]["options"] == {"dataset": "train.jsonl", "output_dir": "skill", "system_prompt": "/srv/a/b"}
    assert card["training"]["notes"] == ["the earlier run in out was moved to out", r"as {a}\n\n{b}, 1 / 576"]
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    assert Adapter.load(tmp_path).identity == Adapter.load(folder).identity


@pytest.mark.parametrize(
    ("name", "whole"), [("skill", "me/skill"), ("me/skill", "me/skill"), ("lab/skill", "lab/skill")]
)
def test_a_name_gets_its_owner(there: FakeHub, name: str, whole: str) -> None:
    assert hub.destination(name) == whole
    assert there.calls == ["whoami"]  # nothing is made before there is something to upload


@pytest.mark.parametrize(
    ("name", "told"), [("other/skill", "me and lab, not to other.*me/skill"), ("a b", "as me/skill"), ("a/b/c", "name")]
)
def test_a_name_that_cannot_be(there: FakeHub, name: str, told: str) -> None:
    with pytest.raises(HubError, match=told):
        hub.destination(name)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalTokenNotFoundError("no token"), "no login is known here; next: hf auth login"),
        (answered(401), "not accepted; next: hf auth login"),
        (answered(403), "may not write there"),
        (answered(503), "answers 503"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (http.ConnectError("no route"), "cannot be reached \\(no route\\)"),
        (TimeoutError(), "cannot be reached \\(TimeoutError\\)"),
    ],
)
@pytest.mark.parametrize("call", ["whoami", "create_repo", "upload_folder"])
def test_what_the_client_raises_is_told(there: FakeHub, folder: Path, call: str, error: Exception, told: str) -> None:
    there.fails[call] = error
    with pytest.raises(HubError, match=told):
        hub.upload(folder, "", hub.destination("skill"))


def test_a_name_that_something_else_has_is_taken(there: FakeHub, folder: Path) -> None:
    there.repositories["me/skill"] = (False, {".gitattributes": b"", "model.safetensors": b""})
    with pytest.raises(HubError, match=r"taken: it holds model\.safetensors"):
        hub.upload(folder, "", "me/skill")
    assert "upload_folder" not in there.calls


def test_an_adapter_is_replaced_by_its_next_version(there: FakeHub, folder: Path) -> None:
    hub.upload(folder, "old", "me/skill")
    hub.upload(folder, "new", "me/skill")
    assert there.repositories["me/skill"][1]["README.md"] == b"new"


def test_what_is_to_be_private_never_becomes_public(there: FakeHub, folder: Path) -> None:
    there.repositories["me/skill"] = (False, {})
    with pytest.raises(HubError, match="exists and is public"):
        hub.upload(folder, "", "me/skill", private=True)
    assert "upload_folder" not in there.calls
