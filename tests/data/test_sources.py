"""Data sets by name: files, folders that `datasets` saved, the Hub where the name says so; and their columns."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from veneer.data.sources import read_source
from veneer.errors import DataError

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(5)]
CSV = 'id,Question,Answer\n1,q0,a0\n2,"q,1",a1\n'


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package, with its cache in a folder of the test's own and without progress bars."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_and_its_first_rows(tmp_path):
    path = written(tmp_path / "rows.jsonl")
    assert read_source(path).rows == ROWS
    assert read_source(path, limit=2).rows == ROWS[:2]
    assert read_source(path).sha256() == read_source(path, limit=2).sha256()  # of the file: older runs wrote that


def test_what_save_to_disk_leaves_is_read(tmp_path, datasets):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "two")
    assert read_source(str(tmp_path / "one")).rows == ROWS
    assert read_source(str(tmp_path / "two" / "test")).rows == ROWS[:1]
    with pytest.raises(DataError, match=rf"several splits; name one: {tmp_path}/two/train, {tmp_path}/two/test"):
        read_source(str(tmp_path / "two"))


def test_a_folder_of_files_is_read_by_the_library_where_the_name_asks_for_it(tmp_path, datasets):
    folder = tmp_path / "mine"
    folder.mkdir()
    written(folder / "train.jsonl")
    written(folder / "test.jsonl", ROWS[3:])
    assert read_source(f"hub:{folder}:train").rows == ROWS
    assert read_source(f"hub:{folder}:train[:2]").rows == ROWS[:2]
    assert read_source(f"hub:{folder}:test").sha256() != read_source(f"hub:{folder}:train").sha256()
    with pytest.raises(DataError, match=rf"several splits; name one: hub:{folder}:train, hub:{folder}:test"):
        read_source(f"hub:{folder}")
    with pytest.raises(DataError, match=r"cannot be loaded: .*dev.* Wanted: hub:ORG/NAME"):
        read_source(f"hub:{folder}:dev")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hub:org/name", ("org/name", None, None)),
        ("hub:org/name:train", ("org/name", None, "train")),
        ("hub:org/name:main:test", ("org/name", "main", "test")),
        ("hub:org/name:train[:100]", ("org/name", None, "train[:100]")),
        ("hub:name:main:train[10%:20%]", ("name", "main", "train[10%:20%]")),
    ],
)
def test_how_a_data_set_of_the_hub_is_spelt(monkeypatch, datasets, name, asked):
    calls = []

    def load_dataset(repository: str, config: str | None, split: str | None) -> Any:
        calls.append((repository, config, split))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_source(name).rows == ROWS
    assert calls == [asked]


def test_what_the_hub_answers_is_told(monkeypatch, datasets):
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/nmae' doesn't exist on the Hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^hub:org/nmae cannot be loaded: Dataset 'org/nmae' doesn't exist on"):
        read_source("hub:org/nmae")
    with pytest.raises(DataError, match="is no name of a data set"):
        read_source("hub:")


@pytest.mark.parametrize("name", ["org/name", "name", "org/data-set.v2"])
def test_a_path_that_does_not_exist_asks_no_network(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", _without_datasets)
    with pytest.raises(DataError, match=rf"{name} does not exist\. A data set of the .* is written hub:{name}\."):
        read_source(name)
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist"):
        read_source("org/trian.jsonl")


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(builtins, "__import__", _without_datasets)
    with pytest.raises(DataError, match="next: pip install datasets"):
        read_source("hub:org/name")


IMPORT = builtins.__import__


def _without_datasets(name: str, *given: Any, **named: Any) -> Any:
    if name == "datasets":
        raise ImportError(name)
    return IMPORT(name, *given, **named)


def test_fields_that_arrow_made_up_are_gone(datasets, tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    datasets.Dataset.from_list([{"messages": messages, "note": None}]).save_to_disk(tmp_path / "one")
    assert read_source(str(tmp_path / "one")).rows == [{"messages": messages, "note": None}]


def test_columns_by_their_owners_names(tmp_path):
    (tmp_path / "odd.csv").write_text(CSV)
    found = read_source(str(tmp_path / "odd.csv"), {"prompt": "Question", "completion": "Answer"}).rows
    assert found == [{"id": "1", "prompt": "q0", "completion": "a0"}, {"id": "2", "prompt": "q,1", "completion": "a1"}]
    assert read_source(str(tmp_path / "odd.csv"), {"text": "Answer"}).rows == [{"text": "a0"}, {"text": "a1"}]


def test_messages_in_the_cells_of_a_table(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = written(tmp_path / "rows.jsonl", [{"talk": json.dumps(messages)}])
    assert read_source(path, {"messages": "talk"}).rows == [{"messages": messages}]


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path):
    (tmp_path / "odd.csv").write_text(CSV)
    with pytest.raises(DataError) as caught:
        read_source(str(tmp_path / "odd.csv"), {"prompt": "Questoin", "completion": "Answer"})
    told = str(caught.value)
    assert "odd.csv has no column 'Questoin'. Did you mean 'Question'?" in told
    assert told.endswith("Its columns are 'id', 'Question', 'Answer'.")
