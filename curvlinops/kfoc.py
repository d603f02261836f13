"""Frobenius-optimal Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from curvlinops._saving import saveable
from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.kfoc import check_accuracy
from curvlinops.computers.kfoc_hooks import HooksKFOCComputer
from curvlinops.computers.kfoc_make_fx import MakeFxKFOCComputer
from curvlinops.kfac import KFACLinearOperator
from curvlinops.kfac_utils import FisherType, KFACType, Precision
from curvlinops.risk.model import ModelFunction


@saveable
class KFOCLinearOperator(KFACLinearOperator):
    r"""Kronecker factors that are optimal in Frobenius norm (KFOC), as the chain P @ B @ Pᵀ.

    Each block of B is the Kronecker product that is nearest to the block of the curvature itself,

    .. math::
        B, A = \arg\min_{B, A} \| M - B \otimes A \|_F, \qquad
        M = c \sum_m \sum_v \mathrm{vec}(G_{m, v}) \mathrm{vec}(G_{m, v})^\top, \qquad
        G_{m, v} = \sum_s g_{m, v, s} a_{m, s}^\top,

    with the gradients :math:`G` of a layer's weight (and bias, if it is joint) when the vector v is
    back-propagated to loss term m. So it is never further from that block than
    :class:`~curvlinops.KFACLinearOperator`. The blocks of biases alone and of normalisation layers,
    which KFAC has no product for, are M. A weight that is used several times has the total
    gradient; between channel groups of a convolution, M is taken for zero.

    With the entries of M reordered, the factors are the leading singular vectors of the map

    .. math::
        R: A \mapsto \sum_k G_k A G_k^\top, \qquad R^\top: B \mapsto \sum_k G_k^\top B G_k

    (Van Loan & Pitsianis, 1993, "Approximation with Kronecker products"). Neither M nor R is
    formed: each pass over the data applies R, or its adjoint, to one matrix for each block, with
    the same Monte-Carlo samples, as in power iteration; the iterates are combined optimally, which
    takes fewer passes (roughly as conjugate gradients compare to steepest descent). The iteration
    starts from the identity. As R and its adjoint keep matrices positive semi-definite, its limit
    is positive semi-definite, also if the largest singular value is degenerate and there are
    several nearest products; it is then the one with the part of the identity in their space.
    Both factors have the same Frobenius norm. If M vanishes, so do they.

    The arguments are those of :class:`~curvlinops.KFACLinearOperator`, and two more by name. Some
    of them mean less:

    - ``fisher_type`` is ``"type-2"`` or ``"mc"``.
    - ``kfac_approx`` is without influence: gradients are always those of all positions.
    - ``loss_terms``: the independent loss terms of an example are always kept apart exactly, also
      for ``"signs"``, and those of Monte-Carlo samples.
    - ``max_factor_size``: a wider factor is a diagonal, and the product the nearest of that kind.
      This holds for the input factors of embeddings, too, which are matrices otherwise.

    There is one pass over the data without back-propagation, to see which layers the model calls;
    then one for each half of an iteration. If the largest singular value is well separated, some 4
    to 20 passes lead to the default accuracy. A pass needs as much memory as one of
    :class:`~curvlinops.EKFACLinearOperator`, and all passes some six copies of the factors.

    Args:
        max_iter: The largest number of iterations, of two passes over the data each. After it,
            there is a warning, and the factors are the best ones so far.
        tol: The iteration has converged if :math:`\|R^\top R A - \sigma^2 A\| \leq \text{tol}\,
            \sigma^2 \|A\|` for each block. The error of the factors is about this, divided by the
            relative distance of :math:`\sigma^2` to the next smaller one. ``None`` means
            :math:`10^{-9}` for float64, and :math:`4 \cdot 10^{-6}` otherwise. It has also
            converged if rounding errors keep a small residual from falling.

    Raises:
        ValueError: If ``fisher_type`` is another one, ``max_iter`` is not positive, or ``tol`` is
            not between 0 and 1.
        NotImplementedError: If parameters are not in supported layers, or are used where the
            backend does not see it.
        RuntimeError: If factors are not finite, symmetric and positive semi-definite, or the model
            calls layers in other ways from one pass to the next.

    Example:
        >>> import torch
        >>> from curvlinops import KFOCLinearOperator
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))]
        >>> params = dict(model.named_parameters())
        >>> K = KFOCLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        >>> B, A = K.factors("0.weight")
        >>> torch.allclose(B.norm(), A.norm())
        True
        >>> gradient = [torch.rand_like(p) for p in params.values()]
        >>> natural_gradient = K.inverse(damping=1e-2) @ gradient
    """

    _BACKENDS: ClassVar[dict[str, type[KFACComputer]]] = {
        "hooks": HooksKFOCComputer,
        "make_fx": MakeFxKFOCComputer,
    }

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: KFACType | str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        backend: str = "hooks",
        *,
        unsupported: str = "raise",
        loss_terms: str = "signs",
        max_factor_size: int = 8192,
        process_group: Any = None,
        worker_fraction: float = 1.0,
        precision: Precision | None = None,
        memory_budget: int | None = None,
        max_iter: int = 100,
        tol: float | None = None,
    ):
        self._accuracy = check_accuracy(max_iter, tol)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar,
            check_deterministic,
            seed,
            fisher_type,
            mc_samples,
            kfac_approx,
            num_per_example_loss_terms,
            separate_weight_and_bias,
            num_data,
            batch_size_fn,
            backend,
            unsupported=unsupported,
            loss_terms=loss_terms,
            max_factor_size=max_factor_size,
            process_group=process_group,
            worker_fraction=worker_fraction,
            precision=precision,
            memory_budget=memory_budget,
        )

    def _compute(self, computer: Any) -> dict[Key, list[Any]]:
        """Search for the factors; return what the blocks of each group are made of."""
        computer.max_iter, computer.tol = self._accuracy
        return super()._compute(computer)
