"""Loss and gradients of a batch as one CUDA graph: the host launches all kernels of a step at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

Terms = dict[str, Tensor]


class GradientGraph:
    """Forward and backward, captured once and replayed for every batch of the same shape.

    Capturing takes two runs before it, on a stream of their own. What they do to the module (moving averages of a
    codebook) and to the random generators is undone: a step is the same, bit for bit, whether it captures or not.

    Args:
        module: whose parameters get the gradients.
        work: forward and backward of (B, 3, height, width); the terms of the loss by name. It must launch the same
            kernels whatever the values are, and wait for none of them.
        images: a batch of the shape of those to come.
    """

    def __init__(self, module: nn.Module, work: Callable[[Tensor], Terms], images: Tensor) -> None:
        self._images = images.clone()
        for parameter in module.parameters():
            parameter.grad = None
        # Streams and captures are those of the current device.
        own = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
        with own, _unchanged(module, images.device):
            _warm_up(lambda: work(self._images))
            found = [(p, p.grad) for p in module.parameters()]
            #: Added to in place by every replay; a parameter that gets no gradient has none here either.
            self._gradients = [(p, gradient) for p, gradient in found if gradient is not None]
            self._terms, self._replay = _capture(lambda: work(self._images))

    def zero_gradients(self) -> None:
        """Give the parameters the graph's gradients, all 0."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        torch._foreach_zero_([gradient for _, gradient in self._gradients])

    def __call__(self, images: Tensor) -> Terms:
        """Add a batch's gradients and return the terms of its loss, which the next call overwrites.

        Raises:
            ValueError: images of another shape than the captured ones.
        """
        if images.shape != self._images.shape:
            expected, found = tuple(self._images.shape), tuple(images.shape)
            raise ValueError(f"images: expected the captured shape {expected}, got {found}")
        self._images.copy_(images)
        self._replay()
        return self._terms


def _warm_up(work: Callable[[], Terms]) -> None:
    """Run ``work`` twice on a stream of its own: what libraries do at their first calls must not be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def _capture(work: Callable[[], Terms]) -> tuple[Terms, Callable[[], None]]:
    """Capture ``work`` as a CUDA graph; returns its terms, and a function that replays it in the same memory."""
    torch.clear_autocast_cache()  # an enclosing autocast's: weights are cast anew in every replay
    # A stream of the current device: torch's default one for captures is of the device that captured first. The outer
    # context leaves it even where the capture cannot be ended.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    # Other threads, such as those that pin images, go on with what is forbidden to the capture.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        terms = work()
    torch.clear_autocast_cache()
    return terms, graph.replay


@contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: parameters, buffers and generators are restored at its end; gradients dropped after an error."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [x.detach().to("cpu", copy=True) for x in tensors]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    except BaseException:
        for parameter in module.parameters():
            parameter.grad = None
        raise
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
