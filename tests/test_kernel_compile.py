"""Every kernel, compiled offline for real GPUs at the tiles of configs.py: no spills, fits, uses the matrix unit.

Compiling needs Triton without its interpreter, which the other tests run in: this file is also the program that the
test starts for it. ``python tests/test_kernel_compile.py`` prints a line of JSON for each compiled kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "kernels"))


class Target(NamedTuple):
    """A GPU to compile for, and the shared memory in bytes that one block may take there."""

    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912),
    "sm_86": Target("cuda", 86, 32, 101_376),
    "sm_90": Target("cuda", 90, 32, 232_448),
    "gfx942": Target("hip", "gfx942", 64, 65_536),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the test compiles, by two processes at once; the program compiles every pair by default.
QUICK = (["sm_80:bf16", "sm_90:fp32"], ["sm_90:bf16", "gfx942:bf16"])
KERNELS_WITH_DOT = {
    "_shrink_kernel",
    "_adapter_linear_kernel",
    "_adapter_linear_dx_kernel",
    "_output_grads_kernel",
    "_input_grads_kernel",
}


def launch_everything(dtype: torch.dtype, M: int, Ns: tuple[int, ...], R: int, *, vectors: bool, strategy: str) -> None:
    """Call the launchers on meta tensors with adapters in fp32: a group of 4096 input features, M tokens and rank R.

    Without ``vectors`` it is plain LoRA; with them every optional operand is there, dropout included.
    """
    from fastadapt_kernels.adapter_linear import Member, adapter_linear, adapter_linear_backward

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def vector(size: int) -> Tensor | None:
        return tensor(size, dtype=torch.float32) if vectors else None

    K = 4096
    x = tensor(M, K)
    drop: dict[str, Any] = {"seed": tensor(1, dtype=torch.int64), "p": 0.1} if vectors else {}
    for on_base in (False, True) if vectors else (False,):
        members = []
        for N in Ns:
            A, B = tensor(R, K, dtype=torch.float32), tensor(N, R, dtype=torch.float32)
            members.append(Member(tensor(N, K), A, B, vector(R), vector(N), 2.0, vector(N), vector(N), on_base))
        ys, u, zs = adapter_linear(x, members, keep_base=vectors, strategy=strategy, **drop)
        adapter_linear_backward(ys, members, x=x, u=u, zs=zs, want_bias=vectors, **drop)
        adapter_linear_backward(ys, members, x=x, u=u, zs=zs, want_dx=False, want_bias=vectors, **drop)
    if vectors:
        adapter_linear_backward(ys, members, zs=zs, want_dx=False, want_bias=True)


def launch_the_rest(dtype: torch.dtype, R: int) -> None:
    """The launchers that do not see tokens."""
    from fastadapt_kernels.tiles import dropout_mask
    from fastadapt_kernels.weight_norm import row_squares, weight_norm

    weight = torch.empty(4096, 4096, dtype=dtype, device="meta")
    A, B = torch.empty(R, 4096, device="meta"), torch.empty(4096, R, device="meta")
    weight_norm(weight, A, B, 2.0, row_squares(weight))
    dropout_mask(torch.empty(1, dtype=torch.int64, device="meta"), 8192, 4096, 0.1)


def recorded(target: Target, dtype: torch.dtype, *, quick: bool) -> list[Any]:
    from fastadapt_kernels import configs

    with configs.recorded_launches(target.shared_memory) as launches:
        group = (4096, 1024, 1024)
        launch_everything(dtype, 8192, group, 16, vectors=True, strategy="split")
        launch_everything(dtype, 8192, (4096,), 16, vectors=False, strategy="fused")
        if not quick:
            for M, R in ((8192, 16), (8192, 256), (16, 16), (64, 16), (512, 64)):
                for Ns in ((4096,), group):
                    for vectors in (False, True):
                        for strategy in ("split", "fused") if R <= 64 else ("split",):
                            launch_everything(dtype, M, Ns, R, vectors=vectors, strategy=strategy)
        launch_the_rest(dtype, 16)
    return launches


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and the bytes that it spills, according to cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def dots_in_16_bits(launch: Any) -> bool:
    """Whether a launch has a product that belongs on the matrix unit; _output_grads_kernel may have none to make."""
    name, arguments = launch.kernel.__name__, launch.arguments
    if name not in KERNELS_WITH_DOT:
        return False
    operand = next(arguments[key] for key in ("x", "xs", "dys") if key in arguments)
    first = operand[0] if isinstance(operand, tuple) else operand
    product = name != "_output_grads_kernel" or arguments["u"] is not None or arguments["q"] is not None
    return product and first.dtype.itemsize == 2


def compiled_rows(pairs: list[str], *, quick: bool) -> Iterator[dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for pair in pairs:
        name, dtype_name = pair.split(":")
        target = TARGETS[name]
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        seen = set()
        for launch in recorded(target, DTYPES[dtype_name], quick=quick):
            source = ASTSource(launch.kernel, *launch.source())
            # Tile sizes are constexprs of the kernel; what else a config says is an option of the compiler.
            options = {key: value for key, value in launch.config.items() if not key.isupper()}
            if (key := (source.hash(), str(options))) in seen:
                continue
            seen.add(key)
            kernel = triton.compile(source, target=gpu, options=options)
            row = {
                "target": name,
                "dtype": dtype_name,
                "kernel": launch.kernel.__name__,
                "config": launch.config,
                "absent": [key for key, value in launch.arguments.items() if value is None],
                "shared": kernel.metadata.shared,
                "shared_limit": target.shared_memory,
                "wants_matrix_unit": dots_in_16_bits(launch),
            }
            if target.backend == "cuda":
                row |= resource_usage(kernel.asm["cubin"])
                row["matrix_unit"] = bool(re.search(r"\bw?g?mma\.", kernel.asm["ptx"]))
            else:
                counts = dict(re.findall(r"\.(vgpr\w*_count):\s+(\d+)", kernel.asm["amdgcn"]))
                row["registers"] = int(counts["vgpr_count"])
                row["spilled"] = int(counts["vgpr_spill_count"])
                row["matrix_unit"] = "v_mfma" in kernel.asm["amdgcn"]
            yield row


def test_every_kernel_compiles_for_real_gpus() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--quick", *pairs],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for pairs in QUICK
    ]
    texts = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, texts, strict=True):
        assert process.returncode == 0, errors
    rows = [json.loads(line) for output, _ in texts for line in output.splitlines()]
    assert {f"{row['target']}:{row['dtype']}" for row in rows} == {pair for pairs in QUICK for pair in pairs}
    assert {row["kernel"] for row in rows} > KERNELS_WITH_DOT
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert row["matrix_unit"] or not row["wants_matrix_unit"], row


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", help="TARGET:DTYPE, such as sm_90:bf16; all of them by default")
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    arguments = parser.parse_args()
    every_pair = [f"{target}:{dtype}" for target in TARGETS for dtype in DTYPES]
    for row in compiled_rows(arguments.pairs or every_pair, quick=arguments.quick):
        print(json.dumps(row), flush=True)
