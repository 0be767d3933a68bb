"""The `fastadapt::` operators: for each its schema, its fake, and which implementation runs.

An operator takes what runs it as its last argument, already resolved: a strategy (see strategies.py) or a backend,
because dispatch by device could reach neither Triton on CPU tensors (the interpreter) nor the eager path on CUDA ones.
None of them knows autograd: functional.py builds the Functions from them.

Letters: x [M, K]; of each member of a group weight [N, K], A [R, K], B [N, R], y and dy [M, N]; u [M, ΣR] = x̃ Aᵀ,
[M, R] where the members share A; q [M, ΣR] = (h ⊙ dy) B. The low-rank output scale is h = scaling · out_scale. `drop`
is what makes the dropout mask of x: for the eager strategies what eager.draw_dropout says, for Triton a seed of one
int64, from which every kernel draws the same mask. Of a bottleneck v [M, K], down [H, K], up [N, H / groups], residual,
output and dy [M, N]; there `drop` makes the mask of the hidden [M, H].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, eager_bottleneck, eager_hadamard, eager_multi, eager_plan
from .batch import AdapterBatch, FormTables, LayerForms, SortedTokens
from .eager import Member, sum_dtype

# Every way to run an adapter form, and the backend that does it.
STRATEGIES = {"split": "triton", "fused": "triton", "library": "eager", "recompose": "eager"}

_library = torch.library.Library("fastadapt", "DEF")

# The names of all operators, in the order in which they are defined here.
OPERATORS: list[str] = []


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"fastadapt_kernels.{module}")


def keep_probability(p: float, backend: str) -> float:
    """The probability that an element is kept: 1 − p, as the threshold of the random integers rounds it."""
    if backend == "triton":
        keep: float = _kernels("tiles").keep_probability(p)
        return keep
    return eager.keep_probability(p)


def draw_dropout(x: Tensor, p: float, backend: str) -> Tensor:
    """What `drop` is for x [M, K], from PyTorch's generator, so that torch.manual_seed and checkpointing govern it."""
    if backend == "triton":
        return torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device)
    return eager.draw_dropout(x, p)


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `fastadapt::name` and returns the operator."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastadapt::{name}", fake, lib=_library)
    OPERATORS.append(name)
    operator: Callable[..., Any] = getattr(torch.ops.fastadapt, name).default
    return operator


def _runs_directly(x: Tensor) -> bool:
    """Whether the implementation is called itself: the dispatcher would add ten microseconds to each operator of a
    layer's step. Compiled code and subclasses of Tensor, such as those without data, see the operators."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def _apart(results: Sequence[Tensor]) -> list[Tensor]:
    """The results with memory of their own each: compiled code takes that for granted of what an operator returns."""
    seen: set[int] = set()
    found = []
    for result in results:
        storage = result.untyped_storage().data_ptr()
        found.append(result.clone() if storage in seen else result)
        seen.add(storage)
    return found


_FORM_SCHEMA = (
    "Tensor[] weight, Tensor[] A, Tensor[] B, Tensor?[] mid_scale, Tensor?[] out_scale, float[] scaling, "
    "Tensor?[] base_scale, Tensor?[] bias, bool[] dropout_on_base"
)
_FIELDS = len(Member._fields)


def _fields(members: Sequence[Member]) -> list[list[Any]]:
    return [list(values) for values in zip(*members, strict=True)]


def _members(fields: Sequence[Sequence[Any]]) -> list[Member]:
    return [Member(*values) for values in zip(*fields, strict=True)]


def _run_linear(x: Tensor, members: Sequence[Member], *rest: Any) -> list[Tensor]:
    u, drop, p, shared_A, keep_u, keep_base, _, strategy = rest
    if STRATEGIES[strategy] == "eager":
        return eager.adapter_linear(x, members, *rest)
    ys, made, zs = _kernels("adapter_linear").adapter_linear(
        x,
        members,
        u=u,
        seed=drop,
        p=p,
        shared_A=shared_A,
        keep_base=keep_base,
        strategy=strategy,
    )
    results: list[Tensor] = ys + ([made] if keep_u and u is None else []) + [z for z in zs if z is not None]
    return results


def _linear(x: Tensor, *operands: Any) -> list[Tensor]:
    return _apart(_run_linear(x, _members(operands[:_FIELDS]), *operands[_FIELDS:]))


def _linear_fake(x: Tensor, *operands: Any) -> list[Tensor]:
    members, (u, _, _, shared_A, keep_u, keep_base, keep_weight, _) = (
        _members(operands[:_FIELDS]),
        operands[_FIELDS:],
    )
    m = x.shape[0]
    ys = [x.new_empty(m, member.weight.shape[0]) for member in members]
    ranks = sum(eager.down_ranks(members, shared_A))
    kept = [x.new_empty(m, ranks)] if keep_u and u is None else []
    if keep_weight:
        return ys + kept + [torch.empty_like(member.weight) for member in members]
    scaled = [y for y, member in zip(ys, members, strict=True) if keep_base and member.base_scale is not None]
    return ys + kept + [torch.empty_like(y) for y in scaled]


_adapter_linear = _define(
    "adapter_linear",
    f"(Tensor x, {_FORM_SCHEMA}, Tensor? u, Tensor? drop, float p, bool shared_A, bool keep_u, bool keep_base, "
    "bool keep_weight, str strategy) -> Tensor[]",
    _linear,
    _linear_fake,
)


def adapter_linear(
    x: Tensor,
    members: Sequence[Member],
    u: Tensor | None,
    drop: Tensor | None,
    p: float,
    shared_A: bool,
    keep_u: bool,
    keep_base: bool,
    keep_weight: bool,
    strategy: str,
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """(y of each member, u where keep_u and none was given, what else is kept for the backward).

    That is z, what the base_scale multiplies, of each member that has one, where keep_base; or the recomposed weights
    where keep_weight, which only the strategy "recompose" makes.
    """
    rest = (u, drop, p, shared_A, keep_u, keep_base, keep_weight, strategy)
    direct = _runs_directly(x)
    results = _run_linear(x, members, *rest) if direct else _adapter_linear(x, *_fields(members), *rest)
    count = len(members)
    if keep_u and u is None:
        return results[:count], results[count], results[count + 1 :]
    return results[:count], None, results[count:]


class Grads(NamedTuple):
    """Of each member dA [R, K], P [N, R] = scaling · dyᵀ u, dβ [N] = Σ dy and dg [N] = Σ dy ⊙ z in fp32.

    Empty where they are not wanted.
    """

    x: Tensor | None
    A: list[Tensor]
    P: list[Tensor]
    bias: list[Tensor]
    base_scale: list[Tensor]


def _run_backward(dys: Sequence[Tensor], members: Sequence[Member], *rest: Any) -> list[Tensor]:
    x, u, zs, _, drop, p, shared_A, want_dx, want_bias, strategy = rest
    if STRATEGIES[strategy] == "eager":
        return eager.adapter_linear_backward(dys, members, *rest)
    found = _kernels("adapter_linear").adapter_linear_backward(
        dys,
        members,
        x=x,
        u=u,
        zs=zs,
        seed=drop,
        p=p,
        shared_A=shared_A,
        want_dx=want_dx,
        want_bias=want_bias,
    )
    parts = [[found.dx], found.dA or [], found.P or [], found.dbias or [], found.dbase]
    return [grad for part in parts for grad in part if grad is not None]


def _linear_backward(dys: list[Tensor], *operands: Any) -> list[Tensor]:
    return _apart(_run_backward(dys, _members(operands[:_FIELDS]), *operands[_FIELDS:]))


def _linear_backward_fake(dys: list[Tensor], *operands: Any) -> list[Tensor]:
    members, (x, u, zs, _, _, _, _, want_dx, want_bias, _) = _members(operands[:_FIELDS]), operands[_FIELDS:]
    dtype, k = sum_dtype(dys[0]), members[0].weight.shape[1]
    grads = [dys[0].new_empty(dys[0].shape[0], k)] if want_dx else []
    if x is not None:
        grads += [dys[0].new_empty(member.A.shape[0], k, dtype=dtype) for member in members]
    if u is not None:
        grads += [dy.new_empty(dy.shape[1], m.A.shape[0], dtype=dtype) for dy, m in zip(dys, members, strict=True)]
    if want_bias:
        grads += [dy.new_empty(dy.shape[1], dtype=dtype) for dy in dys]
    return grads + [dy.new_empty(dy.shape[1], dtype=dtype) for dy, z in zip(dys, zs, strict=True) if z is not None]


_adapter_linear_backward = _define(
    "adapter_linear_backward",
    f"(Tensor[] dy, {_FORM_SCHEMA}, Tensor? x, Tensor? u, Tensor?[] z, Tensor[] recomposed, Tensor? drop, float p, "
    "bool shared_A, bool want_dx, bool want_bias, str strategy) -> Tensor[]",
    _linear_backward,
    _linear_backward_fake,
)


def adapter_linear_backward(
    dys: Sequence[Tensor],
    members: Sequence[Member],
    x: Tensor | None,
    u: Tensor | None,
    zs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    drop: Tensor | None,
    p: float,
    shared_A: bool,
    want_dx: bool,
    want_bias: bool,
    strategy: str,
) -> Grads:
    """dx where want_dx, dA where x is given, P where u is, dβ where want_bias, dg of the members whose z is given."""
    rest = (x, u, zs, weights, drop, p, shared_A, want_dx, want_bias, strategy)
    if _runs_directly(dys[0]):
        results = _run_backward(dys, members, *rest)
    else:
        results = _adapter_linear_backward(list(dys), *_fields(members), *rest)
    ends = [int(want_dx)]
    for wanted in (x is not None, u is not None, want_bias):
        ends.append(ends[-1] + len(members) * wanted)
    dx = results[0] if want_dx else None
    return Grads(
        dx, results[ends[0] : ends[1]], results[ends[1] : ends[2]], results[ends[2] : ends[3]], results[ends[3] :]
    )


def _run_hadamard(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    base: bool,
    keep_u: bool,
    backend: str,
) -> list[Tensor]:
    if backend == "eager":
        y, u = eager_hadamard.hadamard_linear(x, weight, U, V, A, B, bias, base)
    else:
        launch = _kernels("hadamard_linear").hadamard_linear
        y, u = launch(x, weight, U, V, A=A, B=B, bias=bias, base=base)
    return [y, u] if keep_u and u is not None else [y]


def _hadamard_fake(x: Tensor, weight: Tensor, *operands: Any) -> list[Tensor]:
    A, keep_u = operands[2], operands[6]
    y = x.new_empty(x.shape[0], weight.shape[0])
    return [y, x.new_empty(x.shape[0], A.shape[0])] if keep_u and A is not None else [y]


_hadamard_linear = _define(
    "hadamard_linear",
    "(Tensor x, Tensor weight, Tensor U, Tensor V, Tensor? A, Tensor? B, Tensor? bias, bool base, bool keep_u, "
    "str backend) -> Tensor[]",
    _run_hadamard,
    _hadamard_fake,
)


def hadamard_linear(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    base: bool,
    keep_u: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(y [M, N] = ((W0 or 0) + W0 ⊙ (U V)) x + B u + β, u [M, R] = A x where keep_u and there is an A)."""
    call = _run_hadamard if _runs_directly(x) else _hadamard_linear
    results = call(x, weight, U, V, A, B, bias, base, keep_u, backend)
    return results[0], results[1] if len(results) > 1 else None


def _run_hadamard_backward(dy: Tensor, *operands: Any) -> list[Tensor]:
    weight, U, V, A, B, x, u, base, want_dx, want_factors, want_A, want_bias, backend = operands
    if backend == "eager":
        return eager_hadamard.hadamard_linear_backward(dy, *operands[:-1])
    found = _kernels("hadamard_linear").hadamard_linear_backward(
        dy,
        weight,
        U,
        V,
        A=A,
        B=B,
        x=x,
        u=u,
        base=base,
        want_dx=want_dx,
        want_factors=want_factors,
        want_A=want_A,
        want_bias=want_bias,
    )
    return [grad for grad in found if grad is not None]


def _hadamard_backward_fake(dy: Tensor, *operands: Any) -> list[Tensor]:
    weight, U, V, A, _, _, u, _, want_dx, want_factors, want_A, want_bias, _ = operands
    wanted = [(U, want_factors), (V, want_factors), (A, want_A)]
    shapes = [tensor.shape for tensor, want in wanted if want]
    shapes += [(dy.shape[1], u.shape[1])] if u is not None else []
    shapes += [(dy.shape[1],)] if want_bias else []
    dx = [dy.new_empty(dy.shape[0], weight.shape[1])] if want_dx else []
    return dx + [dy.new_empty(shape, dtype=sum_dtype(dy)) for shape in shapes]


_hadamard_linear_backward = _define(
    "hadamard_linear_backward",
    "(Tensor dy, Tensor weight, Tensor U, Tensor V, Tensor? A, Tensor? B, Tensor? x, Tensor? u, bool base, "
    "bool want_dx, bool want_factors, bool want_A, bool want_bias, str backend) -> Tensor[]",
    lambda dy, *operands: _apart(_run_hadamard_backward(dy, *operands)),
    _hadamard_backward_fake,
)


def hadamard_linear_backward(
    dy: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    x: Tensor | None,
    u: Tensor | None,
    base: bool,
    want_dx: bool,
    want_factors: bool,
    want_A: bool,
    want_bias: bool,
    backend: str,
) -> list[Tensor | None]:
    """[dx, dU, dV, dA, dB, dβ], None for what is not asked for: dB is where u is given. All but dx are in fp32."""
    call = _run_hadamard_backward if _runs_directly(dy) else _hadamard_linear_backward
    results = iter(call(dy, weight, U, V, A, B, x, u, base, want_dx, want_factors, want_A, want_bias, backend))
    wanted = (want_dx, want_factors, want_factors, want_A, u is not None, want_bias)
    return [next(results) if want else None for want in wanted]


def _run_bottleneck(*operands: Any) -> Tensor:
    *arguments, backend = operands
    module = eager_bottleneck if backend == "eager" else _kernels("bottleneck")
    out: Tensor = module.bottleneck(*arguments)
    return out


def _bottleneck_fake(v: Tensor, down: Tensor, up: Tensor, *rest: Any) -> Tensor:
    residual = rest[2]
    dtype = v.dtype if residual is None else residual.dtype
    return v.new_empty(v.shape[0], up.shape[0], dtype=dtype)


_bottleneck_operator = _define(
    "bottleneck",
    "(Tensor v, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, Tensor? residual, Tensor? drop, float p, "
    "float scaling, str activation, int groups, str backend) -> Tensor",
    _run_bottleneck,
    _bottleneck_fake,
)


def bottleneck(
    v: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    drop: Tensor | None,
    p: float,
    scaling: float,
    activation: str,
    groups: int,
    backend: str,
) -> Tensor:
    """z + s · (U dropout(φ(D v + a)) + c): [M, N] in the residual's dtype, which is v's where there is none."""
    call = _run_bottleneck if _runs_directly(v) else _bottleneck_operator
    out: Tensor = call(v, down, up, down_bias, up_bias, residual, drop, p, scaling, activation, groups, backend)
    return out


def _run_bottleneck_backward(*operands: Any) -> list[Tensor]:
    *arguments, backend = operands
    module = eager_bottleneck if backend == "eager" else _kernels("bottleneck")
    grads: list[Tensor] = module.bottleneck_backward(*arguments)
    return grads


def _bottleneck_backward_fake(dy: Tensor, v: Tensor | None, down: Tensor, up: Tensor, *rest: Any) -> list[Tensor]:
    dtype, wants = sum_dtype(dy), rest[-2]
    grads = [v.new_empty(v.shape)] if wants[0] and v is not None else []
    sums = zip((down.shape, down.shape[:1], up.shape, up.shape[:1]), wants[1:], strict=True)
    return grads + [dy.new_empty(shape, dtype=dtype) for shape, wanted in sums if wanted]


_bottleneck_backward_operator = _define(
    "bottleneck_backward",
    "(Tensor dy, Tensor? v, Tensor down, Tensor up, Tensor? down_bias, Tensor? drop, float p, float scaling, "
    "str activation, int groups, bool adds_dy, bool[] wants, str backend) -> Tensor[]",
    lambda *operands: _apart(_run_bottleneck_backward(*operands)),
    _bottleneck_backward_fake,
)


def bottleneck_backward(
    dy: Tensor,
    v: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    drop: Tensor | None,
    p: float,
    scaling: float,
    activation: str,
    groups: int,
    adds_dy: bool,
    wants: Sequence[bool],
    backend: str,
) -> list[Tensor | None]:
    """dv, dD, da, dU and dc, None where one is not wanted; all but the last need v. All but dv are sums in fp32.

    adds_dy: the residual was v itself, whose gradient then has dy in it.
    """
    call = _run_bottleneck_backward if _runs_directly(dy) else _bottleneck_backward_operator
    operands = (dy, v, down, up, down_bias, drop, p, scaling, activation, groups, adds_dy, list(wants), backend)
    grads = iter(call(*operands))
    return [next(grads) if wanted else None for wanted in wants]


def _weight_norm(*operands: Any) -> tuple[Tensor, Tensor]:
    *tensors, backend = operands
    function = eager.weight_norm if backend == "eager" else _kernels("weight_norm").weight_norm
    result: tuple[Tensor, Tensor] = function(*tensors)
    return result


def _weight_norm_fake(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    n, dtype = weight.shape[0], sum_dtype(weight)
    return weight.new_empty(n, dtype=dtype), weight.new_empty(n, A.shape[0], dtype=dtype)


_weight_norm_operator = _define(
    "weight_norm",
    "(Tensor weight, Tensor A, Tensor B, float scaling, Tensor base_squared, str backend) -> (Tensor, Tensor)",
    _weight_norm,
    _weight_norm_fake,
)


def weight_norm(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(n [N], W0 Aᵀ [N, R]) in fp32; base_squared [N] = ‖W0‖² by rows, a constant that its caller keeps."""
    call = _weight_norm if _runs_directly(weight) else _weight_norm_operator
    result: tuple[Tensor, Tensor] = call(weight, A, B, scaling, base_squared, backend)
    return result


def _row_squares(weight: Tensor, backend: str) -> Tensor:
    result: Tensor = (eager if backend == "eager" else _kernels("weight_norm")).row_squares(weight)
    return result


_row_squares_operator = _define(
    "row_squares",
    "(Tensor weight, str backend) -> Tensor",
    _row_squares,
    lambda weight, backend: weight.new_empty(weight.shape[0], dtype=sum_dtype(weight)),
)


def row_squares(weight: Tensor, backend: str) -> Tensor:
    """‖W0‖² by rows: [N] in fp32."""
    result: Tensor = (_row_squares if _runs_directly(weight) else _row_squares_operator)(weight, backend)
    return result


def _run_multi(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tables: FormTables,
    tokens: SortedTokens,
    max_rank: int,
    backend: str,
) -> Tensor:
    if backend == "triton":
        y: Tensor = _kernels("multi_adapter").multi_adapter_linear(x, weight, bias, tables, tokens, max_rank)
        return y
    return eager_multi.multi_adapter_linear(
        x, weight, bias, eager_plan.runs_of(tables, tokens, (weight.shape[0], weight.shape[1]))
    )


def _multi(x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Any) -> Tensor:
    count = len(FormTables._fields)
    tokens, (max_rank, backend) = SortedTokens(*operands[count:-2]), operands[-2:]
    return _run_multi(x, weight, bias, FormTables(*operands[:count]), tokens, max_rank, backend)


_multi_adapter_linear = _define(
    "multi_adapter_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor pages, Tensor vectors, Tensor ranks, Tensor A_pages, "
    "Tensor B_pages, Tensor A_strides, Tensor B_strides, Tensor scalings, Tensor? mid_scales, Tensor? out_scales, "
    "Tensor? base_scales, Tensor? added_biases, Tensor order, Tensor adapters, Tensor groups, Tensor starts, "
    "int max_rank, str backend) -> Tensor",
    _multi,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
)


def multi_adapter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: AdapterBatch, layer: LayerForms, backend: str
) -> Tensor:
    """y [M, N] of x [M, K], each token through the form of its adapter, or the base layer."""
    direct = _runs_directly(x)
    if direct and backend == "eager":
        return eager_multi.multi_adapter_linear(x, weight, bias, eager_plan.plan(batch, layer.forms, x.dtype))
    tokens = batch.sorted(x.device)
    if direct:
        return _run_multi(x, weight, bias, layer.tables, tokens, layer.max_rank, backend)
    y: Tensor = _multi_adapter_linear(x, weight, bias, *layer.tables, *tokens, layer.max_rank, backend)
    return y
