"""What a cubin's kernels are made of: the opcodes of their instructions, the low 12 bits since Volta."""

from __future__ import annotations

import struct
from collections.abc import Iterator

GRIDDEP_LAUNCH, GRIDDEP_WAIT = 0x82D, 0x82E  # PREEXIT and ACQBULK: griddepcontrol's two


def opcodes(code: bytes) -> dict[str, set[int]]:
    """The opcodes of each kernel, by its mangled name."""
    return {
        name[6:]: {first & 0xFFF for first, _ in struct.iter_unpack("<QQ", body)}
        for name, body in _sections(code)
        if name.startswith(".text.")
    }


def _sections(code: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a 64-bit ELF file's sections."""
    (table,) = struct.unpack_from("<Q", code, 0x28)
    size, count, named = struct.unpack_from("<HHH", code, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", code, table + i * size) for i in range(count)]
    names = headers[named][4]
    for name, _, _, _, offset, nbytes in headers:
        end = code.index(b"\0", names + name)
        yield code[names + name : end].decode(), code[offset : offset + nbytes]
