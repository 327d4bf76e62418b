"""Every merge method against its definition on dense float64 updates."""

from __future__ import annotations

import pytest
import torch

from veneer.merge.compress import shared_spaces
from veneer.merge.elementwise import smallest_kept, trimmed
from veneer.merge.layer import merge_layer
from veneer.merge.method import Parent
from veneer.merge.table import merge_named

WEIGHTS = (1.0, -0.5, 0.7)
OUTPUTS, INPUTS, RANK = 24, 18, 3
CLOSE = 1e-5  # float32 factors; the entries that methods choose between are far apart


@pytest.fixture
def parents() -> list[Parent]:
    draw = torch.Generator().manual_seed(3)
    return [
        Parent(torch.randn(RANK, INPUTS, generator=draw), torch.randn(OUTPUTS, RANK, generator=draw), weight, str(i))
        for i, weight in enumerate(WEIGHTS)
    ]


def dense(found) -> torch.Tensor:
    return found.b.double() @ found.a.double()


def merged(name: str, parents: list[Parent], **options) -> torch.Tensor:
    merge = merge_named(name)
    return dense(merge_layer(merge, parents, merge.settings(**options)))


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=CLOSE * float(wanted.norm()))


def weighted(parents: list[Parent]) -> list[torch.Tensor]:
    return [p.weight * dense(p) for p in parents]


def svd(matrix: torch.Tensor, rank: int):
    u, s, vt = torch.linalg.svd(matrix)
    return u[:, :rank], s[:rank], vt[:rank].mT


def trim(matrix: torch.Tensor, density: float) -> torch.Tensor:
    keep = matrix.abs().flatten().sort(descending=True).indices[: round(density * matrix.numel())]
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[keep] = True
    return matrix * mask.view(matrix.shape)


def ties(matrices: list[torch.Tensor], weights=WEIGHTS) -> torch.Tensor:
    """Entry by entry, in plain Python."""
    out = torch.zeros_like(matrices[0])
    for at in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        values = [float(matrix[tuple(at)]) for matrix in matrices]
        sign = 1 if sum(values) > 0 else -1
        agreeing = [(v, abs(w)) for v, w in zip(values, weights, strict=True) if v * sign > 0]
        if agreeing:
            out[tuple(at)] = sum(v for v, _ in agreeing) / sum(w for _, w in agreeing)
    return out


def test_linear_and_cat_are_the_sum(parents):
    for name in ("linear", "cat"):
        close(merged(name, parents), sum(weighted(parents)))


def test_svd_is_the_best_approximation(parents):
    u, s, v = svd(sum(weighted(parents)), RANK)
    close(merged("svd", parents), u * s @ v.mT)
    found = merge_layer(merge_named("svd"), parents, merge_named("svd").settings(rank=2))
    s = torch.linalg.svdvals(sum(weighted(parents)))
    assert found.error == pytest.approx(float(s[2:].norm()), rel=1e-6)
    assert found.kept == pytest.approx(1 - float(s[2:].norm() / s.norm()) ** 2, rel=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_magnitude_and_ties_on_rows_in_the_shared_basis(parents, density):
    _, _, v = svd(torch.cat([dense(p) for p in parents]), 3 * RANK)
    trimmed = [trim(delta @ v, density) for delta in weighted(parents)]
    close(merged("magnitude", parents, density=density), sum(trimmed) @ v.mT)
    close(merged("ties", parents, density=density), ties(trimmed) @ v.mT)


@pytest.mark.parametrize("inner", ["linear", "ties", "magnitude"])
def test_knots(parents, inner):
    u, s, v = svd(torch.cat([dense(p) for p in parents], dim=1), 3 * RANK)
    blocks = [p.weight * block.mT for p, block in zip(parents, v.split(INPUTS), strict=True)]
    trimmed = [trim(block, 0.4) for block in blocks] if inner != "linear" else blocks
    inside = ties(trimmed) if inner == "ties" else sum(trimmed)
    close(merged("knots", parents, inner=inner, density=0.4), u * s @ inside)
    if inner == "linear":
        close(merged("knots", parents, inner=inner), sum(weighted(parents)))


def test_core_space(parents):
    halves = [(u * s.sqrt(), v * s.sqrt()) for u, s, v in (svd(dense(p), RANK) for p in parents)]
    left = svd(torch.cat([b for b, _ in halves], 1), 3 * RANK)[0]
    right = svd(torch.cat([a for _, a in halves], 1), 3 * RANK)[0]
    inside = ties([trim(left.mT @ delta @ right, 0.4) for delta in weighted(parents)])
    close(merged("core", parents, density=0.4), left @ inside @ right.mT)
    close(merged("core", parents, inner="linear"), sum(weighted(parents)))


def procrustes(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def test_tsv_m(parents):
    found = [svd(dense(p), RANK) for p in parents]
    u, v = (procrustes(torch.cat([one[i] for one in found], 1)) for i in (0, 2))
    s = torch.cat([p.weight * one[1] for p, one in zip(parents, found, strict=True)])
    close(merged("tsv_m", parents), u * s @ v.mT)


def test_iso_c_of_two_orthogonal_directions():
    """3 and 1 become 2 and 2."""
    eye = torch.eye(6)
    parents = [Parent(eye[:1], 3 * eye[:, :1]), Parent(eye[1:2], eye[:, 1:2])]
    close(merged("iso_c", parents), torch.diag(torch.tensor([2.0, 2, 0, 0, 0, 0], dtype=torch.float64)))
    close(merged("iso_c", parents, rank=1), torch.diag(torch.tensor([3.0, 0, 0, 0, 0, 0], dtype=torch.float64)))


def test_iso_c_stays_inside_what_the_adapters_span(parents):
    u, s, v = svd(sum(weighted(parents)), 3 * RANK)
    close(merged("iso_c", parents), float(s.mean()) * u @ v.mT)


def test_iso_cts(parents):
    u, s, v = svd(sum(weighted(parents)), 3 * RANK)
    us, ss, vs = [u[:, :6]], [s[:6]], [v[:, :6]]  # 9 directions, a share of 0.6 and what three tasks leave
    for delta in weighted(parents):
        own = svd(delta - us[0] @ us[0].mT @ delta, 1)
        us, ss, vs = [*us, own[0]], [*ss, own[1]], [*vs, own[2]]
    wanted = float(torch.cat(ss).mean()) * procrustes(torch.cat(us, 1)) @ procrustes(torch.cat(vs, 1)).mT
    close(merged("iso_cts", parents, common=0.6), wanted)


def test_orthogonal_projection(parents):
    wanted = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for delta in weighted(parents):
        u, _, v = svd(wanted, int(torch.linalg.matrix_rank(wanted)))
        new = delta - u @ u.mT @ delta
        wanted = wanted + new - new @ v @ v.mT
        assert float((wanted * delta).sum()) > 0
    close(merged("orthogonal", parents), wanted)


def test_compress_keeps_all_that_the_rank_can_hold(parents):
    close(merged("compress", parents, rank=3 * RANK), sum(weighted(parents)))


def test_compress_finds_better_spaces_than_the_first_guess(parents):
    """The turns do not lose, and beat the singular directions of what is stacked."""
    stack = torch.stack(weighted(parents))
    u, v, _ = shared_spaces(stack, RANK)
    held = float((u.mT @ stack @ v).square().sum())
    u0, _, _ = svd(torch.cat(list(stack), 1), RANK)
    v0 = svd(torch.cat(list(stack)).mT, RANK)[0]
    assert held > float((u0.mT @ stack @ v0).square().sum()) * (1 + 1e-4)
    u2 = svd(torch.cat(list(stack @ v), 1), RANK)[0]  # one more turn gains nothing
    v2 = svd(torch.cat(list(stack.mT @ u2), 1), RANK)[0]
    assert float((u2.mT @ stack @ v2).square().sum()) < held * (1 + 2e-9)
    for vectors in (u, v):
        close(vectors.mT @ vectors, torch.eye(RANK, dtype=torch.float64))
    close(merged("compress", parents), u @ (u.mT @ stack @ v).sum(0) @ v.mT)


def test_compress_tells_what_it_leaves_out(parents):
    merge = merge_named("compress")
    found = merge_layer(merge, parents, merge.settings(rank=2))
    assert found.error == pytest.approx(float((sum(weighted(parents)) - dense(found)).norm()), rel=1e-5)


def test_dare_has_the_noise_of_dense_entries_and_the_right_mean(parents):
    """√((1 - p) / p) of ‖ΔW‖, each seed another; the mean over many comes back."""
    delta, one = dense(parents[0]), [parents[0]]
    drawn = torch.stack([merged("dare_linear", one, density=0.25, seed=seed) for seed in range(100)])
    noise = (drawn - delta).flatten(1).norm(dim=1) / delta.norm()
    assert float(noise.square().mean().sqrt()) == pytest.approx(3**0.5, rel=0.1)
    assert float((drawn.mean(0) - delta).norm() / delta.norm()) < 1.5 * (3 / 100) ** 0.5


def test_dare_masks_belong_to_the_parent(parents):
    """Neither its place nor its weight chooses; another seed or key does."""
    a, b, _ = parents
    alone = merged("dare_linear", [a])
    close(merged("dare_linear", [b, a]) - merged("dare_linear", [a, b]), torch.zeros_like(alone))
    close(2 * alone, merged("dare_linear", [Parent(a.a, a.b, 2.0, a.key)]))
    for other in (merged("dare_linear", [a], seed=1), merged("dare_linear", [Parent(a.a, a.b, 1.0, "other")])):
        assert float((other - alone).norm()) > 0.1 * float(alone.norm())


def test_opposite_entries_elect_nobody(parents):
    """A and -A: the sum of their entries is rounding, whose sign must not decide."""
    one = Parent(parents[0].a, parents[0].b, 1.0, "same")
    minus = Parent(one.a, one.b, -1.0, "same")
    for name in ("ties", "dare_ties", "knots", "core"):
        assert float(merged(name, [one, minus]).norm()) < 1e-9


def test_ties_weights_are_relative(parents):
    for name in ("ties", "dare_ties", "knots", "core"):
        tripled = [Parent(p.a, p.b, 3 * p.weight, p.key) for p in parents]
        close(merged(name, tripled), merged(name, parents))


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_trimming_keeps_all_of_equal_entries(density):
    """None of them is larger than the others, and an update must not vanish."""
    ones = torch.ones(4, 5)
    assert torch.equal(kept(ones, density), ones)
    half = torch.cat([ones, torch.zeros_like(ones)])
    assert torch.equal(kept(half, density), half)
    steps = torch.arange(-1.0, -21, -1).view(4, 5)
    assert int((kept(steps, density) != 0).sum()) == max(1, round(density * 20))


def kept(entries_ND: torch.Tensor, density: float) -> torch.Tensor:
    return trimmed(entries_ND[None], [smallest_kept(entries_ND, torch.eye(5), density)])[0]
