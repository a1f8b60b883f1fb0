"""The widgets of ftlab.classroom through their sliders, their text and their still picture."""

import base64
import re
import xml.etree.ElementTree

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from shown import VIEW

from ftlab import memory
from ftlab.classroom.widgets import (
    KIND_COLOURS,
    METHODS,
    plot_phases,
    svg_phases,
    will_it_fit,
)

# --- Will it fit? -----------------------------------------------------------------------------------------------------


def test_will_it_fit_shows_what_memory_predicts():
    made = will_it_fit("Llama-3-8B", "RTX 4090")
    llama, card = memory.architectures()["Llama-3-8B"], memory.gpus()["RTX 4090"]
    predicted = memory.estimate(llama, **made.settings)
    assert made.settings["bnb_4bit_use_double_quant"] and made.settings["gradient_checkpointing"]
    assert f"Peak {predicted.peak_bytes / 1e9:.1f} GB, in the {predicted.peak_phase} phase" in made.text.value
    assert f"{memory.max_length(card, llama, **made.settings):,} tokens" in made.text.value
    assert "tokens: fits</b>" in made.text.value


def test_each_control_changes_the_settings_and_the_verdict():
    made = will_it_fit()
    picture = made._picture.value
    made.method.value = "full fine-tuning"
    assert "r" not in made.settings and "does not fit</b> on RTX 4090" in made.text.value
    assert made._picture.value != picture
    made.gpu.value = "MI300X"
    assert ": fits</b> on MI300X" in made.text.value
    made.batch.value, made.length.value, made.checkpointing.value = 4, 1024, False
    assert list(made.settings.values()) == [4, 1024, False]
    assert "4 x 1,024 tokens" in made.text.value
    made.architecture.value = "Qwen3-0.6B"
    assert "<b>Qwen3-0.6B, full fine-tuning" in made.text.value


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_estimated(method):
    made = will_it_fit("SmolLM2-135M", "T4")
    made.method.value = method
    assert "SmolLM2-135M" in made.text.value


def test_the_bars_are_as_high_as_the_phases():
    """Drawn by matplotlib, in GB, and as SVG, in pixels: there the limit, 100 GB, is the scale."""
    llama = memory.architectures()["Llama-3-8B"]
    predicted = memory.estimate(llama)
    highest = [moment.total / 1e9 for moment in predicted.moments.values()]
    figure, ax = plt.subplots()
    plot_phases(ax, predicted, 10**11)
    tops = [max(bars[i].get_y() + bars[i].get_height() for bars in ax.containers) for i in range(4)]
    assert tops == pytest.approx(highest, rel=0.02)  # parts thinner than a line are left out
    assert [label.get_text().split("\n")[0] for label in ax.get_xticklabels()] == list(memory.PHASES)
    assert set(KIND_COLOURS) == set(memory.KINDS)
    plt.close(figure)

    svg = svg_phases(predicted, 10**11)
    limit = re.search(r'd="M48 ([\d.]+)h402M', svg)
    sizes = re.findall(r'<rect x="(\d+)" y="[\d.]+" width="50" height="([\d.]+)"', svg)
    columns = [sum(float(size) for x, size in sizes if x == place) for place in ("138", "220", "302", "384")]
    assert [100 * column / (250 - float(limit[1])) for column in columns] == pytest.approx(highest, rel=0.02)
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")


def test_will_it_fit_has_a_still_picture():
    """And the live one, too, says in words what it shows."""
    made = will_it_fit()
    bundle = made._repr_mimebundle_()
    assert VIEW in bundle and "Peak" in bundle["text/plain"]
    found = re.search(r'alt="([^"]+)" [^>]*src="data:image/png;base64,([^"]+)"', bundle["text/html"])
    assert "Peak" in bundle["text/html"] and base64.b64decode(found[2])[:4] == b"\x89PNG"
    assert f'alt="{found[1]}"' in made._picture.value and re.search(r"backward \d+\.\d GB", found[1])
    assert plt.get_fignums() == []
