"""The same recipe in one process and in two: the same loss, the same adapter, and what the second process costs.

    python data/results/two_processes.py            (about ten minutes on two cores)

Writes two_processes.json beside this file: versions, hardware, and four parts. An arm that is there already is not run
again; remove the file to start over.

equal    micro, LoRA, 20 steps of 8 rows, on rows whose answers have 1 to 51 tokens. "one" is one process; "accumulated"
         twice 4 rows; "ddp" two processes with 4 rows each; "fsdp2" the same through data/launch/fsdp2.yaml, with its 8
         processes made 2, and accelerate talked into doing FSDP without a GPU (`allow_fsdp_on_cpu`); "ddp, local means"
         with average_tokens_across_devices=False: each process divides by its own token count. Losses in nats/token;
         distances of the trained weights from those of "one", the largest of a single weight, and as a share of the way
         that "one" has moved them.
refused  how a launch that silently does something else ends, with ftlab.pipeline.train's checks.
speed    smollm2 in fp32, 8 steps, LoRA and full, two processes with one thread and 2 rows each: "apart", as two runs
         that know nothing of each other, and "together", under DDP. So the cores are equally busy, and the difference
         is what belonging together costs. Seconds per step, of each process the last six steps.
link     between two processes an all-reduce of as many bytes; backend gloo, the link is the machine's memory.
load: mean number of running threads on the machine over the last minute, ours included: other work ran beside, at a
lower priority.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
LAUNCH = Path(__file__).resolve().parent.parent / "launch"
ONE, TWO = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EQUAL = {  # arm: (processes, rows of one process at a time, accumulation)
    "one": (1, 8, 1),
    "accumulated": (1, 4, 2),
    "ddp": (2, 4, 1),
    "ddp, local means": (2, 4, 1),
    "fsdp2": (2, 4, 1),
}
SPEED = {"LoRA, apart": (1, 16), "LoRA, together": (2, 16), "full, apart": (1, 0), "full, together": (2, 0)}


def rows_of_two_lengths() -> list[dict]:
    """Tickets, whose answers have 37 to 51 tokens, and easy questions, whose answers have few: 80 of each, in turn."""
    from ftlab.paths import DATA
    from ftlab.pipeline import data

    lines = (DATA / "general" / "candidates.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [
        {
            "prompt": [{"role": "user", "content": fact["question"]}],
            "completion": [{"role": "assistant", "content": fact["answer"]}],
        }
        for fact in map(json.loads, lines[:80])
    ]
    tickets = data.triage_rows(DATA / "triage" / "train.jsonl")[:80]
    return [row for pair in zip(tickets, facts, strict=True) for row in pair]


def recipe_of(part: str, arm: str):
    from ftlab.pipeline.recipe import Recipe

    common = {"precision": "fp32", "schedule": "constant", "warmup_steps": 0, "logging_steps": 1}
    if part == "equal":
        _, rows, accumulated = EQUAL[arm]
        sizes = {"batch_size": rows, "gradient_accumulation_steps": accumulated, "max_steps": 20, "save_steps": 10}
        return Recipe(model="micro", r=8, lora_alpha=16, learning_rate=3e-3, **sizes, **common)
    r = SPEED[arm][1]
    return Recipe(r=r, learning_rate=1e-4 if r else 1e-5, batch_size=2, max_steps=8, save_steps=1000, **common)


# --- what a worker does ----------------------------------------------------------------------------------------------


def allow_fsdp_on_cpu() -> None:
    """accelerate 1.15 shards on GPUs only and falls back to DDP without a word; its code needs no GPU, and runs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def work(part: str, arm: str, folder: Path) -> None:
    """Trains one arm in this process; leaves a report of each process beside the run."""
    import torch

    from ftlab.paths import DATA
    from ftlab.pipeline import data, train

    torch.set_num_threads(1)
    rank, count = train.processes()
    if arm == "fsdp2":
        allow_fsdp_on_cpu()
    arguments = train.training_arguments
    if arm == "ddp, local means":
        train.training_arguments = lambda *a, **k: {**arguments(*a, **k), "average_tokens_across_devices": False}
    rows = rows_of_two_lengths() if part == "equal" else data.triage_rows(DATA / "triage" / "train.jsonl")
    ends: list[float] = []
    run = train.train(recipe_of(part, arm), rows, folder=folder / "run", on_log=lambda record: ends.append(time.time()))

    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor

    held = run.model.parameters()
    report = {
        "processes": count,
        "distributed_type": AcceleratorState().distributed_type.value,
        "numbers_held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in held),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "step_seconds": [later - earlier for earlier, later in itertools.pairwise(ends[:-1])],
        "losses": run.series("loss")[1],
    }
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


def time_link(folder: Path) -> None:
    """Seconds of an all-reduce of fp32 numbers between two processes, for the gradients of SPEED and sizes between."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = []
    for size in (4e6, 19.5e6, 64e6, 256e6, 538e6):
        payload, seconds = torch.ones(int(size / 4)), []
        for _ in range(9):
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(payload)
            seconds.append(time.perf_counter() - start)
        found.append({"bytes": payload.nbytes, "median": statistics.median(seconds[1:]), "fastest": min(seconds[1:])})
    if distributed.get_rank() == 0:
        (folder / "report-0.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


# --- what starts them ------------------------------------------------------------------------------------------------


def launched(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def two_process_config(name: str, folder: Path) -> Path:
    """The accelerate configuration of data/launch, for two processes."""
    text = (LAUNCH / name).read_text(encoding="utf-8").replace("num_processes: 8", "num_processes: 2")
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def run_arm(part: str, arm: str, folder: Path) -> list[dict]:
    """The reports of an arm's processes, first to last. Raises RuntimeError with the end of the output if it fails."""
    count = {"equal": EQUAL, "speed": SPEED, "link": {"": (2,)}}[part][arm][0]
    start = ONE if count == 1 else TWO
    if arm == "fsdp2":
        config = two_process_config("fsdp2.yaml", folder)
        start = [*ONE, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = launched([*start, __file__, "--worker", part, arm, str(folder)])
    if done.returncode:
        raise RuntimeError(f"{part} / {arm} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return [json.loads(report.read_text()) for report in sorted(folder.glob("report-*.json"))]


def adapter(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def start_of_one(folder: Path) -> dict:
    """The adapter before the first step: its lora_A is drawn from the recipe's seed, its lora_B is zero."""
    from ftlab.pipeline import train

    recipe = recipe_of("equal", "one")
    trainer = train.sft_trainer(recipe, rows_of_two_lengths()[:8], None, folder / "start")
    trainer.save_model(str(folder / "run" / "adapter"))
    return adapter(folder)


def distance(a: dict, b: dict) -> float:
    """The Euclidean length of a - b, over all tensors."""
    return sum((a[name] - b[name]).double().pow(2).sum().item() for name in a) ** 0.5


def equal_part() -> dict:
    found = {}
    with contextlib.ExitStack() as stack:
        folders = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in (*EQUAL, "start")}
        for arm in EQUAL:
            first, *others = run_arm("equal", arm, folders[arm])
            files = sorted(p.relative_to(folders[arm] / "run").as_posix() for p in (folders[arm] / "run").rglob("*"))
            found[arm] = {key: first[key] for key in ("processes", "distributed_type", "losses")}
            found[arm]["numbers_held"] = [report["numbers_held"] for report in (first, *others)]
            found[arm]["files"] = [name for name in files if (folders[arm] / "run" / name).is_file()]
            log = (folders[arm] / "run" / "log.jsonl").read_text().splitlines()
            found[arm]["log_records"] = len(log)
        one, start = adapter(folders["one"]), start_of_one(folders["start"])
        moved = distance(one, start)
        for arm in EQUAL:
            other = adapter(folders[arm])
            found[arm]["largest_difference"] = max((one[name] - other[name]).abs().max().item() for name in one)
            found[arm]["relative_difference"] = distance(one, other) / moved
    return found


def refused_part() -> dict:
    """Two launches on a CPU that accelerate turns into something else, and what the training module says to it."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_of("equal", "ddp").replace(max_steps=1).to_yaml(folder / "recipe.yaml")
        multi_cpu = {"distributed_type": "MULTI_CPU", "num_machines": 1, "num_processes": 2, "use_cpu": True}
        (folder / "multi_cpu.yaml").write_text(json.dumps(multi_cpu))
        configs = {"MULTI_CPU": folder / "multi_cpu.yaml", "FSDP": two_process_config("fsdp2.yaml", folder)}
        for name, config in configs.items():
            start = [*ONE, "-m", "accelerate.commands.launch", "--config_file", str(config)]
            command = [*start, "-m", "ftlab.pipeline.train", str(recipe), "--folder", str(folder / name)]
            done = launched([*command, "--processes", "2"])
            said = [
                line for line in done.stdout.splitlines() if "RuntimeError:" in line or "error: --processes" in line
            ]
            found[name] = {"exit_code": done.returncode, "said": said[0].split("Error: ")[-1].split("error: ")[-1]}
    return found


def speed_part() -> dict:
    found = {}
    for arm in SPEED:
        with contextlib.ExitStack() as stack:
            runs = 2 // SPEED[arm][0]
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(runs)]
            with ThreadPoolExecutor(runs) as pool:  # apart: two runs at the same time
                reports = [one for each in pool.map(functools.partial(run_arm, "speed", arm), folders) for one in each]
        seconds = [second for report in reports for second in report["step_seconds"][1:]]
        peaks = [report["peak_gb"] for report in reports]
        found[arm] = {"step_seconds": seconds, "peak_gb": peaks, "load": os.getloadavg()[0]}
    return found


def link_part() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return run_arm("link", "", Path(folder))[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=3, metavar=("PART", "ARM", "FOLDER"))
    if worker := parser.parse_args().worker:
        part, arm, folder = worker
        return time_link(Path(folder)) if part == "link" else work(part, arm, Path(folder))

    from ftlab.pipeline.train import environment

    result = json.loads(FILE.read_text()) if FILE.is_file() else {"environment": environment()}
    parts = {"equal": equal_part, "refused": refused_part, "speed": speed_part, "link": link_part}
    for name, part in parts.items():
        if name not in result:
            result[name] = part()
            FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(result[name], indent=1))


if __name__ == "__main__":
    main()
