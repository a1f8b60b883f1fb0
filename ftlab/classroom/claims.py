"""The claims ledger: what the article says, what is true, and the cell that shows it.

    claims.ledger()              all of them, to be narrowed by verdict, notebook and words

Read from data/claims/claims.yaml; its README has the schema, to which tests/test_claims.py holds it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import yaml
from IPython.display import display

from ftlab.classroom import page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.paths import DATA

FILE = DATA / "claims" / "claims.yaml"
VERDICTS = {
    "HOLDS": "true as it stands",
    "COND": "true under conditions, which are named",
    "WRONG": "false as it stands",
    "NOSRC": "no source exists for it",
    "DATED": "was true, is not in November 2026",
}
COLOURS = {"HOLDS": CHOSEN, "COND": POLICY, "WRONG": REJECTED, "NOSRC": REFERENCE, "DATED": "#CC79A7"}
# notebook#cell, or a data file
EVIDENCE = re.compile(r"\d\d_\w+#[\w-]+|data/(?:\w[\w.-]*/)*\w[\w.-]*\.(?:jsonl?|md|yaml)")


@dataclass(frozen=True)
class Claim:
    """One claim. `evidence`: cells as "02_lora_math#count", perhaps files as "data/results/ask.jsonl".

    `never`: regular expressions, each with a sentence it matches. No notebook may state what one of them matches,
    except as the article's: tests/test_claims.py.
    """

    id: str
    claim: str
    verdict: str
    correct: str
    source: str
    evidence: tuple[str, ...]
    never: tuple[tuple[str, str], ...] = ()


def load(file: Path = FILE) -> list[Claim]:
    """All claims, in the order of the file."""
    return [_claim(**entry) for entry in yaml.safe_load(file.read_text(encoding="utf-8"))]


def _claim(evidence: list[str], never: list[dict] = (), **texts) -> Claim:
    return Claim(**texts, evidence=tuple(evidence), never=tuple((one["pattern"], one["example"]) for one in never))


def choose(claims: Iterable[Claim], verdict: str = "", notebook: str = "", text: str = "") -> list[Claim]:
    """The claims with this verdict, with evidence in this notebook ("02"), with all these words; "" asks for nothing.

    Raises ValueError for a verdict that there is not.
    """
    if verdict and verdict not in VERDICTS:
        raise ValueError(f"got verdict={verdict!r}, wanted one of {list(VERDICTS)}")

    def fits(claim: Claim) -> bool:
        said = " ".join((claim.id, claim.claim, claim.correct, claim.source)).lower()
        shown = any(cell.startswith(notebook) for cell in claim.evidence)
        return verdict in ("", claim.verdict) and shown and all(word in said for word in text.lower().split())

    return [claim for claim in claims if fits(claim)]


def ledger() -> None:
    """Shows all claims, to be narrowed by verdict, notebook and words; folded by verdict where there is no kernel."""
    every = load()

    def listed(verdict: str, notebook: str, text: str) -> str:
        shown = choose(every, verdict, notebook, text)
        said = f'<p role="status" style="margin: 0.3em 0">{len(shown)} of {len(every)} claims</p>'
        return said + page.scrolled(_as_html(shown))

    notebooks = sorted({cell.partition("#")[0] for claim in every for cell in claim.evidence if "#" in cell})
    wide = {"width": "34em", "max_width": "98%"}
    verdicts = [(f"{name}, {says} ({len(choose(every, name))})", name) for name, says in VERDICTS.items()]
    controls = {
        "verdict": page.choice("verdict", "all verdicts", verdicts, layout=wide),
        "notebook": page.choice("shown in", "all notebooks", [(name, name) for name in notebooks], layout=wide),
        "text": ipywidgets.Text(placeholder="words, such as: memory", description="search", layout=wide),
    }
    folds = (page.fold(f"<b>{label}</b>", _as_html(choose(every, name))) for label, name in verdicts)
    live = page.narrowed(listed, **controls)
    display(page.view(live, "".join(folds), f"the claims ledger: {len(every)} claims"), raw=True)


def _as_html(claims: Iterable[Claim]) -> str:
    left = "text-align: left; vertical-align: top; white-space: normal; padding: 0.2em 0.8em 0.2em 0"
    columns = {"": "3em", "verdict": "6em", "the article": "30%", "what is true": "auto"}  # JupyterLab makes all equal
    heads = "".join(f'<th scope="col" style="{left}; width: {wide}">{name}</th>' for name, wide in columns.items())
    rows = []
    for claim in claims:
        shown = " · ".join([page.prose(claim.source), *map(page.link, claim.evidence)])
        bar = f"border-left: 4px solid {COLOURS[claim.verdict]}; padding-left: 0.6em"
        rows.append(
            f'<tr><th scope="row" style="{left}">{claim.id}</th><td style="{left}; {bar}">{claim.verdict}</td>'
            f'<td style="{left}">{page.prose(claim.claim)}</td>'
            f'<td style="{left}">{page.prose(claim.correct)}<br><small>{shown}</small></td></tr>'
        )
    return f'<table style="width: 100%"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
