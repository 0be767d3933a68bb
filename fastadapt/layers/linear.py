"""Linear layers with adapters, and the groups of them that read the same x: q, k and v; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import FLOATING
from ..operators.adapter_linear.function import adapter_linear, adapter_linear_group
from ..operators.adapter_update.function import adapter_update
from ..operators.calls import without_autocast
from ..operators.hadamard_linear.function import hadamard_linear
from ..reference import AdapterForm
from .dequantize import dequantized, is_packed, is_quantized, lends, lent_weight, promised_weight
from .layer import AdapterLayer, Reads
from .promise import Promise, made_again, promised, stored
from .sharing import MadeOf, circumstances, is_consumed, makers
from .ways import agree, dropped, is_packed_linear, is_plain, sample, shape_alone, undisturbed, weight_of

# As torch has it, before anybody replaces it.
_LINEAR = nn.Linear.forward


def plain_forward(base: nn.Module) -> Any:
    """The forward of torch's Linear, or transformers' Conv1D, which the layer is a kind of or stands for."""
    if isinstance(base, nn.Linear) or is_packed_linear(base):
        return _LINEAR
    kinds = [kind for kind in type(base).__mro__ if kind.__module__ == "transformers.pytorch_utils"]
    return kinds[0].__dict__.get("forward") if kinds else None


class AdapterLinear(AdapterLayer):
    """An adapter over nn.Linear, or over a layer that stores its weight as [in, out] (transformers' Conv1D).

    y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β with the active adapters' form; the base layer's result without any.
    `group` holds the layers that are expected to read the same x: they run as one.
    Shapes: x [..., in]; y [..., out].
    """

    def __init__(self, base_layer: nn.Module, backend: str = "auto", strategy: str = "auto") -> None:
        super().__init__(base_layer, backend, strategy)
        self.plain_forward = plain_forward(base_layer)
        self.fan_in_fan_out = self.plain_forward is not _LINEAR
        self.group: ProjectionGroup | None = None
        # The dtype of the model that it is in, for a base layer that does not tell in which it computes.
        self.around: torch.dtype | None = None

    @property
    def weight_matrix(self) -> Tensor:
        weight = self.base_weight
        return weight.T if self.fan_in_fan_out else weight

    @property
    def made_plain(self) -> bool:
        """Whether a merge has put a plain layer in the place of a quantised one."""
        return self._unmerged is not None and is_packed(self._unmerged[0]) and not is_packed(self.base_layer)

    def no_weight(self) -> Tensor:
        base = self.base_layer
        tensors = [*base.parameters(), *base.buffers()]
        floating = [tensor for tensor in tensors if tensor.dtype in FLOATING]
        like = floating[0] if floating else tensors[0].new_empty(0, dtype=self.around or torch.get_default_dtype())
        return shape_alone(base.out_features, base.in_features, like)

    def weight_for(self, reads: Reads) -> Tensor:
        base: Any = self.base_layer
        compiling = torch.compiler.is_compiling()  # which follows what is made, not what is promised
        if reads == "norms" and is_quantized(base) and not compiling:
            return promised_weight(base)
        weight = None if reads == "shape" else dequantized(base)
        weight = weight_of(base) if weight is None else weight
        if weight is not None:
            return weight.T if self.fan_in_fan_out else weight
        if reads == "values":
            raise ValueError(
                f"{self.name} has no weight in floating point, whose values the adapter computes with: give it another "
                "method, or leave it out"
            )
        if reads == "shape":
            return self.weight_matrix
        if compiling:
            return self._whole()
        sources = tuple(stored([*base.parameters(), *base.buffers()]))
        return promised(base.out_features, base.in_features, self.like, Promise(sources, self._whole, self._products))

    def _whole(self) -> Tensor:
        """The weight that the base layer's output tells."""
        with torch.no_grad(), undisturbed(self.base_layer), without_autocast(self.like):
            return self._by_unit_vectors()[0]

    def _products(self, A: Tensor) -> Tensor:
        """W0 Aᵀ [out, r]: A in the place of x."""
        A = A.to(self.like.dtype)
        with torch.no_grad(), undisturbed(self.base_layer), without_autocast(A):
            return (self.base_output(A) - self.base_output(torch.zeros_like(A[:1]))).T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if self.fan_in_fan_out else matrix

    def train(self, mode: bool = True) -> AdapterLinear:
        super().train(mode)
        if self.group is not None:
            self.group.forget()
        return self

    def grouped(self, x: Tensor) -> Tensor:
        y = None if self.group is None else self.group.output(self, x)
        return self.adapted(x) if y is None else y

    def adapted(self, x: Tensor) -> Tensor:
        weight = self.weight_matrix
        return adapter_linear(
            x,
            weight,
            self._form(weight, self.base_bias),
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
            strategy=self.strategy,
        )

    def _on_lent(self, x: Tensor) -> Tensor:
        weight, form = self.operands(x.dtype)
        p, training = self.dropout, self.training
        with made_again(weight):
            return adapter_linear(
                x, weight, form, dropout=p, training=training, backend=self.backend, strategy=self.strategy
            )

    def called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and lends(self.base_layer, x):
            grouped = None if self.group is None else self.group.output(self, x)
            return self._on_lent(x) if grouped is None else grouped
        y = self.base_output(x, *args, **kwargs)
        x = x.to(y.device)  # of the first of the layers that are offloaded it is not there yet
        reads, bias = self.reads, self.base_bias
        # A weight that is made at each access is not made for its shape.
        weight = shape_alone(y.shape[-1], x.shape[-1], y) if reads == "shape" else self.weight_for(reads)
        form = self.form_on(weight, bias)
        p = self.dropout if self.training else 0.0
        x_dropped, y_dropped = x, None
        if p:
            x_dropped = dropped(x, p)
            if form.dropout_on_base:
                y_dropped = self.base_output(x_dropped, *args, **kwargs)
        if form.U is not None and form.V is not None:
            more = hadamard_linear(x_dropped, weight, form.U, form.V, base=False, backend=self.backend)
            y, form = y + more.to(y.dtype), form._replace(U=None, V=None)
        return adapter_update(y, x_dropped, form, base_bias=bias, y_dropped=y_dropped)

    def trial(self) -> Tensor:
        return sample(1, 8, self.weight_matrix.shape[1], like=self.like, seed=0)

    def _effective(self, form: AdapterForm) -> tuple[Tensor, Tensor | None]:
        try:
            return super()._effective(form)
        except ValueError:
            x = self.trial()
            with undisturbed(self.base_layer), without_autocast(x):
                weight, shift = self._by_unit_vectors()
                if form.U is not None or not agree(F.linear(x, weight, shift), self.base_output(x)):
                    raise
            if self.base_bias is not None:
                shift = shift - self.base_bias
            elif not shift.any():  # a layer without a bias
                return weight, None
            return weight, shift if form.base_scale is None else form.base_scale * shift

    def _by_unit_vectors(self) -> tuple[Tensor, Tensor]:
        """(E [out, in], e [out]): what base(x) = E x + e is, if it is that, as differences from base(0)."""
        k = self.weight_matrix.shape[1]
        zeros = torch.zeros(1, k, dtype=self.like.dtype, device=self.like.device)
        shift = self.base_output(zeros)[0]
        columns = []
        for start in range(0, k, _UNIT_VECTORS):
            units = torch.zeros(min(_UNIT_VECTORS, k - start), k, dtype=zeros.dtype, device=zeros.device)
            units.diagonal(start).fill_(1)
            columns.append(self.base_output(units) - shift)
        return torch.cat(columns).T, shift

    def kind(self) -> tuple[Any, ...] | None:
        adapters = self.active_adapters
        base: Any = self._modules["base_layer"]
        plain = is_plain(base, self.plain_forward)
        if self.merged or not adapters or self.on_stream or not (plain or lends(base)):
            return None
        return (
            *(kind_of_weight(self.weight_matrix) if plain else kind_of_lent(base)),
            adapters[0].dropout if len(adapters) == 1 else self.dropout,
            self.training,
            self.backend,
            self.strategy,
        )

    def makers(self) -> list[Any]:
        base: Any = self._modules["base_layer"]
        own = base._parameters
        # A weight that is made anew at each access is never the same: its layer runs by itself.
        tensors = own.values() if "weight" in own else (base.weight, base.bias)
        return [self.training, *makers(self.active_adapters, *tensors)]

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, AdapterForm]:
        base: Any = self._modules["base_layer"]
        # A call that a layer with a weight of its own is spared.
        lent = type(base._parameters.get("weight")) is not nn.Parameter and lends(base)
        weight = lent_weight(base, dtype) if lent else self.weight_matrix
        return weight, self._form(weight, self.base_bias)

    def apart(self, x: Tensor) -> Tensor:
        """y for an x that no other layer reads."""
        group, self.group = self.group, None
        try:
            y: Tensor = self(x)
            return y
        finally:
            self.group = group


# So many unit vectors go through a layer at once.
_UNIT_VECTORS = 512

# After so many rounds in which a layer did not come for its output, the guess that the layers share x was wrong.
_MISSES = 2


class Member(Protocol):
    """What a group asks of a layer."""

    training: bool
    backend: str
    strategy: str

    @property
    def dropout(self) -> float: ...

    def kind(self) -> tuple[Any, ...] | None:
        """What layers that run together have in common: `kind_of_weight`, and more.

        None where a forward is not a form alone on a plain layer: nothing is active, merged, an adapter on the stream.
        """

    def makers(self) -> list[Any]:
        """Equal as long as the output would come out the same: see sharing.makers."""

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, AdapterForm]:
        """The base weight [out, in], in that dtype where it is made for the call, and the form on it."""


def kind_of_weight(weight: Tensor) -> tuple[Any, ...]:
    """What x has to go with, (in, device, trained), and what else of their weights layers have in common."""
    # A sharded or offloaded weight is not what it seems to be until its own layer is called.
    return weight.shape[-1], weight.device, weight.requires_grad, weight.dim(), weight.dtype, type(weight)


def kind_of_lent(base: Any) -> tuple[Any, ...]:
    """The same of a layer that lends a weight: in what it multiplies, and how many bits it has."""
    weight = base._parameters["weight"]
    return base.in_features, weight.device, weight.requires_grad, getattr(base, "compute_dtype", None), type(weight)


class ProjectionGroup:
    """Linear layers that are expected to read the same x, run as one when the first of them is called.

    That one computes the outputs of all (`adapter_linear_group`); the others find theirs when they are called with the
    very same tensor, unwritten since, in the same grad and autocast mode and with the same parameters. Otherwise a
    layer runs by itself, and after two rounds with outputs that nobody fetched so does every layer from then on.
    Layers without an active adapter, merged, in another mode, of another dtype or on another device stay out. Under
    dropout the layers of a group share one mask.
    """

    def __init__(self, layers: Sequence[Member]) -> None:
        self.layers = list(layers)
        self._round: MadeOf | None = None  # of the outputs that were not fetched yet, by id of their layer
        self._misses = 0

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start empty
        return {"layers": self.layers, "_round": None, "_misses": 0}

    def output(self, layer: Member, x: Tensor) -> Tensor | None:
        """y of `layer` for x, or None where it has to run by itself."""
        if self._misses >= _MISSES or torch.compiler.is_compiling() or x.is_inference():
            return None
        current = self._round
        if current is not None:
            if current.of(x):
                before, waiting = current.made
                y, made_by = waiting.pop(id(layer), (None, None))
                if not waiting:
                    self._round = None
                if y is not None and before == circumstances(x) and made_by == layer.makers() and not is_consumed(y):
                    fetched: Tensor = y
                    return fetched
            else:
                self.drop(current)
        return self._lead(layer, x) if self._misses < _MISSES else None

    def forget(self) -> None:
        """Drops outputs that were not fetched."""
        self._round = None

    def drop(self, old: MadeOf) -> None:
        """Forgets a round; outputs that were not fetched count as a miss.

        Not in a backward pass: there a checkpointed forward runs again, and stops as soon as it has what it needs.
        """
        if old is self._round:
            self._round = None
            if torch._C._current_graph_task_id() == -1:
                self._misses += 1

    def _lead(self, layer: Member, x: Tensor) -> Tensor | None:
        kind = layer.kind()
        if kind is None or kind[:3] != (x.shape[-1], x.device, False):
            return None
        others = [other for other in self.layers if other is not layer and other.kind() == kind]
        if not others or layer not in self.layers:
            return None
        members = [layer, *others]
        weights, forms = [], []
        for member in members:
            weight, form = member.operands(x.dtype)
            if form.U is not None:  # it would run by itself, in what looks like a group
                return None
            weights.append(weight)
            forms.append(form)
        with made_again(*weights):
            y, *ys = adapter_linear_group(
                x,
                weights,
                forms,
                dropout=layer.dropout,
                training=layer.training,
                backend=layer.backend,
                strategy=layer.strategy,
            )
        waiting = {id(member): (other, member.makers()) for member, other in zip(others, ys, strict=True)}
        self._round = MadeOf(x, (circumstances(x), waiting), self.drop)
        return y
