"""EKFAC's eigenvectors and eigenvalues, gathered with hooks."""

from __future__ import annotations

from curvlinops.computers.ekfac import EKFACComputer
from curvlinops.computers.kfac_hooks import HooksKFACComputer


class HooksEKFACComputer(EKFACComputer, HooksKFACComputer):
    """Computes EKFAC's eigenvectors and eigenvalues with hooks on an ``nn.Module``.

    The arguments are those of :class:`~curvlinops.EKFACLinearOperator`.
    """
