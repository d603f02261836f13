"""Curvature matrices of a user's model, checked against plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvlinops.hessian import HessianLinearOperator
from curvlinops.risk.data import to_device
from curvlinops.risk.determinism import preserved_rng
from curvlinops.risk.model import ModelFunction
from curvlinops.testing._curvature_checks import Checker
from curvlinops.testing._curvature_report import CurvatureReport


def check_curvature(
    model_func: ModelFunction,
    loss_func: Callable[[Any, Any], Tensor],
    params: dict[str, Tensor],
    data: Iterable[Any],
    *,
    batch_size_fn: Callable[[Any], int] | None = None,
    rtol: float | None = None,
    mc_samples: int = 512,
    seed: int = 0,
    max_params: int = 1000,
) -> CurvatureReport:
    r"""Check the curvature matrices of your model, loss and data against plain autograd.

    Dense references are made with ``torch.autograd.grad``, row by row: the Jacobian :math:`J` of
    all predictions, the Hessian :math:`\nabla_f^2 L` of your loss with respect to them, and

    .. math::
        H = \nabla_\theta^2 L\,,\quad
        G = J^\top (\nabla_f^2 L) J\,,\quad
        A = (\nabla_\theta \ell_1, \dots, \nabla_\theta \ell_M)^\top\,,\quad
        E = c A^\top A\,,

    where :math:`L = c \sum_m \ell_m` is your loss of all data in one batch. (For a loss with
    reduction ``"mean"`` that is not in the table, the batches' losses are weighted by their numbers
    of examples.) Then, in this order:

    - :class:`~curvlinops.JacobianLinearOperator` and
      :class:`~curvlinops.TransposedJacobianLinearOperator`, :class:`~curvlinops.GGNLinearOperator`,
      :class:`~curvlinops.HessianLinearOperator`, :class:`~curvlinops.EFLinearOperator`,
      :class:`~curvlinops.PerExampleGradientLinearOperator` and
      :class:`~curvlinops.GGNDiagonalLinearOperator` equal these matrices, as matrices and in
      products with one vector;
    - the smallest eigenvalue of the GGN is not negative, if that of :math:`\nabla_f^2 L` is not;
    - the Monte-Carlo GGN is a function of the seed, and the matrix of the documented samples; its
      diagonal is the Monte-Carlo GGN diagonal of the same seed; and it is unbiased: averages of
      :math:`v^\top \hat{G} v` over ``mc_samples`` samples, for random directions, their sums and
      differences (which gives off-diagonal entries), are as close to :math:`v^\top G v` as
      Bernstein's inequality wants. The probability of a false alarm is below :math:`10^{-6}` for
      one seed, whatever the model. For losses that you registered, whose distribution is not known,
      the tolerance is the same number (about 6) of standard errors instead;
    - products with ``keep_graph=True`` are the same, also after the parameters have changed;
    - all of them are the same if each example is a batch, and if all data are one batch (data
      permitting: every tensor must have the examples along its first axis, and model and loss must
      not themselves depend on the batches);
    - parameters, module (values, gradients, ``requires_grad``, hooks, training flags) and global
      random generators are left as they were.

    A loss that is known by its value only has a Hessian and a GGN; that the other matrices refuse
    it, is checked. What cannot be checked is in the report, with the reason.

    Use a small model, or a few of its parameters, in float64: its derivatives agree to 12 digits,
    those of float32 to 4, and small deviations drown. The model is evaluated and differentiated
    about once per parameter and per entry of all predictions. Nothing is printed.

    Args:
        model_func: An ``nn.Module``, or a function ``(params, X) -> prediction``.
        loss_func: A loss function with reduction ``"mean"`` or ``"sum"``.
        params: The parameters by name, as in ``dict(model.named_parameters())``.
        data: Batches ``(X, y)``, as for :class:`~curvlinops.CurvatureLinearOperator`.
        batch_size_fn: Number of examples in an ``X``. Default: ``X.shape[0]``, for tensors only.
        rtol: Largest error, relative to the norm of the result. Default: 1e-8 for float64, 1e-3 for
            float32, 5e-2 for float16, 1e-1 for bfloat16.
        mc_samples: Number of samples for each loss term in the statistical test, at least 64. The
            more, the smaller the deviations that are noticed.
        seed: Fixes samples and vectors.
        max_params: Largest number of parameters, for dense matrices.

    Returns:
        A report of all properties, with errors and tolerances or why they were skipped; its ``str``
        is a table.

    Raises:
        AssertionError: If a property does not hold. The message names the first such property and
            says by how much it fails.
        ValueError: If there are too many parameters, or the loss is not finite; and the errors of
            :class:`~curvlinops.CurvatureLinearOperator` for bad input, of the same types.

    Example:
        >>> import torch
        >>> from curvlinops.testing import check_curvature
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double()
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> X, y = torch.rand(5, 2).double(), torch.tensor([0, 1, 2, 1, 0])
        >>> data = [(X[:2], y[:2]), (X[2:], y[2:])]
        >>> report = check_curvature(model, loss, dict(model.named_parameters()), data)
        >>> [p.name for p in report.checked][:3]
        ['Jacobian: matrix', 'Jacobian: one vector', 'transposed Jacobian: matrix']
        >>> report.skipped
        []
    """
    if mc_samples < 64:
        raise ValueError(f"mc_samples must be at least 64, got {mc_samples}.")
    with preserved_rng(), torch.inference_mode(False):
        # It raises the errors of bad input as they are; data may be shuffled for it.
        risk = HessianLinearOperator(
            model_func, loss_func, params, data, batch_size_fn=batch_size_fn
        ).risk
        _check_size(params, max_params)
        # The same batches, and augmentations if they have any, for everything from here on.
        elements = [(to_device(X, risk.device), to_device(y, risk.device)) for X, y in data]
        checker = Checker(
            model_func, loss_func, params, elements, batch_size_fn, rtol, mc_samples, seed
        )
        checker.run()
    return checker.report


def _check_size(params: dict[str, Tensor], max_params: int) -> None:
    """Raise if there are too many parameters."""
    dim = sum(p.numel() for p in params.values())
    if dim > max_params:
        names = list(params)
        smallest = min(names, key=lambda name: params[name].numel())
        raise ValueError(
            f"params has {dim} numbers, more than max_params={max_params}: the check forms dense "
            "matrices. Use a smaller model of the same kind, or pass a subset of params (the "
            "others are constants then), for instance "
            f"params={{{smallest!r}: params[{smallest!r}]}}, or a larger max_params."
        )
