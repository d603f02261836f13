"""Tests of ``curvlinops._saving``: ``torch.save`` and ``torch.load`` with its safe default."""

from __future__ import annotations

import io
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import BF16, C128, F64, ZOO, Cumsum, canonical_blocks, general, positive

import curvlinops
from curvlinops import _saving
from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.submatrix import SubmatrixLinearOperator
from curvlinops.testing._check import leaves

SAVEABLE = [name for name in ZOO if not name.startswith("user_")]


def save(operator: Any) -> bytes:
    file = io.BytesIO()
    torch.save(operator, file)
    return file.getvalue()


def load(saved: bytes, **kwargs: Any) -> Any:
    return torch.load(io.BytesIO(saved), **kwargs)


def pickled_globals(saved: bytes) -> set[str]:
    """All names that unpickling would import."""
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        code = archive.read(name)
    found, strings = set(), []
    for opcode, argument, _ in pickletools.genops(code):
        if opcode.name == "GLOBAL":
            found.add(argument)
        elif opcode.name in {"SHORT_BINUNICODE", "BINUNICODE", "UNICODE"}:
            strings.append(argument)
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
        assert opcode.name != "INST"
    return found


@pytest.mark.parametrize("name", SAVEABLE)
def test_no_pickled_code(name: str) -> None:
    """Files name torch's own rebuilding functions, and one of this package's.

    Catches operators, enums, devices or NumPy scalars that are pickled as objects.
    """
    found = pickled_globals(save(ZOO[name]()[0]))
    ours = {name for name in found if not name.startswith("torch")}
    assert ours - {"collections OrderedDict"} == {"curvlinops._saving rebuild_operator"}


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """``import curvlinops; torch.load(path)`` is all it takes; type, names, inverse are kept."""
    K, matrix = ZOO["canonical_chain"]()
    operators = {
        "K": K,
        "inverse": K.inverse(0.5, use_heuristic_damping=True),
        "exact": K.inverse(0.5, use_exact_damping=True),
        "sum": 2j * K + ZOO["canonical_chain_complex"]()[0],
        "submatrix": SubmatrixLinearOperator(K, [0, 3], [1, 2, 3]),
    }
    x = torch.randn(8, dtype=F64)
    torch.save(operators, tmp_path / "operators.pt")
    torch.save(
        {"x": x, "matrix": matrix, "inverse": operators["inverse"].to_dense()},
        tmp_path / "expected.pt",
    )
    code = """
import sys
import torch
import curvlinops

operators, expected = torch.load(sys.argv[1]), torch.load(sys.argv[2])
K, x, matrix = operators["K"], expected["x"], expected["matrix"]
assert torch.allclose(K @ x, matrix @ x)
assert torch.allclose(operators["inverse"].to_dense(), expected["inverse"])
exact = torch.linalg.inv(matrix + 0.5 * torch.eye(8))
assert torch.allclose(operators["exact"].to_dense(), exact)
assert torch.allclose(K.inverse(0.5, use_exact_damping=True).to_dense(), exact)
assert torch.allclose(K.logdet(), matrix.logdet())
P, B, PT = K
assert isinstance(B, curvlinops.BlockDiagonalLinearOperator)
assert [type(block) for block in B] == [curvlinops.KroneckerProductLinearOperator] * 2
named = {"scale": x[6:], "bias": x[:2], "weight": x[2:6].reshape(2, 1, 2)}
assert list(K @ named) == ["bias", "weight", "scale"]
assert len(K @ K.inverse()) == 3
assert operators["sum"].dtype == torch.complex128
assert operators["submatrix"].shape == (2, 3)
operators["submatrix"].set_submatrix([0], [1])
"""
    arguments = [str(tmp_path / "operators.pt"), str(tmp_path / "expected.pt")]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_without_the_import_it_is_refused(tmp_path: Path) -> None:
    """Loading without ``import curvlinops`` fails safely and names the one function."""
    torch.save(ZOO["diagonal"]()[0], tmp_path / "operator.pt")
    code = "import sys, torch; torch.load(sys.argv[1])"
    arguments = [sys.executable, "-c", code, str(tmp_path / "operator.pt")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "curvlinops._saving.rebuild_operator" in result.stderr


@pytest.mark.parametrize("name", SAVEABLE)
def test_map_location(name: str) -> None:
    """All tensors move, among them those that only carry device and dtype."""
    operator, _ = ZOO[name]()
    saved = save(operator)
    moved = load(saved, map_location="meta")
    assert type(moved) is type(operator)
    tensors = [leaf for leaf in leaves(moved) if isinstance(leaf, Tensor)]
    assert all(tensor.is_meta for tensor in tensors)
    assert repr(moved).startswith(repr(operator).split(" operator ")[0])  # without data, too
    assert (moved.in_shape, moved.dtype) == (operator.in_shape, operator.dtype)
    if operator.device is not None:
        assert moved.device == torch.device("meta")
    assert load(saved, map_location="cpu").device == operator.device


def test_device_of_operators_without_tensors() -> None:
    """Identity and canonical form keep device and dtype."""
    P = canonical_blocks(C128)[0][0].to("meta")
    for operator in (P, P @ P.H, (P @ P.H) ** 0):
        loaded = load(save(operator))
        assert loaded.device == torch.device("meta")
        assert loaded.dtype == C128
    without = load(save(IdentityLinearOperator([(2,)])))
    assert (without.device, without.dtype) == (None, None)


# --------------------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("view", "size"),
    [
        (lambda big: big[:2, :2], 4),  # not contiguous
        (lambda big: big[10:12].view(2, 500, 2)[:, :2, 0], 4),
        (lambda big: big.T[:2, 5:7], 4),
        (lambda big: torch.nn.Parameter(big[:2, :2]), 4),
    ],
)
def test_views_are_saved_compactly(view: Callable[[Tensor], Tensor], size: int) -> None:
    """A factor that is a view of a large tensor is saved by itself."""
    factor = view(torch.randn(1000, 1000, dtype=F64))
    for operator in (
        KroneckerProductLinearOperator(factor, factor.clone()),
        TensorLinearOperator(factor),
        TensorLinearOperator(factor).H,
        BlockDiagonalLinearOperator([2 * TensorLinearOperator(factor)]),
        DiagonalLinearOperator([factor]),
    ):
        saved = save(operator)
        assert len(saved) < 5000
        loaded = load(saved)
        assert torch.equal(loaded.to_dense(), operator.to_dense())
        assert all(
            leaf.untyped_storage().nbytes() <= 8 * size
            for leaf in leaves(loaded)
            if isinstance(leaf, Tensor)
        )


def test_saving_leaves_the_operator_alone() -> None:
    """Neither tensors nor their storage change."""
    big = torch.randn(100, 100, dtype=F64)
    A = TensorLinearOperator(big[:2, :2])
    save(A)
    assert A.matrix.untyped_storage().data_ptr() == big.untyped_storage().data_ptr()


def test_shared_tensors_are_saved_once() -> None:
    """A factor that is used twice, or by K and its chain, is one tensor in the file."""
    factor = positive(100)
    one = len(save(KroneckerProductLinearOperator(factor)))
    two = len(
        save([KroneckerProductLinearOperator(factor, factor), TensorLinearOperator(factor.T)])
    )
    assert two < 1.1 * one


def test_expanded_tensors_stay_small() -> None:
    """A tensor that repeats one number is not written out."""
    A = DiagonalLinearOperator([torch.ones(1).expand(100_000)])
    saved = save(A)
    assert len(saved) < 5000
    assert load(saved).trace() == 100_000


def test_graphs_and_gradients_are_dropped() -> None:
    """Factors that require gradients are saved as plain tensors."""
    matrix = positive(2).requires_grad_()
    loaded = load(save(TensorLinearOperator(2 * matrix)))
    assert torch.equal(loaded.matrix, 2 * matrix.detach())
    assert not loaded.matrix.requires_grad
    assert type(load(save(TensorLinearOperator(torch.nn.Parameter(matrix)))).matrix) is Tensor


def test_unusual_tensors() -> None:
    """Lazy conjugates, transposes, low precision, 0-d and empty tensors."""
    matrix = general(2, 3, C128)
    for operator in (
        TensorLinearOperator(matrix.conj()),
        TensorLinearOperator(matrix.mH),
        TensorLinearOperator((matrix * 1j).imag),
        TensorLinearOperator(positive(2).to(BF16)),
        DiagonalLinearOperator([torch.tensor(2.0)]),
        TensorLinearOperator(torch.ones(2, 0)),
    ):
        loaded = load(save(operator))
        assert torch.equal(loaded.to_dense(), operator.to_dense())


@pytest.mark.parametrize("scalar", [2, 0.1, 1 - 2j, True, torch.tensor(0.1), torch.tensor(1j)])
def test_scalars(scalar: Any) -> None:
    """Numbers of every kind, exactly, and with their types."""
    K = ZOO["kronecker_positive_complex"]()[0]
    for operator, attribute in ((scalar * K, "scalar"), (K + (scalar + 1) * K**0, "shift")):
        loaded = load(save(operator))
        if hasattr(operator, attribute):
            assert type(getattr(loaded, attribute)) is type(getattr(operator, attribute))
            assert getattr(loaded, attribute) == getattr(operator, attribute)
        assert torch.equal(loaded.to_dense(), operator.to_dense())


# --------------------------------------------------------------------------------------------------
# Safety and versions
# --------------------------------------------------------------------------------------------------
def test_newer_format_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which format the file has, and what to do."""
    monkeypatch.setattr(_saving, "FORMAT_VERSION", 7)
    saved = save(ZOO["diagonal"]()[0])
    monkeypatch.undo()
    message = "format 7, but this release of curvlinops reads formats up to 1. Update curvlinops"
    with pytest.raises((ValueError, pickle.UnpicklingError), match=message):
        load(saved)
    with pytest.raises(ValueError, match=message):
        _saving.rebuild_operator(7, "DiagonalLinearOperator", {})


def test_unknown_types_are_refused() -> None:
    """The rebuilder looks into its table; it never imports or evaluates a name."""
    for kind in ("subprocess.Popen", "Cumsum", "os", "PyTorchLinearOperator", ""):
        with pytest.raises(ValueError, match=f"unknown type '{kind}'"):
            _saving.rebuild_operator(1, kind, {})


def test_table() -> None:
    """The table holds operators of this package only, each under its own name."""
    for name, cls in _saving._TYPES.items():
        assert cls.__name__ == name
        assert issubclass(cls, PyTorchLinearOperator)
        assert cls.__module__.startswith("curvlinops.")
        assert _saving.is_saveable(cls)
    public = {name for name in curvlinops.__all__ if name.endswith("LinearOperator")}
    structured = {name for name in _saving._TYPES if not name.startswith("_")}
    assert {
        "BlockDiagonalLinearOperator",
        "DiagonalLinearOperator",
        "EighDecomposedLinearOperator",
        "FromCanonicalLinearOperator",
        "IdentityLinearOperator",
        "KroneckerProductLinearOperator",
        "LowRankLinearOperator",
        "OuterProductLinearOperator",
        "SubmatrixLinearOperator",
        "TensorLinearOperator",
        "ToCanonicalLinearOperator",
    } <= public & structured


def test_other_types_are_not_saveable() -> None:
    """Neither a subclass nor a type of the same name takes the place of one in the table."""

    class Sub(TensorLinearOperator):
        pass

    class DiagonalLinearOperator(Cumsum):
        pass

    assert not _saving.is_saveable(Sub)
    assert not _saving.is_saveable(DiagonalLinearOperator)


def test_user_operators_are_not_loaded_by_default() -> None:
    """They are pickled as Python does; torch's safe default refuses them, also inside others."""
    A = Cumsum([(2,)], [(2,)])
    for operator in (A, 2 * A):
        saved = save(operator)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load(saved)
        loaded = load(saved, weights_only=False)
        assert torch.equal(loaded.to_dense(), operator.to_dense())


def test_plain_pickle() -> None:
    """For multiprocessing; types are kept."""
    for name in ("canonical_chain", "kronecker_with_diagonal", "shifted_kronecker"):
        operator, dense = ZOO[name]()
        loaded = pickle.loads(pickle.dumps(operator))
        assert type(loaded) is type(operator)
        assert torch.allclose(loaded.to_dense(), dense)
