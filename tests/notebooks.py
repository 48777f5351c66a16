"""Runs every notebook from top to bottom, headless: tests/notebooks.py [--write]. With --write the outputs are
kept in the file."""

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

for path in sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
    begin = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
    pictures = sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    print(f"ok   {path.name}: {len(notebook.cells)} cells, {pictures} pictures, {time.monotonic() - begin:.0f} s", flush=True)
    if "--write" in sys.argv:
        nbformat.write(notebook, path)
