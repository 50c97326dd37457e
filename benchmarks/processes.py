"""Measuring processes, one per job, so that measurements do not affect each other."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Seconds without a row after which a process is killed.
PATIENCE = 400
_PROGRAM = Path(__file__).parent / "measure.py"
_SETTINGS = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    # JAX and PyTorch share the memory of a GPU.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def rows_of(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Starts a process of `measure.py` with a job, and yields its rows as they come.

    Raises:
        RuntimeError: it failed, or gave no row for too long; with the last line of its errors.
    """
    late = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, str(_PROGRAM), json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | _SETTINGS,
        ) as process,
    ):

        def give_up() -> None:
            late.set()
            process.kill()

        assert process.stdout is not None
        try:
            while True:
                timer = threading.Timer(PATIENCE, give_up)
                timer.start()
                try:
                    line = process.stdout.readline()
                finally:
                    timer.cancel()
                if not line:
                    break
                yield json.loads(line)
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        if late.is_set():
            raise RuntimeError(f"gave no result within {PATIENCE} s")
        if status == -signal.SIGKILL:
            raise RuntimeError("its process was killed, as the system does when memory runs out")
        if status:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or ["no message"]
            raise RuntimeError(f"its process ended with status {status}: {lines[-1][:200]}")
