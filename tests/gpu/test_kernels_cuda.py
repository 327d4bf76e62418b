"""The storages and their Triton kernels on a CUDA GPU, against the same on the CPU, mostly to the bit."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from veneer.bases import BASES
from veneer.bases.base import Base
from veneer.bases.fp8 import FP8, fp8_supported
from veneer.kernels.dequantise import dequantise_4bit
from veneer.kernels.fourbit import LEVELS, quantise_4bit
from veneer.kernels.nested import quantise_absmax
from veneer.kernels.rowwise import (
    E4M3,
    dequantise_rows,
    quantise_rows_fp8,
    quantise_rows_fp8_reference,
    quantise_rows_int8,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 3), (5, 7), (64, 64), (1, 2049), (130, 257), (700, 1536)]
BEHIND = 4096  # elements behind an output


@pytest.fixture
def e4m3() -> None:
    if not fp8_supported("cuda"):
        pytest.skip("this GPU does not multiply e4m3 matrices")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def storage(name: str) -> type[Base]:
    module, _, attribute = BASES[name].partition(":")
    return getattr(import_module(module), attribute)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    left_bytes, right_bytes = (tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left_bytes, right_bytes)


def poisoned(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory full of NaN (in every dtype the byte 255 repeated is one), and its beginning in this shape."""
    size = torch.Size(shape).numel()
    memory = torch.full(((size + BEHIND) * dtype.itemsize,), 255, dtype=torch.uint8, device="cuda").view(dtype)
    return memory, memory[:size].view(shape)


def untouched(memory: torch.Tensor) -> bool:
    return bool((memory[-BEHIND:].view(torch.uint8) == 255).all())


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_weights_decode_to_the_same_bits(levels, double, shape, dtype):
    fourbit_triton = pytest.importorskip("veneer.kernels.fourbit_triton")
    packed, absmax_K = quantise_4bit(gaussian(*shape), levels)
    nested = None
    if double:
        absmax_K, nested = quantise_absmax(absmax_K)
    wanted = dequantise_4bit(packed, absmax_K, shape, dtype, levels, nested)
    there = None if nested is None else type(nested)(*(part.cuda() for part in nested))
    memory, out = poisoned(*shape, dtype=dtype)
    got = fourbit_triton.dequantise_4bit_triton(packed.cuda(), absmax_K.cuda(), shape, dtype, levels, there, out)
    assert same(got, wanted) and untouched(memory)
    assert same(dequantise_4bit(packed.cuda(), absmax_K.cuda(), shape, dtype, levels, there), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_decode_to_the_same_bits(shape, dtype):
    rowwise_triton = pytest.importorskip("veneer.kernels.rowwise_triton")
    codes, scale = quantise_rows_int8(gaussian(*shape))
    memory, out = poisoned(*shape, dtype=dtype)
    got = rowwise_triton.dequantise_rows_triton(codes.cuda(), scale.cuda(), dtype, out)
    assert same(got, dequantise_rows(codes, scale, dtype)) and untouched(memory)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_rows_decode_to_the_same_bits(e4m3, shape, dtype):
    rowwise_triton = pytest.importorskip("veneer.kernels.rowwise_triton")
    codes, scale = quantise_rows_fp8_reference(gaussian(*shape))
    memory, out = poisoned(*shape, dtype=dtype)
    got = rowwise_triton.dequantise_rows_triton(codes.cuda(), scale.view(-1).cuda(), dtype, out)
    assert same(got, dequantise_rows(codes, scale.view(-1), dtype)) and untouched(memory)


@pytest.mark.parametrize("at_once", [64, 1 << 15])  # rows in several pieces, and in one
@pytest.mark.parametrize("shape", [*SHAPES, (0, 16), (3, 40000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_become_the_same_e4m3(e4m3, at_once, shape, dtype):
    rowwise_triton = pytest.importorskip("veneer.kernels.rowwise_triton")
    x = (gaussian(*shape) * torch.logspace(-3, 3, shape[0]).unsqueeze(1)).to(dtype)
    x[1:2] = 0
    memory, codes = poisoned(*shape, dtype=E4M3)
    scale_memory, scale = poisoned(shape[0], 1, dtype=torch.float32)
    rowwise_triton.quantise_rows_fp8_triton(x.cuda(), (codes, scale), at_once)
    wanted_codes, wanted_scale = quantise_rows_fp8_reference(x)
    assert same(codes, wanted_codes) and same(scale, wanted_scale)
    assert untouched(memory) and untouched(scale_memory)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(e4m3, fault):
    base = FP8.from_weight(gaussian(32, 64).cuda())
    x_TI = gaussian(4, 64).cuda().bfloat16()
    wanted = base.matmul(x_TI)
    x_TI[2, 5] = fault
    got = base.matmul(x_TI)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], wanted[[0, 1, 3]])
    assert quantise_rows_fp8(x_TI)[1].isnan().view(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_stored_alike_on_both_devices(name, dtype, shape):
    """nf4-dq but for its mean: a sum of thousands of magnitudes goes in another order on a GPU."""
    w_OI = gaussian(*shape).to(dtype)
    here, there = storage(name).from_weight(w_OI), storage(name).from_weight(w_OI.cuda())
    assert there.device.type == "cuda"
    if name == "nf4-dq":
        torch.testing.assert_close(there.dense().cpu(), here.dense(), rtol=2**-6, atol=2**-6)
    else:
        moved = here.to("cuda")
        assert all(same(value, dict(moved.named_parameters())[key]) for key, value in there.named_parameters())
        assert same(there.decode(), moved.decode())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_decodes_to_the_same_bits_on_both_devices(name, dtype):
    here = storage(name).from_weight(gaussian(130, 257))
    there = copy.deepcopy(here).to("cuda")
    assert same(there.decode(dtype), here.decode(dtype))
    assert same(there.dense(), here.dense())


@pytest.mark.parametrize("name", BASES)
def test_both_products_are_those_of_the_dense_weight(name):
    base = storage(name).from_weight(gaussian(96, 160).cuda().bfloat16())
    x_TI, g_TO = gaussian(33, 160, seed=1).cuda().bfloat16(), gaussian(33, 96, seed=2).cuda().bfloat16()
    w_OI = base.dense().double()
    tolerance = 0.05 if name == "fp8" else 2**-7  # e4m3 activations; else bfloat16
    for got, wanted in (
        (base.matmul(x_TI), x_TI.double() @ w_OI.t()),
        (base.matmul_t(g_TO), g_TO.double() @ w_OI),
        (base.matmul_t(g_TO, torch.ones_like(x_TI)), g_TO.double() @ w_OI + 1),
    ):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 17, 300])
def test_e4m3_products_with_the_second_copy(e4m3, dtype, tokens):
    w_OI = gaussian(272, 528)
    base = FP8.from_weight(w_OI.cuda())
    base.add_transposed(w_OI.cuda())
    x_TI, g_TO = gaussian(tokens, 528, seed=1).to(dtype), gaussian(tokens, 272, seed=2).to(dtype)
    for got, wanted in (
        (base.matmul(x_TI.cuda()), x_TI.float() @ w_OI.t()),
        (base.matmul_t(g_TO.cuda()), g_TO.float() @ w_OI),
    ):
        assert got.dtype == dtype and got.shape == wanted.shape
        # 0.026 of each side, √2 times that together; fast accumulation and bfloat16 add little.
        assert tokens == 0 or (got.cpu().float() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("name", BASES)
def test_a_compiled_layer_is_one_graph(name):
    """What is compiled is the product alone, as a layer calls it; inductor generates the code."""
    base = storage(name).from_weight(gaussian(96, 160).cuda().bfloat16())
    x_TI = gaussian(32, 160).cuda().bfloat16()
    compiled = torch.compile(lambda x_TI: base.matmul(x_TI), fullgraph=True)
    wanted = base.matmul(x_TI).float()
    assert (compiled(x_TI).float() - wanted).norm() / wanted.norm() < 2**-7
    decoded = torch.compile(lambda: base.decode(), fullgraph=True)()
    torch.testing.assert_close(decoded, base.decode(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_decoding_in_a_cuda_graph(name):
    base = storage(name).from_weight(gaussian(96, 160).cuda().bfloat16())
    wanted = base.decode()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        base.decode()  # constants and kernels are made on the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = base.decode()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, wanted) or name == "dense"  # dense: the weight itself, which was just zeroed


@pytest.mark.parametrize("name", [name for name in BASES if name != "dense"])
def test_casts_and_moves_of_a_model_leave_packed_bytes_alone(name):
    base = storage(name).from_weight(gaussian(9, 70), torch.zeros(9))
    model = nn.Sequential(copy.deepcopy(base)).to("cuda", torch.bfloat16).cpu().half().cuda()
    assert model[0].dtype == model[0].bias.dtype == torch.float16 and model[0].device.type == "cuda"
    held = dict(base.named_parameters())
    assert all(same(value, held[key]) for key, value in model[0].named_parameters() if key != "bias")


def test_encoding_a_large_weight_takes_little_beside_it():
    """The vocabulary of a Llama 3 head: one copy in float32 and what is kept, int8's outlier columns among it."""
    w_OI = torch.randn(128256, 2048, device="cuda", dtype=torch.bfloat16)
    for name in [name for name in BASES if name != "dense"]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        storage(name).from_weight(w_OI)
        assert torch.cuda.max_memory_allocated() - before < 2.6 * w_OI.nbytes, name


@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 130, 3), (500, 1000, 16), (1000, 4097, 20), (4096, 4096, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_thin_products_in_one_read(shape, dtype):
    from veneer.kernels.thin_triton import thin_gradients

    tokens, out, rank = shape
    wide_g, wide_z = gaussian(tokens, out + 8), gaussian(tokens, 2 * rank, seed=1)
    wide_g[:, out:], wide_z[:, :rank] = torch.nan, torch.nan  # what a wrong stride would read
    g, z = wide_g.to("cuda", dtype)[:, :out], wide_z.to("cuda", dtype)[:, rank:]
    b = gaussian(out, rank, seed=2).to("cuda", dtype)
    dz, db = thin_gradients(g, z, b, torch.float32)
    assert dz.dtype == dtype and db.dtype == torch.float32
    # Sums in float32 of up to 4,097 products of size 1: off by 2^-24 of a sum of sizes; dz is rounded once more.
    torch.testing.assert_close(db.double(), g.double().t() @ z.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(dz.double(), g.double() @ b.double(), rtol=2**-8, atol=1e-2)
    again = thin_gradients(g, z, b, torch.float32)
    assert same(dz, again[0]) and same(db, again[1])


@pytest.mark.parametrize("ranks", [(3, 3, 3), (16, 8, 20), (32, 32, 32)])
@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (1000, 4100), (4096, 14336)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swiglu_with_lora_around_it(shape, ranks, dtype):
    from veneer.kernels.swiglu import swiglu_backward_reference, swiglu_reference
    from veneer.kernels.swiglu_triton import swiglu, swiglu_backward

    def drawn(*size: int, seed: int) -> torch.Tensor:
        return gaussian(*size, seed=seed).to("cuda", dtype)

    tokens, width = shape
    g, u = drawn(tokens, 2 * width, seed=0).split(width, 1)
    zs = drawn(tokens, ranks[0] + ranks[1], seed=1).split(ranks[:2], 1)
    bs = [drawn(width, rank, seed=2) * rank**-0.5 for rank in ranks[:2]]
    a, dz, dh = drawn(ranks[2], width, seed=3), drawn(tokens, ranks[2], seed=4), drawn(tokens, width, seed=5)
    found = [swiglu(g, u, zs, bs), *swiglu_backward(dh.clone(), g, u, zs, dz, bs, a)]
    wanted = [swiglu_reference(g, u, zs, bs), *swiglu_backward_reference(dh.clone(), g, u, zs, dz, bs, a)]
    rounded = 2**-7 if dtype == torch.bfloat16 else 2**-10
    for one, other in zip(found, wanted, strict=True):  # rounded once, perhaps to the neighbour
        torch.testing.assert_close(one, other, rtol=rounded, atol=1e-3)


def test_fp8_layers_that_share_x_give_what_each_gives(e4m3):
    one, two = (FP8.from_weight(gaussian(size, 64, seed=size).to("cuda", torch.bfloat16)) for size in (48, 80))
    x, into = gaussian(33, 64).to("cuda", torch.bfloat16), gaussian(33, 80).to("cuda", torch.bfloat16)
    found = FP8.matmuls([one, two], x, [None, into.clone()])
    assert same(found[0], one.matmul(x)) and same(found[1], two.matmul(x, into.clone()))
