"""The widgets of ftlab.classroom through their sliders, their text and their still picture."""

import base64
import json
import re
import xml.etree.ElementTree

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch

from ftlab import memory
from ftlab.classroom.widgets import (
    KIND_COLOURS,
    METHODS,
    plot_phases,
    plot_singular_values,
    rank_explorer,
    rank_kept,
    svg_phases,
    svg_singular_values,
    will_it_fit,
)
from ftlab.paths import DATA

BY_HAND = torch.tensor([[3.0, 2.0, 2.0], [2.0, 3.0, -2.0]])  # singular values 5 and 3

ARCHITECTURES = json.loads((DATA / "architectures" / "architectures.json").read_text())
(ARCHITECTURE,) = (row for row in ARCHITECTURES if row["name"] == "Llama-3-8B")

# --- The rank explorer ------------------------------------------------------------------------------------------------


def explorer():
    torch.manual_seed(0)
    return rank_explorer({"by hand": BY_HAND, "random": torch.randn(8, 6)}, ARCHITECTURE, r=1)


def test_rank_kept_by_hand():
    """25 of 25 + 9 with one rank, all of it with two; a matrix of rank 1 is kept whole by r = 1."""
    assert rank_kept(BY_HAND, 1) == pytest.approx(25 / 34)
    assert rank_kept(BY_HAND, 2) == pytest.approx(1)
    assert rank_kept(torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 2.0])), 1) == pytest.approx(1)


def test_the_slider_moves_what_is_kept_parameters_and_megabytes():
    """Llama-3-8B, all linear layers: the ledger's 41,943,040 with r = 16 are 2,621,440 a rank, 5 MB in bf16."""
    made = explorer()
    assert "73.5%" in made.text.value and "1 x (3 + 2) = 5 parameters instead of 6" in made.text.value
    assert "2,621,440 parameters (0.03%), 5 MB" in made.text.value
    before = made._picture.value
    made.rank.value = 2
    assert "100.0%" in made.text.value and "5,242,880" in made.text.value and made._picture.value != before
    assert plt.get_fignums() == [], "a figure per move must not pile up in memory"


def test_another_layer_brings_its_own_largest_rank():
    made = explorer()
    made.layer.value = "random"
    made.rank.value = 6
    assert made.rank.max == 6 and "100.0%" in made.text.value
    made.layer.value = "by hand"
    assert made.rank.max == made.rank.value == 2


def test_it_can_be_read_without_a_kernel():
    bundle = explorer()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "by hand" in bundle["text/html"] and "73.5%" in bundle["text/html"] and "<script" not in bundle["text/html"]
    assert base64.b64decode(re.search(r'src="data:image/png;base64,(\S+)"', bundle["text/html"])[1])[:4] == b"\x89PNG"
    assert "73.5%" in bundle["text/plain"] and "<" not in bundle["text/plain"]


def test_the_range_over_all_updates_is_shown():
    """A matrix of rank 1 is kept whole by r = 1, the one by hand to 25 / 34."""
    thin = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]))
    made = rank_explorer({"by hand": BY_HAND, "thin": thin}, ARCHITECTURE, r=1)
    assert "each of the 2 updates: 74% to 100%" in made.text.value


def test_singular_values_are_drawn():
    _, ax = plt.subplots()
    assert plot_singular_values(ax, BY_HAND, 1) is ax
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([5, 3])
    plt.close("all")


def test_the_fast_picture_shows_the_same_bars():
    """Singular values 5 and 3 from 240 (zero) to 25 (the largest): the second bar ends at 240 - 215 * 3 / 5 = 111."""
    blue, grey = re.findall(r'<path d="M([\d.]+) 240(V\S+Z)" fill', svg_singular_values(torch.tensor([5.0, 3.0]), 1))
    assert blue == ("60.00", "V25.00H310.00V240Z") and grey == ("310.00", "V111.00H560.00V240Z")
    xml.etree.ElementTree.fromstring(svg_singular_values(torch.tensor([5.0, 3.0]), 2))


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
    assert "application/vnd.jupyter.widget-view+json" in bundle and "Peak" in bundle["text/plain"]
    found = re.search(r'alt="([^"]+)" [^>]*src="data:image/png;base64,([^"]+)"', bundle["text/html"])
    assert "Peak" in bundle["text/html"] and base64.b64decode(found[2])[:4] == b"\x89PNG"
    assert f'alt="{found[1]}"' in made._picture.value and re.search(r"backward \d+\.\d GB", found[1])
    assert plt.get_fignums() == []
