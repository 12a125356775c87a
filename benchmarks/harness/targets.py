"""Targets of kernels on an H100 or H200, and the values that a run on a GPU has measured for them.

Times of ops are device times, those of a model's paths are what a caller waits for. A target without a measurement is
shown as unmeasured: nothing is estimated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .runs import Row, Run

#: Names of a case's variants with compiled peers: of ops, and of training steps.
BESIDE = ("{}, beside compiled peers", "{}, compiled")
LENGTHS = tuple(range(289, 514, 32))
BEST = ("SDPA cuDNN", "SDPA flash", "torch varlen_attn", "FlexAttention", "flash-attn")
PADDED = ("SDPA cuDNN", "SDPA efficient", "SDPA flash", "SDPA math")
CAPTURED = ("ours, captured", "ours, compiled and captured")


class Target(NamedTuple):
    """One number to reach.

    Attributes:
        what: case and measure.
        bound: the largest value allowed, or the smallest if ``least``.
        unit: "us", "%" or "" (a ratio).
        measured: function of a run that returns its value; None if the run lacks the cases.
        cases: names of the cases that the value is computed from.
    """

    what: str
    bound: float
    unit: str
    least: bool
    measured: Callable[[Run], float | None]
    cases: tuple[str, ...]

    @property
    def wanted(self) -> str:
        return f"at {'least' if self.least else 'most'} {self.bound:g}{self._unit}"

    @property
    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""

    def found(self, run: Run) -> str:
        """A run's value with "met" or "missed", as text; "unmeasured" if it has none."""
        value = self.measured(run)
        if value is None:
            return "unmeasured"
        met = value >= self.bound if self.least else value <= self.bound
        return f"{value:.3g}{self._unit} ({'met' if met else 'missed'})"


Cost = Callable[[Row], float | None]


def device(row: Row) -> float | None:
    """Device time in microseconds; None if unknown."""
    return row.info.get("device_us")


def caller(row: Row) -> float | None:
    """Seconds that a caller waits; None in runs without device times."""
    return row.median if "device_us" in row.info else None


def _races(run: Run, case: str) -> list[dict[str, Row]]:
    """Contender -> row, of the case and of its variants with compiled peers, if the run has them."""
    groups = run.groups
    names = (case, *(name.format(case) for name in BESIDE))
    return [groups[name] for name in names if name in groups]


def _own(case: str) -> Callable[[Run], float | None]:
    def measured(run: Run) -> float | None:
        rows = [race["ours"] for race in _races(run, case)[:1] if "ours" in race]
        return device(rows[0]) if rows else None

    return measured


def _over(case: str, peers: Iterable[str], cost: Cost = device) -> Callable[[Run], float | None]:
    """Function of a run: our cost over that of the fastest peer, each peer compared within its own contest."""

    def measured(run: Run) -> float | None:
        ratios = []
        for race in _races(run, case):
            costs = {name: cost(row) for name, row in race.items()}
            ratios += [
                ours / theirs
                for name in peers
                if (ours := costs.get("ours")) and (theirs := costs.get(name))
            ]
        return max(ratios, default=None)

    return measured


def _speed(case: str, *peers: str, cost: Cost = device) -> Callable[[Run], float | None]:
    """Function of a run: our speed over that of the fastest peer."""
    over = _over(case, peers, cost)

    def measured(run: Run) -> float | None:
        ratio = over(run)
        return None if ratio is None else 1 / ratio

    return measured


def _backward(step: str, forward: str) -> Callable[[Run], float | None]:
    """Function of a run: time of the backward (step less forward), ours over the fastest of ``BEST``."""

    def measured(run: Run) -> float | None:
        ratios = []
        for both, first in zip(_races(run, step), _races(run, forward), strict=False):
            rest: dict[str, float] = {}
            for name in both.keys() & first.keys():
                one, other = device(both[name]), device(first[name])
                if one is not None and other is not None and one > other:
                    rest[name] = one - other
            if "ours" in rest:
                ratios += [rest["ours"] / rest[name] for name in BEST if name in rest]
        return max(ratios, default=None)

    return measured


def _utilization(case: str) -> Callable[[Run], float | None]:
    """Function of a run: rate of the best captured step in percent of the measured matrix-product rate."""

    def measured(run: Run) -> float | None:
        rows = [race[name] for race in _races(run, case) for name in CAPTURED if name in race]
        rates = [row.gigaflops for row in rows if caller(row)]
        return 100 * max(rates) / run.machine["ceilings"]["matmul_gigaflops"] if rates else None

    return measured


def targets() -> list[Target]:
    """All targets, in the order of the table's rows."""

    def most(what: str, bound: float, measured: Callable, *cases: str, unit: str = "") -> None:
        found.append(Target(what, bound, unit, False, measured, cases))

    def least(what: str, bound: float, measured: Callable, *cases: str, unit: str = "") -> None:
        found.append(Target(what, bound, unit, True, measured, cases))

    found: list[Target] = []
    large, wide = "nearest_codeword 65536 x 4096 x 12", "nearest_codeword 8192 x 1024 x 256"
    most(large, 130, _own(large), large, unit="us")
    least(f"{large}: speed over flash-kmeans'", 1.0, _speed(large, "flash-kmeans"), large)
    most(wide, 45, _own(wide), wide, unit="us")
    for size in ("8192 x 4096 x 12", "8192 x 1024 x 256"):
        case, peer = f"codebook_statistics {size}", "eager, index_add"
        most(case, 12, _own(case), case, unit="us")
        most(f"{case}: time over index_add's", 1.2, _over(case, (peer,)), case)
    for length in LENGTHS:
        forward, step = (f"attention {kind} 32 x {length}" for kind in ("forward", "step"))
        most(f"{forward}: time over the best peer's", 1.1, _over(forward, BEST), forward)
        what = f"attention backward 32 x {length}: time over the best peer's"
        most(what, 1.0, _backward(step, forward), step, forward)
    for kind in ("forward", "step"):
        case = f"attention {kind} 32 x 289 to 513"
        least(f"{case}: speed over padded SDPA's", 1.3, _speed(case, *PADDED), case)
        what = f"{case}: speed over varlen_attn's"
        least(what, 1.1, _speed(case, "torch varlen_attn"), case)
    case, peer = "attention forward float32 32 x 513", "SDPA efficient"
    least(f"{case}: speed over torch's memory-efficient kernel's", 1.0, _speed(case, peer), case)
    for op in ("pack", "unpack", "compact", "append", "tail_mask"):
        case = f"{op} 64 sequences of 289 to 513"
        most(f"{case}: time over a copy's", 1.15, _over(case, ("copy",)), case)
    case = "soft_codebook step 8192 x 1024 x 256"
    least(f"{case}: speed over eager's", 1.5, _speed(case, "eager"), case)
    case = "stage-1 step base bfloat16 batch 32"
    what = f"{case}, captured: of the matrix-product rate"
    least(what, 45, _utilization(case), case, unit="%")
    case, peer = "encode to 256 tokens", "eager baseline"
    least(f"{case}, float32: speed over eager's", 1.0, _speed(case, peer, cost=caller), case)
    return found
