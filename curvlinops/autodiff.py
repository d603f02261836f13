"""First derivatives of a function of parameters, as linear maps: by autograd, or by torch.func.

Plain autograd takes less time, and runs whatever the user can train. ``torch.func`` can be compiled
and nested, and pushes several tangents at once. Both have the same interface here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

Theta = dict[str, Tensor]
#: Maps parameters to something to differentiate, and an auxiliary tensor.
Differentiable = Callable[[Any], tuple[Any, Tensor]]

# The types of torch do not tell two results from the three with has_aux=True.
func_jvp: Any = torch.func.jvp
func_vjp: Any = torch.func.vjp
vmap: Any = torch.vmap


def vjp(function: Differentiable, primals: Any, func: bool = False) -> tuple[Any, Any, Tensor]:
    """Return a function's output, its map u -> Jᵀ u, and the auxiliary tensor.

    Args:
        function: The function.
        primals: Tensors in nested dicts; the output depends on them, also if they depend on others.
        func: Whether to use ``torch.func``.

    Returns:
        The output; the map, with an argument ``retain_graph=True`` and a result that can be
        differentiated where gradients are enabled; the auxiliary tensor.
    """
    if func:
        output, pull, aux = func_vjp(function, primals, has_aux=True)
        return output, lambda u, retain_graph=True: pull(u, retain_graph=retain_graph)[0], aux
    leaves, structure = tree_flatten(primals)
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in leaves]
    with torch.enable_grad():
        output, aux = function(tree_unflatten(leaves, structure))
    return output, _puller(output, leaves, structure), aux


def linearize(
    function: Differentiable, theta: Theta, v: Theta, func: bool = False
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Return a function's output F, J v, the map u -> Jᵀ u, and the auxiliary tensor.

    It takes one evaluation: forward mode runs inside of the reverse mode's graph.

    Args:
        function: The function.
        theta: The parameters.
        v: A tangent.
        func: Whether to use ``torch.func``.
    """
    if func:

        def push(theta: Theta) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            F, JV, aux = func_jvp(function, (theta,), (v,), has_aux=True)
            return F, (JV, aux)

        F, pull, (JV, aux) = func_vjp(push, theta, has_aux=True)
        return F, JV, lambda u, retain_graph=True: pull(u, retain_graph=retain_graph)[0], aux
    leaves, structure = tree_flatten(theta)
    leaves = [x.detach().requires_grad_() for x in leaves]
    with torch.enable_grad():
        F, JV, aux = _push(function, tree_unflatten(leaves, structure), v)
    return F, JV, _puller(F, leaves, structure), aux


def push_only(
    function: Differentiable, theta: Theta, v: Theta, func: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a function's output F, J v, and the auxiliary tensor, without a graph."""
    if func:
        F, JV, aux = func_jvp(function, (theta,), (v,), has_aux=True)
        return F, JV, aux
    with torch.enable_grad():  # for functions that differentiate something themselves
        return _push(function, theta, v)


def push_many(function: Differentiable, theta: Theta, V: Theta) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`push_only` does, by ``torch.func``, for K tangents ``[*N_i, K]`` at once.

    Returns:
        F, the products ``[K, *F.shape]``, and the auxiliary tensor.
    """

    def one(v: Theta) -> Any:
        return func_jvp(function, (theta,), (v,), has_aux=True)

    F, JV, aux = vmap(one, in_dims=-1, out_dims=(None, 0, None))(V)
    return F, JV, aux


def linearize_many(
    function: Differentiable, theta: Theta, V: Theta
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Do what :func:`linearize` does, by ``torch.func``, for K tangents ``[*N_i, K]`` at once.

    Returns:
        F, the products ``[K, *F.shape]``, the map of K cotangents (stacked likewise) to the
        products ``[K, *N_i]``, and the auxiliary tensor.
    """

    def push(theta: Theta) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        F, JV, aux = push_many(function, theta, V)
        return F, (JV, aux)

    F, pull, (JV, aux) = func_vjp(push, theta, has_aux=True)
    return F, JV, vmap(lambda u: pull(u)[0]), aux


def gradient_of(value: Callable[[Tensor], Tensor], F: Tensor, func: bool = False) -> Tensor:
    """Return the gradient of a scalar function; it depends on F where gradients are enabled."""
    if func:
        differentiated: Callable[[Tensor], Tensor] = torch.func.grad(value)
        return differentiated(F)
    F = F if F.requires_grad else F.detach().requires_grad_()
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(
            value(F), F, create_graph=recording, materialize_grads=True
        )
    return gradient


def hessian_of(
    value: Callable[[Tensor], Tensor], F: Tensor, func: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the multiplication by the Hessian of a scalar function at F."""
    with torch.enable_grad():
        _, multiply, _ = vjp(lambda f: (gradient_of(value, f, func), f), F, func)
    return lambda V: multiply(V)


def _push(function: Differentiable, theta: Theta, v: Theta) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate a function and J v in forward mode."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, v[name]) for name, p in theta.items()}
        output, aux = function(duals)
        F, JV = forward_ad.unpack_dual(output)
        aux = forward_ad.unpack_dual(aux).primal
    return F, torch.zeros_like(F) if JV is None else JV, aux


def _puller(output: Any, leaves: list[Tensor], structure: Any) -> Any:
    """Return the map from cotangents of outputs to those of leaves."""
    outputs, _ = tree_flatten(output)

    def pull(cotangents: Any, retain_graph: bool = True) -> Any:
        pairs = zip(outputs, tree_flatten(cotangents)[0], strict=True)
        kept = [(y, u) for y, u in pairs if y.requires_grad]
        if not kept:  # the function is constant
            return tree_unflatten([torch.zeros_like(x) for x in leaves], structure)
        gradients = torch.autograd.grad(
            [y for y, _ in kept],
            leaves,
            [u for _, u in kept],
            retain_graph=retain_graph,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            materialize_grads=True,
        )
        return tree_unflatten(list(gradients), structure)

    return pull
