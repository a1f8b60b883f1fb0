"""The claims ledger: what the article says, what is true, and the cell that shows it.

Read from data/claims/claims.yaml; its README has the schema, to which tests/test_claims.py holds it.
"""

from types import SimpleNamespace

from ftlab.classroom import page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.paths import DATA

VERDICTS = {  # what it means, and the colour of its bar
    "HOLDS": ("true as it stands", CHOSEN),
    "COND": ("true under conditions, which are named", POLICY),
    "WRONG": ("false as it stands", REJECTED),
    "NOSRC": ("no source exists for it", REFERENCE),
    "DATED": ("was true, is not in November 2026", "#CC79A7"),
}


def load() -> list[SimpleNamespace]:
    """All claims, in the order of the file; each has the schema's keys, `never` too."""
    return [SimpleNamespace(**{"never": [], **entry}) for entry in page.read(DATA / "claims" / "claims.yaml")]


def ledger() -> page.Live:
    """All claims by verdict, to be narrowed by words, also those of their verdict and of their cells."""
    said = "{0.id} {0.verdict} {0.claim} {0.correct} {0.source} {0.evidence}".format
    return page.browse(load(), "claims", lambda claim: f"{claim.verdict}, {VERDICTS[claim.verdict][0]}", said, _as_html)


def _as_html(claim: SimpleNamespace) -> str:
    bar = f"border-left: 4px solid {VERDICTS[claim.verdict][1]}; padding-left: 0.6em; margin: 0.8em 0"
    sources = " · ".join([page.prose(claim.source), *map(page.link, claim.evidence)])
    head = f"<b>{claim.id}</b> The article: {page.prose(claim.claim)}"
    true = f"<b>{claim.verdict}.</b> {page.prose(claim.correct)}"
    return f'<div style="{bar}">{head}<br>{true}<br><small>{sources}</small></div>'
