"""Run the notebooks and store their outputs: `python notebooks/refresh.py`, or `make notebooks`.

Code cells are executed in order, each notebook in a namespace of its own, from the committed results; Jupyter is not
needed. Tables are stored as HTML and text, Plotly figures as pictures (`drawing.py`), which every viewer shows; in
Jupyter they are interactive once a cell is run.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from drawing import svg

HERE = Path(__file__).parent


def refreshed(path: Path) -> str:
    """The notebook's file with fresh outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    with contextlib.chdir(path.parent):
        for count, cell in enumerate(cells, 1):
            cell["execution_count"], cell["outputs"] = count, _outputs("".join(cell["source"]), namespace, count)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _outputs(source: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, and the value of its last line."""
    tree, value = ast.parse(source), None
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(last, "cell", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data = {kind: text.splitlines(keepends=True) for kind, text in _shown(value).items()}
        result = {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}
        outputs.append(result)
    return outputs


def _shown(value: Any) -> dict[str, str]:
    """A value by media type. A table does not depend on the width of a terminal, as pandas' own text does."""
    if isinstance(value, pd.DataFrame):
        return {"text/html": value.to_html(border=0), "text/plain": value.to_string()}
    if isinstance(value, go.Figure):
        return {"image/svg+xml": svg(value), "text/plain": "Plotly figure"}
    return {"text/plain": repr(value)}


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        text = refreshed(path)
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(text) / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
