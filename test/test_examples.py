"""What the documentation shows runs as shown: the examples, and the README's code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what PyTorch says about itself when forward mode is first used, see pyproject.toml
WARNINGS = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
EXAMPLES = sorted((ROOT / "docs_src" / "examples").glob("*.py"))


def _run(arguments: list[str], folder: Path) -> str:
    """Run Python in a folder; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *WARNINGS, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_writes_its_figure(script, tmp_path):
    figure = tmp_path / "figure.png"
    output = _run([str(script), str(figure)], tmp_path)
    assert figure.stat().st_size > 10_000
    assert output


def test_readme_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        output = _run(["-c", block], tmp_path)
        assert "blocks" in output
    loaded = _run(
        ["-c", 'import torch, curvlinops; print(torch.load("kfac.pt").summary())'], tmp_path
    )
    assert loaded.strip() in output


def test_readme_shows_existing_files_and_names():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    import curvlinops

    for name in re.findall(r"`(\w+LinearOperator)`", text):
        assert hasattr(curvlinops, name), name
