"""Kronecker-factored approximate curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._saving import saveable
from curvlinops._tensors import is_hermitian
from curvlinops._torch_base import _ChainPyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.computers.kfac_make_fx import MakeFxKFACComputer
from curvlinops.computers.memory import MemoryPlan
from curvlinops.computers.report import check_finite, describe_groups, format_summary
from curvlinops.curvature import CurvatureLinearOperator
from curvlinops.kfac_utils import FisherType, FromCanonicalLinearOperator, KFACType, Precision
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.risk.model import ModelFunction
from curvlinops.sharded import RemoteBlock, ShardedBlockDiagonalLinearOperator


@saveable
class KFACLinearOperator(_ChainPyTorchLinearOperator, CurvatureLinearOperator):
    r"""Kronecker-factored approximation (KFAC) of the GGN or Fisher, as the chain P @ B @ Pᵀ.

    P is the permutation from a canonical form to the parameters, and B is block diagonal with one
    block :math:`B_l \otimes A_l` for the weight of layer :math:`l`, or for weight and bias jointly,
    and :math:`B_l` for a bias alone:

    .. math::
        A_l = \frac{1}{S_\text{total}} \sum_{n, s} a_{n, s} a_{n, s}^\top, \qquad
        B_l = c \sum_m \sum_v \sum_s g_{m, v, s} g_{m, v, s}^\top,

    with the layer's inputs :math:`a` (a 1 appended for a joint bias), and the gradients :math:`g`
    of its outputs when the vectors :math:`v` are back-propagated (Martens & Grosse, 2015,
    "Optimizing neural networks with Kronecker-factored approximate curvature"; Grosse & Martens,
    2016, for convolutions; Eschenhagen et al., 2023, for expand and reduce). Inputs and output
    gradients come with S positions per example that share the weights: pixels, tokens. A layer is a
    function of PyTorch that the model calls with parameters, in a module or not: a linear layer, a
    (transposed) convolution, an embedding, a normalisation, or attention's projections. Channel
    groups have one block each, and normalisations one dense block for weight and bias, which is
    exact; a parameter that is used repeatedly has the positions of all its uses. A weight that
    belongs to an embedding and a linear layer has the Kronecker product nearest to the sum of both.

    The examples of a batch run along the first axis of the model's inputs; where they are inside of
    the model is found by evaluating up to three of them alone. A layer in whose input they are not
    found, or not in their order, is not supported where examples matter: with reduce, in
    normalisations, by EKFAC and KFOC. There, a model that may select rows by what is in them (by
    masks, sorting, computed indices, experts) is evaluated once more for each batch, with the
    examples in reverse. Layers that do not get the same rows in reverse are not supported either.

    Factors are computed once, in the constructor, in one pass over the data, whose predictions
    ``check_deterministic`` compares with those of a pass before. ``P, B, PT = K`` unpacks the
    chain. All closed forms (``trace``, ``det``, ``logdet``, ``frobenius_norm``, ``diagonal``,
    ``inverse``, ``pinv``, ``eigh``, ``power``, ``sqrt``, ``inverse_sqrt``, ``sample``) are those of
    the small factors. So are those of multiples, shifts by δI and inverses of K:
    ``(K + delta * K**0).sample(10, inverse=True)`` draws from the Gaussian of a Laplace
    approximation, see :meth:`PyTorchLinearOperator.sample`. The damping of ``inverse`` may differ
    from block to block: it is a number, a function of the block, a sequence, or a dict keyed by
    parameter name, see :meth:`PyTorchLinearOperator.inverse`.

    The arguments up to ``check_deterministic``, ``num_data`` and ``batch_size_fn`` are those of
    :class:`~curvlinops.CurvatureLinearOperator`.

    Args:
        seed: Fixes all random numbers, together with the index of a loss term in the data.
        fisher_type: Which vectors are back-propagated, see :class:`~curvlinops.FisherType`.
        mc_samples: Number of samples per loss term, for ``fisher_type="mc"``.
        kfac_approx: How positions are treated, see :class:`~curvlinops.KFACType`.
        num_per_example_loss_terms: The number of loss terms per example, which is then checked.
        separate_weight_and_bias: Whether the weight and bias of a layer have separate blocks.
        backend: How factors are gathered: ``"hooks"`` on the layers that an ``nn.Module`` calls, or
            ``"make_fx"``, from a trace of any model for each shape of a batch. The results are the
            same; the first takes less time and memory, the second runs functions, too.
        unsupported: What becomes of parameters that no supported layer uses: ``"raise"`` an error
            that lists them, or a ``"diagonal"`` block, the exact diagonal of the GGN.
        loss_terms: How the independent loss terms of an example (tokens, pixels) are kept apart.
            ``"signs"`` back-propagates all together, for ``"type-2"`` and ``"empirical"`` each
            multiplied by a random sign (samples are independent anyway), which is unbiased, and
            exact where positions do not mix; ``"exact"`` back-propagates one after the other.
        max_factor_size: A wider factor keeps its diagonal only.
        process_group: A ``torch.distributed`` process group, each of whose ranks has a part of the
            data: factors are those of all data. Blocks are decomposed and inverted by one rank
            each. All ranks make the same calls, with the same vectors.
        worker_fraction: With a process group: the fraction of the ranks that hold a block (at least
            one), as KAISA's fraction of gradient workers (Pauloski et al., 2021). 1: each rank has
            all blocks, and multiplies without communication. 0: each block is on one rank, which
            sends what it multiplies to the others. See :func:`curvlinops.sharded.gathered`.
        precision: In which dtypes factors are computed, decomposed and stored, and on which device,
            see :class:`~curvlinops.Precision`.
        memory_budget: Bytes that factors, decompositions and the inputs and gradients of a layer
            may take, besides model and batch. What does not fit into one pass over the data is
            computed in several, after one that looks at the layers; see :meth:`plan`.

    Raises:
        NotImplementedError: If parameters are used in other ways (see ``unsupported``), or the
            backend cannot follow the model: ``"hooks"`` derivatives in the forward pass, and
            ``"make_fx"`` custom autograd functions and hooks.
        RuntimeError: If factors are not finite, symmetric and positive semi-definite.

    Example:
        >>> import torch
        >>> from curvlinops import KFACLinearOperator
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))]
        >>> params = dict(model.named_parameters())
        >>> K = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        >>> gradient = [torch.rand_like(p) for p in params.values()]
        >>> natural_gradient = K.inverse(damping=1e-2, use_heuristic_damping=True) @ gradient
        >>> relative = K.inverse(lambda block: 1e-3 + 1e-3 * block.trace() / block.shape[0])
        >>> S = (K + 1e-2 * K**0).inverse_sqrt()
        >>> noise = S @ [torch.randn_like(p) for p in params.values()]
        >>> [x.shape for x in noise] == [p.shape for p in params.values()]
        True
    """

    _BACKENDS: ClassVar[dict[str, type[KFACComputer]]] = {
        "hooks": HooksKFACComputer,
        "make_fx": MakeFxKFACComputer,
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
    ):
        computer = self._computer_of(backend)(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            seed=seed,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            kfac_approx=kfac_approx,
            num_per_example_loss_terms=num_per_example_loss_terms,
            separate_weight_and_bias=separate_weight_and_bias,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            unsupported=unsupported,
            loss_terms=loss_terms,
            max_factor_size=max_factor_size,
            process_group=process_group,
            worker_fraction=worker_fraction,
            precision=precision,
            memory_budget=memory_budget,
        )
        self._build(computer, self._compute(computer))

    @classmethod
    def plan(cls, *args: Any, backend: str = "hooks", **kwargs: Any) -> MemoryPlan:
        """Return how many bytes the operator takes, by group of parameters, before it is computed.

        The data are looked at once, without back-propagation.

        Args:
            args: As for the operator.
            backend: As for the operator.
            kwargs: As for the operator. With a ``memory_budget``, the plan has its passes.

        Returns:
            The plan; ``print`` it to see a table.

        Raises:
            ValueError: If a single layer does not fit into the budget.

        Example:
            >>> import torch
            >>> from curvlinops import KFACLinearOperator
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
            >>> data = [(torch.rand(4, 20), torch.tensor([0, 1, 0, 1]))]
            >>> params = dict(model.named_parameters())
            >>> args = (model, nn.CrossEntropyLoss(), params, data)
            >>> print(KFACLinearOperator.plan(*args))
            parameters  factors  decompositions   stored  working set  pass
            ----------  -------  --------------  -------  -----------  ----
            0.weight    5.1 KiB         5.1 KiB  5.1 KiB        800 B     1
            0.bias      3.5 KiB         3.5 KiB  3.5 KiB        480 B     1
            2.weight    3.5 KiB         3.5 KiB  3.5 KiB        512 B     1
            2.bias         16 B            16 B     16 B         32 B     1
            stored 12.1 KiB, at most 12.9 KiB meanwhile, in 1 pass
        """
        return cls._computer_of(backend)(*args, **kwargs).memory()

    @classmethod
    def _computer_of(cls, backend: str) -> type[KFACComputer]:
        """Return the type of computer of a backend."""
        if backend not in cls._BACKENDS:
            raise ValueError(f"backend must be one of {sorted(cls._BACKENDS)}, got {backend!r}.")
        return cls._BACKENDS[backend]

    def _compute(self, computer: Any) -> dict[Key, list[Any]]:
        """Pass over the data; return what the blocks of each group are made of."""
        result: dict[Key, list[Any]] = computer.blocks()
        return result

    @classmethod
    def _of(cls, computer: KFACComputer, parts: dict[Key, list[Any]]) -> KFACLinearOperator:
        """Return the operator of what a computer has found already."""
        operator = cls.__new__(cls)
        operator._build(computer, parts)
        return operator

    def _build(self, computer: KFACComputer, parts: dict[Key, list[Any]]) -> None:
        """Set up the operator."""
        plans = computer.plans
        shapes = {name: p.shape for name, p in computer.risk.params.items()}
        device, dtype = computer.like.device, computer.like.dtype
        mapping, layouts = computer.mapping, [plan.layout for plan in plans]
        P = FromCanonicalLinearOperator(shapes, mapping, device, dtype, layouts)
        options = {
            "fisher_type": str(computer.fisher_type),
            "kfac_approx": str(computer.kfac_approx),
        }
        self._assemble(
            [P, self._block_diagonal(computer, parts), P.adjoint()],
            {
                "options": options,
                "groups": describe_groups(plans, computer.risk.model, computer.counts_tokens),
            },
        )

    def _block_diagonal(
        self, computer: KFACComputer, parts: dict[Key, list[Any]]
    ) -> BlockDiagonalLinearOperator:
        """Return B, of which other ranks may hold some blocks."""
        collective, like = computer.collective, computer.like
        with collective.together():
            blocks = [
                self._block(plan.key, parts[plan.key])
                if plan.key in parts
                else RemoteBlock(plan.size, computer.holders(plan.key), like)
                for plan in computer.plans
            ]
        if collective.alone:
            return BlockDiagonalLinearOperator(blocks)
        holders = [computer.holders(plan.key) for plan in computer.plans]
        return ShardedBlockDiagonalLinearOperator(blocks, holders, collective)

    @staticmethod
    def _block(key: Key, pairs: list[Any]) -> PyTorchLinearOperator:
        """Return the block of a group."""
        for B, A in pairs:
            check_finite(key, A, B)
        return join_blocks(
            [KroneckerProductLinearOperator(B, *([] if A is None else [A])) for B, A in pairs]
        )

    def _assemble(self, operators: list[PyTorchLinearOperator], report: dict[str, Any]) -> None:
        """Set up the chain P, B, Pᵀ, and what :meth:`summary` tells."""
        _ChainPyTorchLinearOperator.__init__(self, *operators)
        self._report = report

    def _state(self) -> dict[str, Any]:
        return {"operators": self._operators, "report": self._report}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> KFACLinearOperator:
        operator = cls.__new__(cls)
        operator._assemble(state["operators"], state["report"])
        return operator

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]  # a user may replace factors
        """Whether the operator is its own adjoint, which it is unless factors were replaced."""
        middle = self._operators[1]
        blocks = middle if isinstance(middle, BlockDiagonalLinearOperator) else [middle]
        return all(_is_self_adjoint(block) for block in blocks)

    @property
    def _operator(self) -> _ChainPyTorchLinearOperator:
        """The plain chain P @ B @ Pᵀ."""
        return _ChainPyTorchLinearOperator(*self._operators)

    @property
    def mapping(self) -> list[dict[str, str]]:
        """The groups of parameters (role to name), one for each block of B."""
        return [dict(entry["group"]) for entry in self._report["groups"]]

    def block(self, name: str) -> PyTorchLinearOperator:
        """Return the block of B that a parameter belongs to.

        Args:
            name: The parameter's name.

        Returns:
            The block, in canonical form: the weight as ``[d_out, d_in]``, row-major, with a joint
            bias as last column.
        """
        for group, block in zip(self.mapping, self._operators[1], strict=True):  # type: ignore[call-overload]
            if name in group.values():
                return block
        known = [name for group in self.mapping for name in group.values()]
        raise ValueError(f"There is no parameter {name!r}. Parameters: {known}.")

    def factors(self, name: str) -> list[Any]:
        """Return the Kronecker factors of a parameter's block.

        Args:
            name: The parameter's name.

        Returns:
            The gradient factor, then the input factor, which the block of a bias alone lacks. For a
            weight with several blocks (channel groups), a list of such lists.
        """
        block = self.block(name)
        if isinstance(block, BlockDiagonalLinearOperator):
            return [list(part) for part in block]  # type: ignore[call-overload]
        return list(block)  # type: ignore[call-overload]

    def summary(self) -> str:
        """Return a table of what each parameter got: its layer, factors, and approximations."""
        return format_summary(self._report, list(self._operators[1]))  # type: ignore[call-overload]

    def _formula(self) -> str:
        return type(self).__name__.removesuffix("LinearOperator")


def join_blocks(blocks: Sequence[PyTorchLinearOperator]) -> PyTorchLinearOperator:
    """Return the block of a group, whose parts share one canonical vector."""
    return blocks[0] if len(blocks) == 1 else BlockDiagonalLinearOperator(blocks, flat=True)


def _is_self_adjoint(block: PyTorchLinearOperator) -> bool:
    """Return whether a block is Hermitian; a Kronecker product is if its factors are."""
    if isinstance(block, BlockDiagonalLinearOperator):
        return all(map(_is_self_adjoint, block))
    if not isinstance(block, KroneckerProductLinearOperator):
        return block.SELF_ADJOINT
    return all(is_hermitian(f) if isinstance(f, Tensor) else f.SELF_ADJOINT for f in block)
