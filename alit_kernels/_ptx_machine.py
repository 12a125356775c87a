"""Interpreter of the integer part of a kernel's PTX: trip counts, and bank conflicts in shared memory.

Loop bounds and addresses of a Triton program follow from its arguments, its number and the thread, hardly ever from the
data. So one program runs here without a GPU: the integers of all its threads as numpy arrays; floating point, and what
is loaded, are data. A branch goes where the first thread goes, since the branches of a program are the same for all of
its threads, and where data decide the shorter way to the end: no further iteration, no rare case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from ._ptx import Block, Statement, lane_bytes
from ._ptx_flow import deciding, shorter
from ._ptx_integers import OPERATIONS, REDUCTIONS, Value, operands, wrapped

#: Visits of blocks after which a program counts as endless.
LONGEST = 100_000
#: Value of the words of shared memory that come from data.
UNKNOWN = -(1 << 62)
#: Bytes of shared memory that a block has at most.
SHARED = 1 << 18

_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_SHARED = re.compile(
    r"(?:ld|st|atom|red)\.(?:volatile\.)?shared|ldmatrix|stmatrix|cp\.async\.c[ag]"
)
_FLOATING = re.compile(r"\.b?f\d+")


def walk(blocks: list[Block], threads: int) -> None:
    """Run each block once, in their order, whatever the branches say: its conflicts are then in ``blocks``.

    The thread's own part of an address is the same in every iteration and on every path; the part that differs, a
    buffer or a step, is the same for all threads.

    Raises:
        ValueError: an address in shared memory is computed from data.
    """
    machine = _Machine(threads, {}, (0,), (1,), data=0)
    for block in blocks:
        machine.visit(block, conflicts=True)


def run(
    blocks: list[Block],
    threads: int,
    arguments: Mapping[int, int],
    programs: Iterable[tuple[int, ...]] = ((0,),),
    grid: tuple[int, ...] = (1,),
    *,
    rare: int = 0,
) -> None:
    """Run programs, and add the number of their visits to each of ``blocks``.

    Args:
        arguments: position among the parameters in PTX -> integer; others are data.
        programs: their places in the grid.
        rare: number of branches decided by data, the first ones, at which a program takes the longer way, if that
            begins with code that it has not run.

    Raises:
        ValueError: a program does not end.
    """
    place = {block.label: i for i, block in enumerate(blocks) if block.label}
    decisive = deciding(blocks)
    short = shorter(blocks, place)
    for program in programs:
        machine, seen = _Machine(threads, arguments, program, grid, data=None), set[int]()
        here = visits = longer = 0
        while here < len(blocks):
            blocks[here].visits += 1
            visits += 1
            if visits > LONGEST:
                raise ValueError(f"program {program} visits more than {LONGEST} blocks")
            seen.add(here)
            other = here + 1 if short[here] else place.get(blocks[here].target, here + 1)
            taken = short[here] != (longer < rare and other not in seen)
            target, ended = machine.visit(decisive[here], taken=taken)
            if ended:
                break
            longer += machine.data_decided and taken != short[here]
            here = place[target] if target else here + 1


class _Machine:
    """State of one program: the registers of all its threads, and its shared memory."""

    def __init__(
        self,
        threads: int,
        arguments: Mapping[int, int],
        program: tuple[int, ...],
        grid: tuple[int, ...],
        data: Value,
    ) -> None:
        self.threads, self.arguments = threads, arguments
        self.data = data
        self.data_decided = False  # True if data decided the last branch
        self.pairs: dict[str, list[Value]] = {}
        self.memory = np.full(SHARED // 4, UNKNOWN, dtype=np.int64)
        self.values: dict[str, Value] = {"%tid.x": np.arange(threads), "global_smem": 0}
        self.values |= {"%laneid": np.arange(threads) % 32, "%warpid": np.arange(threads) // 32}
        for name, here, all_of_them in zip("xyz", (*program, 0, 0), (*grid, 1, 1), strict=False):
            self.values[f"%ctaid.{name}"] = here
            self.values[f"%nctaid.{name}"] = all_of_them

    def visit(
        self, block: Block, *, conflicts: bool = False, taken: bool = False
    ) -> tuple[str, bool]:
        """Run a block; return the label to go to, empty for the next block, and True if the program ends.

        ``taken``: whether the branch at its end is taken where data decide.
        """
        self.data_decided = False
        for statement in block.statements:
            active = self._active(statement)
            kind = statement.opcode.partition(".")[0]
            if kind == "bra":
                self.data_decided = active is None
                if (taken if active is None else _of_first(active)) and block.target:
                    return statement.operands[0], False
            elif kind in ("ret", "exit"):
                if active is not None and _of_first(active):
                    return "", True
            elif _SHARED.match(statement.opcode):
                if conflicts:
                    self._conflicts(block, statement, active)
                self._shared(statement, kind, active)
            elif not np.any(active):
                continue
            else:
                self._compute(statement, kind)
        return "", False

    def _active(self, statement: Statement) -> Value:
        if not statement.guard:
            return True
        value = self.values.get(statement.guard)
        if value is None:  # data decide: other instructions run
            return None if statement.opcode.startswith(("bra", "ret", "exit")) else True
        return value == 0 if statement.negated else value != 0

    def _value(self, operand: str) -> Value:
        if operand[0] in "%g":
            return self.values.get(operand, self.data)  # not yet set, where blocks run in order
        try:
            return int(operand, 0)
        except ValueError:
            return None

    def _set(self, statement: Statement, value: Value) -> None:
        for name in re.findall(r"%\w+", statement.operands[0]):
            self.values[name] = value

    def _address(self, operand: str) -> Value:
        base, offset = _ADDRESS.search(operand).groups()  # type: ignore[union-attr]
        value = self._value(base)
        return None if value is None else value + int(offset or "0", 0)

    def _shared(self, statement: Statement, kind: str, active: Value) -> None:
        """Load or store words of shared memory; values that come in other ways are data."""
        if kind != "st" and kind != "ld":
            if kind in ("ldmatrix", "atom"):
                self._set(statement, self.data)
            return
        place, registers = statement.operands[:: 1 if kind == "st" else -1]
        names = [name.strip() for name in registers.strip("{} ").split(",")]
        address = self._address(place)
        if address is None or _shared_bytes(statement)[0] != 4 * len(names):
            if kind == "ld":
                self._set(statement, self.data)
            return
        lanes = np.broadcast_to(np.asarray(active, dtype=bool), self.threads)
        words = np.broadcast_to(np.asarray(address) // 4, self.threads) % len(self.memory)
        for i, name in enumerate(names):
            here = (words + i) % len(self.memory)
            if kind == "st":
                value = self._value(name)
                stored = np.broadcast_to(
                    np.asarray(UNKNOWN if value is None else value), lanes.shape
                )
                self.memory[here[lanes]] = stored[lanes]
            else:
                found = self.memory[here]
                self.values[name] = self.data if np.any(found[lanes] == UNKNOWN) else found

    def _conflicts(self, block: Block, statement: Statement, active: Value) -> None:
        place = next(operand for operand in statement.operands if "[" in operand)
        address = self._address(place)
        if address is None:
            raise ValueError(f"{statement.opcode} {place}: the address depends on data")
        every = np.broadcast_to(np.asarray(address), self.threads)
        lanes = np.broadcast_to(np.asarray(active, dtype=bool), self.threads)
        size, matrices = _shared_bytes(statement)
        for first in range(0, self.threads, 32):
            warp = every[first : first + 32]
            if matrices:  # rows of 16 bytes each, eight a cycle
                warp, taken = warp[: 8 * matrices], np.ones(8 * matrices, dtype=bool)
            else:
                taken = lanes[first : first + 32]
            share = 32 / self.threads
            block.shared += share * wavefronts(warp, taken, size)
            block.conflict_free += share * taken.sum() * max(size, 4) / 128

    def _compute(self, statement: Statement, kind: str) -> None:
        if kind == "ld":
            parameter = re.search(r"_param_(\d+)", statement.operands[1])
            known = self.arguments.get(int(parameter[1])) if parameter else None
            self._set(statement, self.data if known is None else known)
        elif kind == "mov" and "{" in "".join(statement.operands):
            self._pack(*statement.operands)
        elif kind in ("shfl", "elect", "redux"):
            self._exchange(statement, kind)
        elif kind in OPERATIONS and not _FLOATING.search(statement.opcode):
            sources = [self._value(operand) for operand in statement.operands[1:]]
            if any(source is None for source in sources):
                self._set(statement, None)
            else:
                found = OPERATIONS[kind](statement.opcode, *sources)
                self._set(statement, wrapped(statement.opcode, found))
        elif statement.operands and statement.operands[0].startswith(("%", "{")):
            self._set(statement, None)

    def _pack(self, target: str, source: str) -> None:
        """Pack registers into a wider one, or unpack it; the wider one itself is data."""
        if "{" in source:
            self.pairs[target] = [self._value(name) for name in re.findall(r"[^{}, ]+", source)]
            self.values[target] = None
        else:
            names = re.findall(r"[^{}, ]+", target)
            self.values |= zip(names, self.pairs.get(source, [None] * len(names)), strict=True)

    def _exchange(self, statement: Statement, kind: str) -> None:
        lane = np.arange(self.threads)
        if kind == "elect":
            register, _, predicate = statement.operands[0].partition("|")
            self.values[register], self.values[predicate] = 0, (lane % 32 == 0).astype(np.int64)
            return
        value, by = (self._value(operand) for operand in statement.operands[1:3])
        if kind == "redux":
            way = statement.opcode.split(".")[2]
            if value is not None:
                warps = np.broadcast_to(operands(statement.opcode, value)[0], self.threads)
                found = REDUCTIONS[way].reduce(warps.reshape(-1, 32), axis=1)
                value = np.repeat(found, 32) & 0xFFFFFFFF
            self._set(statement, value)
            return
        way = statement.opcode.split(".")[2]
        if value is None or by is None or way not in ("idx", "bfly"):
            value = None
        elif np.ndim(value):
            value = value[lane // 32 * 32 + by if way == "idx" else lane ^ by]
        self._set(statement, value)


def wavefronts(addresses: np.ndarray, active: np.ndarray, size: int) -> int:
    """Cycles of shared memory for an access of one warp: (lanes,) byte addresses of ``size`` bytes each.

    A cycle serves one word of 4 bytes of each of 32 banks, and all lanes that want it. Accesses of 8 and 16 bytes a
    lane are served by halves and quarters of a warp; by groups twice as large where lanes 2i and 2i + 1, or 4i + j and
    4i + j + 2, have the same addresses (G. Smith of NVIDIA, developer forum, "Unexpected shared memory bank conflict").
    """
    lanes = 128 // max(4, size)
    if lanes < 32 and any(_in_pairs(addresses, active, step) for step in (1, 2)):
        lanes *= 2
    total = 0
    for first in range(0, len(addresses), lanes):
        part = slice(first, first + lanes)
        words = np.unique(addresses[part][active[part], None] + np.arange(0, size, 4)) // 4
        total += int(np.bincount(np.unique(words) % 32).max()) if len(words) else 0
    return total


def _in_pairs(addresses: np.ndarray, active: np.ndarray, step: int) -> bool:
    other = np.arange(len(addresses)) ^ step
    return bool(np.all((addresses == addresses[other]) | ~active | ~active[other]))


def _shared_bytes(statement: Statement) -> tuple[int, int]:
    """Bytes per lane, and the number of matrices of ``ldmatrix`` and ``stmatrix``, 0 for others."""
    opcode = statement.opcode
    if "matrix" in opcode:
        return 16, int(re.search(r"\.x(\d)", opcode)[1])  # type: ignore[index]
    if opcode.startswith("cp."):
        return int(statement.operands[2], 0), 0
    return lane_bytes(opcode), 0


def _of_first(active: Value) -> bool:
    return bool(np.asarray(active).flat[0])
