"""Reads machine code: how many instructions a kernel has, and how many each of its innermost loops.

    instruction_count(cubin)     # all of them, without the no-operations that fill the end
    inner_loops(cubin, 90)       # (122, 180): instructions of each innermost loop, in order of address
    amd_inner_loops(text)        # the same of AMD's assembly

What `cuobjdump -sass` prints says the same and takes half a second a kernel; a test compares the two. A cubin is an ELF
file. Its sections .text.* hold instructions of 16 bytes, with the operation in the low 12 bits.

A loop ends in a branch back to its first instruction, so its length is that from the target to the last branch there.
This is what the machine runs in a turn if it skips nothing: both sides of an `if` count. Two things look like loops and
are none: a loop of fewer than `WAITING` instructions waits for a barrier, and a branch back across the end of the
kernel returns from code that was moved there because it seldom runs.
"""

import re
import struct
from collections.abc import Iterator

__all__ = ["amd_inner_loops", "branches", "code", "inner_loops", "instruction_count"]

INSTRUCTION = 16  # bytes, of sm_80 and later
NO_OPERATION = 0x918
BRANCHES = (0x947, 0x547)  # on a predicate of the thread, and of the warp
EXIT = 0x794D  # with the predicate that is always true, in bits 12 to 15
WAITING = 16  # instructions


def code(cubin: bytes) -> Iterator[list[int]]:
    """The low half of every instruction, a list for each section of code."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + n * size) for n in range(number)]
    for name, _, _, _, start, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            yield [low for low, _ in struct.iter_unpack("<QQ", cubin[start : start + length])]


def instruction_count(cubin: bytes) -> int:
    return sum(low & 0xFFF != NO_OPERATION for section in code(cubin) for low in section)


def branches(section: list[int], architecture: int) -> list[tuple[int, int]]:
    """(instruction, target), both counted from the first instruction of the section."""
    return [
        (here, here + 1 + _distance(low, architecture) // INSTRUCTION)
        for here, low in enumerate(section)
        if low & 0xFFF in BRANCHES
    ]


def _distance(low: int, architecture: int) -> int:
    """Bytes from the next instruction to the target of a branch."""
    signed = low - (1 << 64) if low >> 63 else low
    if architecture < 90:
        return signed >> 32
    # A quarter of the distance: its low 8 bits at bit 16, the others from bit 34 on.
    return ((signed >> 34 << 8) | (low >> 16 & 0xFF)) * 4


def inner_loops(cubin: bytes, architecture: int) -> tuple[int, ...]:
    """Instructions of every loop that contains no other loop, in order of address."""
    found: tuple[int, ...] = ()
    for section in code(cubin):
        exits = [here for here, low in enumerate(section) if low & 0xFFFF == EXIT]
        last: dict[int, int] = {}  # instruction of each loop, by its first
        for here, target in branches(section, architecture):
            if here + 1 - target >= WAITING and not any(target <= exit < here for exit in exits):
                last[target] = max(here, last.get(target, here))
        loops = sorted(last.items())
        found += tuple(
            end + 1 - start
            for start, end in loops
            if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
        )
    return found


def amd_inner_loops(assembly: str) -> tuple[int, ...]:
    """The same, of the text that LLVM writes: it names the innermost loops in comments."""
    number, label = 0, ""
    headers: dict[str, int] = {}
    last: dict[str, int] = {}
    for line in assembly.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label = found[1]
        if "Inner Loop Header" in line:
            headers[label] = number
        elif re.match(r"\t[a-z]", line):
            number += 1
            branch = re.match(r"\ts_c?branch\w*\s+(\.LBB\w+)", line)
            if branch and branch[1] in headers:
                last[branch[1]] = number
    return tuple(last[name] - start for name, start in headers.items() if name in last)
