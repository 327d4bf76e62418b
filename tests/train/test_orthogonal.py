"""Training apart from earlier adapters: the term's gradient, the start, what a run with them leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter.attach import attach, methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.cli.__main__ import main
from veneer.config import LoraSettings, RunConfig
from veneer.config.orthogonal import OrthogonalToSettings
from veneer.errors import AdapterError, CheckpointError, ConfigError, WrongBaseError
from veneer.lowrank import directions
from veneer.methods.experts import ExpertLoRA
from veneer.methods.lora import LoRA
from veneer.train import run
from veneer.train.dry_run import dry_run
from veneer.train.earlier import Earlier, orthogonality
from veneer.train.orthogonal import Orthogonality, basis_of, outside, start_outside

Config = Callable[..., RunConfig]
WEIGHTS = "adapter_model.safetensors"


def _bytes(config: RunConfig) -> bytes:
    return Path(config.output_dir, WEIGHTS).read_bytes()


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _read(earlier: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([directions(a_RI, b_OR)[1].mT for a_RI, b_OR in earlier])


@given(
    inside=st.integers(4, 24),
    rank=st.integers(1, 5),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    layers=st.integers(1, 3),
    weight=st.floats(0.01, 100),
    seed=st.integers(0, 999),
)
def test_its_gradient_is_autograds(
    inside: int, rank: int, ranks: list[int], layers: int, weight: float, seed: int
) -> None:
    methods, read, wanted = {}, {}, torch.zeros((), dtype=torch.float64)
    for layer in range(layers):
        a_RI = _random(rank + layer % 2, inside, seed=seed + layer)  # layers of two shapes
        methods[f"l{layer}"] = LoRA(a_RI, _random(3, len(a_RI), seed=1), 2.0)
        old = [(_random(r, inside, seed=seed + 31 * r + k), _random(7, r, seed=k)) for k, r in enumerate(ranks)]
        read[f"l{layer}"] = _read(old)
        leaf = methods[f"l{layer}"].a_RI
        for a_old, b_old in old:  # the paper's sum over earlier adapters, with what each reads from a dense SVD
            _, s, vt = torch.linalg.svd(b_old @ a_old, full_matrices=False)
            wanted = wanted + weight * (vt[s > 1e-9 * s[0]] @ leaf.T).square().sum()
    wanted.backward()
    theirs = {path: method.a_RI.grad.clone() for path, method in methods.items()}
    for method in methods.values():
        method.a_RI.grad = torch.ones_like(method.a_RI)  # it is added to what is there
    term = Orthogonality(methods, read, weight).add_gradients()
    torch.testing.assert_close(term, wanted.detach())
    for path, method in methods.items():
        torch.testing.assert_close(method.a_RI.grad, theirs[path] + 1)
        assert method.b_OR.grad is None


@given(inside=st.integers(4, 24), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_term_is_the_same_however_earlier_factors_are_split(inside: int, rank: int, seed: int) -> None:
    a_RI, b_OR, mix_RR = (_random(*s, seed=seed + k) for k, s in enumerate([(rank, inside), (9, rank), (rank, rank)]))
    mix_RR += 3 * torch.eye(rank, dtype=torch.float64)
    terms = []
    for one in ((a_RI, b_OR), (1000 * mix_RR @ a_RI, b_OR @ torch.linalg.inv(mix_RR) / 1000)):
        method = LoRA(_random(2, inside, seed=5), torch.zeros(9, 2), 1.0)
        method.a_RI.grad = torch.zeros_like(method.a_RI)
        terms.append(Orthogonality({"x": method}, {"x": _read([one])}, 1.0).add_gradients())
    torch.testing.assert_close(*terms)


def test_of_orthonormal_earlier_rows_it_is_the_papers() -> None:
    a_old = torch.linalg.qr(_random(12, 3, seed=1))[0].T
    method = LoRA(_random(4, 12, seed=2), torch.zeros(5, 4), 1.0)
    method.a_RI.grad = torch.zeros_like(method.a_RI)
    term = Orthogonality({"x": method}, {"x": _read([(a_old, _random(5, 3, seed=3))])}, 0.5).add_gradients()
    torch.testing.assert_close(term, 0.5 * (a_old @ method.a_RI.data.T).square().sum())


@given(inside=st.integers(6, 32), read=st.integers(1, 5), rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_start_outside_is_orthogonal_and_as_long_as_it_was(inside: int, read: int, rank: int, seed: int) -> None:
    read_KI = torch.cat([_random(read, inside, seed=seed)] * 2)  # the same space twice
    a_RI = _random(rank, inside, seed=seed + 1).float()
    found = outside(a_RI, basis_of(read_KI))
    assert found.dtype == torch.float32
    assert (found.double() @ read_KI.T).abs().max() < 1e-6 * a_RI.norm() * read_KI.norm()
    torch.testing.assert_close(found.norm(dim=1), a_RI.norm(dim=1))


def test_experts_that_read_less_than_others_are_told_apart() -> None:
    a_ERI = torch.stack([_random(2, 8, seed=1), _random(2, 8, seed=2)])
    read_EKI = torch.stack([torch.eye(8, dtype=torch.float64)[:3], torch.eye(8, dtype=torch.float64)[:3]])
    read_EKI[1, 1:] = 0  # the second expert reads one direction
    method = ExpertLoRA(a_ERI, torch.zeros(2, 4, 2), 1.0)
    method.a_RI.grad = torch.zeros_like(method.a_RI)
    made = Orthogonality({"x": method}, {"x": read_EKI}, 1.0)
    term = made.add_gradients()
    torch.testing.assert_close(term, a_ERI[0, :, :3].square().sum() + a_ERI[1, :, :1].square().sum())
    assert torch.equal(method.a_RI.grad[1, :, 1:], torch.zeros(2, 7, dtype=torch.float64))
    assert made.chance == pytest.approx(2 / 8)
    start_outside(method, [made.bases["x"]])
    assert made.share() < 1e-12


# --- a job ------------------------------------------------------------------------------------------------------


@pytest.fixture
def apart(pico: Any) -> Callable[..., Orthogonality]:
    """apart(methods, weight, start): to an adapter of pico with random factors, r 4."""
    attach(pico, LoraSettings(r=4), "earlier", seed=9)
    for method in methods_of(pico, "earlier").values():
        method.b_OR.data.normal_(generator=torch.Generator().manual_seed(1))
    adapter = take(pico, "earlier")

    def make(methods: dict, weight: float, start: bool = False) -> Orthogonality:
        settings = OrthogonalToSettings(orthogonal_to=["there"], orthogonal_lambda=weight, orthogonal_start=start)
        made = orthogonality([Earlier("there", adapter)], pico, methods, settings)
        assert made is not None
        return made

    return make


def test_a_large_lambda_leaves_no_overlap(pico: Any, job: Any, examples: Any, run_loop: Any, apart: Any) -> None:
    shares = {}
    for weight in (0.0, 1e3):
        one = job(pico, f"at-{weight:g}", examples(16), max_steps=60, lr_scheduler_type="linear")
        one.orthogonality = apart(one.methods, weight)
        shares[weight] = one.orthogonality.share_at_start
        assert shares[weight] == pytest.approx(one.orthogonality.chance, rel=0.5)
        facts = run_loop(pico, one)
        terms = [fact["orthogonal_loss"] for _, _, fact in facts if fact["split"] == "train"]
        assert (terms[-1] < 0.05 * terms[0]) if weight else set(terms) == {0.0}
        shares[weight] = one.orthogonality.share()
    assert shares[1e3] < 1e-3 < 0.05 < shares[0.0]


def test_jobs_and_passes_beside_it_change_nothing(
    pico: Any, job: Any, examples: Any, run_loop: Any, apart: Any
) -> None:
    """One pass or two, alone or beside another job with no term: the same values, up to the order of sums."""
    found = []
    for name, size, passes, beside in (("one", 4, 1, False), ("two", 2, 2, False), ("beside", 4, 1, True)):
        one = job(pico, name, examples(16), per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        one.orthogonality = apart(one.methods, 2.0)
        if found:  # starts depend on the module alone: all begin alike
            assert one.orthogonality.share_at_start == found[0][1]
        run_loop(pico, one, *([job(pico, "other", examples(8, 3))] if beside else []))
        found.append((one.flat.values_P.detach().clone(), one.orthogonality.share_at_start))
    for values, _ in found[1:]:
        torch.testing.assert_close(values, found[0][0], rtol=1e-4, atol=1e-5)


def test_its_gradient_is_not_of_the_scaled_loss(pico: Any, job: Any, examples: Any, apart: Any) -> None:
    steps = []
    for name, scaled in (("plain", False), ("scaled", True)):
        one = job(pico, name, examples(4), max_grad_norm=0)
        one = type(one)(name, one.settings, one.train, (), 1e-2, one.methods, scaled, apart(one.methods, 1.0))
        one.update(torch.tensor(1.0))
        steps.append(one.flat.values_P.detach().clone())
        assert float(one.term) > 0
    assert torch.equal(*steps)


# --- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows of another task than digits: two digits -> two letters."""
    file = tmp_path_factory.mktemp("data") / "letters.jsonl"
    rows = [(f"Letters {n:02d}", f"{'abcdefghij'[n // 10]} {'klmnopqrst'[n % 10]}") for n in range(10, 90)]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return file


@pytest.fixture
def first(config: Config, letters: Path, tmp_path: Path) -> RunConfig:
    """A run on letters, finished."""
    one = config(dataset=str(letters), output_dir=str(tmp_path / "first"))
    run.train(one, progress=False)
    return one


def test_a_run_is_resumed_to_the_same_bytes_and_tells_its_overlap(
    config: Config, first: RunConfig, stopping: Any, tmp_path: Path
) -> None:
    options = {"orthogonal_to": first.output_dir, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    whole, cut = (config(output_dir=str(tmp_path / name), **options) for name in ("whole", "cut"))
    result = run.train(whole, progress=False)
    stopping(cut, 7)
    moved = tmp_path / "moved"
    shutil.copytree(first.output_dir, moved)  # it may lie elsewhere by now: which one it is counts
    again = config(output_dir=cut.output_dir, **options | {"orthogonal_to": str(moved)})
    run.train(again, progress=False, resume=True)
    assert _bytes(again) == _bytes(whole)

    told = Adapter.load(whole.output_dir).card.training["orthogonal_to"]
    identity = Adapter.load(first.output_dir).identity
    assert told == result.to_json()["orthogonal_to"] == json.loads(json.dumps(told))
    assert told["adapters"] == [{"folder": first.output_dir, "identity": identity}]
    assert (told["layers"], told["layers_trained"], told["lambda"], told["start"]) == (14, 14, 0.5, True)
    assert told["overlap"]["at_start"] < 1e-12
    assert 0 < told["overlap"]["at_end"] < 0.3 * told["overlap"]["of_random_factors"]
    assert any("lay in what the earlier adapters read" in note for note in result.notes)
    lines = [json.loads(line) for line in Path(whole.output_dir, "metrics.jsonl").read_text().splitlines()]
    terms = [line["orthogonal_loss"] for line in lines if line["split"] == "train"]
    assert terms[0] < 1e-10 < terms[-1]


def test_with_no_term_and_no_start_it_is_an_ordinary_run(config: Config, first: RunConfig, tmp_path: Path) -> None:
    nothing = {"orthogonal_to": first.output_dir, "orthogonal_lambda": 0, "orthogonal_start": False}
    plain, measured, apart = (
        config(output_dir=str(tmp_path / name), **options)
        for name, options in (("plain", {}), ("measured", nothing), ("apart", {"orthogonal_to": first.output_dir}))
    )
    for one in (plain, measured, apart):
        run.train(one, progress=False)
    assert _bytes(measured) == _bytes(plain)
    assert _bytes(apart) != _bytes(plain)
    assert "orthogonal_to" not in Adapter.load(plain.output_dir).card.training
    overlaps = [Adapter.load(one.output_dir).card.training["orthogonal_to"]["overlap"] for one in (measured, apart)]
    assert overlaps[0]["at_end"] > 5 * overlaps[1]["at_end"]


def test_resumed_beside_another_adapter_it_is_refused(
    config: Config, first: RunConfig, stopping: Any, letters: Path, tmp_path: Path
) -> None:
    one = config(orthogonal_to=first.output_dir)
    stopping(one, 7)
    run.train(config(dataset=str(letters), output_dir=first.output_dir, seed=5), progress=False)
    with pytest.raises(CheckpointError, match="orthogonal_to: it has"):
        run.train(one, progress=False, resume=True)


def test_a_dry_run_tells_and_writes_nothing(config: Config, first: RunConfig) -> None:
    one = config(orthogonal_to=first.output_dir)
    facts = dry_run(one)
    assert not Path(one.output_dir).exists()
    assert any(
        note.startswith("orthogonal to 1 adapter in 14 of 14 layers, lambda 0.5: 0.00%") for note in facts["notes"]
    )
    assert facts["options"]["orthogonal_to"] == [first.output_dir]


def test_the_command_line_takes_several(
    config: Config, first: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    second = config(output_dir=str(tmp_path / "second"), seed=4, target_modules="q_proj")
    run.train(second, progress=False)
    given = ["--base-model", first.base_model, "--dataset", first.data.dataset, "--output-dir", str(tmp_path / "third")]
    more = ["--max-steps", "2", "--r", "2", "--dtype", "float32", "--orthogonal-lambda", "1"]
    to = ["--orthogonal-to", first.output_dir, second.output_dir]
    assert main(["train", *given, *more, *to, "--no-progress", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["orthogonal_to"]
    assert [one["folder"] for one in told["adapters"]] == [first.output_dir, second.output_dir]
    assert (told["lambda"], told["layers"]) == (1.0, 14)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"method": "dora"}, "does not go with method dora.* \\(give lora\\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which is kept in A \\(give kaiming\\)"),
        ({"optimizer_in_bwd": True, "max_grad_norm": 0}, "optimizer_in_bwd, .*\\(leave it out\\)"),
        ({"output_dir": "./a"}, "itself as output_dir \\(give another\\)"),
        ({"orthogonal_lambda": -1}, "orthogonal_lambda"),
    ],
)
def test_settings_that_it_does_not_go_with_are_named(config: Config, options: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config(**{"orthogonal_to": "a,b", **options})


def test_its_options_alone_are_a_fault(config: Config) -> None:
    with pytest.raises(ConfigError, match="orthogonal_lambda and orthogonal_start without orthogonal_to"):
        config(orthogonal_lambda=1, orthogonal_start=False)


def test_adapters_that_cannot_be_read_are_told_together(
    config: Config, first: RunConfig, tmp_path: Path, digits: Path
) -> None:
    dora = config(output_dir=str(tmp_path / "dora"), method="dora", max_steps=1)
    run.train(dora, progress=False)
    given = [first.output_dir, first.output_dir, str(tmp_path / "nowhere"), dora.output_dir]
    with pytest.raises(AdapterError) as caught:
        run.train(config(orthogonal_to=given), progress=False)
    faults = str(caught.value)
    assert "nowhere: no such folder" in faults
    assert f"is the same adapter as {first.output_dir}; name it once" in faults
    assert "of method dora" in faults and "name adapters of plain LoRA" in faults


def test_an_adapter_of_another_base_is_refused(
    config: Config, first: RunConfig, pico_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(pico_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongBaseError, match="other weights"):
        run.train(config(base_model=str(other), orthogonal_to=first.output_dir), progress=False)


def test_layers_in_common_and_room_are_needed(config: Config, first: RunConfig, tmp_path: Path, letters: Path) -> None:
    narrow = config(dataset=str(letters), output_dir=str(tmp_path / "narrow"), target_modules="q_proj", max_steps=2)
    run.train(narrow, progress=False)
    with pytest.raises(ConfigError, match=r"narrow changes none of the layers .*--target-modules"):
        run.train(config(orthogonal_to=narrow.output_dir, target_modules="v_proj"), progress=False)
    with pytest.raises(ConfigError, match=r"fewer directions than r: .*\(32 inputs, 4 of them read, r 29\)[^$]*--r"):
        run.train(config(orthogonal_to=narrow.output_dir, r=29), progress=False)
    run.train(config(orthogonal_to=narrow.output_dir, r=28, max_steps=1), progress=False)
