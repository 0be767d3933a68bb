"""Workers as their employer sees them: asked for a job, waited for so long and no longer, begun anew if broken."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import Row

_STARTING = 180.0
_ENDING = 10.0


class StartError(RuntimeError):
    """A worker cannot even begin; the message is what it said last."""


class Answer(NamedTuple):
    """What became of a job. status: "ok"; "failed", it raised; "crashed", the worker broke; "hung", it took too long.

    at: what was being done then, a provider as a rule; it is why the job can be asked for again without it.
    """

    status: str
    rows: list[Row]
    seconds: float
    note: str = ""
    at: str = ""

    @property
    def broke(self) -> bool:
        return self.status in ("crashed", "hung")


class Worker:
    """One process of `bench.gpu.worker`. It is started by the first job."""

    def __init__(self, program: str, device: str) -> None:
        self._command = [sys.executable, "-m", "bench.gpu.worker", program, device]
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the worker)
        self._closed = False

    def start(self) -> None:
        """Begins a process, unless there is one. Raises StartError."""
        if self._process is not None:
            return
        if self._closed:
            raise StartError("the run is ending")
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._said = b""
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            self._command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        answer = self._next(time.monotonic() + _STARTING)
        if answer is None or "ready" not in answer:
            said = self._last_words()
            self.stop()
            raise StartError(said or "it said nothing")

    def ask(self, request: dict[str, Any], limit: float) -> Answer:
        """Has a job done within `limit` seconds, or stops the process. Raises StartError."""
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        begun, at = time.monotonic(), ""
        # One that died between two jobs hears nothing, and gives no answer.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        while True:
            said = self._next(begun + limit)
            seconds = time.monotonic() - begun
            if said is not None and "at" in said:
                at = said["at"]
                continue
            if said is not None and "rows" in said:
                return Answer("ok", said["rows"], seconds)
            if said is not None and "failed" in said:
                return Answer("failed", [], seconds, said["failed"], at)
            hung = said is None and seconds >= limit
            if not hung:
                self._await_end()
            note = f"no answer in {limit:.0f} s" if hung else (said or {}).get("lost") or self._last_words()
            self.stop()
            return Answer("hung" if hung else "crashed", [], seconds, note, at)

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        # One that a hung GPU keeps is left to the system.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What it was asked last stays unsaid.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def close(self) -> None:
        """Ends the process, and begins none any more."""
        self._closed = True
        self.stop()
        self._log.close()

    def _next(self, deadline: float) -> dict[str, Any] | None:
        """The next line that it says; None where it ends, or says nothing until the deadline."""
        assert self._process is not None
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        while b"\n" not in self._said:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                return None
            more = os.read(handle, 1 << 16)
            if not more:
                return None
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _await_end(self) -> None:
        """A moment for one that is ending, so that its last words are whole."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)

    def _last_words(self) -> str:
        """The last line that it wrote to stderr, and how it ended."""
        assert self._process is not None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        ended = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
        return f"{lines[-1][:300] if lines else 'the worker ended'}{ended}"
