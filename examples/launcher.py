"""The processes of one job on this machine: started together, ended together.

If one of them fails, all end within seconds, with one reason. None outlives the launcher: whatever
kills it, SIGKILL included, closes a pipe that each process watches.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

# Seconds to wait after the first process has ended, so that the cause can be told from its effects.
GRACE = 1.0
LOST = 3  # exit status of a process that has lost contact with another
ABORTED_BY_JAX = "JAX distributed service detected fatal errors"


class End(NamedTuple):
    """How a job ended.

    Attributes:
        status: the exit status for the launcher.
        reason: one line on why it failed; empty if it did not.
        is_lost: whether a process was killed, crashed or stopped responding, without reporting an
            error of its own.
        log: stderr of the process at fault, if the reason does not say enough.
    """

    status: int
    reason: str = ""
    is_lost: bool = False
    log: str = ""


def launch(commands: Sequence[Sequence[str]]) -> End:
    """Runs a command for each process, until all have succeeded or one has failed.

    Only the first inherits the launcher's stdout. None is left when this returns or raises.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        watched, held = os.pipe()
        stack.callback(os.close, watched)
        stack.callback(os.close, held)
        processes: list[subprocess.Popen[Any]] = []
        stack.callback(_kill, processes)
        for i, command in enumerate(commands):
            process = subprocess.Popen(
                command,
                stdin=watched,
                stdout=subprocess.DEVNULL if i else None,
                stderr=logs[i],
                # Ctrl-C reaches the launcher alone, which ends the others.
                start_new_session=True,
            )
            processes.append(process)
        while True:
            statuses = [process.poll() for process in processes]
            if any(statuses):
                time.sleep(GRACE)
                return _end([process.poll() for process in processes], logs)
            if None not in statuses:
                return End(0)
            time.sleep(0.02)


def _kill(processes: Sequence[subprocess.Popen[Any]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _end(statuses: Sequence[int | None], logs: Sequence[IO[bytes]]) -> End:
    """The reason of a failure: the cause, not its effects on other processes."""
    texts = [_text(log) for log in logs]

    def rank(i: int) -> int:
        status = statuses[i]
        if status is None:
            return 3
        if status == 0:
            return 5
        if status == -signal.SIGABRT and ABORTED_BY_JAX in texts[i]:
            return 4
        return 0 if status < 0 else 1 if status != LOST else 2

    i = min(range(len(statuses)), key=rank)
    name, status = f"process {i} of {len(statuses)}", statuses[i]
    if status is None:
        return End(1, f"{name} does not answer", is_lost=True)
    if status < 0:
        was_killed = status != -signal.SIGABRT
        killer = signal.Signals(-status).name
        return End(1, f"{name} was killed by {killer}", True, "" if was_killed else texts[i])
    _, has_reported, reported = texts[i].rstrip().rpartition("\n")[2].partition(": error: ")
    if has_reported:
        return End(1 if status == LOST else status, reported)
    return End(1, f"{name} failed with status {status}", True, texts[i])


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def end_with_launcher() -> None:
    """Makes this process, started by `launch`, end as soon as its launcher is gone."""

    def watch() -> None:
        # Nothing is ever written: reading returns when the other end is closed.
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop_on_signals() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP raise `Stopped`, unless ignored, as under nohup."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(signal.Signals(number))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


class Stopped(BaseException):
    """A signal asked the program to end; the argument is the signal."""


def free_port() -> int:
    """A port of the loopback interface that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
