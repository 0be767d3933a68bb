"""vLLM's linear layers with LoRA, with adapter forms in the place of padded factors; on CPUs in stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ...reference import AdapterForm
from ...serving import AdapterBatch, Columns, FormPages, FormStacks, LayerShape, PackedUpdate, Shard
from .shards import Piece, rows_of

# vLLM's classes that get a fast kind. Those of fully sharded LoRAs do not: see FastWorkerManager.
LINEAR = frozenset(
    {
        "ColumnParallelLinearWithLoRA",
        "MergedColumnParallelLinearWithLoRA",
        "MergedColumnParallelLinearVariableSliceWithLoRA",
        "QKVParallelLinearWithLoRA",
        "MergedQKVParallelLinearWithLoRA",
        "RowParallelLinearWithLoRA",
        "ReplicatedLinearWithLoRA",
    }
)

# Layers of subclasses may compute more than their product: they stay vLLM's own.
_PLAIN = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

# So many unit vectors go through a layer at once.
_UNIT_VECTORS = 256

# Steps of a static scale that inputs of 8 bits, float or integer, hold exactly.
_STEPS = 64.0

Function = TypeVar("Function", bound=Callable[..., Any])


class Slice(NamedTuple):
    """One layer of the adapter's model in this one: its path there as vLLM spells it, its shape, the part that is here,
    the columns of y that are its own, and the adapters in it by slot."""

    path: str
    shape: LayerShape
    shard: Shard
    start: int
    stop: int
    forms: FormStacks | FormPages


def outside_inference(function: Function) -> Function:
    """The function with the tensors that it makes as ordinary ones, without gradients.

    vLLM loads adapters in the middle of a step, in inference mode, and between steps, where tensors of that mode could
    not be written.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


class FastLinear(nn.Module):
    """What comes before one of vLLM's classes: y = quant_method(x) by vLLM's own kernel, then the forms onto slices of
    it, in place. The weight is never read: it may be packed or quantised."""

    base_layer: Any
    punica_wrapper: Any
    input_size: int
    device: torch.device
    slices: Sequence[Slice] = ()
    _squares: Tensor | None = None
    _base_bias: Tensor | None = None

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, **kwargs: Any) -> bool:
        taken: bool = super().can_replace_layer(source_layer=source_layer, **kwargs)  # type: ignore[misc]
        return taken and type(source_layer) in _PLAIN

    def create_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's own stacks without memory: its warm-up reads their shapes."""
        device, self.device = self.device, torch.device("meta")
        super().create_lora_weights(*args, **kwargs)  # type: ignore[misc]
        self.device = device

    def bind(self, name: str, paths: Sequence[str], dtype: torch.dtype, context: dict[str, Any]) -> None:
        """Makes the slices. name: of this layer. paths: of the layers that are packed in it, or its own. dtype: of the
        engine. context: the engine's layers that operators find by name."""
        base = self.base_layer
        by_columns = isinstance(base, RowParallelLinear)
        width = self.input_size
        columns = slice(width * base.tp_rank, width * (base.tp_rank + 1)) if by_columns else slice(None)
        whole_width = base.input_size if by_columns else width
        places = list(zip(paths, rows_of(_pieces(base), len(paths)), strict=False))
        rooms = self.rooms([(rows.stop - rows.start, width) for _, rows in places], dtype)
        self.slices = [
            Slice(
                path,
                LayerShape(rows.whole, whole_width, base.bias is not None),
                Shard(rows.rows, columns),
                rows.start,
                rows.stop,
                room,
            )
            for (path, rows), room in zip(places, rooms, strict=True)
        ]

    def rooms(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Sequence[FormStacks | FormPages]:
        """Where the adapters of slices of these shapes (N, K) are."""
        raise NotImplementedError

    def check(self, forms: Sequence[AdapterForm | None]) -> None:
        """Raises ValueError for forms, one a slice, that there is no room for."""

    @property
    def adds_bias(self) -> bool:
        """Whether this process adds what an adapter adds to the bias: of partial sums one does."""
        return not isinstance(self.base_layer, RowParallelLinear) or self.base_layer.tp_rank == 0

    @property
    def norms_are_partial(self) -> bool:
        return isinstance(self.base_layer, RowParallelLinear) and self.base_layer.tp_size > 1

    @outside_inference
    def reset_lora(self, index: int) -> None:
        for part in self.slices:
            part.forms.clear(index)

    @outside_inference
    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Enters forms, one a slice or None for the base model's, where lora_b is None; else vLLM's factors."""
        self.reset_lora(index)
        forms = lora_a if lora_b is None else self._of_factors(lora_a, lora_b)
        for part, form in zip(self.slices, forms, strict=True):
            if form is not None:
                part.forms.write(index, form)

    def products(self, A: Tensor) -> Tensor:
        """W0 Aᵀ of what is here of the weight, in A's dtype. Shapes: A [r, columns]; result [outputs, r]."""
        scale, size = getattr(self.base_layer, "input_scale", None), None
        if isinstance(scale, Tensor):
            # A kernel with one scale for all inputs cuts off what is large for activations, and rounds a unit vector
            # always the same way: so the largest of each row is made what it holds exactly.
            size = _STEPS * scale.max().to(A.dtype) / A.abs().amax(1, keepdim=True).clamp(min=1e-30)
        x = (A if size is None else A * size).to(self.base_layer.params_dtype).contiguous()
        y: Tensor = self.base_layer.quant_method.apply(self.base_layer, x, None)
        y = y.to(A.dtype)
        return (y if size is None else y / size).T

    def squares(self) -> Tensor:
        """‖W0‖² by rows of what is here of the weight, in fp32: [outputs]. Kept."""
        if self._squares is None:
            total: Tensor | None = None
            for start in range(0, self.input_size, _UNIT_VECTORS):
                units = torch.zeros(min(_UNIT_VECTORS, self.input_size - start), self.input_size, device=self.device)
                units.diagonal(start).fill_(1)
                part = self.products(units).square().sum(1)
                total = part if total is None else total.add_(part)
            self._squares = total
        assert self._squares is not None
        return self._squares

    def base_bias(self) -> Tensor | None:
        """b0 of what is here, in the host's memory: [outputs]. Kept.

        As the product adds it: the kernels of quantised weights may keep it padded and in an order of their own.
        """
        if self._base_bias is None and self.base_layer.bias is not None:
            nothing = torch.zeros(1, self.input_size, dtype=self.base_layer.params_dtype, device=self.device)
            added: Tensor = self.base_layer.quant_method.apply(self.base_layer, nothing, self.base_layer.bias)
            self._base_bias = added[0].cpu()
        return self._base_bias

    def forget(self) -> None:
        """Drops what was made of the weight and the bias, which may be others now."""
        self._squares = self._base_bias = None

    def _of_factors(self, lora_a: Any, lora_b: Any) -> list[AdapterForm | None]:
        """Forms of vLLM's factors: of whole layers, or in its warm-up of what is here of them."""
        if isinstance(lora_a, Tensor):
            lora_a, lora_b = [lora_a], [lora_b]
        forms: list[AdapterForm | None] = []
        for part, A, B in zip(self.slices, lora_a, lora_b, strict=True):
            if A is None or B is None:
                forms.append(None)
                continue
            n, k = part.forms.shape
            A = A if A.shape[1] == k else A[:, part.shard.columns]
            B = B if B.shape[0] == n else B[part.shard.rows]
            forms.append(AdapterForm(A, B))
        return forms


class StackedLinear(FastLinear):
    """On CPUs: the forms in stacks, and what is done for a batch found when it comes."""

    _batch: AdapterBatch | None = None
    _update: PackedUpdate

    def rooms(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[FormStacks]:
        return [FormStacks(shape, dtype) for shape in shapes]

    @outside_inference
    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)
        self._batch = None

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        batch = self.punica_wrapper.batch
        update = self._update if batch is self._batch else self._updated(batch)
        base: Any = self._modules["base_layer"]
        product: Callable[..., Tensor] = base.quant_method.apply
        if update.idle:
            return product(base, x, bias)
        # A g scales the product alone: then the bias comes behind it, for all slices.
        y = product(base, x, None if update.scales else bias)
        flat = y.dim() == 2
        update(
            y if flat else y.view(-1, y.shape[-1]),
            x if flat else x.reshape(-1, x.shape[-1]),
            bias if update.scales else None,
        )
        return y

    def _updated(self, batch: AdapterBatch) -> PackedUpdate:
        """What is done for a batch, kept until another one comes, or another adapter."""
        columns = [
            Columns(part.start, part.stop, part.forms) for part in self.slices if isinstance(part.forms, FormStacks)
        ]
        self._batch, self._update = batch, PackedUpdate(batch, columns, self.base_layer.params_dtype)
        return self._update


def _pieces(base: Any) -> list[Piece]:
    if isinstance(base, QKVParallelLinear):
        size, rank = base.head_size, base.tp_rank
        value_size = getattr(base, "v_head_size", size)
        place = rank // base.num_kv_head_replicas
        return [
            Piece(base.total_num_heads * size, base.num_heads * size, rank),
            Piece(base.total_num_kv_heads * size, base.num_kv_heads * size, place),
            Piece(base.total_num_kv_heads * value_size, base.num_kv_heads * value_size, place),
        ]
    if isinstance(base, MergedColumnParallelLinear):
        return [Piece(size, size // base.tp_size, base.tp_rank) for size in base.output_sizes]
    if isinstance(base, ColumnParallelLinear):
        return [Piece(base.output_size, base.output_size_per_partition, base.tp_rank)]
    return [Piece(base.output_size, base.output_size)]


def fast_class(kind: type, fast: type[FastLinear]) -> type:
    """One of vLLM's classes with a kind of FastLinear before it."""
    return type(f"Fast{kind.__name__}", (fast, kind), {})
