"""What the documentation shows runs as shown: the examples, and the README's code."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import Block, blocks_of, differences

ROOT = Path(__file__).parent.parent
# what PyTorch says about itself when forward mode is first used, see pyproject.toml
WARNINGS = ["-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning"]
FOLDER = ROOT / "docs_src" / "examples"
NATURAL_GRADIENT = FOLDER / "natural_gradient.py"
TORCHRUN = FOLDER / "natural_gradient_torchrun.py"
#: Those whose output is read below, or in test_examples_curvature.py and test_examples_uses.py.
READ = {NATURAL_GRADIENT, TORCHRUN} | {
    FOLDER / f"{name}.py"
    for name in ("spectrum", "inverse_products", "laplace", "influence", "merging", "pruning")
}
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - READ)
#: Seconds after which processes that may wait for one another are ended.
TIMEOUT = 180


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


def output_of(script: Path, folder: Path) -> str:
    """Run an example that writes its figure into a folder; return what it prints."""
    figure = folder / "figure.png"
    output = _run([str(script), str(figure)], folder)
    assert figure.stat().st_size > 10_000
    assert output.endswith(f"Wrote {figure}\n")
    return output


def _torchrun(script: Path, size: int, folder: Path) -> str:
    """Run a script on several processes, which talk through the loopback interface."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    environment["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a free port
    process = subprocess.Popen(
        [*launcher, f"--nproc_per_node={size}", str(script)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the launcher then ends what it has started
        process.communicate(timeout=60)
        raise
    finally:
        process.kill()  # which does nothing if it has ended
    assert process.returncode == 0, errors
    return output


@pytest.mark.slow  # `make demo` runs it, too
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_writes_its_figure(script, tmp_path):
    output_of(script, tmp_path)


@pytest.mark.slow
def test_natural_gradient_beats_sgd_and_adam(tmp_path):
    """Catches factors, inverses or steps with which KFAC is no better than a diagonal method."""
    output = output_of(NATURAL_GRADIENT, tmp_path)
    rows = re.findall(r"^(\w+), (.+?) {2,}([\d.]+) +([\d.]+)% +[\d.]+ ms$", output, re.MULTILINE)
    loss = {(name, what): float(value) for name, what, value, _ in rows}
    assert [name for name, _ in loss] == ["SGD", "Adam", "KFAC", "KFAC"]
    SGD, Adam, *KFAC = loss.values()
    assert 4 * max(KFAC) <= SGD
    assert 2 * max(KFAC) <= Adam
    accuracy = [float(value) for *_, value in rows]
    assert min(accuracy[2:]) > max(93, *accuracy[:2])
    ratios = [float(x) for x in re.findall(r"loss ([\d.]+) times lower than SGD's", output)]
    assert ratios == pytest.approx([SGD / x for x in KFAC], rel=0.02)


@pytest.mark.slow
def test_natural_gradient_on_two_processes(tmp_path):
    """Catches ranks that train apart, wrong sums over them, or all blocks held by all."""
    output = _torchrun(TORCHRUN, 2, tmp_path)
    assert "Parameters have the same bits on all 2 ranks." in output
    held = re.findall(r"^Rank (\d) holds the blocks of (.+)\.$", output, re.MULTILINE)
    assert [rank for rank, _ in held] == ["0", "1"]
    blocks = [block for _, names in held for block in names.split(", ")]
    assert sorted(blocks) == [f"{i}.weight + {i}.bias" for i in (0, 2, 4, 6, 8)]
    assert all(names for _, names in held)
    (loss,) = re.findall(
        r"^Training loss: ([\d.]+), test accuracy: 9\d\.\d%$", output, re.MULTILINE
    )
    assert float(loss) < 0.06
    (difference,) = re.findall(r"^Largest difference to one process.*: ([\d.e+-]+)$", output, re.M)
    assert float(difference) < 1e-9


@pytest.mark.slow
def test_example_for_torchrun_tells_how_to_run_it(tmp_path):
    result = subprocess.run(
        [sys.executable, *WARNINGS, str(TORCHRUN)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Run this with: torchrun --standalone --nproc_per_node=2 ")


README = blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", README[1:], ids=lambda block: f"line {block.line}")
def test_readme_code_prints_what_is_shown(block: Block, tmp_path):
    """Each of the snippets runs after the first one alone."""
    output = _run(["-c", README[0].code + block.code], tmp_path)
    assert block.output is not None
    assert not differences(output, block.output)
    if "kfac.pt" in block.code:
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
