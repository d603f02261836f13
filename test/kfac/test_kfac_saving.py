"""Saving KFAC, and loading it in a process that has neither model nor data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kfac_cases import setup

import curvlinops
from curvlinops import KFACLinearOperator

DAMPING = 0.1
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"use_heuristic_damping": True},
    {"use_exact_damping": True},
]

# What a loaded operator tells; runs here and in the other process.
TELL = f"""
def tell(K):
    names = [name for group in K.mapping for name in group.values()]
    x = torch.linspace(0, 1, K.shape[1], dtype=K.dtype)
    sizes = [shape.numel() for shape in K.in_shape]
    parts = [part.reshape(shape) for part, shape in zip(x.split(sizes), K.in_shape)]
    inverses = [K.inverse(damping={DAMPING}, **strategy) for strategy in {STRATEGIES!r}]
    return {{
        "type": type(K).__name__,
        "repr": repr(K),
        "summary": K.summary(),
        "mapping": [sorted(group.items()) for group in K.mapping],
        "factors": [[f if isinstance(f, torch.Tensor) else f.to_dense() for f in K.factors(name)]
                    for name in names],
        "blocks": [K.block(name).to_dense() for name in names],
        "forms": [form for A in [K, *inverses, 2 * K]
                  for form in (A.trace(), A.frobenius_norm(), A.diagonal(), A @ x)],
        "determinants": [A.logdet() for A in inverses],
        "dict": {{k: v for k, v in (K @ dict(zip(K._in_names, parts))).items()}},
        "chain": [type(op).__name__ for op in K],
        "roots": K.sqrt() @ x,
    }}
"""

LOAD = f"""
import sys
import curvlinops, torch
torch.set_num_threads(1)
{TELL}
K, *others = [torch.load(path) for path in sys.argv[1:-1]]
x = torch.linspace(0, 1, K.shape[1], dtype=K.dtype)
torch.save([tell(K), [other @ x for other in others]], sys.argv[-1])
assert not [name for name in sys.modules if "kfac_cases" in name]
"""


def _run(code: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"torch": torch}
    exec(code, namespace)
    return namespace


tell = _run(TELL)["tell"]


def assert_equal(a: Any, b: Any) -> None:
    """Compare nested results exactly."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_equal(list(a.values()), list(b.values()))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("case", "joint", "options"),
    [
        pytest.param("cnn", True, {"fisher_type": "type-2"}, marks=pytest.mark.slow),
        pytest.param(
            "tied-one",
            False,
            {"fisher_type": "mc", "kfac_approx": "reduce"},
            marks=pytest.mark.slow,
        ),
        ("attention", True, {"fisher_type": "empirical", "max_factor_size": 4}),
    ],
)
def test_load_in_another_process(case: str, joint: bool, options: dict[str, Any], tmp_path: Path):
    K = KFACLinearOperator(
        **setup(case, "ce").kwargs(), separate_weight_and_bias=not joint, **options
    )
    inverses = [K.inverse(damping=DAMPING, **strategy) for strategy in STRATEGIES]
    operators = [K, *inverses, K + DAMPING * K**0, 3 * K, K._operator]
    paths = [tmp_path / f"{i}.pt" for i in range(len(operators))]
    for operator, path in zip(operators, paths, strict=True):
        torch.save(operator, path)
    results = tmp_path / "results.pt"
    command = [sys.executable, "-W", "error", "-c", LOAD, *map(str, paths), str(results)]
    folder = Path(curvlinops.__file__).parents[1]
    subprocess.run(command, check=True, cwd=folder)
    told, products = torch.load(results)
    assert_equal(told, tell(K))
    x = torch.linspace(0, 1, K.shape[1], dtype=K.dtype)
    assert_equal(products, [operator @ x for operator in operators[1:]])


def test_files_are_small(tmp_path: Path):
    """The file holds the factors and little else: no model, no data, no view of larger storage."""
    K = KFACLinearOperator(**setup("cnn", "ce").kwargs(), separate_weight_and_bias=True)
    path = tmp_path / "K.pt"
    torch.save(K, path)
    # weight and bias of a layer share the gradient factor
    factors = {id(f): f for group in K.mapping for n in group.values() for f in K.factors(n)}
    size = sum(f.numel() * f.element_size() for f in factors.values())
    assert path.stat().st_size < size + 200 * len(factors) + 12_000
    K.block("model.0.weight")[0] = torch.rand(100, 100, dtype=torch.float64)[:3, :3]
    torch.save(K, path)
    assert path.stat().st_size < size + 200 * len(factors) + 12_000


def test_map_location(tmp_path: Path):
    K = KFACLinearOperator(**setup("cnn", "ce").kwargs())
    path = tmp_path / "K.pt"
    torch.save(K, path)
    moved = torch.load(path, map_location="meta")
    assert moved.device == torch.device("meta")
    assert {f.device.type for group in K.mapping for n in group.values()
            for f in moved.factors(n)} == {"meta"}  # fmt: skip


def test_newer_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    K = KFACLinearOperator(**setup("mlp-frozen", "ce").kwargs())
    path = tmp_path / "K.pt"
    monkeypatch.setattr(curvlinops._saving, "FORMAT_VERSION", 999)
    torch.save(K, path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Update curvlinops"):
        torch.load(path)
