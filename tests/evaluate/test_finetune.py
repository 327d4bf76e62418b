"""From settings to an adapter with its report, in one call; uploads go to a stand-in of the Hub."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adapter.test_hub import FakeHub, answered, there  # noqa: F401
from tests.train.conftest import digits, pico_folder  # noqa: F401
from veneer.adapter.card import Adapter
from veneer.config import PushSettings, RunConfig
from veneer.errors import AdapterError, ConfigError, HubError
from veneer.evaluate.finetune import finetune
from veneer.evaluate.publish import publish


def test_options_have_names() -> None:
    with pytest.raises(ConfigError, match=r"got 'smollm2', wanted options by name, base_model="):
        finetune("smollm2")  # type: ignore[arg-type]


@pytest.fixture
def options(pico_folder: Path, digits: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    folder = tmp_path / "skill"
    data = {"dataset": str(digits), "validation_split": 8, "max_length": 128}
    return {**data, "base_model": str(pico_folder), "output_dir": str(folder), "max_steps": 3, "r": 2}


def test_one_call_leaves_a_report_that_a_notebook_shows(options: dict[str, Any], digits: Path) -> None:  # noqa: F811
    run = finetune(**options, progress=False)
    assert run.training.steps == 3
    assert Adapter.load(run.folder).card.training["options"]["r"] == 2
    (page,) = re.findall(r'^<iframe srcdoc="([^"]*)"', run._repr_html_())
    assert html.unescape(page) == (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Loss by training step" in page
    assert "exact match" not in (run.folder / "README.md").read_text()
    result = run.evaluate(str(digits), limit=4, max_new_tokens=2)
    assert result.rows == 4
    assert "exact match" in html.unescape(run._repr_html_())
    assert "| exact match |" in (run.folder / "README.md").read_text()


def test_options_win_over_a_config(options: dict[str, Any]) -> None:
    config = RunConfig.from_flat(options)
    assert finetune(config, lr=1e-3, steps=1, progress=False).config.train.learning_rate == 1e-3


def test_the_adapter_and_its_card_are_uploaded(options: dict[str, Any], there: FakeHub) -> None:  # noqa: F811
    run = finetune(**options, push_to_hub=True, hub_model_id="lab/digits", hub_private_repo=True, progress=False)
    private, files = there.repositories["lab/digits"]
    assert (run.address, private) == ("https://hub.invalid/lab/digits", True)
    assert files["README.md"] == (run.folder / "README.md").read_bytes()
    everything = b"".join(files.values())
    for name in ("base_model", "dataset", "output_dir"):
        assert str(Path(options[name]).parent).encode() not in everything


def test_without_a_login_nothing_is_trained(options: dict[str, Any], there: FakeHub) -> None:  # noqa: F811
    there.fails["whoami"] = answered(401)
    with pytest.raises(HubError, match="hf auth login"):
        finetune(**options, push_to_hub=True, progress=False)
    assert not Path(options["output_dir"]).exists()


def test_a_failed_upload_costs_no_adapter(options: dict[str, Any], there: FakeHub) -> None:  # noqa: F811
    there.fails["upload_folder"] = answered(503)
    with pytest.raises(HubError, match=r"answers 503.*\nThe adapter is whole in .*skill\. Later: veneer push .*skill$"):
        finetune(**options, push_to_hub=True, progress=False)
    config = RunConfig.from_flat({**options, "push_to_hub": True})
    there.fails.clear()
    assert publish(options["output_dir"], config.hub) == "https://hub.invalid/me/skill"


def test_a_folder_that_holds_no_adapter_is_told_first(tmp_path: Path, there: FakeHub) -> None:  # noqa: F811
    with pytest.raises(AdapterError, match="no such folder"):
        publish(tmp_path / "gone", PushSettings(adapter=str(tmp_path / "gone")))
    assert there.calls == []


OPTIONAL = "triton bitsandbytes datasets peft trl accelerate IPython ipywidgets pandas".split()
GUARD = (
    f"""
import socket, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: importing them fails
"""
    + """
def refuse(*given, **named):
    raise AssertionError(f"reached for the network: {given}")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
from veneer.cli.__main__ import main
code = main(sys.argv[1:])
import os, veneer
assert all(getattr(veneer, name) for name in veneer.PUBLIC)
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY and os.environ["DISABLE_SAFETENSORS_CONVERSION"]
sys.exit(code)
"""
)


def test_training_needs_no_network_and_nothing_optional(options: dict[str, Any]) -> None:
    """Online as far as anyone said: nothing in the environment forbids the network."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, "-c", GUARD, "train", *words], env=surroundings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (Path(options["output_dir"]) / "README.md").is_file()
