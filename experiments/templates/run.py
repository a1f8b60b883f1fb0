"""The wrong chat template, measured: the `ask` adapter on SmolLM2, asked in ten ways, and the base. Ten minutes.

    python experiments/templates/run.py        the ways that records.jsonl lacks

Each way renders the 132 questions of data/ask/hand_test.jsonl differently; weights, questions and check stay the same.
The adapter (data/ask_adapter) was trained in SmolLM2's own template, which is the way "own". With a system message,
chatml.jinja and qwen3.jinja give the same ids, as the script checks. The other files of data/templates are the other
ways. "qwen3, no thinking" is `enable_thinking=False`, so the answer begins after empty reasoning. "none" is the system
message, a blank line, the question and a blank line, without any marker. "no system message" leaves it out: SmolLM2's
own template then writes one of its own. "double BOS" puts <|im_start|> in front once more. "base model" is SmolLM2
without the adapter in its own template.

    kinds   one letter a question, the first that fits:
            r right (its query returns the gold rows on ten tables)     w wrong, but a query that runs
            e empty     n no stop within 80 tokens     t other text, which is no query that runs
    first   of those that did not stop, how many begin with a line that is right
    same    answers that equal "own" to the letter

Nothing is random: greedy answers in fp32, one thread, stopped by SmolLM2's end of turn.
"""

import json
from pathlib import Path

FILE = Path(__file__).with_name("records.jsonl")
WAYS = ("own", "llama3", "mistral", "deepseek", "gemma", "harmony", "qwen3, no thinking", "own, no system message",
        "own, double BOS", "none", "base model")  # fmt: skip
LIMIT = 80


def prompts_of(way: str, tokenizer, rows: list[dict]) -> list[list[int]]:
    """The ids that the model reads before it answers, one list for each question."""
    from ftlab.paths import DATA

    name, _, change = way.partition(", ")
    if name == "none":
        texts = ["".join(message["content"] + "\n\n" for message in row["prompt"]) for row in rows]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    file = DATA / "templates" / f"{name}.jinja"
    options = {"chat_template": file.read_text(encoding="utf-8")} if file.is_file() else {}
    options |= {"enable_thinking": False} if change == "no thinking" else {}
    messages = [row["prompt"][1:] if change == "no system message" else row["prompt"] for row in rows]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    return [[tokenizer.bos_token_id, *each] for each in ids] if change == "double BOS" else ids


def kind(answer: str, stopped: bool, row: dict) -> str:
    """The letter of an answer, as the docstring above says."""
    from ftlab.tasks import ask

    if ask.scorer(answer, row):
        return "r"
    if ask.runs(answer):
        return "w"
    return "e" if not answer.strip() else "t" if stopped else "n"


def measure(way: str, model, tokenizer, rows: list[dict]) -> dict:
    from ftlab.cpu import Decoder
    from ftlab.evaluate import plain_inference
    from ftlab.tasks import ask

    prompts, stop = prompts_of(way, tokenizer, rows), [model.generation_config.eos_token_id]
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    ids = [[] for _ in rows]
    with plain_inference(model):
        decoder = Decoder(model)
        for start in range(0, len(rows), 33):
            part = order[start : start + 33]
            for i, new in zip(part, decoder.generate([prompts[i] for i in part], LIMIT, stop), strict=True):
                ids[i] = new
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    kinds = [kind(*each) for each in zip(answers, [len(new) < LIMIT for new in ids], rows, strict=True)]
    begun = [answer.strip().partition("\n")[0] for answer in answers]
    first = [k == "n" and ask.scorer(line, row) for k, line, row in zip(kinds, begun, rows, strict=True)]
    tokens = round(sum(map(len, prompts)) / len(rows), 1)
    return {"way": way, "kinds": "".join(kinds), "first": sum(first), "prompt_tokens": tokens, "answers": answers}


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from experiments.ask.run import environment
    from experiments.runs import add, read, stamp
    from ftlab import model_path
    from ftlab.paths import DATA

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (DATA / "ask" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = read(FILE)
    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"))
    own = prompts_of("own", tokenizer, rows)
    assert own == prompts_of("chatml", tokenizer, rows) == prompts_of("qwen3", tokenizer, rows)
    model = AutoModelForCausalLM.from_pretrained(model_path("smollm2"), dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(DATA / "ask_adapter")).eval()
    for way in [way for way in WAYS if way not in {run["way"] for run in runs}]:
        if way == "base model":
            with model.disable_adapter():
                one = measure("own", model.get_base_model(), tokenizer, rows) | {"way": way}
        else:
            one = measure(way, model, tokenizer, rows)
        one["same"] = sum(a == b for a, b in zip(one["answers"], (runs or [one])[0]["answers"], strict=True))
        one |= {"environment": environment()}
        one |= stamp("float32", ["ask/hand_test"], {"settings": "given in run.py"})
        runs.append(one)
        add(FILE, one)
        print(
            {key: value for key, value in one.items() if key in ("way", "kinds", "first", "prompt_tokens", "same")},
            flush=True,
        )


if __name__ == "__main__":
    main()
