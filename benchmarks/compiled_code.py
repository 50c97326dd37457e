"""Figures of a compiled step, read from the text of the program and its machine code."""

import collections
import math
import re
from pathlib import Path
from typing import NamedTuple

# Kernels that touch fewer bytes are scalar arithmetic, or leaves too small to count.
LARGE = 100_000
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# Operations that move nothing.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Traffic(NamedTuple):
    """The memory traffic of a program.

    Attributes:
        bytes: to and from the chip's memory.
        kernels: how many that touch more than LARGE bytes.
    """

    bytes: int
    kernels: int


class _Size(NamedTuple):
    far: int  # in the chip's memory
    all: int


def _size(shapes: str) -> list[_Size]:
    """Sizes of arrays. A layout with S(1) or the like is in a memory on the chip."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(shapes):
        size = _SIZES.get(dtype, 0) * math.prod(int(x) for x in dims.split(",") if x)
        found.append(_Size(0 if "S(" in layout else size, size))
    return found


def _instructions(text: str) -> list[tuple[str, str, str, list[str]]]:
    """The entry computation: name, opcode, shapes of the results and names of the operands."""
    found = []
    for line in text[text.index("ENTRY") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
        opcode = match and re.search(r"(?:^|[)\s}])([a-z][a-z\-]*)\(", match[2])
        if match and opcode:
            operands = re.findall(r"%([\w.\-]+)", match[2][opcode.end() :].partition(")")[0])
            found.append((match[1], opcode[1], match[2][: opcode.start(1)], operands))
    return found


def traffic(text: str) -> Traffic:
    """Bytes and kernels of a compiled program.

    A kernel reads its operands and writes its results, each once, as far as they are in the chip's
    memory. TPU programs also copy from there to the memory on the chip, and back, while kernels
    run: those bytes count too, but the copies are no kernels.

    Args:
        text: HLO after all passes, with a scheduled entry computation.
    """
    sizes: dict[str, _Size] = {}
    moved = kernels = 0
    for name, opcode, shapes, operands in _instructions(text):
        arrays = _size(shapes)
        sizes[name] = _Size(
            *(sum(part) for part in zip(*arrays, strict=True)) if arrays else (0, 0)
        )
        if opcode.endswith("-start"):
            # Source, destination and a semaphore. The smaller of the two is what is copied.
            source, destination = arrays[:2]
            copied = min(source.all, destination.all)
            moved += copied * sum(side.far > 0 for side in (source, destination))
        elif opcode not in _FREE and not opcode.endswith("-done"):
            touched = [sizes[name], *(sizes[x] for x in operands if x in sizes)]
            if opcode != "custom-call" and sum(size.all for size in touched) > LARGE:
                moved += sum(size.far for size in touched)
                kernels += 1
    return Traffic(moved, kernels)


def cycles(text: str) -> int:
    """The TPU compiler's estimate for all kernels; 0 for other compilers, which give none."""
    entry = text[text.index("ENTRY") :]
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))


def bundles(text: str, dump: Path) -> int | None:
    """Bundles that a TPU core issues for the large kernels, from their scheduled code.

    A kernel's code is one turn of a loop over windows, whose number the program says; two cores of
    a chip share them where it says so.

    Args:
        text: HLO of the compiled program.
        dump: where `chips.prepare` had the code written.

    Returns:
        Their number, or None where a kernel's code has loops inside, with turns that are not known.
    """
    total = 0.0
    for line in text[text.index("ENTRY") :].splitlines():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        if not estimate or int(estimate[1]) < 10_000:
            continue
        name = re.match(r"\s*(?:ROOT )?%([\w.\-]+)", line)
        windows = re.search(r'"iteration_bounds":\[([^]]*)\]', line)
        assert name
        assert windows
        if _dumped(dump, name[1], "final_bundles").count(" LB") != 1:
            return None
        analysis = _dumped(dump, name[1], "schedule-analysis_final_bundles")
        code = re.search(r"total scheduled bundles:\s+(\d+)", analysis)
        assert code
        turns = math.prod(int(x) for x in re.findall(r"\d+", windows[1]))
        total += int(code[1]) * turns / (2 if '"megacore_config"' in line else 1)
    return round(total)


def _dumped(dump: Path, kernel: str, what: str) -> str:
    name = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{what}\.txt")
    found = [path for path in dump.iterdir() if name.fullmatch(path.name)]
    if not found:
        raise FileNotFoundError(f"no {what} of {kernel}")
    return max(found).read_text()  # The last, because the compiler may try several schedules.


def opcodes(disassembly: str) -> list[str]:
    """Machine instructions in the output of nvdisasm, without the padding at the end."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", disassembly)
    last = max((i for i, name in enumerate(found) if name == "EXIT"), default=len(found) - 1)
    return found[: last + 1]


def stored(names: list[str]) -> int:
    """Bytes that a thread stores, from the widths in the names of its instructions."""
    widths = collections.Counter()
    for name in names:
        if name.startswith("STG"):
            parts = name.split(".")
            widths[
                next((w for w in ("U8", "S8", "U16", "S16", "64", "128") if w in parts), "")
            ] += 1
    size = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "": 4}
    return sum(size[width] * count for width, count in widths.items())
