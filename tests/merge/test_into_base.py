"""An adapter in its base: plain transformers speaks as base and adapter did, and the report says what rounding cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.bases.dense import Dense
from veneer.errors import ConfigError, NotMergeable, WrongBaseError
from veneer.merge import into_base
from veneer.merge.agreement import sample_prompts
from veneer.merge.into_base import MergeReport, merge_into_base
from veneer.merge.rounding import kept, rounding, store_of
from veneer.methods.lora import LoRA
from veneer.model.load import load
from veneer.model.swap import base_at

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def merged(base: Path, adapter_folder: Path, tmp_path: Path) -> Any:
    """merged(dtype): the report of a merge into tmp_path/merged-dtype."""

    def merge(dtype: str = "float32") -> MergeReport:
        return merge_into_base(str(adapter_folder), str(base), str(tmp_path / f"merged-{dtype}"), dtype)

    return merge


@torch.no_grad()
def _adapted_logits(base: Path, adapter_folder: Path) -> torch.Tensor:
    model = attach(load(str(base), "float32").model, Adapter.load(adapter_folder))
    return model(input_ids=IDS).logits


@torch.no_grad()
def _plain_logits(folder: str | Path, dtype: str = "float32") -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))(input_ids=IDS).logits.float()


def _dense(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_plain_transformers_gives_the_same_logits(base: Path, adapter_folder: Path, merged: Any) -> None:
    report = merged()
    wanted = _adapted_logits(base, adapter_folder)
    # x (W + B A)' against x W' + (x A') B': float32 in another order
    torch.testing.assert_close(_plain_logits(report.output), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - _plain_logits(base)).abs().max() > 1e-2, "the adapter does next to nothing: this tests nothing"
    assert report.logits_difference < 1e-5
    assert report.notes == ()
    modes = {file.name: file.stat().st_mode for file in Path(report.output).iterdir()}
    assert set(modes.values()) == {modes["config.json"]}  # whoever may read the folder may read its weights


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.1), ("float16", 0.02)])  # 8 and 11 bits
def test_half_precision_differs_by_what_the_report_says(
    base: Path, adapter_folder: Path, merged: Any, dtype: str, share: float
) -> None:
    report = merged(dtype)
    ids = torch.tensor([[(11 * i * i + 5) % load(str(base)).model.config.vocab_size for i in range(32)]])
    model = attach(load(str(base), "float32").model, Adapter.load(adapter_folder))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        half = AutoModelForCausalLM.from_pretrained(report.output, dtype=getattr(torch, dtype))
        got = half(input_ids=ids).logits.float()
    assert report.logits_difference == pytest.approx((got - wanted).abs().max().item(), rel=1e-5)
    assert report.logits_scale == pytest.approx(wanted.abs().max().item(), rel=1e-5)
    assert 0 < report.logits_difference < share * report.logits_scale
    assert AutoConfig.from_pretrained(report.output).dtype == getattr(torch, dtype)
    assert report.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_figures_are_those_of_dense_matrices(base: Path, adapter_folder: Path, merged: Any, dtype: str) -> None:
    report, adapter = merged(dtype), Adapter.load(adapter_folder)
    before, after = _dense(base), _dense(report.output)
    updates, errors = {}, {}
    for module in adapter.modules():
        a_RI, b_OR = (factor.double() for factor in adapter.factors(module))
        update, weight = b_OR @ a_RI, f"{module}.weight"
        updates[module] = torch.linalg.norm(update).item()
        errors[module] = torch.linalg.norm(after[weight].double() - (before[weight].double() + update)).item()
    norm = sum(value**2 for value in updates.values()) ** 0.5
    assert report.layers == len(updates) == 14
    assert report.update_norm == pytest.approx(norm, rel=1e-5)
    # The report compares with the sum in float32, this with that in float64; in float32 both are that rounding alone.
    slack = 5e-6 if dtype == "float32" else 1e-4
    assert report.rounding_error == pytest.approx(sum(e**2 for e in errors.values()) ** 0.5 / norm, rel=1e-3, abs=slack)
    relative = {module: errors[module] / updates[module] for module in updates}
    assert report.worst_rounding_error == pytest.approx(max(relative.values()), rel=1e-2, abs=slack)
    if dtype != "float32":
        assert report.worst_layer == max(relative, key=relative.__getitem__)
        assert report.rounding_error > {"bfloat16": 1e-3, "float16": 1e-4}[dtype]


def test_an_update_that_rounding_would_lose_is_noted(base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(adapter_folder)
    faint = {name: value * (1e-2 if name.endswith(".b") else 1.0) for name, value in adapter.tensors.items()}
    Adapter(faint, adapter.card).save(tmp_path / "faint")
    report = merge_into_base(str(tmp_path / "faint"), str(base), str(tmp_path / "out"), "bfloat16")
    assert report.rounding_error > 0.5
    (note,) = report.notes
    assert "float32" in note
    assert f"{report.rounding_error:.0%}" in note


def test_what_is_kept_of_an_update(base: Path, adapter_folder: Path, merged: Any) -> None:
    """The projection of (stored - base) on the update, computed from dense matrices."""
    report, adapter = merged("bfloat16"), Adapter.load(adapter_folder)
    before, after = _dense(base), _dense(report.output)
    shares, along, norm = [], 0.0, 0.0
    for module in adapter.modules():
        a_RI, b_OR = (factor.double() for factor in adapter.factors(module))
        update = b_OR @ a_RI
        stored = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        shares.append(((stored * update).sum() / (update * update).sum()).item())
        along, norm = along + (stored * update).sum().item(), norm + (update * update).sum().item()
    assert report.kept == pytest.approx(along / norm, abs=1e-6) and 0.9 < report.kept < 1.1
    assert report.worst_kept == pytest.approx(min(shares), abs=1e-6)


def test_the_merged_model_is_compared_on_prompts(base: Path, adapter_folder: Path, merged: Any) -> None:
    exact, half = merged(), merged("bfloat16")
    assert exact.kl < 1e-9 and exact.same_choice == 1 and exact.positions > 100
    assert exact.kl < half.kl <= half.worst_kl < 0.1
    loaded = load(str(base), "float32")
    other = attach(loaded.model, Adapter.load(adapter_folder))
    plain = AutoModelForCausalLM.from_pretrained(half.output, dtype=torch.bfloat16)
    with torch.no_grad():
        pairs = [
            [model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (other, plain)]
            for ids in sample_prompts(loaded.tokenizer)
        ]
    kl = torch.cat([(one.exp() * (one - two)).sum(-1) for one, two in pairs])
    assert half.kl == pytest.approx(kl.mean().item(), rel=1e-3) and half.positions == len(kl)


@pytest.mark.parametrize("storage", ["nf4", "nf4-dq"])
def test_four_bits_are_refused_with_what_they_keep_and_written_by_force(
    base: Path, adapter_folder: Path, tmp_path: Path, storage: str
) -> None:
    words = (str(adapter_folder), str(base), str(tmp_path / "out"), "float32", "transformers", storage)
    with pytest.raises(NotMergeable, match=r"in nf4.*% of the update would be kept.*leave --load-in-4bit out.*--force"):
        merge_into_base(*words)
    assert not (tmp_path / "out").exists()
    report = merge_into_base(*words, force=True)
    assert report.rounding_error > 0.3 and report.kl > 1e-6 and "% of the update is kept" in report.notes[0]
    packed = load(str(tmp_path / "out"), "float32")
    assert packed.storage.startswith("nf4") and sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]
    # what the report says is what lies there
    adapter, before, along, norm = Adapter.load(adapter_folder), _dense(base), 0.0, 0.0
    for module in adapter.modules():
        a_RI, b_OR = adapter.factors(module)
        stored = base_at(packed.model, module).dense() - before[f"{module}.weight"]
        along, norm = along + (stored * (b_OR @ a_RI)).sum().item(), norm + (b_OR @ a_RI).square().sum().item()
    assert report.kept == pytest.approx(along / norm, abs=1e-3)


def test_a_faint_update_is_lost_in_four_bits() -> None:
    """What the literature measures: about 1.5 % of an update of 1 % of the weight survives in NF4."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(256, 256, generator=generator)
    a, b = (torch.randn(16, 256, generator=generator), torch.randn(256, 16, generator=generator))
    # from NF4's own values, as the base of a QLoRA is
    from veneer.bases.nf4 import NF4

    values = NF4.from_weight(weight)
    method = LoRA(a, b * (0.01 * values.dense().norm() / (b @ a).norm()), 1.0)
    dense = Dense.from_weight(values.dense(), None)
    lost = rounding(method, dense, store_of(dense, torch.float32, "nf4"))
    assert abs(kept(lost)) < 0.1 and lost.relative > 0.9
    assert kept(rounding(method, dense, store_of(dense, torch.bfloat16, "dense"))) == pytest.approx(1, abs=0.02)


def test_auto_keeps_the_dtype_of_the_checkpoint(base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base).save_pretrained(half)
    from veneer.adapter.take import take
    from veneer.config import LoraSettings

    model = attach(load(str(half), "float32").model, LoraSettings(r=2))
    take(model).save(tmp_path / "on-half")
    report = merge_into_base(str(tmp_path / "on-half"), str(half), str(tmp_path / "out"))
    assert report.dtype == "bfloat16"
    assert report.update_norm == 0.0
    assert (report.rounding_error, report.worst_rounding_error) == (0.0, 0.0)  # a new adapter changes nothing


def test_what_lies_in_the_folder(base: Path, merged: Any) -> None:
    report = merged()
    folder, before = Path(report.output), AutoTokenizer.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Write 42")["input_ids"] == before("Write 42")["input_ids"]
    assert tokenizer.chat_template == before.chat_template
    assert _dense(folder).keys() == _dense(base).keys()
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert json.loads(json.dumps(report.to_json()))["layers"] == 14
    assert load(str(folder)).storage  # and veneer loads it as a base of its own
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter", folder.name]


def test_a_merged_base_refuses_the_adapter_a_second_time(base: Path, adapter_folder: Path, merged: Any) -> None:
    again = load(merged().output)
    with pytest.raises(WrongBaseError, match="weights"):
        attach(again.model, Adapter.load(adapter_folder))


def test_neither_base_nor_adapter_is_touched(base: Path, adapter_folder: Path, merged: Any) -> None:
    before = {file: file.read_bytes() for folder in (base, adapter_folder) for file in folder.iterdir()}
    merged("bfloat16")
    assert {file: file.read_bytes() for folder in (base, adapter_folder) for file in folder.iterdir()} == before


def test_an_output_with_something_in_it_is_refused(base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    for output in (full, file):
        with pytest.raises(ConfigError, match="not an empty folder"):
            merge_into_base(str(adapter_folder), str(base), str(output))
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    empty.mkdir()
    merge_into_base(str(adapter_folder), str(base), str(empty))
    assert (empty / "config.json").exists()


def test_another_base_is_refused_before_anything_is_written(base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    with pytest.raises(WrongBaseError, match="weights"):
        merge_into_base(str(adapter_folder), str(other), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]


@pytest.mark.parametrize("moment", ["weights", "tokenizer"])
def test_a_failure_while_writing_leaves_nothing(
    base: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def loaded(*given: Any, **named: Any) -> Any:
        found = load(*given, **named)
        holder = found.model if moment == "weights" else found.tokenizer
        whole = holder.save_pretrained

        def half(folder: Path, *rest: Any, **options: Any) -> None:
            whole(folder)
            raise OSError("No space left on device")

        holder.save_pretrained = half
        return found

    monkeypatch.setattr(into_base, "load", loaded)
    with pytest.raises(OSError, match="No space"):
        merge_into_base(str(adapter_folder), str(base), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_a_quantised_base_goes_into_the_dense_weights(
    base: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    """The same bytes as of the adapter trained on the dense base, and a note."""
    adapter = Adapter.load(adapter_folder)
    Adapter(adapter.tensors, dataclasses.replace(adapter.card, storage="nf4-dq bfloat16")).save(tmp_path / "quantised")
    reports = [
        merge_into_base(str(folder), str(base), str(tmp_path / f"merged-{i}"), "float32")
        for i, folder in enumerate([adapter_folder, tmp_path / "quantised"])
    ]
    files = [Path(report.output, "model.safetensors").read_bytes() for report in reports]
    assert files[0] == files[1]
    assert reports[0].notes == () and "nf4-dq bfloat16 and is merged into the dense" in reports[1].notes[0]


def test_a_base_stored_in_four_bits_is_written_dense(base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    """Its weights are then what NF4 stands for, and the update on top of them."""
    packed = load(str(base), "float32", storage="nf4")
    packed.model.save_pretrained(tmp_path / "packed")
    packed.tokenizer.save_pretrained(tmp_path / "packed")
    four = load(str(tmp_path / "packed"), "float32")
    assert four.storage == "nf4 float32"
    adapter = Adapter.load(adapter_folder)
    card = dataclasses.replace(adapter.card, base=four.fingerprint, storage=four.storage)
    Adapter(adapter.tensors, card).save(tmp_path / "adapter4")
    report = merge_into_base(str(tmp_path / "adapter4"), str(tmp_path / "packed"), str(tmp_path / "merged"), "float32")
    with torch.no_grad():
        wanted = attach(four.model, Adapter.load(tmp_path / "adapter4"))(input_ids=IDS).logits
    torch.testing.assert_close(_plain_logits(report.output), wanted, rtol=1e-4, atol=1e-5)
    assert "stored as nf4" in report.notes[0] and report.logits_difference < 1e-5
