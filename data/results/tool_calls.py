"""Tool calls on `ask`: the query as a call, its rows as an observation, an answer from the rows. Three seeds an arm.

    python data/results/tool_calls.py            the runs that tool_calls.jsonl lacks
    python data/results/tool_calls.py masked     only those of an arm

All start from data/ask_start (notebook 07's start, 3.5 million weights) and learn from the first ROWS questions of
data/ask/train.jsonl with LoRA, as notebook 08 does. The rows in them are those of TODAY, the first table.

| arm | the loss counts |
|---|---|
| masked | what the assistant wrote: the call and the answer (assistant_only_loss=True) |
| rows too | the same, and the observation |
| every token | all: schema, question and observation too (assistant_only_loss=False) |
| no tool | the answer. There is no call: the model has to know it |

Each model then answers the 132 questions of hand_test.jsonl on two tables, TODAY and TOMORROW, greedily; lists of 0 and
1 have one entry a question.

    valid     the call can be read and its query runs
    right     its query is right on all ten tables
    answer    {table: the answer holds the values of the gold query on that table, in their order, and no others}
    repeats   {table: the answer holds the values of the observation}, of the questions with a valid call; else null
    invents   what happens if nobody stops at the end of turn: the model goes on with a tool's turn of its own
    luck      ... and the rows in it are those that the query returns
    nats      mean loss of the observation's tokens on the gold conversations, nats a token
"""

import json
import re
import sys
import time
from pathlib import Path

from ftlab.paths import DATA
from ftlab.tasks import ask

HERE = Path(__file__).parent
FILE = HERE / "tool_calls.jsonl"
ARMS, SEEDS = ("masked", "rows too", "every token", "no tool"), (0, 1, 2)
ROWS, BATCH, RATE, EPOCHS, LENGTH, RANK = 640, 8, 2e-3, 1, 96, 16
TODAY, TOMORROW = 0, 9
MOST = 10  # rows of an observation
KINDS = ("count", "measure", "top")


def run_sql(query: str) -> str:
    """Run one SQLite query on the table orders.

    Args:
        query: one SELECT
    """
    return observed(query, TODAY)


def observed(query: str, table: int) -> str:
    """What the tool says, on one of the ten tables."""
    try:
        rows = ask.run_query(query, ask.databases()[table])
    except ask.QueryError as error:
        return f"error: {error}"
    return json.dumps([[round(v, 2) if isinstance(v, float) else v for v in row] for row in rows[:MOST]])


def values(observation: str) -> str:
    """The rows as words: [["Pune", 12], ["Delhi", 8]] is "Pune 12, Delhi 8"."""
    return ", ".join(" ".join(map(str, row)) for row in json.loads(observation))


def sentence(query: str, observation: str) -> str:
    """The answer that a training row gives."""
    if query.startswith("SELECT COUNT"):
        return f"There were {values(observation)} such orders."
    return f"It is {values(observation)}."


def called(query: str) -> dict:
    function = {"name": "run_sql", "arguments": {"query": query}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def conversation(row: dict, tool: bool = True) -> list[dict]:
    """The messages of a training row."""
    query = row["completion"][0]["content"]
    observation = run_sql(query)
    answer = {"role": "assistant", "content": sentence(query, observation)}
    middle = [called(query), {"role": "tool", "content": observation}] if tool else []
    return [*row["prompt"], *middle, answer]


def query_of(text: str) -> str | None:
    """The query of a call; None if the text holds none that can be read."""
    found = re.search(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    try:
        call = json.loads(found[1])
        return call["arguments"]["query"] if call["name"] == "run_sql" else None
    except (TypeError, ValueError, KeyError):
        return None


def rows_of(name: str) -> list[dict]:
    """The rows of a file of data/ask whose answer is one value."""
    lines = (DATA / "ask" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] in KINDS]


def schema() -> list[dict]:
    from transformers.utils import get_json_schema

    return [get_json_schema(run_sql)]


def train(arm: str, seed: int):
    """(model, tokenizer, seconds of processor) after training."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from ftlab import speed_up

    start = str(DATA / "ask_start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    template = (DATA / "templates" / "chatml_tools.jinja").read_text(encoding="utf-8")
    counted = template.replace("== 'assistant'", "in ('assistant', 'tool')") if arm == "rows too" else template
    tokenizer.chat_template = counted
    tools = {} if arm == "no tool" else {"tools": json.dumps(schema())}
    rows = [{"messages": conversation(row, arm != "no tool")} | tools for row in rows_of("train")[:ROWS]]
    set_seed(seed)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=SFTConfig(
            "runs/tool_calls", learning_rate=RATE, per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS,
            warmup_steps=5, seed=seed, logging_steps=10, save_strategy="no", gradient_checkpointing=False,
            max_length=512, report_to="none", use_cpu=True, bf16=False, assistant_only_loss=arm != "every token",
        ),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
    )  # fmt: skip
    speed_up(trainer)
    begin = time.process_time()
    trainer.train()
    tokenizer.chat_template = template
    return trainer.model, tokenizer, time.process_time() - begin


def measure(arm: str, seed: int) -> dict:
    from ftlab import answers

    model, tokenizer, seconds = train(arm, seed)
    test, tools = rows_of("hand_test"), None if arm == "no tool" else schema()
    gold = [row["completion"][0]["content"] for row in test]

    def say(prompts):
        return answers(model, tokenizer, prompts, LENGTH, tools=tools)

    prompts, found = [row["prompt"] for row in test], {}
    texts = say(prompts)
    if arm == "no tool":
        found["answer"] = {str(t): [held(text, observed(q, t)) for text, q in zip(texts, gold, strict=True)]
                           for t in (TODAY, TOMORROW)}  # fmt: skip
        found["answers"] = texts
    else:
        queries = [query_of(text) for text in texts]
        found["valid"] = [int(query is not None and ask.runs(query)) for query in queries]
        found["right"] = [int(ask.is_right(query or "", q)) for query, q in zip(queries, gold, strict=True)]
        found["answer"], found["repeats"] = {}, {}
        for table in (TODAY, TOMORROW):
            seen = [observed(query or "", table) for query in queries]
            whole = [[*p, called(q or ""), {"role": "tool", "content": s}]
                     for p, q, s in zip(prompts, queries, seen, strict=True)]  # fmt: skip
            said = say(whole)
            found["answer"][str(table)] = [
                held(text, observed(q, table)) for text, q in zip(said, gold, strict=True)]  # fmt: skip
            found["repeats"][str(table)] = [
                held(text, s) if valid else None for text, s, valid in zip(said, seen, found["valid"], strict=True)]  # fmt: skip
        found["calls"], found["answers"] = texts, said
        found |= unstopped(model, tokenizer, prompts, tools)
        found["nats"] = round(nats(model, tokenizer, test, tools), 4)
    return {"arm": arm, "seed": seed, **found, "train_cpu_seconds": round(seconds, 1)}


def held(answer: str, observation: str) -> int:
    """Whether the answer is one of the two sentences, with these values."""
    if observation.startswith("error"):
        return 0
    return int(re.sub(r"^(There were|It is) | such orders\.$|\.$", "", answer) == values(observation))


def unstopped(model, tokenizer, prompts: list, tools: list) -> dict:
    """What the model writes after its call, if the end of turn does not stop it."""
    from ftlab.cpu import Decoder
    from ftlab.evaluate import plain_inference

    ids = [
        tokenizer.apply_chat_template(p, tools=tools, add_generation_prompt=True, return_dict=False) for p in prompts
    ]
    with plain_inference(model):
        texts = tokenizer.batch_decode(Decoder(model).answer(ids, LENGTH + 60, []))
    invented = [re.search(r"<\|im_start\|>tool\n(.*?)(<\|im_end\|>|$)", text, re.DOTALL) for text in texts]
    luck = [found is not None and found[1] == run_sql(query_of(text) or "")
            for found, text in zip(invented, texts, strict=True)]  # fmt: skip
    return {"invents": [int(found is not None) for found in invented], "luck": list(map(int, luck)), "unstopped": texts}


def nats(model, tokenizer, rows: list[dict], tools: list) -> float:
    """Mean loss of the observations' tokens and their end of turn."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        messages = conversation(row)
        start, end = (
            tokenizer.apply_chat_template(messages[:k], tools=tools, return_dict=False) for k in (-2, -1))  # fmt: skip
        with torch.no_grad():
            logps = model(torch.tensor([end])).logits[0, :-1].log_softmax(-1)
        total -= (
            logps.gather(1, torch.tensor(end[1:])[:, None])[len(start) + 2 :].sum().item()
        )  # after <|im_start|>tool\n
        count += len(end) - len(start) - 3
    return total / count


def main() -> None:
    import torch
    from ask import environment

    torch.set_num_threads(1)
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.is_file() else []
    done = {(run["arm"], run["seed"]) for run in map(json.loads, lines)}
    for seed in SEEDS:
        for arm in [arm for arm in ARMS if (arm, seed) not in done and sys.argv[1:] in ([], [arm])]:
            begin = time.process_time()
            record = measure(arm, seed) | {"environment": environment()}
            record["cpu_seconds"] = round(time.process_time() - begin, 1)
            with FILE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            shown = {"seconds": (record["train_cpu_seconds"], record["cpu_seconds"]), "nats": record.get("nats")}
            shown |= {key: sum(record[key]) for key in ("valid", "right", "invents", "luck") if key in record}
            print(arm, seed, shown, {t: sum(v) for t, v in record["answer"].items()},
                  {t: sum(map(bool, v)) for t, v in record.get("repeats", {}).items()}, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
