"""The size and shape of the project, with limits; `make figures` prints them.

Exits with status 1 if a limit is missed. The seconds of the tests are those of the last complete
`make test` and `make test-all`, which leave a JUnit report in `output/`.
"""

import ast
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "adamaxw"
REPORTS = {"make test": "junit-fast.xml", "make test-all": "junit-all.xml"}


@dataclass(frozen=True)
class Figure:
    """A number, its text, and its limits, if it has any."""

    name: str
    value: float | None
    text: str
    most: float | None = None
    least: float | None = None
    unit: str = ""

    @property
    def limit(self) -> str:
        """The limits in words; empty without any."""
        if self.most is None:
            return ""
        if self.least is None:
            return f"at most {self.most:,g}{self.unit}"
        return f"{self.least:,g} to {self.most:,g}{self.unit}"

    @property
    def met(self) -> bool | None:
        """Whether the value is within the limits; None without a limit or a value."""
        if self.value is None or self.most is None:
            return None
        return (self.least or 0) <= self.value <= self.most


@dataclass(frozen=True)
class Source:
    """A Python file, its lines by kind (numbers from 1), and its `raise` statements."""

    lines: int
    code: frozenset[int]
    comments: frozenset[int]
    refusals: frozenset[int]
    raises: int


def read(path: Path) -> Source:
    """Sorts the lines of a file into code, comments and, among the code, refusals."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    code, comments = set(), set()
    blank = {
        tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
        tokenize.ENDMARKER,
    }  # fmt: skip
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.type not in blank:
                code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        code.difference_update(_docstring(node))
    refusals = {line for node in ast.walk(tree) for line in _refusal(node)}
    raises = sum(isinstance(node, ast.Raise) for node in ast.walk(tree))
    return Source(
        text.count("\n"),
        frozenset(code),
        frozenset(comments),
        frozenset(refusals & code),
        raises,
    )


def _docstring(node: ast.AST) -> range:
    """Lines of the string that a module, class or function begins with, or that stands alone."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return _span(node, node)
    return range(0)


def _refusal(node: ast.AST) -> range:
    """Lines of a `raise`, or of an `if` whose body only raises, without its `else`."""
    if isinstance(node, ast.Raise):
        return _span(node, node)
    if isinstance(node, ast.If) and all(isinstance(x, ast.Raise) for x in node.body):
        return _span(node, node.body[-1])
    return range(0)


def _span(first: ast.stmt, last: ast.stmt) -> range:
    return range(first.lineno, (last.end_lineno or last.lineno) + 1)


def floors(package: Path) -> list[list[str]]:
    """Modules by the longest chain of imports below them inside the package.

    `__init__.py` does not count; what is imported from it counts as the module it comes from.
    Imports inside functions count, those under `if TYPE_CHECKING` do not.

    Raises:
        graphlib.CycleError: modules import each other.
    """
    modules = {path.stem: path for path in package.glob("*.py")}
    exported = {
        alias.asname or alias.name: module.removeprefix(f"{package.name}.") or alias.name
        for module, alias in _imports(modules.pop("__init__"), package.name)
    }
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for module, alias in _imports(path, package.name):
            inner = module.removeprefix(package.name).lstrip(".")
            graph[name].add(inner or exported.get(alias.name, alias.name))
        graph[name] &= modules.keys()
    found: list[list[str]] = []
    place: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        place[name] = max((place[below] + 1 for below in graph[name]), default=0)
        if place[name] == len(found):
            found.append([])
        found[place[name]].append(name)
    return [sorted(names) for names in found]


def _imports(path: Path, package: str) -> Iterator[tuple[str, ast.alias]]:
    """What a file imports from the package: the full name of the module, and the name."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom):
            prefix = [package] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            if module == package or module.startswith(f"{package}."):
                yield from ((module, alias) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{package}."):
                    yield alias.name, alias


def seconds(report: Path) -> tuple[float | None, str]:
    """Wall seconds of a test run, from its JUnit report, and their text."""
    if not report.exists():
        return None, "not run yet"
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total, tests, failed = 0.0, 0, 0
    for suite in suites:
        total += float(suite.get("time", 0))
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return total, f"{total:,.0f} ({tests} tests, {failed} failed)"


def figures(root: Path = ROOT) -> Iterator[Figure]:
    """All figures, in the order of the table."""
    package = root / "src" / "adamaxw"
    sources = {path.name: read(path) for path in sorted(package.rglob("*.py"))}
    largest = max(sources, key=lambda name: sources[name].lines)
    lines = sum(source.lines for source in sources.values())
    code = sum(len(source.code) for source in sources.values())
    comments = sum(len(source.comments) for source in sources.values())
    refusals = sum(len(source.refusals) for source in sources.values())
    raises = sum(source.raises for source in sources.values())
    top = sources[largest].lines
    yield Figure("lines of source", lines, f"{lines:,} in {len(sources)} files", 2900)
    yield Figure("largest file", top, f"{top} ({largest})", 350)
    yield Figure("lines of code", code, f"{code:,}")
    share = comments / code
    yield Figure("comments per line of code", share, f"{share:.3f}", 0.15, 0.08)
    percent = 100 * refusals / code
    yield Figure(
        "refusals, of the code", percent, f"{percent:.1f}% ({refusals} lines)", 10, unit="%"
    )
    yield Figure("lines of code per raise", None, f"{code / max(raises, 1):.0f} ({raises})")
    yield from _floor_figures(package)
    tests = sum(_lines((root / "tests").rglob("*.py")))
    yield Figure("lines of tests", tests, f"{tests:,}", 7000)
    for command, name in REPORTS.items():
        total, text = seconds(root / "output" / name)
        most = 300 if command == "make test" else None
        yield Figure(f"seconds of {command}", total, text, most)
    number = len((root / "README.md").read_text(encoding="utf-8").split())
    yield Figure("words of README", number, f"{number:,}", 500)


def _floor_figures(package: Path) -> Iterator[Figure]:
    try:
        found = floors(package)
    except CycleError as error:
        yield Figure("floors of imports", float("inf"), f"circle: {error.args[1]}", 6)
        return
    yield Figure("floors of imports", len(found), str(len(found)), 6)
    for i, names in enumerate(found, 1):
        yield Figure(f"  floor {i}", None, ", ".join(names))


def _lines(paths: Iterable[Path]) -> Iterator[int]:
    return (path.read_text(encoding="utf-8").count("\n") for path in paths)


def main() -> int:
    """Prints the table; returns 1 if a limit is missed."""
    table = Table("figure", "now", "limit", "")
    table.columns[0].no_wrap = True
    marks = {None: "", True: "met", False: "MISSED"}
    found = list(figures())
    for figure in found:
        table.add_row(figure.name, figure.text, figure.limit, marks[figure.met])
    Console().print(table)
    return int(any(figure.met is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
