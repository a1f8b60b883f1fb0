"""Sliders for what one picture cannot show; each has a still form for pages without a kernel, and a line of Python."""

import io
import math

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ftlab import memory
from ftlab.classroom import page
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED

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

    def _repr_mimebundle_(self, **_) -> dict:
        """The live widget and, where there is no kernel, its text and picture."""
        architecture, gpu = self._architectures[self.architecture.value], self._gpus[self.gpu.value]
        predicted, png = memory.estimate(architecture, **self.settings), io.BytesIO()
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        plot_phases(figure.subplots(), predicted, gpu.usable_bytes)
        figure.savefig(png, format="png")
        still = f"{self.text.value}{self._image(predicted, 'png', png.getvalue())}"
        return page.view(self._widget, still, page.bundle(self.text.value)["text/plain"])
