"""The diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from curvlinops import _tensors
from curvlinops._saving import saveable
from curvlinops.computers.ggn_diagonal import GGNDiagonalComputer
from curvlinops.curvature import CurvatureLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.risk.model import ModelFunction


@saveable
class GGNDiagonalLinearOperator(DiagonalLinearOperator, CurvatureLinearOperator):
    r"""The diagonal of the generalized Gauss-Newton matrix, exact or Monte-Carlo.

    With the Jacobian :math:`J_m` of loss term :math:`m`'s prediction vector and a root
    :math:`S_m S_m^\top = \nabla_f^2 \ell_m` of the loss Hessian, whose columns are :math:`s_{mv}`,

    .. math::
        \mathrm{diag}(G) = \mathrm{diag}\Big(
            c \sum_m J_m^\top \left( \nabla_f^2 \ell_m \right) J_m
        \Big) = c \sum_m \sum_v \left( J_m^\top s_{mv} \right)^{\odot 2}

    (Dangel et al., 2020, "BackPACK: Packing more into backprop"). ``mc_samples=S`` replaces the
    loss Hessian by its estimate from :math:`S` would-be gradients :math:`g_{ms}`, gradients for
    targets that are drawn from the model's predictive distribution:

    .. math::
        \frac{c}{S} \sum_m \sum_s \left( J_m^\top g_{ms} \right)^{\odot 2}.

    The same ``seed`` gives the same samples as for the other curvature matrices.

    The entries are computed once, in the constructor, in one pass over the data; network and data
    are not kept. For the parameters of supported layers of an ``nn.Module`` (those of
    :class:`~curvlinops.KFACLinearOperator`), and those that are added to activations or multiply
    them, they follow from the inputs of the layers and the gradients of their outputs. For all
    others, gradients of single examples are computed, as where it turns out that examples depend
    on each other. The result is the same. Squares are added up as they come: memory grows neither
    with the number of data nor with that of classes. Sums, products, inverses and so on are
    diagonal operators, and dicts keyed by parameter name remain valid vectors.

    The arguments up to ``batch_size_fn``, and ``process_group``, are those of
    :class:`~curvlinops.CurvatureLinearOperator`. The computed operator keeps no process group: it
    is multiplied without communication.

    Args:
        mc_samples: Number of samples per loss term. 0: the exact diagonal.
        seed: Fixes all random numbers, together with the index of a loss term in the data.
        chunk_size: Number of gradients (of one example for one loss vector) that are held at once,
            where those are computed. Default: as many as have :math:`2^{24}` entries (on a CPU
            :math:`2^{21}`), or one.

    Raises:
        NotImplementedError: If the loss has no closed form of its Hessian's root.
        RuntimeError: If entries are not finite.

    Example:
        >>> import torch
        >>> from curvlinops import GGNDiagonalLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 1))]
        >>> params = dict(model.named_parameters())
        >>> D = GGNDiagonalLinearOperator(model, torch.nn.MSELoss(reduction="sum"), params, data)
        >>> D.diagonal().round(decimals=3)
        tensor([20.,  8.])
        >>> preconditioned = D.inverse(damping=1.0) @ {"weight": torch.ones(1, 2)}
    """

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        mc_samples: int = 0,
        seed: int = 2147483647,
        *,
        chunk_size: int | None = None,
        process_group: Any = None,
    ):
        entries = GGNDiagonalComputer(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            mc_samples=mc_samples,
            seed=seed,
            chunk_size=chunk_size,
            process_group=process_group,
        ).compute()
        for name, values in entries.items():
            if not _tensors.all_finite(values):
                raise RuntimeError(
                    f"The GGN diagonal of {name!r} has non-finite values. Check the data, the "
                    "parameters and the loss for NaN, infinities and overflow."
                )
        super().__init__(list(entries.values()), list(entries))

    def _formula(self) -> str:
        return "GGNDiagonal"
