"""The sliders of notebook 03: what they say and draw is what ftlab.memory predicts."""

import re

import ipywidgets
import pytest
from shown import VIEW, Page, named, page_of

from ftlab import memory
from ftlab.classroom.widgets import KIND_COLOURS, METHODS, will_it_fit


def fields(widget) -> dict[str, ipywidgets.Widget]:
    kinds = (ipywidgets.Dropdown, ipywidgets.IntSlider, ipywidgets.SelectionSlider, ipywidgets.Checkbox)
    return {name: field for kind in kinds for name, field in named(widget, kind).items()}


def says(widget) -> str:
    return Page(page_of(widget)).open


def widths(widget) -> list[float]:
    """How long each bar is, in pixels: the limit, then the phases."""
    bars = re.findall(r"<div style=\"white-space: nowrap[^>]*>(.*?)</div>", page_of(widget))
    return [sum(map(float, re.findall(r"width: ([\d.]+)px", bar))) for bar in bars]


@pytest.mark.parametrize("method", METHODS)
def test_it_says_and_draws_what_memory_predicts(method):
    made = will_it_fit("Llama-3-8B", "RTX 4090")
    fields(made)["method"].value = method
    settings = METHODS[method] | {"per_device_train_batch_size": 1, "max_length": 2048, "gradient_checkpointing": True}
    predicted, usable = memory.estimate("Llama-3-8B", **settings), memory.gpus()["RTX 4090"].usable_bytes
    verdict = "fits" if memory.fits("RTX 4090", "Llama-3-8B", **settings) else "does not fit"
    assert f"{method}, 1 x 2,048 tokens: {verdict} on RTX 4090" in says(made)
    assert f"Peak {predicted.peak_bytes / 1e9:.1f} GB, in the {predicted.peak_phase} phase" in says(made)
    assert f"{memory.max_length('RTX 4090', 'Llama-3-8B', **settings):,} tokens; largest batch" in says(made)
    limit, *phases = widths(made)
    totals = [moment.total for moment in predicted.moments.values()]
    assert [phase / limit for phase in phases] == pytest.approx([total / usable for total in totals], rel=0.01)
    assert set(KIND_COLOURS) == set(memory.KINDS)


def test_each_control_changes_what_it_says():
    made = will_it_fit()
    fields(made)["method"].value = "full fine-tuning"
    assert "does not fit on RTX 4090" in says(made)
    for name, value, words in (
        ("card", "MI300X", ": fits on MI300X"), ("rows", 4, "4 x 2,048 tokens"), ("tokens", 1024, "4 x 1,024 tokens"),
        ("model", "Qwen3-0.6B", "Qwen3-0.6B, full fine-tuning"),
    ):  # fmt: skip
        fields(made)[name].value = value
        assert words in says(made)
    peak = re.search(r"Peak ([\d.]+)", says(made))[1]
    fields(made)["checkpointing"].value = False
    assert float(re.search(r"Peak ([\d.]+)", says(made))[1]) > float(peak)


def test_without_a_kernel_its_text_and_bars_are_there():
    bundle = will_it_fit()._repr_mimebundle_()
    assert VIEW in bundle and re.search(r"backward\s\d+\.\d GB", Page(bundle["text/html"]).open)
