"""One process or many: torchrun's environment, data-parallel wrappers."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import inspect
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from ..devices import choose


@dataclass(frozen=True)
class Processes:
    """This process: its device and rank, and the number of processes."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        self.any(False)

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is true in any process; reduced on the CPU, so that no device is waited for."""
        if self.count == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Mean of each value over the processes, which have the same names."""
        found = self.gather(values)
        return {name: sum(x[name] for x in found) / self.count for name in values}

    def broadcast(self, value: Any) -> Any:
        """Value of the first process."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes, by rank, sent as JSON; on the CPU."""
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        own = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = [torch.zeros_like(own) for _ in sizes]
        dist.all_gather(texts, own)
        return [
            json.loads(bytes(x[: int(size)].tolist())) for x, size in zip(texts, sizes, strict=True)
        ]


#: Options of glibc's mallopt, by their numbers in malloc.h.
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD, MALLOC_MMAP_MAX = -1, -3, -4
#: Numbers the groups that this process has been in.
_groups = itertools.count()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Context manager: the processes that torchrun started (the process group ends with it), or this one alone.

    Within the block the device is the current one.

    Raises:
        ValueError: a device that is not there.
    """
    grouped = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0) if grouped else 0}"
    own = choose(device)
    with torch.cuda.device(own) if own.type == "cuda" else nullcontext():
        if not grouped or dist.is_initialized():
            count = dist.get_world_size() if dist.is_initialized() else 1
            yield Processes(own, dist.get_rank() if dist.is_initialized() else 0, count)
            return
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        store, rank, count = next(dist.rendezvous("env://"))
        # What an earlier group of these workers left in the store must not be found again, nor, since torchrun keeps
        # the store on one machine, what workers left there before they were restarted.
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else ""
        store = dist.PrefixStore(f"{restart}.{next(_groups)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        try:
            yield Processes(own, dist.get_rank(), dist.get_world_size())
        finally:
            leave_group()


def keep_memory(keep: bool = True) -> None:
    """Make glibc's heap keep freed memory from now on, or no longer, and give it back; no effect in other C libraries.

    A step on a CPU frees gigabytes that the next one wants again. Given back to the system, every page of them would be
    cleared and mapped anew.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(MALLOC_MMAP_MAX, 0 if keep else 65536)  # the default
        # What glibc's thresholds become in a process that frees large blocks, unless they are set.
        library.mallopt(MALLOC_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(MALLOC_TRIM_THRESHOLD, -1 if keep else 64 << 20)
        if not keep:
            library.malloc_trim(0)


def leave_group() -> None:
    """Destroy the process group; abort the process after 60 s if it hangs: torchrun then starts it again.

    Gloo's threads need the interpreter's lock to drop their last work, and destroying the group holds it while waiting
    for them. So they get a moment first, and a watchdog that needs no lock ends what hangs all the same.
    """
    gc.collect()  # a data-parallel wrapper in a cycle holds the group too
    time.sleep(0.5)
    faulthandler.dump_traceback_later(60, exit=True, file=2)
    try:
        dist.destroy_process_group()
    finally:
        faulthandler.cancel_dump_traceback_later()


def distributed(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    own: Processes,
    parallel: str,
    *,
    all_used: bool = False,
) -> nn.Module:
    """Wrap ``module`` so that its gradients are means over the processes; itself where there is one.

    Args:
        blocks: its parts that FSDP2 gathers one at a time.
        parallel: "ddp" or "fsdp"; FSDP2 shards in place what needs a gradient, and copies the rest.
        all_used: every parameter gets a gradient in every step.
    """
    if parallel == "fsdp":
        kept: set[Parameter] = {p for p in module.parameters() if not p.requires_grad}
        for part in (*blocks, module):
            fully_shard(part, ignored_params=kept)
        return module
    if own.count == 1:
        return module
    # Buffers are the quantizer's, which sums its own statistics; torch 2.13 renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # A rollout that is cut short leaves parameters without a gradient, in every process the same ones.
    return DistributedDataParallel(
        module,
        device_ids=[own.device] if own.device.type == "cuda" else None,
        find_unused_parameters=not all_used,
        gradient_as_bucket_view=True,
        **buffers,
    )


def synchronized(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context manager for forward and backward: gradients are exchanged only at the last accumulated part."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Full tensor of a sharded one, gathered (a collective: every process calls it); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
