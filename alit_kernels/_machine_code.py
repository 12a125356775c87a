"""Reader of a compiled kernel's machine code: instructions, the hot loop and its cycles, occupancy, faults.

Reads the text that ``cuobjdump -sass`` prints and the PTX that Triton keeps. Needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _ptx, _ptx_machine
from ._chips import LIMITS, occupancy

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.M
)
_MATRIX = re.compile(r"(HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")
#: Names under which :func:`counts` counts these.
MATRIX = ("mma", "wgmma", "tcgen05")
_FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "IMAD")
_MEMORY = ("LD", "ST", "ATOM", "RED", "UBLK", "UTMA")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS")


@dataclass(frozen=True)
class Expected:
    """Requirements on the machine code of a kernel.

    Attributes:
        tensor_core: the kernel declares a tensor-core product: matrix instructions must appear.
        wgmma: on sm_90 that product must be ``wgmma`` (tiles of at least 64 rows and 4 warps).
        wide: pointer arguments whose base and row pitch are divisible: every access must be of 16 bytes.
    """

    tensor_core: bool = False
    wgmma: bool = False
    wide: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Facts read from the machine code of one build; registers and stack bytes of a thread, shared bytes of a block.

    Attributes:
        hash: 16 hexadecimal digits, of all that decides the rest.
        hot_loop_cycles: scheduler cycles of each unit, for one warp and one iteration of the hot loop (``cycles``).
        other_cycles: the same for all other code, run once.
        conflicts: cycles of shared memory in the hot loop, over those without bank conflicts.
        unrolled: iterations of the kernel's own loop in one iteration of the machine code's.
    """

    kernel: str
    label: str
    arch: int
    hash: str
    registers: int
    stack: int
    shared: int
    occupancy: float
    instructions: dict[str, int]
    hot_loop_cycles: dict[str, int]
    conflicts: float
    unrolled: int
    faults: list[str]
    other_cycles: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.kernel} [{self.label}] sm_{self.arch}"

    @property
    def bound(self) -> str:
        """The busiest unit of the hot loop."""
        return max(self.hot_loop_cycles, key=lambda unit: self.hot_loop_cycles[unit])

    @property
    def turn_cycles(self) -> float:
        """Cycles of the busiest unit, for one warp and one iteration of the kernel's own loop."""
        return self.hot_loop_cycles[self.bound] / self.unrolled


def read(
    found: Any, types: Mapping[str, str], expected: Expected, *, arch: int, **about: Any
) -> Result:
    """Result of a kernel that Triton compiled for ``arch``; ``types``: the signature of its ``_builds.Build``."""
    registers, stack, sass = disassemble(found.asm["cubin"])
    code, meta = instructions(sass), found.metadata
    blocks = _ptx.parse(found.asm["ptx"])
    _ptx_machine.walk(blocks, 32 * meta.num_warps)
    turn = hot_loop(code)
    kernel_turn = _ptx.hot_loop(blocks)
    conflicts = _ptx.conflicts(kernel_turn)
    within = {id(block) for block in kernel_turn}
    rest = [block for block in blocks if id(block) not in within]
    addresses = {instruction.address for instruction in turn}
    other = [instruction for instruction in code if instruction.address not in addresses]
    arguments = {name: kind for name, kind in types.items() if kind != "constexpr"}
    pointers = [name if kind.startswith("*") else "" for name, kind in arguments.items()]
    widths = _ptx.access_widths(found.asm["ptx"], pointers)
    columns = getattr(meta, "tmem_size", None) or 0
    resident = occupancy(arch, meta.num_warps, registers, meta.shared, columns)
    return Result(
        **about,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=meta.shared,
        occupancy=resident,
        instructions=counts(code),
        hot_loop_cycles=cycles(turn, arch, conflicts),
        other_cycles=cycles(other, arch, _ptx.conflicts(rest)),
        conflicts=round(conflicts, 2),
        unrolled=unrolled(turn, kernel_turn),
        faults=faults(counts(code), stack, meta.shared, widths, arch, expected, resident),
    )


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers and stack bytes of a thread, and the listing, by the cuobjdump that ships inside Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    values = dict(part.split(":") for part in usage.stdout.split() if part.count(":") == 1)
    return int(values["REG"]), int(values["STACK"]), sass.stdout


def faults(
    count: Mapping[str, int],
    stack: int,
    shared: int,
    widths: Mapping[str, set[int]],
    arch: int,
    expected: Expected,
    resident: float = 1.0,
) -> list[str]:
    """Faults that ``python -m alit_kernels.aot --check`` forbids, as messages; ``resident`` is the occupancy."""
    found = []
    if stack or count.get("local"):
        found.append(f"spills: {stack} bytes of stack, {count.get('local', 0)} accesses")
    limit = LIMITS[arch].shared_block
    if shared > limit:
        found.append(f"shared memory: {shared} bytes, at most {limit}")
    if not resident:  # too much tensor memory, say: the compiled code is then empty
        found.append("does not fit on a multiprocessor")
    if expected.tensor_core and not any(count.get(name) for name in MATRIX):
        found.append("no tensor-core instruction")
    if expected.wgmma and arch == 90 and not count.get("wgmma"):
        found.append("no wgmma")
    for name in expected.wide:
        narrow = sorted(size for size in widths.get(name, ()) if size != 16)
        if narrow:
            found.append(f"{name}: accesses of {narrow} bytes, expected 16")
    return found


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a listing, without padding."""
    found = (Instruction(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(sass))
    return [instruction for instruction in found if instruction.opcode != "NOP"]


def counts(code: list[Instruction]) -> dict[str, int]:
    """Number of instructions of each kind: matrix, exponential, global and local memory by width, and all."""
    result: Counter[str] = Counter(all=len(code))
    for opcode in (instruction.opcode for instruction in code):
        name = opcode.partition(".")[0]
        if _MATRIX.match(opcode):
            family = "tcgen05" if name.startswith("UTC") else "wgmma" if "GMMA" in name else "mma"
            result[family] += 1
        elif opcode.startswith("MUFU.EX2"):
            result["exp2"] += 1
        elif name in ("LDG", "STG"):
            result[f"{name.lower()}{8 * width(opcode)}"] += 1
        elif name == "LDGSTS":
            result["ldgsts"] += 1
        elif name in ("LDL", "STL"):
            result["local"] += 1
    return dict(sorted(result.items()))


def width(opcode: str) -> int:
    """Bytes per lane of a memory instruction."""
    for part in opcode.split(".")[1:]:
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
        if part in ("64", "128", "256"):
            return int(part) // 8
    return 4


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """Instructions of the hot loop: the first innermost loop with at least half the instructions of the longest.

    The first, because slow paths come later in the code. Code without a loop is its own hot loop.
    """
    ends: dict[int, int] = {}  # head of a loop -> the last branch back to it
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        if instruction.opcode.startswith("BRA") and target:
            start = int(target[1], 16)
            if start < instruction.address:
                ends[start] = instruction.address
    inner = _ptx.innermost(ends)
    if not inner:
        return code
    longest = max(b - a for a, b in inner)
    start, end = min(span for span in inner if 2 * (span[1] - span[0]) >= longest)
    return [instruction for instruction in code if start <= instruction.address <= end]


def cycles(code: list[Instruction], arch: int, conflicts: float = 1.0) -> dict[str, int]:
    """Scheduler cycles of each unit, for these instructions of one warp.

    An estimate from issue slots: each instruction takes 1 cycle to issue; float32 1 (sm_80: 2); integer, compare and
    select 2; MUFU 8; loads and stores, global and shared, 4 for each 4 bytes a lane moves, those of shared memory times
    ``conflicts``; matrix instructions their multiply-adds over the tensor core's rate (half for TF32). tcgen05 and bulk
    copies run beside the warps: not counted.
    """
    total: Counter[str] = Counter(issue=len(code))
    for opcode in (instruction.opcode for instruction in code):
        name = opcode.partition(".")[0]
        if _MATRIX.match(opcode):
            total["matrix"] += _matrix_cycles(opcode, arch)
        elif name == "MUFU":
            total["special"] += 8
        elif name.startswith(_MEMORY) and not name.startswith(("UTMA", "UBLK")):
            moved = 16 if name in ("LDSM", "STSM", "LDGSTS") else max(4, width(opcode))
            total["memory"] += round(moved * (conflicts if name in _SHARED else 1))
        elif name in _FMA:
            total["fma"] += LIMITS[arch].fma
        elif not name.startswith(("U", "B", "WARP", "CS2R", "S2", "EXIT", "DEPBAR")):
            total["alu"] += 2
    return dict(total)


def unrolled(turn: list[Instruction], kernel_turn: list[_ptx.Block]) -> int:
    """Iterations of the kernel's loop in one of the machine code's, by the first kind of instruction in both."""
    opcodes = [statement.opcode for block in kernel_turn for statement in block.statements]
    machine = [instruction.opcode for instruction in turn]
    kinds = (
        (re.compile(r"MUFU\.EX2"), re.compile(r"ex2")),
        (_MATRIX, re.compile(r"(wg)?mma|tcgen05\.mma")),
        (re.compile(r"LDG|LDGSTS"), re.compile(r"ld\.global|cp\.async\.c[ag]")),
        (re.compile(r"LDS"), re.compile(r"ld\.shared")),
        (re.compile(r""), re.compile(r"")),
    )
    for here, there in kinds:
        count, own = (
            sum(1 for x in z if y.match(x)) for y, z in ((here, machine), (there, opcodes))
        )
        if count and own:
            return max(1, round(count / own))
    return 1


def _matrix_cycles(opcode: str, arch: int) -> int:
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)  # a warp group: four schedulers share it
    work = int(shape[1]) * int(shape[2]) * int(shape[3]) // 4 if shape else 0
    small = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "16832": 16 * 8 * 32}
    for part in opcode.split("."):
        work = small.get(part, work)
    rate = LIMITS[arch].matrix // (2 if "TF32" in opcode else 1)
    return -(-work // rate)
