"""What expert_linear and expert_block ask of their arguments."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_device, check_floating, check_frozen, check_probability, shape_error
from ...reference import ExpertForm


def check_expert_weight(weight: Tensor, bias: Tensor | None, form: ExpertForm | None, prefix: str = "") -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit the weights of the experts."""
    name = f"{prefix}weight"
    if weight.dim() != 3:
        raise shape_error(name, "[experts, out, in]", weight)
    check_floating(name, weight)
    check_frozen(weight)
    count, n, _ = weight.shape
    _check_table(f"{prefix}bias", bias, (count, n), weight)
    if form is not None:
        if bias is not None:
            raise ValueError(f"{prefix}bias goes without a form: form.bias is the whole β, put the layer's own into it")
        _check_form(form, weight, f"{prefix}form")


def _check_form(form: ExpertForm, weight: Tensor, name: str) -> None:
    count, n, k = weight.shape
    if form.A.dim() != 3 or form.A.shape[0] not in (1, count) or form.A.shape[2] != k:
        raise shape_error(f"{name}.A", f"[{count}, r, {k}], or [1, r, {k}] for all experts", form.A)
    r = form.A.shape[1]
    if form.B.dim() != 3 or form.B.shape[0] not in (1, count) or form.B.shape[1:] != (r, n):
        raise shape_error(f"{name}.B", f"[{count}, {r}, {n}], or [1, {r}, {n}] for all experts", form.B)
    for part in ("A", "B"):
        factor = getattr(form, part)
        check_device(f"{name}.{part}", factor, weight.device, "weight")
        check_floating(f"{name}.{part}", factor)
    sizes = {"mid_scale": r, "out_scale": n, "base_scale": n, "bias": n, "base_squared": n}
    for part, size in sizes.items():
        value = getattr(form, part)
        _check_table(f"{name}.{part}", value if isinstance(value, Tensor) else None, (count, size), weight)
    if form.base_squared is not None and (form.base_scale is None or form.mid_scale is not None):
        raise ValueError(
            f"{name}.base_squared goes with base_scale, which it makes the magnitude m of, and without mid_scale"
        )
    if form.base_squared is not None and form.out_scale is not form.base_scale:
        raise ValueError(f"{name}.out_scale must be the very tensor base_scale where base_squared is given")


def _check_table(name: str, value: Tensor | None, shape: tuple[int, int], weight: Tensor) -> None:
    if value is None:
        return
    if value.shape != shape:
        raise shape_error(name, f"{list(shape)}", value)
    check_device(name, value, weight.device, "weight")
    check_floating(name, value)


def check_expert_linear(
    x: Tensor, weight: Tensor, form: ExpertForm | None, offsets: Tensor, bias: Tensor | None, dropout: float
) -> None:
    check_expert_weight(weight, bias, form)
    count, _, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise shape_error("x", f"[rows, {k}] to go with weight {tuple(weight.shape)}", x)
    check_device("weight", weight, x.device)
    check_floating("x", x)
    check_integers("offsets", offsets, (count,), x)
    check_probability("dropout", dropout)


def check_integers(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if value.shape != shape:
        raise shape_error(name, f"{list(shape)}", value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    check_device(name, value, x.device)


def check_expert_block(
    x: Tensor, experts: Tensor, routing: Tensor, up: Tensor, down: Tensor, dropouts: tuple[float, float]
) -> None:
    """Raises for what does not fit between the arguments; `check_expert_weight` has looked at each side by itself."""
    if x.dim() != 2 or x.shape[1] != up.shape[2]:
        raise shape_error("x", f"[tokens, {up.shape[2]}] to go with up {tuple(up.shape)}", x)
    check_floating("x", x)
    check_device("up.weight", up, x.device)
    check_device("down.weight", down, x.device)
    if down.shape[0] != up.shape[0]:
        raise shape_error("down.weight", f"[{up.shape[0]}, out, in], as many experts as up", down)
    if experts.dim() != 2 or experts.shape[0] != x.shape[0]:
        raise shape_error("experts", f"[{x.shape[0]}, top]", experts)
    check_integers("experts", experts, tuple(experts.shape), x)
    if routing.shape != experts.shape:
        raise shape_error("routing", f"{list(experts.shape)}, as experts has it", routing)
    check_floating("routing", routing)
    check_device("routing", routing, x.device)
    for p in dropouts:
        check_probability("dropout", p)
