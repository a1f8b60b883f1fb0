"""In which part a wrong query is wrong: one letter a question.

| letter | the answer |
|---|---|
| r | is right |
| n | is no query: it does not begin with SELECT |
| x | does not run |
| s | selects another column or measure; all else is as in the gold query |
| m | lacks a condition |
| e | has a condition too many |
| v | has the right columns in its conditions, and another value or comparison |
| w | has a condition on another column |
| g | groups by something else, or not at all |
| o | orders or limits otherwise |
| 2 | differs in two clauses or more |
| u | has no clause that differs, or is not of the form that the house writes |

A clause is what stands between SELECT, WHERE, GROUP BY, ORDER BY and LIMIT; the last two count as
one. The order of conditions does not count.
"""

import re

LETTERS = "rnxsmevwgo2u"
FORM = re.compile(
    r"SELECT (?P<select>.+?) FROM orders(?: WHERE (?P<where>.+?))?(?: GROUP BY (?P<group>.+?))?"
    r"(?P<order>(?: ORDER BY .+?)?(?: LIMIT \d+)?)",
    re.IGNORECASE,
)
FOREIGN = re.compile(r"\b(?:select|having|union|join|group by|order by|limit)\b", re.IGNORECASE)


def kind(answer: str, gold: str) -> str:
    """The first letter that fits an answer."""
    from ftlab.tasks import ask

    if ask.is_right(answer, gold):
        return "r"
    if not answer.lstrip().upper().startswith("SELECT"):
        return "n"
    return differing(answer, gold) if ask.runs(answer) else "x"


def differing(answer: str, gold: str) -> str:
    """In which clause a query differs from the gold one; both run."""
    got, want = clauses(answer), clauses(gold)
    if not got or not want:
        return "u"
    apart = [name for name in want if got[name] != want[name]]
    if len(apart) > 1:
        return "2"
    if not apart:
        return "u"
    if apart == ["where"]:
        return of_conditions(got["where"], want["where"])
    return {"select": "s", "group": "g", "order": "o"}[apart[0]]


def clauses(query: str) -> dict | None:
    """{select, where, group, order} of a query, compared as they are; None if it has another form.

    Blanks, capitals outside quotes and a final semicolon do not count. `where`: a frozenset.
    """
    found = FORM.fullmatch(plain(query))
    if not found or any(FOREIGN.search(found[name] or "") for name in ("select", "where", "group")):
        return None
    conditions = re.split(r" AND ", found["where"] or "", flags=re.IGNORECASE)
    parts = {name: (found[name] or "").strip() for name in ("select", "group", "order")}
    return parts | {"where": frozenset(filter(None, conditions))}


def plain(query: str) -> str:
    """One blank for any, none round an operator or bracket, small letters outside quotes."""
    text = " ".join(query.strip().rstrip(";").split())
    pieces = re.split(r"('[^']*')", text)
    for i in range(0, len(pieces), 2):
        small = re.sub(r"\s*(<>|!=|<=|>=|[=<>,()])\s*", r"\1", pieces[i].lower())
        small = re.sub(r"\)(?=[a-z])", ") ", small)  # "count(*) from"
        pieces[i] = small.replace("!=", "<>").replace(" from orders", " FROM orders")
    return "".join(pieces).strip()


def of_conditions(got: frozenset, want: frozenset) -> str:
    """Which letter two different sets of conditions are."""
    columns = [sorted(re.match(r"\w*", one)[0] for one in part) for part in (got, want)]
    if columns[0] == columns[1]:
        return "v"
    if got < want:
        return "m"
    return "e" if got > want else "w"
