"""Does a standard harness count as we do? `ask` by Inspect and by our own loop, on one server. Three minutes.

    make harness                              # once: .venv-harness, which has Inspect
    python experiments/harness/run.py            # HARNESS=folder names another environment

data/ask_adapter is merged into SmolLM2, converted to GGUF (f16) and served by `ftlab.serve`. Both ask the 132 questions
of data/ask/hand_test.jsonl, greedily: our loop with the `openai` client, Inspect with data/harness/ask_task.py.
records.jsonl holds, for each, one 0 or 1 a question and the answers; and what Inspect's environment weighs.
"""

import json
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ftlab.paths import DATA

FILE = Path(__file__).with_name("records.jsonl")
ROOT = DATA.parent
HARNESS = Path(os.environ.get("HARNESS") or ROOT / ".venv-harness")


def merged(folder: Path) -> Path:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import model_path

    base = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    PeftModel.from_pretrained(base, str(DATA / "ask_adapter")).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path("smollm2")).save_pretrained(folder)
    return folder


def ours(url: str, rows: list[dict]) -> list[str]:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")

    def ask(row: dict) -> str:
        asked = {"model": "model", "messages": row["prompt"], "temperature": 0, "max_tokens": 80}
        return client.chat.completions.create(**asked).choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, rows))


def theirs(url: str, folder: Path) -> dict:
    """Inspect's log, a JSON object."""
    command = [
        HARNESS / "bin" / "inspect",
        "eval",
        "data/harness/ask_task.py",
        "--model",
        "openai-api/ask/model",
        "--log-dir",
        folder,
    ]
    command += ["--log-format", "json", "--display", "plain", "--max-connections", "4"]
    env = {**os.environ, "ASK_BASE_URL": url, "ASK_API_KEY": "none", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command)), env=env, check=True, cwd=ROOT)
    (log,) = folder.glob("*.json")
    return json.loads(log.read_text(encoding="utf-8"))


def main() -> None:
    from experiments.ask.run import environment
    from experiments.runs import replace, stamp
    from ftlab.export import to_gguf
    from ftlab.serve import serve
    from ftlab.tasks import ask

    rows = [json.loads(line) for line in (DATA / "ask" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        file = to_gguf(merged(folder / "merged"), folder / "ask.gguf")
        with serve(file, n_ctx=512, parallel=4) as server:
            answers = ours(server.url, rows)
            log = theirs(server.url, folder)
    (scorer,) = log["results"]["scores"]
    samples = {sample["id"]: sample["scores"]["by_execution"] for sample in log["samples"]}
    packages = HARNESS / "lib"
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    runs = [
        {"who": "our loop", "right": [int(ask.scorer(*each)) for each in zip(answers, rows, strict=True)],
         "answers": answers},
        {"who": "Inspect", "right": [int(samples[row["id"]]["value"]) for row in rows],
         "answers": [samples[row["id"]]["answer"] for row in rows],
         "reported": {name: metric["value"] for name, metric in scorer["metrics"].items()}},
    ]  # fmt: skip
    about = {"inspect_ai": log["eval"]["packages"]["inspect_ai"], "environment_mb": round(size / 1e6)}
    shared = {"environment": environment() | about}
    shared |= stamp("float16", ["ask/hand_test"], {"settings": "given in run.py"})
    replace(FILE, [run | shared for run in runs])
    for run in runs:
        print(run["who"], sum(run["right"]), "of", len(rows), run.get("reported", ""))
    print(sum(a == b for a, b in zip(runs[0]["answers"], runs[1]["answers"], strict=True)), "same answers")


if __name__ == "__main__":
    main()
