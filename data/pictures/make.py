"""The drawings of the notebooks, as SVG written by a few small functions.

    python data/pictures/make.py      rewrites every *.svg in this folder (a moment; standard library only)

Every function returns SVG text, a drawing is a list of such texts, and DRAWINGS names them all: a new drawing is a
function and a line there. One line width, one set of letters, one meaning per colour (the colours of
ftlab/classroom/show.py). A drawing stands on an opaque card of its own, so the page around it may be light or dark.

A text that does not fit the room given for it raises ValueError: shorten it, break the line, or make the box larger.
Widths come from a table of DejaVu Sans, which is wider than the system letters of Windows, macOS and Android.
"""

from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

FOLDER = Path(__file__).parent

POLICY, REFERENCE, CHOSEN, REJECTED, LIBRARY = "#0072B2", "#7F7F7F", "#009E73", "#D55E00", "#000000"
INK, CARD, WHITE, EDGE = "#222222", "#FAFAF7", "#FFFFFF", "#D9D9D4"
PALE = {POLICY: "#E3F0F8", REFERENCE: "#EFEFED", CHOSEN: "#E2F4EE", REJECTED: "#FBEBE0", INK: WHITE}

WIDTH = 860
LINE = 1.8  # every line of every drawing, in pixels at WIDTH
SMALL, TEXT, BIG = 14, 15, 18  # sizes of letters
LARGE = 19  # of drawings with few words, to be read on a phone
PAD = 8  # between a box and its text
EM = [("iljI.,:;'|!· ", 0.34), ('ftr()[]-"', 0.43), ("cs", 0.56), ("mMwW%@→…=+", 0.99)]  # all others: 0.71 or 0.63
LETTERS = "system-ui, sans-serif"
MONO = "ui-monospace, monospace"


def text_width(text: str, size: float, bold: bool = False, mono: bool = False) -> float:
    """Width of one line in pixels: 0.61 em a letter in monospace, else by classes of letters (EM); bold is 1/8 more."""
    if mono:
        return 0.61 * size * len(text)
    em = sum(next((wide for letters, wide in EM if c in letters), 0.71 if c.isupper() else 0.63) for c in text)
    return em * size * (1.125 if bold else 1)


def label(
    x: float,
    y: float,
    text: str,
    room: float,
    size: int = TEXT,
    colour: str = INK,
    anchor: str = "middle",
    bold: bool = False,
    mono: bool = False,
) -> str:
    """Lines of text, the first one's baseline at y; x is their start, middle or end, as `anchor` says.

    Raises ValueError if a line is wider than `room` pixels.
    """
    lines = text.split("\n")
    for line in lines:
        if (wide := text_width(line, size, bold, mono)) > room:
            raise ValueError(
                f"{line!r} takes about {wide:.0f} px, its room is {room:.0f}: shorten it or break the line"
            )
    look = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    look += ' font-weight="bold"' if bold else ""
    look += f' font-family="{MONO}"' if mono else ""
    return "\n".join(
        f'<text x="{x:g}" y="{y + i * leading(size):g}" {look} xml:space="preserve">{escape(line, quote=False)}</text>'
        for i, line in enumerate(lines)
    )


def leading(size: int) -> int:
    """Distance of two lines of text in pixels."""
    return round(1.35 * size)


def box(
    x: float,
    y: float,
    w: float,
    h: float,
    text: str = "",
    colour: str = INK,
    fill: str = WHITE,
    dashed: bool = False,
    **look: object,
) -> str:
    """A rounded box with its text in the middle; `look` goes to `label`. Raises ValueError if the text does not fit."""
    frame = f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" fill="{fill}" stroke="{colour}" '
    frame += f"{stroke(dashed)}/>"
    if not text:
        return frame
    size, lines = look.get("size", TEXT), text.count("\n") + 1
    if (high := lines * leading(size)) > h:
        raise ValueError(f"{lines} lines take {high} px, the box is {h} high: {text!r}")
    top = y + h / 2 - (lines - 1) * leading(size) / 2 + 0.35 * size
    return f"{frame}\n{label(x + w / 2, round(top), text, w - 2 * PAD, **look)}"


def stroke(dashed: bool = False) -> str:
    """The one line of all drawings."""
    return f'stroke-width="{LINE}"' + (' stroke-dasharray="5 4"' if dashed else "")


def line(*points: tuple[float, float], colour: str = INK, dashed: bool = False) -> str:
    """A line through the points."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    look = f'stroke-linejoin="round" {stroke(dashed)}'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {look}/>'


def arrow(*points: tuple[float, float], colour: str = INK) -> str:
    """A line through the points with a head at the last one; its last piece is horizontal or vertical."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back = (x - 9 * dx, y - 9 * dy)
    head = [(x, y), (back[0] - 5 * dy, back[1] - 5 * dx), (back[0] + 5 * dy, back[1] + 5 * dx)]
    path = " ".join(f"{a:g},{b:g}" for a, b in head)
    return f'{line(*points[:-1], back, colour=colour)}\n<polygon points="{path}" fill="{colour}"/>'


def matrix(x: float, y: float, w: float, h: float, name: str, colour: str) -> str:
    """A matrix as a rectangle with its name in the middle: w for its columns, h for its rows."""
    frame = (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{PALE[colour]}" stroke="{colour}" {stroke()}/>'
    )
    return f"{frame}\n{label(x + w / 2, y + h / 2 + 5, name, w, SMALL, bold=True)}"


def table(x: float, y: float, widths: list[float], rows: list[list[str]], colours: list[str], high: int = 24) -> str:
    """Rows of cells in monospace, one colour a row; an empty text leaves the cell empty."""
    parts = []
    for i, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        for j, (cell, w) in enumerate(zip(row, widths, strict=True)):
            left, top = x + sum(widths[:j]), y + i * high
            parts.append(
                f'<rect x="{left:g}" y="{top:g}" width="{w:g}" height="{high}" fill="{PALE[colour]}" '
                f'stroke="{colour}" {stroke()}/>'
            )
            if cell:
                parts.append(label(left + w / 2, top + high / 2 + 5, cell, w - 4, SMALL, mono=True))
    return "\n".join(parts)


def cylinder(x: float, y: float, w: float, h: float, name: str) -> str:
    """A database with its name."""
    body = f"M{x:g} {y + 9:g}v{h - 18:g}a{w / 2:g} 9 0 0 0 {w:g} 0v{18 - h:g}"
    lid = f'<ellipse cx="{x + w / 2:g}" cy="{y + 9:g}" rx="{w / 2:g}" ry="9"'
    return (
        f'<path d="{body}" fill="{WHITE}" stroke="{INK}" {stroke()}/>\n'
        f'{lid} fill="{PALE[REFERENCE]}" stroke="{INK}" {stroke()}/>\n'
        f"{label(x + w / 2, y + h / 2 + 13, name, w - 4, SMALL, mono=True)}"
    )


def mark(x: float, y: float, right: bool) -> str:
    """A green disc with a tick, or a vermilion one with a cross, its middle at x, y."""
    path = f"M{x - 6:g} {y:g}l4 5l8 -9" if right else f"M{x - 5:g} {y - 5:g}l10 10m0 -10l-10 10"
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="{CHOSEN if right else REJECTED}"/>\n'
        f'<path d="{path}" fill="none" stroke="{WHITE}" stroke-width="3" stroke-linecap="round"/>'
    )


def number(x: float, y: float, n: int) -> str:
    """A blue disc with a number in it."""
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{POLICY}"/>\n{label(x, y + 5, str(n), 20, TEXT, WHITE, bold=True)}'
    )


def curve(x: float, y: float, w: float, h: float, held_out: bool = True) -> str:
    """Two axes and a loss that falls; with the held-out loss above it, in the colours of LiveCurve."""
    path = '<path d="M{:g} {:g}q{:g} {:g} {:g} {:g}" fill="none" stroke="{}" {}/>'
    parts = [line((x, y), (x, y + h), (x + w, y + h), colour=REFERENCE)]
    parts.append(path.format(x + 4, y + 2, 0.2 * w, 0.85 * h, 0.95 * w, 0.85 * h, POLICY, stroke()))
    if held_out:
        parts.append(path.format(x + 8, y + 2, 0.2 * w, 0.58 * h, 0.92 * w, 0.58 * h, REJECTED, stroke()))
    return "\n".join(parts)


def interval(x: float, y: float, low: float, mean: float, high: float, colour: str) -> str:
    """A score with its interval, in pixels right of x."""
    bar = line((x + low, y), (x + high, y), colour=colour)
    return f'{bar}\n<circle cx="{x + mean:g}" cy="{y:g}" r="5" fill="{colour}"/>'


def picture(name: str, height: int, title: str, desc: str, parts: list[str]) -> str:
    """The whole SVG file: the card, what is on it, and its alt text."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            f'role="img" aria-labelledby="{name}-title {name}-desc" font-family="{LETTERS}">',
            f'<title id="{name}-title">{escape(title, quote=False)}</title>',
            f'<desc id="{name}-desc">{escape(desc, quote=False)}</desc>',
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="14" fill="{CARD}" '
            f'stroke="{EDGE}" {stroke()}/>',
            *parts,
            "</svg>\n",
        ]
    )


def first_look() -> str:
    """Notebook 00: one question, the model before and after training; both answers are still to be guessed."""
    middle, low, right = 196, 222, 572
    return picture(
        "first_look",
        396,
        "One question, before and after a short training",
        "The question is: how many late orders in Pune? Above: the base chat model with 135 million "
        "parameters is asked, and its prompt names every column and explains the house words. A "
        "question mark stands for its query. Below: the same model with a small adapter (LoRA), "
        "trained on a few hundred questions and their queries for a few minutes, is asked without "
        "columns or house words in its prompt. Another question mark stands for its query, which the "
        "database runs too. Late means more than 45 minutes, which is this company's own word.",
        [
            box(20, 120, 152, 104, "How many\nlate orders\nin Pune?", size=LARGE, bold=True),
            label(
                20,
                254,
                "In this company late\nmeans more than\n45 minutes.",
                172,
                SMALL,
                anchor="start",
            ),
            arrow((middle, 172), (middle, 84), (low, 84), colour=REFERENCE),
            arrow((middle, 172), (middle, 279), (low, 279), colour=POLICY),
            line((172, 172), (middle, 172)),
            label(low, 34, "Before: the prompt names the columns", 620, LARGE, anchor="start", bold=True),
            box(low, 46, 316, 76, "base chat model\n135M parameters", REFERENCE, PALE[REFERENCE], size=BIG),
            arrow((538, 84), (right, 84), colour=REFERENCE),
            box(right, 46, 120, 76, "?", size=34, bold=True),
            label(
                low,
                170,
                "After training: the prompt names none",
                620,
                LARGE,
                anchor="start",
                bold=True,
            ),
            box(low, 182, 316, 194, "", POLICY, WHITE),
            label(low + 158, 211, "the same model", 300, BIG),
            matrix(low + 100, 223, 42, 42, "W", REFERENCE),
            label(low + 156, 250, "+", 24, BIG, bold=True),
            matrix(low + 171, 223, 19, 42, "B", POLICY),
            matrix(low + 196, 223, 42, 19, "A", POLICY),
            label(low + 158, 293, "+ small adapter (LoRA)", 300, BIG),
            label(
                low + 158,
                322,
                "trained on a few hundred\nquestions and queries",
                300,
                BIG,
            ),
            arrow((538, 279), (right, 279), colour=POLICY),
            box(right, 241, 120, 76, "?", size=34, bold=True),
            arrow((692, 84), (798, 84), (798, 138), colour=REFERENCE),
            arrow((692, 279), (798, 279), (798, 224), colour=POLICY),
            cylinder(764, 138, 68, 86, "orders"),
        ],
    )


def asking() -> str:
    """Notebook 00: three calls from messages to an answer."""
    left, middle, right, top = 20, 246, 596, 54
    prompt = [
        "<|im_start|>system",
        "Write one SQLite query.<|im_end|>",
        "<|im_start|>user",
        "How many late ...?<|im_end|>",
        "<|im_start|>assistant",
    ]
    tokens = [("SELECT", 70), ("COUNT", 62), ("(*)", 44), ("...", 44)]
    parts = [
        label(left, 34, "your messages", 200, BIG, anchor="start", bold=True),
        box(left, top, 196, 84, "system\nWrite one SQLite\nquery.", REFERENCE, PALE[REFERENCE]),
        box(left, 152, 196, 84, "user\nHow many late orders\nin Pune?", REFERENCE, PALE[REFERENCE]),
        arrow((216, 93), (middle, 93), colour=POLICY),
        number(middle + 12, 28, 1),
        label(middle + 32, 34, "apply_chat_template", 260, BIG, anchor="start", bold=True),
        box(middle, top, 306, 182, "", POLICY),
        arrow((552, 93), (right, 93), colour=POLICY),
        number(right + 12, 28, 2),
        label(right + 32, 34, "generate", 200, BIG, anchor="start", bold=True),
        label(right, 140, "one token at a time, until\n<|im_end|> ends the turn", 250, anchor="start"),
        number(right + 12, 212, 3),
        label(right + 32, 218, "decode", 90, BIG, anchor="start", bold=True),
        arrow((right + 160, 172), (right + 160, 240), colour=POLICY),
        box(right, 240, 244, 48, "SELECT COUNT(*) ...", CHOSEN, PALE[CHOSEN], mono=True),
        label(left, 266, "One text, in the form that the model was trained on.", 560, anchor="start"),
        label(left, 287, "Its last line opens the answer.", 560, anchor="start"),
    ]
    for k, words in enumerate(prompt):
        colour = POLICY if words.startswith("<") else INK
        parts.append(label(middle + 12, 84 + 32 * k, words, 284, SMALL, colour, "start", mono=True))
    x = right
    for words, wide in tokens:
        parts.append(box(x, 76, wide, 34, words, POLICY, PALE[POLICY], mono=True, size=SMALL))
        x += wide + 8
    return picture(
        "asking",
        308,
        "From messages to an answer, in three calls",
        "apply_chat_template writes a system and a user message as one text: each turn stands between the special "
        "tokens im_start and im_end, and the last line opens the assistant's turn. generate adds one token at a time, "
        "SELECT, COUNT and so on, until im_end. decode turns the new tokens into the text of a query.",
        parts,
    )


def adapter() -> str:
    """Notebook 00: the two folders, and what they compute together and without the adapter."""
    weights = 134_515_008  # of SmolLM2-135M-Instruct; its adapter of rank 16 on all linear layers has 4,884,480
    base, thin = f"{weights * 4 / 1e6:.0f} MB", f"{4_884_480 * 4 / 1e6:.0f} MB"
    left, middle, right = 20, 318, 612
    return picture(
        "adapter",
        300,
        "Two folders make one tuned model",
        f"At the left two folders: the base model, {base}, which training leaves as it is, and "
        f"my_adapter, {thin}, with the thin matrices B and A. Together each layer computes W x plus "
        "a scale times B A x, "
        "and the model answers with the right query. With disable_adapter each layer computes W x "
        "alone, and the model answers as it did before training.",
        [
            box(left, 24, 208, 112, "", REFERENCE, PALE[REFERENCE]),
            matrix(left + 16, 46, 68, 68, "W", REFERENCE),
            label(left + 98, 64, f"base model\n{base}\nas it was", 104, anchor="start"),
            box(left, 164, 208, 112, "", POLICY, PALE[POLICY]),
            matrix(left + 16, 192, 22, 60, "B", POLICY),
            matrix(left + 44, 192, 48, 22, "A", POLICY),
            label(left + 98, 204, f"my_adapter\n{thin}\ntrained", 104, anchor="start"),
            arrow((228, 80), (middle, 80), colour=REFERENCE),
            line((228, 220), (272, 220), (272, 96), colour=POLICY),
            arrow((272, 220), (272, 96), (middle, 96), colour=POLICY),
            box(middle, 40, 238, 84, "W x + s B A x", POLICY, WHITE, size=BIG, bold=True),
            arrow((556, 82), (right, 82), colour=CHOSEN),
            box(right, 40, 190, 84, "SELECT COUNT(*)\nFROM orders ...", CHOSEN, PALE[CHOSEN], mono=True),
            mark(828, 82, right=True),
            arrow((437, 124), (437, 192), colour=REFERENCE),
            label(449, 162, "disable_adapter()", 220, anchor="start", mono=True),
            box(middle, 192, 238, 84, "W x", REFERENCE, WHITE, size=BIG, bold=True),
            arrow((556, 234), (right, 234), colour=REFERENCE),
            box(right, 192, 190, 84, "answers as before\nthe training", REJECTED, PALE[REJECTED]),
            mark(828, 234, right=False),
        ],
    )


def step(x: float, y: float, n: int, title: str, goes_in: str, comes_out: str, check: str, inside: list[str]) -> str:
    """One step of the pipeline, 248 x 236: what goes in, a small drawing, what comes out, the check that could fail."""
    w, h = 248, 236
    parts = [
        box(x, y, w, h, "", POLICY),
        number(x + 22, y + 22, n),
        label(x + 42, y + 27, title, w - 42 - PAD, TEXT, anchor="start", bold=True),
        label(x + 12, y + 54, f"in: {goes_in}", w - 12 - PAD, SMALL, anchor="start"),
        *inside,
        label(x + 12, y + 156, f"out: {comes_out}", w - 12 - PAD, SMALL, anchor="start"),
        f'<rect x="{x + 10}" y="{y + 178}" width="{w - 20}" height="48" rx="4" fill="{PALE[REJECTED]}"/>',
        f'<rect x="{x + 10}" y="{y + 178}" width="4" height="48" fill="{REJECTED}"/>',
        label(x + 22, y + 197, check, w - 40, SMALL, anchor="start"),
    ]
    return "\n".join(parts)


def pipeline() -> str:
    """Notebook 05: six steps from rows to a served model, each with the check that could fail."""
    x, y = [20, 306, 592], [20, 302]
    a, b = y[0] + 68, y[1] + 68  # top of the small drawings
    tokens = table(x[1] + 12, a + 4, [28] * 8, [["0"] * 4 + [""] * 4], [REFERENCE], high=26)
    trained = table(x[1] + 124, a + 4, [28] * 4, [["1"] * 4], [POLICY], high=26)
    return picture(
        "pipeline",
        592,
        "The pipeline in six steps, each with the check that could fail",
        "1 Data: files go in, clean rows come out; every bad row is named and near-duplicates are counted. 2 Base "
        "model, chat template and loss mask: token ids come out; the whole text's ids begin with the prompt's "
        "ids. 3 Configuration: SFTConfig and LoraConfig; the longest row isn't above max_length. 4 Train: an "
        "adapter comes out; the loss falls, and every number is finite. 5 Evaluate: a score with its interval "
        "beside its controls; the paired interval lies above zero. 6 Merge and deploy: merged model, GGUF Q8_0, "
        "server, openai client; merged equals unmerged, and the low end of the GGUF file's paired interval lies "
        "above minus the margin.",
        [
            step(
                x[0],
                y[0],
                1,
                "Data",
                "CSV, Parquet or JSONL",
                "clean rows",
                "every bad row is named,\nnear-duplicates are counted",
                [
                    table(x[0] + 12, a, [150], [[""]] * 4, [POLICY, REJECTED, POLICY, REFERENCE], high=15),
                    label(x[0] + 170, a + 27, "bad", 70, SMALL, anchor="start"),
                    label(x[0] + 170, a + 57, "near-dup.", 70, SMALL, anchor="start"),
                ],
            ),
            step(
                x[1],
                y[0],
                2,
                "Base, template, mask",
                "base model, clean rows",
                "token ids, mask",
                "the whole text's ids begin\nwith the prompt's ids",
                [
                    tokens,
                    trained,
                    label(x[1] + 68, a + 50, "prompt", 110, SMALL),
                    label(x[1] + 180, a + 50, "answer, trained", 124, SMALL),
                ],
            ),
            step(
                x[2],
                y[0],
                3,
                "Configuration",
                "rate, steps, rank",
                "a trainer",
                "the longest row isn't\nabove max_length",
                [
                    box(x[2] + 12, a, 108, 56, "SFTConfig\nthe run", size=SMALL),
                    box(x[2] + 128, a, 108, 56, "LoraConfig\nthe adapter", size=SMALL),
                ],
            ),
            step(
                x[0],
                y[1],
                4,
                "Train",
                "trainer",
                "adapter",
                "the loss falls, and every\nnumber is finite",
                [
                    curve(x[0] + 14, b, 130, 58, held_out=False),
                    label(x[0] + 152, b + 52, "loss", 84, SMALL, anchor="start"),
                ],
            ),
            step(
                x[1],
                y[1],
                5,
                "Evaluate",
                "adapter, test rows",
                "scores with intervals",
                "paired interval of the\ndifference lies above zero",
                [
                    label(x[1] + 12, b + 9, "base", 70, SMALL, anchor="start"),
                    label(x[1] + 12, b + 31, "few-shot", 70, SMALL, anchor="start"),
                    label(x[1] + 12, b + 53, "ours", 70, SMALL, anchor="start"),
                    interval(x[1] + 84, b + 5, 4, 16, 28, REFERENCE),
                    interval(x[1] + 84, b + 27, 22, 40, 58, REFERENCE),
                    interval(x[1] + 84, b + 49, 96, 114, 132, POLICY),
                ],
            ),
            step(
                x[2],
                y[1],
                6,
                "Merge and deploy",
                "base model + adapter",
                "answers over HTTP",
                "merged = unmerged; GGUF\nnot worse by the margin",
                [
                    box(x[2] + 12, b, 112, 24, "merged", POLICY, PALE[POLICY], size=SMALL),
                    arrow((x[2] + 124, b + 12), (x[2] + 136, b + 12)),
                    box(x[2] + 136, b, 100, 24, "GGUF Q8_0", POLICY, PALE[POLICY], size=SMALL),
                    arrow((x[2] + 186, b + 24), (x[2] + 186, b + 42)),
                    box(x[2] + 136, b + 42, 100, 24, "server", POLICY, PALE[POLICY], size=SMALL),
                    arrow((x[2] + 136, b + 54), (x[2] + 124, b + 54)),
                    box(x[2] + 12, b + 42, 112, 24, "openai client", size=SMALL),
                ],
            ),
            arrow((268, 138), (306, 138)),
            arrow((554, 138), (592, 138)),
            arrow((716, 256), (716, 279), (144, 279), (144, 302)),
            arrow((268, 420), (306, 420)),
            arrow((554, 420), (592, 420)),
            f'<rect x="20" y="555" width="4" height="20" fill="{REJECTED}"/>',
            label(32, 570, "the check of this step: where it fails, the chain stops", 700, TEXT, anchor="start"),
        ],
    )


# What notebook 10's dial holds.
THE_DIAL = "FILE, COLUMNS\nSYSTEM, GUIDE\nSCORER, CONTROLS\nMODEL, ROWS, ..."


def your_data() -> str:
    """Notebook 10: from a file of yours to a served model; blue is what you bring, the code stays as it is."""
    w, h = 188, 152
    x, y = [20, 231, 442, 653], [50, 248]
    (ax, bx, cx, dx), (top, low) = x, y
    ink, blue, grey = INK, POLICY, REFERENCE
    yours = {"colour": blue, "fill": PALE[blue]}

    def mid(left: float) -> float:
        return left + w / 2

    def stage(left: float, up: float, title: str, words: str, **look: str) -> str:
        foot = up + 142 - leading(SMALL) * words.count("\n")
        return "\n".join(
            [
                box(left, up, w, h, **look),
                label(mid(left), up + 25, title, w - 16, TEXT, bold=True),
                label(mid(left), foot, words, w - 16, SMALL),
            ]
        )

    def scores(left: float, rows: list[tuple[str, int, str]]) -> list[str]:
        parts = []
        for number, (name, mean, colour) in enumerate(rows):
            height = low + 57 + 25 * number
            parts.append(label(left + 12, height, name, 72, SMALL, anchor="start"))
            parts.append(interval(left + 88, height - 4, mean - 12, mean, mean + 12, colour))
        return parts

    swatch = '<rect x="{}" y="18" width="20" height="18" rx="4" fill="{}" stroke="{}" {}/>'
    return picture(
        "your_data",
        420,
        "Your own data: from a file to a served model",
        "A file and the dial are yours. A report names bad rows, a split by group makes training, "
        "validation and test. The bar is what prompts and simple code score. Training, then saving "
        "and serving follow, and one look at the test goes onto the model card.",
        [
            swatch.format(20, PALE[blue], blue, stroke()),
            label(48, 32, "yours", 60, TEXT, anchor="start", bold=True),
            swatch.format(116, WHITE, ink, stroke()),
            label(144, 32, "code that stays", 150, TEXT, anchor="start"),
            stage(ax, top, "A file", "CSV, Parquet or JSONL", **yours),
            table(ax + 44, top + 40, [50, 50], [["", ""]] * 4, [ink, blue, blue, blue], high=17),
            stage(bx, top, "The dial", "the task and the run", **yours),
            label(bx + 22, top + 52, THE_DIAL, w - 30, TEXT, anchor="start", mono=True),
            stage(cx, top, "Data report", "bad rows by cause,\nwhat was repaired"),
            table(cx + 44, top + 42, [100], [[""]] * 3, [ink, REJECTED, ink], high=17),
            stage(dx, top, "Three parts", "each group in one part"),
            *(
                table(dx + left, top + 42, [18] * 2, [[name] * 2] * 2, [ink] * 2, high=20)
                for left, name in ((18, "A"), (76, "B"), (134, "C"))
            ),
            label(dx + 36, top + 104, "train", 56, SMALL, bold=True),
            label(dx + 94, top + 104, "valid.", 56, SMALL, bold=True),
            label(dx + 152, top + 104, "test", 56, SMALL, bold=True),
            stage(ax, low, "The bar", "what costs no training"),
            *scores(ax, [("base", 14, grey), ("prompt", 44, grey), ("control", 62, grey)]),
            stage(bx, low, "Train", "the best checkpoint\non validation"),
            curve(bx + 46, low + 40, 96, 58),
            stage(cx, low, "Save and serve", "merged, loaded again"),
            box(cx + 22, low + 42, 144, 28, "GGUF Q8_0", size=SMALL),
            arrow((mid(cx), low + 70), (mid(cx), low + 88)),
            box(cx + 22, low + 88, 144, 28, "llama.cpp server", size=SMALL),
            stage(dx, low, "One look", "at the test, as served"),
            *scores(dx, [("prompt", 40, grey), ("control", 70, grey), ("tuned", 67, blue)]),
            *(arrow((left + w, up + 75), (left + w + 23, up + 75)) for left in x[:3] for up in y),
            arrow((mid(dx), top + h), (mid(dx), top + h + 22), (mid(ax), top + h + 22), (mid(ax), low)),
        ],
    )


def three_parts() -> str:
    """Notebook 10: which group goes where, and who may look at which part how often."""
    ink, blue, orange, grey, green = INK, POLICY, REJECTED, REFERENCE, CHOSEN
    parts = [label(110, 40, "your rows, by group", 190, TEXT, bold=True)]
    colours = {"A": blue, "B": blue, "C": orange, "D": green}
    sizes = {"A": 5, "B": 3, "C": 2, "D": 2}
    heights = {"A": 66, "B": 130, "C": 194, "D": 258}
    for name, size in sizes.items():
        parts.append(table(30, heights[name], [32] * size, [[name] * size], [colours[name]], high=32))
    sides = [
        ("training", blue, 62, "sets the weights", "as often as you like"),
        ("validation", orange, 164, "prompt, checkpoint, rate; read mistakes", "for choosing"),
        ("test", green, 266, "one number, for the card", "asked once, at the end"),
    ]
    for name, colour, up, use, often in sides:
        parts += [
            box(430, up, 400, 84, "", colour=colour, fill=PALE[colour]),
            label(450, up + 26, name, 200, BIG, colour=ink, anchor="start", bold=True),
            label(450, up + 50, use, 370, TEXT, anchor="start"),
            label(450, up + 72, often, 370, SMALL, anchor="start"),
        ]
    parts += [
        arrow((194, 82), (430, 82)),
        arrow((130, 146), (380, 146), (380, 120), (430, 120)),
        arrow((98, 210), (430, 210)),
        arrow((98, 274), (290, 274), (290, 308), (430, 308)),
        box(30, 316, 190, 46, "nearly a row of A:\nleft out", grey, dashed=True, size=SMALL),
        arrow((46, 290), (46, 316), colour=grey),
        label(312, 70, "kept in splits.json", 210, SMALL),
    ]
    return picture(
        "three_parts",
        384,
        "Three parts, and a group in one of them",
        "Groups of rows go to one of three parts. Training rows set the weights and may be used as "
        "often as you like. Validation rows are for choosing and reading mistakes. Test rows are "
        "asked once, at the end. A file keeps which group is where, and new groups are dealt later. "
        "A held-out row that nearly repeats a training row is left out.",
        parts,
    )


def thinking_rows() -> str:
    """Notebook 10: what counts in the loss of a model that thinks, for three kinds of rows."""
    ink, grey, green = INK, REFERENCE, CHOSEN
    rows = [
        (
            "rows without reasoning",
            [("Where is my order?", grey, 170), ("<think></think>", green, 160), ("late", green, 70)],
            "answers <think></think>late",
        ),
        (
            "the same, thinking switched off",
            [("Where is my order? <think></think>", grey, 330), ("late", green, 70)],
            "answers late",
        ),
        (
            "rows with reasoning",
            [
                ("Where is my order?", grey, 170),
                ("<think>9 days</think>", green, 210),
                ("late", green, 70),
            ],
            "thinks, then answers",
        ),
    ]
    swatch = '<rect x="{}" y="20" width="20" height="18" rx="4" fill="{}" stroke="{}" {}/>'
    parts = [
        swatch.format(24, PALE[grey], grey, stroke()),
        label(52, 34, "the prompt", 110, TEXT, anchor="start"),
        swatch.format(170, PALE[green], green, stroke()),
        label(198, 34, "counts in the loss: this is learned", 300, TEXT, anchor="start"),
    ]
    for number, (name, pieces, learned) in enumerate(rows):
        up, left = 66 + 96 * number, 24
        parts.append(label(24, up + 14, name, 400, TEXT, anchor="start", bold=True))
        for words, colour, wide in pieces:
            parts.append(box(left, up + 24, wide, 38, words, colour=colour, fill=PALE[colour], size=SMALL))
            left += wide + 8
        parts.append(arrow((left, up + 43), (left + 36, up + 43)))
        parts.append(label(left + 46, up + 48, learned, 840 - left - 46, TEXT, colour=ink, anchor="start"))
    return picture(
        "thinking_rows",
        354,
        "What a thinking model learns from three kinds of rows",
        "Three kinds of rows and what a thinking model learns from each. Rows without reasoning: the "
        "template writes an empty think block before the answer, and it is trained on. With thinking "
        "switched off the block moves into the prompt, and the answer alone is trained on. Rows with "
        "reasoning: reasoning and answer are trained on.",
        parts,
    )


def lora() -> str:
    """Notebook 02: one frozen matrix, two thin ones beside it, and what goes where."""
    big, thin = 136, 26  # sides of W0; the rank
    left, top, low = 132, 52, 262  # W0's corner; A's upper edge
    middle = top + big / 2
    reads = low + thin / 2  # the height at which the lower path runs
    return picture(
        "lora",
        420,
        "A LoRA layer: W0 is frozen, A and B are trained",
        "The input x goes two ways. Above: through the frozen matrix W0, with out rows and in columns. Below: through "
        "A, with r rows and in columns, which reads r numbers off the input; then through B, with out rows and r "
        "columns, which starts at zero; then times alpha over r. Both results are added and give h. For 4096 inputs "
        "and outputs and r = 16, W0 has 16,777,216 numbers, A and B together have 131,072. After training, W0 plus "
        "alpha over r times B A can be stored as one matrix of W0's shape.",
        [
            matrix(28, 126, 24, 124, "x", INK),
            label(40, 272, "(in)", 60, SMALL),
            line((52, 188), (84, 188)),
            arrow((84, 188), (84, middle), (left, middle), colour=REFERENCE),
            arrow((84, 188), (84, reads), (left, reads), colour=POLICY),
            label(left + big / 2, top - 12, "frozen", big, TEXT, bold=True),
            matrix(left, top, big, big, "W0", REFERENCE),
            label(left + big / 2, top + big + 20, "(out, in)", big, SMALL),
            label(left + big / 2, low - 12, "trained", big, TEXT, bold=True),
            matrix(left, low, big, thin, "A", POLICY),
            label(left + big / 2, low + thin + 20, "(r, in)\nreads r numbers", big + 20, SMALL),
            arrow((left + big, reads), (322, reads), colour=POLICY),
            matrix(322, reads - big / 2, thin, big, "B", POLICY),
            label(335, reads + big / 2 + 20, "(out, r), starts at zero", 190, SMALL),
            arrow((322 + thin, reads), (384, reads), colour=POLICY),
            box(384, reads - 22, 100, 44, "× alpha / r", POLICY, PALE[POLICY], size=SMALL),
            line((left + big, middle), (512, middle), colour=REFERENCE),
            arrow((512, middle), (512, 170), colour=REFERENCE),
            line((484, reads), (512, reads), colour=POLICY),
            arrow((512, reads), (512, 206), colour=POLICY),
            box(494, 170, 36, 36, "+", bold=True),
            arrow((530, 188), (566, 188)),
            matrix(566, 126, 24, 124, "h", INK),
            label(578, 272, "(out)", 60, SMALL),
            line((622, 30), (622, 350), colour=EDGE),
            label(738, 40, "After training", 190, TEXT, bold=True),
            matrix(650, 62, 62, 62, "W0", REFERENCE),
            label(725, 98, "+", 24, BIG, bold=True),
            matrix(738, 62, 12, 62, " ", POLICY),
            matrix(756, 62, 62, 12, " ", POLICY),
            label(744, 142, "B", 20, SMALL, bold=True),
            label(787, 96, "A", 20, SMALL, bold=True),
            arrow((738, 152), (738, 176)),
            matrix(707, 182, 62, 62, "W", POLICY),
            label(
                738,
                272,
                "merge: one matrix of\nW0's shape, no extra\ntime. Or keep A and B\napart and swap them.",
                210,
                SMALL,
            ),
            label(28, 396, "4096 in, 4096 out, r = 16:", 230, TEXT, anchor="start"),
            label(264, 396, "W0 has 16,777,216 numbers,", 260, TEXT, REFERENCE, anchor="start", bold=True),
            label(528, 396, "A and B together have 131,072", 300, TEXT, POLICY, anchor="start", bold=True),
        ],
    )


def lora_gradients() -> str:
    """Notebook 02: a LoRA layer forwards, and both gradients as a column times a row."""
    wide, tall, thin = 150, 110, 26  # what stands for in, out and r
    short = 112  # and for in, where two of it stand beside each other
    axis, low = 132, 330  # the middle of the forward pass and of the gradients
    ahead, back = axis - 6, axis + 7  # the arrows of both ways
    parts = [
        label(28, 42, "forwards", 120, BIG, anchor="start", bold=True),
        label(136, 42, "and backwards", 170, BIG, REJECTED, anchor="start", bold=True),
        matrix(34, axis - wide / 2, thin, wide, "x", INK),
        label(47, axis + wide / 2 + 22, "(in)", 70),
        arrow((60, axis), (104, axis), colour=POLICY),
        matrix(104, axis - thin / 2, wide, thin, "A", POLICY),
        label(179, axis + 36, "(r, in)", 100),
        arrow((254, axis), (298, axis), colour=POLICY),
        matrix(298, axis - thin / 2, thin, thin, "a", INK),
        label(311, axis + 36, "(r)", 60),
        arrow((324, ahead), (368, ahead), colour=POLICY),
        arrow((368, back), (324, back), colour=REJECTED),
        label(311, axis - 26, "s Bᵀg", 80, TEXT, REJECTED, bold=True),
        matrix(368, axis - tall / 2, thin, tall, "B", POLICY),
        label(381, axis + tall / 2 + 22, "(out, r)", 90),
        arrow((394, ahead), (438, ahead), colour=POLICY),
        arrow((438, back), (394, back), colour=REJECTED),
        box(438, axis - 20, 52, 40, "× s", POLICY, PALE[POLICY]),
        arrow((490, ahead), (540, ahead), colour=POLICY),
        arrow((540, back), (490, back), colour=REJECTED),
        box(540, axis - 18, 36, 36, "+", bold=True),
        arrow((558, 60), (558, axis - 18), colour=REFERENCE),
        label(558, 48, "W0 x", 90, TEXT, REFERENCE, bold=True),
        arrow((576, ahead), (616, ahead)),
        arrow((616, back), (576, back), colour=REJECTED),
        label(596, back + 28, "g", 30, TEXT, REJECTED, bold=True),
        matrix(616, axis - tall / 2, thin, tall, "h", INK),
        label(629, axis + tall / 2 + 22, "(out)", 70),
        arrow((642, ahead), (690, ahead)),
        arrow((690, back), (642, back), colour=REJECTED),
        box(690, axis - 22, 100, 44, "loss"),
        label(740, axis + 52, "g: its gradient at h", 180, TEXT, REJECTED, bold=True),
        line((28, 238), (832, 238), colour=EDGE),
        label(28, 268, "gradient of B", 200, BIG, anchor="start", bold=True),
        label(34, low + 5, "s ×", 40, BIG, anchor="start"),
        matrix(78, low - tall / 2, thin, tall, "g", REJECTED),
        label(122, low + 5, "×", 24, BIG),
        matrix(140, low - thin / 2, thin, thin, "aᵀ", INK),
        label(186, low + 5, "=", 24, BIG),
        matrix(208, low - tall / 2, thin, tall, " ", POLICY),
        label(221, low + tall / 2 + 22, "(out, r)", 90),
        line((420, 254), (420, 424), colour=EDGE),
        label(446, 268, "gradient of A", 200, BIG, anchor="start", bold=True),
        label(452, low + 5, "s ×", 40, BIG, anchor="start"),
        matrix(496, low - thin / 2, thin, thin, " ", REJECTED),
        label(509, low + 36, "Bᵀg", 50, TEXT, REJECTED, bold=True),
        label(540, low + 5, "×", 24, BIG),
        matrix(558, low - thin / 2, short, thin, "xᵀ", INK),
        label(686, low + 5, "=", 24, BIG),
        matrix(706, low - thin / 2, short, thin, " ", POLICY),
        label(706 + short / 2, low + 36, "(r, in)", 90),
    ]
    return picture(
        "lora_gradients",
        440,
        "A LoRA layer forwards, and the gradients of B and A",
        "Forwards: x with in entries goes through A, with r rows and in columns, and becomes a, with r entries. Then "
        "it goes through B, with out rows and r columns, times the scale s, and is added to W0 x: that is h, with out "
        "entries, from which the loss is computed. Backwards, g is the loss's gradient at h, and s times B "
        "transposed g is its gradient at a. The gradient of B is s times the column g times the "
        "row a, a matrix with out rows and r columns. The gradient of A is s times the column B transposed g, which "
        "has r entries, times the row x, a matrix with r rows and in columns.",
        parts,
    )


def lora_mix() -> str:
    """Notebook 02: two adapters stacked are the sum of their updates; their matrices added are not."""
    side, top, low = 96, 78, 262  # of W0; the corners of the two rows
    second = REJECTED

    def columns(x: float, y: float, colours: list[str], names: list[str]) -> list[str]:
        return [matrix(x + i * 34, y, 34, side, *pair) for i, pair in enumerate(zip(names, colours, strict=True))]

    def rows(x: float, y: float, colours: list[str], names: list[str]) -> list[str]:
        return [matrix(x, y + i * 28, side, 28, *pair) for i, pair in enumerate(zip(names, colours, strict=True))]

    both = [POLICY, second]
    return picture(
        "lora_mix",
        400,
        "Stacked, two adapters add up exactly; added, they don't",
        "Above: B1 and B2 stand side by side and A1 above A2. Their product is B1 A1 plus B2 A2, the sum of both "
        "updates, of rank r1 plus r2. Below: B1 plus B2 is multiplied by A1 plus A2. The product is B1 A1 plus B2 A2 "
        "plus the two cross terms B1 A2 and B2 A1, which nobody trained.",
        [
            label(28, 42, "cat: stack them", 240, BIG, anchor="start", bold=True),
            *columns(34, top, both, ["B1", "B2"]),
            label(126, top + side / 2 + 5, "×", 30, BIG),
            *rows(150, top + 20, both, ["A1", "A2"]),
            label(274, top + side / 2 + 5, "=", 30, BIG),
            box(306, top + side / 2 - 24, 90, 48, "B1 A1", POLICY, PALE[POLICY], bold=True),
            label(415, top + side / 2 + 5, "+", 30, BIG),
            box(434, top + side / 2 - 24, 90, 48, "B2 A2", second, PALE[second], bold=True),
            label(562, top + side / 2 - 4, "the sum of both updates,\nof rank r1 + r2", 270, TEXT, anchor="start"),
            line((28, 202), (832, 202), colour=EDGE),
            label(28, 238, "linear: add them", 240, BIG, anchor="start", bold=True),
            box(34, low + 22, 96, 48, "B1 + B2"),
            label(146, low + 51, "×", 30, BIG),
            box(162, low + 22, 96, 48, "A1 + A2"),
            label(274, low + 51, "=", 30, BIG),
            box(306, low + 22, 90, 48, "B1 A1", POLICY, PALE[POLICY], bold=True),
            label(415, low + 51, "+", 30, BIG),
            box(434, low + 22, 90, 48, "B2 A2", second, PALE[second], bold=True),
            label(543, low + 51, "+", 30, BIG),
            box(562, low + 22, 90, 48, "B1 A2", REFERENCE, PALE[REFERENCE], dashed=True, bold=True),
            label(671, low + 51, "+", 30, BIG),
            box(690, low + 22, 90, 48, "B2 A1", REFERENCE, PALE[REFERENCE], dashed=True, bold=True),
            label(671, low + 104, "cross terms that nobody trained", 300, TEXT),
        ],
    )


def lora_settings() -> str:
    """Notebook 02: six decisions for an 8B in their order, without the answers of the worked example."""
    decisions = [
        ("rank", "as many parameters\nas completion tokens"),
        ("layers", "all linear ones: PEFT\nadapts 2 if you don't ask"),
        ("alpha", "leave it: it is a second\nknob for the rate"),
        ("batch", "small: large ones can\ncost LoRA more"),
        ("memory", "list what fits, and\nlet the clock decide"),
        ("rate", "search it; only then\ntry twice the rank"),
    ]
    parts, w, gap = [], 258, 18
    for i, (name, says) in enumerate(decisions):
        x, y = 25 + i % 3 * (w + gap), 24 + i // 3 * 138
        parts += [
            box(x, y, w, 110),
            number(x + 24, y + 28, i + 1),
            label(x + 48, y + 34, name, 160, BIG, anchor="start", bold=True),
            label(x + 16, y + 66, says, w - 32, TEXT, anchor="start"),
        ]
        if i % 3 < 2:
            parts.append(arrow((x + w, y + 55), (x + w + gap, y + 55)))
    return picture(
        "lora_settings",
        296,
        "Six decisions for an 8B, in order",
        "One, the rank: as many parameters as completion tokens. Two, the layers: all linear ones. Three, alpha: "
        "leave it. Four, the batch: small, because large ones can cost LoRA more. Five, memory: list what fits, and "
        "let the clock decide. Six, the learning rate: search it, and only then try twice the rank.",
        parts,
    )


def qlora_memory() -> str:
    """Notebook 03: what a QLoRA step holds all the time, and what each phase puts on top of it."""
    x, w, wide = [206, 366, 526, 686], 150, 630
    held, floor = 268, 260  # top of what is always there; what comes and goes stands on `floor`

    def pile(left: float, *parts: tuple[str, int, str]) -> str:
        """Boxes on top of each other, the first one at the bottom."""
        drawn, y = [], floor
        for text, high, colour in parts:
            y -= high
            drawn.append(box(left, y, w, high - 4, text, colour, PALE[colour], size=SMALL))
        return "\n".join(drawn)

    def key(left: float, colour: str, text: str) -> str:
        frame = f'<rect x="{left}" y="436" width="20" height="16" rx="4" fill="{PALE[colour]}" stroke="{colour}"'
        return f"{frame} {stroke()}/>\n{label(left + 28, 449, text, 170, SMALL, anchor='start')}"

    once = ("activations,\nkept for later", 48, INK)
    constants = "their constants, one for 64 weights"
    tables = "embedding, head, norms: 16 bits, not quantized"
    trained = "adapters A and B, and Adam's states for them"
    return picture(
        "qlora_memory",
        470,
        "What sits in the memory of a GPU in each phase of a QLoRA step",
        "Always there: the frozen weights of the linear layers in 4 bits; one constant for every 64 of them; "
        "embedding, head and norms in 16 bits; the adapters A and B; the optimizer's states for A and B. After "
        "loading nothing else. Forward adds activations, one matrix at a time in 16 bits, and at the end the logits. "
        "Backward has the same activations, one matrix in 16 bits, the work of one layer, which is computed again, and "
        "the gradients of A and B. The optimizer step has the gradients only. The peak is the highest column.",
        [
            *[
                label(left + w / 2, 34, title, w, BIG, bold=True)
                for left, title in zip(x, ["load", "forward", "backward", "step"], strict=True)
            ],
            line((20, 66), (840, 66), colour=REJECTED, dashed=True),
            label(20, 58, "the card is full", 180, SMALL, REJECTED, anchor="start", bold=True),
            label(20, 190, "comes and goes:\ngrows with batch,\nlength, vocabulary", 180, TEXT, anchor="start"),
            label(281, 250, "nothing", w, SMALL, REFERENCE),
            pile(x[1], once, ("a matrix, 16 bits", 28, REFERENCE), ("logits of the\nlast layer", 48, INK)),
            pile(
                x[2],
                once,
                ("a matrix, 16 bits", 28, REFERENCE),
                ("one layer's work,\ncomputed again", 62, INK),
                ("gradients of A, B", 28, POLICY),
            ),
            pile(x[3], ("gradients of A, B", 28, POLICY)),
            label(x[2] + w / 2, 86, "often the peak", w, TEXT, bold=True),
            line((20, floor + 4), (840, floor + 4), colour=EDGE),
            label(20, 320, "always there:\nsays how large\na model may be", 180, TEXT, anchor="start"),
            box(x[0], held, wide, 52, "frozen weights of the linear layers: 4 bits each", REFERENCE, PALE[REFERENCE]),
            box(x[0], held + 56, wide, 26, constants, REFERENCE, PALE[REFERENCE], size=SMALL),
            box(x[0], held + 86, wide, 34, tables, REFERENCE, PALE[REFERENCE], size=SMALL),
            box(x[0], held + 124, wide, 28, trained, POLICY, PALE[POLICY], size=SMALL),
            key(20, REFERENCE, "frozen"),
            key(120, POLICY, "trained"),
            key(226, INK, "the work of one step"),
            label(840, 449, "The peak is the highest column, never the sum.", 424, TEXT, anchor="end", bold=True),
        ],
    )


def nf4_byte() -> str:
    """Notebook 03: a block of four weights on its way into two bytes; the numbers are worked out."""
    weights, absmax = [0.6, -1.2, 0.1, 0.0], 1.2
    nearest, codes = [0.441, -1.0, 0.080, 0.0], [12, 0, 8, 7]
    left, wide, top, high = 196, 150, 30, 58  # the first column; a row's distance

    def row(i: int, name: str, texts: list[str], colour: str, columns: int = 1, **look: bool) -> str:
        """A row of boxes, each over so many columns, with its name at the left."""
        y, w = top + i * high, columns * wide
        boxes = [
            box(left + j * w, y, w - 12, 40, text, colour, PALE[colour], size=LARGE, **look)
            for j, text in enumerate(texts)
        ]
        return "\n".join([label(24, y + 27, name, 170, LARGE, anchor="start"), *boxes])

    bits = [f"{code:04b}" for code in codes]
    bytes_ = [16 * codes[0] + codes[1], 16 * codes[2] + codes[3]]
    signed = [f"{value:g}".replace("-", "−") for value in weights]
    scaled = [f"{value / absmax:.3g}".replace("-", "−") for value in weights]
    levels = [f"{value:.3f}".replace("-", "−") for value in nearest]
    return picture(
        "nf4_byte",
        430,
        "How four weights become two bytes and one constant",
        f"A block of four weights, {', '.join(signed)}. Its absmax is {absmax}. Divided by it the weights are "
        f"{', '.join(scaled)}. The nearest levels are {', '.join(levels)}; their numbers are the codes "
        f"{', '.join(map(str, codes))}. In bits: {', '.join(bits)}. Two codes make a byte, the first one is its high "
        f"half: {bytes_[0]} and {bytes_[1]}. Beside the bytes one constant is stored, the absmax.",
        [
            row(0, "weights", signed, REFERENCE),
            row(1, f"÷ absmax {absmax}", scaled, REFERENCE),
            row(2, "nearest level", levels, REFERENCE),
            row(3, "its number", [str(code) for code in codes], POLICY, bold=True),
            row(4, "in bits", bits, POLICY, mono=True),
            row(
                5,
                "two in a byte",
                [f"{pair} = {n}" for pair, n in zip((" ".join(bits[:2]), " ".join(bits[2:])), bytes_, strict=True)],
                POLICY,
                columns=2,
                mono=True,
            ),
            label(24, top + 6 * high + 27, "stored:", 170, LARGE, anchor="start", bold=True),
            label(
                left,
                top + 6 * high + 27,
                f"2 bytes of codes, and the constant {absmax}",
                600,
                LARGE,
                anchor="start",
                bold=True,
            ),
        ],
    )


def nf4_constants() -> str:
    """Notebook 03: blocks of codes, a constant for each block, and what 256 constants share."""
    x, wide, gap = [40, 220, 440], 166, 180
    codes_top, constant_top, shared_top = 66, 178, 290

    def block(left: float, name: str) -> list[str]:
        middle = left + wide / 2
        return [
            label(middle, codes_top - 12, name, wide, LARGE, bold=True),
            box(left, codes_top, wide, 62, "64 codes\n32 bytes", REFERENCE, PALE[REFERENCE], size=LARGE),
            line((middle, codes_top + 62), (middle, constant_top), colour=POLICY),
            box(left, constant_top, wide, 62, "its constant\n8 bits", POLICY, PALE[POLICY], size=LARGE),
            line((middle, constant_top + 62), (middle, shared_top), colour=INK),
        ]

    last = 440 + gap
    return picture(
        "nf4_constants",
        420,
        "Double quantization: codes, their constants, and the constants of the constants",
        "Three levels. Above: the codes, 4 bits each, in blocks of 64 weights, 32 bytes a block. In the middle: one "
        "constant for each block, its absmax, kept as a code of 8 bits; over 64 weights that is 0.125 bits each. "
        "Below: 256 constants share one number in fp32; over 64 times 256 weights that is 0.002 bits each. The mean "
        "of all constants is kept once a matrix. Together 4.127 bits a weight.",
        [
            *block(x[0], "block 1"),
            *block(x[1], "block 2"),
            *block(x[2], "block 256"),
            label(x[1] + wide + 27, codes_top + 36, "…", 40, LARGE),
            box(
                x[0],
                shared_top,
                last - x[0] - 14,
                62,
                "one fp32 number for these 256 constants\n(and the mean of all, once a matrix)",
                INK,
                WHITE,
                size=LARGE,
            ),
            label(last + 8, codes_top + 36, "4 bits", 226, LARGE, anchor="start", bold=True),
            label(last + 8, constant_top + 36, "+ 8 / 64", 226, LARGE, anchor="start", bold=True),
            label(last + 8, shared_top + 36, "+ 32 / (64 · 256)", 226, LARGE, anchor="start", bold=True),
            label(last + 8, shared_top + 96, "= 4.127 bits", 226, LARGE, POLICY, anchor="start", bold=True),
            label(x[0], shared_top + 96, "How many bits a weight takes:", 540, LARGE, anchor="start"),
        ],
    )


def qlora_passes() -> str:
    """Notebook 03: what LoRA and QLoRA do with a frozen matrix in each pass."""
    copy, tops = [306, 450], [72, 164, 256]
    names = ["forward", "again, where\ncheckpointed", "backward"]
    factors = ["× x", "× x", "× grad of y"]

    def a_pass(i: int) -> list[str]:
        y, middle = tops[i], tops[i] + 30
        high = names[i].count("\n")
        return [
            label(24, middle + 6 - 12 * high, names[i], 162, LARGE, anchor="start", bold=True),
            box(194, y, 84, 60, "4-bit\ncodes", REFERENCE, PALE[REFERENCE], size=LARGE),
            arrow((278, middle), (copy[0], middle), colour=POLICY),
            box(copy[0], y, copy[1] - copy[0], 60, "a 16-bit\ncopy of W", POLICY, WHITE, dashed=True, size=LARGE),
            arrow((copy[1], middle), (478, middle), colour=POLICY),
            label(544, middle + 6, factors[i], 132, LARGE, bold=True),
            arrow((610, middle), (638, middle), colour=POLICY),
            label(646, middle + 6, "copy thrown away", 200, LARGE, REJECTED, anchor="start"),
        ]

    return picture(
        "qlora_passes",
        385,
        "Dequantize, multiply, throw away: once in each pass through a layer",
        "Three rows. Forward: the 4-bit codes of W are written out as a 16-bit copy, which is multiplied with x and "
        "thrown away. Forward again, if checkpointing repeats the pass: the same once more. Backward: the codes are "
        "written out a third time, the copy is multiplied with the gradient of y, and thrown away. LoRA on a 16-bit "
        "base reads W three times and writes no copy.",
        [
            label(236, 44, "kept", 110, LARGE, anchor="middle"),
            label(378, 44, "made each time", 200, LARGE, POLICY, bold=True),
            label(544, 44, "used once", 132, LARGE),
            *[part for i in range(3) for part in a_pass(i)],
            label(24, 358, "LoRA on a 16-bit base reads W in each pass and makes no copy.", 820, LARGE, anchor="start"),
        ],
    )


def paging() -> str:
    """Notebook 03: where the optimizer's states are during a step whose batch is long."""
    x, wide, floor, full = [60, 330, 600], 200, 330, 116

    def step(i: int, title: str, work: int, states: bool, says: str) -> list[str]:
        left, y = x[i], floor
        drawn = [label(left + wide / 2, 44, title, 250, LARGE, bold=True)]
        drawn.append(box(left, y - 110, wide, 106, "weights and\nadapters", REFERENCE, PALE[REFERENCE], size=LARGE))
        y -= 110
        if states:
            drawn.append(box(left, y - 46, wide, 42, "Adam's states", POLICY, PALE[POLICY], size=LARGE))
            y -= 46
        if work:
            drawn.append(box(left, y - work, wide, work - 4, says, INK, WHITE, size=LARGE))
        return drawn

    away = box(x[1], 362, wide, 42, "Adam's states", POLICY, PALE[POLICY], size=LARGE)
    return picture(
        "paging",
        430,
        "A paged optimizer makes room for a spike",
        "Three moments on one card with a line where it is full. A short batch: weights and adapters, Adam's states, "
        "and a little work, below the line. A long batch: the work is so large that it would go over the line; the "
        "driver moves Adam's states to the memory of the CPU. The optimizer step: the work is gone, and the states are "
        "back on the card.",
        [
            line((20, full), (840, full), colour=REJECTED, dashed=True),
            label(836, full - 10, "the card is full", 200, LARGE, REJECTED, anchor="end", bold=True),
            *step(0, "a short batch", 44, True, "its work"),
            *step(1, "a long batch", 100, False, "its work"),
            *step(2, "the optimizer step", 0, True, ""),
            line((20, floor + 4), (840, floor + 4), colour=EDGE),
            label(24, 388, "the CPU's memory", 280, LARGE, anchor="start"),
            away,
            line((260, 197), (294, 197), colour=POLICY),
            arrow((294, 197), (294, 372), (330, 372), colour=POLICY),
            line((530, 383), (566, 383), colour=POLICY),
            arrow((566, 383), (566, 197), (600, 197), colour=POLICY),
        ],
    )


def rlhf_dpo() -> str:
    """Notebook 04: RLHF's four models beside DPO's two: which learn, which only read, and what flows."""
    top, row, out, low = 64, 158, 214, 296  # upper edges: what goes in, the models, what comes out of them, the end
    x, w = [80, 240, 400], 140  # RLHF's three readers

    def model(left: float, up: float, wide: float, name: str, learns: bool) -> str:
        colour = POLICY if learns else REFERENCE
        words = label(left + wide / 2, up + 44, "learns" if learns else "only reads", wide - 2 * PAD, SMALL)
        name = label(left + wide / 2, up + 23, name, wide - PAD, TEXT, bold=True)
        return "\n".join([box(left, up, wide, 56, "", colour, PALE[colour]), name, words])

    def says(middle: float, text: str) -> str:
        return label(middle + 8, out + 28, text, 128, SMALL, anchor="start")

    return picture(
        "rlhf_dpo",
        428,
        "RLHF with PPO has four models, DPO has two",
        "Left, RLHF with PPO: a prompt goes into the policy, which writes an answer. Three models read it. The reward "
        "model gives a score, the reference gives the KL, which is how far the policy is from its start, and the value "
        "model says what was expected. From these come the advantages: which tokens were better than expected. They "
        "train the policy and the value model. Right, DPO: a prompt with a chosen and a rejected answer goes into the "
        "policy and the reference. Each gives the log-probabilities of both answers. From these comes the loss, which "
        "trains the policy. Policy and value model learn; reference and reward model only read.",
        [
            label(20, 32, "RLHF with PPO: four models", 400, BIG, anchor="start", bold=True),
            box(80, top + 6, 96, 44, "prompt"),
            arrow((176, top + 28), (226, top + 28)),
            model(226, top, 140, "policy", True),
            arrow((366, top + 28), (416, top + 28)),
            box(416, top + 6, 108, 44, "its answer"),
            line((470, top + 50), (470, 138)),
            line((x[0] + w / 2, 138), (470, 138)),
            *[arrow((left + w / 2, 138), (left + w / 2, row)) for left in x],
            model(x[0], row, w, "reward_model", False),
            model(x[1], row, w, "ref_model", False),
            model(x[2], row, w, "value_model", True),
            *[arrow((left + w / 2, out), (left + w / 2, low)) for left in x],
            says(x[0] + w / 2, "score of the\nanswer"),
            says(x[1] + w / 2, "KL: how far\nfrom the start"),
            says(x[2] + w / 2, "what was\nexpected"),
            box(80, low, 460, 48, "advantages: which tokens were better than expected?"),
            arrow((80, low + 24), (40, low + 24), (40, 48), (296, 48), (296, top), colour=POLICY),
            arrow((540, low + 24), (562, low + 24), (562, row + 28), (540, row + 28), colour=POLICY),
            line((584, 24), (584, 356), colour=EDGE),
            label(606, 32, "DPO: two models", 230, BIG, anchor="start", bold=True),
            box(630, top, 202, 56, "prompt, chosen answer,\nrejected answer", size=SMALL),
            line((731, top + 56), (731, 138)),
            line((678, 138), (782, 138)),
            arrow((678, 138), (678, row)),
            arrow((782, 138), (782, row)),
            model(630, row, 96, "policy", True),
            model(732, row, 100, "ref_model", False),
            arrow((678, out), (678, low)),
            arrow((782, out), (782, low)),
            label(730, out + 28, "how likely\nare both?", 96, SMALL),
            box(630, low, 202, 48, "loss: is the gap wider\nthan the reference's?", size=SMALL),
            arrow((630, low + 24), (608, low + 24), (608, row + 28), (630, row + 28), colour=POLICY),
            f'<rect x="20" y="382" width="20" height="18" rx="4" fill="{PALE[POLICY]}" stroke="{POLICY}" {stroke()}/>',
            label(48, 396, "learns", 60, TEXT, anchor="start"),
            f'<rect x="116" y="382" width="20" height="18" rx="4" fill="{PALE[REFERENCE]}" stroke="{REFERENCE}" '
            f"{stroke()}/>",
            label(144, 396, "only reads", 90, TEXT, anchor="start"),
            line((240, 391), (264, 391), colour=POLICY),
            label(272, 396, "trains", 60, TEXT, anchor="start"),
            label(830, 396, "PPO writes answers in every step, DPO reads pairs.", 470, TEXT, anchor="end", bold=True),
        ],
    )


def orpo_kto_spin() -> str:
    """Notebook 06: what a row of DPO, ORPO, KTO and SPIN holds, what each loss compares, which models it holds."""
    x, w = [138, 316, 494, 672], 168  # the four columns
    top, said, low = 62, 214, 294  # upper edges: what a row holds, what is compared, the models

    def answer(column: int, place: int, text: str, colour: str) -> str:
        return box(x[column], top + 56 * place, w, 44, text, colour, PALE[colour], size=SMALL)

    def model(column: int, place: int, name: str, colour: str) -> str:
        return box(x[column], low + 42 * place, w, 34, name, colour, PALE[colour], size=SMALL)

    def middle(column: int, up: float, text: str, colour: str = INK) -> str:
        return label(x[column] + w / 2, up, text, w, SMALL, colour)

    names = ["DPO", "ORPO", "KTO", "SPIN"]
    compared = [
        "how far both moved\nfrom the reference",
        "the odds of both;\nSFT on the chosen one",
        "its move from the\nreference with z0",
        "the same as DPO,\nround after round",
    ]
    learns, reads = "policy: learns", "ref_model: reads"
    return picture(
        "orpo_kto_spin",
        424,
        "What DPO, ORPO, KTO and SPIN need",
        "Four columns. DPO: people say which of two answers is better; the loss compares how far both moved from the "
        "reference; it holds the policy, which learns, and ref_model, which only reads. ORPO: the same pairs; the loss "
        "compares the odds of both answers and adds SFT on the chosen one; it holds the policy alone. KTO: people say "
        "of one answer whether it is good or bad; the loss compares its move from the reference with z0, the average "
        "move of answers to other prompts; policy and ref_model. SPIN: people write answers and judge nothing, the "
        "rejected answer is the model's own; the loss is DPO's, round after round; ref_model is the round before. "
        "With LoRA the reference is no second copy.",
        [
            *[label(left + w / 2, 36, name, w, BIG, bold=True) for left, name in zip(x, names, strict=True)],
            label(20, top + 20, "A row\nholds", 110, TEXT, anchor="start", bold=True),
            label(20, said + 14, "The loss\ncompares", 110, TEXT, anchor="start", bold=True),
            label(20, low + 22, "Models\nin memory", 110, TEXT, anchor="start", bold=True),
            *[answer(column, 0, "the better answer", CHOSEN) for column in (0, 1)],
            *[answer(column, 1, "the worse answer", REJECTED) for column in (0, 1)],
            *[middle(column, top + 122, "a pair, compared") for column in (0, 1)],
            box(x[2], top, w, 44, "", INK),
            label(x[2] + 14, top + 27, "an answer", 84, SMALL, anchor="start"),
            mark(x[2] + w - 52, top + 22, True),
            mark(x[2] + w - 20, top + 22, False),
            middle(2, top + 76, "good or bad?"),
            middle(2, top + 122, "a thumb"),
            answer(3, 0, "people's answer", CHOSEN),
            answer(3, 1, "the model's answer", REJECTED),
            middle(3, top + 122, "no judgement"),
            line((20, said - 14), (840, said - 14), colour=EDGE),
            *[middle(column, said + 14, text) for column, text in enumerate(compared)],
            line((20, low - 18), (840, low - 18), colour=EDGE),
            *[model(column, 0, learns, POLICY) for column in range(4)],
            *[model(column, 1, reads, REFERENCE) for column in (0, 2)],
            middle(1, low + 64, "no reference", REFERENCE),
            model(3, 1, "last round's policy", REFERENCE),
            label(840, low + 104, "With LoRA the reference is no second copy.", 560, SMALL, REFERENCE, anchor="end"),
        ],
    )


def verifiable_rewards() -> str:
    """Notebook 07: GRPO with a check: a group of answers, rewards, advantages, the update; the models in memory."""
    start = "SELECT COUNT(*) FROM orders\n"
    group = [  # the answer without its beginning, the check's verdict, its reward
        ("WHERE minutes>45 AND month=5", "right rows", 1),
        ("WHERE minutes>45", "wrong rows", 0),
        ("WHERE late=1 AND month=5", "does not run", 0),
        ("WHERE month=5 AND minutes>45", "right rows", 1),
    ]
    rewards = [reward for _, _, reward in group]
    mean, std = fmean(rewards), stdev(rewards)
    top, gap, high = 70, 56, 46  # the rows of the group
    x = [190, 472, 622, 680, 760]  # answers, check, rewards, mean and std, advantages
    bottom, update, low = top + 3 * gap + high, 374, 438
    middle = (top + bottom) / 2

    def title(left: float, y: float, n: int, text: str) -> str:
        return number(left + 12, y - 6, n) + "\n" + label(left + 32, y, text, 200, BIG, anchor="start", bold=True)

    def policy(y: float, does: str) -> str:
        words = label(87, y + 44, does, 118, SMALL)
        return "\n".join(
            [box(20, y, 134, 56, "", POLICY, PALE[POLICY]), label(87, y + 23, "policy", 118, bold=True), words]
        )

    def row(i: int) -> str:
        where, verdict, reward = group[i]
        y, colour = top + gap * i + high / 2, CHOSEN if reward else REJECTED
        return "\n".join(
            [
                arrow((172, y), (x[0], y)),
                box(x[0], y - high / 2, 256, high),
                label(x[0] + 9, y - 5, start + where, 240, SMALL, anchor="start", mono=True),
                arrow((x[0] + 256, y), (x[1], y)),
                box(x[1] + 8, y - 15, 114, 30, verdict, colour, PALE[colour], size=SMALL),
                arrow((x[1] + 130, y), (x[2], y)),
                box(x[2], y - 17, 34, 34, str(reward), colour, PALE[colour], size=BIG, bold=True),
                arrow((x[2] + 34, y), (x[3], y)),
                arrow((x[3] + 60, y), (x[4], y)),
                box(x[4], y - 17, 72, 34, f"{(reward - mean) / std:+.2f}", colour, PALE[colour], bold=True),
                line((x[4] + 72, y), (844, y), colour=POLICY),
            ]
        )

    return picture(
        "verifiable_rewards",
        502,
        "GRPO with a check: sample, check, compare, update",
        "A prompt, how many late orders in May, goes into the policy. 1 Sample: the policy writes a group of four "
        "queries. 2 Check: each query runs on ten databases. Two return the right rows, one forgets the month and "
        "returns wrong rows, one does not run, so the rewards are 1, 0, 0, 1. 3 Compare: a reward minus the group's "
        f"mean, {mean:.2f}, over its standard deviation, {std:.2f}, is the advantage: {(1 - mean) / std:+.2f} for the "
        f"right queries, {-mean / std:+.2f} for the others. In a group that is all wrong or all right every advantage "
        "is 0: it teaches nothing. 4 Update: right answers become likelier, wrong ones rarer, and after each step the "
        "policy that samples has the new weights. In memory: the policy, which learns and samples; its copy only if "
        "a server samples; ref_model only if beta is above 0; no reward_model and no value_model.",
        [
            label(20, 34, "Prompts", 134, BIG, anchor="start", bold=True),
            box(32, 46, 122, 66),
            box(26, 50, 122, 66),
            box(20, 54, 122, 66, "How many\nlate orders\nin May?", bold=True),
            arrow((87, 120), (87, 149)),
            policy(middle - 28, "samples"),
            line((154, middle), (172, middle)),
            line((172, top + high / 2), (172, bottom - high / 2)),
            title(x[0], 34, 1, "Sample"),
            label(x[0], 58, "a group of answers", 256, SMALL, anchor="start"),
            title(x[1], 34, 2, "Check"),
            label(x[1], 58, "run each query", 130, SMALL, anchor="start"),
            box(x[1], top, 130, bottom - top),
            title(x[2], 34, 3, "Compare"),
            label(x[2] + 17, 58, "reward", 60, SMALL),
            label(x[4] + 72, 58, "advantage", 90, SMALL, anchor="end"),
            box(x[3], top, 60, bottom - top),
            label(x[3] + 30, 122, f"minus\nmean\n{mean:.2f}", 56, SMALL),
            label(x[3] + 30, 206, f"over\nstd\n{std:.2f}", 56, SMALL),
            *map(row, range(4)),
            cylinder(x[1], 302, 38, 42, "1"),
            label(x[1] + 65, 332, "…", 30, BIG),
            cylinder(x[1] + 92, 302, 38, 42, "10"),
            label(x[1] + 65, 363, "ten databases", 130, SMALL),
            arrow((x[1] + 65, 318), (x[1] + 65, bottom)),
            table(x[2], 304, [22] * 4, [["0"] * 4], [REJECTED], high=22),
            arrow((x[2] + 88, 315), (x[4] + 72 - 88, 315)),
            table(x[4] + 72 - 88, 304, [22] * 4, [["0"] * 4], [REFERENCE], high=22),
            label(x[2], 344, "a group all wrong or all\nright teaches nothing", 216, SMALL, anchor="start"),
            line((844, top + high / 2), (844, update), colour=POLICY),
            arrow((844, update), (154, update), colour=POLICY),
            title(x[0], 322, 4, "Update"),
            label(x[0], 344, "right answers become likelier,\nwrong ones rarer", 256, SMALL, anchor="start"),
            policy(update - 28, "learns"),
            arrow((46, update - 28), (46, middle + 28), colour=POLICY),
            label(56, 264, "new weights\nafter each step", 120, SMALL, anchor="start"),
            line((20, low - 16), (840, low - 16), colour=EDGE),
            label(20, low + 18, "Models\nin memory", 110, TEXT, anchor="start", bold=True),
            box(130, low, 130, 44, "policy: learns\nand samples", POLICY, PALE[POLICY], size=SMALL),
            box(272, low, 190, 44, "its copy: only if\na server samples", POLICY, dashed=True, size=SMALL),
            box(474, low, 190, 44, "ref_model: only if\nbeta > 0", REFERENCE, dashed=True, size=SMALL),
            label(680, low + 18, "no reward_model,\nno value_model", 160, SMALL, REFERENCE, anchor="start"),
        ],
    )


def modern_stack() -> str:
    """Notebook 08: one run from rows to steps, and what each tool changes on the way unless it is told not to."""
    x, w, top, first, high = [164, 302, 440, 578, 716], 124, 56, 184, 48  # the five stages; the tools' rows
    tools = ["TRL", "trl sft", "Unsloth", "Axolotl", "LLaMA-Factory", "OpenAI API"]

    def stage(i: int, title: str, *inside: str) -> str:
        head = label(x[i] + w / 2, top + 22, title, w - PAD, TEXT, bold=True)
        return "\n".join([box(x[i], top, w, 96, "", POLICY), head, *inside])

    def changes(tool: str, i: int, text: str, wide: int = 1) -> str:
        y = first + high * tools.index(tool) + 2
        return box(x[i], y, x[i + wide - 1] + w - x[i], high - 6, text, REJECTED, PALE[REJECTED], size=SMALL)

    lines = [line((20, first + high * i - 1), (840, first + high * i - 1), colour=EDGE) for i in range(7)]
    names = [
        label(20, first + high * i + 28, name, 140, TEXT, anchor="start", bold=True) for i, name in enumerate(tools)
    ]
    return picture(
        "modern_stack",
        518,
        "One run, many tools: rows, token ids, loss mask, loss, steps, and what each tool changes",
        "Above, one run: rows become token ids, the loss mask marks those that are learned, from them comes the "
        "loss, and from the losses the steps. Below, what each tool does otherwise unless it is told not to. TRL: "
        "nothing, it is the reference. trl sft: LoRA is off unless it is asked for, and then has a dropout of 5 "
        "percent, and the seed is set after "
        "lora_A is drawn. Unsloth: on a GPU the loss is computed with kernels of its own. Axolotl: rows "
        "are shuffled once more, ids padded to multiples of 64, a line break is left out of the mask, the seed is set "
        "too late, mistyped keys vanish silently. LLaMA-Factory: earlier answers of a chat count too, "
        "another schedule, activations computed again. OpenAI: all behind the rows is hidden, but for epochs, batch, "
        "seed, DPO's beta and a factor on the rate.",
        [
            label(20, 36, "One run, whoever starts it", 400, BIG, anchor="start", bold=True),
            stage(0, "rows", table(x[0] + 12, top + 36, [50, 50], [["", ""]] * 3, [INK, POLICY, POLICY], high=16)),
            stage(1, "token ids", table(x[1] + 8, top + 44, [27] * 4, [["1", "83", "9", "2"]], [INK])),
            stage(
                2,
                "loss mask",
                table(x[2] + 8, top + 44, [27] * 2, [["0", "0"]], [REFERENCE]),
                table(x[2] + 62, top + 44, [27] * 2, [["1", "1"]], [POLICY]),
            ),
            stage(3, "loss", label(x[3] + w / 2, top + 54, "of the tokens\nwith a 1", w - PAD, SMALL)),
            stage(4, "steps", curve(x[4] + 22, top + 36, 80, 46, held_out=False)),
            *[arrow((x[i] + w, top + 48), (x[i + 1], top + 48)) for i in range(4)],
            label(20, first - 12, "What a tool does otherwise, unless it is told not to", 600, TEXT, anchor="start"),
            *lines,
            *names,
            label(x[0], first + 28, "nothing: the others are compared with it", 600, SMALL, anchor="start"),
            changes("trl sft", 3, "seed is set\ntoo late"),
            changes("trl sft", 4, "LoRA is off,\ndropout 5 %"),
            changes("Unsloth", 3, "kernels of\nits own"),
            changes("Axolotl", 0, "shuffled\nonce more"),
            changes("Axolotl", 1, "padded to\n64, 128, ..."),
            changes("Axolotl", 2, "a line break\nis left out"),
            changes("Axolotl", 3, "seed is set\ntoo late"),
            changes("Axolotl", 4, "typos vanish\nsilently"),
            changes("LLaMA-Factory", 2, "old answers\ncount too"),
            changes("LLaMA-Factory", 4, "other rates,\nrecomputes"),
            changes("OpenAI API", 1, "hidden, but for epochs, batch, seed, beta and a factor on the rate", 4),
            label(
                20, 504, "Compare ids, then masks, then losses. Only then speed.", 600, TEXT, anchor="start", bold=True
            ),
        ],
    )


def serving() -> str:
    """Notebook 09: requests with and without adapters, one base, and the batch that changes from step to step."""
    asks = [("“late orders in Pune?”", "adapter: ask", POLICY), ("“my food is cold”", "adapter: triage", CHOSEN),
            ("“hello”", "no adapter", REFERENCE)]  # fmt: skip
    says = ["SELECT COUNT(*) ...", '{"intent": ...}', "Hello! How ..."]
    tops = [62, 130, 198]
    middle = 228  # left edge of the server
    slots = [[(0, 3, 0), (5, 3, 2)], [(1, 5, 1), (8, 4, 0)], [(2, 2, 0), (4, 6, 1)]]  # slot: (step, tokens, kind)
    left, cell, below = 148, 40, 330

    def request(i: int) -> str:
        words, adapter, colour = asks[i]
        y = tops[i]
        parts = [
            box(20, y, 182, 56, "", colour, PALE[colour]),
            label(32, y + 24, words, 168, SMALL, anchor="start"),
            label(32, y + 45, adapter, 168, SMALL, anchor="start", bold=True),
            arrow((202, y + 28), (middle, y + 28), colour=colour),
            arrow((middle + 400, y + 28), (654, y + 28), colour=colour),
            box(654, y + 8, 186, 40, says[i], colour, PALE[colour], size=SMALL, mono=True),
        ]
        return "\n".join(parts)

    def tokens(slot: int, step: int, count: int, kind: int) -> str:
        colour, y = asks[kind][2], below + 30 * slot
        parts = []
        for k in range(count):
            x = left + cell * (step + k)
            fill = colour if k == 0 else PALE[colour]
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{cell - 4}" height="22" fill="{fill}" stroke="{colour}" {stroke()}/>'
            )
        return "\n".join(parts)

    return picture(
        "serving",
        470,
        "One base model serves several adapters, and its batch changes from step to step",
        "Three requests come in at the same moment: one names the adapter ask, one the adapter triage, one none. One "
        "copy of the base weights W serves all three. Beside it lie the two thin adapters, B times A, and each request "
        "uses its own. Below, time runs to the right in three slots. The first cell of a request is the prefill of its "
        "prompt, each further cell one token. A request that ends leaves its slot at once, and one that waits takes it "
        "at the next step: continuous batching. The time to the first token is waiting plus prefill.",
        [
            label(20, 38, "Requests", 180, BIG, anchor="start", bold=True),
            label(middle, 38, "One server", 300, BIG, anchor="start", bold=True),
            label(654, 38, "Answers", 180, BIG, anchor="start", bold=True),
            *map(request, range(3)),
            box(middle, 62, 400, 192),
            matrix(middle + 24, 86, 144, 144, "W\none copy\nof the base", REFERENCE),
            matrix(middle + 198, 86, 20, 62, "B", POLICY),
            matrix(middle + 228, 86, 62, 20, "A", POLICY),
            label(middle + 302, 122, "ask", 90, SMALL, POLICY, anchor="start", bold=True),
            matrix(middle + 198, 168, 20, 62, "B", CHOSEN),
            matrix(middle + 228, 168, 62, 20, "A", CHOSEN),
            label(middle + 302, 204, "triage", 90, SMALL, CHOSEN, anchor="start", bold=True),
            line((20, 282), (840, 282), colour=EDGE),
            label(20, 312, "Continuous batching", 240, BIG, anchor="start", bold=True),
            *[label(left - 16, below + 16 + 30 * i, f"slot {i + 1}", 100, SMALL, anchor="end") for i in range(3)],
            *[tokens(i, *each) for i, slot in enumerate(slots) for each in slot],
            arrow((left, 434), (left + 12 * cell, 434)),
            label(left, 456, "time: one step of the server a column", 400, SMALL, anchor="start"),
            label(652, 348, "dark: prefill of a prompt", 190, SMALL, anchor="start"),
            label(652, 378, "pale: one token each", 190, SMALL, anchor="start"),
            label(652, 408, "who is done leaves,\nwho waits joins", 190, SMALL, anchor="start"),
        ],
    )


def parallelism() -> str:
    """Notebook 09: six ways to share a model and its rows out to four GPUs, and what travels between them."""
    wide, high = 268, 236
    rows = ["rows a", "rows b", "rows c", "rows d"]
    panels = [  # title, strips of the model that each GPU has, whether they are columns, its data, what it has, travels
        ("DDP", [range(4)] * 4, False, rows, "all weights", "gradients, once a step"),
        ("FSDP, ZeRO-3", [[0], [1], [2], [3]], False, rows, "a quarter of each tensor",
         "weights twice, gradients\nonce a step"),
        ("HSDP", [[0, 1], [2, 3]] * 2, False, rows, "a half, in two machines",
         "weights in a machine,\ngradients between them"),
        ("tensor parallel", [[0], [1], [2], [3]], True, ["rows a"] * 4, "a quarter of each matrix",
         "activations, in each layer\nseveral times"),
        ("context parallel", [range(4)] * 4, False, ["a, 1/4", "a, 2/4", "a, 3/4", "a, 4/4"], "all, and part of a row",
         "keys and values, in each\nlayer"),
        ("expert parallel", [[0], [1], [2], [3]], True, rows, "a quarter of the experts",
         "tokens to their experts\nand back, in each layer"),
    ]  # fmt: skip

    def gpu(x: float, y: float, strips, columns: bool, data: str) -> str:
        parts = [box(x, y, 56, 92, "", REFERENCE)]
        for i in range(4):
            dx, dy, w, h = (9.5 * i, 0, 9.5, 38) if columns else (0, 9.5 * i, 38, 9.5)
            fill = POLICY if i in strips else WHITE
            parts.append(
                f'<rect x="{x + 9 + dx:g}" y="{y + 10 + dy:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
                f'stroke="{POLICY}" {stroke()}/>'
            )
        parts.append(label(x + 28, y + 76, data, 52, SMALL))
        return "\n".join(parts)

    def panel(i: int) -> str:
        title, strips, columns, data, has, travels = panels[i]
        x, y = 20 + 276 * (i % 3), 20 + 246 * (i // 3)
        parts = [box(x, y, wide, high, "", EDGE), label(x + 14, y + 28, title, 240, TEXT, anchor="start", bold=True)]
        parts += [gpu(x + 14 + 62 * k, y + 44, strips[k], columns, data[k]) for k in range(4)]
        if title == "HSDP":
            parts += [line((x + 14 + 124 * k, y + 148), (x + 132 + 124 * k, y + 148)) for k in range(2)]
        for dy, name, text, colour in ((172, "has", has, POLICY), (194, "travels", travels, REJECTED)):
            parts.append(label(x + 14, y + dy, name, 58, SMALL, colour, anchor="start", bold=True))
            parts.append(label(x + 76, y + dy, text, 186, SMALL, anchor="start"))
        return "\n".join(parts)

    return picture(
        "parallelism",
        522,
        "Six ways to share a model and its rows out to four GPUs",
        "Each GPU is a box with the model as four strips, blue where it holds them, and below the data that it works "
        "on. DDP: the whole model everywhere, other rows; gradients travel once a step. FSDP or ZeRO-3: a quarter of "
        "each layer's weights, other rows; weights travel twice, gradients once a step. HSDP: two machines of two "
        "GPUs; weights are shared out and travel inside a machine, gradients also between the machines. Tensor "
        "parallel: each matrix is cut in four columns, all work on the same rows; activations travel several times a "
        "layer. Context parallel: one long row is cut in four; keys and values travel once a layer. Expert parallel: "
        "each GPU holds a quarter of the experts; tokens travel to their experts and back in each MoE layer.",
        [panel(i) for i in range(6)],
    )


def why_fine_tune() -> str:
    """Notebook 01: one call, and the seven places where it can be made better."""
    top, high = 92, 74  # of the row of boxes

    def place(x: float, y: float, w: float, h: float, n: int, text: str, colour: str) -> str:
        body = box(x, y, w, h, text, colour, PALE[colour], size=SMALL)
        return f"{body}\n{number(x + 4, y - 2, n)}"

    middle = top + high / 2
    parts = [
        box(12, middle - 22, 98, 44, "a question"),
        arrow((110, middle), (130, middle)),
        place(130, top, 152, high, 1, "a better prompt:\ninstruction and\nexamples", CHOSEN),
        arrow((282, middle), (304, middle)),
        place(304, top, 152, high, 2, "pages: those that\na search finds, or\nall, cached", CHOSEN),
        arrow((456, middle), (478, middle)),
        box(478, 40, 186, 148, "", INK),
        label(571, 64, "the model", 170, BIG, bold=True),
        place(492, 82, 158, 40, 3, "larger or newer", CHOSEN),
        place(492, 136, 158, 40, 4, "fine-tuned", POLICY),
        arrow((664, middle), (686, middle)),
        place(686, top, 72, high, 5, "only a\nfitting\nform", CHOSEN),
        arrow((758, middle), (774, middle)),
        box(774, middle - 22, 76, 44, "answer"),
        arrow((541, 188), (541, 232)),
        arrow((601, 232), (601, 188)),
        place(484, 232, 174, 44, 6, "tools: a query, a sum", CHOSEN),
        arrow((61, middle + 22), (61, 322), (304, 322)),
        place(304, 300, 346, 44, 7, "a program: rules, search, a small classifier", INK),
        arrow((650, 322), (810, 322), (810, middle + 22)),
    ]
    return picture(
        "why_fine_tune",
        362,
        "One call, and seven places where it can be made better",
        "A question goes through the prompt, 1 a better instruction and examples, and past pages, 2 those that a "
        "search finds or all of them cached, into the model. The model can be 3 a larger, newer one or 4 fine-tuned. "
        "Before the answer 5 only a fitting form is let through. 6 tools such as a query or a sum are called by the "
        "model. "
        "7 a program leads from the question to the answer without any model.",
        parts,
    )


def read_per_call() -> str:
    """Notebook 01: what a prompt is made of in four methods: what stays the same can be cached, the rest can't."""
    same, new = CHOSEN, REJECTED
    rows = [
        (
            "few-shot prompt",
            [("instruction", 110, same), ("the same examples", 250, same), ("question", 90, new)],
        ),
        ("retrieval", [("instruction", 110, same), ("the pages found", 200, new), ("question", 90, new)]),
        ("all pages", [("instruction", 110, same), ("the whole handbook", 390, same), ("question", 90, new)]),
        ("fine-tuned", [("short", 60, same), ("question", 90, new)]),
    ]
    parts = []
    for i, (name, pieces) in enumerate(rows):
        x, y = 214, 26 + 54 * i
        parts.append(label(198, y + 25, name, 180, TEXT, anchor="end", bold=True))
        for text, wide, colour in pieces:
            parts.append(box(x, y, wide, 38, text, colour, PALE[colour], size=SMALL))
            x += wide + 4
    for x, colour, text in ((214, same, "the same in every call: cached"), (500, new, "new in every call: read anew")):
        parts.append(box(x, 250, 18, 18, "", colour, PALE[colour]))
        parts.append(label(x + 28, 264, text, 250, SMALL, anchor="start"))
    return picture(
        "read_per_call",
        286,
        "What one call reads",
        "Four prompts as bars, lengths not to scale. Examples in the prompt: instruction and examples are the same in "
        "every call and can be cached, the question is new. Retrieval: the instruction is the same, the pages found "
        "and the question are new. All pages: instruction and the whole handbook are the same, the question is new. "
        "Fine-tuned: a short instruction, and the question is new.",
        parts,
    )


def schema_tokens() -> str:
    """Notebook 01: a schema strikes tokens out, the model ranks the rest; lengths are a sketch."""
    tokens = [("soon", 190, False), ("normal", 150, True), ("I", 120, False), ("high", 70, True), ("low", 30, True)]
    parts = [
        label(20, 38, "what stands there so far", 230, SMALL, anchor="start", colour=REFERENCE),
        box(20, 96, 200, 44, '{"urgency": "', INK, mono=True),
        arrow((220, 118), (262, 118)),
        label(282, 38, "the model's own ranking of the next token", 380, SMALL, anchor="start", colour=REFERENCE),
        label(648, 38, "the schema", 100, SMALL, colour=REFERENCE),
    ]
    for i, (token, wide, fits) in enumerate(tokens):
        y, colour = 56 + 32 * i, CHOSEN if fits else REJECTED
        parts += [
            label(352, y + 16, token, 80, TEXT, anchor="end", mono=True),
            f'<rect x="366" y="{y}" width="{wide}" height="22" fill="{PALE[colour]}" stroke="{colour}" {stroke()}/>',
            mark(648, y + 11, fits),
        ]
    parts += [arrow((664, 99), (716, 99)), box(716, 77, 124, 44, "normal", CHOSEN, PALE[CHOSEN], mono=True, bold=True)]
    parts.append(label(778, 146, "the likeliest\nof those that fit", 150, SMALL))
    return picture(
        "schema_tokens",
        228,
        "A schema strikes tokens out, and the model ranks the rest",
        "So far the answer is a brace and the key urgency. The model ranks the next tokens: soon, normal, I, high, "
        "low. The schema strikes out soon and I, because only high, normal and low fit. The likeliest of these, "
        "normal, is written, whether it is right or not. The bars are a sketch.",
        parts,
    )


def distillation() -> str:
    """Notebook 01: a large model writes rows, a check drops the wrong ones, a small model is trained on the rest."""
    top, high = 58, 74
    middle = top + high / 2
    boxes = [
        (16, 116, "your own\ninputs", INK),
        (158, 122, "a large model\nanswers them", REFERENCE),
        (306, 116, "rows: input\nand answer", INK),
        (448, 130, "your scorer, or\na person, looks", CHOSEN),
        (604, 120, "a small model\nis trained", POLICY),
        (750, 94, "and is\nserved", POLICY),
    ]
    parts = [box(x, top, w, high, text, colour, PALE[colour], size=13) for x, w, text, colour in boxes]
    for (x, w, *_), (to, *_) in pairwise(boxes):
        parts.append(arrow((x + w, middle), (to, middle)))
    parts += [
        arrow((513, top + high), (513, 168)),
        mark(513, 184, False),
        label(534, 189, "dropped: the wrong ones", 260, SMALL, anchor="start"),
        label(219, 38, "expensive, but once", 190, SMALL, colour=REFERENCE),
        label(724, 38, "cheap, and on every call", 230, SMALL, colour=POLICY),
    ]
    return picture(
        "distillation",
        212,
        "Distillation: pay the large model once",
        "Your own inputs go to a large model, which answers them: expensive, but once. The rows, input and "
        "answer, are looked at by your scorer or a person, and the wrong ones are dropped. A small model is trained "
        "on the rest and is served: cheap, and on every call.",
        parts,
    )


def interview() -> str:
    """Notebook 11: the parts of an answer, and the four sittings of two days."""
    parts, steps = [label(20, 34, "An answer", 300, BIG, anchor="start", bold=True)], [
        "answer in the\nfirst sentence", "a number, with\nits condition", "where it\ncomes from", "stop",
        "answer the\nfollow-up"]  # fmt: skip
    for i, text in enumerate(steps):
        x, colour = 20 + 167 * i, INK if i == 3 else POLICY
        parts.append(box(x, 50, 152, 58, text, colour, PALE[colour], size=SMALL))
        parts += [arrow((x - 15, 79), (x, 79))] * bool(i)
    parts.append(label(20, 150, "Two days, 25 cards, four sittings", 500, BIG, anchor="start", bold=True))
    sittings = [
        ("two days before", "18:00", 13, 0),
        ("the day before", "9:00", 12, 13),
        ("the day before", "18:00", 0, 25),
        ("on the day", "2 h before", 0, 25),
    ]

    def card(x: float, y: float, colour: str) -> str:
        return f'<rect x="{x}" y="{y}" width="15" height="15" fill="{PALE[colour]}" stroke="{colour}" {stroke()}/>'

    for i, (day, hour, new, again) in enumerate(sittings):
        x = 24 + 178 * i
        parts += [number(x + 12, 180, i + 1), label(x + 32, 185, f"{day}\n{hour}", 150, SMALL, anchor="start")]
        for j, colour in enumerate([POLICY] * new + [REFERENCE] * again):
            weak = (i, j) in ((0, 4), (1, 7), (2, 0))
            parts.append(card(x + 19 * (j % 5), 222 + 19 * (j // 5), REJECTED if weak else colour))
        counted = " + ".join([f"{new} new"] * bool(new) + [f"{again} again"] * bool(again))
        parts.append(label(x, 336, counted, 180, SMALL, anchor="start"))
        parts += [arrow((x + 104, 268), (x + 166, 268), colour=REFERENCE)]
    parts.append(label(788, 273, "interview", 100, SMALL, bold=True))
    parts.append(card(24, 357, REJECTED))
    says = "rated “again” or “hard”: it comes back in the same sitting, until it is good"
    parts.append(label(48, 370, says, 780, SMALL, anchor="start"))
    return picture(
        "interview",
        392,
        "An answer, and two days of practice",
        "Above, the parts of an answer: answer in the first sentence, a number with its condition, where it comes "
        "from, stop, answer the follow-up. Below, four sittings: two days before at 18:00 with 13 new cards, the day "
        "before at 9:00 with 12 new ones and the 13 again, the day before at 18:00 with all 25 again, and on the day, "
        "two hours before, all 25 again. A card rated again or hard comes back in the same sitting, until it is good.",
        parts,
    )


DRAWINGS = {
    "adapter": adapter,
    "asking": asking,
    "distillation": distillation,
    "first_look": first_look,
    "interview": interview,
    "lora": lora,
    "lora_gradients": lora_gradients,
    "lora_mix": lora_mix,
    "lora_settings": lora_settings,
    "modern_stack": modern_stack,
    "nf4_byte": nf4_byte,
    "nf4_constants": nf4_constants,
    "orpo_kto_spin": orpo_kto_spin,
    "paging": paging,
    "parallelism": parallelism,
    "pipeline": pipeline,
    "qlora_memory": qlora_memory,
    "qlora_passes": qlora_passes,
    "read_per_call": read_per_call,
    "rlhf_dpo": rlhf_dpo,
    "schema_tokens": schema_tokens,
    "serving": serving,
    "thinking_rows": thinking_rows,
    "three_parts": three_parts,
    "verifiable_rewards": verifiable_rewards,
    "why_fine_tune": why_fine_tune,
    "your_data": your_data,
}


def build() -> dict[str, str]:
    """The text of each file, by its name."""
    return {f"{name}.svg": draw() for name, draw in DRAWINGS.items()}


if __name__ == "__main__":
    for name, svg in build().items():
        (FOLDER / name).write_text(svg, encoding="utf-8", newline="\n")
