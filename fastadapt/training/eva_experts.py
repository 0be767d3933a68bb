"""EVA on experts: the principal components of the rows that each expert is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers.experts import AdapterExperts, ExpertsAdapter, gate_of
from ..operators.arithmetic import cast
from ..operators.expert_linear.block import dispatch
from ..operators.expert_linear.function import expert_linear
from .incremental_pca import IncrementalPCA


class _Expert:
    """The components of one expert's rows, of which there may be few in a batch: they wait until they are enough."""

    def __init__(self, n_components: int) -> None:
        self.pca = IncrementalPCA(n_components)
        self.waiting: list[Tensor] = []
        self.done = False

    def observe(self, rows: Tensor, tau: float) -> None:
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) < self.pca.n_components:
            return
        rows, self.waiting = torch.cat(self.waiting), []
        previous = self.pca.components
        self.pca.partial_fit(rows)
        self.done = bool(self.pca.converged(previous, tau).all())


class ExpertInputs:
    """The components of what each expert of a layer is given, for each of its weights that an adapter is on.

    Of the first product these are the rows of x that the router sends to the expert, of the second one what the gate
    makes of the first. All experts of a stack have its rank, whatever they explain: the stack is one tensor.
    path: of the layer. mask_of: which tokens of the batch that runs count, None for all.
    """

    def __init__(
        self,
        path: str,
        layer: AdapterExperts,
        adapter: ExpertsAdapter,
        tau: float,
        mask_of: Callable[[], Tensor | None],
    ) -> None:
        self.path, self.layer, self.adapter, self.tau, self.mask_of = path, layer, adapter, tau, mask_of
        self.experts: dict[str, list[_Expert]] = {}
        for name in adapter.parts:
            count, r, k = adapter.part(name).factors[0].shape
            if r > k:
                raise ValueError(
                    f"{path}.{name}: EVA needs a rank of at most {k}, the width of what each expert is given, got {r}: "
                    "lower r, or rank_pattern for it"
                )
            self.experts[name] = [_Expert(r) for _ in range(count)]
        self._hook: Any = None

    def watch(self, on: bool) -> None:
        if on and self._hook is None:
            self._hook = self.layer.register_forward_pre_hook(self.observe, with_kwargs=True)
        elif not on and self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def converged(self) -> bool:
        return all(expert.done for experts in self.experts.values() for expert in experts)

    def end_pass(self) -> None:
        """Waits no longer, after all batches, for experts that had too few rows in them: the next pass has the same."""
        for experts in self.experts.values():
            for expert in experts:
                if not expert.pca.n_seen:
                    expert.done, expert.waiting = True, []

    def observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, chosen, _ = self.layer.given(args, kwargs)
        mask = self.mask_of()
        if mask is not None:
            if mask.numel() != len(x):
                raise ValueError(
                    f"{self.path}: the layer's input must have {mask.numel()} rows to go with the batch's "
                    f"attention_mask or labels, got {len(x)}: leave it out with exclude_modules, or give batches "
                    "without attention_mask and use_label_mask=False to count every row"
                )
            counts = mask.reshape(-1).to(x.device)
            x, chosen = x[counts], chosen[counts]
        base, (up, down) = self.layer.base_layer, self.layer.parameter_names
        weight = self.layer.weight(up)
        found = dispatch(chosen, len(weight))
        rows = {up: cast(x, weight.dtype)[found.tokens]}
        if down in self.experts:
            rows[down] = gate_of(base)(expert_linear(rows[up], weight, None, found.offsets, bias=self.layer.bias(up)))
        ends = found.offsets.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for name, experts in self.experts.items():
            for expert, part in zip(experts, rows[name].split_with_sizes(sizes), strict=True):
                if len(part) and not expert.done:
                    try:
                        expert.observe(part, self.tau)
                    except ValueError as error:
                        raise ValueError(f"{self.path}.{name}: {error}") from None

    def factors(self, whiten: bool) -> dict[str, Tensor]:
        """A [E, r, in] by "path.name"; of an expert that had too few rows the A that it has."""
        found = {}
        for name, experts in self.experts.items():
            factor = self.adapter.part(name).factors[0].detach().clone()
            for rows, expert in zip(factor, experts, strict=True):
                if expert.pca.n_seen:
                    rows.copy_(expert.pca.whitened if whiten else expert.pca.components)
            found[f"{self.path}.{name}"] = factor
        return found

    @property
    def unseen(self) -> int:
        """How many experts had too few rows, of each weight by itself."""
        return sum(not expert.pca.n_seen for experts in self.experts.values() for expert in experts)
