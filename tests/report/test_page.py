"""The report of a results folder: every section, folders that lack some, text of strangers, and a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from skipsearch import DraftPlan, SkipMask, cli
from skipsearch.errors import MaskError, ResultsError
from skipsearch.files import write_checked, write_json
from skipsearch.maskfile import Evidence, MaskFile, ModelCard, Provenance
from skipsearch.policy import DraftPolicy
from skipsearch.report.page import SECTIONS, write_report

EVIL = "<script>alert(1)</script> </p>&\n"
PLAN = DraftPlan(SkipMask(attention=[1, 4, 5, 6], mlp=[2], num_layers=30), int8=SkipMask(mlp=[7], num_layers=30))
PROOF = Evidence(
    acceptance_rate=0.8, tau=3.0, cost_ratio=0.4, speedup=1.5, speedup_ci=(1.2, 1.9), baseline="plain decoding",
    tokens_per_second=15.0, baseline_tokens_per_second=10.0, greedy_equal=True, backend="eager", dtype="float32",
    device="a CPU", prompts=2, tokens=8, prompts_sha256="ab", verdict="use", decoding="greedy",
)  # fmt: skip
OTHERS = ("summary.json", "sensitivity.json", "trials.csv", "front.json", "validation.json", "texts.json")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def run_of(seconds: float) -> dict[str, Any]:
    stats = {"blocks": [[[3, 2], 1], [[0, 0], 1]], "committed": 4, "accepted_from": [], "blocks_from": []}
    return {"seconds": seconds, "tokens": 4, "prefill": 0.1, "ids": [5, 6, 7, 8], "stats": stats}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves, made up, with text that would break a page that does not escape it."""
    made = tmp_path / "results"
    made.mkdir()
    card, provenance = ModelCard(id=f"m{EVIL}", num_layers=30), Provenance(trial=1, seed=0, study="search")
    MaskFile.of(PLAN, model=card, evidence=PROOF, provenance=provenance, draft=DraftPolicy(ngram=10)).save(
        made / "mask.json"
    )
    arm = {"speedup": 1.5, "speedup_ci": [1.2, 1.9], "tokens_per_second": 15.0}
    predicted = {"speedup": 1.6, "standard_error": 0.1, "tokens_per_second": 16.0, "acceptance_rate": 0.8, "tau": 3.0,
                 "cost_ratio": 0.4, "tokens": 100}  # fmt: skip
    write_json(made / "summary.json", {
        "measured": {"plan": arm, "n-grams": arm, "served": arm}, "predicted": predicted, "serves": "plan",
        "evidence": PROOF.model_dump(mode="json"), "cut_short": [EVIL], "seconds": {"record": 2.0, EVIL: 3.0},
        "plan": PLAN.to_dict(),
    })  # fmt: skip
    loss = {kind: {str(i): i / 100 for i in range(30)} for kind in ("attention", "mlp")}
    write_checked(made / "sensitivity.json", {"loss": loss, "forms": {"int8": loss}})
    rows = [{"trial": n, "cost_ratio": 0.3 + n / 10, "acceptance_rate": 0.5 + n / 10} for n in range(2)]
    write_json(made / "front.json", {"front": rows})
    lines = [f"{row['trial']},{row['cost_ratio']},{row['acceptance_rate']},1.{row['trial']},{EVIL[:8]}" for row in rows]
    heads = "trial,cost_ratio,acceptance_rate,speedup_predicted,seed"
    (made / "trials.csv").write_text("\n".join([heads, *lines, "2,,,,"]) + "\n")
    measured = {name: [[run_of(seconds)], [run_of(2 * seconds)], []] for name, seconds in (("plain", 2), ("served", 1))}
    write_checked(made / "validation.json", {"measured": measured})
    text = {"prompt": EVIL, "marks": "tmNNnt", "pieces": [EVIL, "a", "b", "c\n", "d" * 300, "e"]}
    write_checked(made / "texts.json", {"arm": "served", "prompts": [text, text]})
    return made


def test_a_report_shows_all_and_runs_nothing(folder: Path) -> None:
    """Prevents a section from going missing, and a prompt or a model's name from becoming markup."""
    data = write_report(folder)
    page = (folder / "report.html").read_text()
    assert data == {"report": str(folder / "report.html"), "verdict": "use", "lacks": []}
    assert all(f"<h2>{title}</h2>" in page for title in SECTIONS) and "The plan pays: 1.50x" in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r"\s(?:src|href)=|@import|url\(", page) and "default-src 'none'" in page
    pictures = re.findall("<svg .*?</svg>", page)
    assert len(pictures) == 6 and all("<title>" in svg and "<desc>" in svg and "aria-label" in svg for svg in pictures)
    assert "attention 1, 4-6; mlp 2" in page and "2: 2.00x" in page and "67% accepted" in page
    assert "<del>bc↵</del>" in page and page.count("<details>") == 2
    assert write_report(folder, folder / "else.html")["report"].endswith("else.html")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "content", [None, "", "[1, 2", '{"measured": 3}', "trial\n\x00", '{"loss": {"attention": NaN}}']
)
def test_a_file_that_is_missing_or_damaged_costs_its_section(folder: Path, name: str, content: str | None) -> None:
    """Prevents a traceback, and a report that hides what it could not read."""
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    data = write_report(folder)
    page = (folder / "report.html").read_text()
    assert name in data["lacks"] and page.count('class="lacks"') >= 1 and name in page
    assert set(data["lacks"]) <= {name, "front.json" if name == "trials.csv" else name}
    assert all(f"<h2>{title}</h2>" in page for title in SECTIONS) and "1.50x (1.20 to 1.90)" in page


def test_figures_that_are_none_are_not_drawn(folder: Path) -> None:
    """Prevents coordinates that are not numbers, and widths beyond all bounds."""
    data = json.loads((folder / "summary.json").read_text())
    data["predicted"]["speedup"] = float("inf")
    (folder / "summary.json").write_text(json.dumps(data))
    assert write_report(folder)["lacks"] == ["summary.json"]
    page = (folder / "report.html").read_text()
    assert "nan" not in page and "not finite" in page


def test_folders_without_a_validation_or_a_mask(folder: Path, tmp_path: Path) -> None:
    """Prevents an empty page, and a refusal that does not say what to do."""
    MaskFile.of(PLAN, model=ModelCard(id="m", num_layers=30)).save(tmp_path / "alone" / "mask.json")
    data = write_report(tmp_path / "alone")
    page = (tmp_path / "alone" / "report.html").read_text()
    assert data["verdict"] is None and set(data["lacks"]) == set(OTHERS) - {"texts.json"} and "Not validated" in page
    assert "skipsearch validate" in page and "attention 1, 4-6" in page
    (tmp_path / "empty").mkdir()
    for wrong, said in (("empty", "holds no mask.json; make one with `skipsearch run"), ("gone", "does not exist")):
        with pytest.raises(ResultsError, match=said):
            write_report(tmp_path / wrong)
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "gone").exists()
    (folder / "mask.json").write_text("{")
    with pytest.raises(MaskError, match="not whole JSON"):
        write_report(folder)


def test_a_file_that_serves_ngrams_shows_the_plan_that_it_leaves_out(folder: Path) -> None:
    """Prevents an empty first section where no plan pays."""
    empty, policy = SkipMask(num_layers=30), DraftPolicy.ngrams_alone()
    MaskFile.of(empty, model=ModelCard(id="m", num_layers=30), draft=policy, evidence=PROOF).save(folder / "mask.json")
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "N-grams draft alone" in page and "attention 1, 4-6" in page
    (folder / "summary.json").unlink()
    write_report(folder)
    assert "It pays: 1.50x" in (folder / "report.html").read_text()


def test_the_command_says_where_it_wrote(folder: Path) -> None:
    """Prevents output beside the one JSON object."""
    found = CliRunner().invoke(cli.app, ["report", str(folder), "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)["verdict"] == "use"
    (folder / "front.json").unlink()
    found = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(folder / "x.html")])
    assert found.exit_code == 0 and "what is missing: front.json" in " ".join(found.output.split())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_nothing_is_cut_off_and_nothing_complains(folder: Path, width: int) -> None:
    """Prevents a page that scrolls sideways on a telephone, and one that asks the network for something."""
    write_report(folder)
    page = (folder / "report.html").read_text().replace("<details>", "<details open>")
    tell = "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')</script>"
    measured = re.sub("<meta http-equiv=.*?>", "", page).replace("</body>", f"{tell}</body>")
    (folder / "report.html").write_text(page)  # its own policy holds: what it blocks is told on the console
    (folder / "measured.html").write_text(measured)
    frame = f'<iframe src="{{}}" style="width:{width}px;height:900px;border:0"></iframe>'
    (folder / "frame.html").write_text(
        "<script>onmessage = e => document.title = 'widths ' + e.data.join(' ')</script>"
        + frame.format("measured.html") + frame.format("report.html")
    )  # fmt: skip
    found = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--dump-dom",
         (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    widths = re.search(r"<title>widths (\d+) (\d+)</title>", found.stdout)
    assert widths is not None, found.stderr[-2000:]
    assert int(widths[1]) <= int(widths[2]) == width
    assert "CONSOLE" not in found.stderr, found.stderr[-2000:]
