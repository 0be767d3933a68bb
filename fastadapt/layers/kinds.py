"""Layers that are not linear, with adapters: embeddings, convolutions, norms, and any module around a stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import AdapterLayer


class AdapterEmbedding(AdapterLayer):
    """A low-rank adapter over nn.Embedding: y = E[i] + h · B A[:, i]. Eager PyTorch only.

    In the matrix view the embedding is a linear layer on one-hot tokens: weight [D, V], A [r, V], B [D, r].
    """

    @property
    def weight_matrix(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    @property
    def base_bias(self) -> nn.Parameter | None:
        return None

    def adapted(self, x: Tensor) -> Tensor:
        form = self._low_rank_form()
        base = self.base_layer
        u = F.embedding(
            x, form.A.T, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        )
        y: Tensor = base(x)
        return y + (u @ form.whole_up().T).to(y.dtype)


class AdapterConv2d(AdapterLayer):
    """A low-rank adapter over nn.Conv2d: y = W0 * x + h · B (d ⊙ (A * x̃)), A with the base kernel, B 1×1.

    Eager PyTorch only. In the matrix view a patch is a token: weight [out, in·kh·kw], A [r, in·kh·kw], B [out, r].
    """

    @property
    def weight_matrix(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view_as(self.base_layer.weight)

    def adapted(self, x: Tensor) -> Tensor:
        form = self._low_rank_form()
        base = self.base_layer
        if form.base_scale is not None:
            # One product less than scaling y, which is larger than the weight.
            weight = (form.base_scale[:, None, None, None] * base.weight).to(base.weight.dtype)
            y: Tensor = base._conv_forward(x, weight, None)
        else:
            y = base(x) if form.bias is base.bias else base._conv_forward(x, base.weight, None)
        if form.A.shape[0]:  # torch has no convolution to zero channels
            kernel = form.A.unflatten(1, base.weight.shape[1:])
            u = base._conv_forward(F.dropout(x, self.dropout, self.training).to(kernel.dtype), kernel, None)
            low_rank = F.conv2d(u, form.whole_up()[:, :, None, None])
            y = y + low_rank.to(y.dtype)
        has_bias = form.bias is base.bias and form.base_scale is None
        return y if has_bias or form.bias is None else y + form.bias.to(y.dtype)[:, None, None]


class AdapterNorm(AdapterLayer):
    """An adapter over nn.LayerNorm: y = g ⊙ (w ⊙ x̂) + β. Eager PyTorch only.

    In the matrix view it is a diagonal: weight [out, 1], A [0, 1], B [out, 0].
    """

    @property
    def weight_matrix(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight[:, None]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix[:, 0]

    def adapted(self, x: Tensor) -> Tensor:
        base, form = self.base_layer, self._low_rank_form()
        weight = base.weight if form.base_scale is None else (form.base_scale * base.weight).to(base.weight.dtype)
        bias = None if form.bias is None else form.bias.to(weight.dtype)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)


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

    def merge(self) -> None:
        if self.active:
            self.merged_tensors()  # says why it cannot
