"""What a GPU run is, and how much arithmetic it needs."""

from __future__ import annotations

import pytest

from benchmarks.gpu_rows import LONGEST, ROWS, SYSTEMS, is_ours, parse_rows, parse_systems
from benchmarks.gpu_spec import SHAPES, Spec, adapter_parameters, flop_per_token, ideal_seconds_per_token, layer_sizes
from benchmarks.ours_gpu import recomputed_layers


def test_a_spec_survives_its_way_to_another_process() -> None:
    spec = Spec("ours", "8b", "nf4", rank=64, batch=2, recompute="layers", compile=True, cap_gib=44.5)
    assert Spec.parse(spec.to_json()) == spec


@pytest.mark.parametrize("shape, billions", [("1b", 0.973), ("8b", 6.979), ("65b", 64.76)])
def test_layers_have_the_sizes_of_the_models_they_are_named_after(shape: str, billions: float) -> None:
    weights = SHAPES[shape]["num_hidden_layers"] * sum(out * into for out, into in layer_sizes(shape))
    assert weights / 1e9 == pytest.approx(billions, rel=2e-3)


def test_sizes_and_adapter_are_those_of_the_model_that_is_built() -> None:
    from torch import nn

    from benchmarks.gpu_model import fresh

    model = fresh("pico", "cpu")
    linear = [m for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    assert sorted((m.out_features, m.in_features) for m in linear) == sorted(layer_sizes("pico"))
    assert adapter_parameters("pico", 4) == 2 * 4 * sum(m.out_features + m.in_features for m in linear)


def test_arithmetic_of_lora_on_8b_at_4096_tokens() -> None:
    # By hand: 4 x (6.979 + 0.525) GFLOP of weights and head, 3.2 of causal attention, 0.25 of the adapter.
    assert sum(flop_per_token(Spec("ours", "8b")).values()) / 1e9 == pytest.approx(33.5, abs=0.1)


def test_full_fine_tuning_needs_the_gradient_of_the_weights_too() -> None:
    lora, full = (flop_per_token(Spec(system, "1b")) for system in ("ours", "full"))
    assert full["linear"] == 1.5 * lora["linear"]


def test_an_fp8_base_is_held_against_the_fp8_rate_and_its_rest_against_bf16() -> None:
    ceiling = {"bf16_tflops": 700.0, "fp8_tflops": 1400.0}
    bf16, fp8 = (ideal_seconds_per_token(Spec("ours", "8b", storage), ceiling) for storage in ("bf16", "fp8"))
    flop = flop_per_token(Spec("ours", "8b"))
    assert bf16 == pytest.approx((flop["linear"] + flop["rest"]) / 700e12)
    assert bf16 - fp8 == pytest.approx(flop["linear"] / 1400e12)


def test_every_system_of_a_row_is_known_and_tried() -> None:
    for row in ROWS.values():
        assert row.shape in SHAPES and row.systems.keys() <= SYSTEMS.keys() and any(map(is_ours, row.systems))
        assert all(row.candidates(system, 3) for system in row.systems)
        assert row.within is None or row.within in row.systems


def test_candidates_carry_the_rows_work_and_the_systems_storage() -> None:
    spec = ROWS["65b"].candidates("ours-nf4", 3)[0]
    assert (spec.shape, spec.storage, spec.rank, spec.sequence, spec.batch) == ("65b", "nf4", 64, 512, 1)
    assert (spec.cap_gib, spec.steps) == (44.5, 3)


def test_rows_and_systems_are_parsed_and_all_unknown_ones_named() -> None:
    assert parse_rows("8b-bf16,8b-longest") == ["8b-bf16", "8b-longest"]
    assert set(parse_rows("all")) == {*ROWS, *LONGEST}
    assert parse_systems(None) is None and parse_systems("ours,unsloth") == ["ours", "unsloth"]
    with pytest.raises(ValueError, match=r"9b, 7b"):
        parse_rows("9b,8b-bf16,7b")
    with pytest.raises(ValueError, match="no row"):
        parse_rows(",")


@pytest.mark.parametrize("recompute, layers", [("none", 0), ("layers", -1), ("16", 16)])
def test_recomputing_all_none_or_some_layers(recompute: str, layers: int) -> None:
    assert recomputed_layers(recompute) == layers
