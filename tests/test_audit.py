"""Kernels as compiled for real GPUs, and the audit that reads what the compiler made."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from fastadapt_kernels import configs

from bench import audit
from fastadapt.commands import doctor

ROOT = Path(__file__).resolve().parent.parent

PTX = """
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	@%p3 ld.global.v2.b32 { %r8, %r9 }, [ %rd16 + 0 ];
	ld.global.L1::evict_last.b16 { %rs1 }, [ %rd17 + 0 ];
	@%p30 cp.async.cg.shared.global [ %r4 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 { %r1 }, %rd1, %rd2, 1, 1, 1, 0, 1;
	@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p2;
	wgmma.fence.sync.aligned;
	@%p3 st.global.v4.b32 [ %rd14 + 0 ], { %r13, %r14, %r15, %r16 };
	st.shared.v4.b32 [ %r1 + 0 ], { %r13, %r14, %r15, %r16 };
"""
AMDGCN = """
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	global_load_dwordx4 v[4:7], v[0:1], off
	global_load_lds_dword v[0:1], off
	buffer_store_dwordx2 v[4:5], v0, s[0:3], 0 offen
	global_store_short_d16_hi v[0:1], v4, off
	ds_read_b128 v[0:3], v4
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 4
    .vgpr_count:     88
    .vgpr_spill_count: 2
"""
SASS = """
        /*1a30*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, !UPT ;
        /*1a40*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12].tnspB, R24, gsb0 ;
        /*1a50*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1a60*/                   HGMMA.64x16x16.F32.BF16 R152, R20, gdesc[UR4].tnspB, R152, gsb0 ;
"""
USAGE = """ Function _kernel:
  REG:198 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def clean_row(**changes: Any) -> dict[str, Any]:
    row = {"kernel": "_kernel", "target": "sm_80", "dtype": "bf16", "config": "BLOCK_M=64", "operands": "x"}
    row |= {"registers": 128, "spill_bytes": 0, "shared_bytes": 166_912, "shared_limit": 166_912}
    row |= {"tensor_memory": 512, "matrix_ops": 8, "dots_wanted": 1, "dots_left": 0, "code_bytes": 4096}
    row |= {"groups": 2, "waits": 2}
    return row | {"widest_load": 128, "widest_store": 128} | changes


def test_assembly_is_read_right() -> None:
    assert audit.resource_usage(USAGE) == (198, 24)
    assert audit.amd_registers(AMDGCN) == (88, 12)
    assert (audit.matrix_ops(PTX), audit.matrix_ops(AMDGCN)) == (3, 1)
    assert (audit.widest(PTX, "load"), audit.widest(PTX, "store")) == (128, 128)
    assert audit.widest(PTX.replace("cp.async", "cp_async"), "load") == 64
    assert (audit.widest(AMDGCN, "load"), audit.widest(AMDGCN, "store")) == (128, 64)
    assert audit.widest("", "load") == 0
    assert audit.waiting(SASS) == 2


def test_products_off_the_matrix_unit_are_found() -> None:
    half = "%3 = tt.dot %0, %1, %2 : tensor<64x16xbf16> * tensor<16x64xbf16> -> tensor<64x64xf32>\n"
    single = half.replace("bf16", "f32")
    operand = "tensor<64x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>>"
    on = f"%3 = tt.dot %0, %1, %2 : {operand} -> tensor<64x64xf32, #mma>\n"
    off = on.replace("#mma", "#blocked1")
    assert audit.dots(half + half, on + off, fp32_unit=False) == (2, 1)
    assert audit.dots(half, on + on, fp32_unit=False) == (1, 0)
    assert audit.dots(single, off, fp32_unit=False) == (0, 0)
    assert audit.dots(single, off, fp32_unit=True) == (1, 1)
    assert audit.dots("", "", fp32_unit=True) == (0, 0)


def test_code_is_what_can_be_executed() -> None:
    """An ELF file of a header and three sections, of which one holds instructions."""
    header = b"\x7fELF".ljust(40, b"\0") + struct.pack("<Q10xHHH", 64, 64, 3, 0)
    sections = [
        struct.pack("<IIQQQQIIQQ", 0, 1, flags, 0, 0, size, 0, 0, 0, 0) for flags, size in ((0, 7), (6, 640), (2, 9))
    ]
    assert audit.code_bytes(header + b"".join(sections)) == 640


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 166_913}, "166913 bytes of shared memory"),
        ({"tensor_memory": 513}, "513 columns"),
        ({"matrix_ops": 0}, "matrix unit"),
        ({"dots_left": 1}, "matrix unit"),
        ({"waits": 5, "kernel": audit.MAIN_PATH[0]}, "waits after 5 matrix instructions that it commits as 2 groups"),
        ({"error": "CompilationError: no"}, "CompilationError"),
    ],
)
def test_what_is_wrong_is_named_and_fails(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [clean_row(), clean_row(config="BLOCK_M=128", **changes)]
    assert [len(audit.violations(row)) for row in rows] == [0, 1]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(audit, "compile_all", lambda pairs, quick: rows)
    with pytest.raises(typer.Exit) as stop:
        audit.main(targets="sm_80", dtypes="bf16")
    assert stop.value.exit_code == 1
    printed = capsys.readouterr().out
    assert f"{rows[1]['kernel']} sm_80 bf16 [BLOCK_M=128] (x): " in printed
    assert words in printed
    rows[1] = clean_row(waits=5)  # off the main path it is only shown
    audit.main()


def test_a_quick_audit_has_the_pairs_that_are_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(audit, "compile_all", lambda pairs, quick: asked.extend(pairs) or [])
    audit.main(quick=True)
    assert asked == audit.QUICK_PAIRS
    asked.clear()
    audit.main(quick=True, targets="sm_80,sm_90")
    assert asked == audit.QUICK_PAIRS[:3]
    asked.clear()
    audit.main(quick=True, targets="sm_80,gfx950", dtypes="fp16")
    assert asked == ["sm_80:fp16", "gfx950:fp16"]


@pytest.mark.parametrize("pair", audit.QUICK_PAIRS)
def test_every_kernel_compiles_for_real_gpus(pair: str, tmp_path: Path) -> None:
    """The quick audit, in a process without the interpreter: no spills, fits, matrix units, wide accesses."""
    target, dtype = pair.split(":")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    chosen = ["--targets", target, "--dtypes", dtype, "--json", str(tmp_path / "audit.json")]
    command = [sys.executable, "-m", "bench", "audit", "--quick", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "audit.json").read_text())["rows"]
    assert {f"{row['target']}:{row['dtype']}" for row in rows} == {pair}
    products = [row for row in rows if row["kernel"].startswith("_adapter_linear")]
    assert {row["kernel"] for row in products} == {"_adapter_linear_kernel", "_adapter_linear_dx_kernel"}
    for row in rows:
        assert audit.violations(row) == []
    recomposed = [row for row in rows if row["kernel"].startswith("_hadamard_")]
    assert {row["kernel"] for row in recomposed} == {"_hadamard_linear_kernel", "_hadamard_grads_kernel"}
    many = [row for row in rows if row["kernel"].startswith("_multi_")]
    assert {row["kernel"] for row in many} == {"_multi_shrink_kernel", "_multi_expand_kernel"}
    streams = [row for row in rows if row["kernel"].startswith("_bottleneck_")]
    assert {row["kernel"] for row in streams} == {"_bottleneck_kernel", "_bottleneck_backward_kernel"}
    experts = [row for row in rows if row["kernel"].startswith("_expert_")]
    assert {row["kernel"] for row in experts} == {f"_expert_{name}_kernel" for name in ("shrink", "product", "grads")}
    for row in products + recomposed + many + streams + experts:
        if row["dtype"] != "fp32":
            assert (row["matrix_ops"] > 0) == ("BLOCK_M=1 " not in row["config"]), row
            # Ranks that 16 does not divide take small tiles: AMD's wider warps get four elements of them a thread.
            small = row["target"].startswith("gfx") and "BLOCK_M=32 BLOCK_N=32 BLOCK_K=32" in row["config"]
            assert row["widest_load"] >= (64 if small else 128), row


TIGHT: dict[str, tuple[Callable[..., None], list[Any], str]] = {
    "sums of vectors": (audit.launch_group, [(64, audit.Group.qkv(64), audit.EVERYTHING)], "_output_grads_kernel"),
    "masked ranks": (audit.launch_group, [(64, audit.Group.qkv(16), audit.EVERYTHING)], "_adapter_linear_dx_kernel"),
    "narrow x": (audit.launch_bottleneck, [audit.Bottleneck(16384, 768, 32, dropout=False)], "_input_grads_kernel"),
    "ranks of U V": (
        audit.launch_recomposed,
        [audit.Recomposed(8192, Q=64)],
        "_hadamard_linear_kernel",
    ),
    "vectors by token": (audit.launch_batch, [audit.Batch(4, 2048, R=16)], "_multi_expand_kernel"),
}


def compiled_for_sm_80(case: str) -> list[dict[str, Any]]:
    """What becomes of a kernel that is short of registers; in a process without the interpreter."""
    launch, cases, kernel = TIGHT[case]
    with mock.patch.object(audit, "SUITES", [audit.Suite((), launch, (), (), cases)]):
        jobs = audit.jobs(["sm_80:bf16"], quick=True)
    return [audit.compiled(job) for job in jobs if job.kernel[1] == kernel]


def test_what_is_short_of_registers_does_not_spill_on_sm_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = dict(zip(TIGHT, pool.map(compiled_for_sm_80, TIGHT), strict=True))
    assert all(found.values())
    assert {case: wrong for case, rows in found.items() if (wrong := [r for r in rows if audit.violations(r)])} == {}


def test_no_shape_gets_a_config_that_was_not_compiled() -> None:
    """Random layers against the cases of the full audit, on GPUs of every size of shared memory."""
    generator = random.Random(0)
    cases = []
    for step in [1, 16] * 40:
        width, *Ns = (step * generator.randint(100, 20_000 // step) for _ in range(generator.randint(2, 4)))
        Rs = tuple(generator.randint(1, 256) for _ in Ns)
        cases.append((2 ** generator.randint(0, 14), audit.Group(width, tuple(Ns), Rs), generator.choice(audit.FORMS)))
    batches = [
        audit.Batch(
            generator.randint(1, 300),
            generator.choice([1, generator.randint(2, 3000)]),
            generator.randint(100, 20_000),
            generator.randint(100, 20_000),
            generator.randint(0, 256),
            generator.choice(["", "dh", "g", "b"]),
        )
        for _ in range(80)
    ]
    layers = [
        audit.Recomposed(
            2 ** generator.randint(0, 14),
            generator.randint(100, 20_000),
            generator.randint(100, 20_000),
            generator.randint(1, 256),
            generator.choice([0, 8, 40]),
        )
        for _ in range(40)
    ]

    bottlenecks = [
        audit.Bottleneck(
            generator.randint(1, 20_000),
            2 * generator.randint(10, 700),
            2 * generator.randint(1, 64),
            groups=generator.choice([1, 2]),
            dropout=generator.random() < 0.5,
        )
        for _ in range(80)
    ]

    segmented = []
    for step in [1, 16] * 30:
        K, N = (step * generator.randint(100, 8_000 // step) for _ in range(2))
        dropped, vectors = generator.random() < 0.5, generator.choice(["", "dh", "gb", "dhgb"])
        segmented.append(
            audit.Segmented(
                generator.choice([0, 2 ** generator.randint(0, 10)]),
                generator.randint(1, 256),
                vectors,
                dropped,
                dropped and generator.random() < 0.5,
                vectors == "gb",
                generator.random() < 0.3,
                generator.randint(1, 130),
                K,
                N,
                transposed=generator.random() < 0.3,
            )
        )

    def found(dtype: torch.dtype, shared_limit: int, cases: dict[Callable[..., None], Any]) -> set[tuple[str, str]]:
        with configs.recorded_launches(shared_limit) as launches:
            for launch, own in cases.items():
                for case in own:
                    launch(dtype, case)
        return {audit.config_of(launch) for launch in launches}

    drawn: dict[Callable[..., None], Any] = {
        audit.launch_group: cases,
        audit.launch_parameters: audit.ranks_of(cases),
        audit.launch_batch: batches,
        audit.launch_recomposed: layers,
        audit.launch_bottleneck: bottlenecks,
        audit.launch_experts: segmented,
    }
    full: dict[Callable[..., None], Any] = {suite.launch: suite.by_config for suite in audit.SUITES}
    assert drawn.keys() == full.keys()
    for dtype in (torch.float16, torch.float32):
        for shared_limit in {target.shared_limit for target in audit.TARGETS.values()}:
            assert found(dtype, shared_limit, drawn) - found(dtype, shared_limit, full) == set()


@pytest.mark.parametrize("tokens", [1, 16, 33, 64])
def test_decoding_has_enough_of_the_weight_under_way(tokens: int) -> None:
    """An H200 wants some 3.4 MB: latency times bandwidth. Programs of one wave each load so many tiles ahead."""
    layer = audit.Group(14336, (4096,), (16,))
    with configs.recorded_launches(audit.TARGETS["sm_90"].shared_limit) as launches:
        audit.launch_group(torch.bfloat16, (tokens, layer, audit.LORA))
    forwards = [launch for launch in launches if "ys" in launch.arguments]
    assert len(forwards) == 2
    for launch in forwards:
        tile = 2 * launch.config["BLOCK_N"] * launch.config["BLOCK_K"]
        assert launch.grid[0] <= 132
        assert launch.grid[0] * (launch.config["num_stages"] - 1) * tile > 3e6


@pytest.mark.parametrize("suite", audit.SUITES, ids=lambda suite: suite.covers[0])
def test_a_suite_launches_the_kernels_of_the_operators_that_it_claims(suite: audit.Suite) -> None:
    with configs.recorded_launches(audit.TARGETS["sm_80"].shared_limit) as launches:
        for case in (*suite.quick, *suite.by_operands):
            suite.launch(torch.bfloat16, case)
    named = {kernel for case in doctor.CASES if set(case.covers) <= set(suite.covers) for kernel in case.kernels}
    assert named
    assert {f"_{kernel}_kernel" for kernel in named} <= {launch.kernel.fn.__name__ for launch in launches}
