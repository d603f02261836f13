"""Configuration of the documentation site: ``make docs`` builds it into ``build/docs``.

Nothing is fetched while it is built. Three things are generated rather than written by hand: the
reference (from docstrings), the tutorials (run by sphinx-gallery), and the page of examples (from
the scripts in ``docs_src/examples``, below).
"""

from __future__ import annotations

import ast
import os
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
TUTORIALS = DOCS.parent / "docs_src" / "tutorials"
EXAMPLES = DOCS.parent / "docs_src" / "examples"

# Tutorials and the plots of docstrings need neither a screen nor many threads.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "curvlinops"
author = copyright = "the curvlinops developers"
release = version = version_of("curvlinops")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["tutorials/*.ipynb", "tutorials/*.py"]

# ---- pages ---------------------------------------------------------------------------------------
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"curvlinops {release}"
html_copy_source = False
html_show_sourcelink = False

# ---- reference -----------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what arguments are; signatures stay readable
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what a class inherits is described once, at its base
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Warns", "returns_style")]
# Every other reference must lead somewhere; those to other packages are not looked up.
nitpick_ignore_regex = [("py:.*", r"(torch|collections|functools)\..*")]

# ---- tutorials -----------------------------------------------------------------------------------
sphinx_gallery_conf = {
    "examples_dirs": [str(TUTORIALS)],
    "gallery_dirs": ["tutorials"],
    "filename_pattern": r"\.py$",  # all of them run
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "run_stale_examples": True,  # the package may have changed, if a tutorial has not
    "download_all_examples": False,
    "min_reported_time": 1e9,  # times of the machine that built the page say nothing
    "write_computation_times": False,
    "show_signature": False,
    "image_srcset": ["2x"],
}


# ---- examples ------------------------------------------------------------------------------------
def examples() -> str:
    """Return a section for each example: its docstring, figure and source, as MyST Markdown."""
    rows, sections = [], []
    for script in sorted(EXAMPLES.glob("*.py")):
        text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        summary = " ".join(text.partition("\n\n")[0].split())
        rows.append(f"| [{script.name}](#example-{script.stem}) | {summary} |")
        # Docstrings are plain text, which Markdown bears: |θ_q| means no more than it says.
        parts = [f"(example-{script.stem})=\n## {script.name}", text.replace("::\n", ":\n")]
        figure = EXAMPLES / "figures" / f"{script.stem}.png"
        if figure.exists():
            path = os.path.relpath(figure, DOCS)
            parts.append(f"```{{image}} {path}\n:alt: The figure that {script.name} draws\n```")
        source = f"```{{literalinclude}} {os.path.relpath(script, DOCS)}\n:language: python\n```"
        parts.append(f"<details><summary>Source</summary>\n\n{source}\n\n</details>")
        sections.append("\n\n".join(parts))
    table = "\n".join(["| script | what it shows |", "| --- | --- |", *rows])
    return "\n\n".join([table, *sections])


def fill_in_examples(app: Any, page: str, content: list[str]) -> None:
    """Replace the placeholder on the page of examples."""
    if page == "examples":
        content[0] = content[0].replace("[examples]", examples())


def setup(app: Any) -> None:
    """Connect the page of examples, which is read anew in every build."""
    app.connect("source-read", fill_in_examples)
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: ["examples"])
