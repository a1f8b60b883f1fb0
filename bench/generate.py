"""Answers of SmolLM2 with the shipped ask adapter: the plain loop, batches, and ftlab.cpu.Decoder.

    python bench/generate.py          three rounds
    python bench/generate.py 1        one

The 32 questions of data/ask/validation.jsonl with the lowest ids, at most 64 new tokens; each contestant in a process
of its own, in turns; timed after one short answer, from rendered prompts to texts. Those that answer one question after
another answer the first few only.

    plain            model.generate, fp32, the adapter as PEFT applies it; 4 questions
    plain, autocast  the same under bf16 autocast, as training leaves it: the trap; 2 questions
    merged           plain, the adapter merged before the clock starts; 4 questions
    batched          model.generate on all 32 at once, padded on the left
    batched, static  the same with cache_implementation="static"
    ours             ftlab.answers: ftlab.cpu.Decoder, batches of 32; its copy of the weights is timed too

And sampled, as GRPO and RLOO do it, from the whole vocabulary at temperature 1:

    sampled          one question after another; 4 questions
    sampled, batched model.generate on 8 questions at once: TRL's own way, as it is called under its trainers
    sampled, ours    ftlab.cpu.Decoder on the same 8, from the same seed; its copy of the weights is timed too

same_answers: how many texts are those of "batched" or "sampled, batched". In fp32 all greedy ones must be.
"sampled" draws in another order, and in "sampled, ours" rounding may tip a draw that was nearly tied.
"""

import statistics
import sys

import harness

NEW = 64
GREEDY = {"plain": 4, "plain, autocast": 2, "merged": 4, "batched": 32, "batched, static": 32, "ours": 32}
SAMPLED = {"sampled": 4, "sampled, batched": 8, "sampled, ours": 8}
QUESTIONS = GREEDY | SAMPLED


def run(name: str) -> dict:
    """Seconds and texts of one contestant."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    import ftlab
    from ftlab.cpu import Decoder
    from ftlab.data import read_rows
    from ftlab.paths import DATA

    path = ftlab.model_path("smollm2")
    tokenizer, base = (
        AutoTokenizer.from_pretrained(path),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    )
    model = PeftModel.from_pretrained(base, DATA / "ask_adapter").eval()
    model = model.merge_and_unload() if name == "merged" else model
    rows = sorted(read_rows(DATA / "ask" / "validation.jsonl").rows, key=lambda row: row["id"])
    prompts = [row["prompt"] for row in rows[: QUESTIONS[name]]]
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if name in SAMPLED else {"do_sample": False}
    if name == "batched, static":
        how["cache_implementation"] = "static"
    how |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    def answers(model, part, new):
        texts = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=new, **how))
        return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def drawn():
        texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = Decoder(model).generate(ids, NEW, [tokenizer.eos_token_id], temperature=1.0)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    with torch.autocast("cpu", torch.bfloat16, enabled=name == "plain, autocast"), torch.inference_mode():
        answers(model, prompts[:1], 2)
        torch.manual_seed(0)
        with harness.stopwatch() as taken:
            if name == "ours":
                texts = ftlab.answers(model, tokenizer, prompts, NEW)
            elif name == "sampled, ours":
                texts = drawn()
            elif "batched" in name:
                texts = answers(model, prompts, NEW)
            else:
                texts = [answers(model, [prompt], NEW)[0] for prompt in prompts]
    return {"contestant": name, **taken, "peak_bytes": harness.peak_bytes(), "answers": texts}


def main(rounds: int) -> None:
    runs = [{"round": i, **harness.alone(run, name)} for i, name in harness.in_turns([*QUESTIONS], rounds)]
    batched, drawn = (
        next(r["answers"] for r in runs if r["contestant"] == name) for name in ("batched", "sampled, batched")
    )
    summary = {}
    for name in QUESTIONS:
        own = [r for r in runs if r["contestant"] == name]
        summary[name] = {
            "seconds_an_answer": harness.spread([r["seconds"] / len(r["answers"]) for r in own]),
            "cpu_seconds_an_answer": statistics.median(r["cpu_seconds"] / len(r["answers"]) for r in own),
            "questions": QUESTIONS[name],
            "same_answers": min(sum(map(str.__eq__, r["answers"], drawn if name in SAMPLED else batched)) for r in own),
            "peak_bytes": max(r["peak_bytes"] for r in own),
        }
    for name, one in summary.items():
        plain = summary["sampled" if name in SAMPLED else "plain"]["seconds_an_answer"]
        seconds = one["seconds_an_answer"]
        print(
            f"{name:16} {seconds['median']:6.3f} s an answer ({seconds['min']:.3f} to {seconds['max']:.3f}), "
            f"{plain['median'] / seconds['median']:5.2f} times the plain loop, {one['peak_bytes'] / 1e9:.1f} GB, "
            f"{one['same_answers']} of {one['questions']} answers the batch's"
        )
    runs = [{key: value for key, value in r.items() if key != "answers"} for r in runs]
    print(harness.write("generate", {"max_new_tokens": NEW, "summary": summary, "runs": runs, "answers": batched}))


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["3"])[0]))
