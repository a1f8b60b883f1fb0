"""Greedy answers of SmolLM2 with the shipped triage adapter: the plain loop, batches, and ftlab.pipeline.evaluate.

    python bench/generate.py          three rounds
    python bench/generate.py 1        one

The first 32 tickets of data/triage/validation.jsonl, at most 64 new tokens; each contestant in a process of its own, in
turns; timed after one short answer, from rendered prompts to texts. Those that answer one ticket after another answer
the first few only.

    plain            model.generate, fp32, the adapter as PEFT applies it; 4 tickets
    plain, autocast  the same under bf16 autocast, as training leaves it: the trap; 2 tickets
    merged           plain, the adapter merged before the clock starts; 4 tickets
    batched          model.generate on all 32 at once, padded on the left
    batched, static  the same with cache_implementation="static"
    ours             evaluate.generate: decode.Decoder, batches of 32; its copy of the weights is timed too

same_answers: how many texts are those of "batched". In fp32 it must be all of them.
"""

import contextlib
import statistics
import sys

import harness

NEW = 64
TICKETS = {"plain": 4, "plain, autocast": 2, "merged": 4, "batched": 32, "batched, static": 32, "ours": 32}


def run(name: str) -> dict:
    """Seconds and texts of one contestant."""
    import torch
    from peft import PeftModel

    from ftlab.paths import DATA
    from ftlab.pipeline import data, evaluate
    from ftlab.pipeline.models import load

    model, tokenizer = load("smollm2")
    model = PeftModel.from_pretrained(model, str(DATA / "triage_adapter")).eval()
    model = model.merge_and_unload() if name == "merged" else model
    prompts = [row["prompt"] for row in data.triage_rows(DATA / "triage" / "validation.jsonl")[: TICKETS[name]]]
    more = {"cache_implementation": "static"} if name == "batched, static" else {}

    def answers(model, part, new):
        texts = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id, **more)
        return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    trap = torch.autocast("cpu", torch.bfloat16) if name == "plain, autocast" else contextlib.nullcontext()
    with trap, torch.inference_mode():
        answers(model, prompts[:1], 2)
        with harness.stopwatch() as taken:
            if name == "ours":
                texts = evaluate.generate(model, tokenizer, prompts, NEW)
            elif name.startswith("batched"):
                texts = answers(model, prompts, NEW)
            else:
                texts = [answers(model, [prompt], NEW)[0] for prompt in prompts]
    return {"contestant": name, **taken, "peak_bytes": harness.peak_bytes(), "answers": texts}


def main(rounds: int) -> None:
    runs = [{"round": i, **harness.alone(run, name)} for i, name in harness.in_turns([*TICKETS], rounds)]
    wanted = next(r["answers"] for r in runs if r["contestant"] == "batched")
    summary = {}
    for name in TICKETS:
        own = [r for r in runs if r["contestant"] == name]
        summary[name] = {
            "seconds_a_ticket": harness.spread([r["seconds"] / len(r["answers"]) for r in own]),
            "cpu_seconds_a_ticket": statistics.median(r["cpu_seconds"] / len(r["answers"]) for r in own),
            "tickets": TICKETS[name],
            "same_answers": min(sum(map(str.__eq__, r["answers"], wanted)) for r in own),
            "peak_bytes": max(r["peak_bytes"] for r in own),
        }
    plain, ours = (summary[name]["seconds_a_ticket"]["median"] for name in ("plain", "ours"))
    for name, one in summary.items():
        seconds = one["seconds_a_ticket"]
        print(
            f"{name:16} {seconds['median']:6.3f} s a ticket ({seconds['min']:.3f} to {seconds['max']:.3f}), "
            f"{plain / seconds['median']:5.2f} times the plain loop, {one['peak_bytes'] / 1e9:.1f} GB, "
            f"{one['same_answers']} of {one['tickets']} answers the batch's"
        )
    print(f"plain / ours: {plain / ours:.2f}")
    runs = [{key: value for key, value in r.items() if key != "answers"} for r in runs]
    print(harness.write("generate", {"max_new_tokens": NEW, "summary": summary, "runs": runs, "answers": wanted}))


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["3"])[0]))
