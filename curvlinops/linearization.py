"""Products with first and second derivatives, in the cheapest mode that a model supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvlinops._formats import Columns
from curvlinops.risk import EmpiricalRisk

Theta = dict[str, Tensor]
Result = TypeVar("Result")

#: Maps parameters to something to differentiate, and an auxiliary tensor.
Function = Callable[[Theta], tuple[Any, Tensor]]
#: Maps a prediction [m, C] and the auxiliary tensor to a symmetric linear map of such predictions.
Middle = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]

# The types of torch do not tell two results from the three with has_aux=True.
jvp: Any = torch.func.jvp
func_vjp: Any = torch.func.vjp
vmap: Any = torch.vmap

#: Numbers of one layer's output, for all columns that are multiplied at once, by default.
_ENTRIES = 2**26


class Differentiator:
    """Differentiates a risk's model, and remembers what is missing for it.

    There are four ways to a derivative, and models that some of them fail for:

    - forward mode, for which operations of PyTorch may have no formula, or a wrong one;
    - differentiating a reverse-mode derivative once more, likewise;
    - ``torch.func``, which cannot transform old-style ``torch.autograd.Function`` and checkpoints:
      then plain autograd replaces it, in reverse mode;
    - several columns at once by ``torch.vmap``: else, one after the other.

    Args:
        risk: The risk whose model is differentiated.
        chunk_size: Number of columns that are multiplied at once. Default: as many as need little
            memory.
    """

    def __init__(self, risk: EmpiricalRisk, chunk_size: int | None = None) -> None:
        self._risk = risk
        self._chunk_size = chunk_size
        self._forward = self._twice = self._functional = self._batched = True
        self._reasons: list[str] = []

    # ---- what operators ask for ----------------------------------------------------------------
    def gramian(
        self, function: Function, theta: Theta, X: Columns, middle: Middle, recording: bool
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

    def second(
        self, gradient: Function, theta: Theta, X: Columns, recording: bool
    ) -> tuple[Columns, Tensor]:
        """Multiply the (symmetric) derivative of a gradient onto K columns.

        Args:
            gradient: Returns the gradient.
            theta: The parameters.
            X: Tensors ``[*N_i, K]``.
            recording: Whether the result shall be differentiable with respect to ``X``.

        Returns:
            Tensors ``[*N_i, K]``, and the auxiliary tensor.
        """
        return self._attempt(partial(self._second, gradient, theta, X, recording))

    def jacobian(
        self, function: Function, theta: Theta, X: Columns, middle: Middle, recording: bool
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
        self, function: Function, theta: Theta
    ) -> tuple[Tensor, Callable[[Tensor], Columns], Tensor]:
        """Return F, the multiplication by Jᵀ, and the auxiliary tensor."""

        def compute() -> Any:
            return self.vjp(function, theta)

        F, pull, aux = self._attempt(compute)
        return F.detach(), lambda u: list(pull(u)[0].values()), aux.detach()

    def kept_gramian(
        self, function: Function, theta: Theta
    ) -> tuple[Tensor, Tensor, Callable[[Theta], Tensor], Callable[[Tensor], Columns]]:
        """Return F, the auxiliary, and products with J and Jᵀ that can be repeated for ever."""

        def compute() -> Any:
            F, pull, push, aux = self._double_reverse(function, theta)
            with torch.no_grad():  # what is missing shows in a product only
                push({name: torch.zeros_like(p) for name, p in theta.items()})
            products = lambda v: push(v)[0], lambda u: list(pull(u)[0].values())
            return F.detach(), aux.detach(), *products

        return self._attempt(compute)

    def kept_second(
        self, gradient: Function, theta: Theta
    ) -> tuple[Callable[[Theta], Columns], Tensor]:
        """Return products with the derivative of a gradient, and the auxiliary tensor."""

        def compute() -> Any:
            _, multiply, aux = self._differentiate(gradient, theta)
            with torch.no_grad():
                multiply({name: torch.zeros_like(p) for name, p in theta.items()})
            return lambda v: list(multiply(v)[0].values()), aux.detach()

        return self._attempt(compute)

    def vjp(self, function: Function, primals: Any) -> Any:
        """Return ``function``'s output, the map from cotangents, and the auxiliary tensor."""
        transform = func_vjp if self._functional else _autograd_vjp
        return transform(function, primals, has_aux=True)

    @property
    def keeping_pays(self) -> bool:
        """Whether products with J are cheaper with a kept graph than with a new forward pass."""
        return not self._risk.likely_traits.convolution

    # ---- strategies ------------------------------------------------------------------------------
    def _gramian(
        self, function: Function, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> tuple[Columns, Tensor, Tensor]:
        one = X[0].shape[-1] == 1
        names = list(theta)
        if self._forward_mode and not one and not (self._double and self.keeping_pays):
            return self._gramian_forward(function, theta, X, middle, recording)
        products: list[Columns] = []
        first, done = _column(names, X, 0), 0
        if self._forward_mode:

            def push_first(theta: Theta) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                F, JV, aux = jvp(function, (theta,), (first,), has_aux=True)
                return F, (JV, aux)

            F, pull, (JV, aux) = func_vjp(push_first, theta, has_aux=True)
            self._check_forward_mode()
            F = F.detach()
            multiply = _graded(middle(F, aux), recording)
            U, done = multiply(JV), 1
            if one:
                with torch.set_grad_enabled(recording):
                    (product,) = pull(U, retain_graph=recording)
                return _stack([product]), F, aux
            self._check_double()
            product, push = func_vjp(lambda u: pull(u)[0], U)
            products = [_stack([product])]
        else:
            F, pull, push, aux = self._double_reverse(function, theta)
            F = F.detach()
            multiply = _graded(middle(F, aux), recording)

        def gram(v: Theta) -> Columns:
            return list(pull(multiply(push(v)[0]))[0].values())

        with torch.set_grad_enabled(recording):
            rest = {n: x[..., done:] for n, x in zip(names, X, strict=True)}
            products.append(self.each(gram, rest))
        return _concatenate(products), F, aux

    def _gramian_forward(
        self, function: Function, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> tuple[Columns, Tensor, Tensor]:
        """Let chunks of columns go through the forward pass together."""
        K, names = X[0].shape[-1], list(theta)
        chunk = self._chunk(K)
        products = []
        for start in range(0, K, chunk):
            V = {n: x[..., start : start + chunk] for n, x in zip(names, X, strict=True)}
            try:
                product, F, aux = self._one_pass(function, theta, V, middle, recording)
            except RuntimeError:
                if chunk == 1:
                    raise
                self._batched = False
                return self._gramian_forward(function, theta, X, middle, recording)
            products.append(product)
        return _concatenate(products), F, aux

    def _one_pass(
        self, function: Function, theta: Theta, V: Theta, middle: Middle, recording: bool
    ) -> tuple[Columns, Tensor, Tensor]:
        """Multiply onto all columns in one forward pass, with J's products in forward mode."""
        names = list(theta)
        columns = list(V.values())
        if columns[0].shape[-1] == 1:
            return self._gramian(function, theta, columns, middle, recording)

        def push(theta: Theta) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            def one(v: Theta) -> Any:
                return jvp(function, (theta,), (v,), has_aux=True)

            F, JV, aux = vmap(one, in_dims=-1, out_dims=(None, 0, None))(V)
            return F, (JV, aux)

        with _quiet():
            F, pull, (JV, aux) = func_vjp(push, theta, has_aux=True)
            self._check_forward_mode()
            F = F.detach()
            multiply = _graded(middle(F, aux), recording)
            with torch.set_grad_enabled(recording):
                U = vmap(multiply)(JV)
                del JV
                product = vmap(lambda u: pull(u)[0])(U)
        return [product[name].movedim(0, -1) for name in names], F, aux

    def _second(
        self, gradient: Function, theta: Theta, X: Columns, recording: bool
    ) -> tuple[Columns, Tensor]:
        names, K = list(theta), X[0].shape[-1]
        # differentiating a convolution twice in reverse mode costs more than it should
        prefer_forward = K == 1 and self._risk.likely_traits.convolution
        if self._forward_mode and (prefer_forward or not self._double):
            products = []
            for k in range(K):
                with torch.set_grad_enabled(recording):
                    v = (_column(names, X, k),)
                    _, product, aux = jvp(gradient, (theta,), v, has_aux=True)
                self._check_forward_mode()
                products.append(_stack([product]))
            self._check_once_differentiable()
            return _concatenate(products), aux
        _, multiply, aux = self._differentiate(gradient, theta)
        with torch.set_grad_enabled(recording):
            if K == 1:
                (product,) = multiply(_column(names, X, 0), retain_graph=recording)
                return _stack([product]), aux
            V = dict(zip(names, X, strict=True))
            return self.each(lambda v: list(multiply(v)[0].values()), V), aux

    def _jacobian(
        self, function: Function, theta: Theta, X: Columns, middle: Middle, recording: bool
    ) -> Tensor:
        names, K = list(theta), X[0].shape[-1]
        with torch.set_grad_enabled(recording):
            if self._forward_mode and (K == 1 or not (self._double and self.keeping_pays)):
                columns = []
                for k in range(K):
                    v = (_column(names, X, k),)
                    F, JV, aux = jvp(function, (theta,), v, has_aux=True)
                    self._check_forward_mode()
                    columns.append(middle(F.detach(), aux.detach())(JV))
                return torch.stack(columns, dim=-1)
            F, _, push, aux = self._double_reverse(function, theta)
            multiply = middle(F.detach(), aux.detach())
            V = dict(zip(names, X, strict=True))
            return self.each(lambda v: [multiply(push(v)[0])], V)[0]

    def _double_reverse(self, function: Function, theta: Theta) -> Any:
        """Return F, u -> Jᵀ u, its transpose v -> J v, and the auxiliary tensor."""
        self._check_twice()
        F, pull, aux = self.vjp(function, theta)
        if self._forward_mode:
            self._check_double()
        self._check_once_differentiable()
        _, push, _ = self.vjp(lambda u: (pull(u)[0], aux), torch.zeros_like(F))
        return F, pull, push, aux

    def _differentiate(self, gradient: Function, theta: Theta) -> Any:
        """Differentiate a gradient in reverse mode."""
        self._check_twice()
        result = self.vjp(gradient, theta)
        self._check_once_differentiable()
        return result

    # ---- several columns ---------------------------------------------------------------------
    def each(self, multiply: Callable[[Any], Columns], V: Any) -> Columns:
        """Multiply onto tensors ``[..., K]``, in chunks of columns; return tensors ``[..., K]``."""
        leaves, structure = tree_flatten(V)
        K = leaves[0].shape[-1]
        chunk = self._chunk(K)
        products: list[Columns] = []
        for start in range(0, K, chunk):
            part = tree_unflatten([x[..., start : start + chunk] for x in leaves], structure)
            if chunk > 1:
                try:
                    with _quiet():
                        product = vmap(multiply, in_dims=-1)(part)
                    products.append([y.movedim(0, -1) for y in product])
                    continue
                except RuntimeError:  # maybe an operation that has no rule for vmap
                    self._batched = False
                    return self.each(multiply, V)
            column = tree_unflatten([x[..., start] for x in leaves], structure)
            products.append([y.to_dense().unsqueeze(-1) for y in multiply(column)])
        return _concatenate(products)

    def _chunk(self, K: int) -> int:
        """Return how many of K columns are multiplied at once."""
        if torch.compiler.is_compiling() or not (self._batched and self._functional):
            return 1
        if self._chunk_size is not None:
            return min(self._chunk_size, K)
        entries = max(sum(p.numel() for p in self._risk.params.values()), 1)
        entries = max(entries, self._risk.likely_traits.entries)
        return max(1, min(K, _ENTRIES // entries))

    # ---- what is missing -------------------------------------------------------------------------
    @property
    def _forward_mode(self) -> bool:
        """Whether forward mode can be used, as far as is known."""
        return self._forward and self._functional and self._risk.forward_mode_ok

    @property
    def _double(self) -> bool:
        """Whether reverse-mode derivatives can be differentiated, as far as is known."""
        return self._twice and not self._risk.likely_traits.once_differentiable

    def _check_double(self) -> None:
        """Start anew if the first look at the model has shown that second derivatives are wrong."""
        if not self._double:
            raise _StartAnew

    def _check_forward_mode(self) -> None:
        """Start anew if the first look at the model has shown that forward mode is wrong."""
        if not self._forward_mode:
            raise _StartAnew

    def _check_once_differentiable(self) -> None:
        """Raise if second derivatives would be wrong."""
        names = self._risk.likely_traits.once_differentiable
        if names:
            raise NotImplementedError(
                f"The model uses {', '.join(sorted(set(names)))}, whose backward is marked with "
                "@once_differentiable: it cannot be differentiated again."
            )

    def _check_twice(self) -> None:
        """Raise if nothing is left to try."""
        if not self._twice:
            bag = self._risk.likely_traits.embedding_bag
            hint = " Replace nn.EmbeddingBag by nn.Embedding and a sum or mean." if bag else ""
            raise NotImplementedError(
                "The model uses operations that PyTorch can differentiate neither in forward mode "
                f"nor twice in reverse mode ({' '.join(self._reasons)}).{hint}"
            )

    def _attempt(self, compute: Callable[[], Result]) -> Result:
        """Compute; after an error that tells what is missing, compute without it."""
        if torch.compiler.is_compiling():
            return compute()
        while True:
            try:
                return compute()
            except _StartAnew:
                continue
            except RuntimeError as error:  # NotImplementedError is one
                if not self._learn(str(error)):
                    raise

    def _learn(self, message: str) -> bool:
        """Remember what an error says is missing; return whether this was news."""
        if "neither in forward mode" in message or "@once_differentiable" in message:
            return False
        if self._functional and any(text in message for text in _NO_FUNC):
            self._functional = False
        elif self._forward_mode and any(text in message for text in _NO_FORWARD):
            self._forward = False
        elif self._twice and any(text in message for text in _NO_DOUBLE):
            self._twice = False
        else:
            return False
        self._reasons.append(message.split("\n")[0].split(". ")[0].removesuffix(".") + ".")
        return True


# How PyTorch words its errors.
_NO_FUNC = ("functorch transforms", "yet support saved tensor hooks", "torch.func")
_NO_FORWARD = ("forward AD", "forward mode AD", "forward-mode AD", "implement the jvp")
_NO_DOUBLE = ("derivative for", "differentiate twice")


class _StartAnew(Exception):  # noqa: N818
    """Something was found out that asks for another strategy."""


def _autograd_vjp(function: Function, primals: Any, has_aux: bool) -> Any:
    """Do what ``torch.func.vjp`` does, by plain autograd."""
    leaves, structure = tree_flatten(primals)
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in leaves]
    with torch.enable_grad():
        output, aux = function(tree_unflatten(leaves, structure))
    outputs, _ = tree_flatten(output)

    def pull(cotangents: Any, retain_graph: bool = True) -> Any:
        pairs = zip(outputs, tree_flatten(cotangents)[0], strict=True)
        kept = [(y, u) for y, u in pairs if y.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in kept],
            leaves,
            [u for _, u in kept],
            retain_graph=retain_graph,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            materialize_grads=True,
        )
        return (tree_unflatten(list(gradients), structure),)

    return output, pull, aux


def _graded(multiply: Callable[[Tensor], Tensor], recording: bool) -> Callable[[Tensor], Tensor]:
    """Let a linear map record a graph only if wanted."""

    def graded(V: Tensor) -> Tensor:
        with torch.set_grad_enabled(recording):
            return multiply(V)

    return graded


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore the warning that an operation is not faster under vmap than in a loop."""
    with catch_warnings():
        filterwarnings("ignore", message="There is a performance drop")
        yield


def _column(names: list[str], X: Columns, k: int) -> Theta:
    """Return column k of tensors ``[*N_i, K]`` as a dict of tensors ``[*N_i]``."""
    return {name: x[..., k] for name, x in zip(names, X, strict=True)}


def _stack(products: list[Theta]) -> Columns:
    """Stack K products, dicts of tensors ``[*N_i]`` (maybe sparse), to tensors ``[*N_i, K]``."""
    return [torch.stack([p[name].to_dense() for p in products], dim=-1) for name in products[0]]


def _concatenate(products: list[Columns]) -> Columns:
    """Concatenate lists of tensors ``[*N_i, K_j]`` along the columns."""
    if len(products) == 1:
        return products[0]
    return [torch.cat(parts, dim=-1) for parts in zip(*products, strict=True)]
