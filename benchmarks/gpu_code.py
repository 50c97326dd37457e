"""The machine code of a program compiled for CUDA, disassembled by NVIDIA's nvdisasm.

Needs cramjam and nvidia-cuda-nvdisasm: `make accelerators` installs them.
"""

import importlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiled_code

_ELF = b"\x7fELF"
# XLA serializes in Riegeli's record format: blocks of 64 KiB, each with a header of 24 bytes. The
# first chunk is only this signature.
_SIGNATURE = bytes.fromhex("83af70d10d884a3f")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER, _KIND = 2**16, 24, 40, 24


def instructions(compiled: Any, stored: float) -> float:
    """Machine instructions per element of the longest kernel of a program for one leaf.

    Args:
        compiled: the program. Its kernel must store whole results, so that its elements are known.
        stored: bytes per element that the kernel stores.
    """
    names = max((compiled_code.opcodes(code) for code in disassembled(compiled)), key=len)
    return len(names) * stored / compiled_code.stored(names)


def disassembled(compiled: Any) -> list[str]:
    """The text of each kernel."""
    data = _uncompressed(compiled.runtime_executable().serialize())
    tool = _nvdisasm()
    found = []
    for match in re.finditer(re.escape(_ELF), data):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(_elf(data[match.start() :]))
            file.flush()
            run = subprocess.run(
                [tool, "-c", file.name], capture_output=True, text=True, check=True
            )
        found.append(run.stdout)
    return found


def _uncompressed(data: bytes) -> bytes:
    """The content of a serialized program; newer versions of JAX nest files in records."""
    while _SIGNATURE in data:
        data = max(map(_records, _chunks(data[data.index(_SIGNATURE) :])), key=len)
    return data


def _chunks(file: bytes) -> Iterator[bytes]:
    """The chunks of a file, without their headers."""
    blocks = (file[i + _BLOCK_HEADER : i + _BLOCK] for i in range(0, len(file), _BLOCK))
    data = b"".join(blocks)
    data = data[_CHUNK_HEADER:]
    while (
        data[_KIND : _KIND + 1] == b"r"
    ):  # Otherwise the file has ended, and the enclosing one continues.
        end = _CHUNK_HEADER + struct.unpack_from("<Q", data, 8)[0]
        yield data[_CHUNK_HEADER:end]
        data = data[end:]


def _records(chunk: bytes) -> bytes:
    """The concatenated records of a chunk."""
    kind = chunk[:1]
    if kind not in (b"\0", b"s"):
        raise ValueError(f"records are compressed with {kind!r}, not with Snappy")
    length, at = _varint(chunk, 1)
    data = chunk[at + length :]  # The sizes of the records come before.
    if kind == b"\0":
        return data
    cramjam: Any = importlib.import_module("cramjam")
    return bytes(cramjam.snappy.decompress_raw(data[_varint(data, 0)[1] :]))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _elf(data: bytes) -> bytes:
    """The file that begins here; its table of segments or of sections comes last."""
    tables = struct.unpack_from("<QQ", data, 32)
    entries = struct.unpack_from("<HHHH", data, 54)
    ends = (tables[i] + entries[2 * i] * entries[2 * i + 1] for i in range(2))
    return data[: max(ends)]


def _nvdisasm() -> str:
    nvidia: Any = importlib.import_module("nvidia")
    found = [path for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/nvdisasm")]
    if not found:
        raise FileNotFoundError("no nvdisasm: `make accelerators` installs it")
    return str(found[0])
