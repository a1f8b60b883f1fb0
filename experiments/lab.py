"""What the records of an experiment say: arms, metrics on every held-out set, sentences.

`experiments/NAME/statements.yaml` names them (experiments/README.md tells its keys). The reports
print them (experiments/report.py), and tests/test_statements.py evaluates every sentence:

    lab = experiments.lab.load("alignment")
    lab.level("sampled", "dpo", "test")               # mean (low to high) over seeds x questions
    lab.difference("sampled", "dpo", "start", "test")   # paired by seed and by question
    lab.verdicts(lab.statements["dpo-start"])         # one a check and held-out set
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ftlab import statistics
from ftlab.paths import EXPERIMENTS

PREDICATES = ("greater", "less", "not told apart", "within margin", "at least", "at most")
LEVELS = PREDICATES[-2:]  # of one arm against a number; the others compare two arms


class RecordError(ValueError):
    """statements.yaml, or a record, does not hold what it should: the message says where."""


# --- Values out of records ------------------------------------------------------------------------


def at(record: dict, path: str) -> Any:
    """The value at a path: `hand.sampled`, `checkpoints[-1].kl`, `said[:77]`; None if absent.

    A slice of a list is a list. `[*]` is every element: `rounds[*].loss` is a list.
    """
    return _walk(record, re.findall(r"[^.\[\]]+|\[[^\]]*\]", path))


def _walk(value: Any, steps: list[str]) -> Any:
    for i, step in enumerate(steps):
        if value is None:
            return None
        if step == "[*]":
            return [_walk(one, steps[i + 1 :]) for one in value]
        if step.startswith("["):
            value = _element(value, step[1:-1])
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def _element(value: list, index: str) -> Any:
    if ":" in index:
        first, last = (int(part) if part else None for part in index.split(":"))
        return value[first:last]
    position = int(index)
    return value[position] if -len(value) <= position < len(value) else None


def matches(record: dict, where: dict) -> bool:
    """Whether a record has these values; a list in `where` names several that will do."""
    for key, wanted in where.items():
        found = at(record, key)
        if isinstance(wanted, list) and not isinstance(found, list):
            if found not in wanted:
                return False
        elif found != wanted:
            return False
    return True


@dataclass(frozen=True)
class Scores:
    """What an arm scored on a held-out set: values (S seeds, n questions); n = 1: a number a run.

    fixed: nothing was trained and nothing drawn, so that the one row stands for any seed.
    """

    seeds: tuple
    values: np.ndarray
    fixed: bool = False

    def of(self, seeds: tuple) -> np.ndarray:
        """(S, n): the rows of these seeds, in this order."""
        if self.fixed:
            return np.repeat(self.values[:1], len(seeds), axis=0)
        return self.values[[self.seeds.index(seed) for seed in seeds]]


@dataclass(frozen=True)
class Interval:
    """Mean and 95 % bounds over seeds and questions, and how many of each there were."""

    mean: float
    low: float
    high: float
    seeds: int
    questions: int
    fixed: bool = False  # no arm was trained: the number of seeds says nothing

    def shown(self, digits: int = 3, sign: bool = False) -> str:
        """ "0.512 (0.480 to 0.544)". One or two values, and equal ones, are named: no bounds."""
        plus = "+" if sign else ""
        mean, low, high = (f"{one:{plus}.{digits}f}" for one in (self.mean, self.low, self.high))
        if not np.isfinite(self.low):
            return f"{mean} (one value)"
        if self.questions == 1 and self.low == self.high:
            return f"{mean} (the same in {self.seeds} runs)"
        if self.questions == 1 and self.seeds == 2:
            return f"{mean} (two values)"
        return f"{mean} ({low} to {high})"


# --- What statements.yaml says --------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A method or setting: `where` picks its records, one a seed."""

    id: str
    what: str
    where: dict
    chosen: str = ""
    fixed: bool = False
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number for each question or for each run: `sets` gives its place in a record for each set.

    unit: "score" is from 0 to 1 and has intervals that stay there; anything else is shown as it is.
    per: what the values are divided by (8 where a record counts the right ones of 8 answers).
    """

    id: str
    what: str
    sets: dict[str, str]
    unit: str = "score"
    per: float = 1
    better: str = "higher"
    digits: int = 3


@dataclass(frozen=True)
class Check:
    """A predicate on a metric: of two arms (left - right), or of one arm against `value`."""

    metric: str
    left: str
    predicate: str
    sets: tuple[str, ...]
    right: str | None = None
    value: float | None = None  # the level of "at least", "at most"; the margin of "within margin"

    def holds(self, interval: Interval) -> bool:
        low, high = interval.low, interval.high
        if not np.isfinite(low):
            return False  # one value decides nothing, not even that two cannot be told apart
        return {
            "greater": low > 0,
            "less": high < 0,
            "not told apart": low <= 0 <= high,
            "within margin": -(self.value or 0) < low and high < (self.value or 0),
            "at least": low >= (self.value or 0),
            "at most": high <= (self.value or 0),
        }[self.predicate]

    def __str__(self) -> str:
        if self.predicate in LEVELS:
            return f"{self.metric}: {self.left} is {self.predicate} {self.value:g}"
        margin = f" {self.value:g}" if self.predicate == "within margin" else ""
        than = {"greater": "greater than", "less": "less than"}
        middle = than.get(self.predicate, f"{self.predicate}{margin} from")
        return f"{self.metric}: {self.left} {middle} {self.right}"


@dataclass(frozen=True)
class Statement:
    """A sentence that reports a measurement, where it is quoted, and the checks that bind it."""

    id: str
    says: str
    checks: tuple[Check, ...]
    quoted: tuple[str, ...] = ()  # notebooks/NAME.ipynb#cell, data/cards/FILE.yaml, README.md


@dataclass(frozen=True)
class Verdict:
    """A check on one held-out set: its interval, and whether the predicate holds."""

    check: Check
    set: str
    interval: Interval
    holds: bool


@dataclass(frozen=True)
class Experiment:
    """Records and what is said of them. Methods raise RecordError for names that are not there."""

    name: str
    title: str
    question: str
    sets: dict[str, str]
    arms: dict[str, Arm]
    metrics: dict[str, Metric]
    statements: dict[str, Statement]
    records: list[dict]
    about: dict = field(default_factory=dict)  # the other keys: limits, choice, published, ...
    moved: dict = field(default_factory=dict)  # {(metric, arm, set): change of its values}
    functions: dict[str, Callable] = field(default_factory=dict)  # of measures.py
    lines: list[dict] = field(default_factory=list)  # the file, before `records` of measures.py

    @cached_property
    def _picked(self) -> dict[str, list[dict]]:
        return {id: self._records_of(arm) for id, arm in self.arms.items()}

    def _records_of(self, arm: Arm) -> list[dict]:
        found = [record for record in self.records if matches(record, arm.where)]
        if not found:
            raise RecordError(f"{self.name}: no record has {arm.where} (arm {arm.id})")
        seeds = [record.get("seed", 0) for record in found]
        if len(set(seeds)) < len(seeds):
            twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
            raise RecordError(
                f"{self.name}: arm {arm.id} has seeds {twice} more than once: {arm.where}"
            )
        return sorted(found, key=lambda record: record.get("seed", 0))

    def runs(self, arm: str) -> list[dict]:
        """The records of an arm, by seed."""
        if arm not in self.arms:
            raise RecordError(f"{self.name} has no arm {arm!r}, it has {', '.join(self.arms)}")
        return self._picked[arm]

    def scores(self, metric: str, arm: str, set_: str) -> Scores | None:
        """What an arm scored on a set; None if its records do not hold that."""
        if metric not in self.metrics:
            known = ", ".join(self.metrics)
            raise RecordError(f"{self.name} has no metric {metric!r}, it has {known}")
        told = self.metrics[metric]
        if set_ not in told.sets:
            return None
        runs = self.runs(arm)
        found = [self._value(told.sets[set_], record) for record in runs]
        held = [
            (run.get("seed", 0), one)
            for run, one in zip(runs, found, strict=True)
            if one is not None
        ]
        if not held:
            return None
        rows = [np.atleast_1d(np.array(one, dtype=float)) for _, one in held]
        if len({len(row) for row in rows}) > 1:
            lengths = [len(row) for row in rows]
            raise RecordError(f"{self.name}: {arm} has {lengths} values of {metric} on {set_}")
        values = np.stack(rows) / told.per
        values = values + self.moved.get((metric, arm, set_), 0.0)
        return Scores(tuple(seed for seed, _ in held), values, self.arms[arm].fixed)

    def _value(self, path: str, record: dict) -> Any:
        """`path` is a place in the record, or the name of a function in measures.py."""
        if path.endswith("()"):
            if path[:-2] not in self.functions:
                raise RecordError(f"{self.name}: measures.py has no function {path}")
            return self.functions[path[:-2]](record, self)
        return at(record, path)

    def level(self, metric: str, arm: str, set_: str) -> Interval | None:
        """The arm's mean on a set, over seeds and questions."""
        scores = self.scores(metric, arm, set_)
        if scores is None:
            return None
        return self._interval(metric, scores.values, scores.fixed, paired=False)

    def difference(self, metric: str, left: str, right: str, set_: str) -> Interval | None:
        """left - right on a set, paired by question, and by seed where both arms have seeds.

        Only seeds that both have count. Raises RecordError if there is none, or if the two were not
        asked the same number of questions.
        """
        ours, theirs = self.scores(metric, left, set_), self.scores(metric, right, set_)
        if ours is None or theirs is None:
            return None
        if ours.values.shape[1] != theirs.values.shape[1]:
            got = f"{ours.values.shape[1]} and {theirs.values.shape[1]}"
            raise RecordError(
                f"{self.name}: {left} and {right} have {got} values of {metric} on {set_}"
            )
        seeds = common_seeds(ours, theirs)
        if not seeds:
            raise RecordError(
                f"{self.name}: {left} and {right} share no seed: {ours.seeds}, {theirs.seeds}"
            )
        gaps = ours.of(seeds) - theirs.of(seeds)
        return self._interval(metric, gaps, ours.fixed and theirs.fixed, paired=True)

    def _interval(self, metric: str, values: np.ndarray, fixed: bool, paired: bool) -> Interval:
        seeds, questions = values.shape
        scored = self.metrics[metric].unit == "score" and questions > 1
        if scored and not self.moved:
            how = statistics.paired_interval if paired else statistics.level_interval
        else:
            how = statistics.crossed_interval
        mean, low, high = map(float, how(values))
        if self.metrics[metric].unit == "score" and not self.moved and np.isfinite(low):
            least = -1.0 if paired else 0.0
            low, high = max(low, least), min(high, 1.0)
        return Interval(mean, low, high, seeds, questions, fixed)

    def interval(self, check: Check, set_: str) -> Interval:
        """The interval that decides a check on a set; a RecordError if there are no values."""
        if check.predicate in LEVELS:
            found = self.level(check.metric, check.left, set_)
        else:
            found = self.difference(check.metric, check.left, check.right, set_)
        if found is None:
            raise RecordError(f"{self.name}: no values for {check} on {set_}")
        return found

    def verdicts(self, statement: Statement) -> list[Verdict]:
        """One for each check on each held-out set that it covers."""
        return [
            Verdict(check, set_, interval, check.holds(interval))
            for check in statement.checks
            for set_ in check.sets
            for interval in [self.interval(check, set_)]
        ]

    def broken(self, check: Check, set_: str) -> Verdict:
        """The check on a record that was broken on this set, so that it must fail.

        Directed predicates: the arms are swapped. "not told apart", "within margin": the left arm
        is shifted past its interval, or past the margin. Levels: past the level.
        """
        before = self.interval(check, set_)
        if check.predicate in ("greater", "less"):
            lab, changed = self, replace(check, left=check.right, right=check.left)
        else:
            key = (check.metric, check.left, set_)
            by = _far(check, before)
            lab, changed = replace(self, moved={**self.moved, key: by}), check
        interval = lab.interval(changed, set_)
        return Verdict(check, set_, interval, check.holds(interval))


def common_seeds(ours: Scores, theirs: Scores) -> tuple:
    """The seeds that both arms have; those of the other one where nothing was trained for one."""
    if ours.fixed and theirs.fixed:
        return (0,)
    if ours.fixed or theirs.fixed:
        return theirs.seeds if ours.fixed else ours.seeds
    return tuple(seed for seed in ours.seeds if seed in theirs.seeds)


def _far(check: Check, interval: Interval) -> float:
    """How far the left arm has to move for the check to fail: past its interval and its bound."""
    width = interval.high - interval.low
    bound = check.value or 0.0
    if check.predicate == "at least":
        return bound - interval.high - width - 1e-6
    if check.predicate == "at most":
        return bound - interval.low + width + 1e-6
    return bound + 2 * width + abs(interval.mean) + 1e-6


# --- Reading --------------------------------------------------------------------------------------

KEYS = {"title", "question", "sets", "arms", "metrics", "statements", "main", "baseline"}
MORE = {"limits", "choice", "published", "search", "lesson", "cost", "settings", "pictures", "drop"}


def names(folder: Path = EXPERIMENTS) -> list[str]:
    """Every experiment with sentences: reports and tests are of these."""
    return sorted(name for name, told in _told(folder).items() if told.get("statements"))


def under_way(folder: Path = EXPERIMENTS) -> list[str]:
    """Every experiment without sentences: its last seed is missing, and nobody looks before."""
    return sorted(name for name, told in _told(folder).items() if not told.get("statements"))


def _told(folder: Path) -> dict[str, dict]:
    """{name: what its statements.yaml holds} of every experiment that has one."""
    files = folder.glob("*/statements.yaml")
    return {file.parent.name: yaml.safe_load(file.read_text("utf-8")) for file in files}


def read_records(file: Path) -> list[dict]:
    """The lines of a records.jsonl, one record each.

    Raises RecordError if there is no such file.
    """
    if not file.is_file():
        got = f"{file.parent.name}: no records yet, {file} is not there"
        raise RecordError(f"{got}; run python experiments/{file.parent.name}/run.py")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def load(name: str, folder: Path = EXPERIMENTS) -> Experiment:
    """An experiment, checked: an unknown key, arm, metric or set is a RecordError that names it."""
    here = folder / name
    told = yaml.safe_load((here / "statements.yaml").read_text("utf-8"))
    if unknown := told.keys() - KEYS - MORE:
        raise RecordError(
            f"{name}/statements.yaml: unknown keys {sorted(unknown)}, known {sorted(KEYS | MORE)}"
        )
    if missing := {"title", "question", "sets", "arms", "metrics"} - told.keys():
        raise RecordError(f"{name}/statements.yaml lacks {sorted(missing)}")
    functions = _functions(here / "measures.py")
    lines = records = read_records(here / "records.jsonl")
    if "records" in functions:
        records = functions.pop("records")(lines)
    arms = {id: _arm(name, id, one) for id, one in told["arms"].items()}
    metrics = {id: _metric(name, id, one, told["sets"]) for id, one in told["metrics"].items()}
    statements = {}
    for one in told.get("statements") or []:
        if one.get("id") in statements:
            raise RecordError(f"{name}: two statements have the id {one['id']}")
        statements[one["id"]] = _statement(name, one, arms, metrics)
    about = {key: told[key] for key in MORE | {"main", "baseline"} if key in told}
    for id in about.get("main", []):
        if id not in statements:
            raise RecordError(f"{name}: main names {id}, which is no statement")
    title, question, sets = told["title"], told["question"].strip(), told["sets"]
    said = (name, title, question, sets, arms, metrics, statements)
    return Experiment(*said, records, about, functions=functions, lines=lines)


def _functions(file: Path) -> dict[str, Callable]:
    if not file.is_file():
        return {}
    spec = importlib.util.spec_from_file_location(f"measures_of_{file.parent.name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = vars(module).items()
    return {name: one for name, one in found if callable(one) and one.__module__ == module.__name__}


def _only(name: str, what: str, told: dict, known: set[str], needed: set[str]) -> None:
    if unknown := told.keys() - known:
        raise RecordError(
            f"{name}: {what} has unknown keys {sorted(unknown)}, known are {sorted(known)}"
        )
    if missing := needed - told.keys():
        raise RecordError(f"{name}: {what} lacks {sorted(missing)}")


def _arm(name: str, id: str, told: dict) -> Arm:
    _only(
        name, f"arm {id}", told, {"what", "where", "chosen", "fixed", "settings"}, {"what", "where"}
    )
    return Arm(id, **told)


def _metric(name: str, id: str, told: dict, sets: dict) -> Metric:
    known = {"what", "sets", "unit", "per", "better", "digits"}
    _only(name, f"metric {id}", told, known, {"what", "sets"})
    if unknown := told["sets"].keys() - sets.keys():
        raise RecordError(
            f"{name}: metric {id} has sets {sorted(unknown)}, the experiment has {list(sets)}"
        )
    if told.get("better", "higher") not in ("higher", "lower", "neither"):
        raise RecordError(
            f"{name}: metric {id}: better is higher, lower or neither, not {told['better']!r}"
        )
    return Metric(id, **told)


def _statement(name: str, told: dict, arms: dict, metrics: dict) -> Statement:
    _only(
        name,
        f"statement {told.get('id')}",
        told,
        {"id", "says", "checks", "in"},
        {"id", "says", "checks"},
    )
    checks = tuple(
        check for one in told["checks"] for check in _checks(name, told["id"], one, arms, metrics)
    )
    says = " ".join(told["says"].split())
    return Statement(told["id"], says, checks, tuple(told.get("in", ())))


def _checks(name: str, id: str, told: dict, arms: dict, metrics: dict) -> Iterator[Check]:
    known = {"metric", "left", "right", "is", "sets", "value"}
    _only(name, f"a check of {id}", told, known, {"metric", "left", "is"})
    predicate, metric = told["is"], told["metric"]
    if predicate not in PREDICATES:
        raise RecordError(f"{name}: {id} is {predicate!r}, wanted one of {PREDICATES}")
    if metric not in metrics:
        raise RecordError(f"{name}: {id} has the metric {metric!r}, known are {list(metrics)}")
    if (told.get("right") is None) != (predicate in LEVELS):
        raise RecordError(
            f"{name}: {id}: {predicate!r} wants {'no' if predicate in LEVELS else 'a'} right arm"
        )
    if (told.get("value") is None) != (predicate not in (*LEVELS, "within margin")):
        raise RecordError(
            f"{name}: {id}: a value goes with levels and margins, not with {predicate!r}"
        )
    sets = tuple(told.get("sets") or metrics[metric].sets)
    if unknown := set(sets) - metrics[metric].sets.keys():
        raise RecordError(f"{name}: {id}: {metric} is not measured on {sorted(unknown)}")
    for key in ("left", "right"):
        for arm in _listed(told.get(key)):
            if arm not in arms:
                raise RecordError(f"{name}: {id} names the arm {arm!r}, known are {list(arms)}")
    for left in _listed(told["left"]):
        for right in _listed(told.get("right")) or [None]:
            yield Check(metric, left, predicate, sets, right, told.get("value"))


def _listed(one: Any) -> list:
    """A name or a list of names: a sentence on several arms has a check for each pair."""
    return [] if one is None else one if isinstance(one, list) else [one]


# --- The words of a sentence ----------------------------------------------------------------------

WORDS = ("no", "one", "two", "three", "four", "five")
NUMBER = re.compile(r"(?<![\w.=-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?%)?(?!\w|\.\d)")


def seeds_said(says: str, seeds: int) -> bool:
    """Whether a sentence names this number of seeds, runs or draws: "five seeds", "3 runs each"."""
    number = f"(?:{seeds}|{WORDS[seeds]})" if seeds < len(WORDS) else str(seeds)
    return bool(
        re.search(rf"\b{number}\b(?:\s+[\w-]+){{0,3}}?\s+(?:seeds?|runs?|draws?)\b", says, re.I)
    )


def few(lab: Experiment, statement: Statement) -> list[int]:
    """The numbers of seeds below six that its checks rest on: the sentence has to name each."""
    intervals = [verdict.interval for verdict in lab.verdicts(statement)]
    counted = {one.seeds for one in intervals if not one.fixed}
    return sorted(seeds for seeds in counted if seeds < statistics.FEW)


def unsupported(lab: Experiment, statement: Statement) -> list[str]:
    """The numbers of a sentence that none of its checks gives, when rounded as they are written.

    A check gives the levels of its arms, their difference and ratio, the bounds, its value, and how
    many seeds and questions there were. Whole numbers below 13 and numbers that the descriptions of
    its arms, metrics and sets hold need no check.
    """
    given, words = [], [lab.question, *lab.sets.values()]
    for check in statement.checks:
        words.append(lab.metrics[check.metric].what)
        words += [f"{arm} {lab.arms[arm].what}" for arm in (check.left, check.right) if arm]
        for set_ in check.sets:
            given += _given(lab, check, set_)
    known = {found.replace(" ", "") for text in words for found in NUMBER.findall(text)}
    return [one for one in NUMBER.findall(statement.says) if not _is_given(one, given, known)]


def _given(lab: Experiment, check: Check, set_: str) -> list[float]:
    arms = [arm for arm in (check.left, check.right) if arm]
    levels = [lab.level(check.metric, arm, set_) for arm in arms]
    found = [lab.interval(check, set_), *levels]
    numbers = [check.value] if check.value is not None else []
    for one in found:
        numbers += [one.mean, one.low, one.high, one.seeds, one.questions]
    if len(levels) == 2 and levels[0].mean and levels[1].mean:
        ratio = levels[0].mean / levels[1].mean
        numbers += [ratio, 1 / ratio, ratio - 1, 1 - ratio, 1 / ratio - 1]
    return numbers


def _is_given(text: str, given: list[float], known: set[str]) -> bool:
    plain = text.replace(" ", "")
    if plain in known:
        return True
    percent = plain.endswith("%")
    digits = plain.rstrip("%").replace(",", "")
    decimals = len(digits.partition(".")[2])
    number = abs(float(digits))
    if not percent and decimals == 0 and number < 13:
        return True
    scale = (100,) if percent else (1, 100)  # 0.12 may be told as 12 points
    return any(round(abs(one) * by, decimals) == number for one in given for by in scale)
