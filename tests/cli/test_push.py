"""`veneer push` around a stand-in for the upload."""

from __future__ import annotations

import json
from typing import Any

import pytest

from veneer.errors import HubError


@pytest.fixture
def calls(stub: Any) -> list[Any]:
    seen: list[Any] = []

    def publish(folder: str, settings: Any) -> str:
        seen.append((folder, settings.hub_model_id, settings.hub_private_repo))
        if settings.hub_model_id == "gone":
            raise HubError("no login")
        return "https://hub.invalid/me/skill"

    stub("veneer.evaluate.publish", publish=publish)
    return seen


def test_uploads_and_tells_where(veneer: Any, calls: list[Any]) -> None:
    answer = veneer("push", "out/skill", "--hub-model-id", "me/skill", "--private", "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == {"adapter": "out/skill", "address": "https://hub.invalid/me/skill"}
    assert calls == [("out/skill", "me/skill", True)]


def test_what_cannot_be_uploaded_is_a_message(veneer: Any, calls: list[Any]) -> None:
    answer = veneer("push", "out/skill", "--hub-model-id", "gone")
    assert (answer.code, answer.out, answer.err) == (2, "", "veneer: no login\n")


def test_a_folder_is_needed(veneer: Any, calls: list[Any]) -> None:
    answer = veneer("push")
    assert (answer.code, calls) == (2, [])
    assert "--adapter is missing" in answer.err
