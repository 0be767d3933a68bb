"""How a model treats the rows of a batch on their way to each of its layers: seen once, in a forward of its own.

No shape tells it: the experts of a mixture get as many tokens as there are rows, in another order. So one row of a
small batch is made NaN where it comes in, and what arrives at a layer shows by its NaNs where that row lies there.
Where a request has images, a batch that has them shows which layers of what they go through regroup their tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.untrusted import one_line
from .pool import Holding
from .requests import Layout, OtherRequestsError, Place, Requests, Running

ROWS, POISONED = 3, 1
_TOKENS = 16
_WORST: tuple[Layout, ...] = ("unseen", "rows", "tokens", "regrouped")

# What a model's input is called where its forward does not put it first.
INPUTS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_features", "input_values")


class Trace(Running):
    """A request of base rows, of which one is NaN, that notes how rows lie in what each layer is called with.

    images: of which one has NaN for its images alone: other tokens of that row may be as they were, and where attention
    hides rows from each other by zero times NaN, none of any row is. It tells what regroups, of what was not seen yet.
    """

    def __init__(self, images: bool = False) -> None:
        super().__init__(Holding([-1] * ROWS, [-1] * ROWS))
        self._layout = _layout_of_images if images else _layout
        self.found: dict[str, Layout] = {}
        self.paths: set[str] = set()

    def see(self, place: Place, x: Tensor) -> None:
        # What holds for a layer holds for its likes in other blocks, and for the experts that no token went to.
        kind = _kind(place.path)
        self.found[kind] = max(self.found.get(kind, "unseen"), self._layout(x), key=_WORST.index)
        self.paths.add(place.path)

    def pass_by(self, place: Place) -> None:
        """Takes in that a layer was not called: where another expert was, all tokens may have gone to that one here,
        and not elsewhere."""
        kind = _kind(place.path)
        if place.in_expert and place.path not in self.paths and kind in self.found:
            self.found[kind] = "regrouped"


def _kind(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _layout(x: Tensor) -> Layout:
    tokens = x.reshape(-1, x.shape[-1])
    each, rest = divmod(tokens.shape[0], ROWS)
    expected = torch.zeros(tokens.shape[0], dtype=torch.bool, device=x.device)
    expected[POISONED * each : (POISONED + 1) * each] = True
    if rest or not each or not torch.equal(tokens.isnan().any(1), expected):
        return "regrouped"
    return "rows" if x.shape[0] == ROWS else "tokens"


def _layout_of_images(x: Tensor) -> Layout:
    where = x.reshape(-1, x.shape[-1]).isnan().any(1)
    each, rest = divmod(len(where), ROWS)
    inside = where[POISONED * each : (POISONED + 1) * each]
    if where.all() or not where.any() or (not rest and inside.sum() == where.sum()):
        return "unseen"
    return "regrouped"


def trace(
    model: nn.Module,
    places: Iterable[Place],
    requests: Requests,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    images: bool = False,
) -> bool:
    """Runs the model on a small batch like the one in args and kwargs, and tells its layers how rows lie there.

    Layers that the batch does not come by stay as they are, all of them where the model refuses it, with the reason.
    Returns whether another time would show nothing else. images: with those of the first row, which every row has as
    many of; of what was not seen without them.
    """
    seen, places = Trace(images), list(places)
    try:
        with torch.no_grad(), requests.running(seen), _poisoned_embeddings(model, requests, seen):
            model(**(_with_images if images else _small_batch)(model, args, kwargs))
    except OtherRequestsError:
        return False
    except Exception as error:
        # Half a forward says nothing of the other half, and what it was refused for may be the NaN.
        for place in places:
            place.ended = (
                f" (a forward of three short rows ended in {type(error).__name__}: {one_line(str(error), 200)})"
            )
        return True
    for place in places:
        seen.pass_by(place)
    for place in places:
        layout = seen.found.get(_kind(place.path), "unseen")
        if not images or place.layout == "unseen":
            place.lie(max(layout, place.layout, key=_WORST.index))
    return True


def main_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str | None, Tensor]:
    """The name, None for the first positional one, and the tensor that has a row for each of a request.

    Raises ValueError where none is a batch.
    """
    named = [(name, kwargs.get(name)) for name in INPUTS]
    for name, value in [*((None, value) for value in args), *named, *kwargs.items()]:
        if isinstance(value, Tensor) and value.dim() > 1:
            return name, value
    raise ValueError("adapter_ids need a batch to go with: pass input_ids [rows, tokens], or another input with rows")


def is_padded(value: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether a mask tells that tokens of the main input are padding."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.shape == value.shape[:2] and not bool(mask.all())


def _named_input(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, Tensor, list[str]]:
    """The main input by the name that the model's forward has for it, and the names of all parameters of that."""
    name, value = main_input(args, kwargs)
    parameters = list(inspect.signature(model.forward).parameters)
    return (parameters[0] if name is None or name == "inputs" != parameters[0] else name), value, parameters


def _small_batch(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    name, value, parameters = _named_input(model, args, kwargs)
    config: Any = getattr(model, "config", None)
    special = _special_tokens(config)
    found = {name: _rows_like(value, model, special)}
    if is_padded(value, kwargs):
        # Rows of two lengths, which a model that leaves padding out has in no equal parts; the one of NaNs is whole.
        found["attention_mask"] = torch.ones(found[name].shape[:2], dtype=torch.int64, device=value.device)
        found["attention_mask"][-1, -1] = 0
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        decoder = kwargs.get("decoder_input_ids")
        shape = torch.zeros(1, 4, dtype=torch.int64, device=value.device) if decoder is None else decoder
        found["decoder_input_ids"] = _rows_like(shape, model, special, most=4)
    return found


def _with_images(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """ROWS times the first row of token ids, its other tokens drawn anew, with its images, those of one row NaN."""
    name, ids, parameters = _named_input(model, args, kwargs)
    found = {name: ids}
    for other, value in kwargs.items():
        # What goes with images, and what goes with each token.
        if isinstance(value, Tensor) and (
            other.startswith(("pixel", "image")) or (other in parameters and value.shape == ids.shape)
        ):
            found[other] = value
    for other, value in found.items():
        share = value[: value.shape[0] // ids.shape[0]]
        found[other] = value = torch.cat([share] * ROWS)
        if value.is_floating_point():
            value[POISONED * len(share) : (POISONED + 1) * len(share)] = torch.nan
    special = _special_tokens(getattr(model, "config", None))
    kept = torch.isin(found[name], torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
    found[name] = torch.where(kept, found[name], _drawn(found[name], model, special))
    return found


def _rows_like(value: Tensor, model: nn.Module, special: set[int], most: int = _TOKENS) -> Tensor:
    """ROWS rows of the shape of the first one: random token ids for ids, else its own values with one row NaN."""
    generator = torch.Generator().manual_seed(0)
    if value.is_floating_point():
        rows = value[:1].expand(ROWS, *value.shape[1:]).clone()
        # Rows that are all alike would take the same way through a mixture of experts.
        rows += torch.randn(rows.shape, generator=generator).to(rows) * rows.float().std().nan_to_num(1.0).to(rows)
        rows[POISONED] = torch.nan
        return rows
    if value.dim() != 2:
        return value[:1].expand(ROWS, *value.shape[1:]).clone()
    columns = value.shape[1] if 4 <= value.shape[1] < most else most
    return _drawn(value.new_empty(ROWS, columns), model, special)


def _drawn(like: Tensor, model: nn.Module, special: set[int]) -> Tensor:
    """Random token ids, none of the special ones."""
    known = torch.tensor([token for token in range(min(_vocabulary(model), 1000)) if token not in special] or [0])
    picked = torch.randint(len(known), like.shape, generator=torch.Generator().manual_seed(0))
    return known[picked].to(like)


def _vocabulary(model: Any) -> int:
    """How many tokens a model knows; where it does not say which embedding is theirs, its largest has as many."""
    try:
        own = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        own = None
    tables = [own] if isinstance(own, nn.Embedding) else model.modules()
    return max([table.num_embeddings for table in tables if isinstance(table, nn.Embedding)], default=1)


def _special_tokens(config: Any) -> set[int]:
    """Token ids that a config names: a model looks for an image where it reads the image's."""
    fields = vars(config) if hasattr(config, "__dict__") else {}
    return {
        int(value)
        for name, value in fields.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }


@contextmanager
def _poisoned_embeddings(model: nn.Module, requests: Requests, seen: Trace) -> Iterator[None]:
    """Inside, one row of what embeddings give for ROWS rows is NaN, for this request alone."""

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        if requests.now() is not seen or not isinstance(output, Tensor) or output.shape[:1] != (ROWS,):
            return output
        output = output.clone()
        output[POISONED] = torch.nan
        return output

    handles = [module.register_forward_hook(poison) for module in model.modules() if isinstance(module, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
