"""The operator contract: what every linear operator offers, derived from its product."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Size, Tensor

from curvlinops._damping import Damping, one_damping
from curvlinops._formats import Columns, as_shapes, describe, from_columns, numel, to_columns
from curvlinops._rules import apply_batched, combine
from curvlinops._saving import compact, is_saveable, reduce_operator
from curvlinops._scalars import Scalar, as_integer, as_scalar
from curvlinops._scipy import to_scipy
from curvlinops._tensors import NotHermitianError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from scipy.sparse.linalg import LinearOperator

Operator = TypeVar("Operator", bound="PyTorchLinearOperator")
STRATEGIES = {
    "use_heuristic_damping": False,
    "min_damping": 1e-8,
    "use_exact_damping": False,
    "retry_double_precision": True,
}
"""Keywords of ``inverse`` besides the damping, with their defaults. They choose how Kronecker
products are damped; every other operator adds ``damping * I`` exactly."""

_HINTS = {
    "trace": "estimate it with curvlinops.xtrace, hutchpp_trace or hutchinson_trace",
    "diagonal": "estimate it with curvlinops.xdiag or hutchinson_diag",
    "frobenius_norm": "estimate its square with curvlinops.hutchinson_squared_fro",
    "slogdet": "estimate the log-determinant with curvlinops.estimators.slq_logdet, or use "
    "A.to_dense().slogdet() if A is small",
    "inverse": "solve with curvlinops.cg or minres, or wrap A in CGInverseLinearOperator",
    "eigh": "use curvlinops.eigsh for some eigenpairs, or A.to_dense() if A is small",
    "power": "estimate traces of functions of A with curvlinops.estimators.slq_trace, or use "
    "A.to_dense() if A is small",
    "pinv": "solve least-squares problems with curvlinops.lsmr, or use "
    "torch.linalg.pinv(A.to_dense()) if A is small",
    "sample": "sample with a structured approximation of A, or with "
    "TensorLinearOperator(A.to_dense()) if A is small",
}
_OF_RECTANGLES = ("frobenius_norm", "pinv")


class RectangularError(ValueError, RuntimeError):
    """A closed form of square matrices was asked of a rectangular operator."""


_recording = threading.local()  # of one thread, as PyTorch's own grad mode


def _is_recording() -> bool:
    """Return whether products record gradients; see :func:`record_gradients`."""
    return getattr(_recording, "enabled", False)


@contextmanager
def record_gradients() -> Iterator[None]:
    """Let products record a graph, to differentiate through ``A @ x``.

    By default a product runs as under ``torch.no_grad()``. Inside this context the result of a
    structured operator depends on ``x`` and on the operator's tensors as in plain PyTorch code.

    Example:
        >>> import torch
        >>> from curvlinops import TensorLinearOperator, record_gradients
        >>> x = torch.ones(2, requires_grad=True)
        >>> with record_gradients():
        ...     y = TensorLinearOperator(torch.eye(2)) @ x
        >>> y.requires_grad
        True
    """
    before = _is_recording()
    _recording.enabled = True
    try:
        yield
    finally:
        _recording.enabled = before


def map_state(state: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every tensor and operator in a state."""
    if isinstance(state, (Tensor, PyTorchLinearOperator)):
        return function(state)
    if isinstance(state, dict):
        return {key: map_state(value, function) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map_state(value, function) for value in state)
    return state


def check_same(what: str, left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> None:
    """Raise if two operators differ in dtype or device (where they have one)."""
    for attribute in ("dtype", "device"):
        a, b = getattr(left, attribute), getattr(right, attribute)
        if a is not None and b is not None and a != b:
            raise ValueError(
                f"{attribute.capitalize()} mismatch in {what}: {left!r} has {a}, "
                f"{right!r} has {b}. Convert one of them with .to(...)."
            )


def check_replacement(what: str, old: PyTorchLinearOperator, new: PyTorchLinearOperator) -> None:
    """Raise if an operator inside another one cannot be replaced by a new one."""
    if not isinstance(new, PyTorchLinearOperator):
        raise TypeError(
            f"The items of {what} are operators, got {type(new).__name__}; wrap a matrix in "
            "TensorLinearOperator."
        )
    if (old.in_shape, old.out_shape) != (new.in_shape, new.out_shape):
        raise ValueError(
            f"Shape mismatch in {what}: {old!r} maps {describe(old.in_shape)} to "
            f"{describe(old.out_shape)}, but {new!r} maps {describe(new.in_shape)} to "
            f"{describe(new.out_shape)}. Both must map between the same spaces."
        )
    check_same(what, old, new)


def like(device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor | None:
    """Return an empty tensor that carries device and dtype of an operator without tensors.

    ``to``, saving and ``map_location`` then work as for others. None if neither is given: such an
    operator multiplies tensors of any device and dtype.
    """
    return None if device is None and dtype is None else torch.empty(0, device=device, dtype=dtype)


def of_block(index: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function makes of a block; its error notes the block, for who can name it."""
    try:
        return function(*arguments)
    except (RuntimeError, ValueError) as error:
        error.block = index  # type: ignore[union-attr]  # of blocks in blocks, the outermost stays
        raise


def check_strategy(strategy: dict[str, Any]) -> None:
    """Raise for unknown or contradicting keywords of ``inverse``."""
    unknown = sorted(set(strategy) - set(STRATEGIES))
    if unknown:
        raise TypeError(
            f"inverse() got unexpected keywords {unknown}; known besides damping: "
            f"{sorted(STRATEGIES)}."
        )
    if strategy.get("use_heuristic_damping") and strategy.get("use_exact_damping"):
        raise ValueError("Choose one of use_heuristic_damping and use_exact_damping, not both.")


def matmat_each(
    operators: Sequence[PyTorchLinearOperator], X: Columns, adjoint: bool = False
) -> Columns:
    """Multiply each of several operators onto its own tensors, at once where their type can.

    Args:
        operators: g operators between the same two spaces.
        X: Tensors ``[g, *N_i, K]`` of the input space (with ``adjoint``: of the output space).
        adjoint: Whether the adjoints multiply.

    Returns:
        Tensors ``[g, *M_j, K]``, without memory of ``X``.
    """
    operators = list(operators)
    if len(operators) > 1:
        result = apply_batched(operators, X, adjoint)
        if result is not None:
            return list(result)
    results = []
    for op, *x in zip(operators, *(x.unbind() for x in X), strict=True):
        results.append(op._adjoint_matmat(x) if adjoint else op._matmat(x))
    return [torch.stack(ys) for ys in zip(*results, strict=True)]


class PyTorchLinearOperator:
    """A linear map between two spaces of tensors, known by its products.

    The matrix has one row for each entry of the tensors of the output space and one column for
    each entry of those of the input space; tensors are flattened row-major and concatenated.
    A subclass implements :meth:`_matmat` and, unless ``SELF_ADJOINT = True``,
    :meth:`_adjoint_matmat`; everything else follows from these. Device and dtype are those of
    the tensors among the operator's attributes.

    Products do not record gradients; see :func:`~curvlinops.record_gradients`.

    Args:
        in_shape: The shapes of the tensors of the input space.
        out_shape: The shapes of the tensors of the output space.

    Raises:
        ValueError: If one of the lists is empty.

    Example:
        >>> import torch
        >>> from curvlinops import PyTorchLinearOperator
        >>> class Cumsum(PyTorchLinearOperator):
        ...     def _matmat(self, X):
        ...         return [x.cumsum(0) for x in X]
        ...     def _adjoint_matmat(self, X):
        ...         return [x.flip(0).cumsum(0).flip(0) for x in X]
        >>> A = Cumsum([(3,)], [(3,)])
        >>> A @ torch.ones(3)
        tensor([1., 2., 3.])
        >>> (2 * A.T @ A - A) @ torch.ones(3)
        tensor([11.,  8.,  3.])
    """

    SELF_ADJOINT: bool = False
    _IS_PERMUTATION: ClassVar[bool] = False
    _IS_SUM: ClassVar[bool] = False
    _init_args: ClassVar[tuple[str, ...] | None] = None
    __array_ufunc__ = None  # NumPy scalars and arrays on the left leave operations to us

    def __init__(self, in_shape: Sequence[Sequence[int]], out_shape: Sequence[Sequence[int]]):
        self.in_shape: list[Size] = as_shapes(in_shape, "in_shape")
        self.out_shape: list[Size] = as_shapes(out_shape, "out_shape")

    # ---- what a subclass implements ---------------------------------------------------------
    def _matmat(self, X: Columns) -> Columns:
        """Multiply tensors ``[*N_i, K]`` (K >= 1) of the input space; return ``[*M_j, K]``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _matmat.")

    def _adjoint_matmat(self, X: Columns) -> Columns:
        """Multiply the adjoint onto tensors ``[*M_j, K]``; return ``[*N_i, K]``."""
        if self.SELF_ADJOINT:
            return self._matmat(X)
        if type(self)._adjoint is not PyTorchLinearOperator._adjoint:
            return self._adjoint()._matmat(X)
        raise NotImplementedError(
            f"{type(self).__name__} has no adjoint: implement _adjoint_matmat, or set "
            "SELF_ADJOINT = True if it is its own."
        )

    def _adjoint(self) -> PyTorchLinearOperator:
        """Return the adjoint of an operator that is not its own; lazy unless overridden."""
        return combine("adjoint", self)

    def _conjugate(self) -> PyTorchLinearOperator:
        """Return the entry-wise complex conjugate; lazy unless overridden."""
        real = self.dtype is not None and not self.dtype.is_complex
        return self if real else combine("conjugate", self)

    @property
    def _in_names(self) -> list[str] | None:
        """Names of the input space's tensors."""
        return None

    @property
    def _out_names(self) -> list[str] | None:
        """Names of the output space's tensors."""
        return None

    # ---- what the operator holds ------------------------------------------------------------
    def _state(self) -> dict[str, Any]:
        """Return what rebuilds the operator: tensors, operators, plain values, lists, dicts."""
        if self._init_args is None:
            return dict(vars(self))
        return {name: getattr(self, name) for name in self._init_args}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        """Rebuild an operator from its state."""
        if cls._init_args is None:
            operator = cls.__new__(cls)
            vars(operator).update(state)
            return operator
        return cls(**state)

    @property
    def device(self) -> torch.device | None:
        """The device of the operator's tensors; None if it holds none."""
        return _first(self._state(), "device")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the operator's tensors; None if it holds none."""
        return _first(self._state(), "dtype")

    def to(self: Operator, *args: Any, **kwargs: Any) -> Operator:
        """Return the operator with its tensors moved or cast; arguments as ``Tensor.to``."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex()):
                return leaf.to(torch.empty(0, device=leaf.device).to(*args, **kwargs).device)
            return leaf.to(*args, **kwargs)

        return type(self)._from_state(map_state(self._state(), move))

    def __deepcopy__(self: Operator, memo: dict[int, Any]) -> Operator:
        return type(self)._from_state(copy.deepcopy(self._state(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not is_saveable(type(self)):
            return super().__reduce_ex__(protocol)
        state = map_state(self._state(), lambda x: compact(x) if isinstance(x, Tensor) else x)
        return reduce_operator(self, state)

    # ---- products -----------------------------------------------------------------------------
    @property
    def shape(self) -> Size:
        """Rows and columns of the matrix."""
        return Size((numel(self.out_shape), numel(self.in_shape)))

    def __matmul__(self, x: Any) -> Any:
        """Multiply a vector or matrix in any format, or compose with another operator."""
        if isinstance(x, PyTorchLinearOperator):
            return combine("matmul", self, x)
        return _apply(self, x, leading=False)

    def __rmatmul__(self, x: Any) -> Any:
        """Multiply a row vector, or a matrix of rows, from the left: ``x @ A = (Aᵀ xᵀ)ᵀ``."""
        return _apply(self, x, leading=True)

    def to_dense(self, chunk_size: int = 128) -> Tensor:
        """Return the matrix as a tensor ``[rows, columns]``.

        Args:
            chunk_size: How many columns are computed at once.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        _, num_columns = self.shape
        chunks = []
        for start in range(0, max(num_columns, 1), chunk_size):
            width = min(chunk_size, num_columns - start)
            eye = torch.zeros(num_columns, width, device=self.device, dtype=self.dtype)
            eye[start : start + width].fill_diagonal_(1)
            chunks.append(self @ eye)
        return torch.cat(chunks, dim=1)

    def to_scipy(self, dtype: DTypeLike | None = None) -> LinearOperator:
        """Return a SciPy ``LinearOperator`` of the same matrix.

        Args:
            dtype: NumPy dtype of the SciPy operator. Default: the operator's own (float32 for
                bfloat16 and float16).

        Example:
            >>> import torch
            >>> from scipy.sparse.linalg import eigsh
            >>> from curvlinops import DiagonalLinearOperator
            >>> A = DiagonalLinearOperator([torch.arange(5.0)])
            >>> print(eigsh(A.to_scipy(), k=1, return_eigenvectors=False).round(4))
            [4.]
        """
        return to_scipy(self, dtype)

    # ---- algebra ------------------------------------------------------------------------------
    def adjoint(self) -> PyTorchLinearOperator:
        """Return the adjoint (conjugate transpose)."""
        return self if self.SELF_ADJOINT else self._adjoint()

    @property
    def H(self) -> PyTorchLinearOperator:
        """The adjoint (conjugate transpose)."""
        return self.adjoint()

    @property
    def T(self) -> PyTorchLinearOperator:
        """The transpose, without conjugation."""
        return self.adjoint()._conjugate()

    def __add__(self, other: Any) -> Any:
        if isinstance(other, PyTorchLinearOperator):
            return combine("add", self, other)
        if isinstance(other, Number) and as_scalar(other) == 0:  # the start of sum([A, B])
            return self
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, PyTorchLinearOperator):
            return self + (-other)
        return NotImplemented

    def __neg__(self) -> PyTorchLinearOperator:
        return -1 * self

    def __mul__(self, value: Any) -> Any:
        scalar = as_scalar(value)
        return NotImplemented if scalar is None else combine("scale", self, scalar)

    __rmul__ = __mul__

    def __truediv__(self, value: Any) -> Any:
        scalar = as_scalar(value)
        return NotImplemented if scalar is None else self * (1 / scalar)

    def __pow__(self, exponent: Any) -> Any:
        """Return an integer power; ``A ** 0`` is the identity, negative ones use ``inverse``."""
        if isinstance(exponent, bool) or not hasattr(exponent, "__index__"):
            return NotImplemented
        exponent = exponent.__index__()
        if self.in_shape != self.out_shape:
            raise RectangularError(
                f"Only operators from a space to itself have powers, {self!r} maps "
                f"{describe(self.in_shape)} to {describe(self.out_shape)}."
            )
        if exponent < 0:
            return self.inverse() ** (-exponent)
        if exponent == 0:
            return combine("identity", self)
        result: PyTorchLinearOperator = self
        for _ in range(exponent - 1):
            result = result @ self
        return result

    # ---- closed forms ---------------------------------------------------------------------------
    def trace(self) -> Tensor:
        """Return the trace, where it is exact."""
        raise self._missing("trace")

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[D]``, where it is exact."""
        raise self._missing("diagonal")

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, where it is exact."""
        raise self._missing("frobenius_norm")

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the sign and the logarithm of the absolute value of the determinant."""
        raise self._missing("slogdet")

    def det(self) -> Tensor:
        """Return the determinant, where it is exact."""
        sign, logabsdet = self.slogdet()
        return sign * logabsdet.exp()

    def logdet(self) -> Tensor:
        """Return the log-determinant: NaN if the determinant is negative, -inf if it is 0."""
        sign, logabsdet = self.slogdet()
        if sign.is_complex():
            return logabsdet + torch.where(sign == 0, torch.ones_like(sign), sign).log()
        return torch.where(sign < 0, torch.full_like(logabsdet, torch.nan), logabsdet)

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(A + damping * I)⁻¹``, where it has a closed form.

        Args:
            damping: Multiple of the identity to add. For an operator with blocks (one that is block
                diagonal, or P B Pᵀ with such a B), it may differ from block to block:

                - a number or 0-d tensor: the same for every block;
                - a function of the block, an operator: for instance ``lambda block: 1e-3 *
                  block.trace() / block.shape[0]``. It is called with each innermost block;
                - a sequence with one of these for each block. A block that is block diagonal itself
                  (a weight with channel groups) hands its value to all of its blocks;
                - a dict with a number for each parameter's name, where the operator knows which
                  parameters a block belongs to, as :class:`~curvlinops.KFACLinearOperator` and its
                  multiples, shifts and inverses do. A block of several parameters takes the value
                  of any of them.

                An operator without blocks is its own single block.
            **strategy: How Kronecker products are damped, see
                :meth:`~curvlinops.KroneckerProductLinearOperator.inverse`.

        Raises:
            ValueError: If the damping is no number, or NaN; or there are not as many values as
                blocks, or names are unknown, missing, or of one block with different values.
            RuntimeError: If the damped operator has no inverse.
        """
        check_strategy(strategy)
        raise self._missing("inverse")

    def _resolve_damping(self, damping: Damping) -> Any:
        """Return a damping with functions evaluated: a number, or a list with one for each block.

        What it returns is a damping as well, and resolves to itself.
        """
        return one_damping(damping, self)

    def eigh(self) -> PyTorchLinearOperator:
        """Return the same Hermitian operator in eigendecomposed form, where it has one.

        The structure is kept: a block-diagonal operator becomes a block-diagonal one of
        eigendecomposed blocks, P B Pᵀ stays a chain.
        """
        raise self._missing("eigh")

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return a real power of a Hermitian operator through its eigendecomposition."""
        try:
            decomposed = self.eigh()
        except NotImplementedError as error:
            raise self._missing("power") from error
        return decomposed.power(exponent)

    def sqrt(self) -> PyTorchLinearOperator:
        """Return the principal square root of a positive semi-definite operator."""
        return self.power(0.5)

    def inverse_sqrt(self) -> PyTorchLinearOperator:
        """Return ``A^(-1/2)``, the inverse of the principal square root, of a positive definite A.

        Raises:
            ValueError: If the operator is indefinite, or singular: has an eigenvalue 0, or one that
                is only a rounding error where a dense matrix or Kronecker factor is decomposed.
                Eigenvalues in eigendecomposed form are taken for exact.
        """
        return self.power(-0.5)

    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        """Return the Moore-Penrose inverse, also of rectangular operators, where it is exact.

        Args:
            rtol: Singular values up to this multiple of the largest one count as zero. They are
                compared within each matrix that is decomposed: a dense matrix, each factor of a
                Kronecker product, each block of a block-diagonal operator; or all eigenvalues of an
                eigendecomposed operator, all entries of a diagonal one. Default: that of
                ``torch.linalg.pinv``, the larger dimension of the (largest) matrix that is
                decomposed times the machine epsilon, which is float32's for half precision.
                Nothing is decomposed for diagonal operators; the dimension is then 1.

        Raises:
            ValueError: If the cutoff is not between 0 and 1, or a matrix has non-finite entries.

        Example:
            >>> import torch
            >>> from curvlinops import KroneckerProductLinearOperator
            >>> A = KroneckerProductLinearOperator(torch.ones(2, 2), torch.eye(3, 2))
            >>> A.pinv()
            <4×6 operator Kron(2×2 ⊗ 2×3)>
            >>> torch.allclose((A @ A.pinv() @ A).to_dense(), A.to_dense(), atol=1e-6)
            True
        """
        if self._IS_PERMUTATION:
            return self.adjoint()
        if self.shape[0] != self.shape[1]:
            raise self._missing("pinv")
        try:
            decomposed = self.eigh()
        except (NotImplementedError, NotHermitianError) as error:
            raise self._missing("pinv") from error
        if decomposed is self:
            raise self._missing("pinv")
        return decomposed.pinv(rtol)

    def sample(
        self,
        num_samples: int = 1,
        *,
        generator: torch.Generator | None = None,
        inverse: bool = False,
    ) -> Tensor:
        r"""Draw vectors from the normal distribution :math:`\mathcal{N}(0, A)`, or of precision A.

        With a standard normal :math:`z` of the space these are :math:`A^{1/2} z`, or
        :math:`A^{-1/2} z` for ``inverse=True``, whose covariance is :math:`A^{-1}`. That is the
        inner loop of a Laplace approximation: with a Kronecker-factored curvature K and a prior
        precision δ, samples of the posterior around the trained parameters are those of
        ``(K + delta * K**0).sample(inverse=True)``.

        Each call computes the root. To draw repeatedly, keep it: ``S = A.inverse_sqrt()``, and
        multiply it with normal vectors in any format; a list of tensors in the shape of the
        parameters gives such a list (see the example). ``D = A.eigh()`` serves several closed forms
        with one decomposition, for instance ``D.logdet()`` and ``D.sample()``.

        Complex vectors are circular: real and imaginary parts of :math:`z` are independent and have
        variance 1/2, so that :math:`E[z z^*] = I` and :math:`E[z z^\top] = 0`.

        Args:
            num_samples: The number of vectors.
            generator: Source of the random numbers, which are
                ``torch.randn(D, num_samples, generator=generator)`` in the operator's dtype and on
                its device. Default: PyTorch's global one.
            inverse: Whether the covariance is the inverse of A.

        Returns:
            The vectors as columns ``[D, num_samples]``, flat.

        Raises:
            ValueError: If A is not positive semi-definite, for ``inverse=True`` not definite.
            NotImplementedError: If A has no square root in closed form.

        Example:
            >>> import torch
            >>> from curvlinops import KroneckerProductLinearOperator
            >>> A = KroneckerProductLinearOperator(torch.eye(2), 4 * torch.eye(3))
            >>> generator = torch.Generator().manual_seed(0)
            >>> A.sample(5, generator=generator).shape
            torch.Size([6, 5])
            >>> S = (A + 0.1 * A**0).inverse_sqrt()
            >>> parameters = [torch.zeros(6)]
            >>> draws = [S @ [torch.randn_like(p) for p in parameters] for _ in range(3)]
        """
        num_samples = as_integer("num_samples", num_samples, least=1)
        self._check_square("sample")
        try:
            root = self.inverse_sqrt() if inverse else self.sqrt()
            root._check_real_spectrum()  # those of complex eigenvalues may not be Hermitian
        except NotImplementedError as error:
            raise self._missing("sample") from error
        except ValueError as error:
            covariance = "A⁻¹" if inverse else "A"
            raise ValueError(
                f"Cannot sample from N(0, {covariance}) with A = {self!r}: {error}"
            ) from error
        device = self.device
        if device is None and generator is not None:
            device = generator.device
        z = torch.randn(
            self.shape[1], num_samples, generator=generator, dtype=self.dtype, device=device
        )
        result: Tensor = root @ z
        return result

    def _check_real_spectrum(self) -> None:
        """Raise if an operator in a form that has eigenvalues (a power) is not Hermitian."""

        def check(item: Any) -> Any:
            if isinstance(item, PyTorchLinearOperator):
                item._check_real_spectrum()
            return item

        map_state(self._state(), check)

    def _with_shift(self, shift: Scalar) -> PyTorchLinearOperator:
        """Return ``A + shift * I`` in a form that has closed forms: by default eigendecomposed."""
        return self.eigh() + shift * combine("identity", self)

    def _entrywise_squares(self) -> PyTorchLinearOperator:
        """Return the operator of the squared absolute values of the matrix's entries."""
        raise self._missing("diagonal")

    def _missing(self, form: str) -> Exception:
        """Return the error for a closed form that the operator lacks."""
        rows, columns = self.shape
        if rows != columns and form not in _OF_RECTANGLES:
            return RectangularError(
                f"{form} needs a square matrix, but {self!r} is {rows} × {columns}."
            )
        return NotImplementedError(
            f"{self!r} has no closed form of {form}: {_HINTS.get(form, 'use A.to_dense()')}."
        )

    def _check_square(self, form: str) -> None:
        """Raise if the matrix is rectangular."""
        if self.shape[0] != self.shape[1]:
            raise self._missing(form)

    # ---- text -----------------------------------------------------------------------------------
    def _formula(self) -> str:
        """Return the operator as part of a formula."""
        return f"{type(self).__name__.removesuffix('LinearOperator')}"

    def _as_factor(self) -> str:
        """Return the operator as a factor of a product, in parentheses if it is a sum."""
        return f"({self._formula()})" if self._IS_SUM else self._formula()

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<{rows}×{columns} operator {self._formula()}>"


def _first(item: Any, attribute: str) -> Any:
    """Return device or dtype of the first tensor or operator in a state that has one, or None."""
    if isinstance(item, Tensor):
        floating = item.is_floating_point() or item.is_complex()
        return getattr(item, attribute) if floating else None
    if isinstance(item, PyTorchLinearOperator):
        return getattr(item, attribute)
    if isinstance(item, dict):
        item = list(item.values())
    if type(item) not in (list, tuple):
        return None
    # containers last: those of plain values may be long, and have none
    ordered = sorted(item, key=lambda value: type(value) in (list, tuple, dict))
    found = (_first(value, attribute) for value in ordered)
    return next((value for value in found if value is not None), None)


def _apply(operator: PyTorchLinearOperator, x: Any, leading: bool) -> Any:
    """Multiply an operator, or from the left its transpose, onto a vector or matrix."""
    if leading:
        in_shape, in_names, out_names = operator.out_shape, operator._out_names, operator._in_names
    else:
        in_shape, in_names, out_names = operator.in_shape, operator._in_names, operator._out_names
    columns, fmt = to_columns(x, in_shape, in_names, leading)
    for attribute in ("dtype", "device"):
        own = getattr(operator, attribute)
        wrong = {getattr(c, attribute) for c in columns} - {own}
        if own is not None and wrong:
            raise ValueError(
                f"{attribute.capitalize()} mismatch: {operator!r} has {own}, but is multiplied "
                f"with tensors of {', '.join(map(str, wrong))}. Convert one of them with .to(...)."
            )
    num_columns = columns[0].shape[-1]
    if num_columns == 0:
        out_shape = operator.in_shape if leading else operator.out_shape
        result = [columns[0].new_zeros(*shape, 0) for shape in out_shape]
        return from_columns(result, out_shape, out_names, fmt)
    with torch.set_grad_enabled(_is_recording() and torch.is_grad_enabled()):
        if leading:
            result = [y.conj() for y in operator._adjoint_matmat([c.conj() for c in columns])]
        else:
            result = operator._matmat(columns)
        device_type = result[0].device.type
        # Only then: that an operator's results have another dtype should otherwise show.
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            result = [y.to(operator.dtype or y.dtype) for y in result]
        if operator._IS_PERMUTATION:  # the result must not share memory with x
            result = [y.clone() for y in result]
    # read only now, because the product may be what tells an operator its shape
    out_shape = operator.in_shape if leading else operator.out_shape
    expected = [Size((*shape, num_columns)) for shape in out_shape]
    if [y.shape for y in result] != expected:
        raise ValueError(
            f"{type(operator).__name__} returned tensors of shapes "
            f"{describe([y.shape for y in result])} instead of {describe(expected)}."
        )
    return from_columns(list(result), out_shape, out_names, fmt)
