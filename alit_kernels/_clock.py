"""Times of calls, taken in turns: by the device's clock where there is a GPU, else by the host's.

Benchmarks and the script that tunes launch configurations share this clock. Calls that are compared get clocks of one
kind (:func:`clocks`), so that a ratio never mixes two kinds.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

_log = logging.getLogger(__name__)
Name = TypeVar("Name")
Call = Callable[[], Any]


class Clock(NamedTuple):
    """Clock of one call.

    Attributes:
        kind: "host": the host's clock. By the device's clock, with a cold L2: "graph": replays of a CUDA graph of the
            call, less those of a graph of the writes that empty the L2; "kernels": the sum of what kernels, fills and
            copies took, by torch's profiler; "events": between two events, where the host's launches count if they take
            longer than the kernels.
        seconds: makes the call and returns its time.
    """

    kind: str
    seconds: Callable[[], float]


def clocks(
    calls: Mapping[Name, Call], seen: Callable[[Name, Any], Any] = lambda name, result: None
) -> dict[Name, Clock]:
    """Clocks, by name, of calls that are compared, all of one kind; on a GPU each call is made a few times first.

    Calls are captured into CUDA graphs. Where one waits for the device, or cannot be captured, all are timed by their
    kernels. Where all take ``LONG`` seconds or more they are timed between events, since a model's step is what its
    user waits for.

    Args:
        seen: gets name and result of each timed call, outside the timed span; for a CUDA graph the tensors of its last
            call, which every replay overwrites. None in place of a result: release the one before.
    """
    told = {name: functools.partial(seen, name) for name in calls}
    if not torch.cuda.is_available():
        return {
            name: Clock("host", functools.partial(_host_seconds, call, told[name]))
            for name, call in calls.items()
        }
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    between = {
        name: functools.partial(_flushed_between_events, call, told[name], flush)
        for name, call in calls.items()
    }
    least: dict[Name, float] = {}
    for name, call in calls.items():
        call()
        least[name] = min(between[name]() for _ in range(3))
    if min(least.values(), default=0.0) >= LONG:
        return {name: Clock("events", seconds) for name, seconds in between.items()}
    if not any(map(_waits, calls.values())):
        try:
            return {
                name: _graph_clock(call, told[name], flush, least[name])
                for name, call in calls.items()
            }
        except RuntimeError as error:
            _log.warning("not captured, timed by kernels: %s", error)
    try:
        for call in calls.values():
            kernels(call)
    except RuntimeError as error:
        _log.warning("timed with their launches: %s", error)
        return {name: Clock("events", seconds) for name, seconds in between.items()}
    return {
        name: Clock("kernels", functools.partial(_kernel_seconds, call, told[name], flush))
        for name, call in calls.items()
    }


def clock(call: Call, seen: Callable[[Any], Any] = lambda result: None) -> Clock:
    """Clock of a single call, which is compared with no other."""
    return clocks({"": call}, lambda _, result: seen(result))[""]


#: Minimum number of rounds, whatever the time limit.
FEWEST = 3


def samples_in_turns(
    clocks: Mapping[Name, Clock], *, rounds: int, warmup: int = 1, limit: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of each contender in every round, by name; all run in turns, so that drift hits all alike.

    After ``limit`` seconds no round but the first ``FEWEST`` starts.
    """
    end = time.monotonic() + limit
    times: dict[Name, list[float]] = {name: [] for name in clocks}
    for turn in range(warmup + rounds):
        if turn >= warmup + FEWEST and time.monotonic() > end:
            break
        for name, own in clocks.items():
            elapsed = own.seconds()
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def spread(times: Sequence[float]) -> float:
    """Interquartile range of the times of a contender's turns; infinite where there are fewer than two."""
    if len(times) < 2:
        return math.inf
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return third - first


def kernels(call: Call) -> list[float]:
    """Seconds of every kernel, fill and copy that a call runs on the device, by torch's profiler.

    Raises:
        RuntimeError: the profiler saw none.
    """
    # CUPTI makes later calls slower while it is attached; detaching it made CUDA graphs crash before CUDA 12.6.
    version = [int(part) for part in (torch.version.cuda or "0").split(".")]
    os.environ.setdefault("TEARDOWN_CUPTI", "1" if version >= [12, 6] else "0")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    found = [
        event.duration_ns() / 1e9
        for event in profile.profiler.kineto_results.events()
        # Named ranges appear among the device's events too.
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    if not found:
        raise RuntimeError("torch's profiler saw no kernel")
    return found


#: Number of calls whose median is the host's time, and seconds after which no further call starts.
HOST_CALLS, HOST_SECONDS = 100, 1.0


def host_seconds(call: Call) -> float:
    """Median seconds until a call returns, without waiting for what it has launched.

    Each call starts on an idle device, so that no launch waits for a place in its queue. A call that itself
    waits for the device has that wait in its time.
    """
    times: list[float] = []
    end = time.monotonic() + HOST_SECONDS
    while len(times) < HOST_CALLS and (len(times) < FEWEST or time.monotonic() < end):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        del result
    torch.cuda.synchronize()
    return statistics.median(times)


#: Seconds of pause, in which the threads of the previous contender, which wait by spinning, go to sleep.
PAUSE = 0.02
#: Waking a contender's threads may take milliseconds: a call shorter than this many seconds is called again, and timed
#: then, when they are awake as in the middle of a model.
SHORT_ON_HOST = 0.2


def _host_seconds(call: Call, seen: Callable[[Any], Any]) -> float:
    time.sleep(PAUSE)
    seconds = _elapsed(call, seen)
    return _elapsed(call, seen) if seconds < SHORT_ON_HOST else seconds


def _elapsed(call: Call, seen: Callable[[Any], Any]) -> float:
    seen(None)  # what the call before returned is freed outside the time
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    seen(result)
    return seconds


#: Calls that take at least this many seconds are those of a model: timed between events, not captured.
LONG = 5e-3
#: Most calls in one CUDA graph, and the most seconds that they fill where there is more than one.
REPLAYS, GRAPH_SECONDS = 20, 0.02
#: Bytes that push everything else out of any L2 when they are written.
FLUSH = 2**28


def _graph_clock(
    call: Call, seen: Callable[[Any], Any], flush: torch.Tensor, seconds: float
) -> Clock:
    """Clock by replays of a CUDA graph of several calls; ``seconds``: about the time of one call."""
    count = max(1, min(REPLAYS, round(GRAPH_SECONDS / max(seconds, 1e-9))))

    def flushed() -> Any:
        flush.zero_()
        return call()

    writes, both = _captured(flush.zero_, count), _captured(flushed, count, seen)
    return Clock("graph", lambda: max(_between_events(both) - _between_events(writes), 0.0) / count)


def _waits(call: Call) -> bool:
    """True if a call makes the host wait for the device. Its capture would fail, and leave torch's allocator and random
    generator in the state of a capture.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        _log.warning("timed by kernels: %s", error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(
    call: Call, count: int, seen: Callable[[Any], Any] = lambda result: None
) -> Callable[[], None]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    # The outer context leaves the stream even where a capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            result = call()
    seen(result)
    graph.replay()
    return graph.replay


def _flushed_between_events(call: Call, seen: Callable[[Any], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    return _between_events(call, seen)


def _between_events(call: Call, seen: Callable[[Any], Any] = lambda result: None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seen(None)
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    seen(result)
    return start.elapsed_time(end) / 1e3


def _kernel_seconds(call: Call, seen: Callable[[Any], Any], flush: torch.Tensor) -> float:
    results: list[Any] = []
    seen(None)
    flush.zero_()
    seconds = sum(kernels(lambda: results.append(call())))
    seen(results.pop())
    return seconds
