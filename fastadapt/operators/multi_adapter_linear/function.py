"""`multi_adapter_linear`: many adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arithmetic import cast
from ..backends import resolve_backend
from ..calls import check_same_dtype, compute_dtype, rows_of, without_autocast
from . import op
from .batch import AdapterBatch, LayerForms
from .checks import check_multi_adapter_linear, check_multi_adapter_update, check_tokens


def multi_adapter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: AdapterBatch, layer: LayerForms, *, backend: str = "auto"
) -> Tensor:
    """Many adapters in one batch: each token through the form of its own adapter, or through the base layer.

        y_t = g[a] ⊙ (W0 x_t) + h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + β[a]

    a is the adapter of token t, k its factor group: VeRA adapters of one key share a pair (A, B). Methods and ranks
    may be mixed. Base tokens are F.linear's on the same batch, bit for bit; on Triton they are within rounding of it
    where the layer has a bias and some adapter scales the base path. For inference: no gradients.
    Shapes: x [..., K], its tokens as many as the batch's, row by row; weight [N, K]; bias [N]; y [..., N].
    Raises ValueError on mismatched shapes, devices, another number of tokens, an x that requires grad, a backend that
    cannot run; TypeError on dtypes that cannot be mixed. backend: "auto", "triton" or "eager".

    >>> layer = torch.nn.Linear(16, 8)
    >>> pool = AdapterPool(layer, {"layer": layer}, budget=1 << 16)
    >>> x, forms = torch.randn(2, 3, 16), pool.layer("layer")
    >>> with pool.hold([None, None]) as held:  # for each row the name of an adapter, or None for the base model
    ...     multi_adapter_linear(x, layer.weight, layer.bias, held.batch(3), forms).shape
    torch.Size([2, 3, 8])
    """
    (y,) = multi_adapter_linear_group(x, [weight], [bias], batch, [layer], backend=backend)
    return y


def multi_adapter_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    batch: AdapterBatch,
    layers: Sequence[LayerForms],
    *,
    backend: str = "auto",
) -> list[Tensor]:
    """multi_adapter_linear on layers that read one x (q, k and v; gate and up): on Triton two launches for all.

    The entries of weights, biases and layers, and the results, are by layer; each is what the layer alone would give.
    Raises ValueError and TypeError as that does, and ValueError for lists of different lengths, none or layers whose
    factors are kept in several dtypes.

    >>> layers = {"q": torch.nn.Linear(16, 8), "k": torch.nn.Linear(16, 4)}
    >>> pool = AdapterPool(torch.nn.ModuleDict(layers), layers, budget=1 << 16)
    >>> x, forms = torch.randn(2, 3, 16), [pool.layer("q"), pool.layer("k")]
    >>> weights, biases = zip(*[(layer.weight, layer.bias) for layer in layers.values()])
    >>> with pool.hold([None, None]) as held:
    ...     [tuple(y.shape) for y in multi_adapter_linear_group(x, weights, biases, held.batch(3), forms)]
    [(2, 3, 8), (2, 3, 4)]
    """
    if not weights or not len(weights) == len(biases) == len(layers):
        raise ValueError(
            "weights, biases and layers must have one entry a layer, one at least, got "
            f"{len(weights)}, {len(biases)} and {len(layers)}"
        )
    for weight, bias in zip(weights, biases, strict=True):
        check_multi_adapter_linear(x, weight, bias, len(batch))
        check_same_dtype(x, weight)
    resolved = _resolved(backend, x, weights[0], layers)
    dtype = compute_dtype(x)
    with torch.no_grad(), without_autocast(x):
        rows = cast(rows_of(x), dtype)
        ys = op.run(rows, [cast(weight, dtype) for weight in weights], biases, batch, layers, resolved)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def multi_adapter_update(
    ys: Sequence[Tensor],
    x: Tensor,
    biases: Sequence[Tensor | None],
    batch: AdapterBatch,
    layers: Sequence[LayerForms],
    *,
    backend: str = "auto",
) -> None:
    """Many adapters in one batch on what any layers gave for x: quantised, packed, sharded, an engine's own. In place:

        y_t <- g[a] ⊙ y_t + h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + β[a]

    y comes in as W0 x without the layer's bias b0 where that is given in `biases`; β = b0 + what the adapter adds. A
    layer without one, or in which no adapter has a g, may as well have added its own. The entries of ys, biases and
    layers are by layer: q, k and v as column slices of one packed product, say. Base tokens get b0 and nothing else.
    For inference: no gradients.
    Shapes: ys [..., N] of as many tokens as the batch, viewed as [M, N] without a copy, rows contiguous; x [..., K];
    biases [N]. Dtypes: each y has x's.
    Raises ValueError and TypeError as multi_adapter_linear_group does, and ValueError for a y that is no such view.

    >>> packed, forms = torch.nn.Linear(16, 12), FormStacks((8, 16), torch.float32)
    >>> forms.write(0, AdapterForm(torch.randn(4, 16), torch.randn(8, 4)))
    >>> x = torch.randn(3, 16)
    >>> y = packed(x).detach()
    >>> q, kv = y[:, :8], y[:, 8:].clone()
    >>> multi_adapter_update([q], x, [None], AdapterBatch([0, -1, 0]), [forms.layer])
    >>> torch.equal(y[:, 8:], kv), torch.equal(y[1], packed(x)[1])
    (True, True)
    """
    if not ys or not len(ys) == len(biases) == len(layers):
        raise ValueError(
            "ys, biases and layers must have one entry a layer, one at least, got "
            f"{len(ys)}, {len(biases)} and {len(layers)}"
        )
    check_tokens(x, len(batch))
    views = []
    for y, bias in zip(ys, biases, strict=True):
        check_multi_adapter_update(y, x, bias)
        views.append(y if y.dim() == 2 else y.view(-1, y.shape[-1]))
    resolved = _resolved(backend, x, ys[0], layers)
    with torch.no_grad(), without_autocast(x):
        op.update(views, rows_of(x), biases, batch, layers, resolved)


def _resolved(backend: str, x: Tensor, other: Tensor, layers: Sequence[LayerForms]) -> str:
    """The backend that runs layers together. Raises ValueError where there is none."""
    kept = {layer.tables.pages.dtype for layer in layers if layer.tables is not None}
    if len(kept) > 1:
        raise ValueError(
            f"layers must keep their factors in one dtype, got {' and '.join(sorted(map(str, kept)))}: "
            "call multi_adapter_linear on each"
        )
    resolved = resolve_backend(backend, x, other)
    if resolved == "reference":
        raise ValueError('backend "reference" has no pages: call reference.multi_adapter_linear_reference with forms')
    return resolved
