"""Where the Gauss-Newton matrix is the Hessian, and functions whose matrices are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from property_cases import JOINT, REDUCTIONS, C, Problem, chain, draw, grid, linears, problem
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvlinops import GGNLinearOperator, HessianLinearOperator

#: Networks that are piecewise linear in the parameters of each layer, and their inputs. There is
#: something after each layer but the last.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: chain(*linears(3, 5, 4, C), l0=F.relu, l1=F.relu), (3,)),
    "leaky": (
        lambda: chain(*linears(3, 4, 4, C), l0=lambda h: F.leaky_relu(h, 0.3), l1=torch.abs),
        (3,),
    ),
    "clipped": (lambda: chain(*linears(3, 4, 4, C), l0=F.hardtanh, l1=F.relu6), (3,)),
    "sequences": (
        lambda: chain(*linears(3, 4, C), l0=lambda h: F.relu(h).mean(1)),
        (4, 3),
    ),
    "cnn": (
        lambda: chain(
            nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, (1, 2)), nn.Linear(12, C),
            l0=lambda h: F.max_pool2d(F.relu(h), (1, 2)), l1=lambda h: torch.abs(h).flatten(1),
        ),
        (1, 3, 7),
    ),
}  # fmt: skip


def network(name: str, reduction: str, loss: str = "mse") -> Problem:
    make, shape = NETWORKS[name]
    return problem(make(), loss, reduction, [draw(n, *shape, seed=n) for n in (3, 2)])


def away_from_kinks(case: Problem) -> bool:
    """Check that no input of an activation is near one of its kinks."""
    h = case.X
    for i, after in enumerate(case.model.after):
        own = {n.split(".")[1]: p for n, p in case.params.items() if n.startswith(f"l{i}.")}
        h = functional_call(getattr(case.model, f"l{i}"), own, (h,))
        if i + 1 < len(case.model.after):
            kinks = torch.tensor([0.0, 1.0, -1.0, 6.0], dtype=h.dtype)
            if (h.unsqueeze(-1) - kinks).abs().min() < 1e-4:
                return False
        h = after(h)
    return True


def matrices(case: Problem) -> tuple[Tensor, Tensor]:
    """Return GGN and Hessian; both are those of autograd."""
    G, H = (case.build(cls).to_dense() for cls in (GGNLinearOperator, HessianLinearOperator))
    torch.testing.assert_close(G, case.ggn)
    torch.testing.assert_close(H, case.hessian)
    return G, H


@grid(
    "name reduction", NETWORKS, REDUCTIONS, fast=[(n, "mean") for n in NETWORKS] + [("cnn", "sum")]
)
def test_ggn_is_the_hessian_of_piecewise_linear_networks(name: str, reduction: str) -> None:
    """In the parameters of each layer; between layers, the residuals count.

    Catches a GGN with the model's second derivatives, a Hessian without them, and a factor.
    """
    case = network(name, reduction)
    assert away_from_kinks(case)
    G, H = matrices(case)
    for joint in JOINT:
        for (names, ours), (_, theirs) in zip(
            case.blocks(G, joint), case.blocks(H, joint), strict=True
        ):
            assert ours.norm() > 1e-3, names
            torch.testing.assert_close(ours, theirs)
    assert (G - H).norm() > 1e-2 * G.norm()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smooth_activations_differ(reduction: str) -> None:
    """In layers before an activation; not in the last one. Catches a test that cannot fail."""
    model = chain(*linears(3, 4, 4, C), l0=torch.tanh, l1=torch.sigmoid)
    case = problem(model, "mse", reduction, [draw(n, 3, seed=n) for n in (3, 2)])
    G, H = matrices(case)
    errors = {
        names[0]: ((ours - theirs).norm() / theirs.norm()).item()
        for (names, ours), (_, theirs) in zip(
            case.blocks(G, False), case.blocks(H, False), strict=True
        )
    }
    assert errors["l0.weight"] > 1e-2 and errors["l1.weight"] > 1e-2
    assert errors["l2.weight"] < 1e-12 and errors["l2.bias"] < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("x", [-1.2, 0.5, 1.0])
@pytest.mark.parametrize("z", [1.0, -0.7])
def test_rosenbrock(x: float, z: float, copies: int, reduction: str) -> None:
    """(1 − x)² + b (z − x²)² is the square loss of the prediction (1 − x, √b (z − x²)).

    GGN and Hessian in closed form. They differ in 4 b (x² − z), the curvature of the residual,
    which vanishes in the minimum (1, 1) and on the parabola through it.
    """
    b = 100.0

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        x, z = params["x"], params["z"]
        return X * torch.stack([1 - x, b**0.5 * (z - x**2)])

    params = {name: torch.tensor(p, dtype=torch.float64) for name, p in (("x", x), ("z", z))}
    ones, zeros = torch.ones(copies, 2).double(), torch.zeros(copies, 2).double()
    case = Problem(predict, nn.MSELoss(reduction=reduction), params, [(ones, zeros)])
    G, H = matrices(case)
    c = copies if reduction == "sum" else 1 / 2
    ggn = [[2 + 8 * b * x**2, -4 * b * x], [-4 * b * x, 2 * b]]
    hessian = [[2 + 12 * b * x**2 - 4 * b * z, -4 * b * x], [-4 * b * x, 2 * b]]
    torch.testing.assert_close(G, c * torch.tensor(ggn, dtype=torch.float64))
    torch.testing.assert_close(H, c * torch.tensor(hessian, dtype=torch.float64))
    assert torch.allclose(G, H) == (x**2 == z)
    assert torch.linalg.eigvalsh(G).min() > 0
