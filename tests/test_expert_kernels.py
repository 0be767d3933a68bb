"""The kernels of experts: several tiles an expert, any strides, what lies around the operands, order, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastadapt_kernels import configs
from fastadapt_kernels import expert_linear as kernels
from helpers import assert_follows, guarded, guarded_outputs, margins_intact
from test_expert_linear import DTYPES, FORMS, Block, Values, check, ends, form_of, operands, results
from torch import Tensor

from fastadapt.functional import expert_linear
from fastadapt.operators.expert_linear import op
from fastadapt.operators.expert_linear.function import experts_of
from fastadapt.operators.expert_linear.parameters import Experts, Keep, Saved, Wants
from fastadapt.reference import expert_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several tiles of rows at some experts, in the interpreter as well; none at one.
SPLIT = [70, 0, 33, 5]
# A GPU to record launches for: what a block of sm_80 may take.
LARGE = 166_912


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_several_tiles(name: str, dtype: torch.dtype) -> None:
    check(SPLIT, (100, 72, 24), name, dtype, torch.float32, 0.0, "triton")


@pytest.mark.parametrize("r", [1, 40])
@pytest.mark.parametrize("name", ["VeRA", "every part, dropped before the base"])
def test_several_tiles_of_ranks(name: str, r: int) -> None:
    check(SPLIT, (33, 70, r), name, torch.float32, torch.float32, 0.4, "triton")


@pytest.mark.parametrize("split", [[5], [0] * 20 + [3] + [0] * 12], ids=["one expert", "one of many experts"])
def test_numbers_of_experts(split: list[int]) -> None:
    check(split, (20, 12, 3), "every part", torch.float32, torch.float32, 0.0, "triton")


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "every part"])
def test_factors_without_ranks(name: str) -> None:
    check([3, 0, 5, 1], (20, 12, 0), name, torch.float32, torch.float32, 0.4, "triton")


def every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else every_other(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [transposed, every_other], ids=lambda layout: layout.__name__)
def test_any_strides(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    parts = FORMS["every part"]
    values = operands(SPLIT, 40, 36, 8, dtype, torch.float32)
    dy = torch.randn(1, 1, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype).expand(sum(SPLIT), 36)

    def ours(leaves: Values) -> Tensor:
        own = {name: layout(value) for name, value in leaves.items()}
        offsets = every_other(ends(SPLIT).int())
        return expert_linear(own["x"], own["weight"], form_of(own, parts), offsets, backend="triton")

    def formula(to: torch.dtype) -> Values:
        def run(leaves: Values) -> Tensor:
            form = form_of(leaves, parts)
            return expert_linear_reference(leaves["x"], leaves["weight"], form, ends(SPLIT).tolist())

        return results(run, {name: value.to(to) for name, value in values.items()}, parts, dy)

    assert_follows(results(ours, values, parts, dy), formula, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [(), ("shared",)], ids=["a pair each", "one for all"])
def test_the_norm_is_exact_to_fp32(dtype: torch.dtype, shared: tuple[str, ...]) -> None:
    """A 16-bit weight does not cost accuracy: A enters its product as two 16-bit parts."""
    values, parts = operands([3, 0, 5], 70, 33, 8, dtype, torch.float32), (*FORMS["DoRA"], *shared)
    for weight in (values["weight"], transposed(values["weight"])):
        experts = experts_of(weight, form_of(values, parts), None)
        found = op.expert_linear(values["x"], None, ends([3, 0, 5]).int(), experts, Keep(False, False), "triton")

        def formula(to: torch.dtype) -> Values:
            form = form_of({name: value.to(to) for name, value in values.items()}, parts)
            return {"": (weight.to(to) + 0.5 * form.B.mT @ form.A).norm(dim=2)}  # noqa: B023

        assert found.norm is not None
        assert found.norm.dtype == torch.float32
        assert_follows({"": found.norm}, formula, torch.float32)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_the_weights(factors: torch.dtype) -> None:
    values = operands([1, 1, 1], 70, 33, 8, torch.bfloat16, factors)
    found = kernels.base_products(values["weight"], values["A"])
    exact = values["A"].double() @ values["weight"].double().mT
    assert found.dtype == torch.float32
    # Rounded once to 8 bits, A would be off by 2^-9.
    assert (found - exact).abs().max() <= 2.0**-15 * exact.abs().max()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_block_is_its_formula(kind: str) -> None:
    found = Block(torch.float32, kind=kind).grads(backend="triton")
    assert_follows(found, lambda dtype: Block(dtype, kind=kind).grads(backend="reference"), torch.float32)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_block_under_dropout_is_that_of_the_eager_products(kind: str) -> None:
    found = Block(torch.float32, kind=kind).grads(0.4, backend="triton")
    assert_follows(found, lambda dtype: Block(dtype, kind=kind).grads(0.4, backend="eager"), torch.float32)


def run_all(
    values: Values, offsets: Tensor, dy: Tensor, row_scale: Tensor, place: Callable[[Tensor], Tensor] = lambda t: t
) -> list[Tensor]:
    """Both launchers with every part and every wish, tied and not, for factors of each and of all; all that they give.

    place sees each operand first.
    """
    values = {name: place(value) for name, value in values.items()}
    offsets, dy, row_scale = place(offsets), place(dy), place(row_scale)
    low = place(values["x"] * 2)
    found: list[Tensor | None] = []
    for name, shared in (("every part", ()), ("every part, dropped before the base", ("shared",)), ("given norms", ())):
        experts: Any = experts_of(values["weight"], form_of(values, (*FORMS[name], *shared)), None)
        for x_dropped in (None, low):
            y, u, z = kernels.expert_linear(values["x"], x_dropped, offsets, experts, Keep(True, True))
            wants = Wants(True, x_dropped is not None, *[True] * 6)
            wants = wants._replace(out_scale=not experts.tied, mid_scale=experts.mid_scale is not None)
            saved = Saved(values["x"] if x_dropped is None else low, u, z, row_scale)
            grads = kernels.expert_linear_backward(dy, offsets, experts, saved, wants)
            found += [y, u, z, *grads]
    found.append(kernels.base_products(values["weight"], values["A"]))
    return [tensor for tensor in found if tensor is not None]


def ingredients(dtype: torch.dtype) -> tuple[Values, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    split = [35, 0, 3, 18]
    dy = torch.randn(sum(split), 40, generator=generator).to(DEVICE, dtype)
    row_scale = torch.rand(sum(split), generator=generator).to(DEVICE)
    return operands(split, 36, 40, 40, dtype, torch.float32), ends(split).int(), dy, row_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype) -> None:
    given = ingredients(dtype)
    expected = run_all(*given)
    placed: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        placed.append(guarded(tensor))
        return placed[-1]

    with guarded_outputs() as written:
        outputs = run_all(*given, place)
    assert written
    # Bit for bit: a NaN that was read from a margin would show, and strides do not change the order of any sum.
    for actual, plain in zip(outputs, expected, strict=True):
        assert torch.equal(actual, plain)
        assert torch.isfinite(actual).all()
    for tensor in placed + written:
        assert margins_intact(tensor)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    given = ingredients(torch.float32)
    expected = run_all(*given)
    request.getfixturevalue("shuffled_programs")
    for actual, plain in zip(run_all(*given), expected, strict=True):
        assert torch.equal(actual, plain)


def test_ends_beyond_the_rows_write_nothing_there() -> None:
    """As an expert would make them that is none of them; on a GPU nobody looks at them before."""
    values, _, dy, row_scale = ingredients(torch.float32)
    with guarded_outputs() as written:
        run_all(values, torch.tensor([35, 35, 90, 200], dtype=torch.int32, device=DEVICE), dy, row_scale)
    for tensor in written:
        assert margins_intact(tensor)


def recorded(experts: Experts, S: int, *, trains: str = "AB") -> tuple[list[str], list[str]]:
    """The kernels that a step launches on tensors without data, forward and backward."""
    E, N, K = experts.weight.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    offsets = torch.empty(E, dtype=torch.int32, device="meta")
    x, dy = empty(S, K), empty(S, N)
    g = experts.base_scale is not None
    with configs.recorded_launches(LARGE) as forward:
        _, u, z = kernels.expert_linear(x, None, offsets, experts, Keep("B" in trains or "d" in trains, g))
    wants = Wants(True, False, "A" in trains, "B" in trains, "d" in trains, "h" in trains, g, "b" in trains)
    with configs.recorded_launches(LARGE) as backward:
        kernels.expert_linear_backward(dy, offsets, experts, Saved(x if "A" in trains else None, u, z, None), wants)
    first, second = ([launch.kernel.fn.__name__ for launch in launches] for launches in (forward, backward))
    return first, second


def meta_experts(R: int, vectors: str = "", shared: bool = False, tied: bool = False) -> Experts:
    E, N, K = 64, 1536, 2048

    def table(name: str, width: int) -> Tensor | None:
        return torch.empty(E, width, device="meta") if name in vectors else None

    A, B = (torch.empty(1 if shared else E, R, width, device="meta") for width in (K, N))
    weight = torch.empty(E, N, K, dtype=torch.bfloat16, device="meta")
    tables = [table("d", R), table("h", N), table("g", N), table("b", N)]
    return Experts(weight, A, B, *tables, None, 2.0, tied, False)


def test_launches() -> None:
    """One for each product and each kind of sum; none asks where the rows of an expert lie."""
    shrink, product, sums = (f"_expert_{name}_kernel" for name in ("shrink", "product", "grads"))
    assert recorded(meta_experts(16), 8192) == ([shrink, product], [shrink, sums, product, sums])
    dora = recorded(meta_experts(16, "g", tied=True), 8192)
    assert dora == ([shrink, product], [shrink, sums, product, sums])
    # λ_b and λ_d of VeRA: sums of u ⊙ q are a launch of their own; 256 ranks are several parts of the other.
    vera = recorded(meta_experts(256, "dh", shared=True), 8192, trains="dh")
    assert vera == ([shrink, product], [shrink, sums, "_sum_partials_kernel", product, sums])


def test_a_pair_for_all_experts_has_its_gradients_summed_in_parts() -> None:
    found = recorded(meta_experts(16, shared=True), 8192)[1]
    assert found.count("_sum_partials_kernel") == 2
