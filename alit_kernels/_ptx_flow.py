"""Control flow of a kernel's PTX: the shorter way to the end at each branch, and what branches depend on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ._ptx import Block, lane_bytes


def shorter(blocks: list[Block], place: Mapping[str, int]) -> list[bool]:
    """List of bools, one a block: True if taking its final branch leads to the program's end in fewer statements."""
    endless = sum(len(block.statements) for block in blocks) + 1
    onwards: list[list[int]] = []  # the blocks after each, -1 for the end; the target first
    for i, block in enumerate(blocks):
        last = block.statements[-1] if block.statements else None
        kind = last.opcode.partition(".")[0] if last else ""
        after = [place[block.target]] if block.target else [-1] if kind in ("ret", "exit") else []
        if not after or (last and last.guard):
            after.append(i + 1 if i + 1 < len(blocks) else -1)
        onwards.append(after)
    ways = {-1: 0} | dict.fromkeys(range(len(blocks)), endless)
    while True:
        before = dict(ways)
        for i in reversed(range(len(blocks))):
            ways[i] = min(len(blocks[i].statements) + min(ways[j] for j in onwards[i]), endless)
        if ways == before:
            return [len(after) == 2 and ways[after[0]] < ways[after[1]] for after in onwards]


def deciding(blocks: list[Block]) -> list[Block]:
    """Copies of the blocks, with the statements alone that some branch depends on."""
    statements = [statement for block in blocks for statement in block.statements]
    kept, registers, sizes = set[int](), set[str](), set[int]()
    while True:
        before = len(kept)
        for statement in statements:
            kind, first = statement.opcode.partition(".")[0], set(_names(statement.operands[:1]))
            if id(statement) in kept or not (
                kind in ("bra", "ret", "exit")
                or (
                    statement.opcode.startswith("st.shared")
                    and lane_bytes(statement.opcode) in sizes
                )
                or (kind != "st" and registers & first)
            ):
                continue
            kept.add(id(statement))
            registers |= set(_names(statement.operands)) | set(_names([statement.guard]))
            if statement.opcode.startswith("ld.shared"):
                sizes.add(lane_bytes(statement.opcode))
        if len(kept) == before:
            return [
                Block(block.label, [x for x in block.statements if id(x) in kept])
                for block in blocks
            ]


def _names(operands: Iterable[str]) -> list[str]:
    return [name for operand in operands for name in re.findall(r"%\w+(?:\.\w)?", operand)]
