"""EVA: a LoRA starts from what its layers are given, and ranks go where they explain most of it.

The inputs of the adapter's linear layers and experts are observed while the base model runs over batches, their
principal components become A, and the ranks that all linear layers have together are dealt out anew. The result is an
ordinary LoRA or DoRA.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checks import shape_error
from ..layers.experts import AdapterExperts, ExpertsAdapter
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..methods import EVAConfig, LoRAConfig, LoRADropConfig
from ..methods.config import pattern_of
from ..methods.lora import pattern_key
from ..model.adapted import adapter_configs, adapter_layers, check_known, check_unmerged, present
from ..model.inject import disable_adapter, exchange, in_mode
from ..model.targets import selection_of
from ..progress import progress_bar
from .batches import on_device
from .eva_experts import ExpertInputs
from .incremental_pca import IncrementalPCA

Batch = Mapping[str, Any]
Forward = Callable[[nn.Module, dict[str, Any]], object]
T = TypeVar("T")

# What PEFT's names of modules begin with.
PREFIX = "base_model.model."


@torch.no_grad()
def eva_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    adapter_name: str = "default",
    *,
    forward: Forward | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """A of every linear layer and expert of the adapter by path, found from the base model's activations.

        A_l = V_l[:r_l], with whiten V_l[j] / √σ_lj,   Σ_l r_l as before,   r_l ≤ min(round(rho · r), in)

    V_l, σ_l: principal components of the layer's input over all tokens that count. Ranks go to the largest explained
    variance ratios of all layers; layers that are fed the same (q, k, v) share one V. Every component in use must be
    within cosine similarity tau of what it was before the last batch that its layer observed. Each expert has an A from
    the rows that the router gives it; its rank is its stack's, which takes no part in the redistribution, since all
    experts are in one tensor. One that gets fewer than r rows in a whole pass keeps its random A, with a warning.
    batches: mappings of the model's keyword arguments, moved to its device; iterated again and again until all layers
        have converged, none of them kept. attention_mask, and labels of its shape (or that of input_ids) under
        use_label_mask, say which tokens count. forward: runs the model on a batch, model(**batch) by default.
    progress: show a bar, where rich is installed.
    The model is left as it was. Every process of a distributed run must be given the same batches.
    Shapes: factors [r_l, in], r_l may be 0; of experts [E, r, in], by "path.parameter"; on the device and in the dtype
    of the adapter's A.
    Raises ValueError for an adapter without init_lora_weights="eva" or without linear layers and experts, experts of a
    rank above their width, a merged model, batches that are empty, end before all has converged and cannot be iterated
    again or never have enough tokens for a layer, inputs that do not fit the mask or are not finite; TypeError for
    batches that are no mappings.
    Source: Paischer et al. 2024, arXiv:2410.07170, sections 3.2 and 3.3.
    """
    config, eva, layers, stacks = _adapter(model, adapter_name)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list, a DataLoader or another iterable of batches, got {type(batches).__name__}: put a "
            "single batch into a list"
        )
    inputs, converged, total = _Inputs(eva), 0, len(layers) + len(stacks)
    experts = [
        ExpertInputs(path, layer, _adapter_of(layer, adapter_name), eva.tau, lambda: inputs.mask)
        for path, layer in stacks.items()
    ]
    search: _Search | None = None
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    run = forward or _call
    bar = progress_bar("layers that have converged", total, wanted=progress, transient=True)
    with _base_model(model), bar as update, ExitStack() as stack:
        seen = 0
        while True:
            before = seen
            for given in batches:
                seen += 1
                batch = on_device(given, device)
                if not inputs.expect(batch):
                    continue
                if search is None:
                    groups = _equal_inputs(layers, inputs, partial(run, model, batch)) if layers else []
                    search = _Search(layers, groups, experts, config, eva, inputs)
                    stack.callback(search.stop)
                run(model, batch)
                converged = search.update()
                update(completed=converged)
                if converged == total:
                    return search.factors(adapter_name)
            if not seen:
                raise ValueError("batches is empty: give at least one batch")
            if seen == before:
                raise ValueError(
                    f"batches ended after {seen} with {converged} of {total} layers converged, and cannot be "
                    "iterated again: give a list or a DataLoader"
                )
            if search is None:
                raise ValueError(
                    "no batch has a token that counts: attention_mask and labels mask all of them; correct them or set "
                    "eva_config.use_label_mask to False"
                )
            search.check_complete()


def initialize_eva(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    adapter_name: str = "default",
    *,
    factors: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> None:
    """Starts an adapter with init_lora_weights="eva" from data, in place; call it before the optimizer is made.

        A_l = factors_l [r_l, in],   B_l = 0,   with adjust_scaling_factors α_l = α · r_l / r

    batches, forward, progress: as `eva_factors` takes them. factors: what it returned, or PEFT's get_eva_state_dict
    did, in place of batches; one for each linear layer and weight of experts of the adapter, with or without PEFT's
    "base_model.model.". Each layer gets a new adapter of its new rank; rank 0 takes it out of the layer, and a layer
    without another adapter out of the model. The config's rank_pattern, alpha_pattern and target_modules name what
    remains by full paths; experts keep their ranks. Embedding and Conv2d layers and routers keep the adapter that they
    have, with a warning. All else is left as it was: what requires grad, what is active, training or eval mode, random
    numbers.
    Raises ValueError or TypeError as `eva_factors`, and ValueError unless just one of batches and factors is given and
    for factors that do not fit; the model is then as it was.
    Source: Paischer et al. 2024, arXiv:2410.07170, sections 3.2 and 3.3.
    """
    config, eva, layers, stacks = _adapter(model, adapter_name)
    if batches is not None and factors is None:
        factors = eva_factors(model, batches, adapter_name, forward=forward, progress=progress)
    elif batches is not None or factors is None:
        given = "neither" if batches is None else "both"
        raise ValueError(f"initialize_eva takes either batches or factors, got {given}")
    checked = _checked(factors, _widths(layers, stacks, adapter_name))
    injection = present(model, adapter_name)
    others = [path for path in injection.layers if path not in layers and path not in stacks]
    # What the patterns have a rank for: modules by their paths, parameters by theirs.
    keys = {
        path: [f"{path}.{name}" for name in _adapter_of(layer, adapter_name).parts] for path, layer in stacks.items()
    }
    keys |= {path: [pattern_key(path, injection.layers[path])] for path in (*layers, *others)}
    every = [key for path in injection.layers for key in keys[path]]
    alphas, ranks = {key: config.alpha(key) for key in every}, {key: config.rank(key) for key in every}
    for path in layers:
        if eva.adjust_scaling_factors and len(checked[path]) != ranks[path]:
            alphas[path] *= len(checked[path]) / ranks[path]
        ranks[path] = len(checked[path])
    adapters: dict[str, Adapter | None] = {}
    for path, layer in layers.items():
        own = replace(config, r=max(1, ranks[path]), lora_alpha=alphas[path], rank_pattern={}, alpha_pattern={})
        adapters[path] = _renewed("", layer, adapter_name, own, checked[path]) if ranks[path] else None
    for path, stack in stacks.items():
        adapters[path] = _renewed(path, stack, adapter_name, config, *[checked[key] for key in keys[path]])
    kept = [path for path in injection.module_paths if ranks[path]]
    config = replace(
        config,
        rank_pattern=pattern_of({key: rank for key, rank in ranks.items() if rank}, config.r),
        alpha_pattern=pattern_of({key: alphas[key] for key, rank in ranks.items() if rank}, config.lora_alpha),
        **selection_of(model, kept),
    )
    if others:
        warnings.warn(
            f"EVA reads the inputs of linear layers and experts only: {', '.join(others)} keep the random start that "
            "they had",
            stacklevel=2,
        )
    exchange(model, adapter_name, config, adapters)


def _adapter(
    model: nn.Module, adapter_name: str
) -> tuple[LoRAConfig, EVAConfig, dict[str, AdapterLinear], dict[str, AdapterExperts]]:
    """The adapter's config, EVA's part of it, the linear layers and the experts. Raises ValueError where EVA cannot
    start it."""
    check_known(model, adapter_name)
    config = adapter_configs(model)[adapter_name]
    if not isinstance(config, LoRAConfig) or config.init_lora_weights != "eva":
        got = f"init_lora_weights={config.init_lora_weights!r}" if isinstance(config, LoRAConfig) else config.peft_type
        raise ValueError(
            f'adapter {adapter_name!r} must have init_lora_weights="eva", got {got}: inject it with '
            'LoRAConfig(init_lora_weights="eva") or DoRAConfig(init_lora_weights="eva")'
        )
    check_unmerged(adapter_layers(model).values(), "initialize_eva")
    if isinstance(config, LoRADropConfig) and config.kept is not None:
        raise ValueError(
            f"the layers of adapter {adapter_name!r} are selected and share pairs: call initialize_eva before "
            "select_layers"
        )
    layers = present(model, adapter_name).layers
    linear = {path: layer for path, layer in layers.items() if isinstance(layer, AdapterLinear)}
    stacks = {path: layer for path, layer in layers.items() if isinstance(layer, AdapterExperts)}
    if not linear and not stacks:
        raise ValueError(
            f"adapter {adapter_name!r} has no linear layer, and EVA reads the inputs of Linear and Conv1D layers: name "
            "some in target_modules, or experts in target_parameters"
        )
    return config, config.eva_config or EVAConfig(), linear, stacks


def _adapter_of(layer: AdapterExperts, adapter_name: str) -> ExpertsAdapter:
    adapter: Any = layer.adapters[adapter_name]
    return adapter  # type: ignore[no-any-return]


# Observing.


class _Inputs:
    """The rows of a layer's input that count, by the masks of the batch that runs."""

    def __init__(self, eva: EVAConfig) -> None:
        self.eva = eva
        self.mask: Tensor | None = None

    def expect(self, batch: Batch) -> bool:
        """Says which batch comes; whether any of its tokens counts."""
        attention = batch.get("attention_mask")
        self.mask = None if attention is None else attention.bool()
        tokens, labels = batch.get("input_ids") if attention is None else attention, batch.get("labels")
        # Labels of whole sequences mask no token.
        if self.eva.use_label_mask and tokens is not None and labels is not None and labels.shape == tokens.shape:
            labelled = labels != self.eva.label_mask_value
            self.mask = labelled if self.mask is None else self.mask & labelled
        return self.mask is None or bool(self.mask.any())

    def rows(self, path: str, x: Tensor) -> Tensor:
        """x [..., in] as rows [tokens, in]."""
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        if x.shape[:-1] != self.mask.shape:
            raise ValueError(
                f"{path}: the layer's input must have shape [{', '.join(map(str, self.mask.shape))}, in] to go with "
                f"the batch's attention_mask or labels, got {tuple(x.shape)}: leave it out with exclude_modules, or "
                "give batches without attention_mask and use_label_mask=False to count every row"
            )
        return x[self.mask.to(x.device)]


class _Observed:
    """The principal components of one layer's input, and a hook that adds to them while they have not converged."""

    def __init__(self, path: str, layer: AdapterLinear, n_components: int, tau: float, inputs: _Inputs) -> None:
        self.path, self.layer, self.tau, self.inputs = path, layer, tau, inputs
        self.pca = IncrementalPCA(n_components)
        self.settled = torch.zeros(n_components, dtype=torch.bool)
        self.most_tokens: int | None = None
        self._hook: Any = None

    def observe(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = self.inputs.rows(self.path, args[0])
        self.most_tokens = max(self.most_tokens or 0, len(rows))
        if len(rows) < self.pca.n_components:
            return
        previous = self.pca.components
        try:
            self.pca.partial_fit(rows)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.settled = self.pca.converged(previous, self.tau)

    def converged(self, rank: int) -> bool:
        return bool(self.settled[:rank].all())

    def watch(self, on: bool) -> None:
        if on and self._hook is None:
            self._hook = self.layer.register_forward_pre_hook(self.observe)
        elif not on and self._hook is not None:
            self._hook.remove()
            self._hook = None


class _Search:
    """Components and ranks as they stand after the batches so far; `groups` are paths of layers that are fed alike."""

    def __init__(
        self,
        layers: dict[str, AdapterLinear],
        groups: list[list[str]],
        experts: list[ExpertInputs],
        config: LoRAConfig,
        eva: EVAConfig,
        inputs: _Inputs,
    ) -> None:
        self.layers, self.experts, self.whiten = layers, experts, eva.whiten
        ranks = {path: config.rank(path) for path in layers}
        self.budget = sum(ranks.values())
        self.observed: dict[str, _Observed] = {}
        for leader, *others in groups:
            layer = layers[leader]
            most = max(round(ranks[path] * eva.rho) for path in (leader, *others))
            n_components = min(most, layer.weight_matrix.shape[1])
            self.observed[leader] = _Observed(leader, layer, n_components, eva.tau, inputs)
            self.observed[leader].watch(True)
        for stack in experts:
            stack.watch(True)
        # Each layer's leader: the leaders first, since the order decides between equal ratios, as it does in PEFT.
        self.leaders = {group[0]: group[0] for group in groups}
        self.leaders |= {path: group[0] for group in groups for path in group[1:]}
        self.ranks = {path: self.observed[leader].pca.n_components for path, leader in self.leaders.items()}

    def update(self) -> int:
        """Deals out the ranks anew after a batch, and observes on where they call for it.

        Returns how many layers have converged.
        """
        if self.observed and all(layer.pca.n_seen for layer in self.observed.values()):
            self.ranks = self._redistributed()
        done = {leader: layer.converged(self.ranks[leader]) for leader, layer in self.observed.items()}
        for leader, layer in self.observed.items():
            layer.watch(not done[leader])
        settled = [stack.converged for stack in self.experts]
        for stack, is_settled in zip(self.experts, settled, strict=True):
            stack.watch(not is_settled)
        return sum(done[leader] for leader in self.leaders.values()) + sum(settled)

    def stop(self) -> None:
        for layer in self.observed.values():
            layer.watch(False)
        for stack in self.experts:
            stack.watch(False)

    def _redistributed(self) -> dict[str, int]:
        ratios = {leader: layer.pca.explained_variance_ratio.cpu() for leader, layer in self.observed.items()}
        owners = [path for path, leader in self.leaders.items() for _ in ratios[leader]]
        order = torch.cat([ratios[leader] for leader in self.leaders.values()]).argsort(descending=True)
        counts = Counter(owners[index] for index in order[: self.budget].tolist())
        ranks = {path: counts[path] for path in self.leaders}
        for path, leader in self.leaders.items():
            if ranks[path] > ranks[leader]:  # only what the leader needs is watched
                ranks[path], ranks[leader] = ranks[leader], ranks[path]
        return ranks

    def check_complete(self) -> None:
        """Raises ValueError when a whole pass over the batches has left a layer without any components; experts may be
        left so."""
        for stack in self.experts:
            stack.end_pass()
        empty = [layer for layer in self.observed.values() if not layer.pca.n_seen]
        if not empty:
            return
        layer, needed = empty[0], empty[0].pca.n_components
        name = f"{layer.path} (and {len(empty) - 1} more layers)" if len(empty) > 1 else layer.path
        if layer.most_tokens is None:
            raise ValueError(f"{name} was not run by any batch: leave it out of target_modules")
        raise ValueError(
            f"{name} needs batches of at least {needed} tokens that count, the most that its rank may become, and the "
            f"largest had {layer.most_tokens}: give larger batches, or lower eva_config.rho or r"
        )

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        found = {}
        for path, layer in self.layers.items():
            pca, r = self.observed[self.leaders[path]].pca, self.ranks[path]
            A = (pca.whitened if self.whiten else pca.components)[:r]
            adapter: Any = layer.adapters[adapter_name]
            like = adapter.factors[0]
            found[path] = A.to(like.device, like.dtype, copy=True)
        for stack in self.experts:
            found |= stack.factors(self.whiten)
        unseen = sum(stack.unseen for stack in self.experts)
        if unseen:
            every = sum(len(experts) for stack in self.experts for experts in stack.experts.values())
            warnings.warn(
                f"{unseen} of {every} experts' matrices keep their random start: the router gave them fewer rows than "
                "their rank in all batches; give more batches",
                stacklevel=4,
            )
        return found


def _equal_inputs(layers: dict[str, AdapterLinear], inputs: _Inputs, run: Callable[[], object]) -> list[list[str]]:
    """The layers' paths in groups that `run` feeds the same input, told by a digest of its bytes; groups of one too."""
    digests: dict[str, bytes] = {}

    def hook_of(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if path not in digests:
                digests[path] = _digest(inputs.rows(path, args[0]))

        return hook

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(hook_of(path)))
        run()
    groups: dict[bytes, list[str]] = {}
    for path in layers:  # one that did not run is alone
        groups.setdefault(digests.get(path, path.encode()), []).append(path)
    return list(groups.values())


def _digest(x: Tensor) -> bytes:
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    # As bytes: numpy has no bfloat16.
    digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _call(model: nn.Module, batch: dict[str, Any]) -> object:
    return model(**batch)


@contextmanager
def _base_model(model: nn.Module) -> Iterator[None]:
    """The base model in eval mode; then all is as it was."""
    with disable_adapter(model), in_mode(model, training=False):
        yield


# Applying.


def _widths(
    layers: Mapping[str, AdapterLinear], stacks: Mapping[str, AdapterExperts], adapter_name: str
) -> dict[str, tuple[int | None, ...]]:
    """The shape of each factor; None for a rank that is free."""
    found: dict[str, tuple[int | None, ...]] = {
        path: (None, layer.weight_matrix.shape[1]) for path, layer in layers.items()
    }
    for path, stack in stacks.items():
        adapter = _adapter_of(stack, adapter_name)
        found |= {f"{path}.{name}": tuple(adapter.part(name).factors[0].shape) for name in adapter.parts}
    return found


def _checked(factors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """The factors by the paths in `shapes`, in their order. Raises ValueError unless they are just these and fit."""
    named = {name if name in shapes else name.removeprefix(PREFIX): factor for name, factor in factors.items()}
    if len(named) != len(factors):
        raise ValueError(f"factors names a layer twice, with and without {PREFIX!r}: give each once")
    for kind, paths in (
        ("has none for", [path for path in shapes if path not in named]),
        ("has one for", [path for path in named if path not in shapes]),
    ):
        if paths:
            more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
            raise ValueError(
                f"factors must hold one tensor for each linear layer and weight of experts of the adapter, and {kind} "
                f"{paths[0]}{more}: find them with eva_factors(model, batches, adapter_name) for this adapter"
            )
    for path, shape in shapes.items():
        factor = named[path]
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            got = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
            raise ValueError(f"factors[{path!r}] must be a tensor of floating-point numbers, got {got}")
        if factor.dim() != len(shape) or any(
            size not in (None, got) for size, got in zip(shape, factor.shape, strict=True)
        ):
            raise shape_error(f"factors[{path!r}]", f"[{', '.join(str(size or 'r') for size in shape)}]", factor)
        if not torch.isfinite(factor).all():
            raise ValueError(f"factors[{path!r}] has NaN or infinite values: find it anew with eva_factors")
    if not any(len(named[path]) for path in shapes):
        raise ValueError("factors gives every layer rank 0: at least one must keep the adapter")
    return {path: named[path] for path in shapes}


def _renewed(path: str, layer: AdapterLayer, adapter_name: str, config: LoRAConfig, *factors: Tensor) -> Adapter:
    """A new adapter in the likeness of the layer's own, as config has it at this path, with A = factors and B = 0."""
    old: Any = layer.adapters[adapter_name]
    dtype = next(iter(old.checkpoint_tensors().values())).dtype
    with torch.random.fork_rng(devices=[]):  # the A that is drawn is thrown away
        adapter: Any = config.build({path: layer}, lambda _: dtype)[path]
    parts = adapter.parts.values() if isinstance(adapter, ExpertsAdapter) else [adapter]
    with torch.no_grad():
        for part, factor in zip(parts, factors, strict=True):
            part.factors[0].copy_(factor)
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    adapter.train(old.training)
    return adapter  # type: ignore[no-any-return]
