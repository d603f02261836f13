"""Tests of the Jacobian and its transpose against dense autodiff, and of what they read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_cases import (
    ALL,
    JACOBIANS,
    PROBLEMS,
    SIZES,
    Apply,
    C,
    Costs,
    Params,
    Problem,
    assert_close,
    assert_matrix,
    classes,
    cross_entropy,
    mlp,
    mse,
    rand,
    sequences,
    vectors,
)
from scipy.sparse.linalg import lsmr, svds
from torch import Size, Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    GGNLinearOperator,
    JacobianLinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
    TransposedJacobianLinearOperator,
    record_gradients,
)

NO_LOOK = {"check_deterministic": False, "num_data": sum(SIZES)}


def build(problem: Problem, **options: Any) -> JacobianLinearOperator:
    return problem.operator(JacobianLinearOperator, **options)


# ---- the matrix --------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, NO_LOOK], ids=["check", "no check"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_autodiff(name: str, options: dict[str, Any]) -> None:
    problem = PROBLEMS[name]()
    dense = problem.jacobian()
    # each the first product of an operator that has not seen the model
    assert_close(build(problem, **options) @ (v := rand(dense.shape[1])), dense @ v)
    assert_matrix(build(problem, **options), dense)
    assert_matrix(build(problem, **options).T, dense.T)
    JT = problem.operator(TransposedJacobianLinearOperator, **options)
    assert_close(JT @ (u := rand(len(dense))), dense.T @ u)
    assert_close(u @ build(problem, **options), dense.T @ u)


@pytest.mark.parametrize("cls", JACOBIANS)
@pytest.mark.parametrize("name", ["mlp_mse", "cnn", "sparse_embedding"])
def test_chunks(name: str, cls: Any) -> None:
    problem = PROBLEMS[name]()
    dense = problem.dense(cls)
    assert_close(problem.operator(cls).to_dense(), dense)
    for chunk_size in (1, 2, 3, 100):
        A = problem.operator(cls, chunk_size=chunk_size)
        assert_matrix(A, dense)  # three columns
    assert (A @ rand(A.shape[1], 0)).shape == (A.shape[0], 0)
    assert (rand(0, A.shape[0]) @ A).shape == (0, A.shape[1])


def test_formats() -> None:
    problem = PROBLEMS["function_model"]()
    J, dense = build(problem), problem.jacobian()
    M, D = J.shape
    assert J.in_shape == J.T.out_shape == problem.shapes
    assert J.out_shape == J.T.in_shape == [(8, 2)]
    names, sizes = list(problem.params), [s.numel() for s in problem.shapes]

    def split(flat: Tensor, *columns: int) -> list[Tensor]:
        parts = zip(flat.split(sizes), problem.shapes, strict=True)
        return [part.reshape(shape + columns) for part, shape in parts]

    for columns in ((), (4,)):
        v, u = rand(D, *columns), rand(M, *columns)
        named = dict(zip(names, split(v, *columns), strict=True))
        for x in (named, dict(reversed(named.items())), list(named.values())):
            (y,) = J @ x
            assert_close(y, (dense @ v).reshape(8, 2, *columns))
        for A in (J.T, J.adjoint()):
            result = A @ [u.reshape(8, 2, *columns)]
            for actual, expected in zip(result, split(dense.T @ u, *columns), strict=True):
                assert_close(actual, expected)
    V, U = rand(3, D), rand(3, M)
    assert_close(U @ J, U @ dense)
    assert_close(V @ J.T, V @ dense.T)
    (y,) = {n: x.movedim(-1, 0) for n, x in zip(names, split(V.T, 3), strict=True)} @ J.T
    assert_close(y, (V @ dense.T).reshape(3, 8, 2))
    results = [U.reshape(3, 8, 2)] @ J
    for actual, expected in zip(results, split(dense.T @ U.T, 3), strict=True):
        assert_close(actual, expected.movedim(-1, 0))


# how a model's predictions for a batch of n look: model's end, inputs, the space of rows
OUTPUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], Tensor], tuple[int, ...]]] = {
    "vectors": (lambda f: f, lambda n: rand(n, 3), (8, C)),
    "numbers": (lambda f: f[:, 0], lambda n: rand(n, 3), (8,)),
    "numbers in a column": (lambda f: f[:, :1], lambda n: rand(n, 3), (8, 1)),
    "scalars": (lambda f: f.mean(), lambda n: rand(n, 3), (3,)),
    "images": (lambda f: f.transpose(1, 3), lambda n: rand(n, 2, 5, 3), (8, C, 5, 2)),
    "sequences": (lambda f: f.transpose(1, 2), lambda n: rand(n, n + 1, 3), (C * (12 + 2 + 20),)),
    "positions": (lambda f: f.flatten(0, 1), lambda n: rand(n, n + 1, 3), (12 + 2 + 20, C)),
    "nothing for some": (lambda f: f[1:], lambda n: rand(n, 3), (2 + 0 + 3, C)),
    "unequal axes": (lambda f: f[:, : len(f)], lambda n: rand(n, 3), (3 * 3 + 1 + 4 * 3,)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_space_of_rows(name: str) -> None:
    end, inputs, shape = OUTPUTS[name]
    model = Apply(lambda self, x: end(self.net(x)), net=mlp())
    problem = Problem(model, mse, [(inputs(n), None) for n in SIZES])  # type: ignore[misc]
    dense = problem.jacobian()
    for J in (build(problem), build(problem, **NO_LOOK)):
        v, u = rand(dense.shape[1]), rand(*shape)
        assert J.out_shape == [shape]
        assert J.T.in_shape == [shape]
        assert J.shape == dense.shape
        (y,) = J @ [t.detach() for t in problem.named(v).values()]
        assert_close(y, (dense @ v).reshape(shape))
        result = torch.cat([t.flatten() for t in J.T @ [u]])
        assert_close(result, dense.T @ u.flatten())
        assert_matrix(J, dense)
        assert_matrix(J.T, dense.T)


def test_rows_are_examples_in_the_order_of_the_data() -> None:
    # f(x)_i = x_i θ_i: each row has one entry, which tells the example and the output
    X = torch.arange(1.0, 17).reshape(8, 2)
    theta = {"theta": torch.ones(2)}
    data = [(x, None) for x in X.split(SIZES)]  # type: ignore[no-untyped-call]
    J = JacobianLinearOperator(lambda p, x: x * p["theta"], theta, data)
    expected = torch.zeros(16, 2)
    expected[0::2, 0], expected[1::2, 1] = X[:, 0], X[:, 1]
    assert torch.equal(J.to_dense(), expected)
    assert torch.equal(J.T.to_dense(), expected.T)
    whole = JacobianLinearOperator(lambda p, x: x * p["theta"], theta, [(X, None)])
    assert torch.equal(whole.to_dense(), expected)
    assert torch.equal(whole.T.to_dense(), expected.T)


# ---- adjoints, algebra, other libraries ----------------------------------------------------------
@pytest.mark.parametrize("cls", JACOBIANS)
def test_adjoints_of_each_other(cls: Any) -> None:
    problem = PROBLEMS["mlp_mse"]()
    A = problem.operator(cls)
    (other,) = {*JACOBIANS} - {cls}
    assert type(A.adjoint()) is type(A.T) is type(A.H) is other
    assert type(A.adjoint().adjoint()) is type(A.T.T) is cls
    dense = problem.dense(cls)
    assert_matrix(A.adjoint().adjoint(), dense)
    assert_matrix(A.adjoint(), dense.T)
    assert A.adjoint().risk is A.risk
    assert A.adjoint().dtype == A.dtype == torch.float64
    assert A.adjoint().device == A.device == torch.device("cpu")
    assert not A.SELF_ADJOINT
    assert cls.__name__.removesuffix("LinearOperator") in repr(A)
    for operator in (A, A.T):
        with pytest.raises(NotImplementedError, match=r"cannot be moved.*build it anew"):
            operator.to(torch.float32)


def test_algebra() -> None:
    problem = PROBLEMS["mlp_mse"]()
    J, dense = build(problem), problem.jacobian()
    assert_matrix(J.T @ J, dense.T @ dense)
    assert_matrix(J @ J.T, dense @ dense.T)
    assert_matrix(2 * J.T @ (J - 0.5 * J), dense.T @ dense)
    rows, columns = [5, 0, 15], [2, -1, 5, 0]
    assert_matrix(SubmatrixLinearOperator(J, rows, columns), dense[rows][:, columns])
    assert_matrix(SubmatrixLinearOperator(J, rows, columns).T, dense[rows][:, columns].T)
    # the square loss's Gauss-Newton matrix is 2 JᵀJ over the number of entries
    G = problem.operator(GGNLinearOperator)
    assert_matrix(2 / len(dense) * J.T @ J, G.to_dense())


def test_scipy() -> None:
    problem = PROBLEMS["function_model"]()
    J, dense = build(problem), problem.jacobian()
    b = rand(len(dense))
    x = lsmr(J.to_scipy(), b.numpy(), damp=0.1, atol=1e-14, btol=1e-14)[0]
    normal = dense.T @ dense + 0.01 * torch.eye(dense.shape[1], dtype=torch.float64)
    assert_close(torch.from_numpy(x), torch.linalg.solve(normal, dense.T @ b), 1e-9)
    expected = torch.linalg.svdvals(dense)[:3]
    for A in (J, J.T):
        largest = svds(A.to_scipy(), k=3, return_singular_vectors=False)
        assert_close(torch.from_numpy(largest.copy()).sort(descending=True)[0], expected, 1e-10)


def test_products_can_be_differentiated() -> None:
    problem = PROBLEMS["mlp_mse"]()
    J, dense = build(problem), problem.jacobian()
    for A, matrix in ((J, dense), (J.T, dense.T)):
        for columns in ((), (2,)):
            x = rand(A.shape[1], *columns).requires_grad_()
            with record_gradients():
                y = A @ x
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            assert_close(gradient, 2 * matrix.T @ matrix @ x.detach())
            result = A @ x
            assert not result.requires_grad
            assert not any(p.grad is not None for p in problem.params.values())


def test_follows_the_parameters() -> None:
    problem = PROBLEMS["mlp_mse"]()
    J, JT = build(problem), build(problem).T
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(2)
    dense = problem.jacobian()
    assert_matrix(J, dense)
    assert_matrix(JT, dense.T)


# ---- what is read ----------------------------------------------------------------------------
BATCHES = [3, 1, 4]
CHECK = [f"Determinism check ({i}/2)" for i in (1, 2)]


def test_passes_with_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Costs(vectors(), capsys)
    problem = Problem(cost.model, cross_entropy, cost.data)  # type: ignore[arg-type]
    for cls in JACOBIANS:
        A = problem.operator(cls, progressbar=True)
        assert cost() == (2, 2 * BATCHES, CHECK)
        assert {A.shape, A.T.shape} == {(24, 31), (31, 24)}
        assert [A.out_shape, A.in_shape] == [A.T.in_shape, A.T.out_shape]
        J = A if cls is JacobianLinearOperator else A.T
        assert cost() == (0, [], [])
        for columns in ((), (2,)):  # also the first product
            J @ rand(31, *columns)
            assert cost() == (1, BATCHES, ["Jacobian product"])
            J.T @ rand(24, *columns)
            assert cost() == (1, BATCHES, ["Jacobian.T product"])
            rand(*columns, 24) @ J
            assert cost() == (1, BATCHES, ["Jacobian.T product"])
        J @ rand(31, 0), J.T @ rand(24, 0)
        assert cost() == (0, [], [])
        J.to_dense(chunk_size=16)
        assert cost() == (2, 2 * BATCHES, 2 * ["Jacobian product"])


def test_passes_without_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Costs(vectors(), capsys)
    problem = Problem(cost.model, cross_entropy, cost.data)  # type: ignore[arg-type]
    options = {"progressbar": True, "check_deterministic": False}
    for cls in JACOBIANS:
        problem.operator(cls, **options)
        assert cost() == (1, [], ["Counting data"])
    options["num_data"] = 8

    # a product does not need the number of rows, and tells it
    for columns in ((), (2,)):
        J = build(problem, **options)
        JT = J.T
        assert cost() == (0, [], [])
        J @ rand(31, *columns)
        assert cost() == (1, BATCHES, ["Jacobian product"])
        assert JT.shape == (31, 24)
        JT @ rand(24, *columns)
        assert cost() == (1, BATCHES, ["Jacobian.T product"])

    # asked for it first, the model is evaluated once
    for cls in JACOBIANS:
        A = problem.operator(cls, **options)
        assert cost() == (0, [], [])
        assert A.T.shape == {JacobianLinearOperator: (31, 24)}.get(cls, (24, 31))
        assert cost() == (1, BATCHES, ["Counting rows"])
        assert A.shape == A.T.T.shape
        assert cost() == (0, [], [])
    JT = problem.operator(TransposedJacobianLinearOperator, **options)
    JT @ rand(24)
    assert cost() == (2, 2 * BATCHES, ["Counting rows", "Jacobian.T product"])
    JT @ rand(24)
    assert cost() == (1, BATCHES, ["Jacobian.T product"])


def test_targets_are_not_used() -> None:
    problem = PROBLEMS["mlp_mse"]()
    dense, inputs = problem.jacobian(), [X for X, _ in problem.data]
    for y in (None, "text", {"label": "text"}, torch.zeros(5), torch.tensor(float("nan"))):
        assert_matrix(build(problem, data=[(X, y) for X in inputs]), dense)
    with pytest.raises(TypeError):
        JacobianLinearOperator(problem.model, nn.MSELoss(), problem.params, problem.data)  # type: ignore[arg-type]


# ---- order -------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", JACOBIANS)
def test_shuffled_data(cls: Any) -> None:
    problem = PROBLEMS["mlp_mse"]()
    X, y = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))

    def loader(**options: Any) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, y), batch_size=3, **options)

    message = "The order of the data differs between two passes, and this operator needs a fixed"
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        problem.operator(cls, data=loader(shuffle=True))
    assert "shuffle=False" in str(error.value)
    assert_matrix(problem.operator(cls, data=loader()), problem.dense(cls))
    A = problem.operator(cls, data=loader(shuffle=True), check_deterministic=False)
    assert A.shape == problem.dense(cls).shape
    # each product sees another order; sums over squares do not depend on it
    if cls is JacobianLinearOperator:
        v = rand(A.shape[1])
        assert_close((A @ v).norm(), (problem.jacobian() @ v).norm())


def test_flat_rows_of_unequal_sequences() -> None:
    # sequences of several lengths: rows are flat, in the order of batches
    problem = Problem(mlp(2), mse, sequences(lambda *s: rand(*s, 3), rand, 2))
    J = build(problem)
    start = 0
    for X, _ in problem.data:
        one = Problem(problem.model, mse, [(X, None)])  # type: ignore[list-item]
        size = X.shape[0] * X.shape[1] * 2
        rows = list(range(start, start + size))
        assert_matrix(SubmatrixLinearOperator(J, rows, list(range(J.shape[1]))), one.jacobian())
        assert build(one).out_shape == [Size((*X.shape[:2], 2))]
        start += size
    assert start == J.shape[0]


# ---- models with less than all derivatives -------------------------------------------------------
class Square(torch.autograd.Function):
    """A function with derivatives in reverse mode only."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_functions_without_forward_mode(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Costs(vectors(), capsys)
    cost.model.function = lambda self, x: Square.apply(self.net(x))
    problem = Problem(cost.model, cross_entropy, cost.data)  # type: ignore[arg-type]
    dense = problem.jacobian()
    J = build(problem)
    assert_close(J @ (v := rand(31)), dense @ v)
    cost()
    assert_matrix(J, dense)
    assert_matrix(J.T, dense.T)
    assert_close(J @ v, dense @ v)  # it does not try again
    assert cost() == (3, 3 * BATCHES, [])


class OldSquare(torch.autograd.Function):
    """A function in the old style, which ``torch.func`` refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("first", ["J", "JT"])
def test_functions_without_torch_func(first: str) -> None:
    model = Apply(lambda self, x: OldSquare.apply(self.net(x)), net=mlp())

    def predict(params: Params, X: Tensor) -> Tensor:
        named = {name.removeprefix("net."): p for name, p in params.items()}
        return functional_call(model.net, named, (X,)).square()

    problem = Problem(model, mse, vectors(), predict=predict)
    dense = problem.jacobian()
    J = build(problem)
    pairs = [(J, dense), (J.T, dense.T)]
    for A, matrix in pairs if first == "J" else reversed(pairs):
        assert_matrix(A, matrix)
        assert_close(A @ (v := rand(matrix.shape[1])), matrix @ v)
    x = rand(31).requires_grad_()
    with record_gradients():
        y = J @ x
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert_close(gradient, 2 * dense.T @ dense @ x.detach())
    assert not (J @ x).requires_grad


def test_transpose_needs_a_first_derivative_only() -> None:
    bag = nn.EmbeddingBag(5, 2, mode="sum").double()
    data = [(torch.randint(5, (n, 3)), classes(n)) for n in SIZES]
    JT = TransposedJacobianLinearOperator(bag, dict(bag.named_parameters()), data)

    def predict(W: Tensor) -> Tensor:
        return torch.cat([W[X].sum(1) for X, _ in data])

    dense = jacrev(predict)(bag.weight.detach()).reshape(16, 10)
    assert_matrix(JT, dense.T)
    with pytest.raises(NotImplementedError, match="embedding_bag"):
        JT.T @ rand(10)


def test_fused_attention() -> None:
    def predict(params: Params, X: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*(X @ params["W"]).chunk(3, dim=-1))

    def plain(W: Tensor, X: Tensor) -> Tensor:
        q, k, v = (X @ W).chunk(3, dim=-1)
        return (q @ k.mT / 2).softmax(-1) @ v

    params = {"W": rand(3, 12).float()}
    data = [(rand(n, 1, 5, 3).float(), None) for n in SIZES]
    dense = jacrev(lambda W: torch.cat([plain(W, X).flatten() for X, _ in data]))(params["W"])
    dense = dense.reshape(-1, 36).double()
    J = JacobianLinearOperator(predict, params, data)
    assert_matrix(J.T, dense.T, 1e-6)  # a first derivative needs no other kernel: no warning
    with pytest.warns(UserWarning, match="fused attention") as record:
        assert_matrix(J, dense, 1e-6)
    assert len(record) == 1
    assert_matrix(J, dense, 1e-6)


def test_function_models_and_mappings() -> None:
    def predict(params: Params, X: dict[str, Tensor]) -> Tensor:
        return X["a"] @ params["W"] * X.pop("b")

    params = {"W": rand(3, 2)}
    data = [({"a": rand(n, 3), "b": rand(n, 2), "names": ["x"] * n}, None) for n in SIZES]
    options = {"batch_size_fn": lambda X: len(X["a"])}
    J = JacobianLinearOperator(predict, params, data, **options)
    dense = jacrev(lambda W: torch.cat([predict({"W": W}, dict(X)) for X, _ in data]))(params["W"])
    assert_matrix(J, dense.reshape(16, 6))
    assert all("b" in X for X, _ in data)
    with pytest.raises(ValueError, match="Pass batch_size_fn"):
        JacobianLinearOperator(predict, params, data)


@pytest.mark.parametrize("cls", JACOBIANS)
def test_bad_options(cls: Any) -> None:
    problem = PROBLEMS["mlp_mse"]()
    with pytest.raises(ValueError, match="chunk_size must be an integer, at least 1, got 0"):
        problem.operator(cls, chunk_size=0)
    A = problem.operator(cls)
    with pytest.raises(ValueError, match=r"must have shape \[\d+\] or \[\d+, K\], got \[7\]"):
        A @ rand(7)
    J = A if cls is JacobianLinearOperator else A.T
    with pytest.raises(ValueError, match="this space has no names"):
        J.T @ {"prediction": rand(8, 2)}
    with pytest.raises(ValueError, match="Dtype mismatch"):
        A @ rand(A.shape[1]).float()


# ---- autocast --------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", ALL)
def test_results_have_the_dtype_of_the_operator(cls: Any) -> None:
    """Also where autocast lets the model compute in another one, and in products of operators."""
    problem = Problem(mlp(), cross_entropy, vectors())
    dense = problem.dense(cls)
    problem.to(torch.float32)
    A = problem.operator(cls)
    B = TensorLinearOperator(rand(A.shape[1], A.shape[1]).float())
    with torch.autocast("cpu", torch.bfloat16):
        for columns in ((), (2,)):
            v, u = (rand(n, *columns).float() for n in reversed(A.shape))
            products = {
                "A v": (A @ v, dense @ v.double()),
                "uᵀ A": (u.t() @ A, u.t().double() @ dense),
                "A Aᵀ u": ((A @ A.T) @ u, dense @ dense.T @ u.double()),
            }
            for name, (product, expected) in products.items():
                assert product.dtype is torch.float32, name
                assert_close(product, expected, 0.1)
            assert (B @ v).dtype is torch.float32
        assert B.to_dense().dtype is torch.float32
