"""What a cubin's kernels are made of: the opcodes of their instructions, the low 12 bits since Volta."""

from __future__ import annotations

import struct
from collections.abc import Iterator

GRIDDEP_LAUNCH, GRIDDEP_WAIT = 0x82D, 0x82E  # PREEXIT and ACQBULK: griddepcontrol's two
LDS, ARRIVE, LEAVES = 0x984, 0x9A7, (0x947, 0x94D)  # ld.shared, arrivals at a barrier, jumps and exits
ALWAYS, NEVER = 7, 15  # predicates


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


def arrivals_before_loads(code: bytes) -> dict[str, list[int]]:
    """By mangled name, offsets of the arrivals at a barrier that a load from shared memory may still follow.

    A load announces itself on one of six scoreboards, on which a later instruction waits; loads return in
    order, so that one without a scoreboard is there when the next with one is. Looks at each kernel in the
    order of its addresses.
    """
    found: dict[str, list[int]] = {}
    for name, body in _sections(code):
        if not name.startswith(".text."):
            continue
        on_the_way: list[int | None] = []  # the scoreboards of loads; None: that of the next
        for at, (first, second) in enumerate(struct.iter_unpack("<QQ", body)):
            opcode, predicate = first & 0xFFF, first >> 12 & 15
            scoreboard, awaited = second >> 46 & 7, second >> 52 & 63
            on_the_way = [s for s in on_the_way if s is None or not awaited >> s & 1]
            if opcode == LDS and predicate != NEVER:
                if scoreboard < 6:
                    on_the_way = [scoreboard if s is None else s for s in on_the_way]
                on_the_way.append(scoreboard if scoreboard < 6 else None)
            elif opcode == ARRIVE and on_the_way:
                found.setdefault(name[6:], []).append(16 * at)
            elif opcode in LEAVES and predicate == ALWAYS:
                on_the_way = []
    return found
