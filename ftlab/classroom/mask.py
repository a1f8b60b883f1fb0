"""Which tokens count in the loss? A row through a chat template, each token coloured by the mask, and what is wrong.

    view(data, row, tokenizer, "one token late")               a View; a notebook shows it in colour
    mask_viewer(data, rows, tokenizers, templates)             the same with menus, and a field for messages of your own

`data` is the module ftlab.pipeline.data, handed in because this room does not import that one.
"""

import copy
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import ipywidgets

from ftlab.classroom.show import REJECTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = list[int]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class _Parts:
    """What masks are made of, each (T,): all answers with their ends, the last one only, and what ends a turn."""

    answers: Mask
    last: Mask
    special: Mask  # tokens that are markers and no text, such as the end of turn


LOSSES: Mapping[str, tuple[Callable[[_Parts], Mask], str]] = MappingProxyType(
    {
        "every answer": (
            lambda parts: parts.answers,
            "Each answer and its end of turn: what a chat model should learn.",
        ),
        "the last answer": (
            lambda parts: parts.last,
            "Completion only. The same where a row holds one answer; in a conversation the earlier ones teach nothing.",
        ),
        "everything": (
            lambda parts: [1] * len(parts.answers),
            "The model also learns to write the customer's part, and most of the loss may be that.",
        ),
        "from the first answer on": (
            lambda parts: [int(any(parts.answers[: t + 1])) for t in range(len(parts.answers))],
            "What a collator does that looks for the first answer and for no end: later questions are learned too.",
        ),
        "without the end of turn": (
            lambda parts: [bit & (1 - marker) for bit, marker in zip(parts.answers, parts.special, strict=True)],
            "The model never learns to stop. This is what pad = eos does where padding is found by its id.",
        ),
        "one token late": (
            lambda parts: [0, *parts.answers[:-1]],
            "A mask that was not shifted when the labels were: how an answer begins is not learned.",
        ),
        "one token early": (
            lambda parts: [*parts.answers[1:], 0],
            "A mask that was shifted twice: an answer's last token is lost; in many templates it is the end.",
        ),
    }
)


@dataclass(frozen=True, repr=False)
class View:
    """A row as the model sees it; `mask` is 1 where a token counts, `answers` where it belongs to an answer.

    faults: (what, why) of the row, the template and the tokenizer; empty if all is well. loss and note: the name of
    the mask, and what it does.
    """

    text: str
    tokens: list[str]
    input_ids: list[int]
    mask: Mask
    answers: Mask
    faults: tuple[tuple[str, str], ...]
    loss: str
    note: str

    @property
    def trained(self) -> int:
        """How many tokens count in the loss."""
        return sum(self.mask)

    def __repr__(self) -> str:
        return f"{self.trained} of {len(self.mask)} tokens count: {self.loss}"

    def _repr_html_(self) -> str:
        return self.page()

    def page(self, ids: bool = False) -> str:
        """HTML: the faults, the counts, the coloured tokens with their ids on hover (or below them), and the text."""
        kinds = [(bit, answer) for bit, answer in zip(self.mask, self.answers, strict=True)]
        legend = " ".join(
            _chip(kind, f"{kinds.count(kind)} {name}") for kind, (name, _, _) in _KINDS.items() if kind in kinds
        )
        spans = "".join(
            _chip(kind, token, id, ids) for kind, token, id in zip(kinds, self.tokens, self.input_ids, strict=True)
        )
        box = f"border-left: 4px solid {REJECTED}; padding-left: 0.8em; margin: 0.4em 0"
        faults = "".join(
            f'<p style="{box}"><b>{html.escape(what)}</b><br>{html.escape(why)}</p>' for what, why in self.faults
        )
        share = self.trained / max(len(self.mask), 1)
        return (
            '<div style="line-height: 1.5; max-width: 60em">'
            f'<p role="status"><b>{self}</b> ({share:.0%}). '
            f"{self.note}</p>{faults}<p>{legend}</p>"
            f'<p style="font-family: monospace; white-space: pre-wrap; line-height: 1.8">{spans}</p>'
            f"<details><summary>The text, {len(self.text)} characters</summary>"
            f'<pre style="white-space: pre-wrap">{html.escape(self.text)}</pre></details></div>'
        )


# (counts, belongs to an answer) -> what it is called, the tag that says so where styles are lost, the style
_KINDS = {
    (0, 0): ("only read", "span", "background: #e4e4e4"),
    (1, 1): ("of an answer, counting", "mark", "background: #9fe0cd"),
    (1, 0): ("of no answer, and counting", "ins", "background: #f9c08f; text-decoration: underline"),
    (0, 1): ("of an answer, left out", "del", "background: #fff; text-decoration: none; outline: 1px dashed #b35900"),
}


def _chip(kind: tuple[int, int], token: str, id: int | None = None, with_id: bool = False) -> str:
    name, tag, style = _KINDS[kind]
    shown = html.escape(token).replace("\n", "↵")
    hover = "" if id is None else f' title="id {id}: {name}"'
    below = f'<sub style="font-size: 0.7em">{id}</sub>' if with_id else ""
    chip = f'<{tag} style="{style}; color: #111; padding: 1px 1px; margin-right: 1px"{hover}>{shown}{below}</{tag}>'
    return chip + "<br>" * (id is not None and "\n" in token)


def view(
    data: ModuleType, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", loss: str = "every answer"
) -> View:
    """The row through the tokenizer's chat template with one of LOSSES as its mask, and every fault that `data` finds.

    Where no mask is right, since the prompt is not the beginning of the whole, nothing counts and `note` says so.
    Raises ValueError for a name that LOSSES does not have.
    """
    if loss not in LOSSES:
        raise ValueError(f"got loss={loss!r}, wanted one of {', '.join(LOSSES)}")
    messages = [message for part in data.to_messages(row) for message in part]
    faults = []
    if fault := data.row_fault({"messages": messages}, "chat"):
        cause, _, detail = fault.partition(": ")
        faults.append((cause, detail))
    faults += [
        (found.cause, f"{found.seen}; {found.why}. Remedy: {found.fix}.") for found in data.check_template(tokenizer)
    ]
    try:
        rendered = data.render({"messages": messages}, tokenizer)
        text, tokens, ids, last = rendered.text, rendered.tokens, rendered.input_ids, rendered.completion_mask
        answers = _answers(data, messages, tokenizer, ids)
    except ValueError as error:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens, none = [tokenizer.decode([i]) for i in ids], [0] * len(ids)
        return View(
            text, tokens, ids, none, none, tuple(faults), "no mask is right", f"{error}".partition(": ")[0] + "."
        )
    if answers is None:
        why = "earlier turns are written differently once the conversation goes on: make a row of each answer"
        faults.append(("only the last answer can be trained on", why))
        answers = last
    markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    choose, note = LOSSES[loss]
    mask = choose(_Parts(answers, last, [int(i in markers) for i in ids]))
    return View(text, tokens, ids, mask, answers, tuple(faults), loss, note)


def _answers(
    data: ModuleType, messages: Messages, tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]
) -> Mask | None:
    """1 on every answer and its end: each is the completion of the conversation up to it; None if that is no prefix."""
    mask = [0] * len(ids)
    for k in (k for k, message in enumerate(messages) if message["role"] == "assistant"):
        part = data.render({"messages": messages[: k + 1]}, tokenizer)
        if part.input_ids != ids[: len(part.input_ids)]:
            return None
        mask = [a | b for a, b in zip(mask, part.completion_mask + [0] * len(ids), strict=False)]
    return mask


# --- With menus -------------------------------------------------------------------------------------------------------


def as_text(messages: Messages) -> str:
    """The messages as one text to edit: "role: content", each from a new line on."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def from_text(text: str) -> Messages:
    """The messages of such a text. Raises ValueError if it does not begin with a role."""
    before, *parts = re.split(r"^(system|user|assistant): ?", f"{text}\n", flags=re.MULTILINE)
    if before.strip() or not parts:
        raise ValueError('wanted each message to begin with "system: ", "user: " or "assistant: " on a new line')
    return [
        {"role": role, "content": said.removesuffix("\n")} for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def mask_viewer(
    data: ModuleType,
    rows: Mapping[str, dict[str, Any]],
    tokenizers: Mapping[str, "PreTrainedTokenizerBase"],
    templates: Mapping[str, str],
) -> "MaskViewer":
    """Menus over rows, templates (Jinja), tokenizers and LOSSES, and a field in which the messages can be changed.

    Without the menus: view(data, row, tokenizer, loss).
    """
    return MaskViewer(data, rows, tokenizers, templates)


class MaskViewer:
    """Made by `mask_viewer`. Set a control by hand or by `.value`; `view` is what is shown."""

    def __init__(self, data: ModuleType, rows: Mapping, tokenizers: Mapping, templates: Mapping) -> None:
        self._data, self._rows, self._tokenizers, self._templates = data, rows, tokenizers, templates

        def menu(name: str, options: Mapping) -> ipywidgets.Dropdown:
            return ipywidgets.Dropdown(options=list(options), description=name, layout={"width": "24em"})

        self.row, self.template = menu("row", rows), menu("template", templates)
        self.tokenizer, self.loss = menu("tokenizer", tokenizers), menu("in the loss", LOSSES)
        self.messages = ipywidgets.Textarea(
            description="messages", rows=6, layout={"width": "98%", "max_width": "60em"}
        )
        self.ids = ipywidgets.Checkbox(False, description="ids below the tokens", indent=False)
        self._said = ipywidgets.HTML()
        keys = ipywidgets.Label("With the keyboard: Tab to a menu, Space to open it, arrows and Enter to choose.")
        line = {"flex_flow": "row wrap"}
        self._widget = ipywidgets.VBox(
            [
                keys,
                ipywidgets.HBox([self.row, self.loss], layout=line),
                ipywidgets.HBox([self.template, self.tokenizer], layout=line),
                self.messages,
                self.ids,
                self._said,
            ]
        )
        self.row.observe(self._take_row, "value")
        for control in (self.template, self.tokenizer, self.loss, self.messages, self.ids):
            control.observe(self._draw, "value")
        self._take_row()

    def _take_row(self, _=None) -> None:
        prompt, completion = self._data.to_messages(self._rows[self.row.value])
        self.messages.value = as_text([*prompt, *completion])  # and draws

    def _draw(self, _=None) -> None:
        tokenizer = copy.copy(self._tokenizers[self.tokenizer.value])  # a shallow one: the vocabulary is not copied
        tokenizer.chat_template = self._templates[self.template.value]
        try:
            row = {"messages": from_text(self.messages.value)}
            self.view = view(self._data, row, tokenizer, self.loss.value)
        except ValueError as error:  # of a text that is being typed
            self._said.value = f'<p role="status"><b>Not yet a conversation:</b> {html.escape(str(error))}</p>'
        else:
            self._said.value = self.view.page(self.ids.value)

    def _repr_mimebundle_(self, **kwargs) -> dict[str, Any]:
        """The live widget and, where there is no kernel, what it shows."""
        chosen = f"{self.row.value} · template {self.template.value} · tokenizer {self.tokenizer.value}"
        return {
            **self._widget._repr_mimebundle_(**kwargs),
            "text/html": f"<p>{html.escape(chosen)}</p>{self._said.value}",
            "text/plain": f"{chosen} · {self.loss.value}",
        }
