"""Eigenvalue-corrected Kronecker-factored approximate curvature."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._operator import PyTorchLinearOperator
from curvlinops._saving import saveable
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.ekfac_hooks import HooksEKFACComputer
from curvlinops.computers.ekfac_make_fx import MakeFxEKFACComputer
from curvlinops.computers.report import check_eigenvalues
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kfac import KFACLinearOperator, join_blocks
from curvlinops.kronecker import KroneckerProductLinearOperator


@saveable
class EKFACLinearOperator(KFACLinearOperator):
    r"""Eigenvalue-corrected KFAC (EKFAC), as the chain P @ B @ Pᵀ.

    The blocks of B keep the eigenvectors :math:`Q_B \otimes Q_A` of KFAC's, but have the
    eigenvalues that are best for them: the diagonal, in this basis, of the block of the curvature
    itself,

    .. math::
        \lambda = c \sum_m \sum_v (Q_B^\top G_{m, v} Q_A)^{\odot 2}, \qquad
        G_{m, v} = \sum_s g_{m, v, s} a_{m, s}^\top,

    with the gradients :math:`G` of a layer's weight when the vector v is back-propagated to loss
    term m (George et al., 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis"). It is never further from that block in Frobenius norm than KFAC, and trace and
    diagonal in the basis are exact: always for one loss term per example or
    ``loss_terms="exact"``, else in expectation. Gradients are those of all positions also for
    ``kfac_approx="reduce"``, which concerns the eigenvectors only. (Where an input factor of
    reduce has a null space, as with fewer examples than inputs, the eigenvectors in it are
    arbitrary, but the eigenvalues are not zero: then the result depends on rounding errors.)

    The first pass over the data gives the factors, a second one the eigenvalues; it uses the same
    Monte-Carlo samples, so it must see the data in the same order, which ``check_deterministic``
    checks. If the inputs and output gradients of all layers, of all data, take at most
    64 MiB, they are kept, and the second pass does not evaluate the model again. Random signs of
    several loss terms need a second evaluation, and ``memory_budget`` leaves no room for this. All
    arguments are those of :class:`~curvlinops.KFACLinearOperator`.

    Memory of the second pass: besides the basis, the eigenvalues and what a gradient takes, there
    are at most one more copy of the inputs and output gradients of all layers for one batch, in
    weight-sharing format, and about 2²⁰ numbers of gradients of single examples of a layer (or
    those of one example, where they are more). Before it, the largest factor is decomposed: three
    copies of it, besides all factors and the basis. In the first pass, besides KFAC's, there are
    the 64 MiB at most.

    Raises:
        ValueError: If ``fisher_type="forward-only"``, which has no gradients.

    Example:
        >>> import torch
        >>> from curvlinops import EKFACLinearOperator
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))]
        >>> params = dict(model.named_parameters())
        >>> E = EKFACLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        >>> E.block("0.weight").eigenvalues.shape
        torch.Size([6])
        >>> gradient = [torch.rand_like(p) for p in params.values()]
        >>> natural_gradient = E.inverse(damping=1e-2) @ gradient
    """

    _BACKENDS: ClassVar[dict[str, type[KFACComputer]]] = {
        "hooks": HooksEKFACComputer,
        "make_fx": MakeFxEKFACComputer,
    }

    def _compute(self, computer: Any) -> dict[Key, list[Any]]:
        """Pass over the data twice; return what the blocks of each group are made of."""
        result: dict[Key, list[Any]] = computer.decomposed()
        return result

    @staticmethod
    def _block(key: Key, parts: list[Any]) -> PyTorchLinearOperator:
        """Return the block of a group."""
        blocks: list[PyTorchLinearOperator] = []
        for part in parts:
            if isinstance(part, DiagonalLinearOperator):
                blocks.append(part)
                continue
            values, *vectors = part
            check_eigenvalues(key, values)
            blocks.append(_decomposed(values, *vectors))
        return join_blocks(blocks)

    def factors(self, name: str) -> list[Any]:
        """Return the eigenvectors of the Kronecker factors of a parameter's block.

        Args:
            name: The parameter's name.

        Returns:
            Those of the gradient factor, then of the input factor, which the block of a bias alone
            lacks. For a weight with several blocks (channel groups), a list of such lists.
        """
        block = self.block(name)
        if isinstance(block, BlockDiagonalLinearOperator):
            return [_basis(part) for part in block]
        return _basis(block)


def _decomposed(values: Tensor, Q_B: Tensor | None, Q_A: Tensor | None) -> PyTorchLinearOperator:
    """Return a block from eigenvalues ``[d_out(, d_in)]`` and eigenvectors, None for identities."""
    factors = [
        IdentityLinearOperator([[size]], values.device, values.dtype) if Q is None else Q
        for size, Q in zip(values.shape, (Q_B, Q_A), strict=False)
    ]
    return EighDecomposedLinearOperator(values.flatten(), KroneckerProductLinearOperator(*factors))


def _basis(block: Any) -> list[Any]:
    """Return the factors of a block's eigenvectors."""
    return [] if isinstance(block, DiagonalLinearOperator) else list(block.eigenvectors)
