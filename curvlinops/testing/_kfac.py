"""What KFAC, EKFAC and KFOC must do for a user's model, and how near they come otherwise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops.kfac_utils import FisherType
from curvlinops.risk.determinism import preserved_rng
from curvlinops.risk.model import ModelFunction
from curvlinops.testing._kfac_checks import KFACCheck, refuse_large
from curvlinops.testing._kfac_report import KFACReport


def check_kfac(
    model_func: ModelFunction,
    loss_func: Callable[[Any, Any], Tensor],
    params: dict[str, Tensor],
    data: Iterable[Any],
    *,
    batch_size_fn: Callable[[Any], int] | None = None,
    backend: str = "hooks",
    fisher_type: FisherType | str = FisherType.TYPE2,
    separate_weight_and_bias: bool = True,
    rtol: float | None = None,
    seed: int = 2147483647,
    max_block: int = 2048,
    **kfac_options: Any,
) -> KFACReport:
    r"""Check that KFAC, EKFAC and KFOC do on a model what theory says, and measure the rest.

    Use a small version of the network, a handful of data, and float64. Everything is compared with
    dense matrices from autograd, example by example. Nothing is printed, and the model and the
    global random generators are left as found.

    **What must be exact.** A layer multiplies the same weight at S positions (pixels, tokens, calls
    of a shared layer) of each example. Let :math:`a_{n,s}` be its inputs, with a 1 appended for a
    joint bias, and :math:`g_{n,v,s}` its output gradients when a root of the loss Hessian (or what
    ``fisher_type`` says) is back-propagated. With
    :math:`T_{n,s,s'} = c \sum_v g_{n,v,s} g_{n,v,s'}^\top` the block of the exact matrix is

    .. math::
        G = \sum_n \sum_{s, s'} T_{n,s,s'} \otimes a_{n,s} a_{n,s'}^\top,

    and that of KFAC (Martens & Grosse, 2015; Grosse & Martens, 2016; Eschenhagen et al., 2023)

    .. math::
        K_\text{expand} = \sum_{n, s} T_{n,s,s} \otimes
            \frac{1}{\sum_n S_n} \sum_{n,s} a_{n,s} a_{n,s}^\top, \qquad
        K_\text{reduce} = \sum_n \sum_{s,s'} T_{n,s,s'} \otimes
            \frac{1}{N} \sum_n \bar a_n \bar a_n^\top, \quad \bar a_n = \frac1S \sum_s a_{n,s}.

    So the two are equal if

    - *expand*: positions do not mix, :math:`T_{n,s,s'} = 0` for :math:`s \neq s'`, and either the
      :math:`T_{n,s,s}` or the inputs :math:`a_{n,s}` are the same for all data and positions;
    - *reduce*: in each example either the gradients or the inputs are the same at all positions,
      and either :math:`\sum_{s,s'} T_{n,s,s'}` or :math:`\bar a_n` are the same for all data.

    These conditions are evaluated, from derivatives that do not come from KFAC's code, rather than
    guessed from the types of layers. They hold for a single datum or copies of it without weight
    sharing (equal inputs); in deep linear networks with square loss (equal curvature), with as many
    loss terms as positions for expand; and with sum or mean pooling, or for convolutions before
    global pooling, for reduce. If KFAC is exact, so are EKFAC (George et al., 2018) in the basis of
    its factors, and KFOC. The blocks of normalisation layers are exact, and so are those of
    separate biases for reduce and KFOC, and without coupling between positions for expand.

    **The properties**, by their names in error messages:

    =======================  ===================================================================
    ``exact matrix``         products of the dense GGN (for ``"type-2"``), its Monte-Carlo
                             estimate of the same samples (``"mc"``), or the empirical Fisher
    ``groups``               each parameter is in one block, joint ones with their bias
    ``canonical form``       P is a permutation into each block's order of entries
    ``chain``                K = P B Pᵀ, with the blocks that are accessible by name
    ``factors``              symmetric, positive semi-definite
    ``exact block``          where the conditions above hold
    ``definition``           KFAC's factors are those of the formula above, exact or not
    ``EKFAC basis``          orthogonal, and diagonalises KFAC's block
    ``EKFAC trace``          that of G
    ``EKFAC distance``       not further from G than KFAC
    ``EKFAC eigenvalues``    the diagonal of G in the basis, which is Frobenius-optimal
    ``KFOC distance``        not further from G than KFAC
    ``KFOC optimality``      each factor is the best for the other one
    ``diagonal block``       of ``unsupported="diagonal"``: the diagonal of the GGN
    ``batching``             KFAC is the same for other batches of the same data
    ``model untouched``      parameters, gradients, buffers, modes, hooks, and the data
    ``random generators``    of PyTorch, NumPy and Python are not advanced
    =======================  ===================================================================

    G is block diagonal here: what is between the channel groups of a convolution, which all these
    approximations drop, is left out. With several loss terms per example, ``loss_terms="signs"``
    (the default here is ``"exact"``) keeps them apart in expectation only; then what holds in
    expectation only is not required. Parameters that are used in a way that is not followed (a
    weight that is tied to an embedding, or multiplied by other functions than those of layers) are
    not required to be exact or to follow the definition; everything else is.

    Args:
        model_func: The model, see :class:`~curvlinops.KFACLinearOperator`. It must be able to
            predict a single example.
        loss_func: The loss function.
        params: The parameters by name; a subset saves time.
        data: The data. They are read once, and kept.
        batch_size_fn: Counts the examples of an input.
        backend: KFAC's backend.
        fisher_type: Which vectors are back-propagated. ``"forward-only"`` is compared with the GGN,
            and KFOC exists for ``"type-2"`` and ``"mc"`` only.
        separate_weight_and_bias: Whether weights and biases have separate blocks.
        rtol: Largest error, relative to the norm of what is compared. The conditions for exactness
            must hold to a tenth of it. Default: 1e-9 for float64, 1e-4 for float32.
        seed: Fixes all random numbers.
        max_block: The number of parameters of the largest block that is compared as dense matrix.
        kfac_options: More options of :class:`~curvlinops.KFACLinearOperator`, as ``mc_samples``,
            ``loss_terms``, ``unsupported``, ``max_factor_size``.

    Returns:
        A :class:`KFACReport` of the relative Frobenius distance and the cosine between each block
        and the exact one, for expand and reduce, KFAC and EKFAC, and KFOC: ``print`` it, or use its
        ``rows``.

    Raises:
        AssertionError: If a property does not hold. The message names it, the block, and by how
            much it fails.
        ValueError: If blocks are larger than ``max_block``, or the model cannot be evaluated on
            single examples.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from curvlinops.testing import check_kfac
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        >>> data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
        >>> report = check_kfac(model, nn.MSELoss(), dict(model.named_parameters()), data)
        >>> all(row["exact"] for row in report.rows)  # a linear network with square loss
        True
        >>> model.insert(1, nn.Tanh())
        Sequential(...)
        >>> print(check_kfac(model, nn.MSELoss(), dict(model.named_parameters()), data))
        Distances to the blocks of the GGN ...
        parameters  size  S  KFAC expand       ... nearest
        ...
    """
    fisher = FisherType(fisher_type)
    if "kfac_approx" in kfac_options:
        raise ValueError("check_kfac checks both kfac_approx='expand' and 'reduce': leave it out.")
    refuse_large({name: p.numel() for name, p in params.items()}, max_block)
    with preserved_rng():
        data = list(data)
    before = _snapshot(model_func, params, data)
    arguments = {
        "model_func": model_func,
        "loss_func": loss_func,
        "params": params,
        "data": data,
        "batch_size_fn": batch_size_fn,
    }
    options = {
        "backend": backend,
        "separate_weight_and_bias": separate_weight_and_bias,
        "loss_terms": "exact",
        **kfac_options,
    }
    check = KFACCheck(arguments, fisher, rtol, seed, max_block, options)
    report = check.run()
    after = _snapshot(model_func, params, data)
    for what, states in before.items():
        for name, state in states.items():
            if not _same(state, after[what].get(name)):
                check.complaints.fail(what, f"{name} has changed")
    return report


# ---- what must not change ------------------------------------------------------------------------
def _snapshot(model_func: Any, params: dict[str, Tensor], data: list[Any]) -> dict[str, Any]:
    """Return what must stay as it is, by property."""
    state: dict[str, Any] = {f"params[{name!r}]": p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        state[f"the gradient of {name!r}"] = None if p.grad is None else p.grad.clone()
    if isinstance(model_func, nn.Module):
        for name, p in model_func.named_parameters():
            state[f"parameter {name!r}"] = p.detach().clone()
            state[f"requires_grad of {name!r}"] = p.requires_grad
        for name, b in model_func.named_buffers():
            state[f"buffer {name!r}"] = b.detach().clone()
        for name, module in model_func.named_modules():
            state[f"the mode of module {name!r}"] = module.training
            hooks = [v for k, v in vars(module).items() if k.endswith("_hooks")]
            state[f"the hooks of module {name!r}"] = [len(h) for h in hooks if h is not None]
    for i, element in enumerate(data):
        if isinstance(element, (tuple, list)):
            for j, part in enumerate(element):
                if isinstance(part, Tensor):
                    state[f"data[{i}][{j}]"] = part.detach().clone()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # the global one is meant
    generators: dict[str, Any] = {
        "PyTorch's": torch.get_rng_state(),
        "NumPy's": (numpy["state"]["key"].tobytes(), numpy["state"]["pos"]),
        "Python's": random.getstate(),
    }
    return {"model untouched": state, "random generators": generators}


def _same(a: Any, b: Any) -> bool:
    """Return whether states are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num())))
    return bool(a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


__all__ = ["KFACReport", "check_kfac"]
