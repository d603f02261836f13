"""Tests of ``curvlinops._formats``: what an operator multiplies, and in which format it answers."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor
from zoo import F64, Named, general

from curvlinops._formats import (
    as_shapes,
    concatenate,
    describe,
    from_columns,
    numel,
    split_flat,
    to_columns,
)

SHAPES = [Size((2, 3)), Size(()), Size((4,))]
NAMES = ["weight", "scale", "bias"]
DIM = 11


def parts_of(flat: Tensor) -> list[Tensor]:
    """Split ``[11, K]`` by hand: row-major, in order."""
    columns = flat.shape[1]
    return [flat[:6].reshape(2, 3, columns), flat[6], flat[7:]]


def test_row_major_order() -> None:
    """Tensors are flattened row-major and concatenated in order."""
    flat = torch.arange(22.0).reshape(11, 2)
    first, second, third = split_flat(flat, SHAPES)
    assert first[1, 2].tolist() == flat[5].tolist()
    assert second.tolist() == flat[6].tolist()
    assert third[3].tolist() == flat[10].tolist()
    assert torch.equal(concatenate([first, second, third]), flat)


def test_as_shapes() -> None:
    """Shapes become ``torch.Size``; an empty space is refused by name."""
    shapes = as_shapes([(2, 3), [4], Size(())], "in_shape")
    assert shapes == [Size((2, 3)), Size((4,)), Size(())]
    assert all(isinstance(shape, Size) for shape in shapes)
    assert numel(shapes) == 11
    with pytest.raises(ValueError, match="out_shape is empty"):
        as_shapes([], "out_shape")


def test_describe() -> None:
    """Spaces are readable, with and without names."""
    assert describe(SHAPES) == "[(2, 3), (), (4,)]"
    assert describe(SHAPES, NAMES) == "{'weight': (2, 3), 'scale': (), 'bias': (4,)}"


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("columns", [None, 0, 1, 2, 3, 11])
@pytest.mark.parametrize("container", ["tensor", "list", "tuple", "dict"])
def test_conversion(container: str, columns: int | None, leading: bool) -> None:
    """Every format comes to ``[*N_i, K]`` and goes back to itself, in values and type.

    Catches a column axis on the wrong side, also where K equals a dimension of the space.
    """
    flat = torch.randn(DIM, 1 if columns is None else columns)
    internal = parts_of(flat)
    if columns is None:
        given_parts, matrix = [p[..., 0] for p in internal], flat[:, 0]
    elif leading:
        given_parts, matrix = [p.movedim(-1, 0) for p in internal], flat.T
    else:
        given_parts, matrix = internal, flat
    x = {
        "tensor": matrix,
        "list": given_parts,
        "tuple": tuple(given_parts),
        "dict": dict(zip(NAMES, given_parts, strict=True)),
    }[container]
    result, fmt = to_columns(x, SHAPES, NAMES, leading)
    assert [r.shape for r in result] == [p.shape for p in internal]
    assert all(torch.equal(r, p) for r, p in zip(result, internal, strict=True))
    back = from_columns(result, SHAPES, NAMES, fmt)
    assert type(back) is type(x)
    if container == "tensor":
        assert torch.equal(back, matrix)
    else:
        assert container != "dict" or list(back) == NAMES
        values = back.values() if container == "dict" else back
        assert all(torch.equal(b, p) for b, p in zip(values, given_parts, strict=True))


def test_result_in_a_space_without_names() -> None:
    """A dict goes to a list where the result has no names, as for a Jacobian."""
    _, fmt = to_columns(
        dict(zip(NAMES, parts_of(torch.ones(11, 2)), strict=True)), SHAPES, NAMES, False
    )
    result = from_columns([torch.ones(5, 2)], [Size((5,))], None, fmt)
    assert type(result) is list
    assert result[0].shape == (5, 2)


@pytest.mark.parametrize("mapping", [OrderedDict, MappingProxyType])
def test_any_mapping_in_any_order(mapping: type) -> None:
    """Names decide, not the order in the dict."""
    flat = torch.randn(11, 2)
    pairs = list(zip(NAMES, parts_of(flat), strict=True))
    columns, _ = to_columns(mapping(dict(pairs[::-1])), SHAPES, NAMES, False)
    assert torch.equal(concatenate(columns), flat)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(10), r"shape \[11\] or \[11, K\], got \[10\].*\[\(2, 3\), \(\), \(4,\)\]"),
        (torch.ones(2, 11), r"\[11, K\], got \[2, 11\]"),
        (torch.ones(()), r"got \[\]"),
        (torch.ones(11, 1, 1), r"got \[11, 1, 1\]"),
        ([], r"got \[\]"),
        ([torch.ones(2, 3), torch.ones(())], r"got \[\(2, 3\), \(\)\]"),
        ([torch.ones(3, 2), torch.ones(()), torch.ones(4)], "Shape mismatch"),
        ([torch.ones(2, 3), torch.ones(2), torch.ones(4, 2)], "all of them with or all without"),
        ([torch.ones(2, 3, 2), torch.ones(2), torch.ones(4, 3)], "trailing column axis of equal"),
        ([torch.ones(2, 2, 3), torch.ones(2), torch.ones(2, 4)], "trailing column axis"),
        ({"weight": torch.ones(2, 3), "scala": torch.ones(())}, r"Missing: \['bias', 'scale'\]"),
        ({**dict.fromkeys(NAMES, torch.ones(())), "x": torch.ones(())}, r"Unknown: \['x'\]"),
    ],
)
def test_wrong_shapes_and_names(x: object, message: str) -> None:
    """What does not fit is refused; the message shows what is needed and what was given."""
    with pytest.raises(ValueError, match=message):
        to_columns(x, SHAPES, NAMES, False)


def test_wrong_side() -> None:
    """A leading column axis is needed in ``x @ A``."""
    with pytest.raises(ValueError, match=r"\[11\] or \[K, 11\], got \[11, 2\]"):
        to_columns(torch.ones(11, 2), SHAPES, NAMES, True)
    with pytest.raises(ValueError, match="leading column axis"):
        to_columns(parts_of(torch.ones(11, 2)), SHAPES, NAMES, True)


def test_dict_without_names() -> None:
    """A dict needs names, and the message says what to pass instead."""
    with pytest.raises(
        ValueError, match=r"no names: pass a list of tensors with shapes \[\(2, 3\)"
    ):
        to_columns({"weight": torch.ones(2, 3)}, SHAPES, None, False)


@pytest.mark.parametrize("x", [1.0, "abc", None, object(), {1, 2}])
def test_wrong_types(x: object) -> None:
    """Other types are refused with what to pass instead."""
    with pytest.raises(TypeError, match=f"{type(x).__name__}: pass a torch tensor.*to_scipy"):
        to_columns(x, SHAPES, NAMES, False)


def test_containers_of_other_things() -> None:
    """A list of arrays is no list of tensors."""
    x = [torch.ones(2, 3).numpy(), 1.0, torch.ones(4)]
    with pytest.raises(TypeError, match="A list of tensors is needed, but it holds ndarray, float"):
        to_columns(x, SHAPES, NAMES, False)


@settings(max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4),
    columns=st.one_of(st.none(), st.integers(0, 3)),
    leading=st.booleans(),
)
def test_round_trip(shapes: list[list[int]], columns: int | None, leading: bool) -> None:
    """Flat and list formats of the same numbers agree, for any space."""
    space = [Size(shape) for shape in shapes]
    width = [] if columns is None else [columns]
    parts = [torch.randn([*width, *s] if leading else [*s, *width]) for s in space]
    internal, fmt = to_columns(parts, space, None, leading)
    again = from_columns(internal, space, None, fmt)
    assert all(torch.equal(a, p) for a, p in zip(again, parts, strict=True))
    flat = concatenate(internal)
    flat = flat[:, 0] if columns is None else (flat.T if leading else flat)
    from_flat, _ = to_columns(flat, space, None, leading)
    assert all(torch.equal(a, b) for a, b in zip(from_flat, internal, strict=True))


# --------------------------------------------------------------------------------------------------
# Through an operator
# --------------------------------------------------------------------------------------------------
def test_operator_with_different_spaces() -> None:
    """Input and result have the shapes and names of their own spaces, on both sides."""
    matrix = general(4, 5)
    A = Named(matrix)
    x = {
        "w": torch.randn(2, dtype=F64),
        "s": torch.randn((), dtype=F64),
        "v": torch.ones(1, 2).to(F64),
    }
    y = A @ x
    assert {name: value.shape for name, value in y.items()} == {"a": (3,), "b": (1,)}
    flat = torch.cat([x["w"], x["s"].unsqueeze(0), x["v"][0]])
    assert torch.allclose(torch.cat([y["a"], y["b"]]), matrix @ flat)
    z = y @ A
    assert {name: value.shape for name, value in z.items()} == {"w": (2,), "s": (), "v": (1, 2)}
    rows = {"a": torch.randn(6, 3, dtype=F64), "b": torch.randn(6, 1, dtype=F64)}
    z = rows @ A
    assert {n: v.shape for n, v in z.items()} == {"w": (6, 2), "s": (6,), "v": (6, 1, 2)}
    expected = torch.cat([rows["a"], rows["b"]], dim=1) @ matrix
    assert torch.allclose(z["s"], expected[:, 2])
    assert torch.allclose(z["v"][:, 0], expected[:, 3:])
