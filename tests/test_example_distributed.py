"""The example `distributed.py`, and the optimizer, in several real processes."""

import contextlib
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import distributed
import launcher
import multiprocess_job
import numpy as np
import psutil
import pytest
from equality import WITHOUT_FUSED_MULTIPLY_ADD

_EXAMPLES = Path(distributed.__file__).parent
_ALONE, *_EIGHT = (1, 1), (1, 8), (2, 4), (4, 2)  # processes, and devices of each
_PATIENCE = 120  # seconds; a job that hangs fails the test
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def _name(topology):
    return "{}x{}".format(*topology)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """For each topology, the folder with what its job has written."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(_EXAMPLES), prepend=":")
        if _IS_X86:
            patch.setenv("XLA_FLAGS", WITHOUT_FUSED_MULTIPLY_ADD)
        for topology in (_ALONE, *_EIGHT):
            processes, devices = topology
            folder = folders[topology] = tmp_path_factory.mktemp(_name(topology))
            command = [sys.executable, multiprocess_job.__file__]
            command += [f"127.0.0.1:{launcher.free_port()}", str(processes)]
            rest = [str(devices), str(folder), "zero1", *["fsdp"] * (topology == (1, 8))]
            end = launcher.launch([[*command, str(i), *rest] for i in range(processes)])
            assert end.status == 0, f"{_name(topology)}: {end.reason}\n{end.log}"
    return folders


def _read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
@pytest.mark.skipif(not _IS_X86, reason="XLA can leave out fused multiply-add on x86 alone")
@pytest.mark.parametrize("topology", _EIGHT, ids=_name)
def test_equal_gradients_give_equal_bits(topology, jobs):
    """On any topology, in every format and rounding, params and state, spread or sharded."""
    found, alone = (_read(jobs[name], "equal_gradients.json") for name in (topology, _ALONE))
    assert len(found) == 18
    for name in found:
        for part in ("params", "state"):
            assert found[name][part] == alone[name][part], (name, part)


@pytest.mark.slow
def test_devices_train_alike_in_any_processes_and_nearly_alike_in_any_number(jobs):
    """Eight devices sum gradients in one order; one device sums them in another."""
    eight, alone = jobs[_EIGHT[0]], jobs[_ALONE]
    for topology in _EIGHT[1:]:
        assert _read(jobs[topology], "zero1.json") == _read(eight, "zero1.json")
        params = (np.load(jobs[name] / "zero1.npy") for name in (topology, _EIGHT[0]))
        np.testing.assert_array_equal(*params)
    losses = _read(alone, "zero1.json")
    assert losses[-1] < losses[0] - 0.5
    # Some 64 roundings in succession, of gradients that are clipped to 1, divided by eps at least.
    apart = multiprocess_job.LEARNING_RATE * 64 * 2**-24 / multiprocess_job.EPS
    for strategy in multiprocess_job.STRATEGIES:
        np.testing.assert_allclose(_read(eight, f"{strategy}.json"), losses, rtol=1e-5)
        params = np.load(eight / f"{strategy}.npy"), np.load(alone / "zero1.npy")
        np.testing.assert_allclose(*params, rtol=0, atol=multiprocess_job.STEPS * apart)


def _command(folder, *flags):
    script = str(_EXAMPLES / "distributed.py")
    return [sys.executable, "-u", script, "--output", str(folder), *map(str, flags)]


@contextlib.contextmanager
def _started(command):
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # If the test has failed before its end.


def _run(folder, *flags):
    """Runs the example to its end; returns the first line that it printed, and the others."""
    command = _command(folder, *flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    where, *lines = done.stdout.splitlines()
    return where, lines


_TWO = ("--processes", 2, "--devices", 1, "--save-every", 5)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Compiles without optimizations, in every process of the example."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_trains_in_a_process_of_its_own(tmp_path):
    flags = ("--processes", 1, "--devices", 2, "--batch-size", 8, "--steps", 2)
    where, lines = _run(tmp_path, *flags)
    assert where == (
        "1 processes, 2 cpu devices, zero1: 345,600 bytes of parameters and 345,604 of state per "
        "device"
    )
    assert lines[:2] == ["starting from step 0", "saved step 2"]
    assert re.fullmatch(r"loss \d\.\d{4}, checksum [0-9a-f]{16}", lines[-1])


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_and_nothing_is_lost(tmp_path):
    """The same command, or one process with both devices, ends with the uninterrupted bits."""
    _, (*_, whole) = _run(tmp_path / "whole", *_TWO, "--steps", 20)
    folder = tmp_path / "killed"
    command = _command(folder, *_TWO, "--steps", 20)
    with _started(command) as job:
        while job.stdout.readline() not in ("saved step 5\n", ""):
            pass
        workers = psutil.Process(job.pid).children()
        workers[0].kill()  # It coordinates the others.
        _, error = job.communicate(timeout=_PATIENCE)
    assert job.returncode == 1
    reason = f"process 0 of 2 was killed by SIGKILL; {distributed.TO_RESUME}"
    assert error == f"distributed.py: error: {reason}\n"
    assert not any(map(psutil.pid_exists, (worker.pid for worker in workers)))
    shutil.copytree(folder, tmp_path / "elsewhere")
    elsewhere = ("--processes", 1, "--devices", 2, "--save-every", 5)
    for name, flags in (("killed", _TWO), ("elsewhere", elsewhere)):
        _, (first, *_, last) = _run(tmp_path / name, *flags, "--steps", 20)
        assert int(re.fullmatch(r"resuming from step (\d+)", first)[1]) >= 5
        assert last == whole


@pytest.mark.slow
def test_without_a_launcher_the_others_end_by_themselves(tmp_path):
    """They see a closed connection, or JAX aborts them after missed heartbeats."""
    address = f"127.0.0.1:{launcher.free_port()}"
    flags = ("--processes", 2, "--devices", 1, "--coordinator", address, "--process")
    commands = (_command(tmp_path, *flags, i) for i in range(2))
    with _started(next(commands)) as first, _started(next(commands)) as second:
        while first.stdout.readline() not in ("starting from step 0\n", ""):
            pass
        second.kill()
        _, error = first.communicate(timeout=_PATIENCE)
    assert first.returncode in (launcher.LOST, -signal.SIGABRT)
    assert launcher.ABORTED_BY_JAX in error or "error: process 0 of 2: " in error


_WAITS = "import time; time.sleep(100)"
_ABORTS = f"import os; os.write(2, {launcher.ABORTED_BY_JAX.encode()!r}); os.abort()"
_LOSES = f"import sys; print('x: error: lost', file=sys.stderr); sys.exit({launcher.LOST})"
_REPORTS = "import sys; print('x: error: bad', file=sys.stderr); sys.exit(2)"
_KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (["", ""], (0, "", False)),
        ([_LOSES, _ABORTS, _KILLED], (1, "process 2 of 3 was killed by SIGTERM", True)),
        ([_LOSES, _REPORTS], (2, "bad", False)),
        ([_ABORTS, _LOSES, _WAITS], (1, "lost", False)),
        ([_ABORTS, _WAITS, _ABORTS], (1, "process 1 of 3 does not answer", True)),
        ([_LOSES, "1 / 0"], (1, "process 1 of 2 failed with status 1", True)),
    ],
)
def test_the_reason_is_the_cause(programs, expected):
    """Of several failed processes, the one that made the others fail; what is left ends."""
    end = launcher.launch([[sys.executable, "-c", program] for program in programs])
    assert (end.status, end.reason, end.is_lost) == expected
    assert ("ZeroDivisionError" in end.log) == ("1 / 0" in programs)
    assert not psutil.Process().children()


@pytest.mark.slow
def test_nothing_outlives_the_launcher(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(_EXAMPLES))
    waits = f"import launcher; launcher.end_with_launcher(); print(1, flush=True); {_WAITS}"
    program = f"import sys, launcher; launcher.launch([[sys.executable, '-c', {waits!r}]] * 2)"
    with _started([sys.executable, "-c", program]) as process:
        assert process.stdout.readline() == "1\n"
        workers = psutil.Process(process.pid).children()
        process.kill()
    _, left = psutil.wait_procs(workers, timeout=_PATIENCE)
    assert (len(workers), left) == (2, [])
