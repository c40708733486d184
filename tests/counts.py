"""How often the long proofs try: few by default, all of it with SKIPSEARCH_TESTS=full."""

import os

FULL = os.environ.get("SKIPSEARCH_TESTS") == "full"


def times(fast: int, full: int) -> int:
    return full if FULL else fast


def tell(fault: str, tried: int, **found: int) -> None:
    print(f"faults: {fault}: {tried} tried, " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in found.items()))
