"""Parser of a kernel's PTX: its basic blocks, its hot loop, and the widths of its global memory accesses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_STATEMENT = re.compile(
    r"^[ \t]*(?:(\$L__BB\w+):|(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)(?:\s+([^;]*))?;)", re.M
)
_IGNORED = re.compile(r"//[^\n]*|^[ \t]*\.\w[^\n]*$", re.M)


@dataclass(frozen=True)
class Statement:
    """One instruction; ``guard`` names its predicate, ``negated``: it runs where the predicate is false."""

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False


@dataclass
class Block:
    """Basic block: statements that run one after the other.

    Attributes:
        visits: number of visits, counted by ``run``.
        shared: cycles that shared memory takes for the accesses of one warp in one visit, a mean over the warps; set
            by ``walk``.
        conflict_free: cycles that they would take if each lane's bytes came from banks of their own.
    """

    label: str
    statements: list[Statement] = field(default_factory=list)
    visits: int = 0
    shared: float = 0.0
    conflict_free: float = 0.0

    @property
    def target(self) -> str:
        """Label that the branch at the block's end goes to; empty without a branch."""
        last = self.statements[-1] if self.statements else Statement("", ())
        return last.operands[0] if last.opcode.startswith("bra") else ""


def parse(ptx: str) -> list[Block]:
    """The blocks of an entry, in order; a new one at each label and after each branch."""
    blocks = [Block("")]
    for label, negated, guard, opcode, operands in _STATEMENT.findall(_IGNORED.sub("", ptx)):
        if label:
            blocks.append(Block(label))
            continue
        parts = tuple(part.strip() for part in re.split(r",(?![^{]*\})", operands))
        blocks[-1].statements.append(Statement(opcode, parts, guard, bool(negated)))
        if opcode.startswith("bra"):
            blocks.append(Block(""))
    return [block for block in blocks if block.label or block.statements]


def hot_loop(blocks: list[Block]) -> list[Block]:
    """Blocks of the hot loop, by the rule of ``_machine_code.hot_loop``; all blocks where there is no loop."""
    place = {block.label: i for i, block in enumerate(blocks) if block.label}
    ends: dict[int, int] = {}  # head of a loop -> the last branch back to it
    for end, block in enumerate(blocks):
        start = place.get(block.target)
        if start is not None and start <= end:
            ends[start] = end
    inner = innermost(ends)
    if not inner:
        return blocks
    sizes = {(a, b): sum(len(block.statements) for block in blocks[a : b + 1]) for a, b in inner}
    start, end = min(span for span in inner if 2 * sizes[span] >= max(sizes.values()))
    return blocks[start : end + 1]


def innermost(ends: Mapping[int, int]) -> list[tuple[int, int]]:
    """Loops (head, last branch back) of ``ends``, head -> last branch back, that contain no other loop."""
    spans = ends.items()
    return [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]


def conflicts(blocks: Iterable[Block]) -> float:
    """Ratio of shared memory cycles to those without bank conflicts; 1 where none is accessed."""
    found = list(blocks)
    least = sum(block.conflict_free for block in found)
    return sum(block.shared for block in found) / least if least else 1.0


_PTX_LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);", re.M)


def access_widths(ptx: str, arguments: list[str]) -> dict[str, set[int]]:
    """Bytes per lane of every global access, by the pointer argument that its address comes from.

    Follows each address register back through the PTX to the parameter it was computed from. ``arguments`` names all
    parameters in order, scalars by an empty name.
    """
    sources: dict[str, set[str]] = {}
    accesses: list[tuple[str, int]] = []
    for opcode, operands in _PTX_LINE.findall(ptx):
        if opcode.startswith(("ld.global", "st.global", "cp.async.c")):
            # The last address is the global one; a loaded value is no address computed from the load's own.
            place = re.findall(r"\[\s*(%\w+)", operands)[-1]
            accesses.append((place, _ptx_width(opcode, operands)))
            continue
        target, _, rest = operands.partition(",")
        parameter = re.search(r"_param_(\d+)", rest)
        found = {parameter[1]} if parameter else set(re.findall(r"%rd\d+", rest))
        sources.setdefault(target.strip(), set()).update(found)
    result: dict[str, set[int]] = {}
    for register, size in accesses:
        for position in _roots(register, sources):
            if position < len(arguments) and arguments[position]:
                result.setdefault(arguments[position], set()).add(size)
    return result


def _ptx_width(opcode: str, operands: str) -> int:
    if opcode.startswith("cp.async"):
        return int(operands.split(",")[2].strip(), 0)
    return lane_bytes(opcode)


def lane_bytes(opcode: str) -> int:
    """Bytes that a lane loads or stores."""
    bits, lanes = int(re.findall(r"\.[bfus](\d+)", opcode)[-1]), re.search(r"\.v(\d)", opcode)
    return bits // 8 * (int(lanes[1]) if lanes else 1)


def _roots(register: str, sources: dict[str, set[str]]) -> set[int]:
    """Positions of the parameters that a 64-bit register is computed from through 64-bit registers."""
    seen: set[str] = set()
    todo, found = [register], set()
    while todo:
        here = todo.pop()
        for source in sources.get(here, set()) - seen:
            seen.add(source)
            if source.isdigit():
                found.add(int(source))
            else:
                todo.append(source)
    return found
