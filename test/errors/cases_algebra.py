"""Errors of structured operators and their algebra."""

from __future__ import annotations

import pickle
from typing import Any
from unittest import mock

import torch
from error_cases import Cases
from torch import Tensor, nn

from curvlinops import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EighDecomposedLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    KroneckerProductLinearOperator,
    LowRankLinearOperator,
    NeumannInverseLinearOperator,
    OuterProductLinearOperator,
    PyTorchLinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
    ToCanonicalLinearOperator,
)
from curvlinops._algebra.products import _ChainPyTorchLinearOperator as Chain
from curvlinops._algebra.sums import SumLinearOperator
from curvlinops._algebra.wrappers import Wrapper
from curvlinops._operator import RectangularError
from curvlinops._random import RandomSource
from curvlinops._saving import rebuild_operator
from curvlinops._scalars import as_integer
from curvlinops._tensors import NotHermitianError
from curvlinops.inverse import _SolverInverse
from curvlinops.kfac_utils import Precision
from curvlinops.nearest_kronecker import nearest_kronecker

cases = Cases()

inf = float("inf")
I2, I3 = torch.eye(2), torch.eye(3)
R23 = torch.ones(2, 3)
TWO, RECTANGLE = TensorLinearOperator(I2), TensorLinearOperator(R23)
ASYMMETRIC = TensorLinearOperator(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))


class Plain(PyTorchLinearOperator):
    """An operator on two numbers without any closed form."""

    def __init__(self, shape: Any = (2,), out: Any = (2,), result: Any = None):
        super().__init__([shape], [out])
        self.result = result

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return X if self.result is None else [self.result]


class Empty(PyTorchLinearOperator):
    """An operator that implements nothing."""

    def __init__(self) -> None:
        super().__init__([(2,)], [(2,)])


class Named(Plain):
    """An operator whose space has names."""

    SELF_ADJOINT = True

    @property
    def _in_names(self) -> list[str]:
        return ["w"]


PLAIN = Plain()


# ---- _algebra ------------------------------------------------------------------------------------
cases(
    RuntimeError,
    "I> with damping 0.0 is zero",
    "Increase the damping",
    lambda: (0.0 * IdentityLinearOperator([(2,)])).inverse(),
)
cases(ValueError, "got none", "at least one", Chain)
cases(
    ValueError,
    r"takes \[\(2,\)\], but .* returns \[\(3,\)\]",
    "must be the same",
    lambda: TWO @ TensorLinearOperator(I3),
)
cases(NotImplementedError, "no closed form of trace", r"curvlinops\.xtrace", (Plain() @ TWO).trace)
cases(
    NotImplementedError,
    "no closed form of inverse",
    r"curvlinops\.cg",
    lambda: (TWO @ Plain()).inverse(0.1),
)
cases(
    NotImplementedError,
    "no closed form of pinv",
    r"curvlinops\.lsmr",
    (Plain() @ DiagonalLinearOperator([torch.ones(2)])).pinv,
)
cases(
    NotImplementedError,
    "no closed form of slogdet",
    "slq_logdet",
    (Plain((3,), (2,)) @ Plain((2,), (3,))).slogdet,
)
cases(
    NotImplementedError,
    "no closed form of diagonal",
    r"curvlinops\.xdiag",
    lambda: (Plain() @ Plain())._entrywise_squares(),
)
cases(NotImplementedError, "no closed form of eigh", r"curvlinops\.eigsh", (1j * TWO).eigh)
cases(
    NotHermitianError,
    "has complex eigenvalues",
    "Hermitian",
    lambda: (1j * TWO.to(torch.complex64))._check_real_spectrum(),
)
cases(ValueError, "got none", "at least one", lambda: SumLinearOperator([]))
cases(
    ValueError,
    r"has in_shape \[\(2,\)\], .* has \[\(3,\)\]",
    "must have the same in_shape",
    lambda: SumLinearOperator([TWO, TensorLinearOperator(I3)]),
)
cases(
    NotImplementedError,
    "no closed form of inverse",
    r"curvlinops\.cg",
    lambda: (PLAIN + IdentityLinearOperator([(2,)])).inverse(),
)
cases(
    NotImplementedError,
    "_around",
    "implement",
    lambda: Wrapper._around(Wrapper([(2,)], [(2,)]), TWO),
)
# ---- _damping ------------------------------------------------------------------------------------
cases(ValueError, "returned 'a'", "must be a number", lambda: TWO.inverse(lambda block: "a"))
cases(
    ValueError,
    "not <2×2 operator",
    "needs an operator that knows the names",
    lambda: TWO.inverse({"w": 1.0}),
)
cases(
    ValueError,
    r"got \[1.0, 2.0\]",
    "must be a number or a function",
    lambda: TWO.inverse([1.0, 2.0]),
)
cases(
    ValueError,
    "got 1",
    "one damping for each of its 2 blocks",
    lambda: BlockDiagonalLinearOperator([TWO, TWO]).inverse([1.0]),
)
cases(ValueError, "is NaN", "must be a number", lambda: TWO.inverse(float("nan")))


def kfac_block_dampings(damping: Any) -> None:
    """Invert a KFAC of one layer, whose weight and bias share a block."""
    model = nn.Linear(2, 2)
    data = [(torch.rand(3, 2), torch.rand(3, 2))]
    K = KFACLinearOperator(
        model, nn.MSELoss(), dict(model.named_parameters()), data, separate_weight_and_bias=False
    )
    K.inverse(damping)


cases(
    ValueError,
    r"no parameters \['w'\]",
    r"Parameters: \['weight', 'bias'\]",
    lambda: kfac_block_dampings({"w": 1.0}),
)
cases(
    ValueError,
    r"no damping for the parameters \['weight', 'bias'\]",
    "Give one",
    lambda: kfac_block_dampings({}),
)
cases(
    ValueError,
    r"\['weight', 'bias'\] .* have dampings \[1.0, 2.0\]",
    "Give them the same",
    lambda: kfac_block_dampings({"weight": 1.0, "bias": 2.0}),
)
# ---- _formats ------------------------------------------------------------------------------------
cases(
    ValueError,
    "in_shape is empty",
    "at least one tensor",
    lambda: PyTorchLinearOperator([], [(2,)]),
)
cases(TypeError, "ndarray", r"A\.to_scipy\(\)", lambda: TWO @ torch.ones(2).numpy())
cases(ValueError, r"got \[3\]", r"must have shape \[2\] or \[2, K\]", lambda: TWO @ torch.ones(3))
cases(ValueError, "A dict was given", "pass a list of tensors", lambda: TWO @ {"w": torch.ones(2)})
cases(
    ValueError,
    r"Unknown: \['v'\]",
    "keys must be the parameter names",
    lambda: Named() @ {"v": torch.ones(2)},
)
cases(TypeError, "holds float", "A list of tensors is needed", lambda: TWO @ [1.0])
cases(ValueError, r"got \[\(3,\)\]", r"must have shapes \[\(2,\)\]", lambda: TWO @ [torch.ones(3)])
# ---- _operator -----------------------------------------------------------------------------------
cases(
    ValueError,
    "Dtype mismatch in a sum.*float32.*float64",
    r"\.to\(",
    lambda: TWO + TensorLinearOperator(I2.double()),
)


def replace_block(new: Any) -> None:
    """Replace a block of a block-diagonal operator."""
    BlockDiagonalLinearOperator([TWO, TWO])[0] = new


cases(TypeError, "got Tensor", "wrap a matrix in TensorLinearOperator", lambda: replace_block(I2))
cases(
    ValueError,
    r"but .* maps \[\(3,\)\] to \[\(3,\)\]",
    "must map between the same spaces",
    lambda: replace_block(TensorLinearOperator(I3)),
)
cases(
    TypeError,
    r"unexpected keywords \['dampning'\]",
    "known besides damping",
    lambda: TWO.inverse(dampning=1.0),
)
cases(
    ValueError,
    "use_heuristic_damping and use_exact_damping",
    "Choose one",
    lambda: KroneckerProductLinearOperator(I2, I2).inverse(
        0.1, use_heuristic_damping=True, use_exact_damping=True
    ),
)
cases(NotImplementedError, "Empty", "implement _matmat", lambda: Empty() @ torch.ones(2))
cases(
    NotImplementedError,
    "Plain has no adjoint",
    "implement _adjoint_matmat",
    lambda: PLAIN.T @ torch.ones(2),
)
cases(ValueError, "got 0", "chunk_size must be at least 1", lambda: TWO.to_dense(chunk_size=0))
cases(
    RectangularError,
    r"maps \[\(3,\)\] to \[\(2,\)\]",
    "from a space to itself",
    lambda: RECTANGLE**2,
)
cases(NotImplementedError, "Plain.* has no closed form of trace", "xtrace", PLAIN.trace)
cases(NotImplementedError, "no closed form of diagonal", "xdiag", PLAIN.diagonal)
cases(
    NotImplementedError,
    "no closed form of frobenius_norm",
    "hutchinson_squared_fro",
    PLAIN.frobenius_norm,
)
cases(NotImplementedError, "no closed form of slogdet", "slq_logdet", PLAIN.slogdet)
cases(NotImplementedError, "no closed form of inverse", "CGInverseLinearOperator", PLAIN.inverse)
cases(NotImplementedError, "no closed form of eigh", "eigsh", PLAIN.eigh)
cases(NotImplementedError, "no closed form of power", "slq_trace", PLAIN.sqrt)
cases(NotImplementedError, "no closed form of pinv", "lsmr", Plain((3,)).pinv)
cases(NotImplementedError, "no closed form of pinv", "lsmr", PLAIN.pinv)


class OwnEigh(Plain):
    """An operator that takes itself for eigendecomposed, but has no pseudo-inverse."""

    def eigh(self) -> Any:
        return self


cases(NotImplementedError, "no closed form of pinv", "lsmr", OwnEigh().pinv)
cases(
    NotImplementedError, "-1 \\* Plain> has no closed form of power", "slq_trace", (-1 * PLAIN).sqrt
)
cases(NotImplementedError, "no closed form of power", "slq_trace", (-1 * OwnEigh()).sqrt)
cases(
    NotImplementedError,
    "no closed form of inverse",
    "CGInverseLinearOperator",
    (OwnEigh() + IdentityLinearOperator([(2,)])).inverse,
)
cases(NotImplementedError, "no closed form of sample", "sample with a structured", PLAIN.sample)
cases(
    ValueError,
    r"Cannot sample from N\(0, A\)",
    "Add a multiple of the identity",
    TensorLinearOperator(-I2).sample,
)
cases(
    NotImplementedError, "no closed form of diagonal", "xdiag", lambda: PLAIN._entrywise_squares()
)
cases(RectangularError, "<2×3 operator .* 2 × 3", "needs a square matrix", RECTANGLE.trace)
cases(ValueError, "float32, but .* torch.float64", r"\.to\(", lambda: TWO @ torch.ones(2).double())
cases(
    ValueError,
    r"Plain returned tensors of shapes \[\(3, 1\)\]",
    r"instead of \[\(2, 1\)\]",
    lambda: Plain(result=torch.ones(3, 1)) @ torch.ones(2),
)
# ---- _random, _saving, _scalars ------------------------------------------------------------------
cases(ValueError, "got 0.5", "must be an integer", lambda: RandomSource(0.5))  # type: ignore[arg-type]
cases(ValueError, "got -1", r"between 0 and 2\*\*64 - 1", lambda: RandomSource(-1))
cases(
    ValueError,
    "Unknown purpose 'tea'",
    r"Supported: \[",
    lambda: RandomSource(0).uniforms("tea", 0, 1, 1),
)
cases(
    ValueError,
    "got 0, -1 and 1",
    "must not be negative",
    lambda: RandomSource(0).uniforms("samples", 0, -1, 1),
)
cases(
    ValueError,
    "in format 999",
    "Update curvlinops",
    lambda: rebuild_operator(999, "TensorLinearOperator", {}),
)
cases(ValueError, "unknown type 'Gone'", "Load it with", lambda: rebuild_operator(1, "Gone", {}))
cases(ValueError, "got 1.5", "n must be an integer, at least 1", lambda: as_integer("n", 1.5, 1))
# ---- _tensors ------------------------------------------------------------------------------------
cases(
    ValueError,
    "got torch.int64",
    "needs floating-point",
    lambda: TensorLinearOperator(torch.ones(2, 2).long()),
)
cases(
    RuntimeError,
    "Cannot invert the dense 2 × 2 operator: it has non-finite",
    "Check",
    TensorLinearOperator(I2 * inf).inverse,
)
cases(
    RuntimeError,
    "damping 0.0 it is singular",
    "Increase the damping",
    TensorLinearOperator(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)).inverse,
)
cases(
    ValueError,
    "Cannot eigendecompose <2×2 .*non-finite",
    "Check",
    TensorLinearOperator(I2 * inf).eigh,
)
cases(NotHermitianError, "Cannot eigendecompose <2×2 .* not Hermitian", "adjoint", ASYMMETRIC.eigh)
cases(
    RuntimeError,
    "overflow torch.float16: .* up to 1.2e",
    "Divide it by a number",
    TensorLinearOperator(torch.full((2, 2), 6e4).half()).eigh,
)


@cases(
    torch.linalg.LinAlgError, "torch.linalg.eigh failed in torch.float64", "Multiply it by a number"
)  # type: ignore[attr-defined]
def no_eigendecomposition() -> None:
    with mock.patch("torch.linalg.eigh", side_effect=RuntimeError("no luck")):
        TensorLinearOperator(I2.double()).eigh()


cases(
    ValueError,
    "smallest eigenvalue is -1.000e",
    "Add a multiple of the identity",
    TensorLinearOperator(-I2).sqrt,
)
cases(
    ValueError,
    "power -0.5 of .* it is singular",
    "Add a multiple of the identity",
    TensorLinearOperator(0 * I2).inverse_sqrt,
)
cases(ValueError, "got 2", "rtol must be between 0 and 1", lambda: TWO.pinv(rtol=2))
cases(ValueError, "Cannot invert <2×3 .*non-finite", "Check", TensorLinearOperator(R23 * inf).pinv)
# ---- operators -----------------------------------------------------------------------------------
cases(ValueError, "got none", "at least one block", lambda: BlockDiagonalLinearOperator([]))
cases(
    RectangularError,
    "BlockDiag",
    "needs a square matrix",
    BlockDiagonalLinearOperator([RECTANGLE, RECTANGLE]).eigh,
)
cases(
    ValueError,
    r"got \[2\]",
    "needs a tensor with two axes",
    lambda: TensorLinearOperator(torch.ones(2)),
)
cases(
    ValueError,
    "got torch.float32 on cpu, torch.float64 on cpu",
    "must share dtype and device",
    lambda: DiagonalLinearOperator([torch.ones(2), torch.ones(2).double()]),
)
cases(
    RuntimeError,
    "damping 0.0 it has zeros",
    "Increase the damping",
    DiagonalLinearOperator([torch.zeros(2)]).inverse,
)
cases(
    NotHermitianError,
    r"Diag\(2\)> is complex",
    "imaginary|real",
    DiagonalLinearOperator([1j * torch.ones(2)]).eigh,
)
cases(
    ValueError,
    r"got \['a', 'a'\]",
    "must be 2 different strings",
    lambda: DiagonalLinearOperator([torch.ones(2), torch.ones(2)], ["a", "a"]),
)
cases(
    ValueError,
    r"got shape \[2\]",
    "Eigenvectors must be 2D",
    lambda: EighDecomposedLinearOperator(torch.ones(2), torch.ones(2)),
)
cases(
    ValueError,
    r"got \[2, 3\]",
    "Eigenvectors must be square",
    lambda: EighDecomposedLinearOperator(torch.ones(2), R23),
)
cases(
    ValueError,
    r"got shape \[2, 2\]",
    "Eigenvalues must be 1D",
    lambda: EighDecomposedLinearOperator(I2, I2),
)
cases(
    ValueError,
    "3 eigenvalues",
    r"for eigenvectors of shape \[2, 2\]",
    lambda: EighDecomposedLinearOperator(torch.ones(3), I2),
)
cases(
    ValueError,
    "eigenvalues of torch.float64, eigenvectors of torch.float32",
    r"\.to\(",
    lambda: EighDecomposedLinearOperator(torch.ones(2).double(), I2),
)
cases(
    ValueError,
    "eigenvalues on meta, eigenvectors on cpu",
    r"\.to\(",
    lambda: EighDecomposedLinearOperator(torch.ones(2, device="meta"), I2),
)
cases(
    RuntimeError,
    "damping 0.0 it has eigenvalues 0",
    "Increase the damping",
    EighDecomposedLinearOperator(torch.zeros(2), I2).inverse,
)
cases(
    NotHermitianError,
    "has complex eigenvalues",
    "Hermitian",
    lambda: EighDecomposedLinearOperator(1j * torch.ones(2), I2 + 0j)._check_real_spectrum(),
)


@cases(pickle.PicklingError, "Cannot save <2×2 .*preconditioner is a function", "Pass an operator")
def save_with_function() -> None:
    pickle.dumps(NeumannInverseLinearOperator(TWO, preconditioner=lambda x: x))


cases(
    NotImplementedError,
    "_SolverInverse",
    "implement _solve",
    lambda: _SolverInverse(TWO) @ torch.ones(2),
)
cases(
    ValueError,
    "got inf",
    "scale must be a finite number",
    lambda: NeumannInverseLinearOperator(TWO, scale=inf),
)
cases(
    ValueError,
    "Detected NaNs after application of term",
    "Decrease the scale",
    lambda: NeumannInverseLinearOperator(TensorLinearOperator(1e30 * I2)) @ torch.ones(2),
)
cases(ValueError, "got none", "at least one factor", KroneckerProductLinearOperator)
cases(
    ValueError,
    r"Kron\(.*\)> has 3",
    "defined for one or two factors",
    lambda: KroneckerProductLinearOperator(I2, I2, I2).inverse(0.1, use_heuristic_damping=True),
)
cases(
    ValueError,
    "got -1.0",
    "needs a damping >= 0",
    lambda: KroneckerProductLinearOperator(I2, I2).inverse(-1.0, use_heuristic_damping=True),
)
cases(
    RuntimeError,
    r"have \[1.0, -1.0\]",
    "non-negative mean eigenvalues",
    lambda: KroneckerProductLinearOperator(I2, -I2).inverse(1.0, use_heuristic_damping=True),
)
cases(
    RectangularError,
    r"Kron\(2×3",
    "needs a square matrix",
    KroneckerProductLinearOperator(R23, I2).eigh,
)
cases(
    ValueError,
    r"got shape \[2\]",
    "must be 2-d tensors",
    lambda: KroneckerProductLinearOperator(torch.ones(2)),
)
cases(
    ValueError,
    "got TensorLinearOperator",
    "must be 2-d tensors, or diagonal",
    lambda: KroneckerProductLinearOperator(TWO),
)
cases(
    ValueError,
    r"got \[3, 2\] and \[3\]",
    r"Eigenvectors \[D, r\] need eigenvalues \[r\]",
    lambda: LowRankLinearOperator(torch.ones(3), R23.T),
)
cases(
    ValueError,
    "got torch.complex64",
    "real",
    lambda: LowRankLinearOperator(1j * torch.ones(2), I2 + 0j),
)
cases(
    ValueError,
    r"Eigenvectors of shape \[2, 2\] .* dimension 3",
    "needs? |must",
    lambda: LowRankLinearOperator(torch.ones(2), I2, [(3,)]),
)
cases(
    RuntimeError,
    "damping 0.0 it has eigenvalues 0",
    "Increase the damping",
    LowRankLinearOperator(torch.ones(1), I2[:, :1]).inverse,
)
cases(ValueError, "got none", "at least one term", lambda: nearest_kronecker([]))
cases(
    ValueError,
    "torch.float32 on cpu, the second ones torch.float64",
    r"\.to\(",
    lambda: nearest_kronecker([(I2, I2.double())]),
)
cases(
    ValueError,
    r"got torch.Size\(\[2, 2\]\), torch.Size\(\[3, 3\]\)|got \[2, 2\], \[3, 3\]",
    "first factors must share their shape",
    lambda: nearest_kronecker([(I2, I2), (I3, I2)]),
)
cases(
    ValueError,
    "first factors have non-finite",
    "Check",
    lambda: nearest_kronecker([(inf * I2, I2)]),
)
cases(
    ValueError,
    "first factors are not all positive semi-definite",
    "which they must be",
    lambda: nearest_kronecker([(I2, I2), (-I2, I2)]),
)
cases(
    ValueError,
    "got float",
    "must be 2-d tensors or diagonal",
    lambda: nearest_kronecker([(1.0, I2)]),
)  # type: ignore[list-item]
cases(ValueError, r"got shape \[2, 3\]", "must be square", lambda: nearest_kronecker([(R23, I2)]))
cases(
    ValueError,
    r"got \[\[3, 3\]\]",
    r"need vectors of shapes \[\.\.\., 2\]",
    lambda: OuterProductLinearOperator(torch.ones(2), I3),
)
cases(
    ValueError,
    "got torch.float32 on cpu, torch.float64 on cpu",
    "must share dtype and device",
    lambda: OuterProductLinearOperator(torch.ones(2), I2.double()),
)
cases(
    NotImplementedError,
    "no closed form of eigh",
    "eigsh",
    OuterProductLinearOperator(torch.ones(2).half(), I2.half()).eigh,
)
cases(
    NotImplementedError,
    "no closed form of power",
    "to_dense",
    OuterProductLinearOperator(1j * torch.ones(2), I2 + 0j).sqrt,
)
cases(
    NotImplementedError,
    "no closed form of diagonal",
    "xdiag",
    SubmatrixLinearOperator(TWO, [0], [1]).diagonal,
)
cases(
    ValueError,
    r"got torch.float32 of shape \[0\]",
    "must be a non-empty list of integers",
    lambda: SubmatrixLinearOperator(TWO, [], [0]),
)
cases(
    ValueError,
    r"row index is out of range for 2 rows, 2",
    "between -2 and 1",
    lambda: SubmatrixLinearOperator(TWO, [2], [0]),
)
cases(
    ValueError,
    r"got \[0\] several times",
    "row indices must not repeat",
    lambda: SubmatrixLinearOperator(TWO, [0, 0], [0]),
)
# ---- kfac_utils ----------------------------------------------------------------------------------
cases(
    ValueError,
    "got torch.float16",
    "must be torch.float32 or torch.float64",
    lambda: Precision(factors=torch.float16),
)
cases(
    ValueError,
    "got torch.int64",
    "must be a floating point dtype",
    lambda: Precision(storage=torch.int64),
)
SHAPES = {"W": (2, 2), "b": (2,)}
GROUP = {"W": "W", "b": "b"}
cases(
    RuntimeError,
    r"Missing: \['b'\]",
    "must contain every parameter exactly once",
    lambda: ToCanonicalLinearOperator(SHAPES, [{"W": "W"}]),
)
cases(
    ValueError,
    "got 2",
    "1 groups need as many layouts",
    lambda: ToCanonicalLinearOperator(SHAPES, [GROUP], layouts=[None, None]),
)
cases(
    ValueError,
    "got {'V': 'W', 'b': 'b'}",
    "roles 'W' and 'b'",
    lambda: ToCanonicalLinearOperator(SHAPES, [{"V": "W", "b": "b"}]),
)
cases(
    ValueError,
    "layout {.*} does not fit",
    "'view' must be a shape",
    lambda: ToCanonicalLinearOperator(SHAPES, [GROUP], layouts=[{"view": [3, 2], "order": [0, 1]}]),
)
cases(
    ValueError,
    r"bias 'b' of shape \[3\]",
    r"must have shape \[2\]",
    lambda: ToCanonicalLinearOperator({"W": (2, 2), "b": (3,)}, [GROUP]),
)
