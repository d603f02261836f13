"""The tutorials run as shown, without a warning; their own assertions test what they say."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs_src" / "tutorials"
# what PyTorch says about itself when forward mode is first used, see pyproject.toml; and that there
# is no screen
IGNORED = ["`torch.jit.script:DeprecationWarning", "FigureCanvasAgg is non-interactive:UserWarning"]
WARNINGS = ["-W", "error", *(x for message in IGNORED for x in ("-W", f"ignore:{message}"))]
# runs a script as sphinx-gallery does, keeps its figures, and tells what they cost
RUN = """
import runpy, sys, time
from matplotlib import pyplot

runpy.run_path(sys.argv[1], run_name="__main__")
for number in pyplot.get_fignums():
    pyplot.figure(number).savefig(f"{number}.png")
print(f"CPU seconds: {time.process_time():.1f}")
"""
#: Number of figures, checks that are printed, and assertions in the text.
TUTORIALS = {"kfac_from_scratch": (4, 35, 10), "visual_tour": (5, 0, 6)}
#: CPU seconds: 6 to 8 are usual, more where other processes share the core.
LIMIT = 20


def test_all_tutorials_are_known():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(TUTORIALS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_runs(name: str, tmp_path: Path):
    """Catches everything that its assertions do: see the script."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, *WARNINGS, "-c", RUN, str(FOLDER / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    figures, checks, _ = TUTORIALS[name]
    sizes = [path.stat().st_size for path in tmp_path.glob("*.png")]
    assert len(sizes) == figures
    assert min(sizes) > 10_000
    assert len(re.findall(r": equal \(relative distance", result.stdout)) >= checks
    (seconds,) = re.findall(r"^CPU seconds: ([\d.]+)$", result.stdout, re.MULTILINE)
    assert float(seconds) < LIMIT


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_proves_what_it_says(name: str):
    """Catches a tutorial whose checks were taken out: nothing would fail any more."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    found = sum(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.testing.assert_close")
        for node in ast.walk(tree)
    )
    assert found >= TUTORIALS[name][2]


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_is_a_page(name: str):
    """A title, then cells of text and code: what sphinx-gallery makes a page and a notebook of."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    title, rule = (ast.get_docstring(ast.parse(source)) or "").splitlines()[:2]
    assert set(rule) == {"="} and len(rule) == len(title)
    cells = source.split("\n# %%\n")[1:]
    assert len(cells) >= 8
    assert all(cell.startswith("# ") for cell in cells)  # each begins with text


def test_gallery_has_a_header():
    """Without it, sphinx-gallery makes no page that lists the tutorials."""
    assert "=====" in (FOLDER / "GALLERY_HEADER.rst").read_text(encoding="utf-8")
