"""Does a GGUF file answer as the model it was made from? All 150 hand-written tickets, in eight minutes.

    python experiments/gguf_parity/run.py

The adapter of data/triage_adapter is merged, converted to F16, Q8_0 and Q4_0 by ftlab.export, and each step asked
again; what it is compared with is the unmerged model in fp32. Writes records.jsonl beside this file, one step
a line: versions, hardware, its size, how many of its answers are those of the unmerged model, character by character,
and the share that is right in all five fields. Greedy decoding of one trained model: there is no seed.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MODEL, TOKENS, AT_ONCE = "smollm2", 64, 16


def served(gguf: Path, prompts: list[list[dict]]) -> list[str]:
    """llama.cpp's greedy answers, in the order of the prompts."""
    from openai import OpenAI

    from ftlab.serve import serve

    with serve(gguf, n_ctx=512, parallel=AT_ONCE) as server, OpenAI(base_url=server.url, api_key="none") as client:

        def ask(messages: list[dict]) -> str:
            reply = client.chat.completions.create(
                model="model", messages=messages, temperature=0, max_tokens=TOKENS, timeout=600
            )
            return reply.choices[0].message.content

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, prompts))


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experiments.ask.run import environment
    from experiments.runs import replace, stamp
    from ftlab import answers, export, model_path
    from ftlab.paths import DATA
    from ftlab.tasks import triage

    rows = triage.read(DATA / "triage" / "hand_test.jsonl")
    prompts = [row["prompt"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model_path(MODEL))

    def record(step: str, said: list[str], megabytes: float) -> dict:
        same = sum(a == b for a, b in zip(said, wanted, strict=True))
        exact = sum(triage.scorer(answer, row) for answer, row in zip(said, rows, strict=True)) / len(rows)
        return {"step": step, "megabytes": megabytes, "tickets": len(rows), "same_answers": same, "exact": exact}

    base = AutoModelForCausalLM.from_pretrained(model_path(MODEL), dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, DATA / "triage_adapter")
    wanted = answers(tuned, tokenizer, prompts, TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "merged"
        merged = tuned.merge_and_unload(safe_merge=True)
        said = answers(merged, tokenizer, prompts, TOKENS)
        merged.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        steps = [record("transformers, merged", said, (folder / "model.safetensors").stat().st_size / 1e6)]
        for kind in ("f16", "q8_0", "q4_0"):
            file = export.to_gguf(folder, Path(scratch) / f"{kind}.gguf", kind)
            steps.append(record(f"llama.cpp {kind}", served(file, prompts), file.stat().st_size / 1e6))
    about = {"environment": environment()}
    about |= stamp("that of the step", ["triage/hand_test"], {"settings": "given in run.py"})
    replace(Path(__file__).with_name("records.jsonl"), [step | about for step in steps])
    print(json.dumps(steps, indent=1))


if __name__ == "__main__":
    main()
