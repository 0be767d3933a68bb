"""The process that does the jobs, one at a time, as it is asked: it may be killed, or break, and is begun anew.

`python -m bench.gpu.worker PROGRAM DEVICE`: PROGRAM is the dotted name of a function from a device's type to jobs.
A line of JSON on stdin asks for a job, {"job", "seconds", "left_out", "tune", "wrong"}, or with "compile" for a
provider's kernels alone. On stdout a line each: {"ready"}, {"at"} before what can break, then {"rows"}, or {"failed"}
where the job raised; {"lost"} where the device takes no more work, behind which the process ends.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO


def main(argv: Sequence[str]) -> None:
    """Answers until stdin ends."""
    program_name, device_name = argv
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    import torch

    from bench.gpu.job import DeviceLostError, Job, reason

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Here and not in the midst of the first job: without it nothing is worth a GPU's time.
        importlib.import_module("fastadapt_kernels.adapter_linear")
    module, _, name = program_name.rpartition(".")
    jobs: dict[str, Job] = {job.label: job for job in getattr(importlib.import_module(module), name)(device.type)}
    say(ready=True)
    while True:
        request = requests.get()
        try:
            say(rows=_done(jobs[request["job"]], request, device, lambda what: say(at=what)))
        except DeviceLostError as problem:
            say(lost=str(problem))
            os._exit(1)
        except Exception as problem:  # a job that cannot be done is told, and the next one comes
            say(failed=reason(problem))


def _done(job: Any, request: dict[str, Any], device: Any, at: Callable[[str], None]) -> list[dict[str, Any]]:
    from bench.gpu.job import Desk, require_alive

    desk = Desk(device, request["seconds"], at, request["left_out"], request["tune"], frozenset(request["wrong"]))
    try:
        if provider := request.get("compile"):
            job.compile(provider, desk)
            return []
        rows: list[dict[str, Any]] = job.run(desk)
        desk.finish()
        return rows
    except Exception as problem:
        require_alive(desk, problem)
        raise


def _listen(requests: queue.SimpleQueue[dict[str, Any]], source: TextIO | None = None) -> None:
    """Passes on what is asked; where nobody asks any more, ends the process, whatever it is doing."""
    for line in source or sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
