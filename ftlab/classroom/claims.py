"""The claims ledger: what the article says, what is true, and the cell that shows it.

    claims.ledger()                            the table with a choice of verdict, of notebook, and a search field
    claims.table("WRONG", text="memory")       the same as a data frame
    claims.show("WRONG", "DATED")              the claims with these verdicts, as a page

Read from data/claims/claims.yaml, whose README gives the schema. Where there is no kernel the whole table is shown,
folded; every entry links to its cells.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import ipywidgets
import pandas as pd
from IPython.display import display

from ftlab.classroom import entries, page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.paths import DATA

FILE = DATA / "claims" / "claims.yaml"
VERDICTS = MappingProxyType(
    {
        "HOLDS": "true as it stands",
        "COND": "true under conditions, which are named",
        "WRONG": "false as it stands",
        "NOSRC": "no source exists for it",
        "DATED": "was true, is not in November 2026",
    }
)
COLOURS = {"HOLDS": CHOSEN, "COND": POLICY, "WRONG": REJECTED, "NOSRC": REFERENCE, "DATED": "#CC79A7"}
# notebook#cell, or a data file
EVIDENCE = re.compile(r"\d\d_\w+#[\w-]+|data/(?:\w[\w.-]*/)*\w[\w.-]*\.(?:jsonl?|md|yaml)")


class ClaimError(ValueError):
    """A ledger that cannot be used: says the entry, what was got and what was wanted."""


@dataclass(frozen=True)
class Claim:
    """One claim. `evidence`: cells as "02_lora_math#count", perhaps files as "data/results/ask.jsonl".

    `never`: (regular expression, a sentence it matches).

    No notebook may state what a `never` expression matches, except as the article's: tests/test_claims.py.
    """

    id: str
    claim: str
    verdict: str
    correct: str
    source: str
    evidence: tuple[str, ...]
    never: tuple[tuple[str, str], ...] = ()


def load(file: Path = FILE) -> list[Claim]:
    """All claims, in the order of the file.

    Raises ClaimError for an entry that does not follow the schema, and for an id that stands twice.
    """
    return entries.read(file, _claim, "claim", ClaimError)


def _claim(entry: object, where: str) -> Claim:
    def need(holds: bool, wanted: str) -> None:
        if not holds:
            raise ClaimError(f"{where}: wanted {wanted}")

    texts = ("id", "claim", "verdict", "correct", "source")
    need(isinstance(entry, dict), f"a mapping with {', '.join(texts)} and evidence, got {entry!r}")
    where = f"{where} ({entry.get('id')})"
    keys, got = {*texts, "evidence"}, sorted(map(str, entry))
    need(keys <= set(entry) <= keys | {"never"}, f"the keys {sorted(keys)}, perhaps never; got {got}")
    for key in texts:
        need(isinstance(entry[key], str) and bool(entry[key].strip()), f"text in {key}, got {entry[key]!r}")
    need(entry["verdict"] in VERDICTS, f"a verdict of {list(VERDICTS)}, got {entry['verdict']!r}")
    cells, patterns = entry["evidence"], entry.get("never", [])
    named = isinstance(cells, list) and all(isinstance(cell, str) and EVIDENCE.fullmatch(cell) for cell in cells)
    need(named, f"evidence as a list of cells like 02_lora_math#count or files of data/, got {cells!r}")
    both = {"pattern", "example"}
    shape = isinstance(patterns, list) and all(isinstance(one, dict) and set(one) == both for one in patterns)
    need(shape, f"never as a list of pattern and example, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern["pattern"])
        except (re.error, TypeError) as error:
            raise ClaimError(f"{where}: {pattern['pattern']!r} is no regular expression: {error}") from error
    never = tuple((pattern["pattern"], pattern["example"]) for pattern in patterns)
    return Claim(**{key: entry[key] for key in texts}, evidence=tuple(cells), never=never)


def _chosen(claims: Iterable[Claim], verdict: str | None, text: str | None, notebook: str | None) -> list[Claim]:
    """The claims with this verdict, with all these words in some of their texts, with evidence in this notebook."""
    words = (text or "").lower().split()

    def fits(claim: Claim) -> bool:
        said = " ".join((claim.id, claim.claim, claim.correct, claim.source)).lower()
        shown = not notebook or any(cell.startswith(notebook) for cell in claim.evidence)
        return verdict in (None, claim.verdict) and shown and all(word in said for word in words)

    return [claim for claim in claims if fits(claim)]


def table(verdict: str | None = None, text: str | None = None, notebook: str | None = None) -> pd.DataFrame:
    """One row a claim, by id: claim, verdict, correct, source, evidence.

    Only those with this verdict; only those in which all words of `text` stand, large or small; only those with
    evidence in this notebook, by the beginning of its name ("02").

    Raises ValueError for a verdict that there is not.
    """
    if verdict not in (None, *VERDICTS):
        raise ValueError(f"got verdict={verdict!r}, wanted one of {list(VERDICTS)}")
    rows = [asdict(claim) for claim in _chosen(load(), verdict, text, notebook)]
    frame = pd.DataFrame(rows, columns=["id", "claim", "verdict", "correct", "source", "evidence"]).set_index("id")
    return frame.assign(evidence=[", ".join(cells) for cells in frame["evidence"]])


# --- In the notebook --------------------------------------------------------------------------------------------------


def show(*verdicts: str) -> None:
    """Shows all claims with these verdicts. Raises ValueError for one that there is not."""
    if strangers := set(verdicts) - set(VERDICTS):
        raise ValueError(f"got {sorted(strangers)}, wanted some of {list(VERDICTS)}")
    display(page.bundle(_as_html(claim for claim in load() if claim.verdict in verdicts)), raw=True)


def ledger() -> "Ledger":
    """The table of all claims, to be narrowed by verdict, notebook and words. Without the controls: table(...)."""
    return Ledger()


class Ledger:
    """Made by `ledger`. Set `verdict`, `notebook` or `text` by hand or by `.value`; `shown` holds what is listed."""

    def __init__(self) -> None:
        self._claims = load()
        counts = {name: sum(claim.verdict == name for claim in self._claims) for name in VERDICTS}
        verdicts = [(f"{name}, {says} ({counts[name]})", name) for name, says in VERDICTS.items()]
        cells = [cell for claim in self._claims for cell in claim.evidence if "#" in cell]
        notebooks = sorted({cell.partition("#")[0] for cell in cells})
        wide = {"width": "34em", "max_width": "98%"}
        self.verdict = page.choice("verdict", "all verdicts", verdicts, layout=wide)
        self.notebook = page.choice("shown in", "all notebooks", [(name, name) for name in notebooks], layout=wide)
        self.text = ipywidgets.Text(placeholder="words, such as: memory", description="search", layout=wide)
        self._table = ipywidgets.Output()
        self._widget = ipywidgets.VBox([self.verdict, self.notebook, self.text, self._table])
        for control in (self.verdict, self.notebook, self.text):
            control.observe(self._draw, "value")
        self._draw()

    def _draw(self, _=None) -> None:
        self.shown = _chosen(self._claims, self.verdict.value or None, self.text.value, self.notebook.value)
        said = f'<p role="status" style="margin: 0.3em 0">{len(self.shown)} of {len(self._claims)} claims</p>'
        rows = f'<div style="max-height: 32em; overflow: auto" tabindex="0">{_as_html(self.shown)}</div>'
        page.fill(self._table, said + rows, f"{len(self.shown)} claims")

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live table and, where there is no kernel, all of it, folded by verdict."""
        parts = []
        for name, says in VERDICTS.items():
            claims = [claim for claim in self._claims if claim.verdict == name]
            head = f"<summary><b>{name}</b>, {says}: {len(claims)}</summary>"
            parts.append(f"<details>{head}{_as_html(claims)}</details>")
        plain = f"The claims ledger: {len(self._claims)} claims"
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": "".join(parts), "text/plain": plain}


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
