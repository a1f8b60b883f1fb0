"""Sliders for what one picture cannot show; each has a still form for pages without a kernel, and a line of Python."""

import io
from collections.abc import Mapping

import ipywidgets
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ftlab import memory
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.scratch.lora import linear_shapes, total_parameters, trainable_parameters

# --- The rank explorer, notebook 02 -----------------------------------------------------------------------------------


def rank_kept(update: Tensor, r: int) -> float:
    """The share of the squared length of an update (out, in) that its best rank-r approximation keeps, 0 to 1.

    sum of the r largest squared singular values / sum of all: Eckart and Young 1936. The error that remains has the
    relative length sqrt(1 - kept), so "90% kept" still is an error of 32%.
    """
    squares = torch.linalg.svdvals(update.float()).square()
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


def rank_explorer(updates: Mapping[str, Tensor], architecture: Mapping, r: int = 16) -> "RankExplorer":
    """A slider over r for real weight updates (layer name -> (out, in)): what rank r keeps of each, and what it costs.

    The cost is that of this layer, and of all linear layers of `architecture`, a row of data/architectures. Without the
    slider: rank_kept(update, r), trainable_parameters(architecture, r, linear_shapes(architecture)).
    """
    return RankExplorer(updates, architecture, r)


class RankExplorer:
    """Made by `rank_explorer`. Move `layer` and `rank` (ipywidgets) by hand or by .value; `text` says what is shown."""

    def __init__(self, updates: Mapping[str, Tensor], architecture: Mapping, r: int) -> None:
        self._updates, self._architecture = updates, architecture
        names = list(updates)
        self.layer = ipywidgets.Dropdown(options=names, value=names[0], description="layer")
        self.rank = ipywidgets.IntSlider(r, 1, min(updates[names[0]].shape), description="r", continuous_update=False)
        self.text, self._picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
        self._widget = ipywidgets.VBox([self.layer, self.rank, self.text, self._picture])
        self.layer.observe(self._draw, "value")
        self.rank.observe(self._draw, "value")
        self._draw()

    def _draw(self, _=None) -> None:
        update = self._updates[self.layer.value]
        self.rank.max = min(update.shape)  # ipywidgets lowers the value with it
        r, kept = self.rank.value, rank_kept(update, self.rank.value)
        inputs_outputs, whole = sum(update.shape), self._architecture
        count = trainable_parameters(whole, r, linear_shapes(whole))
        self.text.value = (
            f"<b>r = {r}</b> keeps {kept:.1%} of this update's squared length; the error is {(1 - kept) ** 0.5:.0%} of "
            f"its length.<br>Here: {r} x ({update.shape[1]} + {update.shape[0]}) = {r * inputs_outputs:,} parameters "
            f"instead of {update.numel():,}.<br>On all linear layers of {whole['name']}: {count:,} parameters "
            f"({count / total_parameters(whole):.2%}), {2 * count / 1e6:,.0f} MB in bf16."
        )
        figure, ax = plt.subplots()
        plot_singular_values(ax, update, r)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        self._picture.value = png.getvalue()

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live widget and, where there is no kernel, its text."""
        still = f"<div>{self.layer.value}</div><div>{self.text.value}</div>"
        return {
            **self._widget._repr_mimebundle_(**kwargs),
            "text/html": still,
            "text/plain": f"Ranks of {self.layer.value}",
        }


# --- Will it fit?, notebook 03 ----------------------------------------------------------------------------------------

METHODS = {
    "full fine-tuning": {"r": 0},
    "LoRA, 16-bit base": {"r": 16},
    "QLoRA, int8": {"r": 16, "quantization": "int8"},
    "QLoRA, NF4": {"r": 16, "quantization": "nf4"},
    "QLoRA, NF4 + double quantization": {"r": 16, "quantization": "nf4-double"},
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
    bottom = dict.fromkeys(predicted.moments, 0.0)
    for kind, colour in KIND_COLOURS.items():
        sizes = [moment.kinds[kind] / 1e9 for moment in predicted.moments.values()]
        if max(sizes) > 0.002 * predicted.peak_bytes / 1e9:  # thinner than a line, and one entry less in the legend
            ax.bar(list(bottom), sizes, bottom=list(bottom.values()), color=colour, width=0.6, label=kind)
        bottom = {phase: low + size for (phase, low), size in zip(bottom.items(), sizes, strict=True)}
    if usable_bytes:
        ax.axhline(usable_bytes / 1e9, color="black", linewidth=1)
        ax.text(-0.45, usable_bytes / 1e9, f"usable: {usable_bytes / 1e9:.1f} GB", va="bottom", fontsize=8)
    ax.set(ylabel="GB", xlabel="phase of a training step")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, reverse=True)
    return ax


def will_it_fit(architecture: str = "Llama-3-8B", gpu: str = "RTX 4090") -> "WillItFit":
    """Sliders for a training step on a card: bars by phase, the peak, the longest row and the largest batch that fit.

    Without sliders: memory.fits(gpu, architecture, recipe), memory.max_length(...), memory.max_batch(...).
    """
    return WillItFit(architecture, gpu)


class WillItFit:
    """Made by `will_it_fit`. Set a control by hand or by `.value`; `text` says what is shown."""

    def __init__(self, architecture: str, gpu: str) -> None:
        self._architectures, self._gpus = memory.architectures(), memory.gpus()
        self.architecture = ipywidgets.Dropdown(
            options=list(self._architectures), value=architecture, description="model"
        )
        self.method = ipywidgets.Dropdown(options=list(METHODS), value=list(METHODS)[-1], description="method")
        self.gpu = ipywidgets.Dropdown(options=list(self._gpus), value=gpu, description="card")
        self.batch = ipywidgets.IntSlider(1, 1, 32, description="rows", continuous_update=False)
        self.length = ipywidgets.SelectionSlider(
            options=[2**k for k in range(7, 16)], value=2048, description="tokens each", continuous_update=False
        )
        self.checkpointing = ipywidgets.Checkbox(True, description="gradient checkpointing")
        self.text, self._picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
        controls = (self.architecture, self.method, self.gpu, self.batch, self.length, self.checkpointing)
        self._widget = ipywidgets.VBox([*controls, self.text, self._picture])
        for control in controls:
            control.observe(self._draw, "value")
        self._draw()

    @property
    def recipe(self) -> memory.Recipe:
        return memory.Recipe(
            **METHODS[self.method.value],
            batch_size=self.batch.value,
            max_length=self.length.value,
            gradient_checkpointing=self.checkpointing.value,
        )

    def _draw(self, _=None) -> None:
        architecture, gpu, recipe = (
            self._architectures[self.architecture.value],
            self._gpus[self.gpu.value],
            self.recipe,
        )
        predicted = memory.estimate(architecture, recipe)
        verdict = "fits" if predicted.fits(gpu) else "does not fit"
        peak, usable = predicted.peak_bytes / 1e9, gpu.usable_bytes / 1e9
        longest = memory.max_length(gpu, architecture, recipe)
        largest = memory.max_batch(gpu, architecture, recipe)
        self.text.value = (
            f"<b>{architecture.name}, {self.method.value}, {recipe.batch_size} x {recipe.max_length:,} tokens: "
            f"{verdict}</b> on {gpu.name}.<br>Peak {peak:.1f} GB, in the {predicted.peak_phase} phase, of {usable:.1f} "
            f"usable.<br>Longest rows at this batch: {longest:,} tokens; "
            f"largest batch at this length: {largest:,} rows."
        )
        figure, ax = plt.subplots(figsize=(6, 3.2))
        plot_phases(ax, predicted, gpu.usable_bytes)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        self._picture.value = png.getvalue()

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live widget and, where there is no kernel, its text."""
        bundle = self._widget._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": f"<div>{self.text.value}</div>", "text/plain": "Will it fit?"}
