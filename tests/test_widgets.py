"""The sliders of notebooks 02 and 03: what they say and draw is what the records say and ftlab.memory predicts."""

import ast
import json
import re
import sys
from pathlib import Path

import ipywidgets
import pytest
import yaml
from shown import VIEW, Page, named, page_of

from ftlab import memory
from ftlab.classroom.widgets import KIND_COLOURS, METHODS, RANKS, SWEEP, SWEEP_RATES, rank_slider, will_it_fit
from ftlab.paths import DATA, EXPERIMENTS

sys.path.append(str(Path(__file__).resolve().parent.parent / "book"))
import calculator


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
    verdict = memory.verdict("RTX 4090", "Llama-3-8B", **settings)
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


PAGE = {"method": "trained", "model": "architecture", "card": "gpu", "stack": "preset", "vllm": "share"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stack", memory.presets())
def test_the_widget_and_the_web_page_say_the_same(stack, method):
    """Of each stack, GRPO and PPO among them, on a card where the margin decides for some: verdict, peak, longest row,
    or what does not go together. The page's numbers are those of the call that it shows."""
    made = will_it_fit("Qwen3-8B", "A100-40GB")
    chosen = {"method": method, "stack": stack, "vllm": 50, "rows": 4, "tokens": 2048}
    for name, value in chosen.items():
        fields(made)[name].value = value
    asked = calculator.FIRST | {"architecture": "Qwen3-8B", "gpu": "A100-40GB"}
    asked |= {PAGE.get(name, name): value for name, value in chosen.items()}
    page = json.loads(calculator.report(json.dumps(asked)))
    if "wrong" in page:
        assert page["wrong"] in says(made)
        return
    assert f"4 x 2,048 tokens: {page['verdict']} on A100-40GB" in says(made)
    assert f"Peak {page['peak'] / 1e9:.1f} GB, in the {page['peak_phase']} phase" in says(made)
    assert f"batch: {page['longest']:,} tokens; largest batch at this length: {page['largest']:,} rows" in says(made)
    call = ast.parse(page["code"], mode="eval").body.value  # memory.estimate(...).peak_bytes
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert page["peak"] == memory.estimate(ast.literal_eval(call.args[0]), **named).peak_bytes
    assert page["cards"]["A100-40GB"] == page["verdict"]
    assert page["margin"] == memory.margin()
    assert (memory.margin()["source"] in says(made)) == (page["verdict"] == "may fit")


def test_the_three_verdicts_are_all_met():
    """Else the comparison above would not see the margin."""
    made = will_it_fit("Qwen3-8B", "A100-40GB")
    said = set()
    for rows in range(1, 33):
        fields(made)["rows"].value = rows
        said.add(re.search(r"tokens: (.+) on A100", says(made))[1])
    assert said == set(memory.VERDICTS)


def test_vllm_in_the_widget_takes_the_share_that_is_chosen():
    made = will_it_fit("Qwen3-8B", "H100-80GB")
    fields(made)["stack"].value = "GRPO beside vLLM"
    peaks = []
    for share in (30, 40):
        fields(made)["vllm"].value = share
        peaks.append(float(re.search(r"Peak ([\d.]+)", says(made))[1]))
    assert peaks[1] - peaks[0] == pytest.approx(0.1 * 80 * 2**30 / 1e9, abs=0.11)  # of figures with one decimal


def test_without_a_kernel_its_text_and_bars_are_there():
    bundle = will_it_fit()._repr_mimebundle_()
    assert VIEW in bundle and re.search(r"backward\s\d+\.\d GB", Page(bundle["text/html"]).open)


# --- The rank -----------------------------------------------------------------------------------------------------


def by_hand(r: int) -> list[str]:
    """What the slider has to say of a rank: sums over the lines of the records, and PEFT's count of an 8B."""
    lines = (EXPERIMENTS / "lora_rank" / "records.jsonl").read_text("utf-8").splitlines()
    runs = [run for run in map(json.loads, lines) if run["phase"] == "final" and run["r"] == r]
    plain = [run for run in runs if run["lora_alpha"] == 32 and "rsLoRA" not in run["arm"] and len(run["arm"]) <= 4]
    orders, codes = ([run for run in plain if run["task"] == task] for task in ("orders", "codes"))
    assert len(orders) == len(codes) == 4
    million = r * 2_621_440 / 1e6  # 32 blocks of 81,920: 2 x 8,192 for q and o, 2 x 5,120 for k and v, 3 x 18,432
    return [
        f"{sum(run['test'] for run in orders) / 4:.1%}",
        f"{sum(run['test'] for run in codes) / 4:.1%}",
        f"{million:.1f} million",
        f"{16 * million / 1000:.2f} GB",
    ]


@pytest.mark.parametrize("r", RANKS)
def test_the_rank_slider_says_what_the_records_say(r):
    made = rank_slider()
    fields(made)["rank"].value = r
    said = re.findall(r"<b>(.*?)</b>", page_of(made))
    assert said[:4] == by_hand(r)
    assert said[4:] == ([f"{SWEEP[r][SWEEP_RATES.index(3e-4)]:.4f} nats/token"] if r > 1 else [])


def test_the_sweep_of_the_8b_is_the_published_one():
    source = yaml.safe_load((DATA / "published" / "tinker-sweep.yaml").read_text("utf-8"))
    quote = next(figure["quote"] for figure in source["figures"] if figure["id"] == "8b")
    rows = "; ".join(f"rank {r} " + " ".join(f"{loss:.4f}" for loss in losses) for r, losses in SWEEP.items())
    rates = "4e-05, 1e-04, 3e-04, 1e-03"
    assert quote.endswith(f"test NLL at {rates}: {rows}") and tuple(map(float, rates.split(", "))) == SWEEP_RATES


def test_without_a_kernel_each_rank_is_a_fold():
    still = rank_slider()._repr_mimebundle_()["text/html"]
    assert re.findall(r"<details( open)?><summary>rank (\d+)", still) == [
        ("", "1"),
        ("", "4"),
        (" open", "16"),
        ("", "64"),
    ]
    for r in RANKS:
        assert all(value in still for value in by_hand(r))
