"""ftlab.classroom.peers: differences and speeds of a made-up result by hand; the stored results hold what 08 says."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml

from ftlab.classroom import peers

DATA = Path(__file__).resolve().parents[1] / "data"
MADE = {
    "environment": {"versions": {"trl": {"transformers": "5"}, "axolotl": {"transformers": "4"}}},
    "runs": [
        {"method": "sft", "tool": "trl", "variant": "", "loss": [2.0, 1.0]},
        {"method": "sft", "tool": "unsloth", "variant": "", "loss": [2.0, 1.01]},
        {"method": "sft", "tool": "axolotl", "variant": "", "loss": [2.0, 1.0]},
        {"method": "sft", "tool": "axolotl", "variant": "without it", "loss": [2.2, 1.3]},
        {"method": "dpo", "tool": "trl", "variant": "", "loss": [0.5]},
        {"method": "dpo", "tool": "axolotl", "variant": "", "loss": [0.6]},
    ],
    "tokens": [{"method": "sft", "tool": "axolotl", "rows": 48, "equal": 47}],
}


def test_differences_are_relative_and_the_largest_counts():
    table = peers.agreement(MADE)
    assert list(table.index) == ["unsloth", "axolotl", "axolotl, without it"]
    assert list(table["sft: largest difference"]) == ["1e-02", "0e+00", "3e-01"]
    assert list(table["dpo: largest difference"]) == ["", "2e-01", ""]
    assert list(table["sft: same ids and mask"]) == ["", "47 of 48 rows", ""]
    assert list(table["transformers"]) == ["5", "4", "4"]


def test_the_picture_has_a_line_for_trl_and_dots_for_each_tool():
    figure, (left, right) = plt.subplots(1, 2)
    peers.plot_losses(left, right, MADE)
    assert [line.get_label() for line in left.lines] == ["trl", "unsloth", "axolotl"]
    assert list(left.lines[1].get_ydata()) == [2.0, 1.01]
    far = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert far["axolotl"] == [1e-8, 1e-8] and far["axolotl, without it"] == pytest.approx([0.1, 0.3])
    plt.close(figure)


def test_speed_is_tokens_of_a_step_by_its_processor_seconds():
    """10 tokens a step in 2 s and in 4 s: 5 and 2.5 tokens a second."""
    run = {"tokens": 20, "loss": [1.0, 0.5], "peak_mb": 7, "repetition": 0}
    runs = [{"name": "TRL", "step_cpu_seconds": [2.0], **run}, {"name": "fast", "step_cpu_seconds": [4.0], **run}]
    table = peers.speed({"runs": [*runs, {**runs[0], "repetition": 1}]})
    assert list(table.loc["TRL"]) == [5, 7, 1.0, "0e+00"] and list(table.loc["fast"])[:3] == [2, 7, 0.5]


def test_a_table_of_tools_is_escaped_and_folds():
    page = peers.tools("Here", [{"tool": "A<b>", "what": "x & y"}], ["what"], folded=True).data
    assert page.startswith("<details><summary><b>Here</b></summary><table>") and "A&lt;b&gt;" in page
    assert "x &amp; y" in page and not peers.tools("Here", [], []).data.startswith("<details>")


def test_the_stored_runs_are_equal_and_without_the_plugin_they_are_not():
    results = json.loads((DATA / "results" / "stack_peers.json").read_text(encoding="utf-8"))
    table = peers.agreement(results)
    largest = table.filter(like="largest").replace("", "0").astype(float).max(axis=1)
    assert set(table.index) == {"unsloth", "llamafactory", "axolotl", *[name for name in table.index if "," in name]}
    assert largest[["unsloth", "llamafactory", "axolotl"]].max() < 1e-5
    assert largest.filter(like="axolotl,").min() > 1e-3 and len(largest) == 5
    assert all(each["equal"] == each["rows"] > 20 for each in results["tokens"]) and len(results["tokens"]) == 4
    speed = peers.speed(json.loads((DATA / "results" / "engines.json").read_text(encoding="utf-8")))
    assert speed["largest difference"].astype(float).max() < 2e-5
    assert speed.loc["speed_up", "times TRL"] > 1.1 and 0.9 < speed.loc["Unsloth", "times TRL"] < 1.1


def test_every_tool_of_the_table_is_whole():
    tools = yaml.safe_load((DATA / "stack" / "tools.yaml").read_text(encoding="utf-8"))
    assert tools.keys() == {"trains", "hosted"} and all(tools.values())
    for kind, rows in tools.items():
        keys = {"tool", "what", "interface", "source"} | ({"weights"} if kind == "hosted" else {"licence", "here"})
        assert all(isinstance(row.get(key), str) and row[key].strip() for row in rows for key in keys)
