"""What the cost model knows of devices: rates, bandwidths and the shares of them that libraries reach.

The shares are assumptions until somebody measures them: `keep_measured` writes them to a file in
`files.cache_directory`, and from the next process on they take the place of those in the table.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...files import cache_directory, written_whole

_log = logging.getLogger(__name__)

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class Device(NamedTuple):
    """What the model knows of a device.

    matmul: dense FLOP/s by dtype, without sparsity; bandwidth in bytes/s and l2 in bytes as published.
    launch: seconds between two dependent kernels of a stream that is never starved by its host.
    attainable_matmul, attainable_bandwidth: what a good library reaches of the two.
    triton: a Triton GEMM's rate relative to the library's.
    """

    name: str
    matmul: Mapping[str, float]
    bandwidth: float
    l2: int
    multiprocessors: int
    launch: float
    attainable_matmul: float
    attainable_bandwidth: float
    triton: float

    def __hash__(self) -> int:
        return hash(self.name)


def _rates(half: float, single: float, double: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "float32": single, "float64": double}


# Rates, bandwidths and cache sizes are the vendors'. The attainable shares are round numbers of what libraries are
# commonly seen to reach (the H200's are measured: 788 TFLOP/s in bf16 at 8192³, 4.3 TB/s in a copy), and `triton` is an
# assumption by target, which a measurement on the device should replace: see bench/results/PREDICTIONS.md for the value
# at which the choice turns.
DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 80GB SXM data sheet (312 TFLOP/s bf16, 2,039 GB/s); A100 whitepaper (40 MB L2, 108 SMs).
        Device("A100-SXM4-80GB", _rates(312e12, 19.5e12, 19.5e12), 2.039e12, 40 << 20, 108, 3e-6, 0.80, 0.90, 0.93),
        # NVIDIA H100 SXM data sheet (989 TFLOP/s bf16, 3.35 TB/s); H100 whitepaper (50 MB L2, 132 SMs).
        Device("H100-SXM", _rates(989e12, 67e12, 67e12), 3.35e12, 50 << 20, 132, 3e-6, 0.65, 0.90, 0.90),
        # NVIDIA H200 SXM data sheet (989 TFLOP/s bf16, 4.8 TB/s); the H100's die, so its L2 and SMs. A Triton GEMM of
        # one block a multiprocessor, 3 stages and no TMA is predicted to reach 0.75-0.82 of the library at K = 4096.
        Device("H200-SXM", _rates(989e12, 67e12, 67e12), 4.8e12, 50 << 20, 132, 3e-6, 0.797, 0.896, 0.80),
        # NVIDIA HGX B200 data sheet, by GPU (2.25 PFLOP/s bf16 dense, 8 TB/s); 148 SMs, L2 of 126 MB as CUDA reports.
        Device("B200", _rates(2250e12, 75e12, 37e12), 8.0e12, 126 << 20, 148, 3e-6, 0.65, 0.90, 0.80),
        # AMD MI300X data sheet (1,307 TFLOP/s bf16, 5.3 TB/s, 304 CUs); "l2" is the 256 MB Infinity Cache before HBM.
        Device("MI300X", _rates(1307e12, 163e12, 163e12), 5.3e12, 256 << 20, 304, 5e-6, 0.50, 0.80, 0.85),
        # A server CPU of eight AVX-512 cores, 2 x 16 fp32 FMA lanes at 2.5 GHz, and four DDR4-3200 channels; one socket
        # differs from the next by more than the strategies do, but they all run on the same one. There is no Triton.
        Device("CPU", _rates(1.3e12, 1.3e12, 0.64e12), 0.1e12, 32 << 20, 8, 2e-6, 0.70, 0.70, 0.10),
    )
}

# Dense bf16 FLOPs a multiprocessor and clock, by CUDA capability, and the device whose shares an unknown GPU borrows.
_HALF_FLOPS = {
    (8, 0): (2048, "A100-SXM4-80GB"),
    (8, 6): (1024, "A100-SXM4-80GB"),
    (8, 9): (1024, "A100-SXM4-80GB"),
    (9, 0): (4096, "H100-SXM"),
    (10, 0): (8192, "B200"),
    (10, 3): (8192, "B200"),
    (12, 0): (1024, "A100-SXM4-80GB"),
}
_BORROWED = "MI300X" if torch.version.hip else "A100-SXM4-80GB"


@functools.cache
def device_of(device: torch.device) -> Device:
    """What the model knows of a torch device; a GPU that it does not know gets an estimate from its properties."""
    if device.type != "cuda":
        return DEVICES["CPU"]
    return device_from(torch.cuda.get_device_properties(device))


# What a measurement can replace, and what such a number stays below: more is damage.
_MEASURABLE = {"launch": 1e-3, "attainable_matmul": 1.5, "attainable_bandwidth": 1.5, "triton": 1.5}


def keep_measured(name: str, **numbers: float) -> Path:
    """Keeps what was measured on the GPU that torch.cuda.get_device_name calls `name`, and gives the file.

    numbers: launch in seconds; attainable_matmul, attainable_bandwidth and triton as shares, as in `Device`; those that
    are not given stay as they are. They count from the next process on.
    Raises ValueError for another name or a number that is not positive or beyond belief, OSError where the file cannot
    be written, FileNotFoundError where there is no cache.
    """
    if not numbers or _plausible(numbers) != numbers:
        raise ValueError(f"numbers must be positive and each below its limit of {_MEASURABLE}, got {numbers}")
    path = _measured_file()
    known = _measured()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as draft:
        kept = {**known, name: {**known.get(name, {}), **numbers}}
        draft.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _measured_file() -> Path:
    return cache_directory() / "devices.json"


def _measured() -> dict[str, dict[str, float]]:
    """What was measured, by the name of the GPU; a damaged file costs a line in the log."""
    try:
        found = json.loads(_measured_file().read_bytes())
        return {name: _plausible(numbers) for name, numbers in found.items()}
    except FileNotFoundError:
        return {}
    # RecursionError: brackets without end.
    except (OSError, ValueError, AttributeError, RecursionError) as problem:
        _log.warning("what was measured of devices is left aside (%s: %s)", type(problem).__name__, problem)
        return {}


def _plausible(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: number
        for name, number in numbers.items()
        # NaN fails both comparisons.
        if name in _MEASURABLE and type(number) in (int, float) and 0 < number < _MEASURABLE[name]
    }


def device_from(properties: Any) -> Device:
    """The device with these properties (torch.cuda.get_device_properties): a known one, or an estimate.

    What was measured on one of its name takes the place of what is assumed.
    """
    measured: dict[str, Any] = _measured().get(str(properties.name), {})
    return _assumed(properties)._replace(**measured)


def _assumed(properties: Any) -> Device:
    name = str(properties.name).upper()
    for key in ("A100", "H100", "H200", "B200", "MI300X"):
        # Not GH200 or GB200, whose memory is another; nor cards with another limit of power.
        if re.search(rf"\b{key}", name) and not re.search("PCIE|NVL|MIG", name):
            return next(device for known, device in DEVICES.items() if known.startswith(key))
    flops, like = _HALF_FLOPS.get((properties.major, properties.minor), (0, _BORROWED))
    known = DEVICES[like]
    count = properties.multi_processor_count
    # Properties that this torch or driver does not report are taken by multiprocessor from the device that lends.
    clock = 1e3 * getattr(properties, "clock_rate", 0)
    half = float(flops * count * clock) or known.matmul["bfloat16"] * count / known.multiprocessors
    bus = getattr(properties, "memory_bus_width", 0) / 8 * 2e3 * getattr(properties, "memory_clock_rate", 0)
    return known._replace(
        name=str(properties.name),
        matmul={dtype: rate * half / known.matmul["bfloat16"] for dtype, rate in known.matmul.items()},
        bandwidth=bus or known.bandwidth * count / known.multiprocessors,
        l2=getattr(properties, "L2_cache_size", 0) or known.l2,
        multiprocessors=count,
    )
