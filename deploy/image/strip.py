"""``strip.py FOLDER`` takes from the shared libraries below it what is not loaded with them: symbols for a debugger.

A loader reads an ELF file's program headers and what they name; sections for tools (.symtab, .debug_*) lie behind that,
in some wheels nine tenths of the file. It is what ``strip`` does, which the base image does not have.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path


def loaded(library: bytes) -> bytes:
    """What of a 64-bit little-endian ELF file is loaded, without the table of sections; of another file all of it."""
    if library[:6] != b"\x7fELF\x02\x01":
        return library
    (headers,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    end = headers + size * count
    for at in range(headers, end, size):
        offset, length = struct.unpack_from("<Q16xQ", library, at + 8)
        end = max(end, offset + length)
    stripped = bytearray(library[:end])
    struct.pack_into("<Q", stripped, 40, 0)  # where the table of sections is
    struct.pack_into("<HH", stripped, 60, 0, 0)  # how many there are, and which one has their names
    return bytes(stripped)


if __name__ == "__main__":
    for path in Path(sys.argv[1]).rglob("*.so*"):
        if path.is_file() and not path.is_symlink():
            whole = path.read_bytes()
            # What is as small already stays untouched: it may be another layer's.
            if len(part := loaded(whole)) < len(whole):
                path.write_bytes(part)
