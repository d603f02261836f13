"""KFOC's factors, gathered with hooks."""

from __future__ import annotations

from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.computers.kfoc import KFOCComputer


class HooksKFOCComputer(KFOCComputer, HooksKFACComputer):
    """Computes the nearest Kronecker products with hooks on an ``nn.Module``.

    The arguments are those of :class:`~curvlinops.KFOCLinearOperator`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.computers.kfoc_hooks import HooksKFOCComputer
        >>> model = nn.Linear(3, 2)
        >>> data = [(torch.rand(4, 3), torch.rand(4, 2))]
        >>> params = dict(model.named_parameters())
        >>> computer = HooksKFOCComputer(model, nn.MSELoss(), params, data)
        >>> inputs, gradients, mapping = computer.compute()
        >>> inputs["weight",].shape, gradients["weight",].shape
        (torch.Size([3, 3]), torch.Size([2, 2]))
    """


__all__ = ["HooksKFOCComputer"]
