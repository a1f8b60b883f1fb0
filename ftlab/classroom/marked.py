"""Replies to tickets as a table, the sentences that cost something marked: notebooks 04 and 06."""

import html
from collections.abc import Mapping, Sequence

import pandas as pd
from IPython.display import HTML

from ftlab.tasks import replies


def replies_page(rows: Sequence[dict], columns: Mapping[str, Sequence[str]]) -> HTML:
    """The replies of each column to the first rows, as many as there are; rows as `replies.as_pair` makes them.

    Under each reply stand its gold and what it lacks.
    """
    first = [row for row, *_ in zip(rows, *columns.values(), strict=False)]
    table = {"ticket": [html.escape(row["prompt"][-1]["content"]).replace("\n", "<br>") for row in first]}
    for name, said in columns.items():
        table[name] = [_marked(reply, row["ticket_label"]) for reply, row in zip(said, first, strict=False)]
    left = pd.DataFrame(table).map("<div style='text-align:left'>{}</div>".format)
    with pd.option_context("display.max_colwidth", None):
        return HTML(left.to_html(escape=False, index=False, justify="left"))


def _marked(reply: str, label: dict) -> str:
    """The reply in HTML; a sentence without which the reply would be worth more is marked."""
    sentences, whole, shown = replies.sentences(reply), replies.gold_reward(reply, label), []
    for i, sentence in enumerate(sentences):
        without = replies.gold_reward(" ".join(sentences[:i] + sentences[i + 1 :]), label)
        shown.append(("<mark>{}</mark>" if without > whole else "{}").format(html.escape(sentence)))
    lacks = ", ".join(name for name, good in replies.score(reply, label).items() if not good)
    return f"{' '.join(shown)}<br><b>{whole:.2f}</b>{lacks and f', lacks {lacks}'}"
