"""Adapters on each other's data: the losses are those of an evaluation, the sums those of a merged adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest
import torch

from tests.adapter.conftest import adapter_for  # noqa: F401
from tests.evaluate.pico_reader import pico_reader
from veneer.adapter.attach import attach, detach
from veneer.adapter.card import Adapter
from veneer.errors import AdapterError, DataError
from veneer.evaluate.inspection_page import write_inspection
from veneer.evaluate.on_data import OnFile, on_data, read_files
from veneer.evaluate.run import evaluate
from veneer.measure.inspection import inspect
from veneer.model.packed import wiring_of

NAMES = ["one", "two", "three"]
ROWS = [[{"prompt": f"{n} + {k}", "completion": str(n + k)} for n in range(8)] for k in (1, 2, 3)]


@pytest.fixture
def loaded() -> Any:
    return pico_reader()


@pytest.fixture
def adapters(loaded: Any, adapter_for: Any) -> list[Adapter]:  # noqa: F811
    return [adapter_for(loaded.model, 2 + seed, seed) for seed in range(3)]


def measured(loaded: Any, adapters: list[Adapter], rows: Any = ROWS) -> tuple[OnFile, ...]:
    names = NAMES[: len(adapters)]
    return on_data(loaded, adapters, names, [f"{name}.jsonl" for name in names], rows[: len(adapters)])


def test_losses_and_changes_are_those_of_an_evaluation(loaded: Any, adapters: list[Adapter]) -> None:
    found = measured(loaded, adapters)
    assert wiring_of(loaded.model).slots == []  # as it was
    for i, one in enumerate(adapters):
        attach(loaded.model, one, f"s{i}")
    for own, one in enumerate(found):
        slots = {"base": None, **{f"s{i}": f"s{i}" for i in range(3)}}
        wanted = evaluate(loaded, ROWS[own], slots=slots, metrics=("loss",))
        losses, changes = wanted.metrics["loss"], wanted.differences["loss"]
        assert (one.adapter, one.rows, one.base) == (own, 8, losses["base"])
        assert (one.loss, one.change) == (losses[f"s{own}"], changes[f"s{own}"])
        assert [each.other for each in one.beside] == [i for i in range(3) if i != own]
        for each in one.beside:
            assert (each.loss, each.change) == (losses[f"s{each.other}"], changes[f"s{each.other}"])
            assert each.change.low is not None
            gain = one.base.score - one.loss.score
            sure = one.change.high is not None and one.change.high < 0
            kept = (one.base.score - each.halved.score) / gain if sure else None
            assert each.kept == (kept if kept is None else pytest.approx(kept))


def test_sums_are_those_of_a_merged_adapter(loaded: Any, adapters: list[Adapter]) -> None:
    first, second = adapters[:2]
    [one, _] = measured(loaded, [first, second])
    [beside] = one.beside
    attach(loaded.model, first, "own")
    for weight, loss, change in (
        (1.0, beside.summed, beside.summed_change),
        (0.5, beside.halved, beside.halved_change),
    ):
        attach(loaded.model, concatenated(first, second, weight), "merged")
        slots = {"own": "own", "merged": "merged"}
        wanted = evaluate(loaded, ROWS[0], slots=slots, metrics=("loss",))
        detach(loaded.model, "merged")
        assert loss.score == pytest.approx(wanted.metrics["loss"]["merged"].score, rel=1e-5)
        for part in ("score", "low", "high"):
            told, right = getattr(change, part), getattr(wanted.differences["loss"]["merged"], part)
            assert told == pytest.approx(right, abs=1e-5), part
    assert beside.summed.score != pytest.approx(beside.halved.score, rel=1e-3)


def concatenated(first: Adapter, second: Adapter, weight: float) -> Adapter:
    tensors = {}
    for module in first.modules():
        (a, b), (c, d) = first.factors(module), second.factors(module)
        tensors |= {f"{module}.a": torch.cat([a, c]), f"{module}.b": weight * torch.cat([b, d], dim=1)}
    ranks = {module: len(tensors[f"{module}.a"]) for module in first.modules()}
    return Adapter(tensors, replace(first.card, ranks=ranks))


def test_rows_are_read_as_their_own_adapter_was_trained(loaded: Any, adapters: list[Adapter]) -> None:
    plain, _ = measured(loaded, adapters[:2])
    strict = Adapter(adapters[0].tensors, replace(adapters[0].card, training={"options": {"system_prompt": "Add."}}))
    assert strict.card.system_prompt == "Add."
    told, other = measured(loaded, [strict, adapters[1]])
    assert told.base != plain.base
    assert other.base.score == pytest.approx(measured(loaded, adapters[:2])[1].base.score)


def test_a_fault_in_the_last_file_is_found_before_anything_is_measured(loaded: Any, adapters: list[Adapter]) -> None:
    with pytest.raises(DataError, match=r"two\.jsonl"):
        measured(loaded, adapters[:2], [ROWS[0], [{"prompt": "1 + 1"}]])
    assert wiring_of(loaded.model).slots == []


def test_added_tokens_are_refused(loaded: Any, adapters: list[Adapter], monkeypatch: Any) -> None:
    monkeypatch.setitem(wiring_of(loaded.model).extended, "on_data_1", "a tokenizer of its own")
    with pytest.raises(AdapterError, match="two: adapters with added tokens"):
        measured(loaded, adapters[:2])
    assert wiring_of(loaded.model).slots == []


def test_files_that_cannot_be_used_are_all_told(tmp_path: Path) -> None:
    good, pairs = tmp_path / "good.jsonl", tmp_path / "pairs.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS[0]), encoding="utf-8")
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n", encoding="utf-8")
    assert [len(rows) for rows in read_files([str(good)] * 2, None, 3)] == [3, 3]
    with pytest.raises(DataError, match=r"(?s)nowhere\.jsonl.*preference pairs"):
        read_files([str(tmp_path / "nowhere.jsonl"), str(good), str(pairs)], None, None)


def test_the_page_and_the_json(loaded: Any, adapters: list[Adapter], tmp_path: Path) -> None:
    data = measured(loaded, adapters)
    json.dumps([one.to_json(NAMES) for one in data], allow_nan=False)
    assert [each["other"] for each in data[1].to_json(NAMES)["beside"]] == ["one", "three"]
    found = inspect([str(one.save(tmp_path / name)) for name, one in zip(NAMES, adapters, strict=True)])
    for page in ("page.html", "again.html"):
        write_inspection(tmp_path / page, found, data)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "again.html").read_text(encoding="utf-8")
    assert f"one, two: {data[0].beside[0].change.score:.2f}".replace("-", "−") in page
    assert f"two, two: {data[1].change.score:.2f}".replace("-", "−") in page
    for drawing in [part.partition("</svg>")[0] + "</svg>" for part in page.split("<figure>")[1:]]:
        minidom.parseString(drawing[drawing.index("<svg") :].replace("xlink:", "").encode())
