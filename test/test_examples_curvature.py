"""The examples of spectra, of inverse products and of the Laplace approximation do what they say.

Each runs as a user runs it, with warnings as errors. The bounds are checked here once more, by the
table that it prints.
"""

import re

import pytest
from test_examples import FOLDER, output_of


def _number(pattern: str, output: str) -> float:
    """Return the number that a pattern's group matches; it must be there once."""
    [found] = re.findall(pattern, output)
    return float(found)


@pytest.mark.slow
def test_spectrum_has_outliers_and_densities_of_the_exact_one(tmp_path):
    """Catches other matrices than the Hessian, wrong densities, and wrong weights of samples."""
    output = output_of(FOLDER / "spectrum.py", tmp_path)
    assert _number(r"relative error (\S+)", output) <= 1e-6
    assert _number(r"eigenvalues: +(\d+) products", output) < 650 / 2
    assert _number(r"Outliers: (\d+) of 10 classes", output) == 9
    assert _number(r"Negative eigenvalues, of which the GGN has none: (\d+)", output) >= 65
    assert _number(r"Distance of the density to the exact one: (\S+)", output) <= 0.03
    assert _number(r"Distance of the log density to the exact one: (\S+)", output) <= 0.07

    rows = re.findall(r"(\d+) products +(\S+)% +(\S+)% +(\S+)% +(\S+)%", output)
    table = {int(products): [float(x) for x in row] for products, *row in rows}
    assert set(table) == {18, 36, 60, 120}
    ratios = [hutchinson / theory for theory, hutchinson, *_ in table.values()]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.25)
    theory, _, hutchpp, xtrace = table[60]
    assert max(hutchpp, xtrace) <= 0.75 * theory
    # theory itself falls with the square root of the number of products
    assert table[18][0] / table[120][0] == pytest.approx((120 / 18) ** 0.5, rel=0.01)


@pytest.mark.slow
def test_inverse_products_are_exact_and_preconditioners_save_iterations(tmp_path):
    """Catches preconditioners that are no inverse, and operators that solve another system."""
    output = output_of(FOLDER / "inverse_products.py", tmp_path)
    rows = re.findall(
        r"^(no preconditioner|KFAC|EKFAC|Nyström) +(\d+) iterations +[\d.]+ +(\S+)$",
        output,
        re.MULTILINE,
    )
    names = ["no preconditioner", "KFAC", "EKFAC", "Nyström"]
    assert [name for name, *_ in rows] == 2 * names
    assert all(float(error) <= 1e-4 for *_, error in rows)
    counts = [int(count) for _, count, _ in rows]
    bounds = [1, 0.75, 0.75, 0.4, 1, 0.8, 0.8, 0.8]
    plain = 4 * [counts[0]] + 4 * [counts[4]]
    for count, whole, bound in zip(counts, plain, bounds, strict=True):
        assert count <= bound * whole

    assert _number(r"Neumann series \S+, (\d+) times as much", output) >= 10
    assert _number(r"Influences \[600, 4\]: error to dense (\S+)", output) <= 1e-4
    assert _number(r"Smallest eigenvalues of the Hessian: .+, error (\S+)", output) <= 1e-6


@pytest.mark.slow
def test_laplace_calibrates_a_network(tmp_path):
    """Catches a curvature of another scale, samples of another covariance, and none at all."""
    output = output_of(FOLDER / "laplace.py", tmp_path)
    number = r" +([\d.]+)"
    pattern = rf"^(trained network|Laplace){4 * number}$"
    rows = {name: [float(x) for x in row] for name, *row in re.findall(pattern, output, re.M)}
    accuracy, nll, ece, unknown = rows["Laplace"]
    old_accuracy, old_nll, old_ece, old_unknown = rows["trained network"]
    assert accuracy >= old_accuracy - 0.03
    assert nll <= 0.95 * old_nll
    assert ece <= 0.7 * old_ece
    assert unknown <= old_unknown - 0.15
    # the largest evidence is not at an end of the grid
    assert 0.1 < _number(r"Prior precision of largest evidence: (\S+)", output) < 10
    assert _number(r"correlation (\S+)", output) >= 0.9
    assert 0.5 <= _number(r"KFAC / exact GGN: (\S+)", output) <= 2
