"""One lock for what two threads must not do at once: compiling, which changes settings of the process; lending buffers;
and quantised copies, of which there may be memory for one.
"""

from __future__ import annotations

import os
import threading


class _Turns:
    """A lock that a thread may take twice. A forked process has it free: the thread that held it does not run there."""

    def __init__(self) -> None:
        self._taken = threading.local()
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._taken.locks = [*getattr(self._taken, "locks", ()), lock]

    def __exit__(self, *_: object) -> None:
        *self._taken.locks, lock = self._taken.locks  # a fork may have renewed the lock since
        lock.release()


one_at_a_time = _Turns()
