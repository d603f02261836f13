"""Where the examples are inside of a model: found, or refused, but never guessed.

A model may flatten, sort or choose rows in any order, or have layers whose input is the same for
all examples. What needs the examples' rows is then exact, or says that they cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from block_checks import assert_close
from kfac_cases import Lambda
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from curvlinops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.computers.arrangement import (
    BATCH_FIRST,
    UNKNOWN,
    Arrangements,
    another_order,
    find_arrangement,
)
from curvlinops.computers.selection import NAMES, may_select
from curvlinops.computers.usages import Parameters

Data = list[tuple[Any, Tensor]]
Forward = Callable[[Any, Tensor], Tensor]

F64 = torch.float64
LOSS = nn.CrossEntropyLoss()
APART, SHARED = "examples cannot be told apart", "input has no axis of examples"

each_backend = pytest.mark.parametrize("backend", ["hooks", "make_fx"])


def build(
    operator: Any, model: nn.Module, data: Data, backend: str = "hooks", **options: Any
) -> Any:
    """Build an operator of all parameters."""
    params = dict(model.named_parameters())
    options = {"fisher_type": "type-2", "backend": backend, **options}
    return operator(model, LOSS, params, data, **options)


def labeled(*inputs: Tensor) -> Data:
    """Return batches with one label, and thus one loss term, for each example."""
    return [(X, torch.arange(len(X)) % 2) for X in inputs]


def by_parameter(K: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the rows and columns of each parameter."""
    dense, start, blocks = K.to_dense(), 0, {}
    for name, p in model.named_parameters():
        part = slice(start, start := start + p.numel())
        blocks[name] = dense[part, part]
    return blocks


def ggn_blocks(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Return the exact block of each parameter."""
    G = GGNLinearOperator(model, LOSS, dict(model.named_parameters()), data)
    return by_parameter(G, model)


def check_equal(K: Any, model: nn.Module, expected: dict[str, Tensor], *names: str) -> None:
    """Compare the blocks of some parameters, or of all."""
    blocks = by_parameter(K, model)
    for name in names or blocks:
        assert_close(blocks[name], expected[name])


def check_traces(
    K: Any, model: nn.Module, exact: dict[str, Tensor], leave_out: tuple[str, ...] = ()
) -> None:
    """Compare the trace of each block, but of those left out, with the exact one."""
    blocks = by_parameter(K, model)
    for name in [name for name in blocks if name not in leave_out]:
        torch.testing.assert_close(blocks[name].trace(), exact[name].trace(), rtol=1e-8, atol=1e-14)


def check_diagonals(
    K: Any, model: nn.Module, exact: dict[str, Tensor], names: tuple[str, ...]
) -> None:
    """Compare diagonal blocks with the exact diagonal."""
    blocks = by_parameter(K, model)
    for name in names:
        assert_close(blocks[name], exact[name].diagonal().diag())


def check_refused(
    operator: Any,
    model: nn.Module,
    data: Data,
    backend: str,
    names: tuple[str, ...],
    reason: str,
    **options: Any,
) -> None:
    """Expect an error that names these parameters, no others, and the reason."""
    with pytest.raises(NotImplementedError, match=reason) as info:
        build(operator, model, data, backend, **options)
    refused = [name for name, _ in model.named_parameters() if f"'{name}'" in str(info.value)]
    assert sorted(refused) == sorted(names)


# ---- examples that cannot be told apart ----------------------------------------------------------
LINEARS = ("a.weight", "a.bias", "b.weight", "b.bias")


@dataclass(frozen=True)
class Mixed:
    """A model whose rows cannot be assigned to examples.

    Attributes:
        forward: The model.
        inputs: Makes the batches.
        batch_first: The same function, with the examples in the first axis; None if there is none:
            single examples are compared then.
        names: The parameters of the layers that see such rows.
        first: The first layer.
    """

    forward: Forward
    inputs: Callable[[], list[Tensor]]
    batch_first: Forward | None = None
    names: tuple[str, ...] = LINEARS
    first: Callable[[], nn.Module] = lambda: nn.Linear(3, 4)

    def models(self, norm: bool = False) -> tuple[nn.Module, nn.Module]:
        """Return the model, and what is compared with it, with the same parameters."""
        model = Lambda(
            self.forward,
            a=self.first(),
            other=nn.Linear(3, 4),
            norm=nn.LayerNorm(4) if norm else nn.Identity(),
            b=nn.Linear(4, 2),
        ).double()
        for p in model.norm.parameters():
            nn.init.normal_(p)
        if self.names == LINEARS:
            del model.other
        return model, Lambda(self.batch_first or self.forward, **dict(model.named_children()))

    def data(self) -> tuple[Data, Data]:
        """Return the data, and those of what is compared."""
        data = labeled(*self.inputs())
        if self.batch_first is not None:
            return data, data
        return data, [(X[i : i + 1], y[i : i + 1]) for X, y in data for i in range(len(X))]


def net(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.norm(m.a(x))))


def rows_outside(m: Any, x: Tensor) -> Tensor:
    """(h n w)."""
    n, height, width = x.shape[:3]
    h = net(m, x.transpose(0, 1).reshape(-1, 3))
    return h.reshape(height, n, width, 2).mean((0, 2))


def class_tokens_first(m: Any, x: Tensor) -> Tensor:
    n = len(x)
    h = net(m, torch.cat([x[:, 0], x[:, 1:].reshape(-1, 3)]))
    return h[:n] + h[n:].reshape(n, -1, 2).mean(1)


def chosen(m: Any, x: Tensor) -> Tensor:
    keep = x[..., 0] > 0
    out = x.new_zeros(*x.shape[:2], 2)
    out[keep] = net(m, x[keep])
    return out.sum(1)


def chosen_by_number(m: Any, x: Tensor) -> Tensor:
    keep = x[..., 0].flatten()
    numbers = [i for i, entry in enumerate(keep.tolist()) if entry > 0]
    out = x.new_zeros(len(keep), 2)
    out[numbers] = net(m, x.flatten(0, 1)[numbers])
    return out.unflatten(0, (len(x), -1)).sum(1)


def positions_first(m: Any, x: Tensor) -> Tensor:
    n, length = x.shape[:2]
    return net(m, x.transpose(0, 1).reshape(-1, 3)).reshape(length, n, 2).mean(0)


def not_alone(m: Any, x: Tensor) -> Tensor:
    if len(x) < 4:
        raise ValueError("A few examples are not enough.")
    return positions_first(m, x)


def zero_state(m: Any, x: Tensor) -> Tensor:
    """Two views, one after the other, of a recurrent layer whose state is zero."""
    views = torch.cat([x[:, 0], x[:, 1]])
    h = torch.tanh(m.norm(m.a(torch.zeros_like(views))) + m.other(views))
    first, second = h.chunk(2)
    return m.b(first - 2 * second)


def zero_state_batch_first(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.norm(m.a(torch.zeros_like(x))) + m.other(x))
    return m.b(h[:, 0] - 2 * h[:, 1])


def zero_types(m: Any, x: Tensor) -> Tensor:
    """Positions first, with the same token type everywhere."""
    n, length = x.shape[:2]
    types = torch.zeros(length * n, dtype=torch.long)
    h = m.other(x.transpose(0, 1).reshape(-1, 3)) + m.norm(m.a(types))
    return m.b(torch.tanh(h)).reshape(length, n, 2).mean(0)


def zero_types_batch_first(m: Any, x: Tensor) -> Tensor:
    types = torch.zeros(x.shape[:2], dtype=torch.long)
    return m.b(torch.tanh(m.other(x) + m.norm(m.a(types)))).mean(1)


def sequences(*sizes: int, length: int = 3) -> list[Tensor]:
    return [torch.randn(n, length, 3, dtype=F64) for n in sizes]


def numbers_of_tokens(*batches: tuple[int, ...]) -> list[Tensor]:
    """Return sequences of which this many tokens are chosen."""
    inputs = []
    for counts in batches:
        X = torch.rand(len(counts), 3, 3, dtype=F64) + 0.1
        X[..., 0] *= torch.where(torch.arange(3) < torch.tensor(counts)[:, None], 1, -1)
        inputs.append(X)
    return inputs


MIXED = {
    "(h n w)": Mixed(
        rows_outside,
        lambda: [torch.randn(4, 2, 2, 3, dtype=F64)],
        lambda m, x: net(m, x).mean((1, 2)),
    ),
    "class tokens first": Mixed(
        class_tokens_first,
        lambda: sequences(4, 3),
        lambda m, x: (h := net(m, x))[:, 0] + h[:, 1:].mean(1),
    ),
    "chosen": Mixed(chosen, lambda: numbers_of_tokens((3, 1, 2, 2))),
    "chosen-fits-two": Mixed(chosen, lambda: numbers_of_tokens((2, 2, 3, 1))),
    "chosen-later": Mixed(chosen, lambda: numbers_of_tokens((2, 2, 2), (3, 1, 1))),
    "chosen by number-later": Mixed(
        chosen_by_number, lambda: numbers_of_tokens((2, 2, 2), (3, 1, 1))
    ),
    "chosen-as many": Mixed(chosen, lambda: numbers_of_tokens((2, 1, 3, 2))),
    "chosen-one on average": Mixed(chosen, lambda: numbers_of_tokens((1, 2, 0, 1))),
    "chosen-as many later": Mixed(chosen, lambda: numbers_of_tokens((2, 2, 2), (2, 3, 1))),
    "tie-zero state": Mixed(
        zero_state,
        lambda: sequences(3, 4, length=2),
        zero_state_batch_first,
        names=("a.weight", "a.bias"),
    ),
    "tie-zero types": Mixed(
        zero_types,
        lambda: sequences(3, 4, length=2),
        zero_types_batch_first,
        names=("a.weight",),
        first=lambda: nn.Embedding(2, 4),
    ),
    "not alone": Mixed(not_alone, lambda: sequences(4, 5), lambda m, x: net(m, x).mean(1)),
}
NEED_EXAMPLES = {
    "ekfac": (EKFACLinearOperator, {}),
    "kfoc": (KFOCLinearOperator, {}),
    "reduce": (KFACLinearOperator, {"kfac_approx": "reduce"}),
}
# The other backend is slower, and less is tried with it.
TRACED = ("(h n w)", "chosen", "chosen-as many later")
each_mixed = pytest.mark.parametrize(
    ("name", "backend"), [(n, "hooks") for n in MIXED] + [(n, "make_fx") for n in TRACED]
)
each_mixed_and_kind = pytest.mark.parametrize(
    ("kind", "name", "backend"),
    [
        *((kind, name, "hooks") for kind in NEED_EXAMPLES for name in MIXED),
        *(("ekfac", name, "make_fx") for name in TRACED),
        *((kind, "(h n w)", "make_fx") for kind in ("kfoc", "reduce")),
    ],
)
# What GGNDiagonalLinearOperator says about models that vmap, or a single example, does not suit.
slow_diagonals = pytest.mark.filterwarnings("ignore:Examples cannot be differentiated:UserWarning")


@cache
def mixed(name: str, norm: bool = False) -> Any:
    """Return models and data of a case, as its methods do, with exact blocks."""
    torch.manual_seed(0)
    (model, plain), (data, plain_data) = MIXED[name].models(norm), MIXED[name].data()
    return model, plain, data, plain_data, ggn_blocks(model, data)


@pytest.mark.parametrize("name", [name for name in MIXED if MIXED[name].batch_first])
def test_models_are_those_they_are_compared_with(name: str):
    for norm in (False, True):
        model, plain, data, *_ = mixed(name, norm)
        for X, _ in data:
            assert_close(model(X), plain(X))


@each_mixed_and_kind
def test_rows_of_unknown_examples_are_refused(kind: str, name: str, backend: str):
    """By all that needs an example's rows, with the names of the parameters."""
    operator, options = NEED_EXAMPLES[kind]
    model, _, data, *_ = mixed(name)
    check_refused(operator, model, data, backend, MIXED[name].names, APART, **options)


@slow_diagonals
@each_mixed_and_kind
def test_rows_of_unknown_examples_have_the_exact_diagonal(kind: str, name: str, backend: str):
    """If the user wants; EKFAC's other blocks stay exact."""
    operator, options = NEED_EXAMPLES[kind]
    model, _, data, _, exact = mixed(name)
    K = build(operator, model, data, backend, unsupported="diagonal", **options)
    check_diagonals(K, model, exact, MIXED[name].names)
    if operator is EKFACLinearOperator:
        check_traces(K, model, exact, MIXED[name].names)


@each_mixed
def test_expand_does_not_need_the_examples(name: str, backend: str):
    """It sums over rows, whoever's they are: as for the model with the examples first."""
    model, plain, data, plain_data, _ = mixed(name)
    K = build(KFACLinearOperator, model, data, backend)
    expected = build(KFACLinearOperator, plain, plain_data)
    check_equal(K, model, by_parameter(expected, plain))


@slow_diagonals
@each_mixed
def test_norms_need_the_examples(name: str, backend: str):
    """Also with expand: their blocks are sums over examples. Others keep theirs."""
    names = ("norm.weight", "norm.bias")
    model, plain, data, plain_data, exact = mixed(name, norm=True)
    check_refused(KFACLinearOperator, model, data, backend, names, APART)
    K = build(KFACLinearOperator, model, data, backend, unsupported="diagonal")
    check_diagonals(K, model, exact, names)
    expected = by_parameter(build(KFACLinearOperator, plain, plain_data), plain)
    check_equal(K, model, expected, *(key for key in expected if key not in names))


# ---- examples in another order -------------------------------------------------------------------
def sorted_by_length(m: Any, x: Tensor) -> Tensor:
    n = len(x)
    order = (x[..., 0] != 0).sum(1).argsort(descending=True)
    h = torch.tanh(m.norm(m.a(x[order].reshape(-1, 3)))).reshape(n, -1, 4).cumsum(1)
    h = m.b(h.reshape(-1, 4)).reshape(n, -1, 2)
    return h[order.argsort()].mean(1)


def not_sorted(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.norm(m.a(x))).cumsum(1)).mean(1)


def padded(*batches: tuple[int, ...]) -> list[Tensor]:
    """Return sequences of these lengths, with zeros behind."""
    inputs = sequences(*map(len, batches), length=4)
    for X, lengths in zip(inputs, batches, strict=True):
        X *= (torch.arange(4) < torch.tensor(lengths)[:, None])[..., None]
    return inputs


ORDERS = {
    "descending": [(4, 3, 2), (3, 1)],
    "ascending": [(1, 2, 3, 4)],
    "shuffled": [(2, 4, 1, 3), (3, 4, 1)],
    "first-in-place": [(4, 1, 3, 2)],
}


@pytest.mark.parametrize(
    ("order", "operator", "approx", "backend"),
    [
        *((order, EKFACLinearOperator, "expand", "hooks") for order in ORDERS),
        *((order, KFACLinearOperator, "reduce", "hooks") for order in ORDERS),
        ("shuffled", KFACLinearOperator, "expand", "hooks"),
        ("shuffled", KFACLinearOperator, "expand", "make_fx"),
        ("shuffled", EKFACLinearOperator, "expand", "make_fx"),
    ],
)
def test_sequences_that_the_model_sorts(order: str, operator: Any, approx: str, backend: str):
    """What needs the examples is refused, also if they happen to be in this order already.

    Catches: gradients of one example with the inputs of another, if a layer is used repeatedly.
    """
    torch.manual_seed(0)
    parts = {"a": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "b": nn.Linear(4, 2)}
    model = Lambda(sorted_by_length, **parts).double()
    data = labeled(*padded(*ORDERS[order]))
    names: tuple[str, ...] = ("norm.weight", "norm.bias")
    if operator is EKFACLinearOperator or approx == "reduce":
        names = (*names, *LINEARS)
    check_refused(operator, model, data, backend, names, APART, kfac_approx=approx)


@each_backend
@pytest.mark.parametrize("order", ORDERS)
def test_expand_of_sequences_that_the_model_sorts(order: str, backend: str):
    """It does not need the examples."""
    torch.manual_seed(0)
    parts = {"a": nn.Linear(3, 4), "norm": nn.Identity(), "b": nn.Linear(4, 2)}
    model, plain = (Lambda(f, **parts).double() for f in (sorted_by_length, not_sorted))
    data = labeled(*padded(*ORDERS[order]))
    assert_close(model(data[0][0]), plain(data[0][0]))
    K = build(KFACLinearOperator, model, data, backend)
    check_equal(K, model, by_parameter(build(KFACLinearOperator, plain, data), plain))


@each_backend
def test_equally_many_tokens_of_each_example(backend: str):
    """Rows that a mask chooses are no problem if each example has as many."""
    model, _ = MIXED["chosen"].models()
    data = labeled(*numbers_of_tokens((2, 2, 2, 2)))
    K = build(EKFACLinearOperator, model, data, backend)
    check_traces(K, model, ggn_blocks(model, data))


def where_it_is(keep: Tensor) -> Tensor:
    return keep.flatten().nonzero()[:, 0]


def numbers_of(keep: Tensor) -> list[int]:
    return [i for i, kept in enumerate(keep.flatten().tolist()) if kept]


def in_buffer(x: Tensor, keep: Tensor) -> Tensor:
    rows, stop = x.new_zeros(int(keep.sum()), 3), 0
    for i in range(len(x)):
        start, stop = stop, stop + int(keep[i].sum())
        rows[start:stop] = x[i, keep[i]]
    return rows


#: Ways to choose tokens ``[:, 3]`` of x ``[n, T, 3]`` by a mask ``[n, T]``.
CHOOSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask of rows": lambda x, keep: x.flatten(0, 1)[keep.flatten()],
    "mask first": lambda x, keep: x[keep, :],
    "bytes": lambda x, keep: x.flatten(0, 1)[where_it_is(keep.to(torch.uint8))],
    "nonzero": lambda x, keep: x[keep.nonzero(as_tuple=True)],
    "where": lambda x, keep: x[torch.where(keep)],
    "where by name": lambda x, keep: x[torch.where(condition=keep)],
    "argwhere": lambda x, keep: x[tuple(torch.argwhere(keep).T)],
    "index_select": lambda x, keep: x.flatten(0, 1).index_select(0, where_it_is(keep)),
    "masked_select": lambda x, keep: torch.masked_select(x, keep.unsqueeze(-1)).reshape(-1, 3),
    "masked_select of entries": lambda x, keep: x.masked_select(
        mask=keep.unsqueeze(-1).expand_as(x)
    ).unflatten(0, (-1, 3)),
    "repeats": lambda x, keep: x.flatten(0, 1).repeat_interleave(keep.flatten().long(), dim=0),
    "repeats by name": lambda x, keep: torch.repeat_interleave(
        input=x.flatten(0, 1), repeats=keep.flatten().long(), dim=0
    ),
    "repeated index": lambda x, keep: x.flatten(0, 1)[
        torch.repeat_interleave(keep.flatten().long())
    ],
    "unique": lambda x, keep: x.flatten(0, 1)[  # the first one is always there
        torch.unique(torch.arange(keep.numel()) * keep.flatten())
    ],
    "pieces": lambda x, keep: torch.cat([x[i, keep[i]] for i in range(len(x))]),
    "pieces along 0": lambda x, keep: torch.concat([x[i, keep[i]] for i in range(len(x))], dim=0),
    "vstack": lambda x, keep: torch.vstack([x[i, keep[i]] for i in range(len(x))]),
    "hstack": lambda x, keep: torch.hstack([x[i, keep[i]].T for i in range(len(x))]).T,
    "stack": lambda x, keep: torch.stack([x.flatten(0, 1)[i] for i in numbers_of(keep)]),
    "numbers": lambda x, keep: x.flatten(0, 1)[torch.tensor(numbers_of(keep))],
    "list of numbers": lambda x, keep: x.flatten(0, 1)[numbers_of(keep)],
    "gather": lambda x, keep: x.flatten(0, 1).gather(
        0, torch.tensor(numbers_of(keep))[:, None].expand(-1, 3)
    ),
    "embedding": lambda x, keep: F.embedding(torch.tensor(numbers_of(keep)), x.reshape(-1, 3)),
    "argsort": lambda x, keep: x.flatten(0, 1)[
        (~keep.flatten()).byte().argsort(stable=True)[: int(keep.sum())]
    ],
    "buffer": lambda x, keep: in_buffer(x, keep),
}
#: The other backend is slower, and less is tried with it.
CHOOSE_TRACED = ("mask first", "where", "masked_select", "pieces", "list of numbers", "buffer")
each_choice = pytest.mark.parametrize(
    ("choice", "backend"),
    [*((name, "hooks") for name in CHOOSE), *((name, "make_fx") for name in CHOOSE_TRACED)],
)


def chosen_by(choice: str) -> nn.Module:
    """Return a model of chosen tokens."""

    def forward(m: Any, x: Tensor) -> Tensor:
        keep = x[..., 0] > 0
        rows = net(m, CHOOSE[choice](x, keep))
        places = where_it_is(keep)
        return x.new_zeros(keep.numel(), 2).index_put((places,), rows).unflatten(0, (-1, 3)).sum(1)

    torch.manual_seed(0)
    return Lambda(forward, a=nn.Linear(3, 4), norm=nn.Identity(), b=nn.Linear(4, 2)).double()


@each_choice
def test_as_many_rows_as_of_equal_examples(choice: str, backend: str):
    """But examples have different numbers of them, however they are chosen."""
    model, data = chosen_by(choice), labeled(*numbers_of_tokens((2, 1, 3, 2)))
    assert len(CHOOSE[choice](data[0][0], data[0][0][..., 0] > 0)) == 8
    check_refused(EKFACLinearOperator, model, data, backend, LINEARS, APART)


@each_choice
def test_as_many_rows_in_a_later_batch(choice: str, backend: str):
    """The first one has two of each example."""
    model = chosen_by(choice)
    data = labeled(*numbers_of_tokens((2, 2, 2, 2), (1, 3, 3, 1)))
    check_refused(EKFACLinearOperator, model, data, backend, LINEARS, APART)


@each_choice
def test_equally_many_rows_of_each_example(choice: str, backend: str):
    """They may differ from batch to batch."""
    model = chosen_by(choice)
    data = labeled(*numbers_of_tokens((2, 2, 2, 2), (2, 2, 2)))
    K = build(EKFACLinearOperator, model, data, backend)
    check_traces(K, model, ggn_blocks(model, data))


#: What has nothing to do with the examples, though numbers may be equal: 4 of 8 tokens of 4.
UNRELATED: dict[str, Forward] = {
    "fixed tokens": lambda m, x: net(m, x[:, FIXED].reshape(-1, 3)).unflatten(0, (-1, 4)).mean(1),
    "fixed tokens, not flattened": lambda m, x: net(m, x[:, FIXED]).mean(1),
    "fixed features": lambda m, x: net(m, x.repeat(1, 1, 3)[..., FIXED_FEATURES]).mean(1),
    "chosen entries": lambda m, x: net(m, torch.where(largest(x), x, 0.1 * x)).mean(1),
    "chosen entries by name": lambda m, x: net(
        m, torch.where(input=x, other=0.1 * x, condition=largest(x))
    ).mean(1),
    "positions first": lambda m, x: net(
        m, torch.cat([x.transpose(0, 1)[:3], x.transpose(0, 1)[3:4]])
    ).mean(0),
    "a sum of them": lambda m, x: net(m, x[:, :1].flatten(1) + x[x > 0].sum() * 0),
}


def largest(x: Tensor) -> Tensor:
    """Return where the four largest entries are."""
    return x >= x.flatten().topk(4).values.min()


FIXED = torch.tensor([True, False, True, True, False, False, True, False])
FIXED_FEATURES = torch.tensor([True, False, True, True, False, False, False, False, False])


def best(m: Any, x: Tensor) -> Tensor:
    """As many tokens of the batch as it has examples."""
    found = x[..., 0].flatten().topk(len(x)).indices
    out = x.new_zeros(x.shape[0] * x.shape[1], 2)
    return (
        out.index_copy(0, found, net(m, x.flatten(0, 1)[found])).unflatten(0, (len(x), -1)).sum(1)
    )


def halves(m: Any, x: Tensor) -> Tensor:
    """Rows of chosen tokens, two for each of them."""
    keep = x[..., 0] > 0
    rows = net(m, x[keep].repeat_interleave(2, 0)).unflatten(0, (-1, 2)).sum(1)
    return x.new_zeros(*keep.shape, 2).masked_scatter(keep.unsqueeze(-1), rows).sum(1)


def experts(m: Any, x: Tensor) -> Tensor:
    """Each of two layers gets the tokens that choose it."""
    h = x.flatten(0, 1)
    out = h.new_zeros(len(h), 2)
    for number, layer in enumerate((m.a, m.other)):
        (tokens,) = torch.where((h[:, 0] > 0) == bool(number))
        if len(tokens):
            out = out.index_add(0, tokens, m.b(torch.tanh(layer(h[tokens]))))
    return out.unflatten(0, (len(x), -1)).sum(1)


BY_BATCH: dict[str, tuple[Forward, tuple[tuple[int, ...], ...]]] = {
    "best": (best, ((3, 1, 0, 0),)),
    "best in a later batch": (best, ((1, 1, 1), (2, 1, 0))),
    "repeated": (halves, ((2, 1, 3, 2), (1, 3, 2, 2))),
    "experts of one example": (experts, ((3, 0),)),
    "as many rows as examples": (experts, ((2, 0),)),  # of an expert that the last one has not
    "experts of another one in a later batch": (experts, ((2, 2), (3, 1))),
}


@slow_diagonals
@each_backend
@pytest.mark.parametrize("name", BY_BATCH)
def test_rows_that_the_batch_decides(name: str, backend: str):
    """Numbers of rows are those of models that have as many of each example."""
    forward, counts = BY_BATCH[name]
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "norm": nn.Identity(), "b": nn.Linear(4, 2)}
    if forward is experts:
        layers["other"] = nn.Linear(3, 4)
    model, data = Lambda(forward, **layers).double(), labeled(*numbers_of_tokens(*counts))
    with pytest.raises(NotImplementedError, match="not in supported layers"):
        build(EKFACLinearOperator, model, data, backend)
    K = build(EKFACLinearOperator, model, data, backend, unsupported="diagonal")
    exact = ggn_blocks(model, data)
    for parameter, block in by_parameter(K, model).items():
        torch.testing.assert_close(block.trace(), exact[parameter].trace())


@each_backend
def test_an_encoder_that_sorts_is_used_twice(backend: str):
    """Gradients of one example are not added to those of another."""

    def encode(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return torch.tanh(m.a(x[order]))[order.argsort()]

    model = Lambda(
        lambda m, x: m.b(encode(m, x[:, 0]) * encode(m, x[:, 1])),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
    ).double()
    data = labeled(*sequences(4, 4))
    names = ("a.weight", "a.bias")
    check_refused(EKFACLinearOperator, model, data, backend, names, APART)


def in_pieces(x: Tensor, k: int) -> Tensor:
    """Return the first ones of all k pieces, then the second ones, and so on."""
    return x.unflatten(0, (k, -1)).transpose(0, 1).flatten(0, 1)


#: Orders into which a model may bring its examples, and back.
PLACES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "in reverse": (lambda x: x.flip(0), lambda x: x.flip(0)),
    "in reverse, by numbers": (
        lambda x: x[torch.arange(len(x)).flip(0)],
        lambda x: x[torch.arange(len(x)).flip(0)],
    ),
    "rolled": (lambda x: x.roll(1, 0), lambda x: x.roll(-1, 0)),
    "halves": (
        lambda x: torch.cat(x.tensor_split(2)[::-1]),
        lambda x: torch.cat([x[(len(x)) // 2 :], x[: len(x) // 2]]),
    ),
    "interleaved": (lambda x: in_pieces(x, 2), lambda x: in_pieces(x, len(x) // 2)),
}


@pytest.mark.parametrize(
    ("order", "n", "backend"),
    [
        *((order, n, "hooks") for order in PLACES for n in (4, 6)),
        *(("in reverse", n, "hooks") for n in (2, 3, 5)),
        ("in reverse", 4, "make_fx"),
        ("interleaved", 4, "make_fx"),
    ],
)
def test_orders_of_examples(order: str, n: int, backend: str):
    """Layers that are used in two orders are refused. Catches: only sizes are compared."""
    forth, back = PLACES[order]

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x[:, 0]) * back(m.a(forth(x[:, 1])))))

    model = Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    data = labeled(*sequences(n, n))
    probe = torch.randn(n, 3, dtype=F64)
    assert torch.equal(back(forth(probe)), probe)
    names = ("a.weight", "a.bias")
    check_refused(EKFACLinearOperator, model, data, backend, names, APART)


@each_backend
@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_examples_sorted_with_a_large_feature(largest: float, backend: str):
    """Catches: differences are compared with the largest feature, and taken for rounding errors."""

    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return m.b(torch.tanh(m.a(x)) * torch.tanh(m.a(x[order]))[order.argsort()])

    model = Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    X = torch.randn(5, 3, dtype=F64)
    X[:, 2] = largest
    names = ("a.weight", "a.bias")
    check_refused(EKFACLinearOperator, model, labeled(X), backend, names, APART)


def test_another_order():
    """No number follows the one before, and it is no symmetry of orders that models have."""
    assert another_order(2) == [1, 0]
    for n in range(4, 65):
        order = torch.tensor(another_order(n))
        assert torch.equal(order.sort().values, torch.arange(n))
        assert not bool((order.diff() == 1).any())
        numbers = torch.arange(n)
        pieces = [in_pieces(numbers, k) for k in range(2, n) if n % k == 0]
        rolled = [numbers.roll(k) for k in range(1, n)]
        for other in [numbers.flip(0), *pieces, *rolled]:
            assert not torch.equal(other[order], order[other])


@each_backend
@pytest.mark.parametrize("kind", NEED_EXAMPLES)
def test_axes_that_are_squeezed(kind: str, backend: str):
    """A single example alone has no axis of examples then."""
    operator, options = NEED_EXAMPLES[kind]
    features = [nn.Conv1d(3, 4, 1), nn.AdaptiveAvgPool1d(1)]
    squeezing = Lambda(
        lambda m, x: m.b(torch.tanh(m.features(x.mT).squeeze())),
        features=nn.Sequential(*features),
        b=nn.Linear(4, 2),
    ).double()
    flattening = nn.Sequential(*features, nn.Flatten(), nn.Tanh(), squeezing.b)
    data = labeled(*sequences(4, 3))
    K = build(operator, squeezing, data, backend, **options)
    expected = build(operator, flattening, [(X.mT, y) for X, y in data], **options)
    torch.testing.assert_close(K.to_dense(), expected.to_dense())


@each_backend
@pytest.mark.parametrize("counts", [((3, 0),), ((0, 3),), ((2, 1, 0),), ((0, 0),), ((3, 3),)])
def test_experts_need_no_examples(counts: Any, backend: str):
    """Catches: as many rows of the batch as of one of its examples are taken for shared ones."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "other": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    model, data = Lambda(experts, **layers).double(), labeled(*numbers_of_tokens(*counts))
    K = build(KFACLinearOperator, model, data, backend)
    single = [(X[i : i + 1], y[i : i + 1]) for X, y in data for i in range(len(X))]
    check_equal(K, model, by_parameter(build(KFACLinearOperator, model, single), model))


@each_backend
@pytest.mark.parametrize("n", [3, 4, 7])
@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
def test_a_tensor_for_all_examples_among_others(operator: Any, n: int, backend: str):
    """Positions are not examples, though there are four of them, as many as examples."""
    model = Lambda(
        lambda m, X: m.b(torch.tanh(m.a(X["ids"]) + m.other(X["positions"])).mean(1)),
        a=nn.Embedding(5, 3),
        other=nn.Embedding(6, 3),
        b=nn.Linear(3, 2),
    ).double()
    X = {"ids": torch.randint(5, (n, 4)), "positions": torch.arange(4)}
    data = [(X, torch.arange(n) % 2)]
    options: Any = {"batch_size_fn": lambda X: len(X["ids"])}
    params = dict(model.named_parameters())
    K = operator(model, LOSS, params, data, fisher_type="type-2", backend=backend, **options)
    G = GGNLinearOperator(model, LOSS, params, data, **options)
    exact, blocks = by_parameter(G, model), by_parameter(K, model)
    if operator is EKFACLinearOperator:
        for name in blocks:
            torch.testing.assert_close(blocks[name].trace(), exact[name].trace())
    single = [({**X, "ids": X["ids"][i : i + 1]}, data[0][1][i : i + 1]) for i in range(n)]
    expected = operator(model, LOSS, params, single, fisher_type="type-2", **options)
    check_equal(K, model, by_parameter(expected, model))


@each_backend
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (20, 1), (0, 0.003)])
def test_a_tensor_for_all_examples_that_may_be_cut(offset: float, scale: float, backend: str):
    """If the model can do with fewer entries, its predictions show that it has got too few.

    Catches: a difference that is small compared with what all predictions have in common.
    """
    model = Lambda(
        lambda m, X: m.b(torch.tanh(m.a(X["x"]) + scale * m.other(X["context"]).mean(0))) + offset,
        a=nn.Linear(3, 4),
        other=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
    ).double()
    X = {"x": torch.randn(4, 3, dtype=F64), "context": torch.randn(4, 3, dtype=F64)}
    params = dict(model.named_parameters())
    data, reason = [(X, torch.arange(4) % 2)], "predicts something else for some examples alone"
    for operator in (KFACLinearOperator, EKFACLinearOperator):
        with pytest.raises(NotImplementedError, match=reason):
            operator(
                model, LOSS, params, data, backend=backend, batch_size_fn=lambda X: len(X["x"])
            )


#: Numbers of images of each example of some batches, on average one.
IMAGES = {
    "one has both": ((2, 0),),
    "in order": ((0, 2, 1),),
    "in a later batch": ((1, 1, 1), (2, 1, 0)),
    "the last one's": ((1, 1, 1), (0, 0, 3)),
    "equal halves": ((1, 1, 1, 1), (2, 0, 2, 0)),
}


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "hooks") for name in IMAGES), ("in a later batch", "make_fx")]
)
def test_as_many_images_as_examples(name: str, backend: str):
    """Features of images take the places of tokens, but not one image for each example."""

    def forward(m: Any, X: Any) -> Tensor:
        images, h = torch.tanh(m.other(X["images"])), m.a(X["ids"])
        h = h.masked_scatter((X["ids"] == 0).unsqueeze(-1).expand_as(h), images)
        return m.b(torch.tanh(h).mean(1))

    torch.manual_seed(0)
    layers = {"a": nn.Embedding(2, 4), "other": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    model = Lambda(forward, **layers).double()
    data = []
    for counts in IMAGES[name]:
        ids = (torch.arange(3) >= torch.tensor(counts)[:, None]).long()
        X = {"ids": ids, "images": torch.randn(sum(counts), 3, dtype=F64)}
        data.append((X, torch.arange(len(counts)) % 2))
    options: Any = {"batch_size_fn": lambda X: len(X["ids"])}
    with pytest.raises(NotImplementedError, match=r"'other.weight' \(the model predicts something"):
        build(EKFACLinearOperator, model, data, backend, **options)


@each_backend
@pytest.mark.parametrize("lengths", [(2, 4, 3), (4, 2, 3, 2), (2, 3)])
def test_padding_that_the_model_cuts(lengths: tuple[int, ...], backend: str):
    """A few examples alone may be shorter than in their batch."""

    def forward(m: Any, X: Any) -> Tensor:
        keep = X["keep"][:, : int(X["keep"].sum(1).max())]
        h = torch.tanh(m.norm(m.a(X["ids"][:, : keep.shape[1]])))
        return (m.b(h) * keep.unsqueeze(-1)).sum(1)

    layers = {"a": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "b": nn.Linear(4, 2)}
    model, n = Lambda(forward, **layers).double(), len(lengths)
    keep = torch.arange(5) < torch.tensor(lengths)[:, None]
    data = [({"ids": torch.randint(5, (n, 5)), "keep": keep}, torch.arange(n) % 2)]
    options: Any = {"batch_size_fn": lambda X: len(X["ids"])}
    params = dict(model.named_parameters())
    G = GGNLinearOperator(model, LOSS, params, data, **options)
    K = build(EKFACLinearOperator, model, data, backend, **options)
    check_traces(K, model, by_parameter(G, model))


@each_backend
def test_mappings_that_cannot_be_cut(backend: str):
    """If a model fails for a few examples, it is not known which tensors have examples."""

    def forward(m: Any, X: Any) -> Tensor:
        if len(X["x"]) < 4:
            raise ValueError("A few examples are not enough.")
        return m.b(torch.tanh(m.a(X["x"])))

    model = Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    data = [({"x": torch.randn(4, 3, dtype=F64)}, torch.arange(4) % 2)]
    options = {"batch_size_fn": lambda X: len(X["x"])}
    check_refused(EKFACLinearOperator, model, data, backend, LINEARS, APART, **options)
    build(KFACLinearOperator, model, data, backend, **options)


def test_functions_that_may_select():
    """By entries, and not by places, sizes or masks of attention."""
    x, numbers = torch.rand(3, 2), torch.tensor([[0], [1], [0]])
    keep = numbers == 1
    selecting: list[tuple[str, Any, Any]] = [
        ("__getitem__", (x, keep[:, 0]), {}),
        ("__getitem__", (x, (slice(None), [0, 1])), {}),
        ("__getitem__", (x, [0, 1]), {}),
        ("index", (x, [None, numbers[:2, 0]]), {}),
        ("__setitem__", (x, slice(2), x[:2]), {}),
        ("where", (keep,), {}),
        ("where", (), {"condition": keep}),
        ("cat", ([x, x, x],), {}),
        ("vstack", ([x, x, x, x],), {}),
        ("split", (x, [1, 2]), {}),
        ("split", (x,), {"split_size_or_sections": [1, 2]}),
        ("gather", (numbers, 0, numbers), {}),
        ("gather", (numbers, 1, numbers, x), {}),
        ("take_along_dim", (x, numbers, 0), {}),
        ("take_along_dim", (numbers, numbers), {}),
        ("topk", (x, 2), {}),
    ]
    others: list[tuple[str, Any, Any]] = [
        ("__getitem__", (x, (slice(None), 0)), {}),
        ("__getitem__", (keep, numbers), {}),
        ("where", (keep, x, x), {}),
        ("where", (keep,), {"input": x, "other": x}),
        ("cat", ([x, x],), {}),
        ("split", (x, 2), {"dim": 0}),
        ("gather", (numbers, 1, numbers), {}),
        ("take_along_dim", (numbers, numbers, 1), {}),
        ("take_along_dim", (numbers, numbers), {"dim": 1}),
    ]
    assert all(name in NAMES and may_select(name, *call, 3) for name, *call in selecting)
    assert not any(may_select(name, *call, 3) for name, *call in others)


def test_constant_tables_have_no_examples():
    """Rows of activations may be looked up, too."""
    table, x, numbers = nn.Parameter(torch.rand(3, 2)), torch.rand(3, 2), torch.tensor([0, 1])
    for call in ((numbers, table.detach()), (numbers, x)):
        arrangements = Arrangements()
        arrangements.begin((), True, False, Parameters({"table": table}))
        arrangements.note_function("embedding", call, {}, 3)
        assert arrangements.entries_matter == (call[1] is x)


@each_backend
@pytest.mark.parametrize("options", [{}, {"loss_terms": "exact"}], ids=["signs", "exact"])
def test_constant_embeddings_cost_nothing(backend: str, options: dict[str, Any]):
    """Catches models that are evaluated in another order because tokens are looked up in a table.

    Linear layers need as many operations as for the same embeddings, given as the input.
    """
    embedding = nn.Embedding(7, 4)
    linear = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    params = {f"1.{name}": p for name, p in linear.named_parameters()}
    tokens, labels = torch.randint(0, 7, (5, 6)), torch.arange(30).view(5, 6) % 2
    counts = []
    for first, X in ((embedding, tokens), (nn.Identity(), embedding(tokens).detach())):
        model = Lambda(lambda net, x: net.net(x).mT, net=nn.Sequential(first, linear))
        named = {f"net.{name}": p for name, p in params.items()}
        with FlopCounterMode(display=False) as counter:
            EKFACLinearOperator(model, LOSS, named, [(X, labels)] * 2, backend=backend, **options)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@each_backend
@pytest.mark.parametrize("name", UNRELATED)
def test_selections_without_examples(name: str, backend: str):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "norm": nn.Identity(), "b": nn.Linear(4, 2)}
    model = Lambda(UNRELATED[name], **layers).double()
    data = labeled(*sequences(4, length=8))
    K = build(EKFACLinearOperator, model, data, backend)
    check_traces(K, model, ggn_blocks(model, data))


@each_backend
@pytest.mark.parametrize("lengths", [(2, 2, 2, 2), (2, 1, 3, 2)])
def test_packed_sequences(lengths: tuple[int, ...], backend: str):
    """Their rows are those of the first position of all examples first."""

    def forward(m: Any, x: Tensor) -> Tensor:
        packed = pack(x, lengths=x[:, 0, 0].round().long(), batch_first=True, enforce_sorted=False)
        out, _ = unpack(packed._replace(data=net(m, packed.data)), batch_first=True)
        return out.sum(1)

    pack, unpack = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "norm": nn.Identity(), "b": nn.Linear(4, 2)}
    model = Lambda(forward, **layers).double()
    (X,) = sequences(4)
    X[:, 0, 0] = torch.tensor(lengths)
    data = labeled(X)
    if len(set(lengths)) > 1:
        check_refused(EKFACLinearOperator, model, data, backend, LINEARS, APART)
    else:
        K = build(EKFACLinearOperator, model, data, backend)
        check_traces(K, model, ggn_blocks(model, data))


@each_backend
def test_loss_terms_of_chosen_tokens(backend: str):
    """If they are to be kept apart, examples must have as many: here two on average."""
    model = Lambda(
        lambda m, x: torch.tanh(m.a(x)).cumsum(1)[x[..., 0] > 0], a=nn.Linear(3, 2)
    ).double()
    for counts, known in (((2, 2, 2, 2), True), ((2, 1, 3, 2), False)):
        (X,) = numbers_of_tokens(counts)
        data = [(X, torch.arange(8) % 2)]
        if known:
            build(KFACLinearOperator, model, data, backend, loss_terms="exact")
        else:
            with pytest.raises(ValueError, match="cannot be told apart"):
                build(KFACLinearOperator, model, data, backend, loss_terms="exact")


@each_backend
def test_first_example_tells_nothing(backend: str):
    """If it is zero, and so is the first position of each, then the last example tells."""
    forward = Lambda(
        positions_first, a=nn.Linear(3, 4), norm=nn.Identity(), b=nn.Linear(4, 2)
    ).double()
    (X,) = sequences(5)
    X[0] = X[:, 0] = 0
    data = labeled(X)
    K = build(EKFACLinearOperator, forward, data, backend)
    check_traces(K, forward, ggn_blocks(forward, data))


@each_backend
def test_structures_have_arrangements_of_their_own(backend: str):
    """Where the examples are may depend on the number of positions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return (positions_first if x.shape[1] == 3 else positions_second)(m, x)

    def positions_second(m: Any, x: Tensor) -> Tensor:
        return net(m, x.reshape(-1, 3)).reshape(*x.shape[:2], 2).mean(1)

    model = Lambda(forward, a=nn.Linear(3, 4), norm=nn.Identity(), b=nn.Linear(4, 2)).double()
    data = labeled(*sequences(4, length=2), *sequences(4, length=3), *sequences(4, length=2))
    K = build(EKFACLinearOperator, model, data, backend)
    check_traces(K, model, ggn_blocks(model, data))


def plain(m: Any, x: Tensor) -> Tensor:
    return net(m, x).mean(1)


def with_positions(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x) + m.other(torch.eye(3, dtype=x.dtype)))).mean(1)


EVALUATIONS: dict[str, tuple[Forward, int, int]] = {
    "plain": (plain, 0, 0),
    "positions": (with_positions, 4, 0),  # one output for each example is tried, once
    "chosen": (chosen, 0, 1),
}


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_number_of_evaluations(name: str, operator: Any):
    """A single example is evaluated once; others only where they matter."""
    counts: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        counts.append(len(x))
        return EVALUATIONS[name][0](m, x)

    layers = {"a": nn.Linear(3, 4), "norm": nn.Identity(), "b": nn.Linear(4, 2)}
    if name == "positions":
        layers["other"] = nn.Linear(3, 4)
    data = labeled(*numbers_of_tokens((2,) * 6, (2,) * 5, (2,) * 6))
    build(operator, Lambda(forward, **layers).double(), data, check_deterministic=False)
    _, once, each = EVALUATIONS[name]
    reversed_ = each if operator is EKFACLinearOperator else 0
    few = [1] + [2] * once
    assert sorted(counts) == sorted([*few, *(n for n in (6, 5, 6) for _ in range(1 + reversed_))])


@pytest.mark.parametrize(("off", "known"), [(0.0, True), (0.05, True), (0.07, False)])
def test_tolerance(off: float, known: bool):
    """Rounding is allowed; what is farther off is not found, though nearest."""
    few = torch.tensor([[1.0], [2.0]])
    many = torch.cat([few, few]) + off
    found = find_arrangement(few, many, [1], 2, tolerance=2**-5)
    assert found == (BATCH_FIRST if known else UNKNOWN)


# ---- loss terms of an example --------------------------------------------------------------------
def hidden_states(m: Any, x: Tensor) -> Tensor:
    """Predictions ``[n, T, 2]``, which depend on the positions before."""
    return m.b(torch.tanh(m.a(x).cumsum(1)))


TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "examples first": lambda z: z.reshape(-1, 2),
    "positions first": lambda z: z.transpose(0, 1).reshape(-1, 2),
    "sorted": lambda z: z.flip(0).reshape(-1, 2),
    "positions first, not flattened": lambda z: z.transpose(0, 1),
}


@pytest.mark.parametrize("order", TERMS)
@pytest.mark.parametrize(
    ("operator", "backend", "fisher_type"),
    [
        (KFACLinearOperator, "hooks", "type-2"),
        (KFACLinearOperator, "hooks", "empirical"),
        (KFACLinearOperator, "make_fx", "type-2"),
        (EKFACLinearOperator, "hooks", "type-2"),
        (EKFACLinearOperator, "hooks", "empirical"),
        (KFOCLinearOperator, "hooks", "type-2"),
    ],
)
def test_terms_of_an_example_in_any_order(
    operator: Any, backend: str, fisher_type: str, order: str
):
    """In the exact mode, results do not depend on how predictions are flattened."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    expected = Lambda(hidden_states, **layers).double()
    model = Lambda(lambda m, x: TERMS[order](hidden_states(m, x)), **layers).double()
    X, Y = torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 2, 2, dtype=F64)
    params = dict(model.named_parameters())
    options: Any = {"fisher_type": fisher_type, "backend": backend, "loss_terms": "exact"}
    K = operator(model, nn.MSELoss(), params, [(X, TERMS[order](Y))], **options)
    exact = operator(expected, nn.MSELoss(), params, [(X, Y)], **options)
    tolerance = 1e-6 if operator is KFOCLinearOperator else 1e-10
    torch.testing.assert_close(K.to_dense(), exact.to_dense(), rtol=tolerance, atol=tolerance)


# ---- positions, frames or views first ------------------------------------------------------------
def frames_first(m: Any, x: Tensor) -> Tensor:
    n, frames = x.shape[:2]
    h = m.layer(x.transpose(0, 1).flatten(0, 1)).flatten(2).mean(2)
    return m.b(torch.tanh(h)).unflatten(0, (frames, n)).cumsum(0).prod(0)


def frames_second(m: Any, x: Tensor) -> Tensor:
    n, frames = x.shape[:2]
    h = m.layer(x.flatten(0, 1)).flatten(2).mean(2)
    return m.b(torch.tanh(h)).unflatten(0, (n, frames)).cumsum(1).prod(1)


def views_first(m: Any, x: Tensor) -> Tensor:
    h = m.layer(torch.cat([x[:, 0], x[:, 1]])).flatten(2).mean(2)
    first, second = m.b(torch.tanh(h)).chunk(2)
    return first * (first + second)


CHANNELS = 4
NORMS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, CHANNELS),
    "BatchNorm2d": lambda: nn.BatchNorm2d(CHANNELS),
}
IMAGE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Conv1d(CHANNELS, 3, 2),
    "Conv2d": lambda: nn.Conv2d(CHANNELS, 3, (2, 1)),
    "Conv2d-groups": lambda: nn.Conv2d(CHANNELS, 4, 2, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(CHANNELS, 3, 2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(CHANNELS, 3, (1, 2)),
    **NORMS,
}


@cache
def image_problem(name: str, forward: Forward, frames: int) -> tuple[nn.Module, nn.Module, Data]:
    """Return a model, the one with the examples first, and data."""
    torch.manual_seed(0)
    layer = IMAGE_LAYERS[name]()
    for key, tensor in layer.state_dict().items():
        if name in NORMS and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2) if "var" in key else nn.init.normal_(tensor)
    width = CHANNELS if name in NORMS else layer.out_channels
    parts = {"layer": layer, "b": nn.Linear(width, 2)}
    models = [Lambda(function, **parts).double().eval() for function in (forward, frames_second)]
    sizes = (2,) if name.endswith("1d") else (2, 2)
    data = labeled(*(torch.randn(n, frames, CHANNELS, *sizes, dtype=F64) for n in (3, 2)))
    return models[0], models[1], data


@cache
def image_blocks(name: str, forward: Forward, frames: int, operator: Any) -> dict[str, Tensor]:
    """Return an operator's blocks for the model with the examples first, or the exact ones."""
    _, plain, data = image_problem(name, forward, frames)
    if operator is GGNLinearOperator:
        return ggn_blocks(plain, data)
    return by_parameter(build(operator, plain, data), plain)


@pytest.mark.parametrize(
    ("forward", "frames", "operator", "backend"),
    [
        (frames_first, CHANNELS, EKFACLinearOperator, "hooks"),
        (frames_first, CHANNELS, EKFACLinearOperator, "make_fx"),
        (frames_first, CHANNELS, KFACLinearOperator, "hooks"),
        (frames_first, CHANNELS, KFACLinearOperator, "make_fx"),
        (frames_first, 3, EKFACLinearOperator, "hooks"),
        (views_first, 2, EKFACLinearOperator, "hooks"),
    ],
)
@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_frames_before_examples(
    name: str, forward: Forward, frames: int, operator: Any, backend: str
):
    """Layers whose channels are in the second axis: as if the examples came first.

    Catches: frames that are taken for channels, if there are as many or groups divide them.
    """
    case = (name, forward, frames)
    model, plain, data = image_problem(*case)
    assert_close(model(data[0][0]), plain(data[0][0]))
    K = build(operator, model, data, backend)
    check_equal(K, model, image_blocks(*case, operator))
    exact = image_blocks(*case, GGNLinearOperator)
    if name in NORMS:
        check_equal(K, model, exact, "layer.weight", "layer.bias")
    if operator is EKFACLinearOperator:
        check_traces(K, model, exact)


# ---- layers whose input is the same for all examples ---------------------------------------------
@dataclass(frozen=True)
class Shared:
    """A model with a layer whose input is the same for all examples.

    Attributes:
        forward: The model.
        layer: That layer.
        shape: The shape of one example.
        sizes: Of the batches.
        explicit: The same function, with an input for each example, if that can be.
    """

    forward: Forward
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3,)
    sizes: tuple[int, ...] = (3, 2)
    explicit: Forward | None = None

    def problem(self) -> tuple[Lambda, Data, tuple[str, ...]]:
        """Return a model, data, and the names of the parameters that are refused."""
        parts = {"a": nn.Linear(3, 4), "layer": self.layer(), "b": nn.Linear(4, 2)}
        model = Lambda(self.forward, **parts).double()
        names = tuple(f"layer.{name}" for name, _ in parts["layer"].named_parameters())
        data = labeled(*(torch.randn(n, *self.shape, dtype=F64) for n in self.sizes))
        return model, data, names


def queries(x: Tensor) -> Tensor:
    return torch.eye(2, 3, dtype=x.dtype)


def one_row(x: Tensor) -> Tensor:
    return x.new_ones(1, 3)


def relative_bias(m: Any, x: Tensor) -> Tensor:
    """As in T5."""
    places = torch.arange(x.shape[1])
    buckets = (places[None] - places[:, None]).clamp(-1, 1) + 1
    bias = m.layer(buckets).permute([2, 0, 1]).unsqueeze(0)
    q = m.a(x).unflatten(-1, (2, 2)).transpose(1, 2)
    h = (q @ q.mT + bias).softmax(-1) @ q
    return m.b(h.transpose(1, 2).flatten(2).mean(1))


def with_vector(vector: Forward) -> Forward:
    """Return a model that adds a vector to hidden features."""
    return lambda m, x: m.b(torch.tanh(m.a(x) + vector(m, x)))


def with_table(table: Forward) -> Forward:
    """Return a model that adds a table to the hidden features of all positions."""
    return lambda m, x: m.b(torch.tanh(m.a(x) + table(m, x)).cumsum(1)).mean(1)


def linear() -> nn.Module:
    return nn.Linear(3, 4)


def table() -> nn.Module:
    return nn.Embedding(4, 4)


REDUCED = {
    "first": Shared(with_vector(lambda m, x: m.layer(one_row(x))[0]), linear),
    "last": Shared(with_vector(lambda m, x: m.layer(one_row(x))[-1]), linear),
    "mean": Shared(with_vector(lambda m, x: m.layer(one_row(x)).mean(0)), linear),
    "first-row": Shared(with_vector(lambda m, x: m.layer(torch.tensor([0]))[0]), table),
    "second-row": Shared(with_vector(lambda m, x: m.layer(torch.arange(2))[1]), table),
    "one-position": Shared(with_table(lambda m, x: m.layer(torch.tensor(1))), table, (1, 3)),
    "as-many-positions": Shared(
        with_table(lambda m, x: m.layer(torch.tensor(1))), table, (2, 3), (2, 2)
    ),
}
CRASHING = {
    "T5": Shared(relative_bias, lambda: nn.Embedding(3, 2), (4, 3)),
    "repeated": Shared(
        with_table(lambda m, x: m.layer(torch.arange(2)[None]).repeat(len(x), 1, 1)), table, (2, 3)
    ),
    "sliced": Shared(
        with_table(lambda m, x: m.layer(torch.arange(4))[: x.shape[1]]), table, (3, 3)
    ),
    "vector": Shared(with_table(lambda m, x: m.layer(torch.tensor(1))), table, (4, 3)),
    "transposed": Shared(
        lambda m, x: m.b(torch.tanh(m.a(x))) + torch.tanh(m.a(x)) @ m.layer(queries(x)).T,
        linear,
    ),
    "unsqueezed": Shared(with_table(lambda m, x: m.layer(torch.arange(2))[None]), table, (2, 3)),
}
SHARED_CASES = {**REDUCED, **CRASHING}
each_shared = pytest.mark.parametrize("name", SHARED_CASES)
each_way = pytest.mark.parametrize(
    ("operator", "backend"),
    [
        (KFACLinearOperator, "hooks"),
        (EKFACLinearOperator, "hooks"),
        (EKFACLinearOperator, "make_fx"),
    ],
)


@cache
def shared(name: str) -> Any:
    """Return model, data, names and exact blocks of a case."""
    torch.manual_seed(0)
    model, data, names = SHARED_CASES[name].problem()
    return model, data, names, ggn_blocks(model, data)


@pytest.mark.parametrize(
    ("operator", "name", "backend"),
    [
        *((KFACLinearOperator, name, "hooks") for name in SHARED_CASES),
        *((EKFACLinearOperator, name, "hooks") for name in SHARED_CASES),
        *((EKFACLinearOperator, name, "make_fx") for name in ("first", "mean", "T5", "sliced")),
    ],
)
def test_outputs_that_cannot_be_one_for_each_example(operator: Any, name: str, backend: str):
    """Neither silently wrong, nor an error of the model with another shape inside."""
    model, data, names, _ = shared(name)
    check_refused(operator, model, data, backend, names, SHARED)


@each_shared
@each_way
def test_shared_outputs_have_the_exact_diagonal(operator: Any, backend: str, name: str):
    """If the user wants; EKFAC's other blocks stay exact."""
    model, data, names, exact = shared(name)
    K = build(operator, model, data, backend, unsupported="diagonal")
    check_diagonals(K, model, exact, names)
    if operator is EKFACLinearOperator:
        check_traces(K, model, exact, names)


@each_shared
def test_shared_outputs_without_the_check(name: str):
    """The same if the model is not evaluated before."""
    model, data, names, exact = shared(name)
    options = {"unsupported": "diagonal", "check_deterministic": False}
    K = build(EKFACLinearOperator, model, data, **options)
    check_diagonals(K, model, exact, names)
    check_traces(K, model, exact, names)


@each_backend
def test_examples_one_after_the_other(backend: str):
    """A model may loop over them: its layers see no axis of examples, but all rows."""
    layers = {"a": nn.Linear(3, 4), "norm": nn.Identity(), "b": nn.Linear(4, 2)}
    model = Lambda(lambda m, x: torch.stack([net(m, row) for row in x]), **layers).double()
    data = labeled(*(torch.randn(n, 3, dtype=F64) for n in (3, 2)))
    K = build(KFACLinearOperator, model, data, backend)
    at_once = Lambda(net, **layers)
    check_equal(K, model, by_parameter(build(KFACLinearOperator, at_once, data), at_once))
    check_refused(EKFACLinearOperator, model, data, backend, LINEARS, APART)
    K = build(EKFACLinearOperator, model, data, backend, unsupported="diagonal")
    check_diagonals(K, model, ggn_blocks(model, data), LINEARS)


BROADCAST = {
    "positions": Shared(
        with_table(lambda m, x: m.layer(torch.arange(x.shape[1])[None])),
        table,
        (3, 3),
        explicit=with_table(lambda m, x: m.layer(torch.arange(x.shape[1]).expand(x.shape[:2]))),
    ),
    "positions-no-axis": Shared(
        with_table(lambda m, x: m.layer(torch.arange(x.shape[1]))),
        table,
        (4, 3),
        explicit=with_table(lambda m, x: m.layer(torch.arange(x.shape[1]).expand(x.shape[:2]))),
    ),
    "bias": Shared(
        with_vector(lambda m, x: m.layer(one_row(x))),
        linear,
        explicit=with_vector(lambda m, x: m.layer(torch.ones_like(x))),
    ),
    "behind": Shared(
        lambda m, x: with_outputs_behind(m, x, torch.arange(3)),
        table,
        (3, 3),
        explicit=lambda m, x: with_outputs_behind(m, x, torch.arange(3).expand(len(x), 3)),
    ),
    "behind, chosen": Shared(
        lambda m, x: with_outputs_behind(m, x[:, ORDER], torch.arange(3)),
        table,
        (3, 3),
        (4, 3),
        explicit=lambda m, x: with_outputs_behind(
            m, x[:, ORDER], torch.arange(3).expand(len(x), 3)
        ),
    ),
}
ORDER = torch.tensor([2, 0, 1])


def with_outputs_behind(m: Any, x: Tensor, places: Tensor) -> Tensor:
    """One layer gets what is the same for all examples, and elsewhere what is not."""
    return m.b(torch.tanh(m.a(x)).cumsum(1)).mean(1) * m.b(torch.tanh(m.layer(places))).mean(-2)


@each_way
@pytest.mark.parametrize("name", BROADCAST)
def test_outputs_that_are_broadcast(name: str, operator: Any, backend: str):
    """One output that is added to all examples: as if each had its own."""
    case = BROADCAST[name]
    model, data, _ = case.problem()
    assert case.explicit is not None
    explicit = Lambda(case.explicit, **dict(model.named_children()))
    K = build(operator, model, data, backend)
    check_equal(K, model, by_parameter(build(operator, explicit, data), explicit))
    if operator is EKFACLinearOperator:
        check_traces(K, model, ggn_blocks(model, data))


def failing(times: int, without_derivatives: bool = False) -> tuple[nn.Module, Data]:
    """Return a model that fails a few times, with layers whose examples are not in the input."""
    left = [times]

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(torch.arange(3)) + m.a(x[:, ORDER])
        if len(x) > 1 and (h.requires_grad or without_derivatives) and left[0]:
            left[0] -= 1
            raise RuntimeError("Not enough memory.")
        return m.b(torch.tanh(h)).mean(1)

    model, data, _ = Shared(forward, table, (3, 3), (4, 2)).problem()
    return model, data


@each_backend
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("without_derivatives", [True, False])
def test_errors_of_a_model(without_derivatives: bool, check: bool, backend: str):
    """They are raised as they are. Catches: layers are refused instead."""
    model, data = failing(100, without_derivatives)
    with pytest.raises(RuntimeError, match=r"^Not enough memory\.$"):
        build(EKFACLinearOperator, model, data, backend, check_deterministic=check)


def test_another_try_after_an_error():
    """Catches: what was compared with another evaluation, or not at all, is remembered."""
    model, data = failing(2)
    params, reduce = dict(model.named_parameters()), {"kfac_approx": "reduce"}
    accumulator = KFACAccumulator(model, LOSS, params, fisher_type="type-2", **reduce)
    (X, y), last = data
    for _ in range(2):
        with pytest.raises(RuntimeError, match="memory"):
            accumulator.update(X, y)
    accumulator.update(X, y)
    accumulator.update(*last)
    K = build(KFACLinearOperator, model, data, **reduce)
    check_equal(accumulator.to_operator(), model, by_parameter(K, model))


def test_a_batch_after_another_that_failed():
    """Catches: that the failed one had rows that cannot be assigned to examples is remembered."""
    model, _ = MIXED["chosen"].models()
    data = labeled(*numbers_of_tokens((2, 1, 3, 2), (2, 2, 2, 2)))
    params, reduce = dict(model.named_parameters()), {"kfac_approx": "reduce"}
    accumulator = KFACAccumulator(model, LOSS, params, fisher_type="type-2", **reduce)

    def fail(*_: Any) -> None:
        raise RuntimeError("Not enough memory.")

    handle = model.b.register_forward_hook(lambda *args: fail() if args[-1].requires_grad else None)
    with pytest.raises(RuntimeError, match="memory"):
        accumulator.update(*data[0])
    handle.remove()
    accumulator.update(*data[1])
    K = build(KFACLinearOperator, model, data[1:], **reduce)
    check_equal(accumulator.to_operator(), model, by_parameter(K, model))


# ---- PyTorch's fast path for encoders ------------------------------------------------------------
@pytest.fixture
def _fastpath() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def encoder() -> tuple[nn.Module, Data]:
    """Return an encoder in evaluation mode, and two batches with padding."""
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    model = Lambda(
        lambda m, x: m.head(m.encoder(x["x"], src_key_padding_mask=x["padding"]).mean(1)),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(4, 2),
    )
    lengths = torch.tensor([3, 2, 1, 2])
    X, y = torch.randn(4, 3, 4, dtype=F64), torch.tensor([0, 1, 1, 0])
    padding = torch.arange(3) >= lengths[:, None]
    parts = [slice(0, 3), slice(3, 4)]
    return model.double().eval(), [({"x": X[k], "padding": padding[k]}, y[k]) for k in parts]


ENCODER_OPERATORS = {
    "kfac": (KFACLinearOperator, {"fisher_type": "type-2"}),
    "ekfac": (EKFACLinearOperator, {"fisher_type": "type-2"}),
    "ekfac-make_fx": (EKFACLinearOperator, {"fisher_type": "type-2", "backend": "make_fx"}),
    "ggn": (GGNLinearOperator, {}),
    "hessian": (HessianLinearOperator, {}),
}


@pytest.mark.usefixtures("_fastpath")
@pytest.mark.filterwarnings("ignore:The model uses fused attention:UserWarning")
@pytest.mark.parametrize("name", ENCODER_OPERATORS)
def test_encoders_with_padding(name: str):
    """In evaluation mode, PyTorch takes other numbers for what is padded if there are no gradients.

    Catches: "the model is not deterministic", and a setting of PyTorch that stays changed.
    """
    operator, options = ENCODER_OPERATORS[name]
    model, data = encoder()
    params = dict(model.named_parameters())
    products = []
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        K = operator(
            model, LOSS, params, data, batch_size_fn=lambda X: len(X["padding"]), **options
        )
        products.append(K @ torch.ones(K.shape[1], dtype=F64))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert products[0].any()
    assert_close(*products)


@pytest.mark.usefixtures("_fastpath")
@pytest.mark.parametrize("operator", [EKFACLinearOperator, GGNLinearOperator])
def test_the_fast_path_after_an_error(operator: Any):
    """The setting is as before, too."""

    def fails(m: Any, x: Tensor) -> Tensor:
        raise ValueError("No prediction.")

    model = Lambda(fails, a=nn.Linear(3, 2))
    torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(ValueError, match="No prediction"):
        operator(model, LOSS, dict(model.named_parameters()), labeled(torch.randn(3, 3)))
    assert torch.backends.mha.get_fastpath_enabled()


class Halves(nn.Module):
    """Two layers get the tokens of a sign each, if there are any, or also if there are none."""

    def __init__(self, called: bool):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for k, layer in enumerate((self.a, self.b)):
            where = ((x[..., 0] > 0) == bool(k)).nonzero(as_tuple=True)
            if self.called or len(where[0]):
                result = result.index_put(where, layer(x[where]))
        return result.mean(1)


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_calls_for_no_rows(cls: Any, approx: str, backend: str) -> None:
    """They add nothing: the same as if there were none."""
    torch.manual_seed(1)
    X = torch.randn(3, 5, 3).double()
    X[0].abs_()
    data = list(zip(X.split(1), torch.randn(3, 1, 3).double(), strict=True))
    options = {"fisher_type": "type-2", "backend": backend}
    if cls is not KFOCLinearOperator:
        options["kfac_approx"] = approx
    found = []
    for called in (True, False):
        model = Halves(called).double()
        K = cls(model, nn.MSELoss(), dict(model.named_parameters()), data, **options)
        found.append(
            torch.block_diag(
                *(K.block(n).to_dense() for n in sorted(dict(model.named_parameters())))
            )
        )
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
