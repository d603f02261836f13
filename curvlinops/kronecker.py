"""Kronecker products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops._algebra import IdentityLinearOperator
from curvlinops._damping import Damping
from curvlinops._formats import Columns
from curvlinops._operator import (
    PyTorchLinearOperator,
    check_replacement,
    check_same,
    check_strategy,
)
from curvlinops._rules import batched, rule
from curvlinops._saving import saveable
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator

Factor = Tensor | PyTorchLinearOperator


@saveable
class KroneckerProductLinearOperator(PyTorchLinearOperator):
    """The Kronecker product of matrices, ``S₁ ⊗ S₂ ⊗ …``, on flat vectors.

    The product is never formed: factors are applied to the axes of the reshaped vector one after
    the other, those first that shrink it most. The operator is a sequence of its factors: it can
    be iterated, indexed, measured with ``len``, and factors can be replaced by others of the same
    shape, dtype and device.

    Args:
        *factors: Tensors ``[m_i, n_i]``, real or complex, or diagonal or identity operators.

    Raises:
        ValueError: If there is no factor, one is not a matrix, or they differ in dtype or device.

    Example:
        >>> import torch
        >>> from curvlinops import KroneckerProductLinearOperator
        >>> A, B = torch.rand(2, 2), torch.rand(3, 3)
        >>> K = KroneckerProductLinearOperator(A, B)
        >>> torch.allclose(K @ torch.eye(6), torch.kron(A, B))
        True
        >>> torch.allclose(K.trace(), A.trace() * B.trace())
        True
    """

    def __init__(self, *factors: Factor):
        if not factors:
            raise ValueError("A Kronecker product needs at least one factor, got none.")
        operators = [_as_operator(factor) for factor in factors]
        for op in operators[1:]:
            check_same("a Kronecker product", operators[0], op)
        rows, columns = (prod([op.shape[axis] for op in operators]) for axis in (0, 1))
        super().__init__([(columns,)], [(rows,)])
        self._factors = list(factors)

    def _state(self) -> dict[str, Any]:
        return {"factors": self._factors}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> KroneckerProductLinearOperator:
        return cls(*state["factors"])

    # ---- a sequence of factors ----------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._factors)

    def __iter__(self) -> Iterator[Factor]:
        return iter(self._factors)

    def __getitem__(self, index: Any) -> Any:
        return self._factors[index]

    def __setitem__(self, index: int, factor: Factor) -> None:
        """Replace a factor by another one of the same shape, dtype and device."""
        check_replacement(
            "a Kronecker product", _as_operator(self._factors[index]), _as_operator(factor)
        )
        self._factors[index] = factor

    @property
    def _operators(self) -> list[PyTorchLinearOperator]:
        return [_as_operator(factor) for factor in self._factors]

    # ---- products -------------------------------------------------------------------------------
    def _matmat(self, X: Columns) -> Columns:
        return self._apply_factors(self._operators, X)

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return self._apply_factors([op.adjoint() for op in self._operators], X)

    @staticmethod
    def _apply_factors(operators: list[PyTorchLinearOperator], X: Columns) -> Columns:
        """Multiply the Kronecker product of matrices onto ``[N, K]``."""
        (x,) = X
        num_columns = x.shape[-1]
        # columns go first: the last factor is then one matrix product for all columns
        dims = [op.shape[1] for op in operators]
        tensor = x.T.reshape(num_columns, *dims)
        for index in _cheapest_order([op.shape for op in operators]):
            tensor = _apply_along(operators[index], tensor, index + 1)
        if all(isinstance(op, IdentityLinearOperator) for op in operators):
            tensor = tensor.clone()  # a result does not share memory with its input
        return [tensor.reshape(num_columns, -1).T]

    def _adjoint(self) -> KroneckerProductLinearOperator:
        return KroneckerProductLinearOperator(
            *(f.mH if isinstance(f, Tensor) else f.adjoint() for f in self._factors)
        )

    def _conjugate(self) -> KroneckerProductLinearOperator:
        if self.dtype is not None and not self.dtype.is_complex:
            return self
        return KroneckerProductLinearOperator(
            *(f.conj() if isinstance(f, Tensor) else f._conjugate() for f in self._factors)
        )

    # ---- closed forms ---------------------------------------------------------------------------
    def trace(self) -> Tensor:
        """Return ``Π tr(S_i)``."""
        self._check_square_factors("trace")
        return _product([op.trace() for op in self._operators])

    def diagonal(self) -> Tensor:
        """Return the Kronecker product of the factors' diagonals."""
        self._check_square_factors("diagonal")
        first, *rest = [op.diagonal() for op in self._operators]
        for diagonal in rest:
            first = torch.kron(first, diagonal)
        return first

    def frobenius_norm(self) -> Tensor:
        """Return ``Π ‖S_i‖``."""
        return _product([op.frobenius_norm() for op in self._operators])

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign ``Π sign(det S_i)^(D / d_i)`` and logarithm ``Σ (D / d_i) log|det S_i|``."""
        self._check_square_factors("slogdet")
        dim = self.shape[0]
        signs, logs = [], []
        for op in self._operators:
            sign, logabsdet = op.slogdet()
            exponent = dim // op.shape[0]
            signs.append(sign**exponent)
            logs.append(exponent * logabsdet)
        return _product(signs), torch.stack(logs).sum()

    def inverse(  # type: ignore[override]  # the base's **strategy, spelled out
        self,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> PyTorchLinearOperator:
        r"""Return the inverse of the damped Kronecker product.

        Three ways to damp :math:`S_1 \otimes S_2` with :math:`\delta`:

        - plain: :math:`(S_1 + \delta I)^{-1} \otimes (S_2 + \delta I)^{-1}`, for any number of
          factors;
        - heuristic (section 6.3 of Martens & Grosse, 2015, "Optimizing neural networks with
          Kronecker-factored approximate curvature"): with the mean eigenvalues
          :math:`m_i = \mathrm{tr}(S_i) / d_i`, the damping is
          :math:`\max(\sqrt{\delta m_1 / m_2}, \text{min\_damping})` for :math:`S_1` and
          :math:`\max(\sqrt{\delta m_2 / m_1}, \text{min\_damping})` for :math:`S_2`; a single
          factor gets :math:`\max(\delta, \text{min\_damping})`; if an :math:`m_i` is 0, both get
          :math:`\sqrt{\delta}`;
        - exact: :math:`(S_1 \otimes S_2 + \delta I)^{-1}` through the factors'
          eigendecompositions, returned in eigendecomposed form.

        Only the last one is the inverse of the damped product. The first adds
        :math:`\delta (S_1 \otimes I + I \otimes S_2)` rather than :math:`\delta I`, which can be
        far from it; the second balances its two terms. Prefer the other two in preconditioners.

        Hermitian factors are inverted by Cholesky, others by LU.

        Args:
            damping: The damping :math:`\delta`, or a function of the operator that returns it.
            use_heuristic_damping: Whether to use the heuristic; for at most two factors.
            min_damping: The smallest damping that the heuristic gives a factor.
            use_exact_damping: Whether to damp the product rather than its factors.
            retry_double_precision: Whether a Cholesky decomposition that fails in float32 is
                retried in float64, with a warning.

        Returns:
            The inverse, with the same closed forms.

        Raises:
            ValueError: If both flags are set, or the heuristic meets more than two factors.
            RuntimeError: If a damped factor is not positive definite, or the heuristic finds a
                negative mean eigenvalue; the message names the factor.
        """
        flags = {
            "use_heuristic_damping": use_heuristic_damping,
            "use_exact_damping": use_exact_damping,
        }
        check_strategy(flags)
        self._check_square_factors("inverse")
        damping = self._resolve_damping(damping)
        if use_exact_damping:
            return self.eigh().inverse(damping)
        dampings: list[Any] = [damping] * len(self)
        if use_heuristic_damping:
            dampings = self._heuristic_dampings(damping, min_damping)
        inverses: list[Factor] = []
        for index, (factor, value) in enumerate(zip(self._factors, dampings, strict=True)):
            if isinstance(factor, Tensor):
                name = f"factor {index} of {self!r}"
                inverses.append(
                    _tensors.inverse(
                        factor, value, name=name, retry_double_precision=retry_double_precision
                    )
                )
            else:
                inverses.append(_as_factor(factor.inverse(value)))
        return KroneckerProductLinearOperator(*inverses)

    def _heuristic_dampings(self, damping: Any, min_damping: float) -> list[Any]:
        """Return each factor's damping by the heuristic of Martens & Grosse."""
        if len(self) > 2:
            raise ValueError(
                f"Heuristic damping is defined for one or two factors, {self!r} has {len(self)}."
            )
        real = damping.item() if isinstance(damping, Tensor) else damping
        if isinstance(real, complex) or real < 0:
            raise ValueError(f"Heuristic damping needs a damping >= 0, got {damping}.")
        if len(self) == 1:
            return [max(real, min_damping)]
        means = [(op.trace() / op.shape[0]).real.item() for op in self._operators]
        if min(means) < 0:
            raise RuntimeError(
                f"Heuristic damping needs factors with non-negative mean eigenvalues, those of "
                f"{self!r} have {means}."
            )
        if min(means) == 0:
            return [real**0.5] * 2
        first, second = means
        return [
            max((real * first / second) ** 0.5, min_damping),
            max((real * second / first) ** 0.5, min_damping),
        ]

    def eigh(self) -> EighDecomposedLinearOperator:
        """Return the product of Hermitian factors with its Kronecker product of eigenvectors."""
        self._check_square_factors("eigh")
        values, vectors = zip(*map(self._spectrum, range(len(self))), strict=True)
        return EighDecomposedLinearOperator(
            reduce(torch.kron, values), KroneckerProductLinearOperator(*vectors)
        )

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return ``S₁ᵖ ⊗ S₂ᵖ ⊗ …``, also of pairs of negative semi-definite factors."""
        self._check_square_factors("power")
        values, vectors = zip(
            *(self._spectrum(index, keep_wide=True) for index in range(len(self))), strict=True
        )
        # of the matrices that were decomposed
        sizes = [len(factor) if isinstance(factor, Tensor) else 1 for factor in self._factors]
        signs = [1] * len(self)
        if exponent != int(exponent):  # the signs of two negative factors cancel
            signs = [_sign(*pair) for pair in zip(values, sizes, strict=True)]
        if prod(signs) != 1:  # the product is zero or not semi-definite, which is an error
            power = _tensors.real_power(
                reduce(torch.kron, values), exponent, name=repr(self), size=max(sizes)
            )
            basis = KroneckerProductLinearOperator(*vectors)
            return EighDecomposedLinearOperator(power, basis).to(self.dtype)
        powers = []
        for index, (factor, size) in enumerate(zip(self._factors, sizes, strict=True)):
            power = _tensors.real_power(
                signs[index] * values[index],
                exponent,
                name=f"factor {index} of {self!r}",
                size=size,
                computed=isinstance(factor, Tensor),
            )
            powers.append(_with_spectrum(factor, power, vectors[index]))
        return KroneckerProductLinearOperator(*powers)

    def _spectrum(self, index: int, keep_wide: bool = False) -> tuple[Tensor, Factor]:
        """Return eigenvalues ``[d]`` and eigenvectors of a Hermitian factor."""
        factor = self._factors[index]
        if isinstance(factor, Tensor):
            name = f"factor {index} of {self!r}"
            return _tensors.eigh(factor, name=name, keep_wide=keep_wide)
        values = factor.eigh().diagonal()
        values = values.real if values.is_complex() else values
        return values, IdentityLinearOperator(factor.in_shape, factor.device, factor.dtype)

    def pinv(self, rtol: float | None = None) -> KroneckerProductLinearOperator:
        """Return ``S₁⁺ ⊗ S₂⁺ ⊗ …``, of factors of any shape."""
        inverses: list[Factor] = []
        for index, factor in enumerate(self._factors):
            if isinstance(factor, Tensor):
                name = f"factor {index} of {self!r}"
                inverses.append(_tensors.pinv(factor, rtol, name=name))
            else:
                inverses.append(_as_factor(factor.pinv(rtol)))
        return KroneckerProductLinearOperator(*inverses)

    def _entrywise_squares(self) -> KroneckerProductLinearOperator:
        return KroneckerProductLinearOperator(
            *(_as_factor(op._entrywise_squares()) for op in self._operators)
        )

    def _check_square_factors(self, form: str) -> None:
        """Raise if a factor is rectangular: closed forms need square factors."""
        if any(op.shape[0] != op.shape[1] for op in self._operators):
            raise self._missing(form)

    def _formula(self) -> str:
        shapes = " ⊗ ".join(f"{op.shape[0]}×{op.shape[1]}" for op in self._operators)
        return f"Kron({shapes})"


def _as_operator(factor: Factor) -> PyTorchLinearOperator:
    """Return a factor as an operator; refuse what is no matrix."""
    if isinstance(factor, Tensor):
        if factor.ndim != 2:
            raise ValueError(
                f"Kronecker factors must be 2-d tensors, got shape {list(factor.shape)}."
            )
        return TensorLinearOperator(factor)
    if not isinstance(factor, (DiagonalLinearOperator, IdentityLinearOperator)):
        raise ValueError(
            "Kronecker factors must be 2-d tensors, or diagonal or identity operators, got "
            f"{type(factor).__name__}."
        )
    return factor


def _as_factor(operator: PyTorchLinearOperator) -> Factor:
    """Return an operator as a factor: dense ones as tensors, diagonal ones as they are."""
    if isinstance(operator, TensorLinearOperator):
        return operator.matrix
    if isinstance(operator, (DiagonalLinearOperator, IdentityLinearOperator)):
        return operator
    return DiagonalLinearOperator([operator.diagonal()])  # a multiple of the identity


def _sign(values: Tensor, size: int) -> int:
    """Return 1 or -1 for a positive or negative semi-definite spectrum, else 0."""
    tolerance = _tensors.negligible(values, size)
    if not bool((values < -tolerance).any()):
        return 1
    return 0 if bool((values > tolerance).any()) else -1


def _with_spectrum(factor: Factor, values: Tensor, vectors: Any) -> Factor:
    """Return a factor with the same eigenvectors and other eigenvalues."""
    if isinstance(factor, IdentityLinearOperator):
        return factor
    if isinstance(factor, Tensor):
        return _tensors.recompose(values, vectors).to(factor.dtype)
    return DiagonalLinearOperator([values.to(factor.dtype)])


def _cheapest_order(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return the cheapest order of products along different axes, by an exchange argument."""
    costs = [1 / max(columns, 1) - 1 / max(rows, 1) for rows, columns in shapes]
    return sorted(range(len(shapes)), key=costs.__getitem__)


def _apply_along(operator: PyTorchLinearOperator, tensor: Tensor, axis: int) -> Tensor:
    """Apply a matrix along an axis of a tensor ``[K, d_1, ..., d_n]``."""
    if isinstance(operator, IdentityLinearOperator):
        return tensor
    shape = tensor.shape
    if isinstance(operator, DiagonalLinearOperator):
        after = len(shape) - axis - 1
        return tensor * operator.diagonal().reshape(-1, *([1] * after))
    matrix = operator.matrix  # type: ignore[attr-defined]
    new = (*shape[:axis], matrix.shape[0], *shape[axis + 1 :])
    right = prod(shape[axis + 1 :])
    if right == 1:
        return (tensor.reshape(-1, shape[axis]) @ matrix.T).reshape(new)
    left = prod(shape[:axis])
    if left == 1:
        return (matrix @ tensor.reshape(shape[axis], right)).reshape(new)
    return torch.matmul(matrix, tensor.reshape(left, shape[axis], right)).reshape(new)


def _product(values: list[Tensor]) -> Tensor:
    return torch.stack(values).prod()


@rule("matmul", KroneckerProductLinearOperator, KroneckerProductLinearOperator)
def _multiply(
    left: KroneckerProductLinearOperator, right: KroneckerProductLinearOperator
) -> PyTorchLinearOperator:
    """``(A ⊗ B)(C ⊗ D) = AC ⊗ BD`` where the factors' shapes fit."""
    pairs = list(zip(left._operators, right._operators, strict=False))
    if len(left) != len(right) or any(a.shape[1] != b.shape[0] for a, b in pairs):
        return NotImplemented
    return KroneckerProductLinearOperator(*(_multiply_factors(a, b) for a, b in pairs))


def _multiply_factors(a: PyTorchLinearOperator, b: PyTorchLinearOperator) -> Factor:
    """Multiply two factors, keeping diagonal ones diagonal."""
    if isinstance(a, TensorLinearOperator):
        if isinstance(b, TensorLinearOperator):
            return a.matrix @ b.matrix
        return a.matrix if isinstance(b, IdentityLinearOperator) else a.matrix * b.diagonal()
    if isinstance(b, TensorLinearOperator):
        return (
            b.matrix
            if isinstance(a, IdentityLinearOperator)
            else a.diagonal().unsqueeze(-1) * b.matrix
        )
    if isinstance(a, IdentityLinearOperator):
        return _as_factor(b)
    if isinstance(b, IdentityLinearOperator):
        return _as_factor(a)
    return DiagonalLinearOperator([a.diagonal() * b.diagonal()])


@batched(KroneckerProductLinearOperator)
def _multiply_each(
    operators: list[KroneckerProductLinearOperator], X: Columns, adjoint: bool
) -> Any:
    """Stack the factors of each place, which must be of one kind and shape."""
    if len({len(op) for op in operators}) > 1:
        return NotImplemented
    places = zip(*(op._factors for op in operators), strict=True)
    stacks = [stack for stack in map(_stack, places) if stack is not None]
    if len(stacks) < len(operators[0]):
        return NotImplemented
    if adjoint:
        stacks = [stack.mH if stack.ndim == 3 else stack.conj() for stack in stacks]
    shapes = [(stack.shape[1], stack.shape[-1]) for stack in stacks]
    (x,) = X  # [g, N, K]
    num_operators, _, num_columns = x.shape
    dims = [columns for _, columns in shapes]
    for index in _cheapest_order(shapes):
        left, right = prod(dims[:index]), prod(dims[index + 1 :]) * num_columns
        x = x.reshape(num_operators, left, dims[index], right)
        formula = "gij, gljr -> glir" if stacks[index].ndim == 3 else "gj, gljr -> gljr"
        x = torch.einsum(formula, stacks[index], x)
        dims[index] = shapes[index][0]
    return [x.reshape(num_operators, prod(dims), num_columns)]


def _stack(factors: Sequence[Factor]) -> Tensor | None:
    """Stack factors as ``[g, m, n]``, diagonal ones as ``[g, d]``, or None where this is no use."""
    tensors = [factor for factor in factors if isinstance(factor, Tensor)]
    if not tensors:
        tensors = [f.diagonal() for f in factors if isinstance(f, DiagonalLinearOperator)]
    return _tensors.stacked(tensors) if len(tensors) == len(factors) else None
