"""Verifies that what comes from an example's prediction reaches its own rows of layers only."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.computers.per_example import DependentError
from curvlinops.computers.positions import widened
from curvlinops.computers.usages import Usage

_GOLDEN = (5**0.5 - 1) / 2


class Independence:
    r"""Finds examples that depend on each other, by one more back-propagation for a batch.

    Loss vectors :math:`v_k` are back-propagated one by one. Then comes
    :math:`c \odot \sum_k w_k v_k`, in which each example n has a factor :math:`c_n` of its own.
    Gradients are linear in the vectors: where the rows of example n depend on its own prediction
    only, they are :math:`c_n` times what the vectors gave, weighted by :math:`w_k`. What came from
    the prediction of another example m would be multiplied by :math:`c_m` instead.

    So the derivatives that are used are those that are verified. Of the gradients, only their
    products with an irregular direction are kept: one number for each example and call of a layer.

    Args:
        n: The number of examples.
        tolerance: The relative tolerance for these products.
    """

    def __init__(self, n: int, tolerance: float) -> None:
        self._n = n
        self._tolerance = tolerance
        self._count = 0
        self._vector: Tensor | None = None  # Σ_k w_k v_k [m, C]
        self._expected: dict[tuple[Usage, int], Tensor] = {}  # [n] for each call
        self._actual: dict[tuple[Usage, int], Tensor] = {}
        self._norms: dict[tuple[Usage, int], Tensor] = {}
        self._directions: dict[tuple[int, int], Tensor] = {}  # [S, d_out]
        self.at_last = False

    def add(self, vector: Tensor) -> None:
        """The next vector that is back-propagated is ``[m, C]``, an example's terms in a row."""
        self._count += 1
        new = self._weight * widened(vector)
        self._vector = new if self._vector is None else self._vector + new

    def last_vector(self) -> Tensor:
        """Return the vector ``[m, C]`` to back-propagate at last."""
        assert self._vector is not None
        self.at_last = True
        terms = self._vector.unflatten(0, (self._n, -1))  # [n, R, C]
        return (terms * self._factors(terms).reshape(-1, 1, 1)).flatten(0, 1)

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Take the gradients ``[1, n, S, d_out]`` at a layer's output."""
        rows = widened(gradient[0])
        if self.at_last:
            self._actual[usage, index] = self._products(rows)
            self._norms[usage, index] = torch.linalg.vector_norm(rows, dim=(1, 2))
            return
        new = self._weight * self._products(rows)
        before = self._expected.get((usage, index))
        self._expected[usage, index] = new if before is None else before + new

    def verify(self) -> None:
        """Raise :class:`DependentError` if examples depend on each other."""
        # There is nothing but rounding errors where a layer does not matter.
        absolute = self._tolerance**1.5 * sum(float(norms.norm()) for norms in self._norms.values())
        for call, actual in self._actual.items():
            expected = torch.zeros_like(actual)
            if call in self._expected:
                expected = self._factors(actual) * self._expected[call]
            norms = self._norms[call]
            limits = self._tolerance * (norms + 0.1 * norms.mean()) + absolute
            same = (actual - expected).abs() <= limits
            if not bool((same | ~(actual.isfinite() | expected.isfinite())).all()):
                raise DependentError(
                    f"the gradient at the output of {call[0].label.lower()} for an example depends "
                    "on the others in its batch"
                )

    @property
    def _weight(self) -> float:
        """The factor of the present vector, between a half and 3/2."""
        return 0.5 + (2**0.5 * self._count) % 1

    def _factors(self, like: Tensor) -> Tensor:
        """Return the examples' factors: any two differ, those of neighbours a lot."""
        numbers = torch.arange(1, self._n + 1, device=like.device, dtype=torch.float32)
        return (0.5 + (_GOLDEN * numbers) % 1).to(like.dtype)

    def _products(self, g: Tensor) -> Tensor:
        """Return the product of each example's rows ``[n, S, d]`` with an irregular direction."""
        _, S, d = g.shape
        if (S, d) not in self._directions:
            numbers = torch.arange(S * d, device=g.device, dtype=torch.float32)
            self._directions[S, d] = numbers.square().cos().reshape(S, d)
        direction = self._directions[S, d].to(g.dtype)
        if g.stride(-1) != 1:  # pixels of a convolution are stored by channels
            g, direction = g.mT, direction.mT
        return g.flatten(1) @ direction.flatten()


__all__ = ["Independence"]
