"""Adapters become plain LoRA of scale 1, at a lower rank where one is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.merge.test_combine import adapter, update
from veneer.adapter.card import Adapter, Card
from veneer.cli.__main__ import main
from veneer.config import ConvertSettings
from veneer.errors import ConfigError, NotMergeable
from veneer.merge.convert import converted


def test_rslora_of_somebody_else_becomes_scale_one(tmp_path: Path) -> None:
    folder, module = tmp_path / "in", "model.layers.0.q_proj"
    folder.mkdir()
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    keys = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(keys))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "peft"]) == 0
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4, False)
    stored = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    got = stored[f"base_model.model.{module}.lora_B.weight"] @ stored[f"base_model.model.{module}.lora_A.weight"]
    torch.testing.assert_close(got, 8 / 4**0.5 * (b @ a))
    assert Adapter.load(tmp_path / "out").identity == Adapter.load(folder).identity


@pytest.mark.parametrize(("rank", "energy"), [(2, None), (None, 0.8), (3, 0.99), (99, None)])
def test_the_cut_is_the_best_one_and_its_report_that_of_dense_matrices(rank: int | None, energy: float | None) -> None:
    given = adapter(0, rank=6)
    found, report = converted(given, rank, energy)
    lost = whole = 0.0
    for module in given.modules():
        dense = update(given, module)
        share = torch.linalg.svdvals(dense).square().cumsum(0) / dense.square().sum()
        wanted = min(rank or 6, 6 if energy is None else 1 + int((share < energy).sum()), 6)
        assert len(found.factors(module)[0]) == found.card.ranks[module] == report.layers[module].rank == wanted
        error = float((dense - update(found, module)).norm())
        assert error == pytest.approx(float((1 - share[wanted - 1]).clamp(min=0).sqrt() * dense.norm()), abs=1e-4)
        assert report.layers[module].error == pytest.approx(error, abs=1e-4)
        lost, whole = lost + error**2, whole + float(dense.square().sum())
    assert report.kept == pytest.approx(1 - lost / whole, abs=1e-6)
    assert report.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5)


def test_the_card_says_what_was_cut_and_of_which_adapter() -> None:
    training = {"options": {"system_prompt": "Be brief."}, "steps": 3}
    given = adapter(0, rank=6, training=training, base_name="org/base")
    found, report = converted(given, rank=2)
    assert found.card.parents == (given.identity,) == (report.parent,) and report.identity == found.identity
    assert found.card.training == {**training, "convert": {"rank": 2, "energy": None}}
    assert (found.card.base, found.card.base_name, found.card.scales) == (
        given.card.base,
        "org/base",
        given.card.scales,
    )
    assert report.parameters * 3 == report.parameters_before
    same, report = converted(given)
    assert same is given and report.kept == 1 and report.parameters == report.parameters_before


def test_rows_of_tokens_stay() -> None:
    base = adapter(0, rank=4)
    settings = {"trainable_token_indices": {"model.embed_tokens": [3, 5]}}
    card = replace(base.card, settings=settings)
    given = Adapter({**base.tensors, "model.embed_tokens.rows": torch.randn(2, 16)}, card)
    found, _ = converted(given, rank=2)
    ids, rows = found.rows()["model.embed_tokens"]
    assert ids == [3, 5] and torch.equal(rows, given.tensors["model.embed_tokens.rows"])
    assert set(found.card.ranks.values()) == {2}


def test_experts_keep_one_rank_a_layer(tmp_path: Path) -> None:
    """Of the first expert one direction holds nearly all, so that it would need one rank and the other four."""
    draw = torch.Generator().manual_seed(0)
    tensors, path = {}, "model.layers.0.mlp.experts.down_proj"
    for number, weak in enumerate((1e-3, 1.0)):
        a, b = torch.randn(4, 16, generator=draw), torch.randn(12, 4, generator=draw)
        a[1:] *= weak
        tensors |= {f"{path}.{number}.a": a, f"{path}.{number}.b": b}
    ranks = {f"{path}.{number}": 4 for number in range(2)}
    given = Adapter(tensors, Card("lora", {}, dict.fromkeys(ranks, 1.0), ranks))
    found, report = converted(given, energy=0.95)
    assert found.card.ranks == dict.fromkeys(ranks, found.card.ranks[f"{path}.1"])
    assert Adapter.load(found.save(tmp_path / "out")).identity == found.identity
    for module in ranks:
        lost = float((update(given, module) - update(found, module)).norm() / update(given, module).norm()) ** 2
        assert lost == pytest.approx(1 - report.layers[module].kept, abs=1e-6) and lost < 0.05
    assert "base unverified" in report.notes[0]


def test_what_is_more_than_plain_lora_is_refused_with_the_way_out() -> None:
    for rank in (None, 2):
        with pytest.raises(NotMergeable, match=r"the adapter is dora.*--into-base.*--extract"):
            converted(adapter(0, method="dora"), rank=rank)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"output": "o"}, "nothing to convert"),
        ({"adapter": "a", "output": "o", "base_model": "b", "force": True}, "base_model and force: for extract only"),
        ({"adapter": "a", "output": "o", "to": "gptq"}, "to: got gptq, wanted 'peft' or 'gguf'"),
        ({"adapter": "a", "output": "o", "to": "gguf", "force": True}, "force: for extract only"),
        ({"extract": "t", "output": "o", "base_model": "b", "rank": 2, "to": "gguf"}, "extract writes a PEFT folder"),
        ({"adapter": "a", "output": "o", "rank": 0}, "rank: got 0"),
        ({"adapter": "a", "output": "o", "energy": 1.5}, "energy: got 1.5"),
        ({"adapter": "a", "extract": "t", "output": "o", "base_model": "b", "rank": 2}, "either an adapter"),
        ({"extract": "t", "output": "o", "rank": 2}, "extract needs base_model"),
        ({"extract": "t", "output": "o", "base_model": "b"}, "extract needs rank, or energy"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ConvertSettings.from_flat(options)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(0, rank=6).save(tmp_path / "in")
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--rank", "2", "--json"]
    assert main(words) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["kinds"][0]["rank"] == "2" and 0 < report["kept"] < 1 and report["output"] == str(tmp_path / "out")
    assert "up_proj" in told.err and "parameters: " in told.err
    assert main(words) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "other")]) == 2
    assert "no such folder" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["convert", "a", "b", "c"]) == 2
    assert "--output is given twice" in capsys.readouterr().err
