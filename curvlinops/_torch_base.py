"""The base class of all linear operators, and the chain of operators."""

from curvlinops._algebra import _ChainPyTorchLinearOperator
from curvlinops._operator import PyTorchLinearOperator, RectangularError, record_gradients
from curvlinops._rules import rule

__all__ = [
    "PyTorchLinearOperator",
    "RectangularError",
    "_ChainPyTorchLinearOperator",
    "record_gradients",
    "rule",
]
