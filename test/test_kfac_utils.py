"""Tests of ``curvlinops.kfac_utils``: options, canonical form, patches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, unfold
from zoo import C128, F32, F64

from curvlinops._algebra import IdentityLinearOperator
from curvlinops.kfac_utils import (
    FisherType,
    FromCanonicalLinearOperator,
    KFACType,
    ToCanonicalLinearOperator,
    extract_averaged_patches,
    extract_patches,
)
from curvlinops.testing import check_operator

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------
def test_values() -> None:
    """The names of the contract."""
    assert [str(m) for m in FisherType] == ["type-2", "mc", "empirical", "forward-only"]
    assert [str(m) for m in KFACType] == ["expand", "reduce"]


def test_strings_work() -> None:
    """Plain strings work in place of options, and the other way round."""
    assert FisherType("mc") is FisherType.MC
    assert FisherType(FisherType.MC) is FisherType.MC
    assert FisherType.TYPE2 == "type-2"
    assert KFACType.REDUCE == "reduce"
    assert {"expand": 1}[KFACType.EXPAND] == 1
    assert f"{KFACType.EXPAND}" == "expand"


@pytest.mark.parametrize("option", [FisherType, KFACType])
def test_membership(option: Any) -> None:
    """``x in FisherType`` is true for options and their strings only."""
    for member in option:
        assert member in option
        assert member.value in option
        assert str(member.name) not in option
    for other in ("", "MC", 1, None, ["mc"], object()):
        assert other not in option
    assert KFACType.EXPAND not in FisherType


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            FisherType,
            "mcmc",
            "'mcmc' is not a FisherType. Choose one of 'type-2', 'mc', 'empirical', 'forward-only'",
        ),
        (KFACType, "Expand", "'Expand' is not a KFACType. Choose one of 'expand', 'reduce'."),
        (KFACType, None, "None is not a KFACType"),
    ],
)
def test_wrong_values(option: Any, value: object, message: str) -> None:
    """The error lists the right ones."""
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        option(value)


def test_copies_of_options() -> None:
    """They are singletons, also after copying and pickling."""
    for option in (*FisherType, *KFACType):
        assert copy.deepcopy(option) is option
        assert pickle.loads(pickle.dumps(option)) is option


# --------------------------------------------------------------------------------------------------
# Canonical form
# --------------------------------------------------------------------------------------------------
SHAPES = {"b1": (3,), "W1": (3, 2), "W2": (2, 3, 2, 1), "b2": (2,), "g": (4,), "h": (4,), "s": ()}
GROUPS = [
    {"W": "W2", "b": "b2"},
    {"b": "b1"},
    {"W": "g", "b": "h"},
    {"W": "W1"},
    {"W": "s"},
]


def parameters(dtype: torch.dtype = F64, columns: int | None = None) -> dict[str, Tensor]:
    extra = [] if columns is None else [columns]
    return {name: torch.randn([*shape, *extra], dtype=dtype) for name, shape in SHAPES.items()}


def test_canonical_form() -> None:
    """One flat vector per group: ``[d_out, d_in]``, the bias as last column, 1-d concatenated."""
    P = ToCanonicalLinearOperator(SHAPES, GROUPS, CPU, F64)
    x = parameters()
    joint, bias, norm, weight, scalar = P @ x
    expected = torch.cat([x["W2"].reshape(2, 6), x["b2"].unsqueeze(1)], dim=1)  # [2, 7]
    assert torch.equal(joint, expected.flatten())
    assert torch.equal(bias, x["b1"])
    assert torch.equal(norm, torch.cat([x["g"], x["h"]]))
    assert torch.equal(weight, x["W1"].flatten())
    assert torch.equal(scalar, x["s"].reshape(1))
    assert P.in_shape == list(SHAPES.values())
    assert P.out_shape == [(14,), (3,), (8,), (6,), (1,)]


def test_role_order_does_not_matter() -> None:
    """The bias is the last column also if the group names it first."""
    x = {"w": torch.randn(2, 3), "b": torch.randn(2)}
    shapes = {name: value.shape for name, value in x.items()}
    (canonical,) = ToCanonicalLinearOperator(shapes, [{"b": "b", "W": "w"}]) @ x
    assert torch.equal(canonical.reshape(2, 4), torch.cat([x["w"], x["b"].unsqueeze(1)], 1))


def test_mutual_adjoints_and_inverses() -> None:
    """To and From are the adjoints and inverses of each other, and cancel."""
    To = ToCanonicalLinearOperator(SHAPES, GROUPS, CPU, F64)
    From = FromCanonicalLinearOperator(SHAPES, GROUPS, CPU, F64)
    assert torch.equal(From.to_dense(), To.to_dense().T)
    assert torch.equal(From.to_dense() @ To.to_dense(), torch.eye(32, dtype=F64))
    for one, other in ((To, From), (From, To)):
        for operator in (one.H, one.T, one.adjoint(), one.inverse()):
            assert type(operator) is type(other)
            assert torch.equal(operator.to_dense(), other.to_dense())
        product = one @ other
        assert isinstance(product, IdentityLinearOperator)
        assert product.in_shape == other.in_shape
        assert product._in_names == other._in_names
        assert (one @ other @ one) is one or type(one @ other @ one) is type(one)
        with pytest.raises((NotImplementedError, ValueError)):
            one.inverse(damping=1.0)
    x = parameters(columns=2)
    back = From @ (To @ x)
    assert isinstance(back, list)
    assert all(torch.equal(b, v) for b, v in zip(back, x.values(), strict=True))


@pytest.mark.parametrize(
    ("shapes", "groups", "layouts"),
    [
        ({"b": (2,), "W": (2, 3)}, [{"W": "W", "b": "b"}], None),  # another order of parameters
        ({"W": (2, 3), "b": (2,)}, [{"W": "W"}, {"b": "b"}], None),  # other groups
        ({"W": (2, 3), "b": (2,)}, [{"W": "b", "b": "W"}], None),
        ({"W": (2, 3), "b": (2,)}, [{"W": "W", "b": "b"}], [{"view": [3, 2], "order": [1, 0]}]),
    ],
)
def test_different_forms_do_not_cancel(shapes: Any, groups: Any, layouts: Any) -> None:
    """Only inverse permutations are replaced by the identity."""
    From = FromCanonicalLinearOperator({"W": (2, 3), "b": (2,)}, [{"W": "W", "b": "b"}])
    try:
        other = ToCanonicalLinearOperator(shapes, groups, layouts=layouts)
    except ValueError:
        return  # a form that does not exist
    for left, right in ((From, other), (other, From)):
        if left.in_shape == right.out_shape:
            product = left @ right
            assert not isinstance(product, IdentityLinearOperator)
            assert torch.equal(product.to_dense(), left.to_dense() @ right.to_dense())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"W": "W"}], r"Missing: \['b'\]. Unknown: \[\]. Repeated: \[\]"),
        ([{"W": "W", "b": "b"}, {"W": "W"}], r"Repeated: \['W'\]"),
        ([{"W": "W", "b": "b"}, {"W": "V"}], r"Unknown: \['V'\]"),
        ([], r"Missing: \['W', 'b'\]"),
    ],
)
def test_groups_must_partition(groups: list[dict[str, str]], message: str) -> None:
    """The error lists what is missing, unknown or repeated."""
    for cls in (ToCanonicalLinearOperator, FromCanonicalLinearOperator):
        with pytest.raises(RuntimeError, match=message):
            cls({"W": (2, 3), "b": (2,)}, groups, CPU, F32)


@pytest.mark.parametrize(
    ("groups", "layouts", "message"),
    [
        ([{"W": "W", "x": "b"}, {"W": "V"}, {"b": "c"}], None, "roles 'W' and 'b'"),
        (
            [{"W": "V", "b": "c"}, {"W": "W", "b": "b"}],
            None,
            "'c' of shape .3. does not fit.*'V' with 2",
        ),
        (
            [{"W": "W", "b": "b"}, {"W": "V"}, {"b": "c"}],
            [None],
            "3 groups need as many layouts, got 1",
        ),
        (
            [{"W": "W", "b": "b"}, {"W": "V"}, {"b": "c"}],
            [{"view": [2, 2], "order": [1, 0]}, None, None],
            "does not fit group",
        ),
        (
            [{"W": "W", "b": "b"}, {"W": "V"}, {"b": "c"}],
            [{"view": [3, 2], "order": [1, 1]}, None, None],
            "does not fit group",
        ),
        (
            [{"W": "W", "b": "b"}, {"W": "V"}, {"b": "c"}],
            [None, None, {"view": [3], "order": [0]}],
            "does not fit group",
        ),
    ],
)
def test_shapes_must_fit(groups: Any, layouts: Any, message: str) -> None:
    """Roles, biases and layouts that do not fit."""
    shapes = {"W": (2, 3), "b": (2,), "V": (2, 2), "c": (3,)}
    with pytest.raises(ValueError, match=message):
        ToCanonicalLinearOperator(shapes, groups, layouts=layouts)


def test_transposed_linear() -> None:
    """A weight ``[d_in, d_out]``, as of an embedding or transformers' Conv1D."""
    x = {"weight": torch.randn(3, 2), "bias": torch.randn(2)}
    shapes = {name: value.shape for name, value in x.items()}
    layouts = [{"view": [3, 2], "order": [1, 0]}]
    P = ToCanonicalLinearOperator(shapes, [{"W": "weight", "b": "bias"}], layouts=layouts)
    (canonical,) = P @ x
    expected = torch.cat([x["weight"].T, x["bias"].unsqueeze(1)], dim=1)
    assert torch.equal(canonical.reshape(2, 4), expected)
    alone = ToCanonicalLinearOperator(
        shapes, [{"W": "weight"}, {"b": "bias"}], layouts=[*layouts, None]
    )
    assert torch.equal((alone @ x)[0], x["weight"].T.flatten())
    assert isinstance(P.H @ P, IdentityLinearOperator)


def test_layout_that_is_not_its_own_inverse() -> None:
    """The way back undoes a cyclic permutation of three axes."""
    x = {"weight": torch.randn(2, 3, 4), "bias": torch.randn(4)}
    shapes = {name: value.shape for name, value in x.items()}
    layouts = [{"view": [2, 3, 4], "order": [2, 0, 1]}]
    P = ToCanonicalLinearOperator(shapes, [{"W": "weight", "b": "bias"}], layouts=layouts)
    (canonical,) = P @ x
    assert torch.equal(canonical.reshape(4, 7)[:, :6], x["weight"].permute(2, 0, 1).reshape(4, 6))
    assert torch.equal(canonical.reshape(4, 7)[:, 6], x["bias"])
    weight, bias = P.H @ (canonical,)
    assert torch.equal(weight, x["weight"])
    assert torch.equal(bias, x["bias"])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("joint", [True, False])
def test_transposed_convolution(groups: int, joint: bool) -> None:
    """W ``[C_in, C_out/g, K]`` becomes ``[C_out/g, C_in/g·K (+1)]`` per group, one after the other.

    Depthwise (C_out/g = 1) included.
    """
    c_in, c_out, kernel = 4, 4 if groups == 4 else 6 if groups == 1 else 8, (2, 3)
    layer = nn.ConvTranspose2d(c_in, c_out, kernel, groups=groups)
    x = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    shapes = {name: value.shape for name, value in x.items()}
    view = [groups, c_in // groups, c_out // groups, *kernel]
    layout = {"view": view, "order": [0, 2, 1, 3, 4]}
    param_groups = [{"W": "weight", "b": "bias"}] if joint else [{"W": "weight"}, {"b": "bias"}]
    P = ToCanonicalLinearOperator(
        shapes, param_groups, layouts=[layout] if joint else [layout, None]
    )
    canonical = (P @ x)[0]
    blocks = []
    for j in range(groups):
        channels = slice(j * c_in // groups, (j + 1) * c_in // groups)
        weight = x["weight"][channels]  # [C_in/g, C_out/g, K1, K2]
        block = weight.permute(1, 0, 2, 3).flatten(1)  # [C_out/g, C_in/g K1 K2]
        if joint:
            bias = x["bias"][j * c_out // groups : (j + 1) * c_out // groups]
            block = torch.cat([block, bias.unsqueeze(1)], dim=1)
        blocks.append(block.flatten())
    assert torch.equal(canonical, torch.cat(blocks))
    back = P.H @ tuple(P @ x)
    assert all(torch.equal(b, v) for b, v in zip(back, x.values(), strict=True))


def test_grouped_convolution_with_joint_bias() -> None:
    """Without a layout: rows of W and entries of the bias go together, row by row."""
    layer = nn.Conv2d(4, 6, 3, groups=2)
    x = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    shapes = {name: value.shape for name, value in x.items()}
    (canonical,) = ToCanonicalLinearOperator(shapes, [{"W": "weight", "b": "bias"}]) @ x
    assert torch.equal(canonical.reshape(6, 19)[:, :18], x["weight"].flatten(1))
    assert torch.equal(canonical.reshape(6, 19)[:, 18], x["bias"])


def test_one_row() -> None:
    """A layer with one output, in every layout."""
    for weight, layout in (
        ((1, 3), None),
        ((3, 1), {"view": [3, 1], "order": [1, 0]}),
        ((3, 1, 2), {"view": [1, 3, 1, 2], "order": [0, 2, 1, 3]}),
    ):
        shapes = {"w": weight, "b": (1,)}
        P = ToCanonicalLinearOperator(shapes, [{"W": "w", "b": "b"}], layouts=[layout])
        x = torch.arange(float(P.shape[0]))
        assert torch.equal(P @ x, x)


def test_conforms() -> None:
    """All properties of operators, with layouts, dicts, columns and saving."""
    shapes = {"weight": (2, 3, 2), "bias": (3,), "norm": (2,), "shift": (2,)}
    groups = [{"W": "norm", "b": "shift"}, {"W": "weight", "b": "bias"}]
    layouts = [None, {"view": [1, 2, 3, 2], "order": [0, 2, 1, 3]}]
    for dtype in (F64, C128):
        P = ToCanonicalLinearOperator(shapes, groups, CPU, dtype, layouts)
        weight = torch.arange(12).reshape(2, 3, 2).permute(1, 0, 2).reshape(3, 4)
        joint = torch.cat([weight, torch.arange(12, 15).unsqueeze(1)], dim=1).flatten()
        order = torch.cat([torch.arange(15, 19), joint])
        check_operator(P, torch.eye(19, dtype=F64)[order].to(dtype))
        check_operator(P.H, torch.eye(19, dtype=F64)[order].T.to(dtype))


def test_without_device_and_dtype() -> None:
    """The operator then multiplies tensors of any dtype."""
    P = ToCanonicalLinearOperator({"w": (2, 2)}, [{"W": "w"}])
    assert P.dtype is None
    for dtype in (F32, C128):
        assert (P @ torch.ones(4, dtype=dtype)).dtype == dtype
    assert ToCanonicalLinearOperator({"w": (2, 2)}, [{"W": "w"}], "meta", F64).dtype == F64


# --------------------------------------------------------------------------------------------------
# Patches
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [
        (2, 1, 0, 1),
        (3, 2, 1, 1),
        ((2, 3), (3, 1), (0, 2), (1, 2)),
        ([1, 2], [1, 1], [1, 0], [2, 3]),
        ((5, 6), 1, 0, 1),  # the whole input
    ],
)
def test_patches_are_those_of_unfold(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    """Equal to ``unfold``, with positions before entries, and their mean."""
    x = torch.randn(2, 3, 5, 6, dtype=F64)
    arguments = kernel_size, stride, padding, dilation
    expected = unfold(x, kernel_size, dilation, padding, stride).mT  # [B, O1 O2, C K1 K2]
    assert torch.equal(extract_patches(x, *arguments), expected)
    averaged = extract_averaged_patches(x, *arguments)
    assert torch.allclose(averaged, expected.mean(1))


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_patches_make_the_convolution(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """Patches times the weight are the convolution."""
    x, weight = torch.randn(2, 3, *size, dtype=F64), torch.randn(4, 3, *kernel, dtype=F64)
    expected = conv2d(x, weight, stride=stride, padding=padding).flatten(2).mT
    patches = extract_patches(x, kernel, stride, padding)
    assert torch.allclose(patches @ weight.flatten(1).T, expected)
    assert torch.allclose(extract_averaged_patches(x, kernel, stride, padding), patches.mean(1))


def test_groups_are_averaged() -> None:
    """The mean over channel groups of the patches of each group."""
    x = torch.randn(2, 6, 4, 5, dtype=F64)
    patches = unfold(x, (2, 3)).mT.reshape(2, 9, 3, 2 * 6)  # groups of two channels
    assert torch.allclose(extract_patches(x, (2, 3), groups=3), patches.mean(2))
    averaged = extract_averaged_patches(x, (2, 3), groups=3)
    assert averaged.shape == (2, 12)
    assert torch.allclose(averaged, patches.mean((1, 2)))


def test_string_padding() -> None:
    """'valid' is none; 'same' keeps the size where both sides are padded alike."""
    x = torch.randn(2, 3, 5, 6, dtype=F64)
    assert torch.equal(extract_patches(x, 3, 1, "valid"), extract_patches(x, 3, 1, 0))
    same = extract_patches(x, (3, 5), 1, "same", (2, 1))
    assert torch.equal(same, unfold(x, (3, 5), (2, 1), (2, 2)).mT)
    assert torch.equal(extract_patches(x, 2, 1, "same", 2), unfold(x, 2, 2, 1).mT)
    weight = torch.randn(4, 3, 3, 5, dtype=F64)
    expected = conv2d(x, weight, padding="same", dilation=(2, 1)).flatten(2).mT
    assert torch.allclose(same @ weight.flatten(1).T, expected)


@pytest.mark.parametrize("extract", [extract_patches, extract_averaged_patches])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, 1), ((3, 4), 1), ((4, 3), (1, 2))])
def test_unequal_string_padding(extract: Any, kernel_size: Any, dilation: Any) -> None:
    """Both sides padded differently: an error that says what to do instead."""
    x = torch.randn(1, 2, 6, 6)
    with pytest.raises(NotImplementedError, match=r"padding='same'.*torch.nn.functional.pad"):
        extract(x, kernel_size, 1, "same", dilation)


def test_averaged_patches_do_not_form_the_patches() -> None:
    """An input whose patches would need 10 GB."""
    x = torch.ones(1, 3, 400, 400)
    averaged = extract_averaged_patches(x, 60)
    assert averaged.shape == (1, 10_800)
    assert torch.allclose(averaged, torch.ones(1, 10_800), rtol=1e-3)
    half = extract_averaged_patches(x[..., :10, :10].bfloat16(), 3)
    assert half.dtype == torch.bfloat16
