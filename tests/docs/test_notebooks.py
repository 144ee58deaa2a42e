"""The notebooks: what lies in git holds no results, and every cell runs without an error or a warning."""

import json
import os

import pytest
from pages import ROOT

pytestmark = pytest.mark.source
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)


@by_name
def test_a_notebook_lies_in_git_without_results(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_the_page_names_every_notebook():
    page = (ROOT / "docs" / "howto" / "notebooks.md").read_text()
    assert len(NOTEBOOKS) >= 4
    assert all(f"notebooks/{file.name})" in page for file in NOTEBOOKS)


@pytest.mark.slow
@by_name
def test_a_notebook_runs_without_error_or_warning(notebook):
    import nbclient
    import nbformat

    read = nbformat.read(notebook, as_version=4)
    client = nbclient.NotebookClient(read, timeout=400, resources={"metadata": {"path": str(notebook.parent)}})
    # nearly all of the time is XLA's compiler
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    client.execute(env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)})  # raises what a cell raises
    outputs = [output for cell in read.cells for output in cell.get("outputs", [])]
    assert outputs
    said = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert said == [], "warnings go to stderr"
