"""Products with first and second derivatives, in the cheapest mode that a model supports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvlinops._formats import Columns
from curvlinops.autodiff import (
    Differentiable,
    Theta,
    gradient_of,
    hessian_of,
    linearize,
    linearize_many,
    push_many,
    push_only,
    vjp,
    vmap,
)
from curvlinops.contractions import Contractions
from curvlinops.risk import EmpiricalRisk

Result = TypeVar("Result")

#: Maps a prediction and the auxiliary tensor to a linear map of such predictions.
Middle = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
#: Maps a prediction and the auxiliary tensor to a tensor of the prediction's shape.
Gradient = Callable[[Tensor, Tensor], Tensor]

#: Numbers that a model computes, for all columns that are multiplied at once, by default. A CPU
#: takes no more time for one large column after the other.
_ENTRIES = {"cpu": 2**23, "other": 2**26}


class Differentiator:
    """Differentiates a risk's model, and remembers what is missing for it.

    There are models for which some ways to a derivative fail:

    - forward mode: operations of PyTorch may have no formula, or a wrong one;
    - differentiating a reverse-mode derivative once more: likewise;
    - forward mode of plain autograd, for models that use it themselves: ``torch.func`` nests;
    - several columns at once by ``torch.vmap``: else, one after the other.

    Args:
        risk: The risk whose model is differentiated.
        chunk_size: Number of columns that are multiplied at once. Default: as many as need little
            memory.
    """

    def __init__(self, risk: EmpiricalRisk, chunk_size: int | None = None) -> None:
        self._risk = risk
        self._chunk_size = chunk_size
        self._forward = self._twice = self._batched = True
        self._nested = False
        self._contractions = Contractions()
        self._reasons: list[str] = []

    # ---- what operators ask for ----------------------------------------------------------------
    def gramian(
        self, function: Differentiable, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> tuple[Columns, Tensor, Tensor]:
        """Multiply ``Jᵀ M J`` onto K columns.

        One column takes one forward pass: forward mode runs inside of the reverse mode's graph.
        Further columns share it: with the derivative of ``u -> Jᵀ u``, which is linear in u; or,
        where this is expensive (convolutions), they go through the forward pass together.

        Args:
            function: Returns the prediction F, ``[m, C]``.
            theta: The parameters.
            X: Tensors ``[*N_i, K]``.
            middle: Returns the multiplication by M.
            recording: Whether the result shall be differentiable with respect to ``X``.

        Returns:
            Tensors ``[*N_i, K]``, F, and the auxiliary tensor.
        """
        return self._attempt(partial(self._gramian, function, theta, X, middle, recording))

    def hessian(
        self,
        function: Differentiable,
        theta: Theta,
        X: Columns,
        gradient: Gradient,
        recording: bool,
    ) -> tuple[Columns, Tensor]:
        """Multiply the Hessian of ``ℓ(F)`` onto K columns.

        It is the derivative of the gradient ``Jᵀ ∇ℓ`` in reverse mode. Forward mode is no way:
        many of PyTorch's formulas of tangents are right, but have wrong derivatives (for instance
        that of layer normalisation).

        Args:
            function: Returns the prediction F, ``[m, C]``.
            theta: The parameters.
            X: Tensors ``[*N_i, K]``.
            gradient: Returns ``∇ℓ``, which depends on F where gradients are enabled.
            recording: Whether the result shall be differentiable with respect to ``X``.

        Returns:
            Tensors ``[*N_i, K]``, and the auxiliary tensor.
        """
        return self._attempt(partial(self._hessian, function, theta, X, gradient, recording))

    def jacobian(
        self, function: Differentiable, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> Tensor:
        """Multiply ``R J`` onto K columns.

        Args:
            function: Returns the prediction F.
            theta: The parameters.
            X: Tensors ``[*N_i, K]``.
            middle: Returns the multiplication by R.
            recording: Whether the result shall be differentiable with respect to ``X``.

        Returns:
            Tensor ``[..., K]``.
        """
        return self._attempt(partial(self._jacobian, function, theta, X, middle, recording))

    def pullback(
        self, function: Differentiable, theta: Theta
    ) -> tuple[Tensor, Callable[[Tensor], Columns], Tensor]:
        """Return F, the multiplication by Jᵀ, and the auxiliary tensor."""
        F, pull, aux = vjp(self._contracted(function), theta, self._func)
        return F.detach(), lambda u: list(pull(u).values()), aux.detach()

    def kept_gramian(
        self, function: Differentiable, theta: Theta, middle: Middle
    ) -> tuple[Callable[[Theta], Columns], Tensor, Tensor]:
        """Return the multiplication by ``Jᵀ M J``, which needs no forward pass; F; the auxiliary.

        Raises:
            NotImplementedError: If the model cannot be differentiated twice in reverse mode.
        """

        def compute() -> Any:
            F, pull, push, aux = self._double_reverse(function, theta, only=True)
            self._probe(push, theta)
            multiply = middle(F, aux)
            return lambda v: list(pull(multiply(push(v))).values()), F, aux

        return self._attempt(compute)

    def kept_hessian(
        self, function: Differentiable, theta: Theta, gradient: Gradient
    ) -> tuple[Callable[[Theta], Columns], Tensor]:
        """Return the multiplication by the Hessian of ``ℓ(F)``, and the auxiliary tensor.

        Raises:
            NotImplementedError: If the model cannot be differentiated twice in reverse mode.
        """

        def compute() -> Any:
            multiply, aux = self._double(function, theta, gradient)
            self._probe(multiply, theta)
            return lambda v: list(multiply(v).values()), aux

        return self._attempt(compute)

    @property
    def transposing_pays(self) -> bool:
        """Whether u -> Jᵀ u, differentiated, is a cheap way to products with J."""
        return not (self._func and self._risk.likely_traits.convolution)

    def gradient_of(self, value: Callable[[Tensor], Tensor], F: Tensor) -> Tensor:
        """Return the gradient of a scalar function; it depends on F where gradients are enabled."""
        return gradient_of(value, F, self._func)

    def hessian_of(
        self, value: Callable[[Tensor], Tensor], F: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Return the multiplication by the Hessian of a scalar function at F."""
        return hessian_of(value, F, self._func)

    # ---- strategies ------------------------------------------------------------------------------
    def _gramian(
        self, function: Differentiable, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> tuple[Columns, Tensor, Tensor]:
        names, K = list(theta), X[0].shape[-1]
        if K > 1 and self._forward_mode and not (self._double_ok and self.transposing_pays):
            return self._gramian_forward(function, theta, X, middle, recording)
        products: list[Columns] = []
        if self._forward_mode:
            v = _column(names, X, 0)
            cutting = self._contractions.without_graphs_of_tangents
            with nullcontext() if self._func or recording else cutting():
                F, JV, pull, aux = linearize(self._contracted(function), theta, v, self._func)
            self._check_forward_mode()
            F, JV, aux = F.detach(), JV if recording else JV.detach(), aux.detach()
            with torch.set_grad_enabled(recording):
                multiply = middle(F, aux)
                U = multiply(JV)
                del JV
                if K == 1:
                    return _as_columns(pull(U, retain_graph=recording)), F, aux
            self._check_double()
            product, push = self._transpose(pull, U)
            with torch.set_grad_enabled(recording):
                products = [_as_columns(product)]
        else:
            F, pull, push, aux = self._double_reverse(function, theta)
            with torch.set_grad_enabled(recording):
                multiply = middle(F, aux)

        def gram(v: Theta) -> Columns:
            return list(pull(multiply(push(v))).values())

        with torch.set_grad_enabled(recording):
            rest = {n: x[..., len(products) :] for n, x in zip(names, X, strict=True)}
            products.append(self.each(gram, rest))
        return _concatenate(products), F, aux

    def _gramian_forward(
        self, function: Differentiable, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> tuple[Columns, Tensor, Tensor]:
        """Let chunks of columns go through the forward pass together."""
        names = list(theta)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def gram(V: Theta) -> Columns:
            F, JV, pull, aux = linearize_many(function, theta, V)
            self._check_forward_mode()
            seen["last"] = F, aux = F.detach(), aux.detach()
            U = vmap(middle(F, aux))(JV)
            del JV
            products = pull(U)
            return [products[name].movedim(0, -1) for name in names]

        def gram_one(v: Theta) -> Columns:
            column = [x.unsqueeze(-1) for x in v.values()]
            product, F, aux = self._gramian(function, theta, column, middle, recording)
            seen["last"] = F, aux
            return [y.squeeze(-1) for y in product]

        with torch.set_grad_enabled(recording):
            products = self._in_chunks(gram, gram_one, dict(zip(names, X, strict=True)))
        F, aux = seen["last"]
        return products, F, aux

    def _hessian(
        self,
        function: Differentiable,
        theta: Theta,
        X: Columns,
        gradient: Gradient,
        recording: bool,
    ) -> tuple[Columns, Tensor]:
        names, K = list(theta), X[0].shape[-1]
        multiply, aux = self._double(function, theta, gradient)
        with torch.set_grad_enabled(recording):
            if K == 1:
                return _as_columns(multiply(_column(names, X, 0), retain_graph=recording)), aux
            V = dict(zip(names, X, strict=True))
            return self.each(lambda v: list(multiply(v).values()), V), aux

    def _jacobian(
        self, function: Differentiable, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> Tensor:
        names, K = list(theta), X[0].shape[-1]
        V = dict(zip(names, X, strict=True))
        with torch.set_grad_enabled(recording):
            if self._forward_mode and (K == 1 or not (self._double_ok and self.transposing_pays)):

                def push(V: Theta) -> Columns:
                    F, JV, aux = push_many(function, theta, V)
                    self._check_forward_mode()
                    return [vmap(middle(F.detach(), aux.detach()))(JV).movedim(0, -1)]

                def push_one(v: Theta) -> Columns:
                    F, JV, aux = push_only(self._contracted(function), theta, v, self._func)
                    self._check_forward_mode()
                    return [middle(F.detach(), aux.detach())(JV)]

                return self._in_chunks(push, push_one, V)[0]
            F, _, push_again, aux = self._double_reverse(function, theta)
            multiply = middle(F, aux)
            return self.each(lambda v: [multiply(push_again(v))], V)[0]

    def _double_reverse(self, function: Differentiable, theta: Theta, only: bool = False) -> Any:
        """Return F, u -> Jᵀ u, its transpose v -> J v, and the auxiliary tensor.

        ``only`` says that there is no other way to what is asked for.
        """
        self._check_twice()
        F, pull, aux = vjp(self._contracted(function), theta, self._func)
        if self._forward_mode and not only:
            self._check_double()
        self._check_once_differentiable()
        F, aux = F.detach(), aux.detach()
        _, push = self._transpose(pull, torch.ones_like(F))
        return F, pull, push, aux

    def _transpose(self, pull: Callable[[Tensor], Theta], u: Tensor) -> tuple[Theta, Any]:
        """Return Jᵀ u and the transpose of u -> Jᵀ u."""
        with nullcontext() if self._func else self._contractions.constant_layers():
            product, push, _ = vjp(lambda u: (pull(u), u), u, self._func)
        return product, push

    def _contracted(self, function: Differentiable) -> Differentiable:
        """Return the function with cheap derivatives of its layers."""

        def contracted(theta: Theta) -> tuple[Any, Tensor]:
            with nullcontext() if self._func else self._contractions:
                return function(theta)

        return contracted

    def _double(self, function: Differentiable, theta: Theta, gradient: Gradient) -> Any:
        """Differentiate ``Jᵀ ∇ℓ`` in reverse mode; return the product, and the auxiliary tensor."""
        self._check_twice()

        def evaluate(theta: Theta) -> tuple[Theta, Tensor]:
            F, pull, aux = vjp(self._contracted(function), theta, self._func)
            skipping = self._contractions.without_parameter_gradients  # of which none is needed
            with nullcontext() if self._func else skipping():
                return pull(gradient(F, aux)), aux

        _, multiply, aux = vjp(evaluate, theta, self._func)
        self._check_once_differentiable()
        self._check_third()
        return multiply, aux.detach()

    def _probe(self, multiply: Callable[[Theta], Any], theta: Theta) -> None:
        """Multiply onto zero: what is missing shows in a product only."""
        with torch.no_grad():
            multiply({name: torch.zeros_like(p) for name, p in theta.items()})

    # ---- several columns ---------------------------------------------------------------------
    def each(self, multiply: Callable[[Any], Columns], V: Any) -> Columns:
        """Multiply onto tensors ``[..., K]``, in chunks of columns; return tensors ``[..., K]``."""

        def multiply_many(V: Any) -> Columns:
            return [y.movedim(0, -1) for y in vmap(multiply, in_dims=-1)(V)]

        return self._in_chunks(multiply_many, multiply, V)

    def _in_chunks(
        self, many: Callable[[Any], Columns], one: Callable[[Any], Columns], V: Any
    ) -> Columns:
        """Multiply chunks of columns by ``many``, single columns without their axis by ``one``."""
        leaves, structure = tree_flatten(V)
        K = leaves[0].shape[-1]
        chunk = self._chunk(K)
        products: list[Columns] = []
        for start in range(0, K, chunk):
            part = [x[..., start : start + chunk] for x in leaves]
            if part[0].shape[-1] == 1:
                product = one(tree_unflatten([x[..., 0] for x in part], structure))
                products.append([_dense(y).unsqueeze(-1) for y in product])
                continue
            try:
                with _quiet():
                    products.append(many(tree_unflatten(part, structure)))
            except RuntimeError:  # maybe an operation that has no rule for vmap
                with self._unbatched():
                    return self._in_chunks(many, one, V)
        return _concatenate(products)

    def _chunk(self, K: int) -> int:
        """Return how many of K columns are multiplied at once."""
        if torch.compiler.is_compiling() or not self._batched:
            return 1
        if self._chunk_size is not None:
            return min(self._chunk_size, K)
        entries = max(sum(p.numel() for p in self._risk.params.values()), 1)
        entries = max(entries, self._risk.likely_traits.entries)
        most = _ENTRIES.get(self._risk.device.type, _ENTRIES["other"])
        return max(1, min(K, most // entries))

    @contextmanager
    def _unbatched(self) -> Iterator[None]:
        """Multiply one column after the other, from now on if this succeeds."""
        self._batched = False
        try:
            yield
        except BaseException:
            self._batched = True  # this was not the reason
            raise

    # ---- what is missing -------------------------------------------------------------------------
    @property
    def _forward_mode(self) -> bool:
        """Whether forward mode can be used, as far as is known."""
        return self._forward and self._risk.forward_mode_ok

    @property
    def _func(self) -> bool:
        """Whether ``torch.func`` is used, instead of autograd."""
        return self._nested or torch.compiler.is_compiling()

    @property
    def _double_ok(self) -> bool:
        """Whether reverse-mode derivatives can be differentiated, as far as is known."""
        return self._twice and not self._risk.likely_traits.once_differentiable

    def _check_double(self) -> None:
        """Start anew if the first look at the model has shown that second derivatives are wrong."""
        if not self._double_ok:
            raise _StartAnew

    def _check_forward_mode(self) -> None:
        """Start anew if the first look at the model has shown that forward mode is wrong."""
        if not self._forward_mode:
            raise _StartAnew

    def _check_once_differentiable(self) -> None:
        """Raise if second derivatives would be wrong."""
        names = self._risk.likely_traits.once_differentiable
        if names:
            raise _UnsupportedError(
                f"The model uses {', '.join(sorted(set(names)))}, whose backward is marked with "
                "@once_differentiable: it cannot be differentiated again. Write it without the "
                "decorator, of operations that can."
            )

    def _check_third(self) -> None:
        """Raise if third derivatives would be wrong."""
        names = sorted(set(self._risk.likely_traits.wrong_third))
        if names:
            raise _UnsupportedError(
                f"The model differentiates {', '.join(names)}, whose third derivatives, which the "
                "Hessian needs, PyTorch computes wrongly. Write it of simpler operations, for "
                "instance (x - x.mean()) / x.std(); or use the GGN."
            )

    def _check_twice(self) -> None:
        """Raise if the model cannot be differentiated twice in reverse mode."""
        if not self._twice:
            either = "differentiate" if self._forward_mode else "differentiate in forward mode, nor"
            bag = self._risk.likely_traits.embedding_bag
            hint = "nn.EmbeddingBag by nn.Embedding and a sum or mean" if bag else "them by others"
            raise _UnsupportedError(
                f"The model uses operations that PyTorch cannot {either} twice in reverse mode "
                f"({' '.join(self._reasons)}). Replace {hint}."
            )

    def _attempt(self, compute: Callable[[], Result]) -> Result:
        """Compute; after an error that tells what is missing, compute without it."""
        if torch.compiler.is_compiling():
            return compute()
        while True:
            try:
                with _LOCK:
                    return compute()
            except _StartAnew:
                continue
            except _UnsupportedError:
                raise
            except RuntimeError as error:  # NotImplementedError is one
                if not self._learn(str(error)):
                    raise

    def _learn(self, message: str) -> bool:
        """Remember what an error says is missing; return whether this was news."""
        if not self._nested and "Nested forward mode" in message:
            self._nested = True
            return True
        if self._forward_mode and any(text in message for text in _NO_FORWARD):
            self._forward = False
        elif self._twice and any(text in message for text in _NO_DOUBLE):
            self._twice = False
        else:
            return False
        self._reasons.append(message.split("\n")[0].split(". ")[0].removesuffix(".") + ".")
        return True


# The state of PyTorch's forward mode is that of the process, not of a thread.
_LOCK = threading.RLock()

# How PyTorch words its errors.
_NO_FORWARD = (
    *("forward AD", "forward mode AD", "forward-mode AD", "implement the jvp"),
    "torch.utils.checkpoint: A different",  # it does not recompute tangents
    "_efficientzerotensor",
)
_NO_DOUBLE = ("derivative for", "differentiate twice")


class _UnsupportedError(NotImplementedError):
    """PyTorch cannot differentiate the model as it is needed."""


class _StartAnew(Exception):  # noqa: N818
    """Something was found out that asks for another strategy."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore the warning that an operation is not faster under vmap than in a loop."""
    with catch_warnings():
        filterwarnings("ignore", message="There is a performance drop")
        yield


def _column(names: list[str], X: Columns, k: int) -> Theta:
    """Return column k of tensors ``[*N_i, K]`` as a dict of tensors ``[*N_i]``."""
    return {name: x[..., k] for name, x in zip(names, X, strict=True)}


def _as_columns(product: Theta) -> Columns:
    """Return a product, a dict of tensors ``[*N_i]`` (maybe sparse), as tensors ``[*N_i, 1]``."""
    return [_dense(y).unsqueeze(-1) for y in product.values()]


def _dense(y: Tensor) -> Tensor:
    """Return a gradient as a dense tensor."""
    if y.is_sparse and torch.is_grad_enabled():
        raise NotImplementedError(  # PyTorch would take its derivative for zero
            "Products cannot be differentiated through sparse gradients: use "
            "nn.Embedding(..., sparse=False)."
        )
    return y.to_dense()


def _concatenate(products: list[Columns]) -> Columns:
    """Concatenate lists of tensors ``[*N_i, K_j]`` along the columns, which stay contiguous."""
    if len(products) == 1:
        return products[0]
    parts = zip(*products, strict=True)
    return [torch.cat([x.movedim(-1, 0) for x in p]).movedim(0, -1) for p in parts]
