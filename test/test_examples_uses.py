"""Examples of what curvature is used for: each reaches the figure of merit that it prints."""

import re

import pytest
from test_examples import FOLDER, output_of


def _rows(output: str, columns: int) -> dict[str, list[float]]:
    """Return the rows of a table that have a label and so many numbers; per cents as they are."""
    pattern = rf"^(\w.*?)((?: +-?[\d.]+%?){{{columns}}})$"
    found = re.findall(pattern, output, re.MULTILINE)
    return {label: [float(x.rstrip("%")) for x in values.split()] for label, values in found}


@pytest.mark.slow
def test_influence_predicts_leaving_one_out(tmp_path):
    """Catches influences of the wrong sign, without an inverse, or with factors of other layers."""
    rows = _rows(output_of(FOLDER / "influence.py", tmp_path), columns=3)
    assert list(rows) == ["exact inverse (CG)", "EKFAC", "KFAC", "diagonal", "no inverse"]
    pearson, spearman, found = zip(*rows.values(), strict=True)
    assert pearson[0] > 0.97 and spearman[0] > 0.97
    for i in (1, 2):
        assert 1 > pearson[i] > pearson[-1] + 0.2
        assert 1 > spearman[i] > spearman[-1] + 0.25
    assert min(found[:3]) > max(66, found[-1])


@pytest.mark.slow
def test_merging_with_curvature_beats_averaging(tmp_path):
    """Catches curvature of the wrong task, and a sum of operators that drops or mixes summands."""
    output = output_of(FOLDER / "merging.py", tmp_path)
    rows = _rows(output, columns=4)
    assert len(rows) == 8
    loss = {label: values[0] for label, values in rows.items()}
    accuracy = {label: values[3] for label, values in rows.items()}
    for label, (_, upright, rotated, mean) in rows.items():
        assert mean == pytest.approx((upright + rotated) / 2, abs=0.11), label
    simple = min(loss["average"], loss["best multiple"])
    assert loss["merged, KFAC"] <= 0.9 * loss["merged, diagonal"] < 0.9 * simple
    assert loss["merged, GGN"] < loss["merged, KFAC"]
    assert accuracy["merged, KFAC"] > accuracy["merged, diagonal"] > accuracy["average"] + 10
    assert accuracy["merged, GGN"] > accuracy["trained on all data"] - 5
    (error,) = re.findall(r"merging differs from joint training by ([\d.e+-]+)$", output, re.M)
    assert 0 < float(error) < 1e-6


@pytest.mark.slow
def test_pruning_with_the_inverse_beats_magnitudes(tmp_path):
    """Catches updates without an inverse, with another or its negative, and wrong diagonals."""
    output = output_of(FOLDER / "pruning.py", tmp_path)
    header = re.findall(r"^accuracy without +(.*)$", output, re.MULTILINE)[0].split()
    rows = _rows(output, columns=len(header))
    at = {label: dict(zip(header, values, strict=True)) for label, values in rows.items()}
    del at["accuracy without"]
    assert list(at) == ["magnitude", "OBD, diagonal", "OBS, KFAC", "OBS, GGN"]
    assert len({row["0%"] for row in at.values()}) == 1
    assert at["OBS, KFAC"]["80%"] > at["OBS, KFAC"]["0%"] - 10
    for label in ("OBS, KFAC", "OBS, GGN"):
        assert at[label]["80%"] > max(at["magnitude"]["80%"], at["OBD, diagonal"]["80%"]) + 10
    simple = max(at["magnitude"]["90%"], at["OBD, diagonal"]["90%"])
    assert at["OBS, KFAC"]["90%"] > simple + 25
    increases = _rows(output, columns=len(header) - 1)
    for i in (2, 3, 4):  # rounds to 60, 70, 80 %
        ratio = increases["KFAC, loss +"][i] / increases["predicted"][i]
        assert 1 / 3.5 < ratio < 3.5
