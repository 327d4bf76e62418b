"""Folders in, one plain value out: with a base, without a card, of many, and of what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapter.conftest import adapter_for, pico  # noqa: F401
from tests.measure.making import LAYERS, made, random
from veneer.adapter.attach import attach, methods_of
from veneer.adapter.card import CARD, Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.errors import AdapterError, WrongBaseError
from veneer.measure.inspection import EXTREMES, inspect
from veneer.model.swap import base_at


@pytest.fixture
def skill(pico: Any, tmp_path: Path) -> tuple[str, Any]:  # noqa: F811
    """A folder with a trained-looking adapter, and a fresh copy of its base."""
    model = attach(pico(), LoraSettings(r=3), seed=0)
    generator = torch.Generator().manual_seed(1)
    taken = take(model, base_name="pico")
    tensors = {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in taken.tensors.items()}
    return str(Adapter(tensors, taken.card).save(tmp_path / "skill")), pico()


def test_on_its_base(skill: tuple[str, Any]) -> None:
    folder, model = skill
    dense = {path: module.weight.detach().clone() for path, module in model.named_modules() if "proj" in path}
    [one] = inspect([folder], model, progress=False).adapters
    assert one.base is not None
    adapter = Adapter.load(folder)
    assert one.base.ratios.keys() == one.base.intruders.keys() == one.updates.keys()
    for path, ratio in one.base.ratios.items():
        a_RI, b_OR = adapter.factors(path)
        weight_OI = dense[path].double()
        delta_OI = b_OR.double() @ a_RI.double()
        assert ratio == pytest.approx(float(delta_OI.norm() / weight_OI.norm()), rel=1e-4)
        u = torch.linalg.svd(weight_OI, full_matrices=False)[0]
        y = torch.linalg.svd(weight_OI + delta_OI, full_matrices=False)[0][:, :10]
        assert one.base.intruders[path] == int(((u.mT @ y).abs().amax(0) < 0.5).sum())
    assert not any(hasattr(module, "slots") and len(module.slots) for module in model.modules())  # as it was


def test_dora_is_measured_on_its_base(pico: Any, tmp_path: Path) -> None:  # noqa: F811
    model = attach(pico(), LoraSettings(r=2, method="dora"), seed=0)
    path, method = next(iter(methods_of(model, "default").items()))
    wanted = method.update_norm(base_at(model, path)) / float(base_at(model, path).dense().norm())
    folder = str(take(model).save(tmp_path / "dora"))
    found = inspect([folder], pico(), target="vllm", progress=False)
    [one] = found.adapters
    assert one.base is not None
    assert one.base.ratios[path] == pytest.approx(wanted, abs=1e-6)
    assert not found.loads
    assert "measured is B·A" in " ".join(found.notes)


def test_another_base_is_refused(skill: tuple[str, Any], pico: Any) -> None:  # noqa: F811
    with pytest.raises(WrongBaseError, match="does not belong"):
        inspect([skill[0]], pico(hidden=48), progress=False)


def test_the_card(skill: tuple[str, Any]) -> None:
    folder, _ = skill
    [one] = inspect([folder]).adapters
    assert one.card()["verified"] is True
    assert one.card()["identity"] == Adapter.load(folder).identity
    assert one.card()["base_name"] == "pico"
    (Path(folder) / CARD).unlink()
    [bare] = inspect([folder]).adapters  # as PEFT writes it
    assert bare.card()["verified"] is False
    assert bare.whole == one.whole


def test_a_changed_file_is_refused(skill: tuple[str, Any]) -> None:
    other = random(0).save(Path(skill[0]).parent / "other")
    (Path(skill[0]) / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match="cannot be loaded"):
        inspect([skill[0]])


def test_layers_of_other_shapes_cannot_be_compared(tmp_path: Path) -> None:
    module = next(iter(LAYERS))
    first = str(random(0).save(tmp_path / "a"))
    second = str(made({module: (torch.ones(1, 5), torch.ones(14, 1))}).save(tmp_path / "b"))
    with pytest.raises(AdapterError, match=r"q_proj \[14, 10\] and \[14, 5\]"):
        inspect([first, second])


def test_other_bases_are_told(skill: tuple[str, Any], pico: Any, tmp_path: Path) -> None:  # noqa: F811
    model = attach(pico(rope_theta=500.0), LoraSettings(r=3), seed=0)
    other = str(take(model).save(tmp_path / "other"))
    found = inspect([skill[0], other])
    assert "cannot be merged" in " ".join(found.notes)
    assert found.pairs[0].layers == 14


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    folders = [str(random(seed).save(tmp_path / place / "skill")) for seed, place in enumerate("ab")]
    assert [one.name for one in inspect(folders).adapters] == folders


def test_of_many_the_extreme_pairs_are_told(tmp_path: Path) -> None:
    adapters = [random(seed) for seed in range(10)]
    adapters.append(
        Adapter({n: 2 * t if n.endswith(".b") else t for n, t in adapters[3].tensors.items()}, adapters[3].card)
    )
    adapters.append(
        Adapter({n: -t if n.endswith(".b") else t for n, t in adapters[5].tensors.items()}, adapters[5].card)
    )
    found = inspect([str(one.save(tmp_path / f"s{n}")) for n, one in enumerate(adapters)])
    told = found.to_json()
    json.dumps(told)
    assert {kind: len(those) for kind, those in told["pairs"].items()} == dict.fromkeys(
        ("closest", "conflicting", "interfering"), EXTREMES
    )
    assert (told["pairs"]["closest"][0]["first"], told["pairs"]["closest"][0]["second"]) == ("s3", "s10")
    assert (told["pairs"]["conflicting"][0]["first"], told["pairs"]["conflicting"][0]["second"]) == ("s5", "s11")
    assert len(told["together"]["alignment"]) == 12


def test_the_rank_is_that_of_the_largest(tmp_path: Path) -> None:
    folders = [str(random(rank, rank).save(tmp_path / f"r{rank}")) for rank in (2, 5)]
    assert inspect(folders).rank == 5
    assert inspect(folders, rank=3).rank == 3
