"""Does a GGUF file answer as the model it was made from? All 150 hand-written tickets, in eight minutes.

    python data/results/gguf_parity.py

The adapter of data/triage_adapter is merged, converted to F16, Q8_0 and Q4_0 by ftlab.pipeline.export, and each step
asked again; what it is compared with is the unmerged model in fp32. Writes gguf_parity.json beside this file: versions,
hardware, and for each step its size, how many of its answers are those of the unmerged model, character by character,
and the share that is right in all five fields. Greedy decoding of one trained model: there is no seed.
"""

import json
import tempfile
from pathlib import Path


def main() -> None:
    import torch
    from peft import PeftModel

    from ftlab.paths import DATA
    from ftlab.pipeline import data, evaluate, export, serve
    from ftlab.pipeline.models import load
    from ftlab.pipeline.train import environment

    rows = data.triage_rows(DATA / "triage" / "hand_test.jsonl")
    prompts = [row["prompt"] for row in rows]
    labels = [json.loads(row["completion"][0]["content"]) for row in rows]

    def record(step: str, answers: list[str], wanted: list[str], megabytes: float) -> dict:
        same = sum(a == b for a, b in zip(answers, wanted, strict=True))
        exact = evaluate.scores(answers, labels)["exact"].mean()
        return {"step": step, "megabytes": megabytes, "tickets": len(rows), "same_answers": same, "exact": exact}

    model, tokenizer = load("smollm2", dtype=torch.float32)
    unmerged = PeftModel.from_pretrained(model, str(DATA / "triage_adapter")).eval()
    wanted = evaluate.generate(unmerged, tokenizer, prompts, max_new_tokens=64, batch_size=75)
    with tempfile.TemporaryDirectory() as folder:
        merged = export.merge(DATA / "triage_adapter", "smollm2", Path(folder) / "merged", prompts[:2])
        answers = evaluate.generate(*load(merged, dtype=torch.float32), prompts, max_new_tokens=64, batch_size=75)
        megabytes = (merged / "model.safetensors").stat().st_size / 1e6
        steps = [record("transformers, merged", answers, wanted, megabytes)]
        for kind in ("f16", "q8_0", "q4_0"):
            file = export.to_gguf(merged, Path(folder) / f"{kind}.gguf", kind)
            with serve.serve(file, n_ctx=512, parallel=16) as server:
                replies = serve.ask(server.base_url, prompts, max_tokens=64, workers=16)
            steps.append(record(f"llama.cpp {kind}", [r.text for r in replies], wanted, file.stat().st_size / 1e6))
    result = {"environment": environment(), "steps": steps}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(steps, indent=1))


if __name__ == "__main__":
    main()
