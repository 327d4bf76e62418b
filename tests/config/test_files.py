"""YAML files of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.config import RunConfig, dump_yaml, read_yaml, write_yaml
from veneer.errors import ConfigError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = SCALARS | st.lists(SCALARS) | st.dictionaries(st.text(), SCALARS)


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "number"), [("1e-5", 1e-5), ("2E4", 2e4), ("-3e+2", -300.0), ("1.e-3", 1e-3), ("5e-04", 5e-4)]
)
def test_numbers_without_a_point_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    found = read(tmp_path, f"learning_rate: {text}")["learning_rate"]
    assert isinstance(found, float)
    assert found == number


@pytest.mark.parametrize("text", ["1e5x", "e5", "0x1e", "version-1e5"])
def test_words_that_look_like_numbers_stay_words(tmp_path: Path, text: str) -> None:
    assert not isinstance(read(tmp_path, f"a: {text}")["a"], float)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), VALUES))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    write_yaml(path, options)
    assert read_yaml(path) == options


@pytest.mark.parametrize("text", ["1e5", "2E-4", "true", "12", "null", "a\x85b", "\u00e9\u4e2d", "- x", "a: b", "#"])
def test_text_stays_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, dump_yaml({"a": text})) == {"a": text}


def test_a_whole_run_is_written_and_read(tmp_path: Path) -> None:
    config = RunConfig.from_flat(
        {
            "base_model": "m",
            "dataset": "d",
            "output_dir": "o",
            "lr": 1e-5,
            "target_modules": "q,v",
            "rank_pattern": "q=4",
        }
    )
    assert RunConfig.from_flat(read(tmp_path, dump_yaml(config.to_flat()))) == config


def test_an_empty_file_has_no_options(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing yet\n") == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("r: [8", "line 1"),
        ("- r\n- 8", "holds a list"),
        ("hello", "holds a str"),
        ("r: 8\nr: 16", "r stands twice"),
        ("r: !!python/object/apply:os.getcwd []", "python/object"),
    ],
)
def test_files_that_hold_no_options(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: No such file"):
        read_yaml(tmp_path / "nope.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
