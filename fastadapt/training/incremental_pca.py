"""Principal components of rows that come in batches, without keeping any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, shape_error

_SEED = 42
_ITERATIONS = 4
# A singular value below this share of the largest is rounding: the data do not reach that far.
_NOISE = 8 * torch.finfo(torch.float32).eps


class IncrementalPCA:
    """The first n principal components of all rows seen so far.

        [σ ⊙ V ; X − μ_X ; √(N/(N + M)·M) (μ − μ_X)] = U diag(σ') V'ᵀ,   ratio_j = σ'_j² / ((N + M) Σ var)

    N rows with mean μ have been seen, the batch X has M with mean μ_X; μ and var, over all rows, are kept in fp64. The
    decomposition is a randomised one with a seed of its own. Each row of V' has its largest |entry| positive.
    n_seen is 0 before the first batch, and there are no components then.
    Shapes: x [M, K]; components [n, K], rows orthonormal; singular_values [n], falling; explained_variance_ratio [n];
    mean, variance [K].
    Raises ValueError for an n_components that is no positive integer.
    Source: Ross et al. 2008, doi:10.1007/s11263-007-0075-7, section 3.1; Halko et al. 2009, arXiv:0909.4061.
    """

    def __init__(self, n_components: int) -> None:
        if not isinstance(n_components, int) or isinstance(n_components, bool) or n_components < 1:
            raise ValueError(f"n_components must be a positive integer, got {n_components!r}")
        self.n_components = n_components
        self.n_seen = 0
        self.components = torch.zeros(0, 0)
        self.singular_values = torch.zeros(0)
        self.explained_variance_ratio = torch.zeros(0)
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.variance = torch.zeros(0, dtype=torch.float64)

    def partial_fit(self, x: Tensor) -> IncrementalPCA:
        """Takes a batch of rows x [M, K] into account and returns itself.

        Raises ValueError for another shape, fewer rows or columns than components, NaN or infinite values; TypeError
        for numbers that are not floating-point. The components are then as they were.
        """
        self._check(x)
        if x.device.type == "mps":  # it has no fp64
            x = x.cpu()
        x = x.detach() if x.dtype == torch.float64 else x.detach().float()
        m = x.shape[0]
        batch_mean = x.sum(0, dtype=torch.float64) / m
        if not torch.isfinite(batch_mean).all():
            raise ValueError("x has NaN or infinite values: its components are not defined")
        center = batch_mean.to(x.dtype)
        rows = x - center
        # Around the mean that was rounded to x's dtype; what the rounding adds is taken off again.
        squares = rows.square().sum(0, dtype=torch.float64) - m * (batch_mean - center).square()
        n, total = self.n_seen, self.n_seen + m
        mean, variance = batch_mean, squares.clamp_min(0) / m
        if n:
            gap = self.mean - batch_mean
            mean = (n * self.mean + m * batch_mean) / total
            variance = (n * self.variance + m * variance + n * m / total * gap.square()) / total
            correction = (n / total * m) ** 0.5 * (self.mean - center)
            # The mean is fp64 and makes the stack fp64: what many batches add up to is not lost in rounding.
            rows = torch.cat([self.singular_values[:, None] * self.components, rows, correction[None]])
        components, sigma = self._decomposed(rows)
        scatter = total * variance.sum()
        self.components, self.singular_values = components, sigma
        self.explained_variance_ratio = sigma.square() / scatter.clamp_min(torch.finfo(torch.float64).tiny)
        self.mean, self.variance, self.n_seen = mean, variance, total
        return self

    @property
    def in_noise(self) -> Tensor:
        """Which components are directions in which the rows do not vary: any orthonormal choice is as good. [n]"""
        return self.singular_values <= _NOISE * self.singular_values.amax() if self.n_seen else torch.zeros(0).bool()

    @property
    def whitened(self) -> Tensor:
        """The components, each by the root of its singular value; one in noise has no scale to take out. [n, K]"""
        return self.components / self.singular_values.where(~self.in_noise, 1.0)[:, None].sqrt()

    def converged(self, previous: Tensor, tau: float) -> Tensor:
        """Which components have a cosine similarity of at least tau with those of before a batch; [n], boolean.

        None has before there were two batches. Components that are in noise have: no batch could settle them.
        """
        if previous.shape != self.components.shape:
            return torch.zeros(self.n_components, dtype=torch.bool)
        return (F.cosine_similarity(self.components, previous) >= tau) | self.in_noise

    def _check(self, x: Tensor) -> None:
        required = f"[rows, {self.mean.numel() if self.n_seen else 'columns'}]"
        if x.dim() != 2 or (self.n_seen and x.shape[1] != self.mean.numel()):
            raise shape_error("x", required, x)
        check_floating("x", x)
        for size, kind in zip(x.shape, ("rows", "columns"), strict=True):
            if size < self.n_components:
                raise ValueError(
                    f"x must have at least n_components = {self.n_components} {kind}, got {size}: give larger batches "
                    "or ask for fewer components"
                )

    def _decomposed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first n right-singular vectors of `rows` as rows, and their singular values."""
        n = self.n_components
        with _seeded(rows.device):
            _, sigma, v = torch.svd_lowrank(rows, q=2 * n, niter=_ITERATIONS)
        components = v[:, :n].T
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        # The products and the clone are tensors of their own: a slice would keep all 2n components alive.
        return (components * torch.where(largest < 0, -1, 1)).contiguous(), sigma[:n].clone()


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Draws of random numbers on the device that are the same each time, and that the caller's do not notice."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # torch.manual_seed would seed every device, and only this one's state is restored.
        generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        generator.manual_seed(_SEED)
        yield
