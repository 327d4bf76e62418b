"""An adapter folder to the Hugging Face Hub, with the model card that its files make."""

from __future__ import annotations

from pathlib import Path

from veneer.adapter import hub
from veneer.adapter.card import Adapter
from veneer.config.run import HubNameSettings
from veneer.errors import HubError
from veneer.evaluate.model_card import write_model_card


def name_of(folder: str | Path, settings: HubNameSettings) -> str:
    """owner/name on the Hub; asks who is logged in. Raises HubError."""
    return hub.destination(settings.hub_model_id or Path(folder).resolve().name)


def publish(folder: str | Path, settings: HubNameSettings) -> str:
    """Uploads the folder's adapter; returns its address. Raises AdapterError, HubError."""
    Adapter.load(folder)  # a folder that is none, or broken, is told before the Hub is asked
    try:
        name = name_of(folder, settings)
        card = write_model_card(folder, name)
        return hub.upload(folder, card.read_text(encoding="utf-8"), name, settings.hub_private_repo)
    except HubError as error:
        named = f" --hub-model-id {settings.hub_model_id}" if settings.hub_model_id else ""
        private = " --hub-private-repo" if settings.hub_private_repo else ""
        raise HubError(
            f"{error}\nThe adapter is whole in {folder}. Later: veneer push {folder}{named}{private}"
        ) from error
