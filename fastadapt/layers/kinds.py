"""Layers that are not linear, with adapters: embeddings, convolutions, norms, and any module around a stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..forms import merged_weight
from ..operators.adapter_update.function import shift
from ..reference import AdapterForm
from .layer import AdapterLayer
from .ways import agree, sample, with_parameters, with_tensors


def _onto(y: Tensor, form: AdapterForm, base_bias: Tensor | None, low_rank: Tensor | None, *ones: int) -> Tensor:
    """g ⊙ y + low_rank + (β − g ⊙ b0), in y's dtype; `ones` are the dimensions of y behind its features."""
    added = y if form.base_scale is None else y * form.base_scale.view(-1, *ones)
    if low_rank is not None:
        added = added + low_rank.to(y.dtype)
    rest = shift(form, base_bias, torch.promote_types(y.dtype, torch.float32))
    return (added if rest is None else added + rest.view(-1, *ones)).to(y.dtype)


class AdapterEmbedding(AdapterLayer):
    """A low-rank adapter over nn.Embedding: y = E[i] + h · B A[:, i]. Eager PyTorch only.

    In the matrix view the embedding is a linear layer on one-hot tokens: weight [D, V], A [r, V], B [D, r]. What looks
    its rows up in a way of its own, scales them, or counts positions, does the same with Aᵀ in the place of E.
    """

    plain_forward = staticmethod(nn.Embedding.forward)
    _looks_up = False  # as far as it was found out

    @property
    def weight_matrix(self) -> Tensor:
        return self.base_weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    @property
    def base_bias(self) -> nn.Parameter | None:
        return None

    def merge(self, *, dequantize: bool = False, requantize: bool = False) -> float:
        if self.active and getattr(self.base_layer, "max_norm", None) is not None:
            raise ValueError(
                "its rows are brought down to max_norm where they are looked up, merged ones too, and without a merge "
                "the adapter's part is not: keep the adapter beside it, or set max_norm to None"
            )
        return super().merge(dequantize=dequantize, requantize=requantize)

    def adapted(self, x: Tensor) -> Tensor:
        form = self._low_rank_form()
        base = self.base_layer
        u = F.embedding(
            x, form.A.T, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        )
        y: Tensor = base(x)
        return y + (u @ form.whole_up().T).to(y.dtype)

    def called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_output(x, *args, **kwargs)
        form = self._low_rank_form()
        if not self._looks_up and not torch.compiler.is_compiling():
            self._check_looks_up(x, *args, **kwargs)
        u = self._looked_up(form.A.T, x, *args, **kwargs).to(y.device)
        if torch.is_grad_enabled() and form.A.requires_grad and not u.requires_grad:
            raise ValueError(f"{self.name} lets no gradient through to its weight: name it in exclude_modules")
        return y + (u @ form.whole_up().T).to(y.dtype)

    def _check_looks_up(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError where what the layer gives is not a product of rows of its weight, as a norm's is not."""
        table = sample(self.base_weight.shape[0], 3, like=self.like, seed=0)
        with torch.no_grad():
            once, twice = (self._looked_up(size * table, x, *args, **kwargs) for size in (1, 2))
        if once.shape[-1:] != (3,) or not agree(twice, 2 * once):
            raise ValueError(f"{self.name} does more than look rows of its weight up: name it in exclude_modules")
        self._looks_up = True

    def _looked_up(self, table: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer's own forward gives, without hooks, for a table [V, r] in the place of its weight."""
        rows: Tensor = with_tensors(self.base_layer, table, None).forward(x, *args, **kwargs)
        return rows

    def trial(self) -> Tensor:
        # Ones are tokens, and a mask where a layer counts positions.
        return torch.ones(1, 4, dtype=torch.long, device=self.like.device)

    def formula(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._looked_up(weight, x)


class AdapterConv2d(AdapterLayer):
    """A low-rank adapter over nn.Conv2d: y = W0 * x + h · B (d ⊙ (A * x̃)), A with the base kernel, B 1×1.

    Eager PyTorch only. In the matrix view a patch is a token: weight [out, in·kh·kw], A [r, in·kh·kw], B [out, r].
    """

    plain_forward = staticmethod(nn.Conv2d.forward)

    @property
    def weight_matrix(self) -> Tensor:
        return self.base_weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view_as(self.base_weight)

    def adapted(self, x: Tensor) -> Tensor:
        form = self._low_rank_form()
        base = self.base_layer
        if form.base_scale is not None:
            # One product less than scaling y, which is larger than the weight.
            weight = (form.base_scale[:, None, None, None] * base.weight).to(base.weight.dtype)
            y: Tensor = base._conv_forward(x, weight, None)
        else:
            y = base(x) if form.bias is base.bias else base._conv_forward(x, base.weight, None)
        low_rank = self._low_rank(x, form)
        if low_rank is not None:
            y = y + low_rank.to(y.dtype)
        has_bias = form.bias is base.bias and form.base_scale is None
        return y if has_bias or form.bias is None else y + form.bias.to(y.dtype)[:, None, None]

    def called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_output(x, *args, **kwargs)
        form = self._low_rank_form()
        low_rank = self._low_rank(x.to(y.device), form)
        if low_rank is not None and low_rank.shape != y.shape:
            raise ValueError(
                f"{self.name} gives {list(y.shape)} where its kernel, stride and padding make {list(low_rank.shape)}: "
                "name it in exclude_modules"
            )
        return _onto(y, form, self.base_bias, low_rank, 1, 1)

    def _low_rank(self, x: Tensor, form: AdapterForm) -> Tensor | None:
        """h · B (d ⊙ (A * x̃)), None for a form without ranks: torch has no convolution to zero channels."""
        if not form.A.shape[0]:
            return None
        base = self.base_layer
        kernel = form.A.unflatten(1, (base.in_channels, *base.kernel_size))
        x_dropped = F.dropout(x, self.dropout, self.training).to(kernel.dtype)
        u = nn.Conv2d._conv_forward(base, x_dropped, kernel, None)
        return F.conv2d(u, form.whole_up()[:, :, None, None])

    def trial(self) -> Tensor:
        base = self.base_layer
        steps = zip(base.kernel_size, base.dilation, base.stride, strict=True)
        sizes = [2 * (size - 1) * dilation + 2 * stride + 1 for size, dilation, stride in steps]
        return sample(1, base.in_channels, *sizes, like=self.like, seed=0)


class AdapterNorm(AdapterLayer):
    """An adapter over nn.LayerNorm: y = g ⊙ (w ⊙ x̂) + β. Eager PyTorch only.

    In the matrix view it is a diagonal: weight [out, 1], A [0, 1], B [out, 0].
    """

    plain_forward = staticmethod(nn.LayerNorm.forward)

    @property
    def weight_matrix(self) -> Tensor:
        return self.base_weight[:, None]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix[:, 0]

    def adapted(self, x: Tensor) -> Tensor:
        base, form = self.base_layer, self._low_rank_form()
        weight = base.weight if form.base_scale is None else (form.base_scale * base.weight).to(base.weight.dtype)
        bias = None if form.bias is None else form.bias.to(weight.dtype)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)

    def called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _onto(self.base_output(x, *args, **kwargs), self._low_rank_form(), self.base_bias, None)

    def trial(self) -> Tensor:
        return sample(3, *self.base_layer.normalized_shape, like=self.like, seed=0)


class AdapterModule(AdapterLayer):
    """Any module with adapters that work on the stream of tokens: they have no form here."""

    @property
    def weight_matrix(self) -> Tensor:
        raise ValueError(
            f"{type(self.base_layer).__name__} has no weight as a matrix: its adapters work on the stream of tokens"
        )

    @property
    def like(self) -> Tensor:
        first: Tensor | None = next(self.base_layer.parameters(), None)
        if first is None:
            raise ValueError(
                f"{type(self.base_layer).__name__} has no parameters, which an adapter on it would take device and "
                "dtype from: target the module around it"
            )
        return first

    def merge(self, *, dequantize: bool = False, requantize: bool = False) -> float:
        if self.active:
            self.merged_form()  # says why it cannot
        return 0.0


class AdapterParameter(AdapterLayer):
    """A low-rank adapter on the weight [out, in] of a module that is no linear layer, such as a router of experts.

    Its own forward runs, with W' = diag(g) W0 + diag(h) B diag(d) A in the place of W0, which has to be small: W' is
    made at each call. What the module does with W' is its own affair, so that no dropout acts on A's input.
    """

    @property
    def reason(self) -> str:
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._unmerged is not None or not self.active:
            return self.base_layer(*args, **kwargs)
        form = self._low_rank_form()
        tensors = {"weight": merged_weight(self.base_weight, form)}
        if form.bias is not None and form.bias is not self.base_bias:
            tensors["bias"] = form.bias.to(self.base_weight.dtype)
        base: Any = self.base_layer
        # Compiled code swaps nothing while it runs; a patched forward, as offloading's, knows this module alone.
        if torch.compiler.is_compiling() or "forward" in base.__dict__ or not tensors.keys() <= base._parameters.keys():
            return functional_call(base, tensors, args, kwargs)
        return with_parameters(base, tensors)(*args, **kwargs)
