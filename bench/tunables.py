"""The memory allocator's settings under which every bench runs. Imports nothing that takes time."""

from __future__ import annotations

import os
import sys

# glibc's malloc gives large blocks back to the kernel at every free: about 100,000 page faults a training step, more
# time than the adapter itself. Every variant, and every child process, runs with that switched off.
TUNABLES = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"


def restart_with_tunables() -> None:
    """Replace this process by one with the malloc tunables set: glibc reads them only when a process starts."""
    if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") != TUNABLES:
        # The profiler of `bench saved` announces itself on stderr at every level below the last.
        environment = {"KINETO_LOG_LEVEL": "99", **os.environ, "GLIBC_TUNABLES": TUNABLES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
