"""Adapters for layers of which a process has a part, or no weight that can be read: an engine's, known by their shapes.

The directory is read as strictly as for a model. What comes out are the forms of parts of the layers: rows of the
output where these are shared out among processes, columns of the input. What a form needs of the base weight besides
its shape are DoRA's norms, and those come from whoever has the weight: see functional.weight_norm_squared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_vector
from ..layers.layer import Adapter
from ..layers.ways import shape_alone
from ..methods import AdapterConfig
from ..methods.patterns import time_limit
from ..model.targets import base_modules
from ..model.untrusted import DEFAULT_LIMITS, Limits, refused
from ..operators.arithmetic import divisor
from ..reference import AdapterForm
from .loader import check_adapter, served_form


class LayerShape(NamedTuple):
    """Outputs and inputs of a whole linear layer, over all processes, and whether it has a bias."""

    out_features: int
    in_features: int
    has_bias: bool = False


class Shard(NamedTuple):
    """The part of a layer that is asked for: rows of its weight, which are outputs, and columns, which are inputs.

    A packed layer's outputs may lie apart in the whole one: then rows is an index [rows] int64.
    """

    rows: slice | Tensor = slice(None)
    columns: slice = slice(None)


WHOLE = Shard()


class PartForm(NamedTuple):
    """The form of a part of a layer, and the magnitude of its rows, which DoRA's g = m / n is still to be made of.

    Shapes: magnitude m [rows], None where the form is all.
    """

    form: AdapterForm
    magnitude: Tensor | None = None

    def finished(self, norm: Tensor | None) -> AdapterForm:
        """The form with g = m / n, and h scaled by it. Shapes: norm n [rows], that of W0 + diag(h) B diag(d) A.

        Of a row of zeros n is the least number there is, as for a model: see arithmetic.divisor.
        """
        if self.magnitude is None:
            return self.form
        if norm is None:
            raise ValueError("norm must be given for an adapter with a magnitude: see functional.weight_norm_squared")
        check_vector("norm", norm, self.magnitude.shape[0], self.magnitude.device, "the magnitude")
        g = self.magnitude / divisor(norm)
        scaling, h = self.form.settled(g.shape[0])
        return self.form._replace(
            base_scale=g, out_scale=g if h is None else g * h, scaling=scaling, dropout_on_base=True
        )


class ShapedAdapter:
    """An adapter that was read for layers known by their shapes.

    config: its config. paths: of the layers that it adapts. identity: as LoadedAdapter's. shared: VeRA's pair (A
    [r, largest in], B [largest out, r]), of which every part's A and B are slices, None for other methods; another pair
    of the same content may be put in its place, so that adapters of one key share memory.
    """

    def __init__(
        self, config: AdapterConfig, adapters: dict[str, Adapter], shapes: Mapping[str, LayerShape], identity: str
    ) -> None:
        self.config, self.identity = config, identity
        self.shared = config.shared_factors(adapters)
        self._adapters, self._shapes = adapters, shapes
        self._magnitudes = {path: adapter.lora_magnitude_vector for path, adapter in adapters.items()}
        for adapter in adapters.values():
            # Without it the form is what the magnitude is multiplied with.
            adapter.lora_magnitude_vector = None

    @property
    def paths(self) -> list[str]:
        return list(self._adapters)

    def part(self, path: str, shard: Shard = WHOLE, *, bias: Tensor | None = None) -> PartForm:
        """What the adapter does to a part of the layer at `path`.

        bias: the base layer's for the rows of the part, None where it has none. The form's bias is that very tensor
        where the adapter has none of its own. Shapes: bias [rows]; A [r, columns], B [rows, r]. Raises KeyError for a
        path that it does not adapt.
        """
        adapter, shape = self._adapters[path], self._shapes[path]
        rows, columns = shard
        like = next(iter(adapter.checkpoint_tensors().values()))
        whole = None
        if bias is not None:
            # Methods make of a bias what they do element by element: those of other rows do not matter.
            whole = torch.zeros(shape.out_features, dtype=bias.dtype, device=bias.device)
            whole[rows] = bias.detach()
        weight = shape_alone(shape.out_features, shape.in_features, like.detach())
        form = served_form(path, self.config, adapter, weight, whole)
        A, B = form.A, form.B
        if self.shared is not None:
            A, B = self.shared[0][:, : shape.in_features], self.shared[1][: shape.out_features]
        own_bias = form.bias
        if own_bias is not None:
            own_bias = bias if own_bias is whole else own_bias[rows]
        h, g, magnitude = form.out_scale, form.base_scale, self._magnitudes[path]
        part = form._replace(
            A=A[:, columns],
            B=B[rows],
            out_scale=h[rows] if isinstance(h, Tensor) and h.dim() else h,
            base_scale=None if g is None else g[rows],
            bias=own_bias,
        )
        return PartForm(part, None if magnitude is None else magnitude.detach()[rows])


def read_adapter_by_shapes(
    shapes: Mapping[str, tuple[int, int, bool]],
    directory: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    device: torch.device | str = "cpu",
) -> ShapedAdapter:
    """The adapter in a PEFT directory for linear layers of which only the shapes are known, by module path.

    shapes: (out, in, whether it has a bias) of each whole layer, by the path that it has in the model that the adapter
    was trained on; layers that are left out take no adapter. The rest as for `read_adapter`; tensors come as fp32, on
    `device`. Raises AdapterError for whatever is wrong with the adapter, one that reads the values of the base weight
    (GLoRA, HiRA) included.
    """
    known = {path: LayerShape(*shape) for path, shape in shapes.items()}
    path = Path(directory)
    with refused(path), time_limit(limits.max_pattern_seconds):
        model = _outline(known)
        found = check_adapter(model, path, base_modules(model), root=root, limits=limits, device=torch.device(device))
        for name, adapter in found.adapters.items():
            if adapter.reads == "values":
                raise ValueError(
                    f"{found.config.peft_type} computes with the values of the weight of {name}, which are not at hand "
                    "here: merge it into its base (fastadapt merge), or serve it with fastadapt.serving"
                )
    return ShapedAdapter(found.config, found.adapters, known, found.identity)


def _outline(shapes: Mapping[str, LayerShape]) -> nn.Module:
    """A model of layers without memory that has these paths."""
    model = nn.Module()
    for path, shape in shapes.items():
        parent = model
        *names, last = path.split(".")
        for name in names:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        layer = nn.Linear(shape.in_features, shape.out_features, shape.has_bias, device="meta", dtype=torch.float32)
        parent.add_module(last, layer)
    return model
