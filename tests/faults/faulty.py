"""Masks, spaces and prompt files with faults, as strategies of Hypothesis."""

from __future__ import annotations

import copy
import json
from typing import Any

from documents import DOCUMENT
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

PLAN: dict[str, Any] = {
    **DOCUMENT, "version": 2, "quantised_bytes": 1000,
    "quantise": {"int8": {"attention": [1], "mlp": []}, "int4": {"attention": [], "mlp": [0]}},
    "head": {"form": "int8", "ids": "0-63 70"},
    "draft": {"max_length": 3, "curve": [0.5, 1.0], "prices": [0.1, 0.2, 0.3], "ngram": 4, "never_slower": True,
              "costs": [0.1, 0.2, 0.3]},
}  # fmt: skip
SPACE = """
[model]
id = "some/model"
num_layers = 4
[space]
fixed_attention = [0, 3]
fixed_mlp = [0]
structure = "sublayers"
max_skipped = 4
forms = ["int8", "skip"]
[[masks]]
name = "paper"
source = "arXiv"
attention = [1]
mlp = [2]
"""
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "yes"}]
ROWS: list[list[dict[str, Any]]] = [
    [{"prompt": f"def f{i}(x):", "other": i} for i in range(6)],
    [{"turns": [f"question {i}", "another"]} for i in range(6)],
    [{"messages": [{"role": "system", "content": str(i)}, *CHAT]} for i in range(6)],
]


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\x00", "a\nb", "\u2028", "٣", "²", "9" * 30, "x" * 5000, "0-5", "-1"])
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 9), st.sampled_from([10**9, 2**31, 2**63, 10**30, 10**400, -(10**30), True]),
    st.floats(), st.sampled_from([1e308, 5e-324, -0.0, 4.0]),
)  # fmt: skip
JUNK: SearchStrategy[Any] = st.one_of(
    st.none(), NUMBERS, TEXTS, st.lists(st.one_of(NUMBERS, TEXTS), max_size=4),
    st.dictionaries(TEXTS, st.one_of(NUMBERS, TEXTS), max_size=3),
    st.sampled_from([40, 200, 260, 300]).map(deep),
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@st.composite
def mutated(draw: Any, documents: list[Any]) -> Any:
    """A valid document with some values replaced, removed, repeated or added."""
    data = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        found = places(data)
        if not found:
            break
        where, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                where[key] = draw(JUNK)
            case "remove":
                del where[key]
            case _ if isinstance(where, dict):
                where[draw(TEXTS)] = draw(JUNK)
            case _:
                where.append(draw(JUNK))
    return data


@st.composite
def edited_bytes(draw: Any, texts: SearchStrategy[str]) -> bytes:
    """A file of such text with bytes changed, put in, or cut off; or any bytes."""
    data = draw(texts).encode("utf-8", errors="surrogatepass")
    for _ in range(draw(st.sampled_from([0] * 7 + [1, 1, 2]))):
        at, more = draw(st.integers(0, len(data))), draw(st.binary(max_size=4))
        data = data[:at] + more + data[at + draw(st.integers(0, 4)) :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 19)) == 7 else data


@st.composite
def as_json(draw: Any, documents: SearchStrategy[Any]) -> str:
    """JSON text, with escapes or without, sometimes with a key twice."""
    text = json.dumps(draw(documents), ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 5)) == 0 and text.startswith("{"):
        text = "{" + json.dumps(draw(st.sampled_from(["version", "skip", "prompt", "model"]))) + ": 3, " + text[1:]
    return text


def toml_of(value: Any) -> str:
    """A value in TOML; what TOML lacks is written as text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_of(str(k))} = {toml_of(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value).encode(errors="replace").decode())


@st.composite
def spaces(draw: Any) -> str:
    """SPACE with values of keys replaced, and lines removed or repeated."""
    lines = SPACE.strip().splitlines()
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["value", "value", "value", "remove", "repeat", "new"])):
            case "value":
                lines[at] = f"{lines[at].partition(' = ')[0]} = {toml_of(draw(JUNK))}"
            case "repeat":
                lines.insert(at, lines[at])
            case "new":
                names = st.one_of(TEXTS, st.sampled_from(["only", "spans", "structure", "forms", "file"]))
                lines.insert(at, f"{toml_of(draw(names))} = {toml_of(draw(JUNK))}")
            case _ if len(lines) > 1:
                del lines[at]
    return "\n".join(lines)


@st.composite
def files(draw: Any, texts: SearchStrategy[str]) -> bytes:
    """Mostly a valid file with faults; sometimes any bytes."""
    data: bytes = draw(RAW if draw(st.integers(0, 9)) == 7 else edited_bytes(texts))
    return data


RAW = st.one_of(st.binary(max_size=200), st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"a=" + b"[" * 100_000]))


@st.composite
def prompt_files(draw: Any) -> tuple[str, bytes]:
    """A suffix, and what a file of it holds."""
    kind = draw(st.sampled_from([".txt", ".json", ".jsonl", ".csv", ".parquet"]))
    if kind == ".txt":
        texts = st.lists(TEXTS, max_size=9).map("\n".join)
    elif kind == ".csv":
        cells = st.lists(st.one_of(TEXTS, NUMBERS.map(str), st.just('"')), min_size=1, max_size=3).map(",".join)
        texts = st.lists(cells, max_size=8).map(lambda lines: "\n".join(["prompt,other", *lines]))
    elif kind == ".json" and draw(st.booleans()):
        texts = as_json(mutated(ROWS))
    else:
        texts = mutated(ROWS).map(lambda rows: "\n".join(json.dumps(row) for row in rows))
    return kind, draw(files(texts))
