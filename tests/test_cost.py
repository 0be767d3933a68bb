"""The cost model: the facts that it must know, and that it counts what is there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastadapt.operators.adapter_linear.cost import (
    break_even,
    cannot_expand,
    cannot_recompose,
    cheapest,
    forward_works,
    keeps_made,
    predicted_seconds,
    works,
)
from fastadapt.operators.adapter_linear.devices import DEVICES, device_from, device_of, keep_measured
from fastadapt.operators.adapter_linear.workload import Workload

A100, H100 = DEVICES["A100-SXM4-80GB"], DEVICES["H100-SXM"]
GPUS = [device for name, device in DEVICES.items() if name != "CPU"]
ALL = ("split", "fused", "library", "recompose", "expand")


def layer(M: int, K: int, N: int, r: int = 16, **more: object) -> Workload:
    return Workload(M, K, (N,), (r,), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("K", "efficiency"), [(1024, 0.71), (4096, 0.91), (14336, 0.97)])
def test_break_even_efficiencies_of_a_triton_gemm_on_an_h100(K: int, efficiency: float) -> None:
    assert break_even(K, H100) == pytest.approx(efficiency, abs=0.01)


def test_split_is_the_default_for_training_and_the_library_has_large_k_few_tokens_and_no_grad() -> None:
    for device in (A100, H100):
        assert cheapest(ALL, layer(8192, 4096, 4096), device) == "split"
        assert cheapest(ALL, layer(8192, 1024, 1024), device) == "split"
        assert cheapest(ALL, Workload(8192, 4096, (4096, 1024, 1024), (16,) * 3), device) == "split"
        assert cheapest(ALL, layer(2048, 4096, 4096), device) == "library"
        assert cheapest(ALL, layer(8192, 4096, 4096, backward=False), device) == "library"
    for device in GPUS:
        assert cheapest(ALL, layer(8192, 14336, 4096), device) == "library"
        assert cheapest(ALL, layer(8192, 4096, 4096, dropout=True), device) == "split"


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_shrinking_inside_the_gemm_is_for_decoding_alone(device: object) -> None:
    assert isinstance(device, type(H100))
    assert cheapest(ALL, layer(64, 4096, 4096, backward=False), device) == "fused"
    assert cheapest(ALL, layer(8, 4096, 4096, 32, backward=False), device) != "fused"
    for tokens in (65, 512, 8192):
        for backward in (True, False):
            assert cheapest(ALL, layer(tokens, 4096, 4096, backward=backward), device) != "fused"


def test_two_products_are_left_to_the_library_until_they_are_measured() -> None:
    two = layer(8192, 4096, 4096, base_scale=True, trains_base=True, dropout=True, dropout_on_base=True)
    for device in GPUS:
        assert cheapest(ALL, two, device) == "library"
        assert cheapest(ALL, two._replace(dropout_on_base=False), device) == "split"
        assert cheapest(("split",), two, device) == "split"


def test_what_is_given_is_chosen_from() -> None:
    assert cheapest(("library",), layer(8192, 1024, 1024), H100) == "library"
    assert cheapest(("split",), layer(8192, 14336, 4096), H100) == "split"
    with pytest.raises(ValueError, match="no strategy of fused can be chosen"):
        cheapest(("fused",), layer(8192, 4096, 4096), H100)


def vera(M: int, K: int, N: int, **more: object) -> Workload:
    return layer(M, K, N, 256, dtype="float32", shared_A=True, trains_A=False, **more)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("tokens", [16, 64, 512, 800, 1300, 4096])
def test_recomposing_is_chosen_where_it_has_fewer_flops(tokens: int, backward: bool) -> None:
    w = vera(tokens, 576, 1536, backward=backward)
    chosen = cheapest(("library", "recompose"), w, DEVICES["CPU"])
    flops = {name: sum(work.flops for work in works(name, w)) for name in ("library", "recompose")}
    assert (chosen == "recompose") == (flops["recompose"] < flops["library"])


def test_a_low_rank_is_recomposed_only_for_many_tokens() -> None:
    """There the passes over memory decide: y or dx once more, or W0 and W'."""

    def chosen(tokens: int) -> str:
        return cheapest(("library", "recompose"), layer(tokens, 576, 1536, 16, dtype="float32"), DEVICES["CPU"])

    assert [chosen(tokens) for tokens in (64, 512, 1024, 16384)] == ["library", "library", "library", "recompose"]


def test_what_cannot_be_recomposed_is_not() -> None:
    w = vera(4096, 576, 1536)
    assert cheapest(("library", "recompose"), w, DEVICES["CPU"]) == "recompose"
    assert not keeps_made("recompose", w)
    assert keeps_made("recompose", vera(800, 576, 1536))
    assert not keeps_made("recompose", vera(800, 576, 1536)._replace(trains_A=True))
    for refused in ({"dtype": "bfloat16"}, {"dropout": True}, {"trains_base": True}):
        assert cannot_recompose(w._replace(**refused))
        assert cheapest(("library", "recompose"), w._replace(**refused), DEVICES["CPU"]) == "library"
    assert cheapest(("library", "recompose"), w._replace(ranks=(0,)), DEVICES["CPU"]) == "library"


def test_the_expanded_product_is_kept_for_few_tokens_of_trained_scales() -> None:
    names = ("library", "recompose", "expand")

    def chosen(tokens: int, offered: tuple[str, ...] = names, **changed: object) -> str:
        return cheapest(offered, vera(tokens, 576, 1536)._replace(trains_B=False, **changed), DEVICES["CPU"])

    assert [chosen(tokens) for tokens in (64, 176, 2048)] == ["expand", "expand", "recompose"]
    for refused in ({"trains_A": True}, {"dtype": "bfloat16"}, {"base_scale": True}, {"trains_up": False}):
        assert cannot_expand(vera(64, 576, 1536)._replace(trains_B=False, **refused))
        assert chosen(64, **refused) != "expand"
    # Without a backward there is nothing to keep it for; with dropout a weight cannot be recomposed for many tokens.
    assert chosen(64, backward=False) == chosen(2048, dropout=True) == "library"
    assert chosen(64, ("split", *names)) != "expand"


def test_split_moves_the_bytes_that_were_aimed_at() -> None:
    mib = 2**20
    single = sum(work.bytes for work in works("split", layer(8192, 4096, 4096))) / mib
    group = sum(work.bytes for work in works("split", Workload(8192, 4096, (4096, 1024, 1024), (16,) * 3))) / mib
    assert single == pytest.approx(514, abs=3)
    assert group == pytest.approx(640, abs=9)  # the 640 MiB leave out tensors of rank r


def test_works_count_flops_and_launches() -> None:
    M, K, N, r = 100, 64, 48, 8
    forward = forward_works("split", layer(M, K, N, r))
    assert [(work.flops, work.launches) for work in forward] == [(2 * M * K * r, 1), (2 * M * N * (K + r), 1)]
    assert len(works("split", layer(M, K, N, r))) == 5
    assert len(works("fused", layer(M, K, N, r))) == 4
    for name in ("split", "library"):
        both = sum(work.flops for work in works(name, layer(M, K, N, r)))
        assert both == 2 * M * (2 * K * N + 3 * K * r + 3 * N * r)
    two = layer(M, K, N, r, base_scale=True, dropout=True, dropout_on_base=True)
    assert forward_works("split", two)[1].flops == 2 * M * N * (2 * K + r)
    frozen = layer(M, K, N, r, trains_A=False, trains_up=False, wants_dx=False)
    assert works("split", frozen) == forward_works("split", frozen)


def test_a_scaled_dy_and_the_bits_of_a_mask_are_counted() -> None:
    M, K, N = 128, 64, 32
    plain, scaled = layer(M, K, N), layer(M, K, N, base_scale=True)
    assert moved("dy", scaled) - moved("dy", plain) == 2 * M * N
    assert moved("dx", scaled) == moved("dx", plain)
    on_base = scaled._replace(dropout=True, dropout_on_base=True)
    assert moved("dx", on_base) - moved("dx", plain) == 2 * M * N
    for phase in ("shrink", "linear"):
        assert moved(phase, on_base) - moved(phase, plain) == M * K / 8


def moved(phase: str, w: Workload) -> float:
    (found,) = (work.bytes for work in works("split", w) if work.phase == phase)
    return found


def test_every_tile_of_columns_of_a_fused_decode_reads_a_again() -> None:
    def moved(r: int) -> float:
        (product,) = forward_works("fused", layer(16, 4096, 4096, r, backward=False))
        return product.bytes

    A, u_and_B = 4 * 64 * 4096, 2 * 16 * 64 + 4 * 64 * 4096
    # The cache gives A beside the weight that memory gives, but not of many ranks.
    assert moved(16) - moved(8) < A
    assert moved(128) - moved(64) == (u_and_B + 4096 // 32 * A) / 2


def test_time_is_the_longer_of_products_and_traffic_and_a_launch() -> None:
    (product,) = forward_works("fused", layer(8192, 8192, 8192))
    seconds = predicted_seconds([product], H100)
    assert seconds == pytest.approx(product.flops / (989e12 * 0.65 * 0.90) + 3e-6)
    shrink = forward_works("split", layer(8192, 8192, 8192))[0]
    assert predicted_seconds([shrink], H100) == pytest.approx(shrink.bytes / (3.35e12 * 0.9) + 3e-6)


def test_what_was_measured_takes_the_place_of_what_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path))
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    assumed = device_from(card)
    keep_measured("NVIDIA H200", triton=0.93)
    path = keep_measured("NVIDIA H200", launch=2e-6)
    assert device_from(card) == assumed._replace(triton=0.93, launch=2e-6)
    assert device_from(SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)) == H100
    for numbers in ({"triton": 0.0}, {"triton": float("nan")}, {"launch": 1.0}, {"bandwidth": 1e12}, {}):
        with pytest.raises(ValueError, match="numbers must be positive"):
            keep_measured("NVIDIA H200", **numbers)
    for damage in ("{", "[]", '{"NVIDIA H200": 3}', "[" * 100_000):
        path.write_text(damage)
        assert device_from(card) == assumed
    assert caplog.text.count("left aside") == 4
    path.write_text('{"NVIDIA H200": {"triton": "fast", "launch": -1, "attainable_matmul": 0.7}}')
    assert device_from(card) == assumed._replace(attainable_matmul=0.7)


def test_a_cpu_and_every_gpu_have_an_entry() -> None:
    assert device_of(torch.device("cpu")) is DEVICES["CPU"]
    known = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", major=8, minor=0, multi_processor_count=108)
    assert device_from(known) == A100
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA GB200")
    found = [device_from(SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132)) for name in names]
    assert [device.name for device in found] == ["H200-SXM", "H100-SXM", *names[2:]]
    ada = SimpleNamespace(
        name="NVIDIA GeForce RTX 4090",
        major=8,
        minor=9,
        multi_processor_count=128,
        clock_rate=2_520_000,
        memory_clock_rate=10_501_000,
        memory_bus_width=384,
        L2_cache_size=72 << 20,
    )
    guess = device_from(ada)
    assert guess.matmul["bfloat16"] == pytest.approx(330e12, rel=0.01)
    assert guess.bandwidth == pytest.approx(1.008e12, rel=0.01)
    assert guess.l2 == 72 << 20
    stranger = device_from(SimpleNamespace(name="?", major=99, minor=9, multi_processor_count=200))
    assert stranger.bandwidth > 0
    assert cheapest(ALL, layer(8192, 4096, 4096), stranger) in ALL
