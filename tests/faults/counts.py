"""Counts of faults on purpose: few by default, all of them with SKIPSEARCH_FAULTS=full."""

import os

FULL = os.environ.get("SKIPSEARCH_FAULTS") == "full"


def times(fast: int, full: int) -> int:
    return full if FULL else fast


def tell(fault: str, tried: int, **found: int) -> None:
    print(f"faults: {fault}: {tried} tried, " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in found.items()))
