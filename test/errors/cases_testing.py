"""Errors of the conformance kit."""

from __future__ import annotations

import math
from typing import Any

import torch
from error_cases import Cases
from torch import Tensor, nn

from curvlinops import PyTorchLinearOperator, TensorLinearOperator
from curvlinops.testing import check_curvature, check_kfac, check_operator
from curvlinops.testing._curvature_report import Recorder
from curvlinops.testing._kfac_blocks import Complaints
from curvlinops.testing._kfac_report import METHODS, nearest

cases = Cases()

X, Y = torch.rand(4, 3).double(), torch.rand(4, 2).double()
MSE = nn.MSELoss()
TWO = TensorLinearOperator(torch.eye(2))


def record(function: Any) -> None:
    """Let a recorder check a property."""
    recorder = Recorder(1e-3)
    with recorder.property("GGN"):
        function(recorder)


def _wrong(recorder: Recorder) -> None:
    raise ValueError("wrong")


class Asymmetric(PyTorchLinearOperator):
    """An operator that is not its own adjoint, but says so."""

    SELF_ADJOINT = True

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [x.cumsum(0) for x in X]


def curvature(model: nn.Module | None = None, x: Tensor = X, **options: Any) -> Any:
    """Check the curvature of a model."""
    model = nn.Linear(3, 2).double() if model is None else model
    return check_curvature(model, MSE, dict(model.named_parameters()), [(x, Y)], **options)


def kfac(model: nn.Module | None = None, x: Any = X, y: Tensor = Y, **options: Any) -> Any:
    """Check KFAC of a model."""
    model = nn.Linear(3, 2).double() if model is None else model
    return check_kfac(model, MSE, dict(model.named_parameters()), [(x, y)], **options)


class Coupled(nn.Linear):
    """A layer whose prediction of an example depends on the others."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output - output.mean(0)


class Inside(nn.Linear):
    """A layer for inputs with examples along the second axis."""

    def forward(self, input: Any) -> Tensor:
        return super().forward(input["x"].movedim(1, 0))


cases(
    ValueError,
    r"got \[2, 3\]",
    r"dense must have the shape of op, \[2, 2\]",
    lambda: check_operator(TWO, torch.ones(2, 3)),
)
cases(
    AssertionError,
    "<2×2 operator Asymmetric>: adjoint",
    "SELF_ADJOINT needs a Hermitian matrix",
    lambda: check_operator(Asymmetric([(2,)], [(2,)])),
)
cases(
    ValueError, r"Cannot skip \['tea'\]", "choose from", lambda: check_operator(TWO, skip=["tea"])
)
cases(
    ValueError,
    "got 1",
    "num_columns must be at least 2",
    lambda: check_operator(TWO, num_columns=1),
)
cases(ValueError, "got 1", "mc_samples must be at least 64", lambda: curvature(mc_samples=1))
cases(
    ValueError, "params has 8 numbers", "pass a subset of params", lambda: curvature(max_params=3)
)
cases(
    ValueError,
    "Loss or predictions are not finite",
    "Check the data",
    lambda: curvature(x=X * math.nan),
)
cases(ValueError, "kfac_approx", "leave it out", lambda: kfac(kfac_approx="expand"))
cases(
    ValueError, "max_block=3 parameters, .* weight", "increase max_block", lambda: kfac(max_block=3)
)
cases(
    ValueError,
    "predicts something else for an example alone",
    "check_kfac needs models without",
    lambda: kfac(Coupled(3, 2).double()),
)
cases(
    ValueError,
    "No input has its 4 examples along the first axis",
    "Check batch_size_fn",
    lambda: kfac(Inside(3, 2).double(), {"x": X.unsqueeze(0)}, batch_size_fn=lambda x: 4),
)
cases(
    AssertionError,
    "distances are NaN",
    "check model and data",
    lambda: nearest({METHODS[0]: {"distance": math.nan}}),
)
cases(
    AssertionError,
    "^GGN",
    "is not symmetric",
    lambda: record(lambda recorder: recorder.fail("is not symmetric")),
)
cases(AssertionError, "^GGN", "raised ValueError: wrong", lambda: record(_wrong))
cases(
    AssertionError,
    "expand of 'w'",
    "is not exact",
    lambda: Complaints(1e-3).fail("expand", "is not exact", ("w",)),
)
