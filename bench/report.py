"""README's table of notebooks and CONTRIBUTING's of what was measured, from the files in bench/results.

    python bench/report.py         writes them

`make bench` ends with it; tests/test_bench.py holds both pages to it. A benchmark without a file has no line.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
BEGIN, END = "<!-- measured: python bench/report.py -->\n", "<!-- end of measured -->"


def generate(r: dict) -> list[str]:
    seconds = {name: one["seconds_an_answer"]["median"] for name, one in r["summary"].items()}
    ours, drawn, loop = (r["summary"][name] for name in ("ours", "sampled, ours", "plain"))
    return [
        f"greedy answers: {seconds['plain'] / seconds['ours']:.1f} times as fast as the plain `generate` loop, "
        f"{seconds['batched'] / seconds['ours']:.1f} times as fast as a batch; {ours['same_answers']} of "
        f"{ours['questions']} the same (seconds an answer; the loop gave {loop['questions']})",
        f"sampled answers: {seconds['sampled'] / seconds['sampled, ours']:.1f} times as fast as the plain loop, "
        f"{seconds['sampled, batched'] / seconds['sampled, ours']:.1f} times as fast as the batch that TRL asks for; "
        f"{drawn['same_answers']} of {drawn['questions']} the same",
    ]


def speed_up(r: dict) -> list[str]:
    lines, rows = [], {"sft": "LoRA SFT on rows of `ask`", "dpo": "DPO with LoRA on pairs of `replies`"}
    for one in r["steps"]:
        others = {name: each["clock"]["median"] for name, each in one["ratio"].items()}
        checkpointing, plain = others.pop("defaults"), others.pop("no checkpointing")
        of = {name: "{min:.2f} to {max:.2f}".format(**each["clock"]) for name, each in one["ratio"].items()}
        line = (
            f"`speed_up(trainer)`, a step of {rows[one['method']]}, all in {'bf16' if one['bf16'] else 'fp32'}: "
            f"{checkpointing:.2f} times as fast as TRL with gradient checkpointing, {plain:.2f} times as without "
            f"it (single steps {of['no checkpointing']})"
        )
        old = others.pop("f21bf8c", None)
        if old:
            line += f", {old:.2f} times as fast as the code of f21bf8c ({of['f21bf8c']})"
        if others:
            best = min(others, key=others.get)
            line += f", {others[best]:.2f} times as the best of {len(others)} others (“{best}”, {of[best]})"
        floor = one["share_of_floor"]["median"]
        lines.append(f"{line}; products that no step can avoid take {floor:.0%} of its time")
    against = r.get("against_f21bf8c", {"steps": [], "first_batch": []})
    for one in against["steps"]:
        said = {
            name: "{median:.2f} ({min:.2f} to {max:.2f})".format(**each["clock"]) for name, each in one["ratio"].items()
        }
        lines.append(
            f"`speed_up` as it is now, a step of {rows[one['method']]}, all in {'bf16' if one['bf16'] else 'fp32'}: "
            f"{said['no checkpointing']} times as fast as TRL without checkpointing, {said['f21bf8c']} times as fast "
            "as the code of f21bf8c, which did not watch (paired steps, on the same rows)"
        )
    for one in r.get("first_batch", against["first_batch"]):
        lines.append(
            f"gradients of {rows[one['method']]}, all in {'bf16' if one['bf16'] else 'fp32'}, differ by parameter from "
            f"TRL's by {one['ours, median']:.1e} (median; at most {one['ours, max']:.1e}), and TRL's own from TRL's in "
            f"fp32 by {one['rounding, median']:.1e}"
        )
    return lines


def startup(r: dict) -> list[str]:
    cells = {name: one["median"] for name, one in r["first_cells"].items()}
    slowest = max(cells, key=cells.get)
    widget = max(one["median"] for one in r["redraw"].values())
    return [
        f"first cells of a notebook: at most {cells[slowest]:.1f} s ({slowest}); "
        f"`doctor` {r['doctor']['median']:.1f} s",
        f"`memory.estimate` {1e3 * r['estimate']['median']:.2f} ms; a widget redraws in at most {1e3 * widget:.0f} ms",
    ]


def course(r: dict) -> list[str]:
    whole = [one for name, one in r["measured"].items() if name == "nbval"]
    return [
        f"the whole course under nbval, two notebooks at a time: {one['seconds'] / 60:.1f} minutes" for one in whole
    ]


def growth(r: dict) -> list[str]:
    quick, plain = (r["sweeps"][f"length, {way}"] for way in ("speed_up", "TRL"))
    time, of_trl = ("{median:.2f} ({min:.2f} to {max:.2f})".format(**one["step_exponent"]) for one in (quick, plain))
    return [
        "from 128 to 2,048 tokens the memory of a step grows as the length to the power of "
        f"{quick['peak_exponent']:.2f} with `speed_up` and {plain['peak_exponent']:.2f} with TRL, "
        f"its time to the power of {time} and {of_trl}"
    ]


def rows(r: dict) -> list[str]:
    most = r["runs"]["read"][-1]
    return [
        f"`read_rows`: {most['per_cpu_second']:,} rows per second of processor time over {most['rows']:,} rows, memory "
        f"growing by {r['growth']['read']['bytes_per_row']} bytes a row"
    ]


def resume(r: dict) -> list[str]:
    one = r["summary"]
    return [
        f"SIGKILL {one['kills']} times in TRL's own SFTTrainer with `speed_up`, resumed from `last_good_checkpoint`: "
        f"{one['same_weights']} of {one['runs']} runs end in the same bytes"
    ]


def server(r: dict) -> list[str]:
    return [
        f"server: {r['requests']:,} requests, {r['at_once']} at once, {r['malformed_kinds']} kinds of malformed ones: "
        f"{'alive' if r['alive'] else 'DEAD'}, memory {r['resident_growth_200_to_1000']:+.1%} from the 200th on, "
        f"{r['resident_growth_500_to_1000']:+.1%} from the 500th, "
        f"{'the same' if r['answers_equal_those_before'] else 'OTHER'} answers after"
    ]


def mutation(r: dict) -> list[str]:
    one = r["totals"]
    return [
        f"mutants of {len(r['tests'])} modules of `ftlab.scratch`: {one['caught']:,} of {one['mutants']:,} caught in "
        f"{one['functions']} functions, {one['equivalent']} change nothing that a caller could see"
    ]


def flake(r: dict) -> list[str]:
    runs, tests = r["runs"], sum(run["what"] == "tests" for run in r["runs"])
    threads = " and ".join(map(str, sorted({run["threads"] for run in runs})))
    commits, failed = len({run["commit"] for run in runs}), sum(len(run["names"]) for run in runs)
    return [
        f"runs of all tests: {tests}, of all notebooks: {len(runs) - tests}, at {threads} threads, in orders of "
        f"{len({run['seed'] for run in runs})} seeds, on {commits} commits: {failed} failed, "
        f"with trl {r['environment']['versions']['trl']} (without {max(run.get('skipped', 0) for run in runs)} tests "
        "that want Chromium or an optional environment)"
    ]


def verdicts(r: dict) -> list[str]:
    worst = r["worst"]
    few = [one for one in r["crossed"] if one["seeds"] < 6 or one["questions"] < 100]
    return [
        f"`compare` on equally good arms, {r['draws']:,} simulations a cell: with six or more seeds "
        f"and 100 or more questions it finds a difference in at most {worst['false']:.1%} "
        f"({worst['cells']} cells; 5 % is promised), with fewer in at most "
        f"{max(one['false'] for one in few):.1%}; [every cell](bench/results/verdicts.md)"
    ]


BENCHMARKS = (speed_up, generate, growth, startup, course, rows, resume, server, flake, mutation, verdicts)


def measured() -> str:
    """The table between BEGIN and END: a row a figure, with its script and the file that holds it."""
    lines = ["| measured | with | figures |", "|---|---|---|"]
    for benchmark in BENCHMARKS:
        file = RESULTS / f"{benchmark.__name__}.json"
        if file.is_file():
            result = json.loads(file.read_text("utf-8"))
            where = f"`bench/{file.stem}.py` | [{file.name}]({file.relative_to(ROOT)})"
            lines += [f"| {line} | {where} |" for line in benchmark(result)]
    return "\n".join(lines) + "\n"


def row(line: str, notebooks: dict) -> str:
    """A line of README's table of notebooks with its minutes and peak GB as measured; any other line as it is.

    A star: on a CPU without native bf16.
    """
    found = re.match(r"(\| \[\d\d [^|]*\]\(notebooks/(\w+)\.ipynb\)[^|]*\|[^|]*\|)[^|]*\|[^|]*\|$", line)
    one = notebooks.get(found[2]) if found else None
    if one is None:
        return line
    return f"{found[1]} {one['seconds'] / 60:.1f}{'' if one['native_bf16'] else '*'} | {one['peak_bytes'] / 1e9:.1f} |"


def page(text: str) -> str:
    """README or CONTRIBUTING with its table as it was measured."""
    file = RESULTS / "course.json"
    notebooks = json.loads(file.read_text("utf-8"))["measured"] if file.is_file() else {}
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        text = before + BEGIN + measured() + END + rest.split(END, 1)[1]
    return "\n".join(row(line, notebooks) for line in text.splitlines()) + "\n"


def write() -> None:
    for file in PAGES:
        file.write_text(page(file.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
    print(measured())
