# ruff: noqa: D205, D212, D415, N816 - a title starts the page; mathematics has its own case
r"""
KFAC from the ground up
=======================

KFAC replaces a layer's curvature, a matrix with (number of weights)² entries, by the Kronecker
product of two small matrices. This page derives it step by step for readers who know what a
gradient is and have used PyTorch. Every formula stands beside about ten lines of code, and is then
**proved by a check**: both sides are computed in double precision, by different ways, and must be
equal. At the end, three lines of curvlinops give the same matrices.

You will see

- what the Hessian, the Gauss-Newton matrix and the three kinds of Fisher matrix are;
- why the curvature of a linear layer is a sum of Kronecker products, what KFAC does to this sum,
  and when nothing is lost;
- how to damp and invert KFAC, and how EKFAC improves it;
- what changes for convolutions and sequences.
"""

# %%
# Everything is small, so that matrices fit on the page, and in float64, so that equal means equal.
# ``same`` is the proof: it prints how far two matrices are apart, and fails if that is more than
# rounding.

import itertools

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import FuncNorm
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from curvlinops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, cg

torch.set_num_threads(1)  # matrices this small are multiplied fastest by one thread
torch.manual_seed(3)


def distance(A: Tensor, B: Tensor) -> float:
    """Return the distance of A to B, relative to B, in Frobenius norm."""
    return ((A - B).norm() / B.norm()).item()


def same(what: str, A: Tensor, B: Tensor) -> None:
    """Check that two matrices are equal up to rounding."""
    assert A.shape == B.shape
    error = distance(A, B)
    assert error < 1e-10, f"{what}: relative distance {error:.1e}"
    print(f"{what}: equal (relative distance {error:.0e})")


# %%
# A network and its loss
# ----------------------
#
# A network :math:`f_\theta` with two linear layers sorts points of :math:`\mathbb{R}^3` into three
# classes. We train it a little, because curvature at a random initialisation is dull.

N, C = 40, 3
X = torch.randn(N, 3).double() + 0.5
y = torch.multinomial((X @ torch.randn(3, C).double()).softmax(dim=1), 1).squeeze(1)

model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double()
loss_func = nn.CrossEntropyLoss()  # reduction="mean"
for _ in range(20):
    gradients = torch.autograd.grad(loss_func(model(X), y), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.data -= 0.5 * gradient

# %%
# The parameters, one after the other and each in row-major order (as ``flatten`` does it), are one
# vector :math:`\theta` with :math:`D` entries. ``predict`` is the network as a function of it.

params = {name: p.detach() for name, p in model.named_parameters()}
theta = torch.cat([p.flatten() for p in params.values()])
D = len(theta)


def predict(theta: Tensor, X: Tensor = X) -> Tensor:
    """Evaluate the network at a vector of parameters: predictions [N, C]."""
    pieces = theta.split([p.numel() for p in params.values()])
    shaped = {name: t.view_as(params[name]) for name, t in zip(params, pieces, strict=True)}
    return functional_call(model, shaped, (X,))


print({name: tuple(p.shape) for name, p in params.items()}, "D =", D)

# %%
# The loss sums one term :math:`\ell_n` for each example, and scales the sum with a number
# :math:`c`:
#
# .. math::
#     L(\theta) = c \sum_{n=1}^N \ell_n(f_\theta(x_n)).
#
# Here :math:`c = 1/N`, as the reduction is ``"mean"``; it is 1 for ``"sum"``. The same :math:`c`
# is in front of every matrix below. Forgetting it is a classic mistake: all checks would fail.

c = 1 / N
terms = F.cross_entropy(predict(theta), y, reduction="none")
same("loss", c * terms.sum(), loss_func(model(X), y).detach())

# %%
# The Hessian
# -----------
#
# The matrix of second derivatives tells how the gradient changes from place to place. With 31
# parameters, we can simply write it down:

H = hessian(lambda t: loss_func(predict(t), y), theta)
same("the Hessian is symmetric", H, H.T)
print(f"smallest and largest eigenvalue: {torch.linalg.eigvalsh(H)[[0, -1]].tolist()}")

# %%
# Its smallest eigenvalue is negative: along some directions, the loss curves downwards. A method
# that divides by curvature would walk the wrong way there.
#
# The Gauss-Newton matrix
# -----------------------
#
# The loss is a function of predictions, and these are functions of the parameters. By the chain
# rule, the Hessian has two parts:
#
# .. math::
#     \nabla^2 L
#     = \underbrace{c \sum_n J_n^\top \left(\nabla_f^2 \ell_n\right) J_n}_{\text{GGN}}
#     + c \sum_n \sum_k \frac{\partial \ell_n}{\partial f_k} \nabla_\theta^2 [f_\theta(x_n)]_k,
#
# with the Jacobians :math:`J_n` of the predictions, ``[C, D]``. The first part is the generalized
# Gauss-Newton matrix (GGN). It knows the curvature of the loss, but treats the network as linear.
# For cross-entropy with the probabilities :math:`p = \mathrm{softmax}(f)`, the loss's Hessian is
# :math:`\mathrm{diag}(p) - p p^\top`.

J = jacobian(predict, theta)  # [N, C, D]
p = predict(theta).softmax(dim=1)  # [N, C]
H_f = torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)  # [N, C, C]
by_autograd = [
    hessian(lambda f, label=label: F.cross_entropy(f, label), prediction)
    for prediction, label in zip(predict(theta), y, strict=True)
]
same("Hessian of cross-entropy", H_f, torch.stack(by_autograd))

GGN = c * torch.einsum("nia,nij,njb->ab", J, H_f, J)

residual = p - F.one_hot(y, C)  # the gradient of each loss term with respect to its prediction
second_part = hessian(lambda t: c * (residual * predict(t)).sum(), theta)
same("Hessian = GGN + second part", GGN + second_part, H)

# %%
# The GGN never curves downwards. In return, it is not the Hessian:

assert torch.linalg.eigvalsh(GGN).min() > -1e-12
print(f"distance of the GGN to the Hessian: {distance(GGN, H):.2f}")

# %%
# Vectors to back-propagate
# -------------------------
#
# If :math:`\nabla_f^2 \ell_n = \sum_v v v^\top`, the GGN is made of back-propagated vectors,
# :math:`c \sum_n \sum_v (J_n^\top v)(J_n^\top v)^\top`. So all that a method needs to know about
# the loss is a set of vectors ``[V, N, C]``. Three choices go under three names.
#
# **Type 2.** The vectors :math:`\sqrt{p_k} (p - e_k)`, one for each class :math:`k`. They are
# columns of a root of the loss's Hessian, so the result is the GGN, exactly.

unit = torch.eye(C, dtype=torch.float64)
type_2 = torch.stack([p[:, [k]].sqrt() * (p - unit[k]) for k in range(C)])  # [V, N, C]
same("root of the loss's Hessian", torch.einsum("vni,vnj->nij", type_2, type_2), H_f)


def curvature(vectors: Tensor) -> Tensor:
    """Return c Σ (Jᵀv)(Jᵀv)ᵀ for vectors [V, N, C]."""
    gradients = torch.einsum("vni,nia->vna", vectors, J)
    return c * torch.einsum("vna,vnb->ab", gradients, gradients)


same("type 2 = GGN", curvature(type_2), GGN)

# %%
# **Monte Carlo.** :math:`p - e_k` is the gradient of the loss if the label *were* :math:`k`, a
# would-be gradient. The model believes in this label with probability :math:`p_k`; so type 2 is an
# expectation over labels drawn from the model. That is the definition of the Fisher information
# matrix: for cross-entropy, Fisher and GGN are the same. (The square loss belongs to a Gaussian:
# its would-be gradients are normal with covariance :math:`2I`, its Hessian.) Drawing one label per
# example costs one backward pass instead of :math:`C`. The estimate is noisy, but right on average:


def monte_carlo(num_samples: int) -> Tensor:
    """Return would-be gradients [num_samples, N, C], for labels drawn from the model."""
    labels = torch.multinomial(p, num_samples, replacement=True).T  # [num_samples, N]
    return (p - F.one_hot(labels, C)) / num_samples**0.5


for num_samples in (1, 100, 10_000):
    error = distance(curvature(monte_carlo(num_samples)), GGN)
    print(f"{num_samples:>6} samples per example: distance to the GGN {error:.3f}")
assert error < 0.02

# %%
# **Empirical.** The gradient at the label that the data have. It is the cheapest, as training
# computes it anyway. But no label is drawn, so it is no Fisher information, and it vanishes when
# the data are fitted perfectly, although the GGN need not (Kunstner et al., 2019).

empirical = residual[None]  # [1, N, C]
print(f"distance of the empirical Fisher to the GGN: {distance(curvature(empirical), GGN):.2f}")
assert distance(curvature(empirical), GGN) > 0.1

# %%
# One linear layer
# ----------------
#
# A linear layer computes :math:`z = W a`. Back-propagation hands it the gradient :math:`g` of its
# output, and the gradient of the weight is the outer product :math:`g a^\top`. Inputs and output
# gradients are all that we need of a network. Hooks collect them; nothing below looks into the
# model again.


def look_inside(model: nn.Module, X: Tensor, vectors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and output gradients of each layer with a weight, by its name."""
    inputs, outputs = {}, {}

    def watch(name: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        handles.append(layer.register_forward_hook(hook))

    handles: list = []
    for name, layer in model.named_modules():
        if hasattr(layer, "weight"):
            watch(name, layer)
    prediction = model(X)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(
        prediction, list(outputs.values()), vectors, is_grads_batched=True
    )
    return dict(zip(inputs, zip(inputs.values(), gradients, strict=True), strict=True))


layers = look_inside(model, X, type_2)
a, g = layers["0"]  # the first layer: inputs [N, d_in], output gradients [V, N, d_out]
G = torch.einsum("vno,ni->vnoi", g, a)  # one matrix g aᵀ for each vector and example
weight = slice(0, 12)  # the entries of θ that belong to "0.weight"
same("Jᵀv = g aᵀ", G.flatten(2), torch.einsum("vni,nia->vna", type_2, J)[..., weight])

# %%
# Kronecker products
# ------------------
#
# :math:`B \otimes A` is the matrix with blocks :math:`B_{ij} A`. We flatten matrices row by row, as
# PyTorch does. Then
#
# .. math::
#     \mathrm{vec}(g a^\top) = g \otimes a, \qquad
#     (B \otimes A)\, \mathrm{vec}(X) = \mathrm{vec}(B X A^\top).
#
# Many papers stack columns instead. In their formulas, the two factors trade places.

B_, A_, X_ = torch.rand(4, 4), torch.rand(3, 3), torch.rand(4, 3)
B_, A_, X_ = B_.double(), A_.double(), X_.double()
same("(B ⊗ A) vec(X)", torch.kron(B_, A_) @ X_.flatten(), (B_ @ X_ @ A_.T).flatten())

# %%
# Since :math:`(g \otimes a)(g \otimes a)^\top = g g^\top \otimes a a^\top`, the layer's block of
# the GGN is a *sum of Kronecker products*, with one summand for each example and vector:
#
# .. math::
#     M = c \sum_n \sum_v \left(g_{vn} g_{vn}^\top\right) \otimes \left(a_n a_n^\top\right).

gg = torch.einsum("vni,vnj->nij", g, g)  # [N, d_out, d_out], summed over vectors
aa = torch.einsum("ni,nj->nij", a, a)  # [N, d_in, d_in]
M = c * sum(torch.kron(gg[n], aa[n]) for n in range(N))
same("sum of Kronecker products = block of the GGN", M, GGN[weight, weight])

# %%
# KFAC
# ----
#
# A sum of Kronecker products cannot be inverted cheaply, a single one can. KFAC (Martens & Grosse,
# 2015) takes for the mean of products the product of means:
#
# .. math::
#     M \approx B \otimes A, \qquad
#     A = \frac{1}{N} \sum_n a_n a_n^\top, \qquad
#     B = c \sum_n \sum_v g_{vn} g_{vn}^\top.
#
# The scale :math:`c` is in :math:`B`; :math:`A` has :math:`1/N` whatever the reduction.

A = aa.mean(dim=0)
B = c * gg.sum(dim=0)
KFAC = torch.kron(B, A)

# %%
# What is lost is a covariance: that of :math:`a a^\top` and :math:`g g^\top` over the examples.

covariance = sum(torch.kron(c * N * gg[n] - B, aa[n] - A) for n in range(N)) / N
same("block = KFAC + covariance", KFAC + covariance, M)
print(f"distance of KFAC to the block: {distance(KFAC, M):.2f}")


def show(matrices: dict[str, Tensor], lines: int) -> None:
    """Draw matrices side by side in the same colours, with a line after every few rows."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(9.5, 3.4), layout="constrained")
    limit = max(matrix.abs().max().item() for matrix in matrices.values())
    # Colours follow the root of an entry, so that small ones are visible, too.
    root = (lambda x: np.sign(x) * np.abs(x) ** 0.5, lambda x: np.sign(x) * x**2)
    norm = FuncNorm(root, vmin=-limit, vmax=limit)
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix.numpy(), cmap="RdBu_r", norm=norm)
        for position in range(lines, len(matrix), lines):
            axis.axhline(position - 0.5, color="black", linewidth=0.5)
            axis.axvline(position - 0.5, color="black", linewidth=0.5)
        axis.set(title=title, xticks=[], yticks=[])
    ticks = limit * np.array([-1, -0.5, -0.1, 0, 0.1, 0.5, 1])
    figure.colorbar(image, ax=axes, shrink=0.85, ticks=ticks, format="%.2f")
    plt.show()


show({"block of the GGN": M, "KFAC": KFAC, "difference": M - KFAC}, lines=3)

# %%
# Each small square belongs to two output neurons. In KFAC, all squares are multiples of the same
# matrix :math:`A`.
#
# When KFAC is exact
# ------------------
#
# The covariance vanishes if one of its sides does not vary. First case: **one example**. Second
# case: **a deep linear network with square loss**, where neither the loss's Hessian :math:`2I` nor
# the way back through the layers depends on the example, and so :math:`\sum_v g g^\top` does not.


def kfac_and_block(model: nn.Module, X: Tensor, vectors: Tensor, c: float, name: str) -> list:
    """Return KFAC and the exact block of a linear layer."""
    a, g = look_inside(model, X, vectors)[name]
    A, B = a.T @ a / len(a), c * torch.einsum("vni,vnj->ij", g, g)
    G = torch.einsum("vno,ni->vnoi", g, a).flatten(2)
    return [torch.kron(B, A), c * torch.einsum("vna,vnb->ab", G, G)]


for name in ("0", "2"):
    one = kfac_and_block(model, X[:1], type_2[:, :1], 1.0, name)
    same(f"one example, layer {name}: KFAC = block", *one)

linear = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
root = (2**0.5 * torch.eye(2, dtype=torch.float64))[:, None].expand(2, N, 2)  # of 2I, [V, N, C]
c_square = 1 / (N * 2)  # nn.MSELoss() divides by the number of examples and that of outputs
first = kfac_and_block(linear, X, root, c_square, "0")
last = kfac_and_block(linear, X, root, c_square, "1")
same("linear network, square loss, first layer: KFAC = block", *first)
same("linear network, square loss, last layer: KFAC = block", *last)

# %%
# Both sides were made of :math:`g a^\top`, so let autograd confirm them. The square loss is
# quadratic in each weight, so its Hessian is the block.

target = torch.zeros(N, 2, dtype=torch.float64)
for name, (matrix, _) in {"0.weight": first, "1.weight": last}.items():

    def square_loss(weight: Tensor, name: str = name) -> Tensor:
        """Return the loss of the linear network as a function of one weight."""
        return F.mse_loss(functional_call(linear, {name: weight}, (X,)), target)

    H_layer = hessian(square_loss, linear.get_parameter(name).detach())
    same(f"KFAC of {name} = Hessian by autograd", matrix, H_layer.reshape(matrix.shape))

# %%
# Elsewhere, KFAC is an approximation, and it pays to measure how good it is:

for name in ("0", "2"):
    error = distance(*kfac_and_block(model, X, type_2, c, name))
    print(f"layer {name} with cross-entropy and {N} examples: distance {error:.2f}")
    assert error > 0.05

# %%
# The bias is one more column
# ---------------------------
#
# :math:`W a + b = [W\ b]\,[a; 1]`, so the gradient of weight and bias together is
# :math:`g\,[a; 1]^\top`. A 1 appended to the inputs, and all formulas stay. The entries of
# :math:`[W\ b]` have another order than those of :math:`\theta`, in which the bias comes after the
# whole weight. curvlinops' KFAC is therefore a chain :math:`P\,(B \otimes A)\,P^\top`, with a
# permutation :math:`P`.

a1 = torch.cat([a, torch.ones(N, 1, dtype=torch.float64)], dim=1)  # [N, d_in + 1]
A1 = a1.T @ a1 / N
position = torch.cat([torch.arange(12).reshape(4, 3), torch.arange(12, 16)[:, None]], dim=1)
order = position.flatten()  # where in θ the entries of [W b] are, row by row

G1 = torch.einsum("vno,ni->vnoi", g, a1).flatten(2)
M1 = c * torch.einsum("vna,vnb->ab", G1, G1)
same("block of weight and bias", M1, GGN[order][:, order])
KFAC1 = torch.kron(B, A1)

# %%
# If the two are treated separately, the bias has the block :math:`B` alone. That is no
# approximation, as its input is always 1:

bias = slice(12, 16)
same("block of the bias = B", B, GGN[bias, bias])

# %%
# Inverses and damping
# --------------------
#
# The inverse of a Kronecker product is that of the factors, so KFAC's inverse times a gradient
# :math:`V` (in the shape of the weight) is :math:`B^{-1} V A^{-1}`: two small matrices are inverted
# instead of a large one.
#
# Curvature is often nearly singular. Everyone adds a multiple of the identity before inverting,
# the damping :math:`\delta`. There are three ways.
#
# - **plain**: add :math:`\delta I` to each factor. This is cheap, but adds
#   :math:`\delta (B \otimes I + I \otimes A) + \delta^2 I` to the product rather than
#   :math:`\delta I`;
# - **heuristic** (Martens & Grosse, 2015): add :math:`\sqrt{\delta m_B / m_A}\, I` to :math:`B` and
#   :math:`\sqrt{\delta m_A / m_B}\, I` to :math:`A`, with their mean eigenvalues :math:`m`. The two
#   unwanted terms then have the same size, and the last one is :math:`\delta I`;
# - **exact**: with eigendecompositions :math:`A = Q_A \Lambda_A Q_A^\top` and
#   :math:`B = Q_B \Lambda_B Q_B^\top`, add :math:`\delta` to the products of eigenvalues.

delta = 1e-2
eye_A, eye_B = torch.eye(len(A1), dtype=A1.dtype), torch.eye(len(B), dtype=B.dtype)
eye = torch.kron(eye_B, eye_A)


def inverse_plain(B: Tensor, A: Tensor) -> Tensor:
    """Return the inverse with plain damping."""
    return torch.kron(torch.linalg.inv(B + delta * eye_B), torch.linalg.inv(A + delta * eye_A))


def inverse_heuristic(B: Tensor, A: Tensor) -> Tensor:
    """Return the inverse with heuristic damping."""
    m_A, m_B = A.trace() / len(A), B.trace() / len(B)
    damped_B = B + (delta * m_B / m_A).sqrt() * eye_B
    damped_A = A + (delta * m_A / m_B).sqrt() * eye_A
    return torch.kron(torch.linalg.inv(damped_B), torch.linalg.inv(damped_A))


plain, heuristic = inverse_plain(B, A1), inverse_heuristic(B, A1)
extra = delta * (torch.kron(B, eye_A) + torch.kron(eye_B, A1)) + delta**2 * eye
same("plain damping", plain, torch.linalg.inv(KFAC1 + extra))

lambda_B, Q_B = torch.linalg.eigh(B)
lambda_A, Q_A = torch.linalg.eigh(A1)
Q, kfac_eigenvalues = torch.kron(Q_B, Q_A), torch.kron(lambda_B, lambda_A)
exact = Q @ torch.diag(1 / (kfac_eigenvalues + delta)) @ Q.T
same("exact damping", exact, torch.linalg.inv(KFAC1 + delta * eye))

V = torch.rand(4, 4, dtype=torch.float64)  # a gradient in the shape of [W b]
fast = Q_B @ ((Q_B.T @ V @ Q_A) / (torch.outer(lambda_B, lambda_A) + delta)) @ Q_A.T
same("... times a vector, without any large matrix", fast.flatten(), exact @ V.flatten())

# %%
# Plain damping has a flaw. If :math:`A` gets 100 times larger and :math:`B` 100 times smaller (say,
# because somebody moves a scale from one to the other), the product is what it was. The exact and
# the heuristic inverse do not notice. The plain one does.

same("heuristic, factors rescaled", inverse_heuristic(B / 100, A1 * 100), heuristic)
rescaled = inverse_plain(B / 100, A1 * 100)
print(f"plain, factors rescaled: distance {distance(rescaled, plain):.2f}")
assert distance(rescaled, plain) > 0.1

# %%
# All of these share their eigenvectors and differ in eigenvalues. The figure shows those of the
# inverses: how long a step may be where KFAC sees which curvature. Plain damping is close to the
# exact one as long as the eigenvalues of :math:`A` happen to be about 1. The heuristic adds more
# than :math:`\delta`, in return for not depending on such luck.

figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
grid = torch.logspace(-3.5, 0.5, 100).numpy()
axis.loglog(grid, 1 / (grid + delta), color="black", linewidth=1, label="exact, 1 / (λ + δ)")
inverses = {"heuristic": heuristic, "plain": plain, "plain, factors rescaled": rescaled}
for (label, inverse), marker in zip(inverses.items(), "osD", strict=True):
    values = (Q.T @ inverse @ Q).diagonal()
    axis.loglog(kfac_eigenvalues.numpy(), values.numpy(), marker, label=label, alpha=0.8)
axis.axvline(delta, color="grey", linestyle=":", linewidth=1)
axis.annotate("λ = δ", (delta * 1.1, 150), color="grey")
axis.set(xlabel="eigenvalue λ of KFAC", ylabel="eigenvalue of the damped inverse")
axis.legend()
plt.show()

# %%
# EKFAC
# -----
#
# KFAC's eigenvectors :math:`Q = Q_B \otimes Q_A` are a good basis, but products of the factors'
# eigenvalues need not be the best numbers to go with them. Which diagonal :math:`\lambda` is best?
# Rotations do not change the Frobenius norm, so
#
# .. math::
#     \| M - Q\, \mathrm{diag}(\lambda)\, Q^\top \| = \| Q^\top M Q - \mathrm{diag}(\lambda) \|,
#
# and the best choice is the diagonal of :math:`Q^\top M Q`. It does not need :math:`M`:
#
# .. math::
#     \lambda = c \sum_n \sum_v \left( Q_B^\top G_{vn} Q_A \right)^{\odot 2}, \qquad
#     G_{vn} = g_{vn} a_n^\top,
#
# with squares of single entries. This is EKFAC (George et al., 2018). It costs a second pass over
# the data.

G1_rotated = torch.einsum("vno,op,ni,ij->vnpj", g, Q_B, a1, Q_A)
ekfac_eigenvalues = c * (G1_rotated**2).sum(dim=(0, 1)).flatten()
M1_rotated = Q.T @ M1 @ Q
same("EKFAC's eigenvalues", ekfac_eigenvalues, M1_rotated.diagonal())
EKFAC1 = Q @ torch.diag(ekfac_eigenvalues) @ Q.T

# %%
# No other diagonal is better, so EKFAC is never further from the block than KFAC. Its trace is that
# of the block. (KFAC's is not.)

print(f"distance to the block: KFAC {distance(KFAC1, M1):.3f}, EKFAC {distance(EKFAC1, M1):.3f}")
assert distance(EKFAC1, M1) <= distance(KFAC1, M1)
same("trace of EKFAC", EKFAC1.trace(), M1.trace())
assert abs(KFAC1.trace() / M1.trace() - 1) > 0.01
for _ in range(100):
    other = ekfac_eigenvalues * (1 + 0.1 * torch.randn(16, dtype=torch.float64))
    assert distance(Q @ torch.diag(other) @ Q.T, M1) > distance(EKFAC1, M1)

show(
    {
        "block, in KFAC's eigenbasis": M1_rotated.flip(0, 1),
        "KFAC": torch.diag(kfac_eigenvalues).flip(0, 1),
        "EKFAC": torch.diag(ekfac_eigenvalues).flip(0, 1),
    },
    lines=4,
)

# %%
# KFAC's diagonal is too large here and too small there; EKFAC's is that of the block. What neither
# can have are the entries beside the diagonal. They are all that is left of EKFAC's distance.

beside = M1_rotated - torch.diag(M1_rotated.diagonal())
same("EKFAC's distance", (EKFAC1 - M1).norm(), beside.norm())

# %%
# Convolutions
# ------------
#
# A convolution multiplies the same weight to every patch of an image. So each example comes with
# :math:`S` positions, inputs are ``[N, S, d_in]``, output gradients ``[V, N, S, d_out]``, and the
# gradient of the weight is a sum over positions, :math:`G_{vn} = \sum_s g_{vns} a_{ns}^\top`.

images = torch.randn(N, 1, 4, 4, dtype=torch.float64) + 0.5
convolution = nn.Conv2d(1, 2, kernel_size=2, bias=False).double()
patches = F.unfold(images, kernel_size=2).mT  # [N, S, d_in]: 9 patches of 4 pixels
S = patches.shape[1]

W = convolution.weight.detach().flatten(start_dim=1)  # [d_out, d_in]
by_patches = torch.einsum("oi,nsi->nos", W, patches)
same("convolution = weight times patches", by_patches, convolution(images).detach().flatten(2))

# %%
# What becomes of positions in a Kronecker product is a choice. There are two good ones (Grosse &
# Martens, 2016; Eschenhagen et al., 2023):
#
# .. math::
#     \text{expand:} \quad & A = \frac{1}{NS} \sum_n \sum_s a_{ns} a_{ns}^\top, \qquad
#     B = c \sum_n \sum_v \sum_s g_{vns} g_{vns}^\top, \\
#     \text{reduce:} \quad & A = \frac{1}{N} \sum_n \bar a_n \bar a_n^\top, \qquad
#     B = c \sum_n \sum_v \hat g_{vn} \hat g_{vn}^\top,
#
# with the average input :math:`\bar a_n = \frac{1}{S} \sum_s a_{ns}` and the summed gradient
# :math:`\hat g_{vn} = \sum_s g_{vns}`.
# Expand takes every position for an example of its own, reduce every example for one position.


def kfac(a: Tensor, g: Tensor, c: float, approximation: str) -> Tensor:
    """Return KFAC of inputs [N, S, d_in] and output gradients [V, N, S, d_out]."""
    if approximation == "reduce":
        a, g = a.mean(dim=1, keepdim=True), g.sum(dim=2, keepdim=True)
    num_positions = a.shape[0] * a.shape[1]
    A = torch.einsum("nsi,nsj->ij", a, a) / num_positions
    B = c * torch.einsum("vnsi,vnsj->ij", g, g)
    return torch.kron(B, A)


def block(a: Tensor, g: Tensor, c: float) -> Tensor:
    """Return the exact block, from the gradients of whole examples."""
    G = torch.einsum("vnso,nsi->vnoi", g, a).flatten(2)
    return c * torch.einsum("vna,vnb->ab", G, G)


# %%
# Both are exact for linear networks with square loss, but for different ones. If **every pixel has
# a target**, positions never meet, and expand is exact. If **pixels are averaged** before the loss,
# all positions have the same output gradient, and reduce is exact. The block itself is checked
# against autograd: as the loss is quadratic in the weight, it is the Hessian.

identity = torch.eye(2 * S, dtype=torch.float64)
heads = {  # from the convolution's output [N, 2, 3, 3] to outputs [N, V], and its Jacobian
    "every pixel has a target": (lambda z: z.flatten(1), identity.reshape(2 * S, 2, S).mT),
    "pixels are averaged": (lambda z: z.mean((2, 3)), identity[:2, None, :2].expand(2, S, 2) / S),
}
kfacs = {}
for name, (head, back) in heads.items():
    c_image = 1 / (N * len(back))  # nn.MSELoss(): number of examples times number of outputs
    g = 2**0.5 * back[:, None].expand(-1, N, -1, -1)  # of the vectors √2 e_v: [V, N, S, d_out]

    def square_loss(weight: Tensor, head=head) -> Tensor:
        """Return the loss for targets 0."""
        return head(F.conv2d(images, weight)).square().mean()

    H_image = hessian(square_loss, convolution.weight.detach()).reshape(W.numel(), W.numel())
    same(f"{name}: block", block(patches, g, c_image), H_image)
    kfacs[name] = [kfac(patches, g, c_image, choice) for choice in ("expand", "reduce")]
    errors = [distance(matrix, H_image) for matrix in kfacs[name]]
    print(f"    distances: expand {errors[0]:.0e}, reduce {errors[1]:.0e}")
    assert min(errors) < 1e-10 and max(errors) > 0.1
    assert (errors[0] < errors[1]) == (name == "every pixel has a target")

# %%
# Sequences
# ---------
#
# A language model predicts something at every token. Each prediction has a loss term of its own,
# and the GGN sums over loss terms, :math:`c \sum_m J_m^\top (\nabla_f^2 \ell_m) J_m`. An example
# with :math:`R` tokens has :math:`R` of them.
#
# It is tempting to back-propagate the vectors of all terms of an example at once. But where tokens
# mix on the way (attention), what arrives at a layer is a sum over terms, and its square has
# products of *different* terms, which do not belong to the GGN. The remedy: multiply each term's
# vector by an independent random sign :math:`\sigma_m`. As
# :math:`\mathbb{E}[\sigma_m \sigma_{m'}]` is 1 for :math:`m = m'` and else 0, the unwanted products
# vanish on average. (Would-be gradients need no signs. They are drawn independently, and have mean
# zero.)


class Sequence(nn.Module):
    """A layer for each token, an average over all tokens up to here, and a second layer."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, R, 2] to [N, R, 2]."""
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.second((self.first(x).cumsum(dim=1) / count).tanh())


R, N_tokens = 3, 5
tokens = torch.randn(N_tokens, R, 2, dtype=torch.float64)
sequence = Sequence().double()
c_tokens = 1 / (N_tokens * R * 2)  # nn.MSELoss(): number of loss terms times number of outputs


def predict_tokens(weight: Tensor) -> Tensor:
    """Return predictions as a function of the first layer's weight."""
    return functional_call(sequence, {"first.weight": weight}, (tokens,))


J_tokens = jacobian(predict_tokens, sequence.first.weight.detach()).reshape(-1, 6)
GGN_tokens = 2 * c_tokens * J_tokens.T @ J_tokens  # every output is a square loss of its own


def with_signs(signs: tuple[int, ...]) -> Tensor:
    """Return the curvature when all terms are back-propagated together, with these signs."""
    vectors = 2**0.5 * torch.eye(2, dtype=torch.float64)[:, None, None].expand(2, N_tokens, R, 2)
    vectors = vectors * torch.tensor(signs)[:, None]
    return block(*look_inside(sequence, tokens, vectors)["first"], c_tokens)


# %%
# With three terms, there are eight ways to choose the signs. Their average is the GGN, exactly. No
# signs at all are one of the eight, always the same one, and that is not right:

average = sum(with_signs(signs) for signs in itertools.product((-1, 1), repeat=R)) / 2**R
same("average over all signs = GGN", average, GGN_tokens)
error = distance(with_signs((1, 1, 1)), GGN_tokens)
print(f"without signs: distance {error:.2f}")
assert error > 0.1

# %%
# Three lines of curvlinops
# -------------------------
#
# All of this is in the library. Data come in batches of any sizes, the result does not depend on
# them. The blocks are the ones from above:

data = [(X[:25], y[:25]), (X[25:], y[25:])]
arguments = (model, loss_func, dict(model.named_parameters()), data)
options = {"fisher_type": "type-2", "separate_weight_and_bias": False}

K = KFACLinearOperator(*arguments, **options)
E = EKFACLinearOperator(*arguments, **options)
same("KFAC of the library", K.block("0.weight").to_dense(), KFAC1)
same("EKFAC of the library", E.block("0.weight").to_dense(), EKFAC1)
same("GGN of the library", GGNLinearOperator(*arguments).to_dense(), GGN)
print(K.summary())

# %%
# The other names on this page are arguments, too: ``fisher_type="mc"`` or ``"empirical"``,
# ``kfac_approx="reduce"``, and ``loss_terms="exact"``, which back-propagates the terms of an
# example one after the other instead of using signs. ``inverse`` knows the three ways of damping:

for flags, expected in (
    ({}, plain),
    ({"use_heuristic_damping": True}, heuristic),
    ({"use_exact_damping": True}, exact),
):
    inverse = K.inverse(damping=delta, **flags)
    in_order = inverse.to_dense()[order][:, order]  # from the order of θ to that of [W b]
    same(f"inverse with {flags or 'plain damping'}", in_order, expected)

# %%
# A convolution and a sequence:

layer = nn.Sequential(convolution, nn.Flatten())
image_data = [(images, torch.zeros(N, 2 * S, dtype=torch.float64))]
parameter = {"0.weight": convolution.weight}
K_image = KFACLinearOperator(layer, nn.MSELoss(), parameter, image_data, fisher_type="type-2")
same("convolution", K_image.to_dense(), kfacs["every pixel has a target"][0])

token_data = [(tokens, torch.zeros(N_tokens, R, 2, dtype=torch.float64))]
parameter = {"first.weight": sequence.first.weight}
sequence_arguments = (sequence, nn.MSELoss(), parameter, token_data)
E_tokens = EKFACLinearOperator(*sequence_arguments, fisher_type="type-2", loss_terms="exact")
same("sequence: trace of EKFAC = trace of the GGN", E_tokens.trace(), GGN_tokens.trace())

# %%
# What it is good for
# -------------------
#
# KFAC's inverse is a preconditioner. Conjugate gradients solve
# :math:`(\text{GGN} + \delta I)\, x = \nabla L` from products with the GGN alone, and need fewer of
# them if KFAC shows the way. Here are a larger network, and inputs of very different sizes. (With
# few data, or where all directions are alike, it may need as many. Measure.)

wide = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double()
X_wide = torch.randn(300, 20).double() * torch.logspace(-1, 1, 20)
wide_data = [(X_wide, torch.randn(300, 5).double())]
wide_arguments = (wide, nn.MSELoss(), dict(wide.named_parameters()), wide_data)

operator = GGNLinearOperator(*wide_arguments, keep_graph=True)
damped = operator + 1e-3 * operator**0
_, gradient = operator.risk.loss_and_gradient()
gradient = torch.cat([piece.flatten() for piece in gradient])
inverses = {
    "no preconditioner": None,
    "KFAC": KFACLinearOperator(*wide_arguments, **options).inverse(1e-3, use_exact_damping=True),
    "EKFAC": EKFACLinearOperator(*wide_arguments, **options).inverse(1e-3),
}
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
iterations = {}
for label, preconditioner in inverses.items():
    x, info = cg(damped, gradient, tolerance=1e-4, preconditioner=preconditioner)
    assert (damped @ x - gradient).norm() <= 2e-4 * gradient.norm()
    iterations[label] = int(info.iterations)
    axis.semilogy(info.history, label=f"{label}: {iterations[label]} iterations")
axis.set(xlabel="iteration of conjugate gradients", ylabel="relative residual")
axis.legend()
plt.show()
assert 1.5 * max(iterations["KFAC"], iterations["EKFAC"]) < iterations["no preconditioner"]

# %%
# References
# ----------
#
# - J. Martens and R. Grosse, *Optimizing neural networks with Kronecker-factored approximate
#   curvature*, ICML 2015: KFAC, and the heuristic damping.
# - R. Grosse and J. Martens, *A Kronecker-factored approximate Fisher matrix for convolution
#   layers*, ICML 2016: KFAC for convolutions, which is "expand".
# - T. George, C. Laurent, X. Bouthillier, N. Ballas and P. Vincent, *Fast approximate natural
#   gradient descent in a Kronecker-factored eigenbasis*, NeurIPS 2018: EKFAC.
# - F. Kunstner, L. Balles and P. Hennig, *Limitations of the empirical Fisher approximation for
#   natural gradient descent*, NeurIPS 2019.
# - R. Eschenhagen, A. Immer, R. Turner, F. Schneider and P. Hennig, *Kronecker-factored approximate
#   curvature for modern neural network architectures*, NeurIPS 2023: weight sharing, expand and
#   reduce, and when they are exact.
