"""Components that are found batch by batch are those of all rows at once, and PEFT's."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA as PeftPCA
from torch import Tensor

from fastadapt.training.incremental_pca import IncrementalPCA


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int, count: int, width: int = 24) -> Tensor:
    """Rows with a falling spectrum around a mean that is not zero."""
    scales = 4.0 / (1 + torch.arange(width))
    return draw(count, width, seed=seed) * scales @ draw(width, width, seed=99) + 3 * draw(width, seed=98)


def fitted(n: int, batches: list[Tensor]) -> IncrementalPCA:
    pca = IncrementalPCA(n)
    for batch in batches:
        pca.partial_fit(batch)
    return pca


@pytest.mark.parametrize("n", [1, 5, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_batch_gives_what_pefts_gives(n: int, dtype: torch.dtype) -> None:
    ours, peft = IncrementalPCA(n), PeftPCA(n_components=n, lowrank=True, lowrank_seed=42)
    for seed, count in enumerate((40, 13, 64, 17, 40)):
        batch = rows(seed, count).to(dtype)
        ours.partial_fit(batch)
        peft.partial_fit(batch)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        for mine, theirs in (
            (ours.components, peft.components_),
            (ours.singular_values, peft.singular_values_),
            (ours.explained_variance_ratio, peft.explained_variance_ratio_),
            (ours.mean, peft.mean_),
            (ours.variance, peft.var_),
        ):
            torch.testing.assert_close(mine.double(), theirs.double(), **tolerance)
        assert ours.n_seen == int(peft.n_samples_seen_)


def test_with_all_components_it_is_the_svd_of_all_rows() -> None:
    batches = [rows(seed, count).double() for seed, count in enumerate((30, 24, 50))]
    pca, everything = fitted(24, batches), torch.cat(batches)
    centered = everything - everything.mean(0)
    _, sigma, vh = torch.linalg.svd(centered, full_matrices=False)
    torch.testing.assert_close(pca.singular_values, sigma)
    torch.testing.assert_close((pca.components * vh).sum(1).abs(), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(pca.explained_variance_ratio, sigma.square() / centered.square().sum())
    torch.testing.assert_close(pca.mean, everything.mean(0))
    torch.testing.assert_close(pca.variance, everything.var(0, correction=0))


def test_the_leading_components_are_near_those_of_all_rows() -> None:
    batches = [rows(seed, 64) for seed in range(8)]
    pca, everything = fitted(6, batches), torch.cat(batches).double()
    _, sigma, vh = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)
    assert (pca.components[:3] * vh[:3]).sum(1).abs().min() > 0.99
    torch.testing.assert_close(pca.singular_values[:3], sigma[:3], rtol=0.02, atol=0)


def test_rows_of_components_are_orthonormal_and_have_their_largest_entry_positive() -> None:
    pca = fitted(7, [rows(0, 40), rows(1, 40)])
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(7, dtype=torch.float64))
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()
    assert (pca.singular_values.diff() <= 0).all()
    assert 0 < pca.explained_variance_ratio.sum() <= 1


def test_mean_and_variance_are_exact_far_from_zero() -> None:
    batches = [rows(seed, 50) + 1e4 for seed in range(6)]
    pca, everything = fitted(3, batches), torch.cat(batches).double()
    torch.testing.assert_close(pca.mean, everything.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(pca.variance, everything.var(0, correction=0), rtol=1e-5, atol=0)


def test_the_callers_random_numbers_are_untouched_and_do_not_matter() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fitted(5, [rows(0, 40), rows(1, 40)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(fitted(5, [rows(0, 40), rows(1, 40)]).components, first.components)


def test_bf16_rows_are_those_values_in_fp32_and_nothing_is_written() -> None:
    batch = rows(0, 40).bfloat16()
    before = batch.clone()
    pca = fitted(5, [batch, batch])
    assert torch.equal(batch, before)
    assert torch.equal(pca.components, fitted(5, [batch.float(), batch.float()]).components)


def test_it_keeps_neither_rows_nor_more_than_its_components() -> None:
    pca = IncrementalPCA(4)
    for seed in range(3):
        batch = rows(seed, 30)
        gone = weakref.ref(batch)
        pca.partial_fit(batch)
        del batch
        assert gone() is None
    kept = [value for value in vars(pca).values() if isinstance(value, Tensor)]
    sizes = sum(value.untyped_storage().nbytes() // value.element_size() for value in kept)
    assert sizes == 4 * 24 + 4 + 4 + 24 + 24


def test_components_converge_when_batches_change_them_no_more() -> None:
    pca, history = IncrementalPCA(3), []
    for seed in range(6):
        previous = pca.components
        pca.partial_fit(rows(seed, 200))
        history.append(pca.converged(previous, 0.999))
    assert not history[0].any()
    assert history[-1].all()
    assert not pca.converged(-pca.components, 0.0).any()


def test_directions_in_which_nothing_varies_do_not_keep_it_from_converging() -> None:
    plane = draw(2, 24, seed=1)
    pca = fitted(4, [draw(60, 2) @ plane])
    assert pca.in_noise.tolist() == [False, False, True, True]
    similar = []
    for seed in range(2, 5):
        previous = pca.components
        pca.partial_fit(draw(60, 2, seed=seed) @ plane)
        similar.append(torch.nn.functional.cosine_similarity(pca.components, previous)[2:] >= 0.99)
        assert pca.converged(previous, 0.9)[2:].all()
    assert not torch.stack(similar).all(), "what is in noise is stable here by itself"
    constant = fitted(2, [torch.ones(5, 6), torch.ones(5, 6)])
    assert constant.explained_variance_ratio.tolist() == [0, 0]
    assert constant.in_noise.all()


def infinite() -> Tensor:
    return rows(0, 30).index_fill_(0, torch.tensor([3]), float("inf"))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (lambda: rows(0, 30)[None], ValueError, r"x must have shape \[rows, 24\], got \(1, 30, 24\)"),
        (lambda: rows(0, 30, 25), ValueError, r"x must have shape \[rows, 24\], got \(30, 25\)"),
        (lambda: rows(0, 4), ValueError, "at least n_components = 5 rows, got 4: give larger batches"),
        (lambda: torch.ones(30, 24, dtype=torch.int64), TypeError, "x must be float16"),
        (infinite, ValueError, "x has NaN or infinite values"),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(
    x: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    pca = fitted(5, [rows(0, 30), rows(1, 30)])
    before = dict(vars(pca))
    with pytest.raises(error, match=message):
        pca.partial_fit(x())
    assert all(vars(pca)[name] is value for name, value in before.items())


def test_bad_numbers_of_components_are_refused() -> None:
    for n in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="n_components must be a positive integer, got"):
            IncrementalPCA(n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least n_components = 9 columns, got 8"):
        IncrementalPCA(9).partial_fit(torch.randn(20, 8))
