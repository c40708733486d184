"""Serving optuna-dashboard for the study of a run."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from skipsearch.errors import ResultsError

SQLITE = "sqlite:///"


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
    return f"{SQLITE}{found[-1].resolve()}"


def _check_database(path: Path) -> None:
    """Find out, without making a file, whether a database holds a study."""
    if not path.is_file():
        raise ResultsError(f"database {path} does not exist; make one with `skipsearch run`, or check the path")
    try:
        with closing(sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)) as connection:
            studies = connection.execute("SELECT COUNT(*) FROM studies").fetchone()[0]
    except sqlite3.Error as error:
        raise ResultsError(f"database {path} holds no study ({error}); make one with `skipsearch run`") from error
    if not studies:
        raise ResultsError(f"database {path} holds no study; make one with `skipsearch run`")


def serve(results: Path | None, storage: str | None, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the dashboard until it is interrupted.

    Args:
        results: see `find_storage`.
        storage: an Optuna storage URL, which takes the place of `results`.
        announce: prints the address.

    Raises:
        ResultsError: there is no such study, its server cannot be reached, or the port is taken.
    """
    url = storage or find_storage(results)
    if url.startswith(SQLITE):
        _check_database(Path(url.removeprefix(SQLITE)))
    from optuna_dashboard import run_server

    from skipsearch.search.storage import open_storage, shown_url, storage_faults

    open_storage(url, new=False).engine.dispose()
    announce(f"optuna-dashboard on http://{host}:{port}/ for {shown_url(url)} (stop with Ctrl-C)")
    with storage_faults(url):
        try:
            run_server(url, host=host, port=port)
        except OSError as error:
            why = error.strerror
            raise ResultsError(f"port {port} cannot be opened ({why}); choose another with --port") from error
