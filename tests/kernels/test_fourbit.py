"""4-bit blocks: codes by their definition in float64, decoding in every dtype, and what lies in memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.kernels import fourbit
from veneer.kernels.dequantise import dequantise_4bit, dequantise_nf4
from veneer.kernels.fourbit import BLOCK, LEVELS, quantise_4bit
from veneer.kernels.nested import NESTED_BLOCK, dequantise_absmax, dynamic_map, quantise_absmax

# The midpoints of neighbouring levels as bitsandbytes' CUDA kernel has them.
NF4_MIDPOINTS = (
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.12025525048375130, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
)
shapes = {"rows": st.integers(1, 40), "columns": st.integers(1, 40), "seed": st.integers(0, 999)}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    """One code an element: the high nibble first."""
    return torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:count].long()


@pytest.mark.parametrize("levels", LEVELS)
@given(**shapes)
def test_every_code_is_the_nearest_level(levels, rows, columns, seed):
    w = gaussian(rows, columns, seed=seed)
    packed, absmax_K = quantise_4bit(w, levels)
    assert packed.shape == (math.ceil(w.numel() / 2), 1) and packed.dtype == torch.uint8
    assert absmax_K.shape == (math.ceil(w.numel() / BLOCK),) and absmax_K.dtype == torch.float32
    magnitude = absmax_K.double().repeat_interleave(BLOCK)[: w.numel()]
    assert torch.equal(absmax_K, torch.stack([block.abs().max() for block in w.view(-1).split(BLOCK)]))
    values = torch.tensor(LEVELS[levels], dtype=torch.float64)
    distance = (w.view(-1, 1).double() - magnitude.unsqueeze(1) * values).abs()
    chosen = distance.gather(1, unpacked(packed, w.numel()).unsqueeze(1)).squeeze(1)
    assert (chosen - distance.min(1).values <= 2**-22 * magnitude).all()  # float32 rounds the scaled value and midpoint


@pytest.mark.parametrize("levels", LEVELS)
def test_the_search_by_cells_is_the_count_of_midpoints_below(levels):
    values = torch.tensor(LEVELS[levels])
    midpoints = (values[:-1] + values[1:]) / 2
    edges = torch.arange(-fourbit.CELLS // 2, fourbit.CELLS // 2 + 1) / (fourbit.CELLS / 2)
    points = torch.cat([midpoints, edges, values, gaussian(100_000).clamp(-1, 1)])
    up, down = torch.full_like(points, 2.0), torch.full_like(points, -2.0)
    points = torch.cat([points, points.nextafter(up), points.nextafter(down)]).clamp(-1, 1)
    assert torch.equal(fourbit._nearest(points, levels).long(), torch.bucketize(points, midpoints))


def test_nf4_midpoints_are_those_of_bitsandbytes():
    values = torch.tensor(LEVELS["nf4"])
    torch.testing.assert_close((values[:-1] + values[1:]) / 2, torch.tensor(NF4_MIDPOINTS), rtol=2**-22, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(**shapes)
def test_decoding_is_level_times_magnitude_rounded_once(levels, dtype, rows, columns, seed):
    w = gaussian(rows, columns, seed=seed)
    packed, absmax_K = quantise_4bit(w, levels)
    values = torch.tensor(LEVELS[levels])[unpacked(packed, w.numel())]
    wanted = (values * absmax_K.repeat_interleave(BLOCK)[: w.numel()]).to(dtype).view(rows, columns)
    got = dequantise_4bit(packed, absmax_K, (rows, columns), dtype, levels)
    assert got.dtype == dtype and torch.equal(got, wanted)


def test_pieces_make_no_difference(monkeypatch):
    w = gaussian(37, 101)
    packed, absmax_K = quantise_4bit(w, "nf4")
    whole = dequantise_nf4(packed, absmax_K, (37, 101), torch.bfloat16)
    monkeypatch.setitem(fourbit.ENCODE_AT_ONCE, "cpu", 2 * BLOCK)
    monkeypatch.setattr(fourbit, "DECODE_AT_ONCE", 2 * BLOCK)
    assert all(torch.equal(*pair) for pair in zip(quantise_4bit(w, "nf4"), (packed, absmax_K), strict=True))
    assert torch.equal(dequantise_nf4(packed, absmax_K, (37, 101), torch.bfloat16), whole)


@pytest.mark.parametrize("levels", LEVELS)
def test_blocks_of_zeros_and_of_denormals_stay_finite(levels):
    w = torch.zeros(3, 50)
    w[1] = 1e-42
    packed, absmax_K = quantise_4bit(w, levels)
    decoded = dequantise_4bit(packed, absmax_K, (3, 50), torch.float32, levels)
    assert decoded.isfinite().all() and (decoded - w).abs().max() <= 1e-38


def test_a_transposed_weight_is_read_in_its_own_order():
    w = gaussian(30, 20).t()
    assert all(torch.equal(a, b) for a, b in zip(quantise_4bit(w, "nf4"), quantise_4bit(w.clone(), "nf4"), strict=True))


@given(st.integers(1, 900), st.integers(0, 99))
def test_nested_magnitudes_are_the_nearest_there_are(count, seed):
    absmax_K = gaussian(count, seed=seed).abs() + 1
    codes_K, nested = quantise_absmax(absmax_K)
    assert codes_K.dtype == torch.uint8 and len(nested.absmax) == math.ceil(count / NESTED_BLOCK)
    assert nested.offset.shape == (1,) and torch.equal(nested.offset[0], absmax_K.mean())
    scale_K = nested.absmax.repeat_interleave(NESTED_BLOCK)[:count].double()
    rest = (absmax_K.double() - nested.offset.double()).unsqueeze(1)
    distance = (rest - scale_K.unsqueeze(1) * nested.values.double()).abs()
    chosen = distance.gather(1, codes_K.long().unsqueeze(1)).squeeze(1)
    assert (chosen - distance.min(1).values <= 2**-21 * absmax_K).all()
    decoded = dequantise_absmax(codes_K, nested)
    assert ((decoded - absmax_K).abs() <= chosen + 2**-21 * absmax_K).all()


def test_the_dynamic_map_is_ascending_and_nearly_odd():
    values = dynamic_map()
    assert len(values) == 256 and (values.diff() > 0).all() and values[127] == 0 and values[-1] == 1
    assert torch.equal(-values[:127].flip(0), values[128:255])


@pytest.mark.parametrize("double", [False, True])
def test_a_compiled_graph_holds_decoding_as_one_operation(double):
    w = gaussian(9, 15)
    packed, absmax_K = quantise_4bit(w, "nf4")
    absmax_K, nested = quantise_absmax(absmax_K) if double else (absmax_K, None)

    def decode(packed, absmax_K):
        return dequantise_nf4(packed, absmax_K, (9, 15), torch.bfloat16, nested)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed, absmax_K), decode(packed, absmax_K))


@pytest.mark.parametrize("double", [False, True])
def test_the_operation_is_registered_soundly(double):
    packed, absmax_K = quantise_4bit(gaussian(5, 7), "nf4")
    parts = (None, None, None)
    if double:
        absmax_K, parts = quantise_absmax(absmax_K)
    arguments = (packed, absmax_K, 5, 7, torch.float16, "nf4", *parts)
    torch.library.opcheck(torch.ops.veneer.dequantise_4bit.default, arguments)
