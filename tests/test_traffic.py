"""The meter of memory traffic, the models of other libraries, and the L2 model that they share."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from conftest import interpreter_runs
from fastadapt_kernels import configs

from bench import coverage, l2, peers, predictions, traffic
from bench.__main__ import main
from fastadapt.commands import doctor
from fastadapt.operators.adapter_linear.cost import works
from fastadapt.operators.adapter_linear.devices import DEVICES
from fastadapt.operators.adapter_linear.workload import Workload

ROOT = Path(__file__).resolve().parent.parent

H100, A100 = DEVICES["H100-SXM"], DEVICES["A100-SXM4-80GB"]
LORA = Workload(8192, 4096, (4096,), (16,))
QKV = Workload(8192, 4096, (4096, 1024, 1024), (16,) * 3)
needs_interpreter = pytest.mark.skipif(not interpreter_runs(), reason="counts in Triton's interpreter")


@triton.jit
def _toy_kernel(x, pair, out, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    inside = index < count
    first = tl.load(x + index, mask=inside)
    again = tl.load(x + index // 2, mask=inside)
    second = tl.load(pair[1] + tl.zeros((BLOCK,), tl.int32), mask=inside)
    tl.store(out + index, first + again + second, mask=inside & (index % 3 == 0))


@needs_interpreter
def test_the_meter_counts_under_the_mask_and_once() -> None:
    x, out = torch.zeros(40, dtype=torch.float16), torch.zeros(40, dtype=torch.float32)
    pair = (torch.zeros(3, dtype=torch.float16), torch.zeros(5, dtype=torch.float16))
    arguments = {"x": x, "pair": pair, "out": out, "count": 33}
    with traffic.metered() as launches:
        configs.launch(_toy_kernel, (2,), arguments, {"BLOCK": 64})
    (launch,) = launches
    assert launch.kernel == "_toy_kernel"
    assert set(launch.operands) == {"x", "pair[0]", "pair[1]", "out"}
    assert launch.operands["x"] == traffic.Count(80, read=2 * 66 * 2, first_read=33 * 2)
    assert launch.operands["pair[0]"] == traffic.Count(6)
    assert launch.operands["pair[1]"] == traffic.Count(10, read=2 * 33 * 2, first_read=2)
    assert launch.operands["out"] == traffic.Count(160, written=2 * 11 * 4, first_written=11 * 4)


@needs_interpreter
def test_parts_count_to_the_cost_model_and_no_large_tensor_is_left_over() -> None:
    row, touched = traffic.row_of("dora_dropout", traffic.CASES["dora_dropout"], 8192, "H100-SXM")
    # The model counts q, which lives within the backward, with the rest.
    assert row["mib"] - row["norm_mib"] == pytest.approx(row["split_target_mib"], rel=0.005)
    # (g - 1) ⊙ dy lives from the pass over dy to dx, and nothing else does.
    assert row["large_tensors"] == "dx dy scaled_dy x y z"
    bits = 8192 * 4096 / 8
    mask = {
        (operand.phase, operand.kernel, operand.read, operand.written) for operand in touched if operand.role == "mask"
    }
    assert mask == {
        ("forward", "_shrink_kernel", 0, bits),
        ("forward", "_adapter_linear_kernel", bits, 0),
    }
    assert row["launches_forward"] <= 2
    assert row["launches_backward"] <= 3
    assert row["partials_mib"] < 24
    assert row["lorafusion_mib"] is None
    assert {operand.phase for operand in touched} == {"norm", "forward", "backward"}


@needs_interpreter
def test_the_command_writes_the_issues_columns(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["traffic", "--json", str(path), "--cases", "lora_qkv_group"])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["mib"] <= 650
    assert (row["launches_forward"], row["launches_backward"]) == (2, 3)
    assert row["reread_mib"] < row["reread_row_major_mib"]
    assert row["minimum_mib"] < row["split_target_mib"] < row["lorafusion_mib"] < row["unsloth_mib"]
    columns = {"case", "mib", "minimum_mib", "partials_mib", "reread_mib", "launches_forward", "launches_backward"}
    assert columns <= row.keys()


@needs_interpreter
def test_the_cases_launch_the_kernels_of_the_operators_that_they_cover() -> None:
    with configs.recorded_launches(traffic.SHARED_MEMORY["H100-SXM"]) as launches:
        for case in traffic.CASES.values():
            traffic.run_passes(case.workload(8192), "meta", launches)
        for bottleneck in traffic.BOTTLENECKS.values():
            traffic.run_bottleneck(bottleneck, 8192, bottleneck.K, "meta", launches)
        for Q in traffic.HADAMARD.values():
            traffic.run_hadamard(8192, 4096, 4096, Q, "meta", launches)
        for placed in traffic.EXPERTS.values():
            traffic.run_experts(placed, 65536, placed.experts, placed.K, placed.N, "meta", launches)
    with traffic.metered() as counted:
        traffic.count_batch(traffic.BATCHES["many_small_decode"], 72)
    launched = {launch.kernel.fn.__name__ for launch in launches} | {launch.kernel for launch in counted}
    named = {kernel for case in doctor.CASES if case.operator in traffic.COVERS for kernel in case.kernels}
    kernels = {name: case.kernels for name, case in doctor.OPERATORS.items()}
    left_out = {kernel for name in coverage.LEFT_OUT["traffic"] for kernel in kernels.get(name, ())}
    assert {f"_{kernel}_kernel" for kernel in named - left_out} == launched


@needs_interpreter
@pytest.mark.parametrize("name", traffic.BATCHES)
def test_many_adapters_move_what_their_true_ranks_are(name: str) -> None:
    row = traffic.batch_row(name, traffic.BATCHES[name])
    assert row["factors_mib"] == pytest.approx(row["factors_minimum_mib"])
    assert row["mib"] == pytest.approx(row["minimum_mib"])
    if name == "many_ranks_decode":
        assert row["factors_padded_mib"] > 4 * row["factors_mib"]
    if name == "many_base_decode":
        assert row["mib"] == 0


@needs_interpreter
@pytest.mark.parametrize("name", traffic.BOTTLENECKS)
def test_a_bottleneck_moves_its_stream_once_a_launch(name: str) -> None:
    row, touched = traffic.bottleneck_row(name, traffic.BOTTLENECKS[name], 8192, "H100-SXM")
    # The model leaves out what the first stage of a split sum keeps, and reads the factors once a pass.
    assert row["minimum_mib"] < row["mib"] == pytest.approx(row["split_target_mib"], rel=0.005)
    assert row["partials_mib"] < 0.2 * row["mib"]
    # The fifth adds up the parts of the down projection's gradient: 768 columns are few for a GPU.
    assert (row["launches_forward"], row["launches_backward"]) == (1, 5)
    own = [] if traffic.BOTTLENECKS[name].on_itself else ["residual"]
    assert row["large_tensors"].split() == ["dv", "dy", "out", *own, "v"]
    assert {operand.phase for operand in touched} == {"forward", "backward"}


@needs_interpreter
def test_a_recomposed_weight_is_never_written() -> None:
    row = traffic.hadamard_row("hadamard", 8, 8192, "H100-SXM")
    assert row["weight_writes_mib"] == 0
    for phase in ("forward", "dx", "grads"):
        assert row[f"{phase}_mib"] == pytest.approx(row[f"{phase}_minimum_mib"], rel=1e-3)
    assert row["partials_mib"] <= 16
    assert (row["launches_forward"], row["launches_dx"], row["launches_grads"]) == (1, 1, 3)


@needs_interpreter
@pytest.mark.parametrize("name", traffic.EXPERTS)
def test_experts_read_every_weight_once_a_pass(name: str) -> None:
    case = traffic.EXPERTS[name]
    row, touched = traffic.experts_row(name, case, 8192, "H100-SXM")
    assert row["minimum_mib"] < row["mib"] == pytest.approx(row["split_target_mib"], rel=0.01)
    # q and, of DoRA, W0 Aᵀ.
    assert row["partials_mib"] < 0.1 * row["mib"]
    assert (row["launches_norm"], row["launches_forward"], row["launches_backward"]) == (int(case.dora), 2, 4)
    weights = [(operand.phase, operand.read) for operand in touched if operand.role == "weight"]
    size = 2 * case.experts * case.N * case.K
    assert weights == [(phase, size) for phase in (["norm"] if case.dora else []) + ["forward", "backward"]]


def moved(peer: str, w: Workload) -> float:
    found = peers.moved_mib(peers.PEERS[peer](w))
    assert found is not None
    return found


def test_the_peers_move_what_was_published_of_them() -> None:
    """The table of kernels.md, M 8192, 4096 -> 4096, r 16, and Llama 8B's q, k, v, in MiB."""
    target = sum(work.bytes for work in works("split", LORA)) / traffic.MIB
    assert target == pytest.approx(514, abs=3)
    assert traffic.minimum_bytes(LORA) / traffic.MIB == pytest.approx(385, abs=3)
    assert moved("lorafusion", LORA._replace(dropout=True)) == pytest.approx(706, abs=4)
    assert moved("axolotl", LORA) == pytest.approx(899, abs=1)
    assert moved("unsloth", LORA) == pytest.approx(963, abs=1)
    assert moved("peft_bf16", LORA) == pytest.approx(1346, abs=1)
    # The second table leaves out tensors of rank r: 8 MiB here.
    assert traffic.minimum_bytes(QKV) / traffic.MIB == pytest.approx(480, abs=9)
    assert sum(work.bytes for work in works("split", QKV)) / traffic.MIB == pytest.approx(640, abs=9)
    assert moved("unsloth", QKV) == pytest.approx(2240, abs=9)
    alone = sum(work.bytes for n in QKV.outputs for work in works("split", LORA._replace(outputs=(n,))))
    # It takes the sum of the three dx for one pass of four tensors; autograd makes two of three.
    assert alone / traffic.MIB + 4 * 64 == pytest.approx(1408, abs=9)


def test_peers_that_cannot_do_a_case_say_so() -> None:
    dora = LORA._replace(base_scale=True, trains_base=True, dropout_on_base=True)
    vera = LORA._replace(ranks=(256,), trains_A=False)
    can = {
        "lora": [peer for peer, passes in peers.PEERS.items() if passes(LORA)],
        "dropout": [peer for peer, passes in peers.PEERS.items() if passes(LORA._replace(dropout=True))],
        "dora": [peer for peer, passes in peers.PEERS.items() if passes(dora)],
        "dora_dropout": [peer for peer, passes in peers.PEERS.items() if passes(dora._replace(dropout=True))],
        "vera": [peer for peer, passes in peers.PEERS.items() if passes(vera)],
    }
    assert can == {
        "lora": ["peft", "peft_bf16", "unsloth", "axolotl", "lorafusion"],
        "dropout": ["peft", "peft_bf16", "axolotl", "lorafusion"],
        "dora": ["peft", "peft_bf16", "axolotl"],
        "dora_dropout": ["peft", "peft_bf16"],
        "vera": ["peft", "peft_bf16"],
    }


def gemm(N: int, K: int, block_n: int, group_m: int) -> l2.Gemm:
    return l2.Gemm(8192, (N,), K, 128, block_n, group_m)


def test_tile_order_is_the_kernels() -> None:
    """`grouped_tile` in Python: rows of a group walk the columns together."""
    order = list(l2.Gemm(5 * 16, (3 * 8, 8), 64, 16, 8, 2).order())
    assert order[:6] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert order[-4:] == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert sorted(order) == [(row, column) for row in range(5) for column in range(4)]


@pytest.mark.parametrize("device", [A100, H100], ids=lambda device: device.name)
@pytest.mark.parametrize("block_n", [128, 256])
def test_grouped_order_beats_row_major(device: object, block_n: int) -> None:
    assert isinstance(device, type(H100))
    for N, K in ((4096, 4096), (6144, 4096), (28672, 4096), (8192, 8192), (4096, 14336)):
        grouped, row_major = (l2.reread_bytes(gemm(N, K, block_n, group), device) for group in (16, 1))
        assert 0 < grouped < row_major


def test_what_fits_is_read_once() -> None:
    small = l2.Gemm(512, (500,), 512, 128, 128, 8)
    assert l2.reread_bytes(small, H100) == 0
    assert small.compulsory == 2 * (512 * 512 + 500 * 512 + 512 * 500)
    assert l2.reread_bytes(small, H100._replace(l2=4096, multiprocessors=1)) > 0


def test_the_l2_model_gives_lorafusions_counters() -> None:
    for row in predictions.counters():
        assert row["x_counter"] == pytest.approx(1, abs=0.08), row


def test_predictions_are_marked_as_such(tmp_path: Path) -> None:
    page, rows_file = tmp_path / "PREDICTIONS.md", tmp_path / "predictions.json"
    main(["predictions", "--markdown", str(page), "--json", str(rows_file)])
    text = page.read_text(encoding="utf-8")
    assert "Nobody has measured any time on this page" in text
    assert "Where the model says that we do not win" in text
    named = re.findall(r"`([a-z_/0-9]+\.py)`", text)
    assert len(named) > 3
    assert [name for name in named if not (ROOT / name).exists()] == []
    rows = json.loads(rows_file.read_text())["rows"]
    assert {row["device"] for row in rows} == set(DEVICES) - {"CPU"}
    assert {row["M"] for row in rows} == {64, 2048, 8192}
    for row in rows:
        assert row["ours_us"] == row[f"{row['picked']}_us"] > 0
        assert row["picked"] == "fused" if row["M"] == 64 else row["picked"] in ("split", "library")
        assert row["peft_us"] > row["peft_bf16_us"]
