"""Adapters by slot and the tokens of steps at addresses that never change, and the update that reads them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastadapt_kernels import configs
from helpers import assert_follows
from test_multi_adapter import BACKENDS, DEVICE, LARGE, cast_form
from test_stacks import BATCHES, make_forms, normal
from torch import Tensor

from fastadapt import AdapterForm
from fastadapt.operators.multi_adapter_linear.captured import CapturedUpdate, PagedColumns, TokenBuffers
from fastadapt.operators.multi_adapter_linear.form_pages import FormPages
from fastadapt.reference import multi_adapter_linear_reference

SLOTS, MAX_RANK, MOST, K = 12, 16, 200, 24
WIDTHS = (20, 36)


def paged(dtype: torch.dtype, *forms: list[AdapterForm]) -> list[FormPages]:
    """The layers of one product, each with its forms."""
    layers = FormPages.packed([(N, K) for N in WIDTHS], SLOTS, MAX_RANK, dtype, DEVICE)
    layers[0].tables.pages.fill_(torch.nan)  # of what no adapter has written, nothing may be read
    for pages, own in zip(layers, forms, strict=bool(forms)):
        for slot, form in enumerate(own):
            pages.write(slot, form, base_bias=own[0].bias)
    return layers


def tokens_of(batch: str) -> list[int]:
    return [slot for slot, tokens in BATCHES[batch] for _ in range(tokens)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_token_of_a_step_is_its_adapters(
    batch: str, bias: bool, dtype: torch.dtype, backend: str, shuffled_programs: None
) -> None:
    """Of two layers of one product, in a launch with more tokens than the step."""
    ids, spare, gap = tokens_of(batch), 3, 4
    weights = [normal(N, K, seed=N, std=K**-0.5).to(DEVICE, dtype) for N in WIDTHS]
    x = normal(len(ids) + spare, K, seed=21).to(DEVICE, dtype)
    biases = [normal(N, seed=22, std=20.0).to(DEVICE, dtype) if bias else None for N in WIDTHS]
    forms = [
        [form._replace(bias=None if form.bias is None else form.bias.float()) for form in make_forms(N, K, b0)]
        for N, b0 in zip(WIDTHS, biases, strict=True)
    ]
    layers = paged(dtype, *forms)
    first, second = (0, WIDTHS[0]), (WIDTHS[0] + gap, WIDTHS[0] + gap + WIDTHS[1])
    y = torch.full((len(x), second[1]), torch.nan, dtype=dtype, device=DEVICE)
    packed_bias = torch.zeros(second[1], dtype=dtype, device=DEVICE) if bias else None
    for (start, stop), weight, b0 in zip((first, second), weights, biases, strict=True):
        y[:, start:stop] = F.linear(x, weight)
        if packed_bias is not None:
            packed_bias[start:stop] = b0
    buffers = TokenBuffers(MOST, SLOTS, DEVICE)
    buffers.write([0] * MOST)
    update = CapturedUpdate(
        [PagedColumns(*first, layers[0]), PagedColumns(*second, layers[1])], buffers, backend=backend
    )
    buffers.write(ids)
    update(y, x, packed_bias)
    for (start, stop), weight, b0, own in zip((first, second), weights, biases, forms, strict=True):

        def formula(to: torch.dtype, weight: Any = weight, b0: Any = b0, own: Any = own) -> dict[Any, Tensor]:
            beta = None if b0 is None else b0.to(to)
            cast = [cast_form(form, to) for form in own]
            return dict(enumerate(multi_adapter_linear_reference(x[: len(ids)].to(to), weight.to(to), beta, cast, ids)))

        assert_follows(dict(enumerate(y[: len(ids), start:stop])), formula, dtype)  # type: ignore[arg-type]
    assert y[:, first[1] : second[0]].isnan().all()
    assert y[:, second[0] :].isfinite().all()


def outlined(value: Any) -> Any:
    """Arguments of a launch with the shapes of tensors in their places."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, dict):
        return {name: outlined(inner) for name, inner in value.items()}
    return [outlined(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def test_nothing_of_a_launch_depends_on_who_is_in_and_who_is_there() -> None:
    """So a CUDA graph that was captured in a warm-up serves every step of its size, after any load and unload."""
    layers = paged(torch.float32)
    buffers = TokenBuffers(MOST, SLOTS, DEVICE)
    update = CapturedUpdate(
        [PagedColumns(0, 20, layers[0]), PagedColumns(20, 56, layers[1])], buffers, backend="triton"
    )
    forms = [make_forms(N, K, None) for N in WIDTHS]
    y, x, generator = torch.zeros(40, 56, device=DEVICE), torch.zeros(40, K, device=DEVICE), random.Random(0)

    def launches() -> str:
        with configs.recorded_launches(LARGE) as found:
            update(y, x)
        assert len(found) == 2
        kept = [layer.tables for layer in layers]
        addresses = [None if table is None else table.data_ptr() for tables in kept for table in tables]
        tokens = [tensor.data_ptr() for tensor in buffers.of(40)[:-1]]  # type: ignore[union-attr]
        return str([(launch.grid, launch.config, outlined(launch.arguments)) for launch in found] + addresses + tokens)

    buffers.write([0])
    expected = launches()  # before any adapter came
    for step in range(6):
        for layer, own in zip(layers, forms, strict=True):
            slot = generator.randrange(SLOTS)
            layer.write(slot, own[step])
            layer.clear(generator.randrange(SLOTS))
        buffers.write([generator.randrange(-1, SLOTS) for _ in range(40 - step)])
        assert launches() == expected


def test_a_slot_has_nothing_of_who_was_there_before() -> None:
    forms = make_forms(20, K, None)
    reused, fresh = (FormPages((20, K), 1, MAX_RANK, torch.float32, DEVICE) for _ in range(2))
    buffers = TokenBuffers(4, 1, DEVICE)
    buffers.write([0, 0, -1, 0])
    x, before = normal(4, K, seed=1).to(DEVICE), normal(4, 20, seed=2).to(DEVICE)

    def y_of(pages: FormPages, backend: str) -> Tensor:
        y = before.clone()
        CapturedUpdate([PagedColumns(0, 20, pages)], buffers, backend=backend)(y, x)
        return y

    for form in forms:
        reused.write(0, form)
        fresh.clear(0)
        assert torch.equal(y_of(fresh, "triton"), before)
        fresh = FormPages((20, K), 1, MAX_RANK, torch.float32, DEVICE)
        fresh.write(0, form)
        for backend in BACKENDS:
            assert torch.equal(y_of(reused, backend), y_of(fresh, backend))
    assert set(reused.forms) == {0}
    reused.clear(0)
    assert not reused.forms
    assert reused.tables.ranks.tolist() == [0]


def test_what_d_switches_off_takes_no_rank() -> None:
    """As AdaLoRA's pruned ranks: slots have room for what is left, and kernels read no more."""
    pages = FormPages((20, K), 2, MAX_RANK, torch.float32, DEVICE)
    d = torch.tensor([0.0, 2.0, 0.0, 3.0])
    pages.write(1, AdapterForm(normal(4, K, seed=1), normal(20, 4, seed=2), mid_scale=d))
    assert pages.tables.ranks.tolist() == [0, 2]
    (A,), (B,) = pages.forms[1].A, pages.forms[1].B
    exact = normal(20, 4, seed=2) @ (d[:, None] * normal(4, K, seed=1))
    torch.testing.assert_close((B.T @ A).cpu(), exact)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 200, 512, 513, 700])
@pytest.mark.parametrize("kind", ["one each", "one", "zipf", "base"])
def test_each_token_is_in_one_tile_of_its_adapter(kind: str, tokens: int) -> None:
    generator = random.Random(tokens)
    slots = {
        "one each": [token % (SLOTS + 1) - 1 for token in range(tokens)],
        "one": [3] * tokens,
        "zipf": [min(SLOTS - 1, int(generator.paretovariate(1.0)) - 2) for _ in range(tokens)],
        "base": [-1] * tokens,
    }[kind]
    buffers = TokenBuffers(700, SLOTS)
    buffers.write(list(range(SLOTS)) * 50)
    buffers.write(slots)
    assert buffers.idle == (max(slots) < 0)
    for launched in (tokens, min(tokens + 5, 700), 700):
        order, adapters, groups, tiles, block = buffers.of(launched)
        assert block == (1 if launched <= 32 else 16 if launched <= 512 else 64)
        assert sorted(order.tolist()) == list(range(launched))
        assert torch.equal(adapters, groups)
        assert adapters.tolist()[tokens:] == [-1] * (launched - tokens)
        seen = []
        for first, end, owner in tiles.tolist():
            for place in range(first, min(end, first + block)):
                seen.append(int(order[place]))
                assert slots[seen[-1]] == int(adapters[place]) == owner
        assert sorted(seen) == list(range(tokens))


def test_what_is_written_in_any_mode() -> None:
    pages, buffers = FormPages((8, 16), 4, 8, torch.float32, DEVICE), TokenBuffers(4, 4, DEVICE)
    forms = [AdapterForm(normal(4, 16, seed=seed), normal(8, 4, seed=seed)) for seed in range(4)]
    for slot, mode in enumerate((torch.inference_mode(), torch.no_grad(), torch.inference_mode(), torch.enable_grad())):
        with mode:
            pages.write(slot, forms[slot])
            buffers.write([slot])
    for slot, form in enumerate(forms):
        assert torch.equal(pages.forms[slot].A[0].cpu(), form.A)


def test_what_pages_refuse() -> None:
    pages, form = FormPages((8, 16), 2, 4, torch.float32), AdapterForm(torch.ones(4, 16), torch.ones(8, 4))
    pages.write(0, form)
    for slot in (-1, 2):
        with pytest.raises(ValueError, match=f"slot must be 0 to 1, got {slot}"):
            pages.write(slot, form)
    with pytest.raises(ValueError, match=r"A and B must be \[r, 16\] and \[8, r\], got \(4, 15\) and \(8, 4\)"):
        pages.write(0, form._replace(A=torch.ones(4, 15)))
    with pytest.raises(ValueError, match="a form with U and V"):
        pages.write(0, form._replace(U=torch.ones(8, 1), V=torch.ones(1, 16)))
    with pytest.raises(ValueError, match="r must be at most 4, which is what slots have room for, got 5"):
        pages.write(0, AdapterForm(torch.ones(5, 16), torch.ones(8, 5)))
    assert set(pages.forms) == {0}
    assert torch.equal(pages.forms[0].A[0], form.A)


def test_what_buffers_refuse() -> None:
    buffers = TokenBuffers(4, 2)
    buffers.write([1])
    with pytest.raises(ValueError, match="a step may have 4 tokens, got 5"):
        buffers.write([0] * 5)
    with pytest.raises(ValueError, match="a step may have 4 tokens, got 5"):
        buffers.of(5)
    for slot in (2, -2):
        with pytest.raises(ValueError, match=f"slots must be -1 for the base model to 1, got {slot}"):
            buffers.write([slot])
    assert buffers.of(1).adapters.tolist() == [1]


def test_memory_whose_contents_are_lost() -> None:
    """As of an engine that sleeps: what is entered after it is found where it was."""
    pages, buffers = FormPages((20, K), 3, MAX_RANK, torch.float32, DEVICE), TokenBuffers(4, 3, DEVICE)
    forms = make_forms(20, K, None)
    pages.write(0, forms[0])
    for table in pages.tables:
        if table is not None:
            table.fill_(1 << 20)
    pages.write(2, forms[1])
    pages.clear(1)
    buffers.write([2, -1, 1, 2])
    x, before = normal(4, K, seed=1).to(DEVICE), normal(4, 20, seed=2).to(DEVICE)
    fresh = FormPages((20, K), 3, MAX_RANK, torch.float32, DEVICE)
    fresh.write(2, forms[1])
    for backend in BACKENDS:
        found, expected = before.clone(), before.clone()
        CapturedUpdate([PagedColumns(0, 20, pages)], buffers, backend=backend)(found, x)
        CapturedUpdate([PagedColumns(0, 20, fresh)], buffers, backend=backend)(expected, x)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_step_may_have_are_nobodys(backend: str) -> None:
    """As rows that fill up a batch, or those of an image model whose engine counts its tokens otherwise."""
    pages, buffers = FormPages((20, K), 1, MAX_RANK, torch.float32, DEVICE), TokenBuffers(4, 1, DEVICE)
    pages.write(0, make_forms(20, K, None)[1])
    buffers.write([0] * 4)
    x, before, bias = (normal(*shape, seed=1).to(DEVICE) for shape in ((6, K), (6, 20), (20,)))
    y = before.clone()
    update = CapturedUpdate([PagedColumns(0, 20, pages)], buffers, backend=backend)
    update(y, x)
    assert (y[:4] != before[:4]).any(1).all()
    assert torch.equal(y[4:], before[4:])
    y = before.clone()
    update(y, x, bias)
    assert torch.equal(y[4:], before[4:] + bias)


def test_before_the_first_step_graphs_are_captured_for_all() -> None:
    pages, buffers = FormPages((20, K), 1, MAX_RANK, torch.float32, DEVICE), TokenBuffers(4, 1, DEVICE)
    with configs.recorded_launches(LARGE) as found:
        CapturedUpdate([PagedColumns(0, 20, pages)], buffers, backend="triton")(
            torch.zeros(4, 20, device=DEVICE), torch.zeros(4, K, device=DEVICE)
        )
    assert len(found) == 2
