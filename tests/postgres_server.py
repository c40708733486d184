"""A PostgreSQL server of its own in a temporary folder, where its programs are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534  # the server refuses to run as root


def programs() -> Path | None:
    """Where `initdb` and `postgres` are: on the PATH, or where Debian puts them."""
    places = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


class Server:
    """A running server; `url` is what Optuna takes."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        self.user = NOBODY if os.getuid() == 0 else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql+psycopg://tester@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", str(folder / "data"), "-U", "tester", "-A", "trust", "-N", "-E", "UTF8")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tester", "postgres2")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.place / program, *arguments], check=True, user=self.user, capture_output=True, cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder), "LC_ALL": "C"},
        )  # fmt: skip

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -F"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, "-l", str(self.folder / "log"), "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")


def usable() -> bool:
    return programs() is not None and importlib.util.find_spec("psycopg") is not None


@contextmanager
def running() -> Iterator[Server]:
    place = programs()
    assert place is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    server = Server(folder, place)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
