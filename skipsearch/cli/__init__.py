"""The command line: each command parses its options, calls one function and prints the result.

Results go to stdout, progress and logs to stderr. With --json, stdout holds one JSON object and nothing else,
{"error": ...} where it failed.
Exit codes: 0 success, 1 a failed verdict or run, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from typing import Any

from rich.markup import escape

from skipsearch.cli import export, files, generate, measure, run, start, worker  # noqa: F401 (each adds its commands)
from skipsearch.cli.help import tell_as_json
from skipsearch.cli.options import app, err
from skipsearch.cli.terminal import plain_where_needed
from skipsearch.errors import SkipsearchError, SkipsearchWarning, enough_memory

_interruptions: list[float] = []  # when Ctrl-C was pressed


def main() -> None:
    """Entry point: prints our errors as one line, and exits with 130 after an interruption."""
    debug = "--debug" in sys.argv
    plain_where_needed()
    if not debug:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("once", category=SkipsearchWarning)
        warnings.showwarning = lambda message, *_, **__: err.print(f"note: {message}", markup=False, soft_wrap=True)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # our own error reports the same
    _interruptions.clear()
    # Not in a thread, and not where who started this process has decided otherwise.
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with enough_memory("run this command", "pass --dtype bfloat16, --backend eager, or fewer or shorter prompts"):
            app()
    except BaseException as error:
        left = isinstance(error, SystemExit) and error.code != 130  # typer makes 130 of an interruption
        if not left and (_interruptions or isinstance(error, (KeyboardInterrupt, SystemExit))):
            _tell_interrupted()
            sys.exit(130)
        if debug or not isinstance(error, SkipsearchError):
            raise
        err.print(f"[red]error:[/] {escape(str(error))}", markup=True, highlight=False, soft_wrap=True)
        tell_as_json(str(error))
        sys.exit(1)
    finally:
        if ours and not _interruptions:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(*_: Any) -> None:
    """The first Ctrl-C unwinds, and is what is told, whatever fails on its way; a second one does not wait for that."""
    _interruptions.append(time.monotonic())
    if len(_interruptions) > 1:
        _tell_interrupted()
        os._exit(130)
    raise KeyboardInterrupt


def _tell_interrupted() -> None:
    if signal.getsignal(signal.SIGINT) is _interrupt:  # the process is on its way out
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept = "; what was done is kept, run the same command again to continue" if sys.argv[1:2] == ["run"] else ""
    err.show_cursor()
    err.print(f"\ninterrupted{kept}", soft_wrap=True)
