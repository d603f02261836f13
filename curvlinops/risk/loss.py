r"""What curvature matrices need to know about a loss function: the contract of an entry.

The one place that knows

- which axis of a prediction holds a loss term's :math:`C` entries, and the order of the terms
  (:meth:`Loss.terms`; example-major, so that the terms of one example are consecutive);
- the derivatives of a loss term :math:`\ell_m` with respect to its prediction, roots of its
  Hessian, and how to sample gradients whose second moment is this Hessian;
- what the options of PyTorch's losses (``weight``, ``ignore_index``, ...) do to all of these;
- what a batch adds to the denominator of the reduction ``"mean"`` (:meth:`Loss.normalizer`);
- how to recognise a loss function (:func:`loss_entry`).

An entry never averages. With :math:`V_b` the :meth:`Loss.value` and :math:`n_b` the
:meth:`Loss.normalizer` of batch :math:`b`, the loss is :math:`\sum_b V_b / \sum_b n_b` for the
reduction ``"mean"`` and :math:`\sum_b V_b` for ``"sum"``, for each of PyTorch's losses and options.

In all shapes below, ``m`` is the number of loss terms of a batch and ``C`` the number of entries of
one term's prediction. Nothing of size ``m x C x C`` is formed (unless all columns of a root are
asked for at once), no value is read back from the device, and all methods are pure functions that
``torch.func`` and ``torch.compile`` can transform. Large predictions (a vocabulary) are worked on
in chunks of loss terms: gradients, samples and products need about one tensor of the predictions'
size besides their result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# The types of torch do not tell two results from the three with has_aux=True.
vjp: Any = torch.func.vjp

#: Selects columns of a Hessian root; None selects all of them.
Columns = slice | Tensor | Sequence[int] | None
#: Entries that are worked on at once: a CPU's cache and allocator like small tensors, others do not
#: mind large ones.
CHUNK = {"cpu": 2**18, "other": 2**22}


class Loss:
    r"""What curvature matrices need to know about one loss function with its options.

    Base class of the entries that :func:`~curvlinops.register_loss` takes. An entry implements

    - :meth:`terms` and :meth:`normalizer`, and :meth:`term_values` or :meth:`value`. The Hessian,
      the Gauss-Newton matrix and the empirical Fisher need no more: derivatives are then automatic.
      Implement :meth:`grad` and :meth:`hess_vec` where a formula saves time or memory;
    - :meth:`root_columns` for KFAC of type 2 and the exact diagonal;
    - :meth:`sample` (and :meth:`draws`) for everything Monte-Carlo.

    What is missing raises ``NotImplementedError``, saying what to implement.
    """

    #: Whether derivatives, Hessian roots and samples are available, not only the value.
    closed_form: bool = True
    #: Names of the loss function's options besides the reduction, which are the entry's arguments.
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the loss in error messages."""
        return type(self).__name__

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """Flatten predictions and targets of a batch into loss terms.

        Args:
            f: Predictions in the layout of the loss function.
            y: Targets in the layout of the loss function.

        Returns:
            Predictions ``[m, C]``, differentiable with respect to ``f``, and the targets of the
            same terms, to be passed on to the other methods. An example's terms are consecutive.

        Raises:
            ValueError: If shapes or dtypes do not fit the loss function.
        """
        raise self._missing("flattening into loss terms", "terms")

    def value(self, F: Tensor, targets: Any, n: int) -> Tensor:
        r"""Sum the loss terms, :math:`\sum_m \ell_m`, with all options and without averaging.

        By default, the sum of :meth:`term_values`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            n: Number of examples in the batch.

        Returns:
            Scalar tensor.
        """
        return self.term_values(F, targets).sum()

    def term_values(self, F: Tensor, targets: Any) -> Tensor:
        r"""Evaluate each loss term :math:`\ell_m`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.

        Returns:
            Tensor of shape ``[m]``.
        """
        raise self._missing("values of the loss terms", "term_values")

    def normalizer(self, F: Tensor, targets: Any, n: int) -> Tensor | float:
        """Return what this batch adds to the denominator of the reduction ``"mean"``.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            n: Number of examples in the batch.

        Returns:
            A Python number where it follows from the shapes, else a scalar tensor on ``F``'s
            device, in ``F``'s dtype or float32 if that is wider.
        """
        raise self._missing("normalizer", "normalizer")

    def weight(self, F: Tensor, targets: Any) -> Tensor | None:
        """Return the factor k by which the options scale each loss term's Hessian.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.

        Returns:
            Factors of shape ``[m]``, or ``[m, C]`` where they differ between a term's entries.
            ``None`` if all of them are 1.
        """
        return None

    def grad(self, F: Tensor, targets: Any) -> Tensor:
        r"""Evaluate the gradients :math:`\nabla_f \ell_m`, differentiably.

        By default, by differentiating :meth:`value`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.

        Returns:
            Tensor of shape ``[m, C]``.
        """
        return torch.func.grad(lambda F: self.value(F, targets, F.shape[0]))(F)

    def hess_vec(self, F: Tensor, targets: Any, V: Tensor) -> Tensor:
        r"""Multiply each loss term's Hessian :math:`\nabla_f^2 \ell_m` onto a vector.

        By default, by differentiating :meth:`grad`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            V: Vectors ``[..., m, C]``.

        Returns:
            Tensor of shape ``[..., m, C]``.
        """

        def multiply(F: Tensor, targets: Any, V: Tensor) -> Tensor:
            # Loss terms are independent, so all of their Hessians are one symmetric matrix.
            _, transpose = vjp(lambda F: self.grad(F, targets), F)
            products = [transpose(v)[0] for v in V.reshape(-1, *F.shape)]
            return torch.stack(products).reshape(V.shape) if products else torch.zeros_like(V)

        return self._in_chunks(multiply, F, targets, V, entries=V.numel())

    def root_columns(self, F: Tensor, targets: Any, columns: Columns = None) -> Tensor:
        r"""Evaluate columns of :math:`S_m` with :math:`S_m S_m^\top = \nabla_f^2 \ell_m`.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            columns: Which of the :meth:`num_columns` columns. Default: all.

        Returns:
            Tensor of shape ``[len(columns), m, C]``; it may be an expanded view.
        """
        raise self._missing("Hessian root", "root_columns")

    def num_columns(self, C: int) -> int:
        """Return the number of columns of the Hessian root of a term with ``C`` entries."""
        return C

    def draws(self, C: int) -> int:
        """Return the number of uniforms that one sample of a term with ``C`` entries needs."""
        return C

    def sample(self, F: Tensor, targets: Any, uniforms: Tensor) -> Tensor:
        r"""Transform uniforms into would-be gradients.

        These are gradients of the loss for targets drawn from the model's own predictive
        distribution: they have mean zero and second moment :math:`\nabla_f^2 \ell_m`.
        They are a function of ``F`` and the uniforms alone, evaluated in float64, so that the same
        uniforms give the same samples for each dtype, batching and layout of the terms.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`; only options depend on them.
            uniforms: Float64 numbers in (0, 1) of shape ``[m, S, draws(C)]`` for ``S`` samples.

        Returns:
            Tensor of shape ``[S, m, C]`` in ``F``'s dtype and on its device.

        Raises:
            ValueError: If the uniforms do not have this shape.
        """
        raise self._missing("would-be gradient", "sample")

    def sampled_hess_vec(self, F: Tensor, targets: Any, uniforms: Tensor, V: Tensor) -> Tensor:
        r"""Multiply a Monte-Carlo estimate of each loss term's Hessian onto a vector.

        With the :meth:`sample` :math:`g_s`, this is :math:`\tfrac{1}{S} \sum_s g_s g_s^\top v`.
        Not more than one sample of a few loss terms is formed at once.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            uniforms: Float64 numbers in (0, 1) of shape ``[m, S, draws(C)]`` for ``S`` samples.
            V: Vectors ``[..., m, C]``.

        Returns:
            Tensor of shape ``[..., m, C]`` in ``F``'s dtype.

        Raises:
            ValueError: If the uniforms do not have this shape, or are for no sample.
        """
        num_samples = self._check_uniforms(F, uniforms)
        if num_samples == 0:
            raise ValueError(f"{self.name}: needs at least one sample, got no uniforms.")

        def multiply(F: Tensor, targets: Any, u: Tensor, V: Tensor) -> Tensor:
            total = torch.zeros((), dtype=F.dtype, device=F.device)
            for one in u.split(1):  # [1, m, draws]
                (g,) = self.sample(F, targets, one.transpose(0, 1))
                total = total + outer_vec(g, V)
            return (total / num_samples).to(F.dtype)

        return self._in_chunks(multiply, F, targets, uniforms.transpose(0, 1), V, entries=V.numel())

    def grad_outer_vec(self, F: Tensor, targets: Any, V: Tensor) -> Tensor:
        r"""Multiply each loss term's gradient outer product onto a vector.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`.
            V: Vectors ``[..., m, C]``.

        Returns:
            :math:`\nabla_f \ell_m (\nabla_f \ell_m)^\top v_m`, shape ``[..., m, C]``, in ``F``'s
            dtype.
        """

        def multiply(F: Tensor, targets: Any, V: Tensor) -> Tensor:
            return outer_vec(self.grad(F, targets), V).to(F.dtype)

        return self._in_chunks(multiply, F, targets, V, entries=V.numel())

    def target_rows(self, F: Tensor, targets: Any, rows: slice) -> Any:
        """Select the targets of consecutive loss terms.

        Args:
            F: Predictions ``[m, C]`` from :meth:`terms`.
            targets: Targets from :meth:`terms`. By default each tensor in them, except for scalars,
                has one row per loss term.
            rows: Which loss terms.

        Returns:
            The targets of these terms.

        Raises:
            ValueError: If a tensor in the targets has another number of rows.
        """

        def select(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                return leaf
            if leaf.shape[0] != F.shape[0]:
                raise ValueError(
                    f"{self.name}: cannot select loss terms from a tensor of shape "
                    f"{tuple(leaf.shape)} in the targets of predictions of shape "
                    f"{tuple(F.shape)}. Override the method target_rows."
                )
            return leaf[rows]

        return tree_map(select, targets)

    def _in_chunks(
        self, fn: Callable[..., Tensor], F: Tensor, targets: Any, *tensors: Tensor, entries: int
    ) -> Tensor:
        """Evaluate ``fn(F, targets, *tensors)`` in chunks of loss terms, for small temporaries.

        Args:
            fn: Returns ``[..., m, C]``.
            F: Predictions ``[m, C]``.
            targets: Targets of the loss terms.
            tensors: Tensors ``[..., m, X]``.
            entries: Size of the largest temporary tensor.
        """
        m, chunk = F.shape[0], CHUNK.get(F.device.type, CHUNK["other"])
        rows = max(1, chunk * m // max(1, entries))
        if rows >= m:
            return fn(F, targets, *tensors)
        # In reverse mode, a split is one concatenation, but each of many slices would be a tensor
        # of zeros of the whole size.
        parts = zip(*(t.split(rows, dim=-2) for t in (F, *tensors)), strict=True)
        results = (
            fn(part[0], self.target_rows(F, targets, slice(i * rows, (i + 1) * rows)), *part[1:])
            for i, part in enumerate(parts)
        )
        first = next(results)
        if first.requires_grad or torch.compiler.is_compiling():
            return torch.cat([first, *results], dim=-2)
        # Made from a result, it can hold what torch.func makes of the others.
        whole = first.new_empty(*first.shape[:-2], m, first.shape[-1])
        for i, result in enumerate(itertools.chain([first], results)):
            whole.narrow(-2, i * rows, result.shape[-2]).copy_(result)
        return whole

    def _uniforms(self, F: Tensor, uniforms: Tensor) -> Tensor:
        """Check uniforms ``[m, S, draws]`` and move them to the device of ``F`` ``[m, C]``."""
        self._check_uniforms(F, uniforms)
        return uniforms.to(F.device, torch.float64)

    def _check_uniforms(self, F: Tensor, uniforms: Tensor) -> int:
        """Check uniforms ``[m, S, draws]`` and return S."""
        m, C = F.shape
        draws = self.draws(C)
        if uniforms.ndim != 3 or uniforms.shape[0] != m or uniforms.shape[2] != draws:
            raise ValueError(
                f"{self.name}: uniforms must have shape [{m}, samples, {draws}] for predictions of "
                f"shape {tuple(F.shape)}, got {tuple(uniforms.shape)}."
            )
        return uniforms.shape[1]

    def require_closed_form(self, what: str) -> None:
        """Raise if the loss is known by its value only.

        Args:
            what: What is needed of it, for the message.

        Raises:
            NotImplementedError: If it has no closed forms.
        """
        if not self.closed_form:
            raise self._missing(what)

    def _missing(self, what: str, method: str | None = None) -> NotImplementedError:
        """Build the error for something that this entry does not implement."""
        hint = "" if method is None else f": implement {type(self).__name__}.{method}"
        return NotImplementedError(f"{self.name} has no {what}{hint}.")


#: The losses with closed forms: module class or function -> entry.
LOSSES: dict[Any, type[Loss]] = {}


def outer_vec(g: Tensor, V: Tensor) -> Tensor:
    """Evaluate g gᵀv for ``[m, C]`` and ``[..., m, C]``, in float32 or wider."""
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    return g * (g * V).sum(-1, keepdim=True)


def display_name(loss_func: Any) -> str:
    """Name a loss function in an error message."""
    if isinstance(loss_func, functools.partial):
        return display_name(loss_func.func)
    return getattr(loss_func, "__name__", None) or type(loss_func).__name__


def constant(option: Tensor | None) -> Tensor | None:
    """Detach an option's tensor, as one that autograd may save."""
    if option is None:
        return None
    option = option.detach()
    if not option.is_inference():
        return option
    with torch.inference_mode(False):
        return option.clone()


def column_indices(F: Tensor, columns: Columns, number: int) -> Tensor:
    """Return the selected ones ``[V]`` of a number of columns."""
    indices = torch.arange(number, device=F.device)
    return indices if columns is None else indices[columns]


def unit_vectors(F: Tensor, columns: Columns) -> Tensor:
    """Return the unit vectors ``[V, C]`` of the selected columns."""
    C = F.shape[-1]
    indices = torch.arange(C, device=F.device)
    return (column_indices(F, columns, C).unsqueeze(-1) == indices).to(F.dtype)


def check_floating(name: str, f: Tensor) -> None:
    """Check that predictions are real numbers."""
    if not f.is_floating_point():
        raise ValueError(f"{name}: predictions must be floating point numbers, got {f.dtype}.")
