"""Serving optuna-dashboard for the study of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from skipsearch.errors import ResultsError


def find_storage(results: Path | None) -> str:
    """The SQLite URL of a study.

    Args:
        results: a database file, or a folder; the newest study.db in it or one level below counts. Default: results/.

    Raises:
        ResultsError: there is no study. (The dashboard itself would create an empty database.)
    """
    root = results or Path("results")
    if root.is_file():
        found = [root]
    else:
        found = sorted([*root.glob("study.db"), *root.glob("*/study.db")], key=lambda p: p.stat().st_mtime)
    if not found:
        raise ResultsError(f"no study.db in {root}; make one with `skipsearch run`, or name its folder")
    return f"sqlite:///{found[-1].resolve()}"


def serve(results: Path | None, storage: str | None, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the dashboard until it is interrupted.

    Args:
        results: see `find_storage`.
        storage: an Optuna storage URL, which takes the place of `results`.
        announce: prints the address.

    Raises:
        ResultsError: there is no such study, or the port is taken.
    """
    url = storage or find_storage(results)
    from optuna_dashboard import run_server

    announce(f"optuna-dashboard on http://{host}:{port}/ for {url} (stop with Ctrl-C)")
    try:
        run_server(url, host=host, port=port)
    except OSError as error:
        raise ResultsError(f"port {port} cannot be opened ({error.strerror}); choose another with --port") from error
