"""Every launcher against its formula in fp64, in each dtype: on a GPU, or through Triton's interpreter without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from fastadapt_kernels import configs, tiles, weight_norm
from fastadapt_kernels.adapter_linear import Member, adapter_linear, adapter_linear_backward
from fastadapt_kernels.shrink import kept_bits, shrink
from helpers import assert_follows, guarded, guarded_outputs, margins_intact
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
P = 0.3


def seed_tensor(value: int = 2**40 + 7) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


class Layer(NamedTuple):
    """A linear layer, its adapter, an input and a gradient, with values that break careless algebra."""

    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    weight: Tensor  # [N, K]
    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    mid_scale: Tensor  # [R]
    out_scale: Tensor  # [N]
    base_scale: Tensor  # [N]
    bias: Tensor  # [N]


def make_layer(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, parameter_dtype: torch.dtype = torch.float32
) -> Layer:
    generator = torch.Generator().manual_seed(M + 1000 * K + N + R)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = parameter_dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(DEVICE, dtype)

    base_scale = 1 + normal(N, std=2e-3, dtype=torch.float32)
    base_scale[0], base_scale[N // 2], base_scale[-1] = 0.0, 1e-3, -1.0
    out_scale = normal(N)
    out_scale[N // 3] = 0.0
    return Layer(
        x=normal(M, K, dtype=dtype),
        dy=normal(M, N, dtype=dtype),
        weight=normal(N, K, std=K**-0.5, dtype=dtype),
        A=normal(R, K, std=K**-0.5),
        B=normal(N, R),
        mid_scale=normal(R),
        out_scale=out_scale,
        base_scale=base_scale,
        bias=normal(N, std=20.0),
    )


def in_dtype(dtype: torch.dtype, formula: Callable[..., Any], *operands: Tensor | None) -> Any:
    """A formula run in one dtype: fp64 for what is exact, the activation's for what may be expected."""
    return formula(*(None if operand is None else operand.to(dtype) for operand in operands))


def check(actual: Tensor, formula: Callable[..., Tensor], *operands: Tensor | None, dtype: torch.dtype) -> None:
    """Hold a result to the error that its formula makes in ``dtype``, which need not be the dtype of the operands."""
    assert_follows({"": actual}, lambda to: {"": in_dtype(to, formula, *operands)}, dtype)


# The formulas, with every scale and the mask as an argument (mask: 1 / keep probability where kept, 0 elsewhere).


def shrink_formula(x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    return (x if mask is None else x * mask) @ A.T


def linear_formula(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    B: Tensor,
    d: Tensor | None,
    h: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    mask_on_base: Tensor | None,
) -> Tensor:
    y = x @ weight.T
    if g is not None:
        y = g * y if mask_on_base is None else y + (g - 1) * ((x * mask_on_base) @ weight.T)
    low_rank = (u if d is None else d * u) @ B.T
    y = y + (low_rank if h is None else h * low_rank)
    return y if bias is None else y + bias


def q_formula(dy: Tensor, B: Tensor, h: Tensor | None, d: Tensor | None) -> Tensor:
    """d ⊙ q: what dx and dA contract with A and x̃. It is rounded where a kernel rounds it: before d."""
    q = ((dy if h is None else h * dy) @ B).to(dy.dtype)
    return q if d is None else d * q


def dx_formula(
    dy: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    d: Tensor | None,
    h: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    mask_on_base: Tensor | None,
) -> Tensor:
    low_rank = q_formula(dy, B, h, d) @ A
    if mask_on_base is not None and g is not None:
        return dy @ weight + mask_on_base * (((g - 1) * dy) @ weight + low_rank)
    base = (dy if g is None else g * dy) @ weight
    return base + (low_rank if mask is None else mask * low_rank)


def input_grads_formula(
    x: Tensor, dy: Tensor, B: Tensor, d: Tensor | None, h: Tensor | None, mask: Tensor | None
) -> Tensor:
    return q_formula(dy, B, h, d).T @ (x if mask is None else x * mask)


def scaled_mask(seed: Tensor, rows: int, cols: int) -> Tensor:
    return tiles.dropout_mask(seed, rows, cols, P).double() / tiles.keep_probability(P)


class Case(NamedTuple):
    """A group: what its members share, and for each of them N, R, whether it has scales and drops its base path."""

    M: int
    K: int
    members: tuple[tuple[int, int, bool, bool], ...]
    dropout: bool
    shared_A: bool = False


def make_member(layer: Layer, *, scaled: bool, on_base: bool, scaling: float = 1.0) -> Member:
    if not scaled:
        return Member(layer.weight, layer.A, layer.B, None, None, scaling, None, None, on_base)
    vectors = layer.mid_scale, layer.out_scale, scaling, layer.base_scale, layer.bias
    return Member(layer.weight, layer.A, layer.B, *vectors, on_base)


def make_group(case: Case, dtype: torch.dtype, **options: Any) -> tuple[Tensor, list[Tensor], list[Member]]:
    """(x, dys, members)."""
    layers = [make_layer(case.M, case.K, N, R, dtype, **options) for N, R, _, _ in case.members]
    if case.shared_A:
        layers = [layer._replace(A=layers[0].A) for layer in layers]
    members = [
        make_member(layer, scaled=scaled, on_base=on_base, scaling=1 + 0.5 * i)
        for i, (layer, (_, _, scaled, on_base)) in enumerate(zip(layers, case.members, strict=True))
    ]
    return layers[0].x, [layer.dy for layer in layers], members


def by_member(u: Tensor, members: list[Member], *, shared_A: bool) -> list[Tensor]:
    if shared_A:
        return [u] * len(members)
    return list(u.split([member.A.shape[0] for member in members], dim=1))


def check_group(
    x: Tensor, dys: list[Tensor], members: list[Member], *, dropout: bool, shared_A: bool = False, fused: bool = False
) -> None:
    """Forward and backward of a group, everything asked for, against the formulas of each member."""
    dtype = x.dtype
    drop: dict[str, Any] = {"seed": seed_tensor(), "p": P} if dropout else {}
    mask = scaled_mask(seed_tensor(), *x.shape) if dropout else None
    strategy = "fused" if fused else "split"
    ys, u, zs = adapter_linear(x, members, keep_base=True, shared_A=shared_A, strategy=strategy, **drop)
    us = by_member(u, members, shared_A=shared_A)
    grads = adapter_linear_backward(dys, members, x=x, u=u, zs=zs, shared_A=shared_A, want_bias=True, **drop)
    assert grads.dx is not None
    assert grads.dA is not None
    assert grads.P is not None
    assert grads.dbias is not None
    dx_operands = []
    for i, (member, dy) in enumerate(zip(members, dys, strict=True)):
        weight, A, B, d, h, scaling, g, bias, on_base = member
        h = torch.full_like(B[:, 0], scaling) if B.shape[1] > 0 and h is None else None if h is None else scaling * h
        mask_on_base = mask if on_base and g is not None else None
        check(us[i], shrink_formula, x, A, mask, dtype=dtype)
        check(ys[i], linear_formula, x, weight, us[i], B, d, h, g, bias, mask_on_base, dtype=dtype)
        z = zs[i]
        assert (z is None) == (g is None)
        # Sums over tokens are in fp32, whatever the dtype of what is summed: they are judged in fp32.
        if z is None:
            assert grads.dbase[i] is None
        else:
            check(z, shrink_formula, x, weight, mask_on_base, dtype=dtype)
            check(grads.dbase[i], lambda dy, z: (dy * z).sum(0), dy, z, dtype=torch.float32)
        check(grads.P[i], lambda dy, u: scaling * (dy.T @ u), dy, us[i], dtype=torch.float32)  # noqa: B023
        check(grads.dbias[i], lambda dy: dy.sum(0), dy, dtype=torch.float32)
        # q is kept in the activation's dtype, which is what dA, a sum over tokens, inherits.
        check(grads.dA[i], input_grads_formula, x, dy, B, d, h, mask, dtype=dtype)
        assert grads.dA[i].dtype == torch.float32
        dx_operands.append((dy, weight, A, B, d, h, g, mask, mask_on_base))
    sum_of_dx = lambda to: {"dx": sum(in_dtype(to, dx_formula, *operands) for operands in dx_operands)}  # noqa: E731
    assert_follows({"dx": grads.dx}, sum_of_dx, dtype)


# Pairs of conditions rather than all of them at once: each value of each axis is met in some case and some dtype.
CASES = [
    Case(1, 100, ((72, 1, True, False),), dropout=True),
    Case(7, 33, ((100, 3, True, True),), dropout=True),
    Case(37, 72, ((33, 8, False, False),), dropout=True),
    Case(70, 100, ((33, 24, True, True),), dropout=True),
    Case(37, 130, ((72, 16, True, False),), dropout=False),
    Case(7, 100, ((40, 64, False, False),), dropout=False),
    Case(37, 40, ((72, 100, True, False),), dropout=True),
    Case(7, 72, ((33, 256, True, True),), dropout=True),
    Case(0, 100, ((72, 8, True, True), (33, 8, False, False)), dropout=True),
    Case(37, 72, ((100, 0, True, True),), dropout=True),
    Case(37, 33, ((72, 0, False, False), (40, 0, True, False)), dropout=False),
    # Groups: as q/k/v are, with mixed ranks and forms, without an adapter on one of them, and with one A for all.
    Case(37, 72, ((100, 8, False, False), (33, 8, False, False), (40, 8, False, False)), dropout=True),
    Case(37, 100, ((72, 3, False, False), (130, 16, True, False), (33, 0, True, False)), dropout=False),
    Case(37, 72, ((33, 0, False, False), (100, 24, True, True), (40, 5, True, False)), dropout=True),
    Case(37, 72, ((100, 40, True, False), (33, 40, True, False)), dropout=True, shared_A=True),
    Case(7, 100, ((72, 8, True, True), (33, 100, False, False)), dropout=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launchers_match_their_formulas(case: Case, dtype: torch.dtype) -> None:
    check_group(*make_group(case, dtype), dropout=case.dropout, shared_A=case.shared_A)


FUSED_CASES = [CASES[i] for i in (0, 1, 2, 3, 4, 5, 8, 9, 11, 12, 13, 14)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_fused_matches_the_formulas(case: Case, dtype: torch.dtype) -> None:
    check_group(*make_group(case, dtype), dropout=case.dropout, shared_A=case.shared_A, fused=True)


def test_fused_refuses_wide_ranks() -> None:
    x, _, members = make_group(CASES[6], torch.float32)
    with pytest.raises(ValueError, match="ranks up to 64, got 100"):
        adapter_linear(x, members, strategy="fused")


def test_a_group_has_the_mask_and_the_results_of_its_members_alone() -> None:
    """Bit for bit only on a GPU: the interpreter's products are BLAS's, whose sums depend on the tiles' shapes."""
    x, dys, members = make_group(CASES[13], torch.float32)
    check_group(x, dys, members, dropout=True)
    for dy, member in zip(dys, members, strict=True):
        check_group(x, [dy], [member], dropout=True)


def test_a_given_u_is_used_and_not_computed_again() -> None:
    x, _, members = make_group(CASES[13], torch.float32)
    u = torch.randn(x.shape[0], 29, device=DEVICE)
    for strategy in ("split", "fused"):
        with configs.recorded_launches(LARGE) as launches:
            adapter_linear(x, members, u=u, strategy=strategy)
        assert len(launches) == 1
        ys, same, zs = adapter_linear(x, members, u=u, strategy=strategy)
        assert same is u
        assert zs == [None] * 3
        for member, part, y in zip(members, by_member(u, members, shared_A=False), ys, strict=True):
            weight, _, B, d, h, scaling, g, bias, _ = member
            h = None if h is None else scaling * h
            check(y, linear_formula, x, weight, part, B, d, h, g, bias, None, dtype=torch.float32)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [transposed, every_other], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("fused", [False, True])
def test_any_strides_and_sliced_projections(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, fused: bool
) -> None:
    # VeRA shares one A [r, largest in] and one B [largest out, r]: a layer sees a corner of each. And parameters here
    # have the activation's dtype in one member, fp32 in the other, which has other strides as well.
    largest = make_layer(37, 100, 72, 16, dtype, parameter_dtype=dtype)
    layer = make_layer(37, 72, 33, 8, dtype, parameter_dtype=dtype)
    other = make_layer(37, 72, 40, 8, dtype)
    layer = layer._replace(
        x=layout(layer.x),
        dy=layout(layer.dy),
        weight=layout(layer.weight),
        A=largest.A[:8, :72],
        B=layout(largest.B)[:33, :8],
    )
    one = make_member(layer, scaled=True, on_base=True)
    two = make_member(other, scaled=True, on_base=False)
    check_group(layer.x, [layer.dy], [one], dropout=True, fused=fused)
    check_group(layer.x, [layer.dy, other.dy], [one, two], dropout=True, fused=fused)
    check_group(layer.x, [other.dy, layer.dy], [two, one._replace(A=layout(one.A))], dropout=False, fused=fused)


def test_gradient_expanded_from_a_sum() -> None:
    layer = make_layer(37, 72, 33, 8, torch.float32)
    dy = torch.ones(1, 1, device=DEVICE).expand(37, 33)
    check_group(layer.x, [dy], [make_member(layer, scaled=True, on_base=False)], dropout=False)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_base_scale_next_to_one_is_not_lost_in_bfloat16(dropout: bool) -> None:
    # |g - 1| of a trained DoRA is below half an ulp of bf16, so the error of one element cannot show whether g was
    # rounded. The share of g's exact effect that survives, over all elements, does.
    layer = make_layer(64, 64, 64, 8, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    g = 1 + 1.5e-3 * torch.randn(64, generator=generator).to(DEVICE)
    one = torch.ones_like(g)
    member = Member(layer.weight, layer.A, torch.zeros_like(layer.B), None, None, 1.0, g, None, dropout_on_base=True)
    drop: dict[str, Any] = {"seed": seed_tensor(), "p": P} if dropout else {}
    mask = scaled_mask(seed_tensor(), 64, 64) if dropout else None

    def survives(actual: Tensor, formula: Callable[..., Tensor], operands: list[Any], after: list[Any]) -> float:
        without = in_dtype(torch.float64, formula, *operands, one, *after)
        effect = in_dtype(torch.float64, formula, *operands, g, *after) - without
        return (((actual.double() - without) * effect).sum() / effect.square().sum()).item()

    (y,), u, _ = adapter_linear(layer.x, [member], **drop)
    share = survives(y, linear_formula, [layer.x, layer.weight, u, member.B, None, None], [None, mask])
    assert share == pytest.approx(1, abs=0.1)
    if dropout:
        dx = adapter_linear_backward([layer.dy], [member], **drop).dx
        assert dx is not None
        share = survives(dx, dx_formula, [layer.dy, layer.weight, layer.A, member.B, None, None], [None, mask])
        assert share == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("R", [8, 100])
def test_backward_gives_only_what_is_asked_for(R: int) -> None:
    case = Case(37, 72, ((33, R, True, False), (100, R, False, False)), dropout=False)
    x, dys, members = make_group(case, torch.float32)
    _, u, zs = adapter_linear(x, members, keep_base=True)
    full = adapter_linear_backward(dys, members, x=x, u=u, zs=zs, want_bias=True)
    wanted: dict[str, dict[str, Any]] = {
        "dx": {},
        "dA": {"x": x, "want_dx": False},
        "P": {"u": u, "want_dx": False},
        "dbias": {"want_bias": True, "want_dx": False},
        "dbase": {"zs": zs, "want_dx": False},
    }
    for name, asked in wanted.items():
        grads = adapter_linear_backward(dys, members, **asked)._asdict()
        for other, value in grads.items():
            if other == name:
                values, expected = (value, getattr(full, name)) if name != "dx" else ([value], [full.dx])
                for one, same in zip(values, expected, strict=True):
                    assert one is same is None or torch.allclose(one, same, rtol=1e-4, atol=1e-4)
            else:
                assert value is None or value == [None, None]
    assert adapter_linear_backward(dys, members, want_dx=False) == (None, None, None, None, [None, None])


# A GPU to record launches for: what a block of sm_80 may take.
LARGE = 166_912


def meta_member(N: int, K: int, R: int, dtype: torch.dtype = torch.bfloat16) -> Member:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    A, B = empty(R, K, dtype=torch.float32), empty(N, R, dtype=torch.float32)
    return Member(empty(N, K), A, B, None, None, 2.0, None, None)


def recorded_bytes(launches: list[Any]) -> int:
    """Bytes written to and read from the buffers of split sums."""
    buffers: dict[int, Tensor] = {}
    for launch in launches:
        for name in ("u", "q", "sums", "partials"):
            value = launch.arguments.get(name)
            if isinstance(value, Tensor) and value.dim() >= 2 and value.dtype == torch.float32:
                buffers[id(value)] = value
    return 2 * sum(buffer.numel() * 4 for buffer in buffers.values() if buffer.shape[0] > 1)


def launches_of(
    members: list[Member], M: int, *, dropout: bool, strategy: str = "split"
) -> tuple[list[Any], list[Any]]:
    """What the training step of a group launches, forward and backward, with LoRA's gradients."""
    x = torch.empty(M, members[0].weight.shape[1], dtype=members[0].weight.dtype, device="meta")
    drop: dict[str, Any] = {"seed": torch.empty(1, dtype=torch.int64, device="meta"), "p": P} if dropout else {}
    with configs.recorded_launches(LARGE) as forward:
        ys, u, _ = adapter_linear(x, members, strategy=strategy, **drop)
    with configs.recorded_launches(LARGE) as backward:
        adapter_linear_backward(ys, members, x=x, u=u, **drop)
    return forward, backward


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("strategy", "forward_launches"), [("split", 2), ("fused", 1)])
@pytest.mark.parametrize("M", [512, 8192])
@pytest.mark.parametrize(("K", "Ns"), [(4096, (4096,)), (4096, (4096, 1024, 1024)), (576, (576,))], ids=str)
def test_launches(K: int, Ns: tuple[int, ...], M: int, strategy: str, forward_launches: int, dropout: bool) -> None:
    members = [meta_member(N, K, 16) for N in Ns]
    forward, backward = launches_of(members, M, dropout=dropout, strategy=strategy)
    assert len(forward) == forward_launches
    # A narrow x has too few columns for a GPU: where tokens are many, dA is a sum of parts.
    assert len(backward) == (4 if (K, M) == (576, 8192) else 3)


def test_partial_buffers_stay_small() -> None:
    forward, backward = launches_of([meta_member(4096, 4096, 16)], 8192, dropout=True)
    assert recorded_bytes(forward + backward) <= 24 * 2**20


def norm_formula(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return (weight + 1.5 * B @ A).norm(dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N", "R"), [(100, 72, 3), (72, 33, 24), (40, 100, 100), (33, 40, 0)])
def test_weight_norm(K: int, N: int, R: int, dtype: torch.dtype) -> None:
    layer = make_layer(1, K, N, R, dtype)
    squares = weight_norm.row_squares(layer.weight)
    check(squares, lambda weight: weight.square().sum(1), layer.weight, dtype=torch.float32)
    norm, WA = weight_norm.weight_norm(layer.weight, layer.A, layer.B, 1.5, squares)
    assert norm.dtype == WA.dtype == torch.float32
    # Judged in fp32 for a 16-bit weight too: A enters the dot as two 16-bit parts there.
    check(norm, norm_formula, layer.weight, layer.A, layer.B, dtype=torch.float32)


def test_weight_norm_of_a_row_that_is_nan_is_nan() -> None:
    layer = make_layer(1, 40, 33, 8, torch.float32)
    layer.B[5, 3] = torch.nan
    norm, _ = weight_norm.weight_norm(layer.weight, layer.A, layer.B, 1.5, weight_norm.row_squares(layer.weight))
    assert norm.isnan().nonzero().tolist() == [[5]]


def test_weight_norm_of_a_cancelled_row_is_not_nan() -> None:
    layer = make_layer(1, 40, 33, 8, torch.float32)
    weight = -1.5 * layer.B @ layer.A
    norm, _ = weight_norm.weight_norm(weight, layer.A, layer.B, 1.5, weight_norm.row_squares(weight))
    assert torch.isfinite(norm).all()
    assert (norm <= 1e-2 * weight.norm(dim=1)).all()


def philox_words(seed: int, quad: int, row: int) -> list[int]:
    """Philox4x32-7 as its paper states it, in Python's integers (Salmon et al. 2011, section 4.3)."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = quad, row, 0, 0
    k0, k1 = seed & mask, seed >> 32
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def test_the_bits_that_the_shrink_leaves_are_the_mask() -> None:
    M, K = 37, 200
    x, A, seed = torch.ones(M, K, device=DEVICE), torch.zeros(3, K, device=DEVICE), seed_tensor()
    kept = kept_bits(x)
    shrink([x], [A], out_dtype=x.dtype, seed=seed, p=P, kept=kept)
    bits = kept[:, :, None] >> torch.arange(32, device=DEVICE, dtype=torch.int32) & 1
    assert torch.equal(bits.flatten(1)[:, :K].bool(), tiles.dropout_mask(seed, M, K, P))


def test_a_mask_that_hits_the_base_path_is_drawn_once_and_read_as_bits() -> None:
    member = meta_member(4096, 4096, 16)._replace(
        base_scale=torch.empty(4096, dtype=torch.float32, device="meta"), dropout_on_base=True
    )
    (shrinking, product), _ = launches_of([member], 8192, dropout=True)
    assert shrinking.arguments["kept"] is product.arguments["kept"] is not None
    plain = member._replace(dropout_on_base=False)
    assert [launch.arguments["kept"] for launch in launches_of([plain], 8192, dropout=True)[0]] == [None, None]


def test_dx_has_its_operands_ready_made() -> None:
    """Multiplied by g inside its loop, dy would reach Hopper's matrix unit through registers, in every tile again."""
    scale = torch.empty(4096, dtype=torch.float32, device="meta")
    kept, dropped, bare = (meta_member(4096, 4096, 16)._replace(base_scale=g) for g in (scale, scale, None))
    members = [kept, dropped._replace(dropout_on_base=True), bare]
    _, (pass_over_dy, dx, _) = launches_of(members, 512, dropout=True)
    own, offset, _ = pass_over_dy.arguments["scaled_dys"]
    assert pass_over_dy.arguments["base_shifts"] == (0.0, 1.0, 0.0)
    assert pass_over_dy.arguments["scaled_rows"] == (512, 512, 0)
    assert dx.arguments["dys"][0] is own
    assert dx.arguments["offset_dys"][1] is offset
    assert dx.arguments["dys"][1:] == pass_over_dy.arguments["dys"][1:]


def test_dropout_mask_is_philox() -> None:
    seed = 2**40 + 7
    mask = tiles.dropout_mask(seed_tensor(seed), 5, 70, P)
    for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (4, 66), (3, 69), (2, 65)]:
        word = philox_words(seed, column // 4, row)[column % 4]
        assert bool(mask[row, column]) == (word >> 1 >= tiles.drop_threshold(P))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_mask_rate(p: float) -> None:
    count = 300 * 400
    kept = tiles.dropout_mask(seed_tensor(), 300, 400, p)
    assert abs(tiles.keep_probability(p) - (1 - p)) <= 2**-31
    assert abs(kept.double().mean().item() - (1 - p)) <= 5 * (p * (1 - p) / count) ** 0.5
    # Neighbours along rows and columns are independent.
    agree = 1 - 2 * p * (1 - p)
    for first, second in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:])):
        spread = 5 * (agree * (1 - agree) / count) ** 0.5
        assert abs((first == second).double().mean().item() - agree) <= spread + 1e-12


def test_dropout_mask_depends_on_every_bit_of_the_seed_and_not_on_the_shape() -> None:
    first = tiles.dropout_mask(seed_tensor(1), 40, 100, 0.5)
    assert torch.equal(first, tiles.dropout_mask(seed_tensor(1), 40, 100, 0.5))
    assert torch.equal(first[:7, :33], tiles.dropout_mask(seed_tensor(1), 7, 33, 0.5))
    for other in (2, 1 + 2**32, 1 + 2**62):
        agreement = (first == tiles.dropout_mask(seed_tensor(other), 40, 100, 0.5)).double().mean().item()
        assert abs(agreement - 0.5) < 0.05


def test_drop_probability_next_to_one_keeps_a_finite_scale() -> None:
    assert 0 < tiles.keep_probability(1 - 1e-15) < 1e-9
    assert tiles.keep_probability(0.0) == 1.0


def run_all(layer: Layer, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
    """Every launcher once, with everything on; ``place`` sees each operand first. Returns all outputs."""
    seed = place(seed_tensor())
    layer = Layer(*map(place, layer))
    x, dy, weight = layer.x, layer.dy, layer.weight
    drop: dict[str, Any] = {"seed": seed, "p": P}
    rich = make_member(layer, scaled=True, on_base=True, scaling=0.5)
    group = [rich, rich._replace(dropout_on_base=False), make_member(layer, scaled=False, on_base=False)]
    outputs: list[Tensor] = []
    for members in ([rich], group):
        for strategy in ("split", "fused"):
            ys, u, zs = adapter_linear(x, members, keep_base=True, strategy=strategy, **drop)
            grads = adapter_linear_backward([dy] * len(members), members, x=x, u=u, zs=zs, want_bias=True, **drop)
            for value in (ys, [u], zs, [grads.dx], grads.dA, grads.P, grads.dbias, grads.dbase):
                outputs += [tensor for tensor in value or [] if tensor is not None]
    squares = place(weight_norm.row_squares(weight))
    outputs += [squares, *weight_norm.weight_norm(weight, layer.A, layer.B, 1.5, squares)]
    return [*outputs, tiles.dropout_mask(seed, 7, 33, P)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype) -> None:
    layer = make_layer(37, 100, 33, 24, dtype)
    expected = run_all(layer)
    operands: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        operands.append(guarded(tensor))
        return operands[-1]

    with guarded_outputs() as written:
        outputs = run_all(layer, place)
    assert written
    # Bit for bit: a NaN that was read from a margin would show, and strides do not change the order of any sum.
    for actual, plain in zip(outputs, expected, strict=True):
        assert torch.equal(actual, plain)
        assert actual.dtype == torch.bool or torch.isfinite(actual).all()
    for tensor in operands + written:
        assert margins_intact(tensor)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    layer = make_layer(70, 72, 40, 40, torch.float32)
    expected = run_all(layer)
    request.getfixturevalue("shuffled_programs")
    for actual, plain in zip(run_all(layer), expected, strict=True):
        assert torch.equal(actual, plain)


def test_margins_notice_a_stray_write() -> None:
    view = guarded(torch.zeros(3, 4))
    assert margins_intact(view)
    view.fill_(float("nan"))
    assert margins_intact(view)
    torch.as_strided(view, (1,), (1,), view.storage_offset() + 4).fill_(float("nan"))
    assert not margins_intact(view)


@triton.jit
def _bfloat16_arithmetic_kernel(
    a, b, product, total, difference, quotient, larger, negative, chosen, SIZE: tl.constexpr
):
    rows = tl.arange(0, SIZE)[:, None]
    index = rows * SIZE + tl.arange(0, SIZE)[None, :]
    a_tile = tl.load(a + index)
    b_tile = tl.load(b + index)
    tl.store(product + index, tl.dot(a_tile, b_tile))
    tl.store(total + index, a_tile + b_tile)
    tl.store(difference + index, a_tile - b_tile)
    tl.store(quotient + index, (a_tile / b_tile).to(a_tile.dtype))
    tl.store(larger + index, tl.maximum(a_tile, b_tile))
    tl.store(negative + index, -a_tile)
    tl.store(chosen + index, tl.where(a_tile < b_tile, a_tile, 2.0))


def test_bfloat16_is_computed_and_rounded_as_on_a_gpu() -> None:
    """Guards the cure in conftest: uncured, the interpreter's bf16 results are off by factors."""
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, device=DEVICE).bfloat16() for _ in range(2))
    product = torch.empty(16, 16, device=DEVICE)
    total, difference, quotient, larger, negative, chosen = (torch.empty_like(a) for _ in range(6))
    _bfloat16_arithmetic_kernel[(1,)](a, b, product, total, difference, quotient, larger, negative, chosen, SIZE=16)
    exact = a.double() @ b.double()
    assert (product - exact).abs().max() <= 1e-6 * exact.abs().max()
    # PyTorch rounds each of these once, to nearest even; so must the kernel.
    assert torch.equal(total, a + b)
    assert torch.equal(difference, a - b)
    assert torch.equal(quotient, a / b)
    assert torch.equal(larger, torch.maximum(a, b))
    assert torch.equal(negative, -a)
    assert torch.equal(chosen, torch.where(a < b, a, 2.0))


@triton.jit
def _bfloat16_cast_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(tl.bfloat16))


def test_bfloat16_casts_round_to_nearest_even() -> None:
    values = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 255.9, -1e-40, float("inf"), float("nan"), 3.4e38]
    source = torch.tensor(values, device=DEVICE)
    target = torch.empty(8, dtype=torch.bfloat16, device=DEVICE)
    _bfloat16_cast_kernel[(1,)](source, target, SIZE=8)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)
