"""Writes the lab report of every experiment from its records: experiments/NAME/report.md.

    python experiments/report.py              all of them
    python experiments/report.py alignment    only those that are named
    python experiments/report.py --broken     each sentence on a record that is broken on each set

A report holds the question, the arms, the seeds, what it cost, every metric on every held-out set
with its 95 % interval over seeds and questions, a picture, the sentences that lessons quote from
it, what was published for larger models, the limits, and the command. Nothing in it is typed: the
words come from statements.yaml, the numbers from records.jsonl, the figures of others from
data/published.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import lab
from experiments.lab import Experiment, Interval
from experiments.memory_peaks import run as memory_peaks
from experiments.runs import NOT_RECORDED, told
from ftlab import statistics
from ftlab.paths import EXPERIMENTS
from tools import published

INK, BLUE, GREY, EDGE, CARD = "#222222", "#0072B2", "#7F7F7F", "#D9D9D4", "#FAFAF7"


def table(heads: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A table in Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def shown(one: Interval | None, digits: int, sign: bool = False) -> str:
    return "not measured" if one is None else one.shown(digits, sign)


def starred(one: Interval | None, digits: int) -> str:
    """A difference; in bold where its interval excludes zero."""
    text = shown(one, digits, sign=True)
    decided = one is not None and (one.low > 0 or one.high < 0)
    return f"**{text}**" if decided else text


def seeds_of(experiment: Experiment, arm: str) -> str:
    runs = experiment.runs(arm)
    if experiment.arms[arm].fixed:
        return "one, as it is"
    return f"{len(runs)} ({', '.join(str(run.get('seed', 'not recorded')) for run in runs)})"


# --- The parts of a report ------------------------------------------------------------------------


def in_short(experiment: Experiment) -> str:
    """The statements that answer the question; an undecided one says so in its first word."""
    lines = []
    for id in experiment.about.get("main", []):
        statement = experiment.statements[id]
        open_ = all(check.predicate == "not told apart" for check in statement.checks)
        lines.append(f"- {'**Undecided.** ' if open_ else ''}{statement.says}")
    return "\n".join(lines)


def arms(experiment: Experiment) -> str:
    settings = experiment.about.get("settings", [])
    rows = []
    for id, arm in experiment.arms.items():
        first = experiment.runs(id)[0]
        values = [_setting(lab.at(first, key)) for key in settings]
        chosen = arm.chosen or told(first, "chosen")
        rows.append([f"**{id}**", arm.what, *values, seeds_of(experiment, id), chosen])
    return table(["method", "what it is", *settings, "seeds", "how its settings were chosen"], rows)


def _setting(value) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def search(experiment: Experiment) -> str:
    """What the search for each setting found, if the records hold one: a table each."""
    hows = experiment.about.get("search", [])
    hows = hows if isinstance(hows, list) else [hows]
    tables = [_searched(experiment, how) for how in hows]
    return "\n\n".join(["### The search", *tables]) if tables else ""


def _searched(experiment: Experiment, how: dict) -> str:
    """What was tried for each group, and its value: the mean where several seeds ran."""
    groups = {}
    for run in experiment.records:
        value = lab.at(run, how["value"])
        if not lab.matches(run, how["where"]) or value is None:
            continue
        name = ", ".join(_setting(lab.at(run, key)) for key in how["group"])
        tried = groups.setdefault(name, {})
        tried.setdefault(lab.at(run, how["by"]), []).append(value)
    rows = []
    for name, tried in groups.items():
        values = (f"{by:g}: {fmean(found):.3f}" for by, found in sorted(tried.items()))
        rows.append([name, "; ".join(values)])
    heads = [", ".join(how["group"]), f"{how['by']}: {how['what']}"]
    return table(heads, rows)


def cost(experiment: Experiment) -> str:
    runs = experiment.lines
    rows = [["records", len(runs)], ["cost", hours(experiment)]]
    for what in ("processor", "dtype", "versions"):
        values = {_words(told(run, what)) for run in runs}
        rows.append([what, "; ".join(sorted(values))])
    text = table(["", ""], [*rows, ["questions", questions(experiment)]])
    if NOT_RECORDED not in hours(experiment):
        text += "\n\nThe hours are what the records hold; whether measuring counts, run.py says."
    return text


def hours(experiment: Experiment) -> str:
    """CPU-hours of all runs, and of how many of them the records hold any.

    Where records share a training, measures.py counts it once: `cpu_seconds(lines)`.
    """
    if shared := experiment.functions.get("cpu_seconds"):
        return f"{shared(experiment.lines) / 3600:.1f} CPU-hours"
    seconds = [told(run, "cpu_seconds") for run in experiment.lines]
    known = [one for one in seconds if isinstance(one, int | float)]
    if not known:
        return f"CPU-hours: {NOT_RECORDED}"
    some = f" in the {len(known)} records that hold them" if len(known) < len(seconds) else ""
    return f"{sum(known) / 3600:.1f} CPU-hours{some}"


def questions(experiment: Experiment) -> str:
    """Whose values the lists of the records are: in the record, else in experiments/ids.json."""
    inside = {_words(told(run, "questions")) for run in experiment.lines} - {NOT_RECORDED}
    known = json.loads((EXPERIMENTS / "ids.json").read_text("utf-8"))["records"]
    places = known.get(f"{experiment.name}/records.jsonl", {}).values()
    lists = {
        one for place in places for one in (place.values() if isinstance(place, dict) else [place])
    }
    return "; ".join(sorted(inside | lists)) or NOT_RECORDED


def _words(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in sorted(value.items()))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def results(experiment: Experiment) -> str:
    """Each metric: every arm on every set, and its paired difference from the baseline."""
    parts = []
    for id, metric in experiment.metrics.items():
        heads = ["method", *(f"{set_}" for set_ in metric.sets)]
        rows = [
            [arm, *(shown(experiment.level(id, arm, set_), metric.digits) for set_ in metric.sets)]
            for arm in experiment.arms
        ]
        rows = [row for row in rows if set(row[1:]) != {"not measured"}]
        parts += [f"### {id}", "", metric.what, "", table(heads, rows), ""]
        base = experiment.about.get("baseline")
        if base:
            parts += gaps(experiment, id, base)
    return "\n".join(parts).rstrip()


def gaps(experiment: Experiment, metric: str, base: str) -> list[str]:
    told_of = experiment.metrics[metric]
    rows = []
    for arm in experiment.arms:
        if arm == base:
            continue
        found = [_gap(experiment, metric, arm, base, set_) for set_ in told_of.sets]
        if any(one is not None for one in found):
            rows.append([arm, *(starred(one, told_of.digits) for one in found)])
    if not rows:
        return []
    heads = [f"difference from {base}", *told_of.sets]
    return [table(heads, rows), "", "Bold: the 95 % interval excludes zero.", ""]


def _gap(experiment: Experiment, metric: str, arm: str, base: str, set_: str) -> Interval | None:
    ours, theirs = (experiment.scores(metric, one, set_) for one in (arm, base))
    comparable = ours is not None and theirs is not None
    if not comparable or ours.values.shape[1] != theirs.values.shape[1]:
        return None
    if not lab.common_seeds(ours, theirs):
        return None
    return experiment.difference(metric, arm, base, set_)


def sentences(experiment: Experiment) -> str:
    rows = []
    for statement in experiment.statements.values():
        for verdict in experiment.verdicts(statement):
            digits = experiment.metrics[verdict.check.metric].digits
            level = verdict.check.predicate in lab.LEVELS
            interval = verdict.interval.shown(digits, sign=not level)
            rows.append([statement.id, str(verdict.check), verdict.set, interval])
    said = [
        f"- `{one.id}` {one.says}"
        + (f" ({', '.join(map(_place, one.quoted))})" if one.quoted else "")
        for one in experiment.statements.values()
    ]
    return "\n".join([*said, "", table(["statement", "check", "set", "interval"], rows)])


def _place(quoted: str) -> str:
    """A link to where a sentence is quoted; a notebook opens at its cell."""
    file, _, part = quoted.partition("#")
    place = f"{file}#cell-id={part}" if part and file.endswith(".ipynb") else file
    return f"[{Path(file).name}{f', {part}' if part else ''}](../../{place})"


def limits(experiment: Experiment) -> str:
    lines = list(experiment.about.get("limits", []))
    trained = [arm for arm in experiment.arms if not experiment.arms[arm].fixed]
    counts = {arm: len(experiment.runs(arm)) for arm in trained}
    few = sorted({n for n in counts.values() if n < statistics.FEW})
    for n in few:
        who = ", ".join(arm for arm in trained if counts[arm] == n)
        seeds = f"{n} seed{'s' if n > 1 else ''}"
        lines.append(f"{seeds}: too few for a claim about the method ({who}).")
    for what in ("versions", "processor", "dtype", "cpu_seconds", "chosen"):
        missing = sum(told(run, what) == NOT_RECORDED for run in experiment.lines)
        if missing:
            lines.append(
                f"`{what}` is not recorded in {missing} of {len(experiment.lines)} records."
            )
    return "\n".join(f"- {line}" for line in lines)


# --- The picture ----------------------------------------------------------------------------------

# In pixels, with letters of 15: a phone shows it at two thirds, and it can still be read.
WIDTH, ROW, EDGES, LETTER, TITLE, HEAD, AXIS = 520, 26, 16, 8.2, 22, 34, 44


def picture(experiment: Experiment, metric: str) -> str:
    """SVG: the arms' means and intervals, a panel for each held-out set, one below the other."""
    told_of = experiment.metrics[metric]
    found = {
        set_: {arm: experiment.level(metric, arm, set_) for arm in experiment.arms}
        for set_ in told_of.sets
    }
    spans = [one for levels in found.values() for one in levels.values() if one is not None]
    bounds = [v for one in spans for v in (one.mean, one.low, one.high) if abs(v) < float("inf")]
    ticks = _ticks(min(bounds), max(bounds))
    title = textwrap.wrap(told_of.what, 48)
    top, panels = EDGES + TITLE * len(title), []
    for set_, levels in found.items():
        shown_ = {arm: one for arm, one in levels.items() if one is not None}
        panels += _panel(shown_, ticks, top, set_, experiment)
        top += HEAD + ROW * len(shown_) + AXIS
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" '
        f'height="{top}" font-family="system-ui, sans-serif" font-size="15" fill="{INK}" '
        f'role="img" aria-label="{escape(experiment.title)}: {escape(told_of.what)}">',
        f'<rect width="{WIDTH}" height="{top}" rx="8" fill="{CARD}"/>',
    ]
    for i, line in enumerate(title, 1):
        at = f'x="{EDGES}" y="{i * TITLE + 6}"'
        parts.append(f'<text {at} font-weight="600">{escape(line)}</text>')
    return "\n".join([*parts, *panels, "</svg>", ""])


def _panel(
    levels: dict[str, Interval], ticks: list, top: int, set_: str, experiment: Experiment
) -> list[str]:
    """The axis of one held-out set, and a name and a dot with its interval for each arm."""
    low, high = ticks[0], ticks[-1]
    longest = max(map(len, experiment.arms))
    left, right = min(EDGES + LETTER * longest + 12, WIDTH / 2), WIDTH - EDGES
    first = top + HEAD
    bottom = first + ROW * len(levels)

    def x(value: float) -> str:
        return f"{left + (right - left) * (min(max(value, low), high) - low) / (high - low):.1f}"

    parts = [f'<text x="{left:.1f}" y="{top + 22}">{escape(set_)}</text>']
    anchors = ["start", *["middle"] * (len(ticks) - 2), "end"]
    for tick, anchor in zip(ticks, anchors, strict=True):
        at = x(tick)
        parts.append(f'<line x1="{at}" x2="{at}" y1="{first}" y2="{bottom}" stroke="{EDGE}"/>')
        where = f'x="{at}" y="{bottom + 20}" text-anchor="{anchor}"'
        parts.append(f'<text {where} font-size="13">{tick:g}</text>')
    for i, (arm, one) in enumerate(levels.items()):
        y = first + ROW * i + ROW / 2
        where = f'x="{left - 12:.1f}" y="{y + 5:.0f}" text-anchor="end"'
        name = textwrap.shorten(arm, 28, placeholder=" …")
        parts.append(f"<text {where}>{escape(name)}</text>")
        grey = experiment.arms[arm].fixed or arm == experiment.about.get("baseline")
        parts += _dot(one, x, y, GREY if grey else BLUE)
    return parts


def _dot(one: Interval, x: Callable, y: float, colour: str) -> list[str]:
    parts = [f'<circle cx="{x(one.mean)}" cy="{y}" r="4.5" fill="{colour}"/>']
    if abs(one.low) < float("inf"):
        ends = f'x1="{x(one.low)}" x2="{x(one.high)}" y1="{y}" y2="{y}"'
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="2"/>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose both."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    for exponent in range(-6, 9):
        for step in (1, 2, 5):
            step *= 10.0**exponent
            first, last = int(low // step), -int(-high // step)
            if last - first <= 5:
                return [round(i * step, 9) for i in range(first, last + 1)]
    return [low, high]


# --- The whole ------------------------------------------------------------------------------------


def report(experiment: Experiment) -> str:
    about, name = experiment.about, experiment.name
    sets = "\n".join(f"- **{id}**: {what}" for id, what in experiment.sets.items())
    parts = [f"# {experiment.title}", experiment.question]
    if about.get("main"):
        parts += [in_short(experiment)]
    for metric in pictures(experiment):
        alt = experiment.metrics[metric].what
        parts += [f"![{alt}: means and 95 % intervals, by method]({metric}.svg)"]
    parts += ["## Methods", arms(experiment)]
    if about.get("choice"):
        parts += [about["choice"].strip()]
    parts += [
        search(experiment),
        "## Cost",
        cost(experiment),
        "## Results",
        sets,
        results(experiment),
    ]
    if experiment.statements:
        parts += ["## What is said of it", sentences(experiment)]
    if about.get("published"):
        parts += ["## On a real model", published.box(about["published"])]
    parts += ["## Limits", limits(experiment) or "- none noted"]
    command = about.get("cost") or f"python experiments/{name}/run.py"
    again = (
        "run.py runs what records.jsonl lacks, with the versions that are installed; those of the "
        "records stand above. To make all anew, begin without records.jsonl."
    )
    parts += ["## Again", f"```\n{command}\npython experiments/report.py {name}\n```", again]
    note = (
        "*Made from [records.jsonl](records.jsonl) and [statements.yaml](statements.yaml) by "
        "`experiments/report.py`. Intervals: 95 %, over seeds and questions where the records hold "
        "a value a question, else over seeds; of a single run over its questions "
        "([how](../README.md)). They are not corrected for how many there are, so read one that "
        "just excludes zero as a lead.*"
    )
    return "\n\n".join([*(part for part in parts if part), note, ""]).rstrip("\n") + "\n"


def pictures(experiment: Experiment) -> list[str]:
    """The metrics that are drawn: those that statements.yaml names, else the first."""
    return experiment.about.get("pictures", list(experiment.metrics)[:1])


def files(experiment: Experiment) -> dict[str, str]:
    """{name of a file in the experiment's folder: what it holds}."""
    drawn = {f"{metric}.svg": picture(experiment, metric) for metric in pictures(experiment)}
    return {"report.md": report(experiment), **drawn}


# --- All experiments ------------------------------------------------------------------------------

START, END = "<!-- made by report.py -->", "<!-- end -->"


def overview(experiments: list[Experiment]) -> str:
    """Every experiment with its records, seeds, cost and processor: a table in Markdown."""
    rows = []
    for one in experiments:
        counts = {len(one.runs(id)) for id, arm in one.arms.items() if not arm.fixed}
        seeds = " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "-"
        machines = {_words(told(run, "processor")) for run in one.lines}
        name = f"[{one.name}]({one.name}/report.md)"
        rows.append(
            [name, one.title, len(one.lines), seeds, hours(one), "; ".join(sorted(machines))]
        )
    return table(["", "question", "records", "seeds", "cost", "processor"], rows)


def readme(experiments: list[Experiment]) -> str:
    """experiments/README.md with the table as it is now."""
    text = (EXPERIMENTS / "README.md").read_text("utf-8")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{overview(experiments)}\n{END}{rest.partition(END)[2]}"


def broken(experiments: list[Experiment]) -> Iterator[str]:
    """A line for each check on each held-out set: as recorded, and on a record broken there."""
    for one in experiments:
        for statement in one.statements.values():
            for verdict in one.verdicts(statement):
                after = one.broken(verdict.check, verdict.set)
                held = f"{'holds' if verdict.holds else 'FAILS'} {verdict.interval.shown()}"
                then = f"broken: {'HOLDS' if after.holds else 'fails'} {after.interval.shown()}"
                name = f"{one.name}#{statement.id}"
                yield f"{name} | {verdict.check} | {verdict.set} | {held} | {then}"


def main(names: list[str]) -> None:
    if names == ["--broken"]:
        print("\n".join(broken([lab.load(name) for name in lab.names()])))
        return
    for name in names or lab.names():
        experiment = lab.load(name)
        for file, text in files(experiment).items():
            (EXPERIMENTS / name / file).write_text(text, "utf-8")
        print(f"experiments/{name}/report.md: {len(experiment.lines)} records")
    if not names:
        memory_peaks.main()  # of what others measured: it has a table of its own
        every = readme([lab.load(name) for name in lab.names()])
        (EXPERIMENTS / "README.md").write_text(every, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
