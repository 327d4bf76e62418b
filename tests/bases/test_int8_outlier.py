"""Which columns are kept aside, what that is worth, and how it lies in a checkpoint."""

from __future__ import annotations

import copy

import torch

from veneer.bases.int8 import Int8, Int8Outlier, outlier_columns


def weight(columns: dict[int, float], outside: int = 64, inside: int = 512) -> torch.Tensor:
    """Gaussian, with some columns so many times as large."""
    w_OI = torch.randn(outside, inside, generator=torch.Generator().manual_seed(0))
    for column, times in columns.items():
        w_OI[:, column] *= times
    return w_OI


def test_gaussian_weights_have_no_outliers():
    base = Int8Outlier.from_weight(weight({}))
    assert base.columns is None and base.state_dict().keys() == {"weight", "SCB", "weight_format"}


def test_large_columns_are_found_and_kept_as_they_are():
    w_OI = weight({7: 30.0, 300: 20.0}).bfloat16()
    base = Int8Outlier.from_weight(w_OI)
    assert base.columns.tolist() == [7, 300] and base.outliers.dtype == torch.bfloat16
    assert torch.equal(base.decode()[:, [7, 300]], w_OI[:, [7, 300]])
    assert (base.weight[:, [7, 300]] == 0).all()


def test_the_others_keep_the_error_they_would_have_alone():
    w_OI, rest = weight({7: 30.0}), [column for column in range(512) if column != 7]
    error = {kind: (kind.from_weight(w_OI).dense() - w_OI)[:, rest].norm() for kind in (Int8, Int8Outlier)}
    alone = (Int8.from_weight(w_OI[:, rest]).dense() - w_OI[:, rest]).norm()
    assert error[Int8Outlier] <= alone * 1.001 < error[Int8] / 5


def test_one_large_weight_is_enough():
    w_OI = weight({})
    w_OI[5, 100] = 40.0
    assert outlier_columns(w_OI).tolist() == [100]


def test_at_most_one_column_in_128_the_worst_first():
    large = {column: 20.0 * 1.5 ** (column / 8) for column in range(0, 80, 8)}
    assert outlier_columns(weight(large, inside=512)).tolist() == [48, 56, 64, 72]
    assert len(outlier_columns(weight({3: 100.0}, inside=50))) == 1  # rounded up


def test_how_many_there_are_is_the_checkpoints_to_say():
    two, none = Int8Outlier.from_weight(weight({7: 30.0, 9: 30.0})), Int8Outlier.from_weight(weight({}))
    for given, held in ((two, none), (none, two)):
        held.load_state_dict(given.state_dict())
        assert torch.equal(held.dense(), given.dense())
        assert held.state_dict().keys() == given.state_dict().keys()


def test_products_casts_and_compiled_graphs_know_the_columns():
    w_OI, x_TI = weight({7: 30.0, 9: 30.0}).bfloat16(), torch.randn(3, 512)
    base = Int8Outlier.from_weight(w_OI)
    torch.testing.assert_close(base.matmul(x_TI), x_TI @ base.dense().t(), rtol=1e-4, atol=1e-3)
    held = base.dense()
    cast = copy.deepcopy(base).half()
    assert cast.outliers.dtype == torch.bfloat16 and cast.columns.dtype == torch.int64 and cast.dtype == torch.float16
    assert torch.equal(cast.dense(), held)
    assert torch.equal(torch.compile(lambda: base.decode(), fullgraph=True, backend="aot_eager")(), base.decode())
    assert torch.equal(base.packed(held)._parameters["columns"], base.columns)
