"""Admission of a stream's images to the encoder, so that its rows stay within a bound."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from .model import AdaptiveModel
from .rollout import Rollout
from .sizes import check_image


class Waiting:
    """Images of a source that have not been started; at most one of them has been read."""

    def __init__(self, model: AdaptiveModel, source: Iterator[Tensor], max_rows: int) -> None:
        self.model, self.source, self.max_rows = model, source, max_rows
        self.read = 0
        self.held: tuple[Tensor, int] | None = None  # an image read, its class and image tokens

    def admit(self, live: list[Rollout]) -> list[Tensor]:
        """Take the next images: as many as fit now and at every later step, even if no image finishes early.

        Raises:
            ValueError: an image that exceeds the bound by itself.
        """
        ages: Counter[tuple[int, int]] = Counter()
        for running in live:
            ages[running.index, running.places.tokens] += running.batch_size
        fresh: list[Tensor] = []
        while (waiting := self._next()) is not None:
            image, tokens = waiting
            ages[0, tokens] += 1
            if _peak(self.model, ages) > self.max_rows:
                if not live and not fresh:
                    raise ValueError(
                        f"images[{self.read - 1}]: expected at most {self.max_rows} rows at its longest, the bound "
                        f"max_tokens_in_flight, got {tokens + self.model.config.max_tokens}"
                    )
                break
            fresh.append(image)
            self.held = None
        return fresh

    def _next(self) -> tuple[Tensor, int] | None:
        if self.held is None and (image := next(self.source, None)) is not None:
            name, like = f"images[{self.read}]", self.model.latent_tokens
            grid = check_image(self.model.config, like, image, name)
            self.held = image, 1 + math.prod(grid)
            self.read += 1
        return self.held


def _peak(model: AdaptiveModel, ages: Counter[tuple[int, int]]) -> int:
    """Largest number of encoder rows of this step or a later one; ``ages`` counts the images by the iteration that they
    run next, and their number of class and image tokens.
    """
    config = model.config

    def rows(ahead: int) -> int:
        return sum(
            count * (tokens + config.latents_per_iteration * (iteration + ahead + 1))
            for (iteration, tokens), count in ages.items()
            if iteration + ahead < config.iterations
        )

    return max(rows(ahead) for ahead in range(config.iterations))
