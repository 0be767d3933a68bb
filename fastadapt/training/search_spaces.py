"""The spaces of the published searches: GLoRA's supports, NOAH's modules."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import nn

from ..methods.glora import GLoRAAdapter, GLoRAConfig, Supports, lora_rank
from ..methods.noah import MODULES, NOAHConfig, parameters_of, sizes_of
from ..methods.vpt import Prompts
from ..model.adapted import present

GLoRACandidate = dict[str, list[str]]
NOAHCandidate = dict[str, list[int]]


class GLoRASpace:
    """The subnets of a GLoRA supernet: a candidate is {module path: the supports of A, B, C, D and E}.

    ranks: those to search among, of the supernet's own; all of them by default. A layer without a bias has "none" for
    C, D and E, unless the adapter creates one. Parameters are those of the adapter, without modules_to_save.
    Raises ValueError for an adapter that is no supernet, and for a rank that it does not have.
    Source: Chavan et al. 2023, arXiv:2306.07967, section 3.4.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", ranks: Sequence[int] | None = None) -> None:
        found = present(model, adapter_name)
        config = found.config
        if not isinstance(config, GLoRAConfig) or not config.supernet:
            raise ValueError(f"adapter {adapter_name!r} must be GLoRAConfig(supernet=True) to be searched")
        self.ranks = list(config.ranks or []) if ranks is None else list(ranks)
        if not self.ranks or not set(self.ranks) <= set(config.ranks or []):
            raise ValueError(f"ranks must be some of the supernet's, {config.ranks}, got {self.ranks}")
        self.adapters: dict[str, GLoRAAdapter] = {}
        self.options: dict[str, list[list[str]]] = {}
        for path, adapter in found.adapters.items():
            assert isinstance(adapter, GLoRAAdapter)
            self.adapters[path] = adapter
            self.options[path] = [
                [option for option in options if not lora_rank(option) or lora_rank(option) in self.ranks]
                for options in adapter.options.values()
            ]

    def uniform(self, supports: Sequence[str]) -> GLoRACandidate:
        """The candidate with these supports in every layer, as far as it has the term."""
        checked = Supports.checked("supports", supports)
        return {
            path: [
                value if len(options) > 1 else options[0] for value, options in zip(checked, all_options, strict=True)
            ]
            for path, all_options in self.options.items()
        }

    def sample(self, rng: random.Random) -> GLoRACandidate:
        return {path: [rng.choice(options) for options in letters] for path, letters in self.options.items()}

    def mutate(self, rng: random.Random, candidate: GLoRACandidate, probability: float) -> GLoRACandidate:
        return {
            path: [
                rng.choice(options) if rng.random() < probability else value
                for value, options in zip(candidate[path], letters, strict=True)
            ]
            for path, letters in self.options.items()
        }

    def cross(self, rng: random.Random, a: GLoRACandidate, b: GLoRACandidate) -> GLoRACandidate:
        return {path: [rng.choice(pair) for pair in zip(a[path], b[path], strict=True)] for path in self.options}

    def parameters(self, candidate: GLoRACandidate) -> int:
        return sum(adapter.parameters_of(Supports(*candidate[path])) for path, adapter in self.adapters.items())

    def apply(self, candidate: GLoRACandidate) -> None:
        for path, adapter in self.adapters.items():
            adapter.choose(candidate[path])


class NOAHSpace:
    """NOAH's subnets: {"prompts": tokens, "lora": rank, "adapter": width}, each a list with a number for each block.

    Of each list the first blocks, as many as one of `depths` says, have one of `dims`, the rest 0. Mutation touches a
    list with its probability and then, with depth_probability, extends it by random dims or truncates it to another
    depth; crossover takes each list whole from either parent. parameters(candidate) counts, apply(candidate) sets the
    supernet. The published limit is 0.64 million parameters. Raises ValueError for dims or depths that are none.
    Source: Zhang et al. 2022, arXiv:2206.04673, section 3.3, and the authors' evolution.py.
    """

    def __init__(
        self,
        blocks: int,
        dims: Sequence[int] = (1, 5, 10),
        depths: Sequence[int] = (3, 6, 9, 12),
        *,
        parameters: Callable[[NOAHCandidate], int],
        apply: Callable[[NOAHCandidate], None],
        depth_probability: float = 0.4,
    ) -> None:
        if not dims or min(dims) < 1:
            raise ValueError(f"dims must be positive integers, at least one, got {list(dims)}")
        if not depths or min(depths) < 0 or max(depths) > blocks:
            raise ValueError(f"depths must be from 0 to {blocks}, the number of blocks, got {list(depths)}")
        self.blocks = blocks
        self.dims = list(dims)
        self.depths = list(depths)
        self.depth_probability = depth_probability
        self.parameters = parameters
        self.apply = apply

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str = "default") -> NOAHSpace:
        """The subnets of a NOAH supernet. Raises ValueError for another adapter."""
        found = present(model, adapter_name)
        config = found.config
        if not isinstance(config, NOAHConfig) or not config.supernet:
            raise ValueError(f"adapter {adapter_name!r} must be NOAHConfig(supernet=True) to be searched")
        sizes = sizes_of(found.adapters)
        blocks = len(sizes.largest["lora"])
        width = next(part.prompt_embeddings.shape[1] for part in found.adapters.values() if isinstance(part, Prompts))
        depths = sorted({min(depth, blocks) for depth in config.depths})
        return cls(
            blocks,
            config.dims,
            depths,
            parameters=lambda candidate: parameters_of(candidate, width),
            apply=sizes.set,
        )

    def uniform(self, dim: int) -> NOAHCandidate:
        """The candidate with this size of all modules in every block."""
        return {name: [dim] * self.blocks for name in MODULES}

    def _of_depth(self, rng: random.Random, active: list[int], depth: int) -> list[int]:
        """The first `depth` of the active dims, or more of them, and zeros to the last block."""
        extended = active[:depth] + [rng.choice(self.dims) for _ in range(depth - len(active))]
        return extended + [0] * (self.blocks - depth)

    def sample(self, rng: random.Random) -> NOAHCandidate:
        return {name: self._of_depth(rng, [], rng.choice(self.depths)) for name in MODULES}

    def mutate(self, rng: random.Random, candidate: NOAHCandidate, probability: float) -> NOAHCandidate:
        changed = dict(candidate)
        for name in MODULES:
            if rng.random() < probability and rng.random() < self.depth_probability:
                active = [dim for dim in candidate[name] if dim]
                changed[name] = self._of_depth(rng, active, rng.choice(self.depths))
        return changed

    def cross(self, rng: random.Random, a: NOAHCandidate, b: NOAHCandidate) -> NOAHCandidate:
        return {name: rng.choice((a, b))[name] for name in MODULES}
