"""Multinomial logistic regression, and its accuracy on images that it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

#: Weights of the squared norm that are tried, the strongest first.
STRENGTHS = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
#: Most iterations of L-BFGS.
ITERATIONS = 100
#: Least standard deviation by which a feature is divided, as a share of the largest.
LEAST_DEVIATION = 1e-4
#: Draws of the bootstrap.
DRAWS = 10000


class Classifier(NamedTuple):
    """Linear classifier of standardized features."""

    mean_F: Tensor
    deviation_F: Tensor
    weight_KF: Tensor
    bias_K: Tensor

    def scores(self, x_NF: Tensor) -> Tensor:
        """Logits (N, K) of features (N, F)."""
        return (x_NF - self.mean_F) / self.deviation_F @ self.weight_KF.T + self.bias_K


@torch.no_grad()
def fit(
    x_NF: Tensor, label_N: Tensor, classes: int, strengths: Sequence[float]
) -> list[Classifier]:
    """Classifiers of least mean cross-entropy plus l2 / 2 times the squared norm of the weights, for each l2.

    L-BFGS on all rows, from zero, and for further ``strengths`` from where the one before ended.
    """
    mean_F, deviation_F = x_NF.mean(0), x_NF.std(0, correction=0)
    deviation_F = deviation_F.clamp(min=max(LEAST_DEVIATION * float(deviation_F.max()), 1e-12))
    normal_NF = (x_NF - mean_F) / deviation_F
    weight_KF = x_NF.new_zeros(classes, x_NF.shape[1], requires_grad=True)
    bias_K = x_NF.new_zeros(classes, requires_grad=True)
    found = []
    for l2 in strengths:
        optimizer = torch.optim.LBFGS(
            [weight_KF, bias_K],
            max_iter=ITERATIONS,
            tolerance_grad=1e-5,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def loss(optimizer: torch.optim.LBFGS = optimizer, l2: float = l2) -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(normal_NF @ weight_KF.T + bias_K, label_N)
            value = value + l2 / 2 * weight_KF.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weights = weight_KF.detach().clone(), bias_K.detach().clone()
        found.append(Classifier(mean_F, deviation_F, *weights))
    return found


class Parts(NamedTuple):
    """Labels of all rows, and the rows of each part: ``fitting`` and ``validation`` are all that ``test`` is not."""

    label_N: Tensor
    fitting: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy of a classifier on one kind of features.

    Attributes:
        top1: share of the test images that were classified correctly.
        low, high: 95 % bootstrap interval of it, for other test images; the same where all or none were correct.
        l2: strength that the validation chose.
    """

    top1: float
    low: float
    high: float
    l2: float


def accuracy(x_NF: Tensor, parts: Parts, generator: torch.Generator) -> Accuracy:
    """Test accuracy of a fit to all other rows, with the strength of least cross-entropy on the validation rows."""
    label_N, fitting, validation, test = parts
    classes = 1 + int(label_N.max())
    tried = fit(x_NF[fitting], label_N[fitting], classes, STRENGTHS)
    errors = [float(cross_entropy(x.scores(x_NF[validation]), label_N[validation])) for x in tried]
    l2 = STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]
    known = torch.cat([fitting, validation])
    (final,) = fit(x_NF[known], label_N[known], classes, [l2])
    top1 = (final.scores(x_NF[test]).argmax(1) == label_N[test]).double().mean()
    # The number of hits among n images drawn with replacement is binomial.
    count = torch.full((DRAWS,), float(len(test)), dtype=torch.float64)
    drawn = torch.binomial(count, top1.expand(DRAWS), generator=generator) / len(test)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Accuracy(float(top1), low, high, l2)
