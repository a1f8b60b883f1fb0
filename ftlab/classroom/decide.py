"""Prompt, retrieve, fine-tune or align? Six questions, one answer, and the evidence for each of its reasons.

    decide("form", "neither", 1000, True, "too weak", 10_000)      a Decision; a notebook shows it as text
    decision_helper()                                              the same as a form

The article names five cases in which not to fine-tune. Here they are the checklist of every decision, and a model is
trained if all five pass. Two of them are numbers, and both come from data/results/why_fine_tune.json: how many examples
are enough (the article says 100), and after how many calls a shorter prompt has paid for labels and training.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import ipywidgets
import numpy as np

from ftlab.classroom import page, seeds
from ftlab.classroom.show import CHOSEN, POLICY
from ftlab.paths import DATA

TEST, PROMPT, RAG = "build a test first", "prompt", "RAG"
TUNE, TUNE_RAG, DPO = "fine-tune", "fine-tune + RAG", "DPO after SFT"

# Where a reason can be looked up: notebook#cell
MATRIX, SIZE, NOISE = "01_why_fine_tune#matrix", "01_why_fine_tune#data-size", "01_why_fine_tune#noise"
KNOWN, BREAK_EVEN = "01_why_fine_tune#known-unknown", "01_why_fine_tune#break-even"
DOMAIN, RETRIEVAL = "01_why_fine_tune#domain", "01_why_fine_tune#retrieval"
READING = "01_why_fine_tune#reading"
INTERVALS, FORGETTING = "05_practical_pipeline#interval", "05_practical_pipeline#forgetting"
OWN_REPLIES, SFT_ON_GOOD = "04_rlhf_vs_dpo#pairs", "04_rlhf_vs_dpo#gain"

PAYBACK_MONTHS = 6  # a shorter prompt has to earn its training within this time: tasks, prices and models change
LABEL_SECONDS, LABOUR = 60, 200  # assumed: a minute to write or check a label; a person costs 200 machines

QUESTIONS: Mapping[str, tuple[str, Mapping]] = MappingProxyType(
    {
        "changes": (
            "1. What must change?",
            {
                "facts": "what it knows: facts, prices, rules",
                "form": "the form of its answers: format, labels, style",
                "domain": "how it reads a field: its terms, its way to reason",
                "preference": "which of two possible answers it gives: tone, safety",
            },
        ),
        "moves": (
            "2. What changes often, or must be cited?",
            {
                "neither": "nothing",
                "facts": "the facts: they change, or sources must be cited",
                "task": "the task itself: other rules every few weeks",
            },
        ),
        "examples": (
            "3. How many examples do you have?",
            {n: f"{n:,}" for n in (0, 10, 30, 100, 300, 1000, 10_000)},
        ),
        "can_evaluate": (
            "4. Can you tell better from worse?",
            {True: "yes: a held-out test and a metric", False: "no, or only by impression"},
        ),
        "prompting": (
            "5. How good is your best prompt there?",
            {"unmeasured": "not measured yet", "enough": "good enough", "too weak": "not good enough"},
        ),
        "calls": (
            "6. How many calls a month?",
            {n: f"{n:,}" for n in (1000, 10_000, 100_000, 1_000_000, 10_000_000)},
        ),
    }
)


@dataclass(frozen=True)
class Measured:
    """What the rules take over from notebook 01: of one small model, one task and one machine, so measure yours."""

    enough_examples: int  # from here on training on n beats the best prompt made of n, by interval
    training_seconds: float  # of the run on so many examples
    saved_seconds: float  # a call that the trained model answers with its short prompt, against the best prompt

    @property
    def break_even_calls(self) -> int:
        """(training + labels) / saved a call, in seconds of this machine; a person's time counts LABOUR times."""
        labels = self.enough_examples * LABEL_SECONDS * LABOUR
        return round((self.training_seconds + labels) / self.saved_seconds)


@dataclass(frozen=True)
class Reason:
    """A sentence, and the evidence that bears on it: "notebook#cell", or the id of a claim."""

    text: str
    evidence: tuple[str, ...]

    def markdown(self) -> str:
        return f"{self.text} ({', '.join(map(page.markdown_link, self.evidence))})"


@dataclass(frozen=True)
class Check:
    """One of the article's five cases against fine-tuning, applied: passed if it does not speak against it here."""

    name: str
    passed: bool
    reason: Reason


@dataclass(frozen=True)
class Decision:
    """The answer, why, and the checklist "when NOT to fine-tune"; `str` and a notebook's output give all three."""

    answer: str
    reasons: tuple[Reason, ...]
    checklist: tuple[Check, ...]

    def __str__(self) -> str:
        reasons = [f"- {reason.markdown()}" for reason in self.reasons]
        checks = [
            f"- **{'pass' if check.passed else 'against'}**, {check.name}: {check.reason.markdown()}"
            for check in self.checklist
        ]
        failed = sum(not check.passed for check in self.checklist)
        verdict = f"{failed} of {len(checks)} speak against it" if failed else f"all {len(checks)} pass"
        return "\n".join(
            [f"**Decision: {self.answer}**", "", *reasons, "", f"When *not* to fine-tune: {verdict}.", "", *checks]
        )

    def _repr_markdown_(self) -> str:
        return str(self)


def measured(file: Path = DATA / "results" / "why_fine_tune.json") -> Measured:
    """What the results file says, of the tickets that are answered all right (`exact`), compared ticket by ticket.

    Training on n tickets is held against the best prompt that needs no more than n labelled ones: zero-shot, the first
    k as fixed examples, or the nearest 3 of n. Best on this very test, so the test favours the prompt. Raises
    ValueError if no n is ahead, or not faster too: then no rule can be read from the file.
    """
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    trained = {int(m[1]): run for name, run in runs.items() if (m := re.fullmatch(r"format, (\d+) tickets", name))}
    prompt = re.compile(r"format, (?:(\d+) shots|RAG of (\d+)|zero-shot)")
    prompted = [(int(m[1] or m[2] or 0), run) for name, run in runs.items() if (m := prompt.fullmatch(name))]
    found = None
    for n in sorted(trained, reverse=True):  # from the most down, as long as training is ahead
        best = max((run for labels, run in prompted if labels <= n), key=lambda run: sum(run["scores"]["exact"]))
        difference = np.subtract(trained[n]["scores"]["exact"], best["scores"]["exact"])
        if seeds.interval(difference[None])[1] <= 0:  # low end, paired, over the tickets
            break
        saved = (best["answer_seconds"] - trained[n]["answer_seconds"]) / len(best["scores"]["exact"])
        found = Measured(n, trained[n]["seconds"], saved)
    if found is None or found.saved_seconds <= 0:
        raise ValueError(f"{file.name}: got no number of examples that beats the best prompt in score and in time")
    return found


def decide(
    changes: str,
    moves: str,
    examples: int,
    can_evaluate: bool,
    prompting: str,
    calls: int,
    evidence: Measured | None = None,
) -> Decision:
    """What to do, by six answers: five of them as in QUESTIONS, and any whole number of examples and of calls a month.

    A model is trained if and only if all five checks pass; the answer then follows from what must change. Otherwise a
    missing test comes first, then facts (retrieval), then the prompt. `evidence` is `measured()` unless given.

    Raises ValueError for an answer that QUESTIONS does not have, or a number below 0.
    """
    given = {"changes": changes, "moves": moves, "can_evaluate": can_evaluate, "prompting": prompting}
    for name, value in given.items():
        if value not in (options := list(QUESTIONS[name][1])):
            raise ValueError(f"got {name}={value!r}, wanted one of {options}")
    for name, number in (("examples", examples), ("calls", calls)):
        if number < 0:
            raise ValueError(f"got {name}={number}, wanted a number from 0 on")
    evidence = evidence or measured()
    if not can_evaluate:
        prompting = "unmeasured"  # without a test it is an impression
    pays_back = calls * PAYBACK_MONTHS >= evidence.break_even_calls
    checks = (
        _facts(changes),
        _enough(examples, evidence.enough_examples),
        _still(moves),
        _test(can_evaluate),
        _insufficient(prompting, pays_back, evidence.break_even_calls),
    )
    if not can_evaluate:
        answer = TEST
    elif not all(check.passed for check in checks):
        needs_facts = moves == "facts" or (changes == "facts" and prompting != "enough")
        answer = RAG if needs_facts else PROMPT
    elif changes == "preference" and prompting == "too weak":
        answer = DPO
    else:
        answer = TUNE_RAG if moves == "facts" else TUNE
    return Decision(answer, _reasons(answer, changes, moves, examples, prompting, evidence), checks)


# --- Reasons ----------------------------------------------------------------------------------------------------------


def _reasons(
    answer: str, changes: str, moves: str, examples: int, prompting: str, evidence: Measured
) -> tuple[Reason, ...]:
    """What speaks for this answer, and what to do next; what speaks against training stands in the checklist."""
    if answer == TEST:
        return (
            Reason(
                "Write 100 to 150 cases by hand, with a labelling guideline, and choose a metric. Whatever comes next, "
                "prompt, retrieval or training, is chosen by it.",
                (INTERVALS, "C96"),
            ),
        )
    if answer == RAG:
        found = Reason(
            "Put the page that holds the fact into the prompt. Measure two things: is the right page found, and is it "
            "read correctly.",
            (MATRIX, RETRIEVAL, "C88"),
        )
        fresh = Reason(
            "A page that changes is new in the index at once, and the answer can name it as its source.",
            ("C91", "C102"),
        )
        reading = Reason(
            "If the page is found and not read, train the reading: questions with retrieved pages, and short answers. "
            "That is form, and it won here.",
            (READING, "C102"),
        )
        return (found, fresh, reading) if moves == "facts" else (found, reading)
    if answer == PROMPT:
        return (_prompt_first(examples, prompting, evidence),)
    reasons = [_for_training(answer, changes, prompting)]
    if answer == DPO:
        reasons.append(
            Reason(
                "Then the pairs have to beat SFT on good answers at equal cost, and a lower temperature, which costs "
                "nothing. Pairs of the model's own answers gained more in this course than pairs from a file.",
                (SFT_ON_GOOD, "C65"),
            )
        )
    if moves == "facts":
        reasons.append(
            Reason(
                "Leave the facts to retrieval, and train with retrieved pages in the prompts: both together are better "
                "than RAG alone where training taught to read, not where it taught the pages.",
                (READING, "C102"),
            )
        )
    reasons.append(
        Reason("Read the examples before you count them: wrong labels are learned too.", (NOISE, "C84", "C85"))
    )
    reasons.append(Reason("Ask the tuned model what it knew before: LoRA can forget, too.", (FORGETTING, KNOWN, "C29")))
    return tuple(reasons)


def _prompt_first(examples: int, prompting: str, evidence: Measured) -> Reason:
    if prompting == "unmeasured":
        text = "Measure the plain prompt and the best few-shot prompt on your test: every other way has to beat them."
        return Reason(text, (MATRIX, "C01"))
    if prompting == "enough":
        return Reason("The prompt passes your test. All that training could still win is a shorter one.", (BREAK_EVEN,))
    shown = "Put your best examples into the prompt" if examples else "Describe the task in the prompt"
    if examples < evidence.enough_examples:
        return Reason(
            f"{shown}, and collect more: what you label for the prompt can be trained on later.", (SIZE, "C90")
        )
    return Reason(f"{shown}; the day the rules change, change the text.", ("C91",))


def _for_training(answer: str, changes: str, prompting: str) -> Reason:
    if prompting == "enough":
        text = (
            "Let the long prompt that works answer your cases, and train on its answers with a short one: the same "
            "task for fewer tokens. If somebody else's model wrote them, read its terms first."
        )
        return Reason(text, (BREAK_EVEN, "C101", "C93"))
    if answer == DPO:
        text = (
            "SFT on the good answers comes first: DPO moves probability between answers that the model already gives."
        )
        return Reason(text, (OWN_REPLIES, "C62"))
    if changes == "domain":
        text = (
            "Train on worked examples of the field. Text alone (continued pre-training) lowers the perplexity, but "
            "takes a lot of text, and LoRA lags most behind full fine-tuning exactly there."
        )
        return Reason(text, (DOMAIN, "C103"))
    return Reason("Form is what training teaches, and what no prompt reached here.", (MATRIX, SIZE, "C89"))


# --- The article's five cases -----------------------------------------------------------------------------------------


def _facts(changes: str) -> Check:
    if changes == "facts":
        text = "Facts are missing. Training on pages put few of them into the model; a page in the prompt gave them."
    else:
        text = "It is not facts that are missing."
    return Check("facts", changes != "facts", Reason(text, (MATRIX, KNOWN, "C88")))


def _enough(examples: int, enough: int) -> Check:
    text = (
        f"You have {examples:,}; here training on n was ahead of the best prompt made of n, in whole answers, from "
        f"{enough:,} on, and undecided below. The article says 100."
    )
    return Check("too few examples", examples >= enough, Reason(text, (SIZE, "C90")))


def _still(moves: str) -> Check:
    if moves == "task":
        text = "Each new rule would need new labels, a new run and a new test. A prompt is changed in a minute."
    else:
        text = "The task stands still long enough for a training run."
    return Check("the task changes", moves != "task", Reason(text, ("C91",)))


def _test(can_evaluate: bool) -> Check:
    if can_evaluate:
        text = "A held-out test and a metric will say whether training helped, and what it cost elsewhere."
    else:
        text = "Without a held-out test nobody will know whether training helped."
    return Check("no evaluation", can_evaluate, Reason(text, (INTERVALS, "C96")))


def _insufficient(prompting: str, pays_back: bool, break_even: int) -> Check:
    name = "prompting is enough"
    if prompting == "too weak":
        return Check(name, True, Reason("The best prompt was measured, and is not good enough.", (MATRIX, "C01")))
    if prompting == "unmeasured":
        return Check(name, False, Reason("Nobody has measured the best prompt yet.", (MATRIX, "C01")))
    so_many = f"labels and training are paid for after {break_even:,} calls"
    if pays_back:
        text = f"The prompt is good enough, but long: {so_many}, within {PAYBACK_MONTHS} months at your traffic."
    else:
        text = f"The prompt is good enough: {so_many}, not within {PAYBACK_MONTHS} months at your traffic."
    return Check(name, pays_back, Reason(text, (BREAK_EVEN, "C101")))


# --- The form ---------------------------------------------------------------------------------------------------------


def decision_helper() -> "DecisionHelper":
    """The six questions as a form, answered for this course's triage task, and the decision, new with every change.

    Without the form: decide(...).
    """
    return DecisionHelper()


class DecisionHelper:
    """Made by `decision_helper`. Answer by hand or by `.fields[name].value`; `decision` is what is shown."""

    def __init__(self) -> None:
        triage = {"changes": "form", "moves": "neither", "examples": 1000, "can_evaluate": True,
                  "prompting": "too weak", "calls": 10_000}  # fmt: skip
        self._evidence = measured()
        self.fields = {
            name: ipywidgets.Dropdown(
                options=[(label, value) for value, label in options.items()],
                value=triage[name],
                description=question,
                style={"description_width": "23em"},
                layout={"width": "52em", "max_width": "98%"},
            )
            for name, (question, options) in QUESTIONS.items()
        }
        self._said = ipywidgets.Output(layout={"margin": "0.8em 0 0"})
        keys = ipywidgets.Label("With the keyboard: Tab to a question, Space to open it, arrows and Enter to choose.")
        self._widget = ipywidgets.VBox([keys, *self.fields.values(), self._said])
        for field in self.fields.values():
            field.observe(self._decide, "value")
        self._decide()

    def _decide(self, _=None) -> None:
        answers = {name: field.value for name, field in self.fields.items()}
        self.decision = decide(**answers, evidence=self._evidence)
        page.fill(self._said, _as_html(self.decision), str(self.decision))

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live form and, where there is no kernel, the questions, their answers as they stand, and the decision."""
        asked = "".join(
            f"<li>{question[3:]} <b>{options[self.fields[name].value]}</b></li>"
            for name, (question, options) in QUESTIONS.items()
        )
        return {
            **self._widget._repr_mimebundle_(**kwargs),
            "text/html": f"<ol>{asked}</ol>{_as_html(self.decision)}",
            "text/plain": str(self.decision),
        }


def _as_html(decision: Decision) -> str:
    """The decision beside a coloured rule; its first line is read aloud when it changes."""
    from nbconvert.filters import markdown2html

    colour = CHOSEN if decision.answer in (TUNE, TUNE_RAG, DPO) else POLICY
    html = markdown2html(str(decision)).replace("<p>", '<p role="status">', 1)
    return f'<div style="border-left: 4px solid {colour}; padding-left: 0.8em; line-height: 1.5">{html}</div>'
