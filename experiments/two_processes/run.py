"""data/launch/sft.py in one process and in two, and what becomes of launches that do not do what they were asked to.

    python experiments/two_processes/run.py            every run that records.jsonl lacks: 5 minutes of two cores

micro, LoRA, 6 steps of 8 rows of data/ask, fp32, one thread a process, one seed. Everything is compared with "one".

equal    "one" process; "accumulated": twice 4 rows; "ddp": torchrun, two processes with 4 rows each; "ddp, local
         means": the same with average_tokens_across_devices=False, so each divides by its own token count; "fsdp2":
         `accelerate launch` with data/launch/fsdp2.yaml for two processes, through fsdp_on_cpu.py. Two QLoRA arms, also
         under fsdp2: the base in NF4, stored as bytes or as floats (bnb_4bit_quant_storage), beside "qlora, one".
         losses: nats/token, by step. said: the last line of each process. lora_b_off: the distance of the trained
         lora_B from that of "one" ("qlora, one"), as a share of its length: it starts at 0. shards_off, of fsdp2: the
         same for the shards of its last checkpoint, put together by accelerate's merge_fsdp_weights.
refused  the error of a run that names what it expects: two processes by accelerate's MULTI_CPU; fsdp2.yaml on a CPU
         without fsdp_on_cpu.py.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("records.jsonl")
DATA = FILE.parents[2] / "data"
LAUNCH, SCRIPT = DATA / "launch", DATA / "launch" / "sft.py"
SETTINGS = {
    "model": str(DATA / "micro" / "model"), "rows": "rows.jsonl", "learning_rate": 3e-3,
    "lr_scheduler_type": "constant", "max_steps": 6, "logging_steps": 1, "save_steps": 6, "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
ADAPTER = "adapter_model.safetensors"
ONE = [sys.executable]
TORCHRUN = [*ONE, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [*ONE, "-m", "accelerate.commands.launch", "--config_file"]
FSDP = [*ACCELERATE, "fsdp2.yaml", str(LAUNCH / "fsdp_on_cpu.py")]
NF4 = "\nfrom transformers import BitsAndBytesConfig\nNF4 = BitsAndBytesConfig(load_in_4bit=True, " + (
    'bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.{})\n'
)
EQUAL = {  # arm: launcher, rows of one process, its own arguments, dtype that 4-bit weights are stored in
    "one": (ONE, 8, ""),
    "accumulated": (ONE, 4, "--gradient_accumulation_steps 2"),
    "ddp": (TORCHRUN, 4, "--expects '2 MULTI_CPU'"),
    "ddp, local means": (TORCHRUN, 4, "--expects '2 MULTI_CPU' --average_tokens_across_devices false"),
    "fsdp2": (FSDP, 4, "--expects '2 FSDP'"),
    "qlora, one": (ONE, 8, "", "uint8"),
    "qlora as bytes, fsdp2": (FSDP, 4, "--expects '2 FSDP'", "uint8"),
    "qlora as floats, fsdp2": (FSDP, 4, "--expects '2 FSDP'", "float32"),
}
REFUSED = {"MULTI_CPU": "multi_cpu.yaml", "FSDP": "fsdp2.yaml"}


def in_nf4(script: str, storage: str) -> str:
    """sft.py with its base loaded in NF4."""
    start, rest = script.split("\n@dataclass")
    changed = rest.replace("dtype=dtype)", "dtype=dtype, quantization_config=NF4)")
    return start + NF4.format(storage) + "\n@dataclass" + changed


def launch(folder: Path, launcher: list[str], batch: int, rest: str, storage: str = "") -> subprocess.CompletedProcess:
    """Runs sft.py, in a folder of its own, with the files that it needs."""
    import shlex

    folder.mkdir(exist_ok=True)
    rows = (DATA / "ask" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:48]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "sft.yaml").write_text(json.dumps(SETTINGS))
    fsdp = (LAUNCH / "fsdp2.yaml").read_text(encoding="utf-8").replace("num_processes: 8", "num_processes: 2")
    (folder / "fsdp2.yaml").write_text(fsdp, encoding="utf-8")
    multi_cpu = {"distributed_type": "MULTI_CPU", "num_machines": 1, "num_processes": 2, "use_cpu": True}
    (folder / "multi_cpu.yaml").write_text(json.dumps(multi_cpu))
    script = SCRIPT.read_text(encoding="utf-8")
    (folder / "sft.py").write_text(in_nf4(script, storage) if storage else script, encoding="utf-8")
    command = [*launcher, "sft.py", "--config", "sft.yaml", "--output_dir", "run"]
    command += ["--per_device_train_batch_size", str(batch), *shlex.split(rest)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def losses(folder: Path) -> list[float]:
    """The losses that a run has logged, one a step."""
    state = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    return [record["loss"] for record in state["log_history"] if "loss" in record]


def off(file: Path, reference: Path) -> float:
    """The distance of a file's lora_B from the reference's, over the latter's length."""
    from safetensors.torch import load_file

    a, b = ({name: w for name, w in load_file(each).items() if "lora_B" in name} for each in (file, reference))
    square = [sum(weight.double().pow(2).sum().item() for weight in each) for each in (
        [a[name] - b[name] for name in b], b.values())]  # fmt: skip
    return (square[0] / square[1]) ** 0.5


def run(arm: str, scratch: Path) -> dict:
    folder = scratch / arm
    done = launch(folder, *EQUAL[arm])
    if done.returncode:
        raise RuntimeError(f"{arm} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    reference = scratch / ("qlora, one" if "qlora" in arm else "one") / "run" / ADAPTER
    said = [line for line in done.stdout.splitlines() if " holds " in line]
    found = {"said": said, "losses": losses(folder), "lora_b_off": off(folder / "run" / ADAPTER, reference)}
    if arm == "fsdp2":
        from accelerate.utils import merge_fsdp_weights

        merge_fsdp_weights(str(folder / "run/checkpoint-6/pytorch_model_fsdp_0"), str(folder / "merged"))
        found["shards_off"] = off(folder / "merged" / "model.safetensors", reference)
    return found


def refused(config: str, scratch: Path) -> str:
    expected = "2 FSDP" if "fsdp" in config else "2 MULTI_CPU"
    done = launch(scratch / config, [*ACCELERATE, config], 4, f"--expects '{expected}'")
    assert done.returncode, "a run that is not what was asked for went through"
    return next(line for line in done.stderr.splitlines() if "AssertionError:" in line).split("AssertionError: ")[1]


def place(record: dict) -> int:
    """Where a record stands in the file: the arms in the order of EQUAL, then what was refused."""
    return [*EQUAL, *REFUSED].index(record["arm"])


def main() -> None:
    from experiments.runs import add, read, replace, stamp

    names = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) for name in names}
    about = {"environment": {"python": platform.python_version(), "versions": versions}}
    rows = ["data/ask/train.jsonl, the first 48 rows"]
    about |= stamp("float32", rows, {"settings": "given in run.py"}) | {"threads": 1}
    done = {(one["part"], one["arm"]) for one in read(FILE)}
    missing = {arm for arm in EQUAL if ("equal", arm) not in done}
    again = missing | {"one", "qlora, one"} if missing else missing  # whose weights the others are held against
    with tempfile.TemporaryDirectory() as scratch:
        for arm in [arm for arm in EQUAL if arm in again]:
            found = run(arm, Path(scratch))
            others = [one for one in read(FILE) if (one["part"], one["arm"]) != ("equal", arm)]
            replace(FILE, sorted([*others, {"part": "equal", "arm": arm, **found, **about}], key=place))
            print(arm, found, flush=True)
        for name, config in REFUSED.items():
            if ("refused", name) not in done:
                says = refused(config, Path(scratch))
                add(FILE, {"part": "refused", "arm": name, "says": says, **about})
                print(name, says, flush=True)


if __name__ == "__main__":
    main()
