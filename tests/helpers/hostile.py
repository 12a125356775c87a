"""Damaged inputs for every reader: mutated bytes, a full disk, and a limit on the memory of a call.

``ALIT_FUZZ_EXAMPLES`` sets the number of mutations of each kind (500 by default; ``make test-full`` takes 20,000).
"""

from __future__ import annotations

import math
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLES = int(os.environ.get("ALIT_FUZZ_EXAMPLES", "500"))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Copy of ``data`` with bytes changed, removed, doubled or inserted; extreme values of integers are likely."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] = rng.randrange(256)
            case 1 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 2:
                number = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63))
                width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
                changed[at : at + width] = (number % 256**width).to_bytes(width, order)
            case 3:
                del changed[at : at + rng.choice((1, 4, 64, len(changed)))]
            case 4:
                changed[at:at] = changed[at : at + rng.choice((1, 4, 64))]
            case _:
                changed[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
    return bytes(changed)


class Memory:
    """Memory of a block of code: ``taken``, bytes of this process at its peak above those at its beginning."""

    taken = 0


@contextmanager
def memory(most: float = math.inf, seconds: float = math.inf) -> Iterator[Memory]:
    """Context manager: measure the peak of resident memory; skips the test on systems other than Linux.

    Raises ``AssertionError`` if the block takes more than ``most`` bytes or ``seconds`` of CPU time.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("the peak of memory can only be read on Linux")

    def kilobytes(field: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1])

    measured, start = Memory(), time.process_time()
    clear.write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS:")
    yield measured
    measured.taken = max(0, kilobytes("VmHWM:") - before) * 1024
    taken = time.process_time() - start
    assert measured.taken <= most and taken <= seconds, (measured.taken, taken)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Context manager: simulate a full disk by a limit of ``size`` bytes on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
