"""The wrong chat template, measured: the triage adapter on SmolLM2, asked in ten ways (8 minutes, one core).

    python data/results/templates.py        the ways that templates.json lacks

Each way renders the first 48 test tickets of data/triage differently; weights, tickets and scores stay the same. With
"own", SmolLM2's template, the adapter was trained (data/triage_adapter); with a system message chatml.jinja renders the
same text (checked), so it is the way "own". The other files of data/templates are the other ways. "none" is the system
message, a blank line, the ticket and a blank line, without any marker. "no system message" leaves it out: SmolLM2's own
template then writes one of its own, bare ChatML does not. "double BOS" puts <|im_start|> in front once more. "base
model" is SmolLM2 without the adapter, asked in its own template.

    answers   greedy, at most 64 tokens, stopped by SmolLM2's end of turn: valid_json, exact and fields as in
              ftlab.pipeline.evaluate; stopped: it ended by itself; inside: the right JSON stands somewhere in it
    nll       of the right JSON, nats/token: the same tokens every time, without an end of turn
    prompt_tokens   mean length of a prompt under SmolLM2's tokenizer

Nothing is random: greedy answers in fp32, one thread. `answers` holds all of them, without special tokens.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
TICKETS = 48
WAYS = ("own", "llama3", "mistral", "own, no system message", "none", "gemma", "deepseek", "own, double BOS",
        "base model", "chatml, no system message")  # fmt: skip


def prompts_of(way: str, tokenizer, rows: list[dict]) -> list[str]:
    """The text that the model reads before it answers, one for each ticket."""
    from ftlab.paths import DATA

    name = way.split(",")[0]
    if name == "none":
        return ["".join(message["content"] + "\n\n" for message in row["prompt"]) for row in rows]
    file = DATA / "templates" / f"{name}.jinja"
    options = {"chat_template": file.read_text(encoding="utf-8") if file.is_file() else None, "tokenize": False}
    messages = [row["prompt"][1:] if "no system" in way else row["prompt"] for row in rows]
    texts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, **options) for m in messages]
    return [tokenizer.bos_token + text for text in texts] if "double BOS" in way else texts


def answer_nll(model, prompt: list[int], answer: list[int]) -> float:
    """Mean nats/token of the answer's tokens after the prompt's."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]  # (answer, V)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()


def measure(way: str, model, tokenizer, rows: list[dict]) -> dict:
    """The record of one way; lists have one entry a ticket."""
    from ftlab.cpu import Decoder
    from ftlab.pipeline import evaluate

    texts, right = prompts_of(way, tokenizer, rows), [row["completion"][0]["content"] for row in rows]
    prompts, wanted = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (texts, right))
    decoder, stop = Decoder(model), model.generation_config.eos_token_id
    ids = []
    for start in range(0, TICKETS, 24):
        ids += decoder.answer(prompts[start : start + 24], 64, [stop])
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    frame = evaluate.scores(answers, [json.loads(text) for text in right])
    frame = frame.assign(
        stopped=[len(each) < 64 for each in ids],
        inside=[text in answer for text, answer in zip(right, answers, strict=True)],
    )
    columns = ["valid_json", "exact", "fields", "stopped", "inside"]
    table = evaluate.summary(frame[columns])
    return {
        "way": way,
        **{key: table.loc[key, ["mean", "low", "high"]].round(4).tolist() for key in columns},
        "exact_each": frame["exact"].astype(int).tolist(),
        "nll": [round(answer_nll(model, *pair), 4) for pair in zip(prompts, wanted, strict=True)],
        "prompt_tokens": round(sum(map(len, prompts)) / len(prompts), 1),
        "answers": answers,
    }


def main() -> None:
    import torch
    from lines import write

    from ftlab.paths import DATA
    from ftlab.pipeline import data
    from ftlab.pipeline.models import load
    from ftlab.pipeline.train import environment

    from peft import PeftModel  # isort: skip  (after ftlab.pipeline.models, which quiets what PEFT loads)

    torch.set_num_threads(1)
    rows = data.triage_rows(DATA / "triage" / "test.jsonl")[:TICKETS]
    result = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"runs": []}
    result = {"environment": environment(), "tickets": len(rows), "runs": result["runs"]}
    model, tokenizer = load("smollm2", dtype=torch.float32)
    assert prompts_of("own", tokenizer, rows) == prompts_of("chatml", tokenizer, rows)
    model = PeftModel.from_pretrained(model, str(DATA / "triage_adapter")).eval()
    model.merge_adapter()  # fewer operations a forward pass
    done = {run["way"] for run in result["runs"]}
    for way in [way for way in WAYS if way not in done][: int((sys.argv[1:] or [99])[0])]:
        if way == "base model":
            model.unmerge_adapter()
            with model.disable_adapter():
                one = measure(way, model, tokenizer, rows)
            model.merge_adapter()
        else:
            one = measure(way, model, tokenizer, rows)
        result["runs"].append(one)
        write(FILE, result)
        print({key: one[key] for key in ("way", "exact", "valid_json", "inside", "stopped")}, flush=True)


if __name__ == "__main__":
    main()
