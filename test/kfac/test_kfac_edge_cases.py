"""Cases in which KFAC was, or could be, wrong without a word."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvlinops import KFACLinearOperator

F64 = torch.float64


def linear_problem(dtype: torch.dtype = F64, scale: float = 1.0, rows: int = 6):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    data = [((scale * torch.rand(rows, 4)).to(dtype), torch.rand(rows, 2).to(dtype))]
    return model, nn.MSELoss(), dict(model.named_parameters()), data


def test_transpose_after_replacing_a_factor():
    """A user may put in a factor that is not symmetric: the operator is then not self-adjoint."""
    K = KFACLinearOperator(*linear_problem())
    assert K.SELF_ADJOINT and K.H is K
    K = copy.deepcopy(K)
    K[1][0][0] = torch.rand(3, 3, dtype=F64)
    dense, v = K.to_dense(), torch.rand(K.shape[0], dtype=F64)
    assert not K.SELF_ADJOINT
    torch.testing.assert_close(v @ K, v @ dense)
    torch.testing.assert_close(K.T @ v, dense.T @ v)
    torch.testing.assert_close((2 * K).T @ v, 2 * dense.T @ v)
    torch.testing.assert_close(torch.as_tensor(K.to_scipy().rmatvec(v.numpy())), dense.T @ v)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_refused(use_reentrant: bool):
    """Hooks do not see the gradients of a checkpointed layer: its factors would be zero."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = checkpoint(lambda z: self.a(z).tanh(), x, use_reentrant=use_reentrant)
            return self.b(hidden)

    _, loss, _, data = linear_problem(torch.float32)
    model = Checkpointed()
    with pytest.raises(NotImplementedError, match=r"'a'.*checkpoint"):
        KFACLinearOperator(model, loss, dict(model.named_parameters()), data)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(("scale", "rows"), [(10.0, 1000), (1.0, 40_000)])
def test_half_precision_sums_do_not_overflow(scale: float, rows: int, kfac_approx: str):
    """Raw sums over a batch exceed float16's 65504, although the factors do not."""
    problem = linear_problem(torch.float16, scale, rows)
    model, loss, params, data = problem
    options = {"fisher_type": "type-2", "kfac_approx": kfac_approx}
    half = KFACLinearOperator(*problem, **options)
    wide = {name: p.detach().float() for name, p in params.items()}
    single = KFACLinearOperator(
        copy.deepcopy(model).float(),
        loss,
        wide,
        [(X.float(), y.float()) for X, y in data],
        **options,
    )
    for actual, expected in zip(half.factors("0.weight"), single.factors("0.weight"), strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=1e-3)


def test_half_precision_pooling_does_not_overflow():
    """reduce sums an example's inputs over positions before it averages them."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x).mean(1)

    model = Pooled().half()
    X = (50 * torch.rand(2, 3000, 4)).half()  # sums over positions exceed 65504, means do not
    params, data = dict(model.named_parameters()), [(X, torch.rand(2, 2).half())]
    K = KFACLinearOperator(model, nn.MSELoss(), params, data, kfac_approx="reduce")
    mean = X.float().mean(1)
    torch.testing.assert_close(
        K.factors("linear.weight")[1].float(), mean.T @ mean / 2, rtol=2e-2, atol=0
    )
