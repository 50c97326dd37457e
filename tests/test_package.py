"""The package as it is shipped: its names, its files, its dependencies."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import adamaxw
from adamaxw import moments

_ROOT = Path(__file__).parents[1]


def test_public_names_are_those_in_the_docs():
    """`__all__`, the namespace (`adamaxw.keras` is imported by itself) and the page agree."""
    page = (_ROOT / "docs/api.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"^::: adamaxw\n.*\n *members: \[(.*)\]", page, re.M)
    documented = [*names.split(", "), *re.findall(r"^::: adamaxw\.(\w+)$", page, re.M)]
    documented.remove("keras")
    visible = [name for name in vars(adamaxw) if not name.startswith("_") and name != "keras"]
    assert sorted(documented) == sorted(adamaxw.__all__) == sorted(visible)
    assert all(getattr(adamaxw, name).__doc__ for name in adamaxw.__all__)
    assert moments.Moments._fields == ("count", "mu", "nu", "residual", "seed")


def test_the_wheel_holds_the_package_alone(tmp_path):
    """Sources, py.typed and metadata; no tests, no oracle; jax and optax alone are required."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(path).decode()
    sources = {f"adamaxw/{path.name}" for path in (_ROOT / "src/adamaxw").glob("*.py")}
    assert files == sources | {"adamaxw/py.typed"}
    assert re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", metadata, re.M) == ["jax", "optax"]


def test_import_is_quiet_and_light():
    """Importing changes no configuration of JAX, starts no backend, and imports no extra."""
    code = (
        "import sys, jax; before = dict(jax.config.values)\n"
        "import adamaxw\n"
        "assert dict(jax.config.values) == before\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "extras = {'rich', 'flax', 'equinox', 'keras', 'matplotlib', 'sklearn', 'torch'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_optimizer_is_our_own():
    """Of Optax src takes types alone: its optimizers and helpers are functions, in lower case."""
    for path in (_ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from optax|import optax\.)", text, re.M), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "optax" or node.attr[0].isupper(), (path, node.attr)
