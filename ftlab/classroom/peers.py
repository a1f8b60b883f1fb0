"""What other tools made of the same run: theirs and data/results/stack_peers.json as a picture, more as tables."""

import html

import pandas as pd
from IPython.display import HTML
from matplotlib.axes import Axes

from ftlab.classroom.show import CHOSEN, LIBRARY, POLICY, REFERENCE, REJECTED

LOOKS = {  # colour and size of the dots
    "unsloth": (CHOSEN, 9), "llamafactory": (LIBRARY, 6), "axolotl": (REJECTED, 3), "trl sft": (REJECTED, 5),
}  # fmt: skip


def _off(loss: list[float], wanted: list[float]) -> list[float]:
    """Relative difference of each step's loss."""
    return [abs(a - b) / b for a, b in zip(loss, wanted, strict=True)]


def _losses(results: dict) -> dict[tuple[str, str, str], list[float]]:
    return {(run["method"], run["tool"], run["variant"]): run["loss"] for run in results["runs"]}


def plot_losses(left: Axes, right: Axes, results: dict) -> None:
    """Left the losses of the SFT run by step, TRL as a line and each tool as dots; right how far each is from TRL."""
    losses = {key[1:]: loss for key, loss in _losses(results).items() if key[0] == "sft"}
    wanted = losses.pop(("trl", ""))
    steps = range(1, len(wanted) + 1)
    left.plot(steps, wanted, color=POLICY, label="trl")
    for (tool, variant), loss in losses.items():
        colour, size = LOOKS[tool]
        name = f"{tool}, {variant}" if variant else tool
        if not variant:
            left.plot(steps, loss, "o", color=colour, markersize=size, label=tool)
        far = [max(each, 1e-8) for each in _off(loss, wanted)]
        right.semilogy(steps, far, "o-", color=REFERENCE if variant else colour, markersize=4, linewidth=1, label=name)
    left.set(xlabel="step", ylabel="loss (nats/token)")
    right.set(xlabel="step", ylabel="relative difference to TRL")
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def agreement(results: dict) -> pd.DataFrame:
    """A row a tool: the largest relative difference of a loss to TRL's, rows with the template's ids and labels."""
    losses, table = _losses(results), {}
    for (method, tool, variant), loss in losses.items():
        row = table.setdefault(f"{tool}, {variant}" if variant else tool, {})
        row[f"{method}: largest difference"] = f"{max(_off(loss, losses[method, 'trl', ''])):.0e}"
    for each in results["tokens"]:
        table[each["tool"]][f"{each['method']}: same ids and mask"] = f"{each['equal']} of {each['rows']} rows"
    versions = results["environment"]["versions"]
    for name, row in table.items():
        row["transformers"] = versions.get(name.split(",")[0], versions["trl"])["transformers"]
    return pd.DataFrame(table).T.drop("trl").fillna("")


def speed(results: dict) -> pd.DataFrame:
    """A row an engine: tokens a processor second, how many times TRL's, peak MB, largest difference of a loss to TRL's.

    Medians over the repetitions; the losses of the longest run.
    """
    runs = pd.DataFrame(results["runs"])
    steps = runs["loss"].map(len)
    runs["tokens/s"] = runs["tokens"] / steps / runs["step_cpu_seconds"].map(lambda each: sum(each) / len(each))
    table = runs.groupby("name")[["tokens/s", "peak_mb"]].median()
    table["times TRL"] = (table["tokens/s"] / table.loc["TRL", "tokens/s"]).round(2)
    table[["tokens/s", "peak_mb"]] = table[["tokens/s", "peak_mb"]].round().astype(int)
    first = runs[runs["repetition"] == 0].set_index("name")["loss"]
    table["largest difference"] = [
        f"{max(abs(a - b) for a, b in zip(first[name], first['TRL'], strict=True)):.0e}" for name in table.index
    ]
    return table.rename_axis(None)


def tools(title: str, rows: list[dict], columns: list[str], folded: bool = False) -> HTML:
    """Rows of data/stack/tools.yaml as a table under a title; folded: behind a click."""
    look = "text-align:left;vertical-align:top;font-size:85%;white-space:normal"
    lines = [["tool", *columns], *([row[name] for name in ("tool", *columns)] for row in rows)]
    parts = [
        "<tr>"
        + "".join(f'<td style="{look}">{_bold(cell, i == 0 or j == 0)}</td>' for j, cell in enumerate(line))
        + "</tr>"
        for i, line in enumerate(lines)
    ]
    table = f"<table>{''.join(parts)}</table>"
    return _folded(f"<b>{title}</b>", table) if folded else HTML(f"<b>{title}</b>{table}")


def folded(title: str, text: str) -> HTML:
    """A text behind a click on its title."""
    return _folded(html.escape(title), f"<pre>{html.escape(text)}</pre>")


def _folded(title: str, page: str) -> HTML:
    return HTML(f"<details><summary>{title}</summary>{page}</details>")


def _bold(text: str, bold: bool) -> str:
    return f"<b>{html.escape(text)}</b>" if bold else html.escape(text)
