"""The notebook runs from its first cell to its last on the tiny world, without network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(file: Path) -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(file, as_version=4)


def test_there_is_a_notebook() -> None:
    assert [file.name for file in NOTEBOOKS] == ["inspect.ipynb"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_is_kept_without_outputs(file: Path) -> None:
    for cell in read(file).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_notebook_runs(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.copytree(world.vqa, tmp_path / "vqa")
    monkeypatch.setenv("VISLING_RUN", str(tmp_path / "vqa"))
    monkeypatch.setenv("VISLING_PICTURE", str(world.picture()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(ROOT / "examples" / "inspect.ipynb")
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("text/html" in data for data in shown) >= 4, "answer, encoding, map and heads"
    assert sum("image/png" in data for data in shown) == 2, "what is drawn with weights"
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert printed.count("Answer(") == 3
    assert "there is no word 'elephant'" in printed
    page = (tmp_path / "inspection.html").read_text(encoding="utf-8")
    assert "what color is the cross?" in page
