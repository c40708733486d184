"""The sections of a report. Each takes mask.json and the contents of its file or files, and returns HTML.

What a file holds is not trusted: text is escaped, and figures that make no sense raise what Python raises.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from html import escape
from itertools import groupby, takewhile
from typing import Any, cast

from skipsearch.errors import ResultsError
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.maskfile import MaskFile
from skipsearch.plan import FORMS, QUANTISED, DraftPlan, Form
from skipsearch.report.cells import WORDS
from skipsearch.report.svg import Cell, Point, intervals_svg, layers_svg, scatter_svg
from skipsearch.report.tables import evidence_rows, megabytes, policy_line

HIGH: dict[Form, float] = {"run": 1.0, "int8": 0.6, "int4": 0.3, "skip": 0.0}  # of a cell: told without colours
MARKS = {
    "m": "drafted by the plan, accepted",
    "n": "n-gram, accepted",
    "x": "drafted, rejected",
    "t": "the model's own",
}


def plan(file: MaskFile, summary: Any, _more: Any) -> str:
    """Each sublayer's form, drawn and in words; of the best plan, where n-grams are served without it."""
    found, said = file.drafting_plan, ""
    if found is None:
        said = "<p>N-grams draft alone, with plain steps where they do not pay.</p>"
        if not summary:
            return said
        said += "<p>The best plan that was found is left out:</p>"
        masks = {form: SkipMask(**summary["plan"][form]) for form in ("skip", *QUANTISED)}
        found = DraftPlan(**masks, head=summary["plan"]["head"], head_ids=summary["plan"]["head_ids"])
    every = [(kind, i) for kind in KINDS for i in range(found.num_layers)]
    of = {form: [sub for sub in every if found.form(*sub) == form] for form in FORMS}
    cells: dict[Sublayer, Cell] = {
        sub: (HIGH[form], f"form-{form}", f"{sub[0]} {sub[1]}: {WORDS[form]}") for form in FORMS for sub in of[form]
    }
    rows = [(WORDS[form], _layers(of[form])) for form in FORMS[1:] if of[form]]
    what = ". ".join(f"{form}: {layers}" for form, layers in rows) or "everything runs"
    if not found.only_skips:
        rows.append(("head", found.head + ("" if found.head_ids is None else f", over {len(found.head_ids):,} tokens")))
    keys = {f"key-{form}": f"{WORDS[form]}: {len(of[form])}" for form in FORMS if of[form] or form in ("run", "skip")}
    drawn = layers_svg("What each sublayer does while drafting", what, found.num_layers, cells)
    return said + drawn + _keys(keys) + _table(rows)


def sensitivity(file: MaskFile, data: Any, _more: Any) -> str:
    """For each form: the share of tokens that change when one sublayer alone has it."""
    drawn = []
    for form, loss in {"skip": data["loss"], **data["forms"]}.items():
        found = {(kind, int(i)): float(value) for kind in KINDS for i, value in loss[kind].items()}
        if not found or form not in FORMS:
            continue
        most, worst = max(found.values()), sorted(found, key=lambda sub: -found[sub])[:3]
        cells: dict[Sublayer, Cell] = {
            sub: (value / (most or 1), f"form-{form}", f"{sub[0]} {sub[1]}: {value:.1%}")
            for sub, value in found.items()
        }
        title = f"{WORDS[cast(Form, form)]} alone: up to {most:.1%} of the tokens change"
        what = "most harmful: " + ", ".join(f"{kind} {i} ({found[kind, i]:.1%})" for kind, i in worst)
        drawn.append(f"<h3>{title}</h3>{layers_svg(title, what, file.model.num_layers, cells)}{_soft(what)}")
    return "".join(drawn) or _soft("No sublayer was tried alone")


def measured(file: MaskFile, data: Any, _more: Any) -> str:
    """What the search predicted beside what validation measured, arm by arm; then the evidence."""
    seen = data["predicted"]
    speed, error = float(seen["speedup"]), 1.96 * float(seen["standard_error"])
    rows = [("predicted", speed, speed - error, speed + error)]
    rows += [(name, float(arm["speedup"]), *map(float, arm["speedup_ci"])) for name, arm in data["measured"].items()]
    what = "; ".join(f"{name} {value:.2f}x ({low:.2f} to {high:.2f})" for name, value, low, high in rows)
    said = f"acceptance rate {seen['acceptance_rate']:.3f}, tau {seen['tau']:.2f}, c {seen['cost_ratio']:.3f}"
    table = [("predicted", f"{seen['tokens_per_second']:.1f} tokens/s, {said}, on {seen['tokens']:,} tokens")]
    if file.evidence is not None:
        table += [(name, str(value)) for name, value in evidence_rows(file.evidence.model_dump())]
    return intervals_svg("Speed-up over plain decoding, with 95 % intervals", what, rows) + _soft(what) + _table(table)


def history(file: MaskFile, trials: Any, _more: Any) -> str:
    """Predicted speed-up of each trial, and the best so far."""
    rows = sorted((int(t["trial"]), float(t["speedup_predicted"]), t) for t in trials if t["speedup_predicted"])
    if not rows:
        raise ResultsError("trials.csv holds no scored trial.")
    points = [(n, value, f"trial {n}: {value:.2f}x, {t['seed'] or 'sampler'}") for n, value, t in rows]
    best: list[Point] = []
    for number, value, _ in points:
        best.append((number, max(value, best[-1][1] if best else value), ""))
    chosen = [point for point in points if point[0] == file.provenance.trial]
    what = f"{len(points)} scored trials, the best {best[-1][1]:.2f}x plain decoding (dashed)"
    drawn = scatter_svg(
        "Predicted speed-up against trials", what, {"trial": points, "best": chosen},
        ("trial", "times plain decoding"), line=best, level=1.0,
    )  # fmt: skip
    return drawn + _keys({"key-trial": "trial", "key-front": "best so far", "key-best": "validated"}) + _soft(what)


def front(file: MaskFile, data: Any, trials: Any) -> str:
    """Acceptance rate against cost ratio, with the front."""

    def points(rows: Any) -> list[Point]:
        found = [(float(t["cost_ratio"]), float(t["acceptance_rate"]), t["trial"]) for t in rows if t["cost_ratio"]]
        return [(c, rate, f"trial {n}: {rate:.0%} accepted at c {c:.2f}") for c, rate, n in found]

    every = {
        "trial": points(trials or ()), "front": points(data["front"]),
        "best": points(t for t in data["front"] if t["trial"] == file.provenance.trial),
    }  # fmt: skip
    what = f"{len(every['front'])} trials that no other beats in both; up and left is better"
    labels = ("cost ratio c of a draft step", "acceptance rate")
    drawn = scatter_svg("Acceptance against cost", what, every, labels, line=every["front"])
    return drawn + _keys({"key-trial": "trial", "key-front": "front", "key-best": "validated"}) + _soft(what)


def seconds(_file: MaskFile, data: Any, _more: Any) -> str:
    """Wall-clock seconds of each stage."""
    spent = {name: float(value) for name, value in data["seconds"].items()}
    most = max(spent.values()) or 1.0
    rows = (
        f"<tr><th>{escape(name)}</th><td>{value:.0f} s</td><td class='most'>{_bar(value / most)}</td></tr>"
        for name, value in spent.items()
    )
    cut = "".join(_soft(f"Cut short: {why}") for why in data["cut_short"])
    return f"<table>{''.join(rows)}</table>{_soft(f'{sum(spent.values()):.0f} s in all, of the last call')}{cut}"


def prompts(_file: MaskFile, data: Any, texts: Any) -> str:
    """Each held-out prompt: speed-up, acceptance, and its text with what drafted each token."""
    runs, texts = data["measured"], texts or {"arm": "", "prompts": []}
    arms = [arm for arm in runs if arm != "plain"]
    arm = texts["arm"] if texts["arm"] in arms else arms[0]
    done = [i for i in range(len(runs["plain"])) if all(of_arm[i] for of_arm in runs.values())]
    if not done:
        raise ResultsError("validation.json holds no timed prompt.")
    speeds = [
        {name: _seconds_a_token(runs["plain"][i]) / _seconds_a_token(runs[name][i]) for name in arms} for i in done
    ]
    most, body = max(speed[arm] for speed in speeds), []
    known = [text["prompt"] for text in texts["prompts"] if text]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*known, strict=False)) if len(known) > 1 else ()
    shared = list(same)  # the beginning of a chat template
    for i, speed in zip(done, speeds, strict=True):
        blocks = [(k, n, count) for (k, n), count in runs[arm][i][-1]["stats"]["blocks"]]
        drafted, accepted = (sum(block[place] * block[2] for block in blocks) for place in (0, 1))
        share = f"{accepted / drafted:.0%} accepted" if drafted else "nothing drafted"
        head, text = f"<b>{i + 1}: {speed[arm]:.2f}x</b>{_bar(speed[arm] / most)} {share}", ""
        if found := (texts["prompts"][i : i + 1] or [None])[0]:
            begin = " ".join(found["prompt"][len(shared) :].split())[:60]
            head, text = f"{head} <span class='soft'>{escape(begin)}</span>", _text(found)
        others = ", ".join(f"{name} {value:.2f}x" for name, value in speed.items())
        figures = _soft(f"{others}; {accepted} of {drafted} drafted tokens accepted")
        body.append(f"<details><summary>{head}</summary>{figures}{text}</details>")
    keys = "".join(f"<span>{_marked(mark, words)}</span>" for mark, words in MARKS.items())
    what = f"{len(done)} prompts that the search never saw, decoded by the arm <b>{escape(arm)}</b>; bars: speed-up"
    return f"<p>{what} over plain decoding.</p><p class='keys'>{keys}</p>{''.join(body)}"


def set_up(file: MaskFile, _data: Any, _more: Any) -> str:
    """Model, device, versions, prompts, seed."""
    card, proof, copies = file.model, file.evidence, file.quantised_bytes
    rows: list[tuple[str, Any]] = [
        ("model", f"{card.id}, {card.architecture}, {card.num_layers} layers"), ("revision", card.revision),
        ("config SHA-256", card.config_sha256), ("draft policy", policy_line(asdict(file.draft))),
        ("quantised copies", None if copies is None else megabytes(copies)),
    ]  # fmt: skip
    if proof is not None:
        rows += [
            ("device", proof.device), ("dtype, backend", f"{proof.dtype}, {proof.backend}"),
            ("decoding", proof.decoding),
            ("held-out prompts", f"{proof.prompts}, {proof.tokens} tokens, SHA-256 {proof.prompts_sha256}"),
        ]  # fmt: skip
    rows += [(name.replace("_", " "), value) for name, value in file.provenance.model_dump().items()]
    return _table([(name, str(value)) for name, value in rows if value is not None])


def _table(rows: list[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><th>{escape(n)}</th><td>{escape(value)}</td></tr>' for n, value in rows)}</table>"


def _keys(keys: dict[str, str]) -> str:
    spans = (f'<span><span class="key {css}"></span>{escape(words)}</span>' for css, words in keys.items())
    return f'<p class="keys">{"".join(spans)}</p>'


def _soft(words: object) -> str:
    return f'<p class="soft">{escape(str(words))}.</p>'


def _bar(share: float) -> str:
    return f'<span class="bar" style="--share:{100 * share:.1f}%"></span>'


def _layers(subs: list[Sublayer]) -> str:
    """Sublayers in words: attention 3, 5-9; mlp 2."""
    said = []
    for kind, of_kind in groupby(subs, lambda sub: sub[0]):
        runs = groupby(enumerate(i for _, i in of_kind), lambda pair: pair[1] - pair[0])
        ends = ([i for _, i in group] for _, group in runs)
        said.append(f"{kind} " + ", ".join(str(e[0]) if len(e) == 1 else f"{e[0]}-{e[-1]}" for e in ends))
    return "; ".join(said)


def _seconds_a_token(runs: Any) -> float:
    return statistics.median(float(run["seconds"]) / max(1, int(run["tokens"])) for run in runs)


def _marked(mark: str, words: str) -> str:
    if mark == "x":  # what was rejected breaks no lines
        return f"<del>{escape(words.replace(chr(10), '↵'))}</del>"
    return f'<span class="{escape(mark)}">{escape(words)}</span>'


def _text(found: Any) -> str:
    """A prompt and what was decoded from it; neighbours of one kind are marked together."""
    kinds = ["x" if mark.isupper() else mark for mark in found["marks"]]
    pairs = groupby(zip(kinds, found["pieces"], strict=True), lambda pair: pair[0])
    marked = (_marked(mark, "".join(piece for _, piece in pieces)) for mark, pieces in pairs)
    return f'<p class="text"><span class="soft">{escape(found["prompt"])}</span>{"".join(marked)}</p>'
