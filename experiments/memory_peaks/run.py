"""The memory calculator against peaks that others measured: `python
experiments/memory_peaks/run.py`.

It reads data/published/peaks.yaml, predicts each row twice and writes

    records.jsonl               one published run a line, with both predictions, in bytes
    report.md                   the errors by stack, all rows, and the reason of each miss over a tenth
    data/gpus/margin.json       reserved over allocated memory, for `memory.verdict`

"before" is what a user of the defaults gets, estimate(model, **settings): the numbers of commit
f87e881, which had no presets. "after" names the stack: estimate(model, preset=..., **settings,
**more), where "more" is what the row's source says of its code beside the preset. Nothing is
fitted; half a minute of one core, and no GPU.
"""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ftlab.memory import Architecture, estimate, gpus
from ftlab.paths import DATA

HERE = Path(__file__).resolve().parent
UNITS = {
    "bytes": 1,
    "MiB": 2**20,
    "GiB": 2**30,
    "GB": 10**9,
}  # "GB" as printed; some mean GiB, 7 % more
MISSED = 0.10  # a row further off than this is listed with its reason
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# report.md: where a stack's code or page left two readings, and the one that fits was taken.
SETTLED = (
    "LLaMA-Factory: the Trainer of 2023 and 2024, and not today's",
    "Unsloth, April 2024: no activations in the CPU's memory, from the slope of its own table",
    "ms-swift, full fine-tuning and PPO: the weights in fp32, as DeepSpeed's copies, after a first "
    "comparison with bf16 was 48 to 81 % low",
    'NeMo AutoModel: its row "+ Gradient Checkpointing" also has what the rows above it add',
)


def published() -> dict[str, Any]:
    """data/published/peaks.yaml: sources, rows, and what was opened but cannot be predicted."""
    return yaml.safe_load((DATA / "published" / "peaks.yaml").read_text(encoding="utf-8"))


def in_bytes(value: dict) -> float:
    """Bytes of a value with its unit as printed."""
    return value["value"] * UNITS[value["unit"]]


def predict(row: dict, stack: bool) -> int:
    """The predicted peak of a row in bytes; stack: with the row's preset and what its source adds
    to it.
    """
    shape = row.get("shape")
    architecture = Architecture(name=row["model"], **shape) if shape else row["model"]
    if not stack:
        return estimate(architecture, **row["settings"]).peak_bytes
    settings = row["settings"] | row.get("more", {})
    return estimate(architecture, preset=row["preset"], **settings).peak_bytes


def record(row: dict, sources: dict[str, dict]) -> dict[str, Any]:
    """One line of records.jsonl."""
    source = sources[row["source"]]
    measured = in_bytes(row["measured"])
    before, after = predict(row, stack=False), predict(row, stack=True)
    return {
        "source": row["source"],
        "stack": source["stack"],
        "card": row.get("card", source["card"]),
        "model": row["model"],
        "settings": row["settings"],
        "preset": row["preset"],
        "more": row.get("more", {}),
        "kind": row["measured"]["kind"],
        "measured_bytes": round(measured),
        "before_bytes": before,
        "after_bytes": after,
        "before_percent": round(100 * (before / measured - 1), 1),
        "after_percent": round(100 * (after / measured - 1), 1),
        "reason": row.get("reason"),
    }


def margin(rows: list[dict]) -> dict[str, Any]:
    """What margin.json holds: quantiles of reserved / allocated over the runs of the source that
    has most of both.
    """
    runs = [row for row in rows if row["source"] == "fitcheck"]
    ratios = sorted(in_bytes(row["reserved"]) / in_bytes(row["measured"]) for row in runs)
    ninth = statistics.quantiles(ratios, n=10, method="inclusive")[-1]
    return {
        "ratio": round(ninth, 3),
        "runs": len(ratios),
        "median": round(statistics.median(ratios), 3),
        "highest": round(ratios[-1], 3),
        "source": f"reserved / allocated in {len(ratios)} runs on a T4, fitcheck-llm 0.3.1 (data/published/peaks.yaml)",
    }


def worst(errors: list[float]) -> float:
    """The error that is furthest from 0, in percent."""
    return max(errors, key=abs)


def short(settings: dict) -> str:
    """A row's settings in a few words."""
    names = {"per_device_train_batch_size": "", "max_length": "x ", "r": "r "}
    words = [f"{prefix}{settings[name]:,}" for name, prefix in names.items() if name in settings]
    targets = settings.get("target_modules", LINEAR)
    if set(targets) != set(LINEAR):
        words.append(", ".join(name.removesuffix("_proj") for name in targets))
    if settings.get("load_in_4bit"):
        words.append("NF4-DQ" if settings.get("bnb_4bit_use_double_quant") else "NF4")
    if "r" not in settings:
        words.append("full")
    if settings.get("attn_implementation") == "eager":
        words.append("eager")
    if settings.get("gradient_checkpointing") is False:
        words.append("no checkpointing")
    if "gpus" in settings:
        words.append(f"{settings['gpus']} GPUs, {'FSDP' if settings.get('fsdp') else 'DDP'}")
    return " · ".join(words)


def by_stack(records: list[dict]) -> list[str]:
    """The table of stacks."""
    lines = [
        "| stack | cards | runs | before: median, worst | after: median, worst |",
        "|---|---|---|---|---|",
    ]
    stacks = {one["stack"]: [r for r in records if r["stack"] == one["stack"]] for one in records}
    others = [one for one in records if "fitcheck" not in one["stack"]]
    for stack, runs in [*stacks.items(), ("**all**", records), ("**all but the first**", others)]:
        cells = []
        for when in ("before_percent", "after_percent"):
            errors = [one[when] for one in runs]
            cells.append(f"{statistics.median(map(abs, errors)):.1f} %, {worst(errors):+.1f} %")
        cards = ", ".join(sorted({one["card"] for one in runs})) if stack in stacks else ""
        lines.append(f"| {stack} | {cards} | {len(runs)} | {cells[0]} | {cells[1]} |")
    cells = [
        statistics.median(statistics.median(abs(one[when]) for one in runs) for runs in stacks.values())
        for when in ("before_percent", "after_percent")
    ]
    lines.append(f"| **the median of the stacks' medians** | | | {cells[0]:.1f} % | {cells[1]:.1f} % |")
    return lines


def table(records: list[dict], reasons: bool) -> list[str]:
    """A table of rows; reasons: with the reason of each in place of its preset."""
    lines = [
        f"| stack | model | settings | measured, GB | before | after | {'why' if reasons else 'preset'} |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in records:
        last = one["reason"] if reasons else one["preset"]
        lines.append(
            f"| {one['stack']} | {one['model']} | {short(one['settings'])} | {one['measured_bytes'] / 1e9:.2f} "
            f"({one['kind']}) | {one['before_percent']:+.1f} % | {one['after_percent']:+.1f} % | {last} |"
        )
    return lines


def verdicts(records: list[dict], ratio: float) -> list[str]:
    """How often `memory.verdict` would have said "fits" of a run that took more than it allowed for."""
    cards = gpus()
    known = [one for one in records if one["card"] in cards]
    fits = [one for one in known if cards[one["card"]].verdict(one["after_bytes"]) == "fits"]
    over = [one for one in fits if one["measured_bytes"] > cards[one["card"]].usable_bytes]
    beyond = [one for one in records if one["measured_bytes"] > ratio * one["after_bytes"]]
    stacks = Counter(one["stack"] for one in beyond)
    named = ", ".join(f"{stack} {count}" for stack, count in stacks.most_common())
    return [
        f"{len(known)} of the {len(records)} runs were on cards of `data/gpus`. With the stack named, "
        f"`memory.verdict` says *fits* of {len(fits)}",
        f"of them, and {len(over)} took more than the card's usable memory. But a run that failed has no "
        "published peak, so a stricter",
        f"question: which runs took more than {ratio} times the prediction, so that a card that just "
        f"fits them would have been full? {len(beyond)}: {named}.",
    ]


def report(records: list[dict], margins: dict, outside: list[dict], sources: list[dict]) -> str:
    """report.md."""
    missed = [one for one in records if abs(one["after_percent"]) > 100 * MISSED]
    stacks = len({one["stack"] for one in records})
    loop = sum("fitcheck" in one["stack"] for one in records)
    lines = [
        "# Peaks that others measured, and the calculator's",
        "",
        f"{len(records)} published runs of {stacks} stacks, from sources that we opened and quote in",
        "`data/published/peaks.yaml`. *Before* is `memory.estimate` with the run's own settings and",
        "TRL's defaults for the rest; *after* also names the stack (`preset=...`). Errors are predicted over",
        "measured, less one; the median is of their sizes. Presets say what a stack's code does. No number",
        "in them was fitted to these runs. *Before* has no GRPO or PPO, so those rows are SFT there.",
        "",
        *by_stack(records),
        "",
        f"{loop} of the {len(records)} runs are one loop on a T4, and the figures for all are mostly theirs. The",
        "last two lines give the others, and every stack the same weight.",
        "",
        "## What was settled with the measurements in view",
        "",
        "Which preset and which settings a row gets was read from each stack's code or page. Where these",
        "left two readings, we took the one that fits, so these rows test less than the others:",
        "",
        *(f"- {one}" for one in SETTLED),
        "",
        "The other stacks kept what they were given before the first comparison.",
        "",
        "## Kinds of peak",
        "",
        "*Allocated* is what `estimate` predicts. *Reserved* is what the allocator holds: the median over",
        f"{margins['runs']} runs on a T4 is {margins['median']} times as much, the 90th percentile "
        f"{margins['ratio']}, the most {margins['highest']}.",
        'nvidia-smi also counts the CUDA context. Where a page does not say which, the row says "not said".',
        "",
        '## How often "fits" was wrong',
        "",
        *verdicts(records, margins["ratio"]),
        "",
        f"## Missed by more than a tenth: {len(missed)} rows",
        "",
        *table(missed, reasons=True),
        "",
        "## All rows",
        "",
        *table(records, reasons=False),
        "",
        "## Opened, and not predicted",
        "",
        "| source | quoted | why not |",
        "|---|---|---|",
        *(f"| {one['source']} | {one['quote'].replace('|', '/')} | {one['reason']} |" for one in outside),
        "",
        "## Sources",
        "",
        *(f"- **{one['id']}** ({one['date']}): [{one['stack']}]({one['address']})" for one in sources),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    data = published()
    sources = {source["id"]: source for source in data["sources"]}
    records = [record(row, sources) for row in data["rows"]]
    margins = margin(data["rows"])
    lines = [json.dumps(one, ensure_ascii=False) for one in records]
    (HERE / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (HERE / "report.md").write_text(report(records, margins, data["outside"], data["sources"]), encoding="utf-8")
    text = json.dumps(margins, ensure_ascii=False, indent=1)
    (DATA / "gpus" / "margin.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
