"""EKFAC's eigenvectors and eigenvalues, gathered from a trace of the model's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers._base import Key, stacked
from curvlinops.computers.eigenvalues import Basis
from curvlinops.computers.ekfac import EKFACComputer
from curvlinops.computers.kfac_make_fx import (
    MakeFxKFACComputer,
    OneBatch,
    batch_function,
    one_batch,
)
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.statistics import Factor
from curvlinops.kfac_utils import FisherType, KFACType, ParamGroup
from curvlinops.risk.model import ModelFunction


class MakeFxEKFACComputer(EKFACComputer, MakeFxKFACComputer):
    """Computes EKFAC's eigenvectors and eigenvalues from a graph of operations, for any model.

    The arguments are those of :class:`~curvlinops.EKFACLinearOperator`. The model, an ``nn.Module``
    or a function ``(params, X) -> prediction``, is traced once for each shape of a batch.

    Raises:
        NotImplementedError: If the derivative of the model is not that of its operations (custom
            autograd functions, hooks on gradients), or it uses transforms of ``torch.func``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = lambda p, X: nn.functional.linear(X, p["W"])
        >>> params = {"W": torch.rand(2, 3)}
        >>> data = [(torch.rand(4, 3), torch.rand(4, 2))]
        >>> computer = MakeFxEKFACComputer(model, nn.MSELoss(), params, data)
        >>> input_eigvecs, gradient_eigvecs, eigenvalues, mapping = computer.compute()
        >>> eigenvalues["W",].shape
        torch.Size([2, 3])
    """


class _OneBatchEKFACComputer(OneBatch, MakeFxEKFACComputer):
    """Computes EKFAC's eigenvalues of one batch in given bases."""

    _bases: dict[Key, list[Basis]]

    def bases(self, part: list[Key] | None = None) -> dict[Key, list[Basis]]:
        """Return the given bases."""
        return self._bases

    def set_bases(self, inputs: dict[Key, Any], gradients: dict[Key, Any]) -> None:
        """Set the bases from eigenvectors, as :meth:`EKFACComputer.compute` returns them."""
        self._bases = {}
        for plan in self.plans:
            num = _num_blocks(plan)
            Q_g = _parts(gradients[plan.key], num)
            Q_a = _parts(inputs.get(plan.key), num)
            self._bases[plan.key] = list(zip(Q_g, Q_a, strict=True))

    def example_bases(self) -> tuple[dict[Key, Any], dict[Key, Any]]:
        """Return identities in place of the eigenvectors of inputs and of gradients."""
        inputs, gradients = {}, {}
        for key, blocks in self.blocks().items():
            gradients[key] = stacked([_identity(B) for B, _ in blocks])
            if self._has_inputs(key):
                inputs[key] = stacked([_identity(A) for _, A in blocks])
        return inputs, gradients


def _num_blocks(plan: GroupPlan) -> int:
    """Return the number of blocks of a group."""
    return len(plan.blocks) * (plan.format.groups if "W" in plan.group else 1)


def _parts(stack: Any, num: int) -> list[Tensor | None]:
    """Return the eigenvectors of each block."""
    if stack is None or num == 1:
        return [stack] * num
    return list(stack)


def _identity(factor: Factor | None) -> Tensor | None:
    """Return the identity of a factor's size; None for a diagonal one."""
    if not isinstance(factor, Tensor):
        return None
    return torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)


def make_compute_ekfac_eigencorrection_batch(
    model_func: ModelFunction,
    loss_func: Callable[[Any, Any], Tensor],
    params: dict[str, Tensor],
    X: Any,
    y: Any,
    fisher_type: FisherType | str = FisherType.MC,
    mc_samples: int = 1,
    kfac_approx: KFACType | str = KFACType.EXPAND,
    separate_weight_and_bias: bool = True,
    **options: Any,
) -> tuple[Callable[..., dict[Key, Any]], list[ParamGroup]]:
    r"""Return a function that computes EKFAC's eigenvalues of a batch, one flat graph.

    The eigenvalues are those of :class:`~curvlinops.EKFACLinearOperator` with this batch as all the
    data, in given bases,

    .. math::
        \lambda = c \sum_m \sum_v (Q_B^\top G_{m, v} Q_A)^{\odot 2}, \qquad
        G_{m, v} = \sum_s g_{m, v, s} a_{m, s}^\top.

    ``torch.compile(fn, fullgraph=True)`` has no graph breaks.

    Args:
        model_func: An ``nn.Module``, or a function ``(params, X) -> prediction``. A module's other
            parameters and buffers are those it has now.
        loss_func: The loss function, with reduction ``"mean"`` or ``"sum"``.
        params: The parameters by name.
        X: Inputs of a batch like those that the function will get.
        y: Targets of the batch.
        fisher_type: Which vectors are back-propagated, see :class:`~curvlinops.FisherType`.
        mc_samples: Number of samples per loss term, for ``fisher_type="mc"``.
        kfac_approx: How positions are treated, see :class:`~curvlinops.KFACType`.
        separate_weight_and_bias: Whether the weight and bias of a layer have separate blocks.
        options: As for :func:`~curvlinops.computers.kfac_make_fx.make_compute_kfac_batch`.

    Returns:
        ``fn`` and the list of groups. ``fn(params, X, y, input_eigvecs, gradient_eigvecs,
        uniforms=None)`` returns the eigenvalues ``[d_out, d_in]`` (``[d_out]`` without input
        factor) by the tuple of a group's names. Eigenvectors and eigenvalues are as
        :meth:`MakeFxEKFACComputer.compute` returns them. The uniforms are as for
        :func:`~curvlinops.computers.kfac_make_fx.make_compute_kfac_batch`: with the same ones as
        the factors, the Monte-Carlo samples are the same.

    Raises:
        NotImplementedError: If parameters are not in supported layers, or what the model computes
            depends on entries of tensors in other ways than by operations.
        ValueError: If ``fisher_type="forward-only"``, which has no gradients; by ``fn``, for
            arguments of other shapes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.computers.kfac_make_fx import make_compute_kfac_batch
        >>> model, loss = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> params = dict(model.named_parameters())
        >>> X, y, uniforms = torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), torch.rand(4, 1)
        >>> arguments = (model, loss, params, X, y)
        >>> factors, _ = make_compute_kfac_batch(*arguments)
        >>> A, B = factors(params, X, y, uniforms.double())
        >>> eigh = torch.linalg.eigh
        >>> eigvecs = [{key: eigh(S).eigenvectors for key, S in D.items()} for D in (A, B)]
        >>> fn, mapping = make_compute_ekfac_eigencorrection_batch(*arguments)
        >>> eigenvalues = fn(params, X, y, *eigvecs, uniforms.double())
        >>> eigenvalues["weight",].shape, eigenvalues["bias",].shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    computer = one_batch(
        _OneBatchEKFACComputer,
        model_func,
        loss_func,
        params,
        X,
        y,
        fisher_type=fisher_type,
        mc_samples=mc_samples,
        kfac_approx=kfac_approx,
        separate_weight_and_bias=separate_weight_and_bias,
        **options,
    )

    def compute(
        params: dict[str, Tensor], X: Any, y: Any, inputs: Any, gradients: Any, uniforms: Any
    ) -> dict[Key, Any]:
        computer.given(params, X, y, uniforms)
        computer.set_bases(inputs, gradients)
        *_, eigenvalues, _ = computer.compute()
        result: dict[Key, Any] = eigenvalues
        return result

    with computer.risk.undisturbed():
        inputs, gradients = computer.example_bases()
    further = [("input_eigvecs", inputs), ("gradient_eigvecs", gradients)]
    call = batch_function(computer, compute, further)

    def fn(
        params: dict[str, Tensor],
        X: Any,
        y: Any,
        input_eigvecs: dict[Key, Any],
        gradient_eigvecs: dict[Key, Any],
        uniforms: Tensor | None = None,
    ) -> dict[Key, Any]:
        """Return the eigenvalues of a batch."""
        result: dict[Key, Any] = call(params, X, y, input_eigvecs, gradient_eigvecs, uniforms)
        return result

    return fn, computer.mapping


__all__ = ["MakeFxEKFACComputer", "make_compute_ekfac_eigencorrection_batch"]
