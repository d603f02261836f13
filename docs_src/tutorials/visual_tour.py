# ruff: noqa: D205, D212, D415 - a title starts the page
r"""
A visual tour of curvature matrices
===================================

What does a Hessian look like, and what do its approximations keep of it? This page draws all
matrices of curvlinops for one small network: the Hessian, the Gauss-Newton matrix (GGN), two kinds
of Fisher matrix, and KFAC, EKFAC and KFOC. Then it measures how far they are apart, inverts them,
and compares their eigenvalues. Along the way it checks what theory promises.

What the formulas are, and why, is derived in :doc:`/tutorials/kfac_from_scratch`.
"""

# %%
# The network
# -----------
#
# Handwritten digits from scikit-learn, averaged down to 4 × 4 pixels, are the input of a network
# with 137 parameters, few enough to draw every entry of a matrix. It learns to tell the digits
# 0 to 4 apart. We stop early: when all examples are fitted, curvature is nearly zero.

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import FuncNorm
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)

torch.set_num_threads(1)  # matrices this small are multiplied fastest by one thread
torch.manual_seed(0)

images, labels = load_digits(n_class=5, return_X_y=True)
X = F.avg_pool2d(torch.as_tensor(images).reshape(-1, 8, 8) / 16, 2).flatten(1)[:400]
y = torch.as_tensor(labels)[:400]

model = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5)).double()
loss_func = nn.CrossEntropyLoss()
for _ in range(60):
    gradients = torch.autograd.grad(loss_func(model(X), y), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.data -= gradient

params = dict(model.named_parameters())
correct = (model(X).argmax(dim=1) == y).double().mean()
print({name: tuple(p.shape) for name, p in params.items()})
print(f"loss {loss_func(model(X), y):.2f}, {correct:.0%} of the digits are classified correctly")

# %%
# All matrices
# ------------
#
# Every operator takes the same arguments. ``to_dense()`` writes the matrix down, which is only for
# networks as small as this. KFAC and its relatives have one block for each layer, with weight and
# bias together; ``fisher_type="type-2"`` means that they approximate the GGN itself rather than a
# Monte-Carlo estimate.

arguments = (model, loss_func, params, [(X, y)])
options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
operators = {
    "Hessian": HessianLinearOperator(*arguments),
    "GGN": GGNLinearOperator(*arguments),
    "Fisher, 1 sample": GGNLinearOperator(*arguments, mc_samples=1),
    "empirical Fisher": EFLinearOperator(*arguments),
    "KFAC": KFACLinearOperator(*arguments, **options),
    "EKFAC": EKFACLinearOperator(*arguments, **options),
    "KFOC": KFOCLinearOperator(*arguments, **options),
}
dense = {name: operator.to_dense().detach() for name, operator in operators.items()}

# %%
# The approximations with Kronecker products aim at the diagonal blocks of the GGN, so we cut these
# out, too. The two layers own the first 102 and the last 35 parameters.

sizes = [p.numel() for p in params.values()]
layers = [slice(0, sizes[0] + sizes[1]), slice(sizes[0] + sizes[1], sum(sizes))]
blocks = torch.zeros_like(dense["GGN"])
for layer in layers:
    blocks[layer, layer] = dense["GGN"][layer, layer]
dense["GGN, blocks only"] = blocks


def draw(matrices: dict[str, Tensor], columns: int) -> None:
    """Draw matrices in the same colours, with lines between parameters."""
    rows = len(matrices) // columns
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns + 0.9, 3.1 * rows), layout="constrained"
    )
    # Colours follow a root of an entry, so that small ones are visible, too. The few largest
    # entries, those of biases, share the darkest colour.
    limit = 0.4 * max(matrix.abs().max().item() for matrix in matrices.values())
    root = (lambda x: np.sign(x) * np.abs(x) ** 0.4, lambda x: np.sign(x) * np.abs(x) ** 2.5)
    norm = FuncNorm(root, vmin=-limit, vmax=limit)
    ends = np.cumsum(sizes)
    for axis, (name, matrix) in zip(axes.flat, matrices.items(), strict=True):
        image = axis.imshow(matrix.numpy(), cmap="RdBu_r", norm=norm)
        for end in ends[:-1] - 0.5:
            axis.axhline(end, color="black", linewidth=0.5)
            axis.axvline(end, color="black", linewidth=0.5)
        axis.set(title=name, xticks=[], yticks=[])
    middles, names = ends - np.array(sizes) / 2, ["W₁", "b₁", "W₂", "b₂"]
    for axis in axes[:, 0]:
        axis.set_yticks(middles, names)
    for axis in axes[-1]:
        axis.set_xticks(middles, names)
    for axis in axes.flat:
        axis.tick_params(length=0)
    ticks = limit * np.array([-1, -0.3, -0.03, 0, 0.03, 0.3, 1])
    figure.colorbar(image, ax=axes, shrink=0.7, extend="both", ticks=ticks, format="%.2g")
    plt.show()


exact = ["Hessian", "GGN", "Fisher, 1 sample", "empirical Fisher"]
kronecker = ["KFAC", "EKFAC", "KFOC"]
draw({name: dense[name] for name in [*exact, "GGN, blocks only", *kronecker]}, columns=4)

# %%
# What one sees, from left to right and from top to bottom:
#
# - The **Hessian** and the **GGN** look alike. They differ most where the two layers meet: the
#   Hessian contains second derivatives of the network there, the GGN does not.
# - The block of :math:`W_1` consists of 6 × 6 squares, one for each pair of hidden units, and all
#   squares have the same pattern: pixels that are bright together. That is a Kronecker product to
#   the eye.
# - One sample per example gives a **Fisher** matrix that is close to the GGN. The **empirical
#   Fisher** uses the labels of the data instead of sampled ones, and looks different.
# - **KFAC**, **EKFAC** and **KFOC** drop what couples the layers. Within a block they keep the
#   pattern, and make it the same in every square (EKFAC a little less so).
#
# How far apart they are
# ----------------------
#
# The eye is easily pleased, so we measure: the distance of each matrix to the GGN, relative to the
# GGN, in Frobenius norm, for each layer's block.


def distance(A: Tensor, B: Tensor) -> float:
    """Return the distance of A to B, relative to B, in Frobenius norm."""
    return ((A - B).norm() / B.norm()).item()


GGN = dense["GGN"]
compared = ["Hessian", "Fisher, 1 sample", "empirical Fisher", *kronecker]
errors = {
    name: [distance(dense[name][layer, layer], GGN[layer, layer]) for layer in layers]
    for name in compared
}

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for shift, color, layer_name, index in ((-0.2, "C0", "layer 1", 0), (0.2, "C1", "layer 2", 1)):
    heights = [errors[name][index] for name in compared]
    bars = axis.bar(np.arange(len(compared)) + shift, heights, 0.38, label=layer_name, color=color)
    axis.bar_label(bars, fmt="%.2f", fontsize=8)
axis.set_xticks(range(len(compared)), [name.replace(" ", "\n", 1) for name in compared])
axis.set(ylabel="distance to the GGN's block")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %%
# Some of it is no accident. **EKFAC** has the eigenvectors of KFAC and the best eigenvalues that go
# with them, and **KFOC** is the Kronecker product nearest to the block. So neither can be further
# away than KFAC. (Between the two, either may win.) EKFAC also has the trace of the GGN. And the
# Hessian's block of the last layer *is* that of the GGN, because the network is linear in that
# layer's parameters.

for index in range(len(layers)):
    assert errors["EKFAC"][index] <= errors["KFAC"][index]
    assert errors["KFOC"][index] <= errors["KFAC"][index]
torch.testing.assert_close(operators["EKFAC"].trace(), GGN.trace())
assert errors["Hessian"][1] < 1e-10

# %%
# Nor is the difference between sampled and empirical Fisher: more samples bring the first one
# nearer to the GGN, the second one has nothing to sample.

for mc_samples in (1, 10, 100):
    F_mc = GGNLinearOperator(*arguments, mc_samples=mc_samples).to_dense()
    print(f"{mc_samples:>4} samples: distance {distance(F_mc, GGN):.3f}")
assert distance(F_mc, GGN) < 0.5 * errors["Fisher, 1 sample"][0]

# %%
# Inverses
# --------
#
# Most methods need an inverse: optimizers, Laplace approximations, influence functions. With the
# damping :math:`\delta`, we invert :math:`\text{GGN} + \delta I` as a dense matrix, and its
# approximations by ``inverse``, which only touches small factors.

delta = 1e-2
damping = delta * torch.eye(len(GGN), dtype=GGN.dtype)
inverses = {
    name: torch.linalg.inv(dense[name] + damping)
    for name in ("GGN", "GGN, blocks only", "empirical Fisher")
}
for name in kronecker:
    exactly = {} if name == "EKFAC" else {"use_exact_damping": True}
    inverses[name] = operators[name].inverse(damping=delta, **exactly).to_dense()
    torch.testing.assert_close(inverses[name], torch.linalg.inv(dense[name] + damping))

draw(inverses, columns=3)

# %%
# Where the curvature is large, the inverse is small. What dominates it are directions in which the
# data say little. There it is :math:`1/\delta`, which is the dark diagonal.
#
# A step
# ------
#
# What is an inverse worth? Let us walk from the parameters along
# :math:`-(\text{M} + \delta I)^{-1} \nabla L`, for several matrices M, and look at the loss on the
# way.

_, gradient = operators["GGN"].risk.loss_and_gradient()
gradient = torch.cat([piece.flatten() for piece in gradient])
directions = {"gradient": gradient}
directions |= {name: inverses[name] @ gradient for name in ("GGN", *kronecker)}


def loss_at(step: Tensor) -> float:
    """Return the loss after a step from the parameters."""
    pieces = step.split(sizes)
    moved = {name: p + s.view_as(p) for (name, p), s in zip(params.items(), pieces, strict=True)}
    with torch.no_grad():
        return loss_func(functional_call(model, moved, (X,)), y).item()


colors = {"gradient": "grey", "Hessian": "C3", "GGN": "black", "empirical Fisher": "C4"}
colors |= {"KFAC": "C0", "EKFAC": "C1", "KFOC": "C2"}
lengths = torch.logspace(-2, 0.5, 40)
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
lowest = {}
for name, direction in directions.items():
    losses = [loss_at(-length * direction) for length in lengths]
    lowest[name] = min(losses)
    line = "--" if name in kronecker else "-"
    axis.semilogx(lengths.numpy(), losses, line, color=colors[name], label=name)
axis.set(xlabel="length of the step, in multiples of the direction", ylabel="loss", ylim=(0.2, 0.8))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()
print({name: round(value, 3) for name, value in lowest.items()})
assert max(lowest[name] for name in kronecker) < lowest["gradient"]

# %%
# A step with KFAC goes further down than one along the gradient, for the same one gradient of the
# loss. Full steps (length 1) are too long here: KFAC does not know that the layers move together,
# and no matrix knows how the loss looks further away. That is why optimizers scale steps, or raise
# the damping. Being near to the GGN is not everything, either: it is a fine model of the loss close
# by only.
#
# Spectra
# -------
#
# The eigenvalues, sorted. For KFAC and its relatives, they are a closed form of the factors.

figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
for name in ("GGN", "Hessian", "empirical Fisher", *kronecker):
    values = torch.linalg.eigvalsh(dense[name]).flip(0)
    if name in kronecker:  # a chain P B Pᵀ with orthogonal P
        _, blocks_of_layers, _ = operators[name]
        assert len(blocks_of_layers) == len(layers)
        closed_form = torch.cat([block.eigh().eigenvalues for block in blocks_of_layers])
        torch.testing.assert_close(closed_form.sort(descending=True).values, values)
    positive, negative = values[values > 1e-10], -values[values < -1e-10]
    line, color = "--" if name in kronecker else "-", colors[name]
    axis.semilogy(range(1, len(positive) + 1), positive.numpy(), line, color=color, label=name)
    if len(negative):
        index = range(len(values) - len(negative) + 1, len(values) + 1)
        label = f"{name}, negative ones without sign"
        axis.semilogy(index, negative.numpy(), ":", color=color, label=label)
axis.set(xlabel="index", ylabel="eigenvalue")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %%
# A few eigenvalues are large and most are tiny, over six orders of magnitude: this is why damping
# is needed. The Hessian has negative ones. The GGN has none, but seven zeros: the same number added
# to all outputs changes no probability, and there are seven ways to do so, one for each input of
# the last layer and one for its bias. KFAC and its relatives have the same seven zeros, because
# every vector that is back-propagated sums to zero.

for name in ("GGN", *kronecker):
    assert (torch.linalg.eigvalsh(dense[name]).abs() < 1e-12).sum() == 7
