"""Sliders for what one picture cannot show; each has a still form for pages without a kernel, and a line of Python."""

import io
import math
import re
from collections.abc import Mapping

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ftlab import memory
from ftlab.classroom import page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.scratch.lora import linear_shapes, total_parameters, trainable_parameters

# --- SVG, 580 x 300 pixels: a live picture in a millisecond, where matplotlib takes 60 -------------------------------


def _svg(drawn: list[str]) -> str:
    look = 'width="580" height="300" font-family="sans-serif" font-size="12"'
    ground = '<rect width="580" height="300" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 300" {look}>{ground}{"".join(drawn)}</svg>'


def _words(x: float, y: float, text: str, more: str = 'text-anchor="middle"') -> str:
    return f'<text x="{x:.0f}" y="{y:.1f}" {more}>{text}</text>'


def _svg_tick(x: int, width: int, y: float, value: float) -> str:
    """A light line at this height, its value to the left."""
    line = f'<path d="M{x} {y:.1f}h{width}" stroke="#e6e6e6"/>'
    return line + _words(x - 6, y + 4, f"{value:g}", 'text-anchor="end"')


def _svg_label(x: int, y: float, colour: str, text: str) -> str:
    """A line of the legend."""
    box = f'<rect x="{x}" y="{y:.0f}" width="22" height="11" fill="{colour}"/>'
    return box + _words(x + 28, y + 10, text, 'text-anchor="start"')


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to at most top, four to seven of them."""
    power = 10.0 ** math.floor(math.log10(top))
    step = next(step for step in (power / 10, power / 5, power / 2, power, 2 * power) if top / step < 7)
    return [step * i for i in range(int(top / step + 1e-3) + 1)]


# --- The rank explorer, notebook 02 -----------------------------------------------------------------------------------


def rank_kept(update: Tensor, r: int) -> float:
    """The share of the squared length of an update (out, in) that its best rank-r approximation keeps, 0 to 1.

    sum of the r largest squared singular values / sum of all: Eckart and Young 1936. The error that remains has the
    relative length sqrt(1 - kept), so "90% kept" still is an error of 32%.
    """
    return _kept(torch.linalg.svdvals(update.float()), r)


def _kept(singular_values: Tensor, r: int) -> float:
    squares = singular_values.square()
    return (squares[:r].sum() / squares.sum()).item()


def plot_singular_values(ax: Axes, update: Tensor, r: int) -> Axes:
    """The axes with the singular values of an update, the r largest in colour."""
    values = torch.linalg.svdvals(update.float())
    places = range(1, len(values) + 1)
    ax.bar(places[:r], values[:r], color=POLICY, width=1, label=f"kept by r = {r}")
    ax.bar(places[r:], values[r:], color=REFERENCE, width=1, label="lost")
    ax.set(xlabel="number of the singular value", ylabel="singular value of the update")
    ax.legend()
    return ax


def svg_singular_values(values: Tensor, r: int) -> str:
    """The picture of `plot_singular_values` as SVG: made in a few milliseconds, for a slider."""
    heights, n = values.tolist(), len(values)

    def level(height: float) -> float:
        return 240 - 215 * height / heights[0]

    def steps(first: int, last: int, colour: str) -> str:
        """The bars from `first` (0 for the largest) to before `last` as one shape."""
        tops = "".join(f"V{level(heights[i]):.2f}H{60 + 500 * (i + 1) / n:.2f}" for i in range(first, last))
        return f'<path d="M{60 + 500 * first / n:.2f} 240{tops}V240Z" fill="{colour}"/>'

    drawn = [_svg_tick(60, 500, level(tick), tick) for tick in _ticks(heights[0])]
    drawn += [_words(60 + 500 * (tick - 0.5) / n, 258, f"{tick:g}") for tick in _ticks(n)[1:] if tick % 1 == 0]
    drawn += [steps(0, min(r, n), POLICY), steps(min(r, n), n, REFERENCE)]
    drawn.append('<path d="M58 15V240h502" fill="none" stroke="black"/>')
    drawn += [_svg_label(420, 20, POLICY, f"kept by r = {r}"), _svg_label(420, 40, REFERENCE, "lost")]
    drawn.append(_words(310, 280, "number of the singular value"))
    drawn.append(_words(-128, 16, "singular value of the update", 'text-anchor="middle" transform="rotate(-90)"'))
    return _svg(drawn)


def rank_explorer(updates: Mapping[str, Tensor], architecture: Mapping, r: int = 16) -> "RankExplorer":
    """A slider over r for real weight updates (layer name -> (out, in)): what rank r keeps of each, and what it costs.

    The cost is that of this layer, and of all linear layers of `architecture`, a row of data/architectures. Without the
    slider: rank_kept(update, r), trainable_parameters(architecture, r, linear_shapes(architecture)); the picture is
    plot_singular_values(ax, update, r).
    """
    return RankExplorer(updates, architecture, r)


class RankExplorer:
    """Made by `rank_explorer`. Move `layer` and `rank` (ipywidgets) by hand or by .value; `text` says what is shown."""

    def __init__(self, updates: Mapping[str, Tensor], architecture: Mapping, r: int) -> None:
        self._updates, self._architecture = updates, architecture
        self._values = {name: torch.linalg.svdvals(update.float()) for name, update in updates.items()}
        names = list(updates)
        look = {"style": {"description_width": "90px"}, "layout": {"width": "420px"}}
        self.layer = ipywidgets.Dropdown(options=names, value=names[0], description="layer", **look)
        self.rank = ipywidgets.IntSlider(r, 1, min(updates[names[0]].shape), description="rank r", **look)
        self.text, self._picture = ipywidgets.HTML(), ipywidgets.HTML()
        keys = ipywidgets.Label(
            "With the keyboard: Tab to a control; Space opens the list, arrow keys and Page Up or Down move the slider."
        )
        self._widget = ipywidgets.VBox([keys, self.layer, self.rank, self.text, self._picture])
        self.layer.observe(self._draw, "value")
        self.rank.observe(self._draw, "value")
        self._draw()

    def _draw(self, _=None) -> None:
        update, values = self._updates[self.layer.value], self._values[self.layer.value]
        self.rank.max = min(update.shape)  # ipywidgets lowers the value with it
        r, whole = self.rank.value, self._architecture
        kept, everywhere = _kept(values, r), [_kept(other, r) for other in self._values.values()]
        count = trainable_parameters(whole, r, linear_shapes(whole))
        self.text.value = (
            f'<div role="status" style="line-height: 1.5"><b>r = {r}</b> keeps <b>{kept:.1%}</b> of the squared length '
            f"of this update; the error is {(1 - kept) ** 0.5:.0%} of its length. (The same r on each of the "
            f"{len(everywhere)} updates: {min(everywhere):.0%} to {max(everywhere):.0%}.)<br>"
            f"Here: {r} x ({update.shape[1]} + {update.shape[0]}) = {r * sum(update.shape):,} parameters "
            f"instead of {update.numel():,}.<br>On all linear layers of {whole['name']}: {count:,} parameters "
            f"({count / total_parameters(whole):.2%}), {2 * count / 1e6:,.0f} MB in bf16.</div>"
        )
        self._picture.value = self._image("svg+xml", svg_singular_values(values, r).encode())

    def _image(self, kind: str, data: bytes) -> str:
        says = f"The singular values of {self.layer.value}, the {self.rank.value} largest in blue, the rest in grey."
        return page.picture(kind, data, says)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live widget and, where there is no kernel, its text and picture."""
        figure, png = Figure(layout="constrained"), io.BytesIO()
        plot_singular_values(figure.subplots(), self._updates[self.layer.value], self.rank.value)
        figure.savefig(png, format="png")
        still = f"<div>{self.layer.value}</div>{self.text.value}{self._image('png', png.getvalue())}"
        plain = f"{self.layer.value}: {re.sub(r'<[^>]+>', ' ', self.text.value).strip()}"
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": still, "text/plain": plain}


# --- Will it fit?, notebook 03 ----------------------------------------------------------------------------------------

METHODS = {
    "full fine-tuning": {},
    "LoRA, 16-bit base": {"r": 16},
    "QLoRA, int8": {"r": 16, "load_in_8bit": True},
    "QLoRA, NF4": {"r": 16, "load_in_4bit": True},
    "QLoRA, NF4 + double quantization": {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
KIND_COLOURS = {
    "weights": REFERENCE,
    "constants": "#000000",
    "adapters": POLICY,
    "gradients": REJECTED,
    "optimizer": CHOSEN,
    "casts": "#56B4E9",
    "activations": "#E69F00",
    "loss": "#CC79A7",
    "temporary": "#F0E442",
}


def plot_phases(ax: Axes, predicted: memory.Memory, usable_bytes: int | None = None) -> Axes:
    """The axes with a stacked bar for the highest moment of each phase, in GB (10^9 bytes), and a line at the limit."""
    names, level = _phase_names(predicted), [0.0] * len(predicted.moments)
    for kind, sizes in _parts(predicted).items():
        sizes = [size / 1e9 for size in sizes]
        ax.bar(names, sizes, bottom=level, color=KIND_COLOURS[kind], width=0.6, label=kind)
        level = [low + size for low, size in zip(level, sizes, strict=True)]
    ax.set(ylabel="GB", xlabel="phase of a training step")
    if usable_bytes:
        ax.axhline(usable_bytes / 1e9, color="black", linewidth=1)
        ax.set_xlim(-1.4, len(names) - 0.5)  # a strip in front of the bars, for the words
        ax.text(-1.35, usable_bytes / 1e9, f"usable:\n{usable_bytes / 1e9:.1f} GB", va="bottom", fontsize=8)
        ax.set_ylim(0, 1.15 * max(predicted.peak_bytes, usable_bytes) / 1e9)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, reverse=True)
    return ax


def svg_phases(predicted: memory.Memory, usable_bytes: int) -> str:
    """The picture of `plot_phases` as SVG: made in under a millisecond, for a slider."""
    top = 1.15 * max(predicted.peak_bytes, usable_bytes)

    def level(size: float) -> float:
        return 250 - 235 * size / top

    drawn = [_words(18, 20, "GB"), *(_svg_tick(48, 402, level(1e9 * tick), tick) for tick in _ticks(top / 1e9))]
    below, parts = [0] * len(predicted.moments), _parts(predicted)
    for at, (kind, sizes) in enumerate(parts.items()):
        colour = KIND_COLOURS[kind]
        for i, size in enumerate(sizes):
            below[i] += size
            place = f'x="{138 + 82 * i}" y="{level(below[i]):.2f}" width="50" height="{250 - level(size):.2f}"'
            drawn.append(f'<rect {place} fill="{colour}"/>')
        drawn.append(_svg_label(462, 125 + 20 * (len(parts) / 2 - at), colour, kind))
    for i, name in enumerate(_phase_names(predicted)):
        drawn += [_words(163 + 82 * i, 268 + 16 * row, word) for row, word in enumerate(name.split("\n"))]
    y, left = level(usable_bytes), 'text-anchor="start"'
    drawn.append(f'<path d="M48 {y:.1f}h402M48 15V250h402" stroke="black" fill="none"/>')
    drawn += [_words(52, y - 19, "usable:", left), _words(52, y - 5, f"{usable_bytes / 1e9:.1f} GB", left)]
    return _svg(drawn)


def _parts(predicted: memory.Memory) -> dict[str, list[int]]:
    """Kind -> its bytes in each phase, from the bottom up, without kinds that would be thinner than a line."""
    sizes = {kind: [moment.kinds[kind] for moment in predicted.moments.values()] for kind in KIND_COLOURS}
    return {kind: each for kind, each in sizes.items() if max(each) > 0.002 * predicted.peak_bytes}


def _phase_names(predicted: memory.Memory) -> list[str]:
    return [f"{phase}\n{moment.total / 1e9:.1f} GB" for phase, moment in predicted.moments.items()]


def will_it_fit(architecture: str = "Llama-3-8B", gpu: str = "RTX 4090") -> "WillItFit":
    """Sliders for a training step on a card: bars by phase, the peak, the longest row and the largest batch that fit.

    Without sliders: memory.fits("RTX 4090", "Llama-3-8B", r=16, load_in_4bit=True), memory.max_length(...),
    memory.max_batch(...); the picture is plot_phases(ax, memory.estimate("Llama-3-8B", r=16), gpu.usable_bytes).
    """
    return WillItFit(architecture, gpu)


class WillItFit:
    """Made by `will_it_fit`. Set a control by hand or by `.value`; `text` says what is shown."""

    def __init__(self, architecture: str, gpu: str) -> None:
        self._architectures, self._gpus = memory.architectures(), memory.gpus()
        look = {"style": {"description_width": "90px"}, "layout": {"width": "340px"}}
        self.architecture = ipywidgets.Dropdown(
            options=list(self._architectures), value=architecture, description="model", **look
        )
        self.method = ipywidgets.Dropdown(options=list(METHODS), value=list(METHODS)[-1], description="method", **look)
        self.gpu = ipywidgets.Dropdown(options=list(self._gpus), value=gpu, description="card", **look)
        self.batch = ipywidgets.IntSlider(1, 1, 32, description="rows", **look)
        self.length = ipywidgets.SelectionSlider(
            options=[(f"{2**k:,}", 2**k) for k in range(7, 16)], value=2048, description="tokens a row", **look
        )
        self.checkpointing = ipywidgets.Checkbox(True, description="gradient checkpointing", **look)
        self.text, self._picture = ipywidgets.HTML(), ipywidgets.HTML()
        controls = (self.architecture, self.method, self.gpu, self.batch, self.length, self.checkpointing)
        keys = ipywidgets.HTML(  # in a closed list JupyterLab takes the arrows for itself, and goes to the next cell
            "With the keyboard: Tab to a control; Space opens a list, arrows and Enter choose; arrows move a slider."
        )
        self._widget = ipywidgets.VBox([keys, *controls, self.text, self._picture])
        for control in controls:
            control.observe(self._draw, "value")
        self._draw()

    @property
    def settings(self) -> dict:
        """The keyword arguments of memory.estimate."""
        return METHODS[self.method.value] | {
            "per_device_train_batch_size": self.batch.value,
            "max_length": self.length.value,
            "gradient_checkpointing": self.checkpointing.value,
        }

    def _draw(self, _=None) -> None:
        architecture, gpu = self._architectures[self.architecture.value], self._gpus[self.gpu.value]
        settings = self.settings
        predicted = memory.estimate(architecture, **settings)
        verdict = "fits" if predicted.peak_bytes <= gpu.usable_bytes else "does not fit"
        peak, usable = predicted.peak_bytes / 1e9, gpu.usable_bytes / 1e9
        longest = memory.max_length(gpu, architecture, **settings)
        largest = memory.max_batch(gpu, architecture, **settings)
        self.text.value = (
            f'<div role="status" style="line-height: 1.5"><b>{architecture.name}, {self.method.value}, '
            f"{self.batch.value} x {self.length.value:,} tokens: {verdict}</b> on {gpu.name}.<br>"
            f"Peak {peak:.1f} GB, in the {predicted.peak_phase} phase, of {usable:.1f} usable.<br>"
            f"Longest rows at this batch: {longest:,} tokens; largest batch at this length: {largest:,} rows.</div>"
        )
        self._picture.value = self._image(predicted, "svg+xml", svg_phases(predicted, gpu.usable_bytes).encode())

    def _image(self, predicted: memory.Memory, kind: str, data: bytes) -> str:
        says = "; ".join(name.replace("\n", " ") for name in _phase_names(predicted))
        return page.picture(kind, data, f"Bars by phase. {says}.")

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live widget and, where there is no kernel, its text and picture."""
        architecture, gpu = self._architectures[self.architecture.value], self._gpus[self.gpu.value]
        predicted, png = memory.estimate(architecture, **self.settings), io.BytesIO()
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        plot_phases(figure.subplots(), predicted, gpu.usable_bytes)
        figure.savefig(png, format="png")
        still = f"{self.text.value}{self._image(predicted, 'png', png.getvalue())}"
        plain = re.sub(r"<[^>]+>", " ", self.text.value).strip()
        return {**self._widget._repr_mimebundle_(**kwargs), "text/html": still, "text/plain": plain}
