"""experiments/stack_peers and engines hold what notebook 08 says; every row of data/stack is whole."""

import statistics

import pytest
import yaml

from ftlab.classroom import results
from ftlab.paths import DATA

PEERS, ENGINES = results.parts("stack_peers"), results.records("engines")
LOSSES = {(run["method"], run["tool"], run["variant"]): run["loss"] for run in PEERS["runs"]}


def largest(method: str, tool: str, variant: str) -> float:
    """The largest relative difference of a loss to TRL's at the same step."""
    pairs = zip(LOSSES[method, tool, variant], LOSSES[method, "trl", ""], strict=True)
    return max(abs(ours - trl) / trl for ours, trl in pairs)


def test_each_tool_trained_the_same_model_and_axolotl_without_the_plugin_did_not():
    tools = {"sft": {"trl", "unsloth", "llamafactory", "axolotl"}, "dpo": {"trl", "llamafactory", "axolotl"}}
    for method, wanted in tools.items():
        assert {tool for way, tool, _ in LOSSES if way == method} == wanted
        assert max(largest(method, tool, "") for tool in wanted) < 1e-5
    late = [key for key in LOSSES if key[2]]
    assert [key[:2] for key in late] == [("sft", "axolotl")] * 2 and min(largest(*key) for key in late) > 1e-3


def test_each_tool_made_the_ids_and_labels_of_the_template():
    assert sorted((each["method"], each["tool"]) for each in PEERS["tokens"]) == [
        (method, tool) for method in ("dpo", "sft") for tool in ("axolotl", "llamafactory")
    ]
    assert all(each["equal"] == each["rows"] > 20 for each in PEERS["tokens"])


def test_unsloth_was_as_fast_as_trl_and_speed_up_faster_at_equal_losses():
    speed, first = {}, {run["name"]: run["loss"] for run in ENGINES if run["repetition"] == 0}
    for name in first:
        runs = [run for run in ENGINES if run["name"] == name]
        rates = [run["tokens"] / len(run["loss"]) / statistics.mean(run["step_cpu_seconds"]) for run in runs]
        speed[name] = statistics.median(rates)
        assert first[name] == pytest.approx(first["TRL"], abs=2e-5)
    assert speed["speed_up"] > 1.1 * speed["TRL"] and speed["Unsloth"] == pytest.approx(speed["TRL"], rel=0.1)


def test_every_tool_of_the_table_is_whole():
    tools = yaml.safe_load((DATA / "stack" / "tools.yaml").read_text(encoding="utf-8"))
    assert tools.keys() == {"trains", "hosted"} and all(tools.values())
    for kind, rows in tools.items():
        keys = {"tool", "what", "interface", "source"} | ({"weights"} if kind == "hosted" else {"licence", "here"})
        assert all(isinstance(row.get(key), str) and row[key].strip() for row in rows for key in keys)
