"""KFOC's factors, gathered from a trace of the model's operations."""

from __future__ import annotations

from curvlinops.computers.kfac_make_fx import MakeFxKFACComputer
from curvlinops.computers.kfoc import KFOCComputer


class MakeFxKFOCComputer(KFOCComputer, MakeFxKFACComputer):
    """Computes the nearest Kronecker products from a graph of operations, for any model.

    The arguments are those of :class:`~curvlinops.KFOCLinearOperator`. The model, an ``nn.Module``
    or a function ``(params, X) -> prediction``, is traced once for each shape of a batch, and the
    trace is used in all passes over the data.

    Raises:
        NotImplementedError: If the derivative of the model is not that of its operations (custom
            autograd functions, hooks on gradients), or it uses transforms of ``torch.func``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = lambda p, X: nn.functional.linear(X, p["W"])
        >>> params = {"W": torch.rand(2, 3)}
        >>> data = [(torch.rand(4, 3), torch.rand(4, 2))]
        >>> computer = MakeFxKFOCComputer(model, nn.MSELoss(), params, data)
        >>> inputs, gradients, mapping = computer.compute()
        >>> inputs["W",].shape, gradients["W",].shape
        (torch.Size([3, 3]), torch.Size([2, 2]))
    """


__all__ = ["MakeFxKFOCComputer"]
