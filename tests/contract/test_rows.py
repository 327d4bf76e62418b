"""The laws of a method for rows of the vocabulary, and those of a storage for the embedding that has them.

Legend: T tokens, N tokens that are trained, V vocabulary, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from veneer.bases.dense import Dense
from veneer.bases.lookup import Lookup
from veneer.methods.rows import TokenRows, rows_of

shapes = {
    "vocabulary": st.integers(1, 30),
    "hidden": st.integers(1, 12),
    "share": st.floats(0, 1),
    "seed": st.integers(0, 999),
}


def made(vocabulary: int, hidden: int, share: float, seed: int) -> tuple[TokenRows, Lookup, Dense]:
    """Random rows of some tokens, in any order, and the same table as an embedding and as a head."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, hidden, generator=generator)
    ids = torch.randperm(vocabulary, generator=generator)[: max(1, int(share * vocabulary))].tolist()
    rows = TokenRows(torch.randn(len(ids), hidden, generator=generator), ids, vocabulary)
    return rows, Lookup.from_weight(table.t()), Dense.from_weight(table)


@given(**shapes)
def test_merged_is_what_is_looked_up_and_what_logits_are_made_of(vocabulary, hidden, share, seed):
    rows, embedding, head = made(vocabulary, hidden, share, seed)
    ids_T = torch.arange(vocabulary).repeat(2)
    y_TD = F.embedding(ids_T, embedding.weight)
    wanted = rows.merged(embedding).t()[ids_T]
    torch.testing.assert_close(y_TD + rows.embedded(ids_T, y_TD), wanted)
    assert torch.equal(wanted[rows.ids], rows.rows_ND)
    others = sorted(set(range(vocabulary)) - set(rows.ids))
    assert torch.equal(wanted[others], embedding.weight[others])
    assert torch.equal(rows.merged(head), rows.merged(embedding).t())
    x_TD = torch.randn(5, hidden, generator=torch.Generator().manual_seed(seed + 1))
    y_TV = head.matmul(x_TD)
    got = y_TV + rows.delta(x_TD, y_TV, head)
    torch.testing.assert_close(got, x_TD @ rows.merged(head).t(), rtol=1e-4, atol=1e-5)
    for base in (embedding, head):
        norm = (rows.merged(base) - base.dense()).norm().item()
        assert rows.update_norm(base) == pytest.approx(norm, rel=1e-5, abs=1e-6)


@given(**shapes)
def test_a_new_one_is_the_base_to_the_bit_and_gradients_reach_it(vocabulary, hidden, share, seed):
    rows, embedding, head = made(vocabulary, hidden, share, seed)
    new = TokenRows(rows_of(head, rows.ids_N), rows.ids, vocabulary)
    ids_T, x_TD = torch.tensor(rows.ids), torch.randn(3, hidden)
    y_TD, y_TV = embedding.weight[ids_T].clone(), head.matmul(x_TD)
    assert not new.embedded(ids_T, y_TD).any() and not new.delta(x_TD, y_TV, head).any()
    assert torch.equal(new.merged(head), head.dense()) and new.update_norm(head) == 0
    new.embedded(ids_T, y_TD).sum().backward()
    assert torch.equal(new.rows_ND.grad, torch.ones_like(new.rows_ND))
    new.rows_ND.grad = None
    new.delta(x_TD, y_TV, head).sum().backward()
    torch.testing.assert_close(new.rows_ND.grad, x_TD.sum(0).expand_as(new.rows_ND))


def test_the_state_is_what_is_learned_and_comes_back_into_its_memory():
    rows, _, head = made(9, 4, 0.5, 0)
    assert set(rows.state_dict()) == {"rows_ND"} == set(dict(rows.named_parameters()))
    memory, held = rows.rows_ND.data_ptr(), rows.tensors()
    rows.rows_ND.data.zero_()
    assert tuple(held) == rows.kinds and held["rows"].any()
    rows.restore(held)
    assert memory == rows.rows_ND.data_ptr() and torch.equal(rows.rows_ND, held["rows"])
    with pytest.raises(ValueError, match="of no rank"):
        rows.delta(torch.ones(1, 4), torch.ones(1, 9), head, torch.ones(1, 1))


@given(vocabulary=st.integers(1, 30), hidden=st.integers(1, 12), seed=st.integers(0, 999))
def test_an_embedding_is_a_layer_over_one_hot_tokens(vocabulary, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.nn.Embedding(vocabulary, hidden)
    base = Lookup.from_embedding(table)
    assert base.weight is table.weight and (base.out_features, base.in_features) == (hidden, vocabulary)
    assert torch.equal(base.matmul(torch.eye(vocabulary)), table.weight)
    assert torch.equal(base.dense(), table.weight.t()) and torch.equal(base.decode(), table.weight.t())
    g_TO = torch.randn(3, hidden, generator=generator)
    torch.testing.assert_close(base.matmul_t(g_TO), g_TO @ base.dense())
    x_TI, into = torch.randn(3, vocabulary, generator=generator), torch.ones(3, hidden)
    torch.testing.assert_close(base.matmul(x_TI, into), x_TI @ table.weight + 1)
    torch.testing.assert_close(base.matmul_t(g_TO, torch.ones(3, vocabulary)), g_TO @ base.dense() + 1)
    torch.testing.assert_close(base.row_norms(), table.weight.norm(dim=0))
    moved = base.packed(base.dense() + 1)
    assert isinstance(moved, Lookup) and torch.equal(moved.weight, table.weight + 1)
    assert set(base.state_dict()) == {"weight"} and base.state_dict()["weight"].shape == (vocabulary, hidden)
    empty = Lookup.empty(hidden, vocabulary, False, torch.bfloat16)
    assert (empty.out_features, empty.in_features, empty.dtype) == (hidden, vocabulary, torch.bfloat16)


@given(**shapes, beyond=st.integers(1, 6))
def test_ids_beyond_the_table_grow_what_is_merged_and_change_nothing_in_it(vocabulary, hidden, share, seed, beyond):
    _, embedding, head = made(vocabulary, hidden, share, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = [0, *range(vocabulary, vocabulary + beyond)]
    rows = TokenRows(torch.randn(len(ids), hidden, generator=generator), ids, vocabulary)
    merged_VD = rows.merged(head)
    assert merged_VD.shape == (vocabulary + beyond, hidden) and torch.equal(rows.merged(embedding).t(), merged_VD)
    assert torch.equal(merged_VD[1:vocabulary], head.weight[1:]) and torch.equal(merged_VD[ids], rows.rows_ND)
    assert not rows_of(head, torch.tensor(ids[1:])).any() and torch.equal(
        rows_of(head, torch.tensor([0])), head.weight[:1]
    )
    ids_T = torch.arange(vocabulary + beyond)
    y_TD = F.pad(head.weight, (0, 0, 0, beyond))
    torch.testing.assert_close(y_TD + rows.embedded(ids_T, y_TD), merged_VD)
    assert (rows.places(ids_T + vocabulary + beyond) == -1).all()
    x_TD = torch.randn(4, hidden, generator=generator)
    y_TV = head.matmul(x_TD)
    got = F.pad(y_TV, (0, beyond)) + rows.delta(x_TD, y_TV, head)
    torch.testing.assert_close(got, x_TD @ merged_VD.t(), rtol=1e-4, atol=1e-5)
