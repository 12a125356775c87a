"""What the machine code of one compiled kernel says: instructions, the hot loop, access widths, occupancy, faults.

Reads the text that ``cuobjdump -sass`` prints and the PTX that Triton keeps. Needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.M
)
_MATRIX = re.compile(r"(HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")
#: Their counts.
MATRIX = ("mma", "wgmma", "tcgen05")
_FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "IMAD")
_MEMORY = ("LD", "ST", "ATOM", "RED", "UBLK", "UTMA")


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor offers; CUDA C++ programming guide, technical specifications per compute capability.

    ``fma`` is the number of scheduler cycles of a float32 warp instruction, ``matrix`` the 16-bit multiply-adds of a
    scheduler's tensor core per cycle.
    """

    shared: int
    shared_block: int
    fma: int
    matrix: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_columns: int = 512


LIMITS = {
    80: Limits(164 << 10, 163 << 10, fma=2, matrix=256),
    90: Limits(228 << 10, 227 << 10, fma=1, matrix=512),
    100: Limits(228 << 10, 227 << 10, fma=1, matrix=1024),
}


@dataclass(frozen=True)
class Expected:
    """What the machine code of a kernel is held against.

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
    """What the machine code of one build says: of a thread registers and bytes of stack, of a block shared memory.

    ``hash`` is that of all that decides the rest; ``sizes`` are the kernel's constants by name.
    """

    kernel: str
    label: str
    arch: int
    sizes: dict[str, Any]
    hash: str
    registers: int
    stack: int
    shared: int
    occupancy: float
    instructions: dict[str, int]
    bound: str
    hot_loop_cycles: dict[str, int]
    faults: list[str]

    @property
    def key(self) -> str:
        return f"{self.kernel} [{self.label}] sm_{self.arch}"


def read(
    found: Any, types: Mapping[str, str], expected: Expected, *, arch: int, **about: Any
) -> Result:
    """Of what Triton compiled for an architecture; ``types`` is the signature of a ``_builds.Build``."""
    registers, stack, sass = disassemble(found.asm["cubin"])
    code, meta = instructions(sass), found.metadata
    bound, cycles = predicted_bound(hot_loop(code), arch)
    arguments = {name: kind for name, kind in types.items() if kind != "constexpr"}
    pointers = [name if kind.startswith("*") else "" for name, kind in arguments.items()]
    widths = access_widths(found.asm["ptx"], pointers)
    columns = getattr(meta, "tmem_size", None) or 0
    return Result(
        **about,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=meta.shared,
        occupancy=occupancy(arch, meta.num_warps, registers, meta.shared, columns),
        instructions=counts(code),
        bound=bound,
        hot_loop_cycles=cycles,
        faults=faults(counts(code), stack, meta.shared, widths, arch, expected),
    )


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and listing, from the cuobjdump that ships inside Triton."""
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
) -> list[str]:
    """What ``python -m alit_kernels.aot --check`` forbids."""
    found = []
    if stack or count.get("local"):
        found.append(f"spills: {stack} bytes of stack, {count.get('local', 0)} accesses")
    limit = LIMITS[arch].shared_block
    if shared > limit:
        found.append(f"shared memory: {shared} bytes, at most {limit}")
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


def occupancy(arch: int, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> float:
    """Resident warps over the most an SM can hold: the theoretical occupancy of the occupancy calculator."""
    limits = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // per_warp // warps,
        limits.shared // (shared + 1024),  # the system keeps 1 KiB per block
        limits.tensor_columns // tensor_columns if tensor_columns else limits.blocks,
    )
    return blocks * warps / limits.warps


def counts(code: list[Instruction]) -> dict[str, int]:
    """Instructions by what they cost: matrix, exponential, global and local memory by width, and all."""
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
    """The loop that counts: of the innermost loops with at least half the instructions of the longest, the first.

    The first, because slow paths come later in the code. Code without a loop is its own hot loop.
    """
    spans = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        if instruction.opcode.startswith("BRA") and target:
            start = int(target[1], 16)
            if start < instruction.address:
                spans.append((start, instruction.address))
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    if not inner:
        return code
    longest = max(b - a for a, b in inner)
    start, end = min(span for span in inner if 2 * (span[1] - span[0]) >= longest)
    return [instruction for instruction in code if start <= instruction.address <= end]


def predicted_bound(code: list[Instruction], arch: int) -> tuple[str, dict[str, int]]:
    """The busiest unit in one turn of the hot loop, and the scheduler cycles of each.

    An estimate from issue slots, one warp on one scheduler: each instruction takes 1 cycle to issue; float32 1 (sm_80:
    2); integer, compare and select 2; MUFU 8; loads and stores, global and shared, 4 for each 4 bytes a lane moves (as
    if every lane had an address of its own); matrix instructions their multiply-adds over the tensor core's rate (half
    for TF32). tcgen05 and bulk copies run beside the warps: not counted.
    """
    cycles: Counter[str] = Counter(issue=len(code))
    for opcode in (instruction.opcode for instruction in code):
        name = opcode.partition(".")[0]
        if _MATRIX.match(opcode):
            cycles["matrix"] += _matrix_cycles(opcode, arch)
        elif name == "MUFU":
            cycles["special"] += 8
        elif name.startswith(_MEMORY) and not name.startswith(("UTMA", "UBLK")):
            cycles["memory"] += 16 if name in ("LDSM", "STSM", "LDGSTS") else max(4, width(opcode))
        elif name in _FMA:
            cycles["fma"] += LIMITS[arch].fma
        elif not name.startswith(("U", "B", "WARP", "CS2R", "S2", "EXIT", "DEPBAR")):
            cycles["alu"] += 2
    return max(cycles, key=lambda unit: cycles[unit]), dict(cycles)


def _matrix_cycles(opcode: str, arch: int) -> int:
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)  # of a warp group: four schedulers share it
    work = int(shape[1]) * int(shape[2]) * int(shape[3]) // 4 if shape else 0
    small = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "16832": 16 * 8 * 32}
    for part in opcode.split("."):
        work = small.get(part, work)
    rate = LIMITS[arch].matrix // (2 if "TF32" in opcode else 1)
    return -(-work // rate)


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
            # The last address is the global one; what a load brings is not an address computed from its own.
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
    bits = int(re.findall(r"\.[bfus](\d+)", opcode)[-1])
    lanes = re.search(r"\.v(\d)", opcode)
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
