"""The example `distributed.py`, and the optimizer, in several real processes."""

import contextlib
import json
import math
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import distributed
import jax.numpy as jnp
import launcher
import multiprocess_job
import numpy as np
import psutil
import pytest
import worker_kills
from command_line import Parser
from command_lines import one_line_error
from equality import WITHOUT_FUSED_MULTIPLY_ADD

_EXAMPLES = Path(distributed.__file__).parent
_ALONE, *_EIGHT = (1, 1), (1, 8), (2, 4), (4, 2)  # processes, and devices of each
# None takes so long: a job that hangs fails the test.
_PATIENCE = 120

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_NEEDS_FORMULA_AS_WRITTEN = pytest.mark.skipif(
    not _IS_X86,
    reason="XLA can be told to leave out fused multiply-add on x86 alone",
)


def test_the_page_says_what_was_measured():
    """The line in docs/scaling.md is that of the committed results."""
    totals = json.loads(worker_kills.RESULTS.read_text())["totals"]
    assert totals["losses"] == 0
    assert totals["kills"] >= 20
    page = Path(__file__).parents[1] / "docs" / "scaling.md"
    assert f"\n{worker_kills.summary(totals)}\n" in page.read_text(encoding="utf-8")


def _name(topology):
    return "{}x{}".format(*topology)


def _worker(address, processes, devices, i, folder, strategies):
    numbers = map(str, (processes, i, devices))
    return [sys.executable, multiprocess_job.__file__, address, *numbers, str(folder), *strategies]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """For each topology, the folder with what its job has written."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(_EXAMPLES))
        if _IS_X86:
            patch.setenv("XLA_FLAGS", WITHOUT_FUSED_MULTIPLY_ADD)
        for processes, devices in (_ALONE, *_EIGHT):
            topology = processes, devices
            strategies = ["zero1", "fsdp"] if topology == (1, 8) else ["zero1"]
            folders[topology] = tmp_path_factory.mktemp(_name(topology))
            address = f"127.0.0.1:{launcher.free_port()}"
            end = launcher.launch(
                [
                    _worker(address, *topology, i, folders[topology], strategies)
                    for i in range(processes)
                ]
            )
            assert end.status == 0, f"{_name(topology)}: {end.reason}\n{end.log}"
    return folders


def _read(folder, name):
    return json.loads((folder / name).read_text())


@_NEEDS_FORMULA_AS_WRITTEN
@pytest.mark.parametrize("topology", _EIGHT, ids=_name)
def test_equal_gradients_give_equal_bits(topology, jobs):
    """On any topology, in every format and rounding, params and state, spread or sharded."""
    found, alone = (_read(jobs[name], "equal_gradients.json") for name in (topology, _ALONE))
    assert len(found) == 18
    for name in found:
        for part in ("params", "state"):
            assert found[name][part] == alone[name][part], (name, part)
    formats = {found[f"zero1 {moments} exact"]["state"] for moments in multiprocess_job.MOMENTS}
    assert len(formats) == 3


@pytest.mark.parametrize("topology", [_ALONE, *_EIGHT], ids=_name)
def test_each_device_has_its_part_of_the_state(topology, jobs):
    """With N devices an N-th, but for leaves that cannot be split, and for scalars."""
    devices = topology[0] * topology[1]
    elements = {name: math.prod(x.shape) for name, x in multiprocess_job.SHAPES.items()}
    parts = {name: n if name == "odd" else n // devices for name, n in elements.items()}
    for name, found in _read(jobs[topology], "equal_gradients.json").items():
        _, moments, rounding = name.split()
        moment = {"None": 8, "bfloat16": 4, "uint8": 2}[moments] * sum(parts.values())
        # Beside parameters in bfloat16, 16 bits each; beside the others, 8.
        narrow = parts["matrix"] + parts["odd"]
        residual = (narrow + sum(parts.values())) * (rounding == "exact")
        # The count, the seed where anything is rounded at random, the scale of few bits.
        scalars = 12 if moments != "None" else 8 if rounding == "stochastic" else 4
        assert found["bytes"] == [moment + residual + scalars] * topology[1], name


@pytest.mark.parametrize("topology", _EIGHT[1:], ids=_name)
def test_processes_share_devices_without_a_change_of_bits(topology, jobs):
    """Eight devices sum gradients in the same order, in whatever processes they are."""
    one_process = jobs[_EIGHT[0]]
    np.testing.assert_array_equal(
        np.load(jobs[topology] / "zero1.npy"), np.load(one_process / "zero1.npy")
    )
    assert _read(jobs[topology], "zero1.json") == _read(one_process, "zero1.json")


@pytest.mark.parametrize("strategy", multiprocess_job.STRATEGIES)
def test_one_device_and_eight_train_alike(strategy, jobs):
    """Up to the rounding of gradients, which are summed in another order."""
    eight, alone = jobs[_EIGHT[0]], jobs[_ALONE]
    losses, losses_alone = _read(eight, f"{strategy}.json"), _read(alone, "zero1.json")
    assert losses_alone[-1] < losses_alone[0] - 0.5
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-5)
    # Some 64 roundings in succession, of gradients that are clipped to 1. A step divides by at
    # least eps, so that each moves parameters apart by this at most; and by the learning rate if
    # gradients were others, a hundred times as far in all.
    apart = multiprocess_job.LEARNING_RATE * 64 * 2**-24 / multiprocess_job.EPS
    np.testing.assert_allclose(
        np.load(eight / f"{strategy}.npy"),
        np.load(alone / "zero1.npy"),
        rtol=0,
        atol=multiprocess_job.STEPS * apart,
    )


def _command(folder, *flags):
    script = str(_EXAMPLES / "distributed.py")
    return [sys.executable, "-u", script, "--output", str(folder), *map(str, flags)]


@contextlib.contextmanager
def _started(command):
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # If the test has failed before its end.


def _run(folder, *flags):
    """Runs the example to its end: what it printed, without the line on what runs where."""
    done = subprocess.run(
        _command(folder, *flags), capture_output=True, text=True, timeout=_PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    where, *lines = done.stdout.splitlines()
    return where, lines


_TWO = ("--processes", 2, "--devices", 1, "--save-every", 5)
_GOES_ON = "; the same command goes on from the last complete checkpoint"


@pytest.fixture(scope="module")
def fast():
    """Compiles without optimizations, in every process of the example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fast):
    """The folder of a run that nothing stopped, and its last line."""
    folder = tmp_path_factory.mktemp("undisturbed")
    where, lines = _run(folder, *_TWO, "--steps", 20)
    assert where == (
        "2 processes, 2 cpu devices, zero1: 345,600 bytes of parameters and 345,604 of state a "
        "device"
    )
    assert lines[:2] == ["begins anew", "saved step 5"]
    assert re.fullmatch(r"loss \d\.\d{4}, checksum [0-9a-f]{16}", lines[-1])
    return folder, lines[-1]


def test_a_killed_worker_ends_the_job_and_nothing_is_lost(tmp_path, undisturbed):
    """With one line; the same command then ends with the bits of the undisturbed run."""
    command = _command(tmp_path, *_TWO, "--steps", 20)
    with _started(command) as job:
        for line in iter(job.stdout.readline, ""):
            if line == "saved step 5\n":
                break
        workers = psutil.Process(job.pid).children()
        # The one that coordinates the others, too.
        workers[0].kill()
        _, error = job.communicate(timeout=_PATIENCE)
    assert job.returncode == 1
    assert error == (f"distributed.py: error: process 0 of 2 was killed by SIGKILL{_GOES_ON}\n")
    assert not any(map(psutil.pid_exists, (worker.pid for worker in workers)))

    _, (first, *_, last) = _run(tmp_path, *_TWO, "--steps", 20)
    (step,) = re.fullmatch(r"goes on from step (\d+)", first).groups()
    assert 5 <= int(step) <= 20
    assert last == undisturbed[1]


def test_without_a_launcher_the_others_end_by_themselves(tmp_path, fast):
    """They see a closed connection, or JAX aborts them when it has missed the heartbeat."""
    address = f"127.0.0.1:{launcher.free_port()}"
    flags = ("--processes", 2, "--devices", 1, "--coordinator", address, "--process")
    commands = (_command(tmp_path, *flags, i) for i in range(2))
    with _started(next(commands)) as first, _started(next(commands)) as second:
        while first.stdout.readline() not in ("begins anew\n", ""):
            pass
        second.kill()
        _, error = first.communicate(timeout=_PATIENCE)
    assert first.returncode in (launcher.LOST, -signal.SIGABRT)
    assert launcher.ABORTED_BY_JAX in error or "error: process 0 of 2: " in error


def test_goes_on_elsewhere(tmp_path, undisturbed):
    """From a checkpoint of two processes, in one: with its bits, on as many devices to the end."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "20")
    with checkpoints.opened(tmp_path) as folder:
        checksum = folder.metadata(15).custom_metadata["checksum"]
    flags = ("--processes", 1, "--strategy", "fsdp", "--devices", 4, "--steps", 15)
    where, lines = _run(tmp_path, *flags)
    assert where.startswith("1 processes, 4 cpu devices, fsdp: 86,400 bytes of parameters")
    assert lines[0] == "goes on from step 15"
    assert lines[1].endswith(f"checksum {checksum[:16]}")

    flags = ("--processes", 1, "--devices", 2, "--save-every", 5, "--steps", 20)
    _, (first, *_, last) = _run(tmp_path, *flags)
    assert first == "goes on from step 15"
    assert last == undisturbed[1]


def test_divergence_is_one_line(tmp_path, fast):
    """Found by every process, said once."""
    flags = ("--processes", 1, "--devices", 1, "--learning-rate", "1e38")
    done = subprocess.run(
        _command(tmp_path, *flags), capture_output=True, text=True, timeout=_PATIENCE
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(r"error: diverged after \d+ steps; try another --learning-rate", line)


def test_what_is_divergence(capsys):
    """A loss that is not finite: exit status 1, and what may help."""
    parser = Parser("", 0.1, 0.0, "output")
    distributed.check_loss(jnp.float32(3), 7, parser)
    for loss in (jnp.inf, jnp.nan):
        with pytest.raises(SystemExit) as end:
            distributed.check_loss(jnp.float32(loss), 7, parser)
        assert end.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "error: diverged after 7 steps; try another --learning-rate" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", "12"], "--batch-size: must be divisible by the number of devices, 8"),
        (["--strategy", "zero3"], "--strategy"),
        (["--processes", "0"], "--processes"),
        (["--devices", "65"], "--devices"),
        (["--devices", "0"], "--devices: 0 only with --coordinator"),
        (["--process", "0"], "--process: goes with --coordinator"),
        (["--coordinator", "host:1"], "--process: goes with --coordinator"),
        (["--coordinator", "host:1", "--process", "2"], "--process: must be below"),
        (["--optimizer", "optax.adamw", "--moments", "uint8"], "--moments"),
        (["--output", __file__], "--output"),
    ],
)
def test_refuses_bad_flags(flags, named, tmp_path, capsys):
    """Before a process is started: exit status 2, and one line on stderr that names the flag."""
    status, printed, line = one_line_error(
        distributed.main, ["--output", str(tmp_path), *flags], capsys
    )
    assert (status, printed) == (2, "")
    assert named in line


_WAITS = "import time; time.sleep(100)"
_ABORTS = f"""
import os, sys
print({launcher.ABORTED_BY_JAX!r}, file=sys.stderr, flush=True)
os.abort()
"""
_LOSES = f"import sys; print('x: error: lost', file=sys.stderr); sys.exit({launcher.LOST})"
_REPORTS = "import sys; print('x: error: bad', file=sys.stderr); sys.exit(2)"
_KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (["", ""], (0, "", False)),
        ([_WAITS, _KILLED], (1, "process 1 of 2 was killed by SIGTERM", True)),
        ([_LOSES, _ABORTS, _KILLED], (1, "process 2 of 3 was killed by SIGTERM", True)),
        ([_LOSES, _REPORTS], (2, "bad", False)),
        ([_ABORTS, _LOSES, _WAITS], (1, "lost", False)),
        ([_ABORTS, _WAITS, _ABORTS], (1, "process 1 of 3 does not answer", True)),
        (["import os; os.abort()", _WAITS], (1, "process 0 of 2 was killed by SIGABRT", True)),
        ([_LOSES, "1 / 0"], (1, "process 1 of 2 failed with status 1", True)),
    ],
)
def test_the_reason_is_the_cause(programs, expected):
    """Of several processes that fail, the one that the others follow from; what is left ends."""
    end = launcher.launch([[sys.executable, "-c", program] for program in programs])
    assert (end.status, end.reason, end.is_lost) == expected
    assert ("ZeroDivisionError" in end.log) == ("1 / 0" in programs)
    assert not psutil.Process().children()


_LAUNCHES = f"""
import signal, sys, launcher
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # The tests may run where they are ignored.
launcher.stop_on_signals()
waits = "import launcher, time; launcher.end_with_launcher(); print(1, flush=True); {_WAITS}"
try:
    launcher.launch([[sys.executable, "-c", waits]] * 2)
except launcher.Stopped as stopped:
    sys.exit(stopped.args[0].name)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_the_launcher(number, monkeypatch):
    """However it is ended, its processes end as well."""
    monkeypatch.setenv("PYTHONPATH", str(_EXAMPLES))
    with _started([sys.executable, "-c", _LAUNCHES]) as process:
        assert process.stdout.readline() == "1\n"
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.send_signal(number)
        _, error = process.communicate(timeout=_PATIENCE)
    _, left = psutil.wait_procs(workers, timeout=_PATIENCE)
    assert not left
    assert error == ("" if number == signal.SIGKILL else f"{number.name}\n")
