"""What the computers of Kronecker factors share: arguments, the pass over the data, results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from curvlinops._random import RandomSource
from curvlinops._scalars import as_integer
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.vectors import check_terms, loss_vectors
from curvlinops.kfac_utils import FisherType, KFACType, ParamGroup
from curvlinops.risk import Batch, EmpiricalRisk, Loss, loss_entry
from curvlinops.risk.data import TermCounter
from curvlinops.risk.model import FunctionalModel

__all__ = ["KFACComputer", "ParamGroup"]

Key = tuple[str, ...]
"""The names of a group's parameters."""


class KFACComputer:
    """Computes the Kronecker factors of KFAC.

    The arguments are those of :class:`~curvlinops.KFACLinearOperator`, and described there. A
    subclass implements :meth:`compute`.
    """

    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: dict[str, Tensor],
        data: Any,
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
        *,
        loss_terms: str = "signs",
        max_factor_size: int = 8192,
    ):
        self.fisher_type = FisherType(fisher_type)
        self.kfac_approx = KFACType(kfac_approx)
        mc_samples = as_integer("mc_samples", mc_samples, 1)
        if mc_samples != 1 and self.fisher_type is not FisherType.MC:
            raise ValueError(
                f"mc_samples={mc_samples} has no meaning for the Fisher type "
                f"{str(self.fisher_type)!r}: use fisher_type='mc', or leave mc_samples at 1."
            )
        if num_per_example_loss_terms is not None and num_per_example_loss_terms < 1:
            raise ValueError(
                f"num_per_example_loss_terms must be positive, got {num_per_example_loss_terms}."
            )
        if loss_terms not in ("signs", "exact"):
            raise ValueError(f"loss_terms must be 'signs' or 'exact', got {loss_terms!r}.")
        if max_factor_size < 1:
            raise ValueError(f"max_factor_size must be positive, got {max_factor_size}.")
        self.mc_samples = mc_samples
        self.loss_terms = loss_terms
        self.max_factor_size = max_factor_size
        self.separate_weight_and_bias = separate_weight_and_bias
        self._num_per_example_loss_terms = num_per_example_loss_terms
        self._random = RandomSource(seed)
        self._plans = self._plan(model_func, params)
        self.loss: Loss = loss_entry(loss_func)[0]
        if not self.loss.closed_form:
            raise NotImplementedError(
                f"{self.loss.name} has no closed forms, which KFAC needs: use nn.MSELoss, "
                "nn.CrossEntropyLoss or nn.BCEWithLogitsLoss, or add the loss with register_loss."
            )
        self.risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )

    def _plan(self, model_func: Any, params: Any) -> list[GroupPlan]:
        """Check the parameters, then plan: before any pass over the data."""
        FunctionalModel(model_func, params)
        return self._make_plans(model_func, params)

    def _make_plans(self, model_func: Any, params: dict[str, Tensor]) -> list[GroupPlan]:
        """Return how each group of parameters is treated; refuse what is not supported."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _make_plans.")

    @property
    def mapping(self) -> list[ParamGroup]:
        """The groups of parameters, one for each block."""
        return [dict(plan.group) for plan in self._plans]

    @property
    def plans(self) -> list[GroupPlan]:
        """How each group is treated, in the order of :attr:`mapping`."""
        return list(self._plans)

    def _vectors(
        self, batch: Batch, F: Tensor, targets: Any, counter: TermCounter
    ) -> Iterator[Tensor]:
        """Return the loss vectors ``[m, C]`` to back-propagate for a batch."""
        num_terms, _ = F.shape
        per_example = check_terms(num_terms, batch.n, self._num_per_example_loss_terms)
        return loss_vectors(
            self.loss,
            F.detach(),
            targets,
            fisher_type=self.fisher_type,
            mc_samples=self.mc_samples,
            per_example=per_example,
            loss_terms=self.loss_terms,
            random=self._random,
            first_term=counter.advance(num_terms),
        )

    def compute(self) -> tuple[dict[Key, Any], dict[Key, Any], list[ParamGroup]]:
        """Compute the factors in one pass over the data.

        Returns:
            Input covariances, gradient covariances (dicts keyed by the tuple of a group's parameter
            names; a bias alone has no input covariance), and the list of groups. A covariance is a
            tensor, or a diagonal operator where it is wider than ``max_factor_size``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement compute.")
