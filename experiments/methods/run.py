"""Prompt, retrieve, write rules, or fine-tune? Seven methods on four tasks: the numbers of notebook 01.

    python experiments/methods/run.py                 all runs that records.jsonl lacks (3 hours on one core)
    python experiments/methods/run.py tidy noise      only those of these tasks
    python experiments/methods/run.py --plan          what is missing, seed by seed, and what it will take

It can be stopped and goes on. Each run adds one line: task, arm, seed, one value an example of the test set (so any two
runs can be compared example by example; ids.json says whose they are), the answers to the 8 examples with the lowest
ids, mean tokens of prompt and answer, seconds of one thread for all answers, and for a trained arm its rows and
seconds. SmolLM2 in fp32 (bf16=False: TRL's default is bf16), greedy answers; the rates were chosen in notebooks 05 and
10.

| task | asked | one answer is worth |
|---|---|---|
| facts | the 100 test questions of data/handbook | 1 if the answer stands in the reply |
| ask | the 132 questions of data/ask/hand_test | 1 if the query returns the right rows on ten databases |
| tidy | the 100 notes of data/tidy/hand_test | the share of words right |
| triage | the 150 tickets of data/triage/hand_test | 1 if all five fields are right |

| arm | what |
|---|---|
| zero-shot | GUIDES: an instruction that spells the task out, one wording, not searched |
| few-shot | the same, and SHOTS examples, the first of the training rows |
| retrieval | the same, and what BM25 finds for this input: 3 passages (facts), or the NEAREST training examples |
| constrained | `retrieval`, decoded under a grammar (ask) or a JSON schema (triage) by llama.cpp |
| rules | no language model: BM25's best sentence (facts), an expert's parser (ask), a spelling library with rules |
| | (tidy), regression on n-grams (triage) |
| fine-tuning | SFT with LoRA on TRAINED rows, three seeds; for facts on the pages and on questions |
| fine-tuning + retrieval | the same models, asked with what `retrieval` finds; for facts a model trained to read it |

An answer has at most TOKENS tokens, and twice as many under a grammar, since JSON may be spaced. The trained arms of
facts have the lower limit SHORT: they ran first, and later the base arms alone were run again with more room. This
does not favour the trained arms. A reply counts if the answer stands in it, so a longer one has more chances; theirs
have 5 tokens on average.

**size**: the same n rows of `tidy` in two ways, trained on (SHOWN rows in all, three seeds) or in the prompt (NEAREST
of the n; of 8 all of them). **noise**: the first NOISY rows of `tidy`, seen once, of which every second one has
another row's sentence; and the right half of them alone, seen once too; five seeds. **latency**: seconds of one thread
for each of TIMED notes of `tidy`, asked one at a time; the trained model learned from 128 rows, and is merged.

**exercise**: SmolLM2 with the bare instruction of `tidy`, on the notes on which exercise 01.2 tries prompts.

**domain**: 40 pages of the handbook as plain text, once: perplexity, and what the model then knows. **known**: SmolLM2
is taught TAUGHT facts, eight passes: everyday facts that it knew, or facts of the handbook that it cannot know; how
many of them, and of OTHERS other everyday questions, it then answers. These two ask with at most SHORT tokens. One seed
each is stored of them; the script has three.
"""

import functools
import importlib.util
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

from experiments.runs import Job, cpu_clock, flags, stamp, work
from ftlab.paths import DATA
from ftlab.tasks import ask, handbook, tidy, triage

HERE = Path(__file__).parent
FILE = HERE / "records.jsonl"
SEEDS = (0, 1, 2)
SHOTS, NEAREST, PASSAGES = 8, 4, 3
TOKENS = {"facts": 64, "ask": 80, "tidy": 64, "triage": 64}  # at most, of an answer
SHORT = 24  # the same for the trained arms of facts, and for known and domain
TRAINED = {"facts": 342, "ask": 450, "tidy": 1054, "triage": 600}  # rows; those of facts are seen PASSES times
PASSES = 4
NOISY = 256
TIMED = 20
SHOWN = {8: 64, 32: 128, 128: 256}  # rows of tidy -> rows shown in training, repeats counted
TAUGHT, OTHERS = 60, 143  # questions of known
CHOSEN = {
    "rate": "in notebooks 05 and 10",
    "instructions, shots": "one wording a task (GUIDES) and the first training rows, not searched",
    "all else": "given in run.py",
}
FIRST = {"domain": "pages", "known": "known"}  # what the rows decide -> the first arm of a run
GUIDES = {
    "facts": handbook.SYSTEM,
    "ask": f"{ask.SYSTEM} Table: orders(id, day, month 1-6, city, plan, cuisine, status, payment, total, tip, minutes, "
    "stars or NULL). plan: free gold office. status: done cancelled refunded. payment: card cash upi. "
    "late: minutes>45. big: total>=1000. unrated: stars IS NULL. revenue: SUM(total) WHERE status='done'. "
    "with a tip: tip>0.",
    "tidy": f"{tidy.SYSTEM} Keep every word and its order. Correct spelling, capitals, apostrophes and punctuation. "
    "Answer with the corrected note only.",
    "triage": """Triage the ticket. Answer with one JSON object with these five keys in this order:
intent: late_delivery, missing_item, wrong_item, quality_issue, payment_issue, cancel_order, rider_behaviour, \
account_issue or other
order_id: the six digits of the order number as a string, or null
urgency: high (health, safety, abuse, a child or sick person waits, not the first contact), low (asks for nothing) or \
normal
refund_amount: the rupees asked back as an integer, or null
language: en or hinglish""",
}
GRAMMAR = r"""
root ::= "SELECT " column (", " column)? " FROM orders" where? group? order? limit?
column ::= name | ("COUNT" | "SUM" | "AVG" | "MIN" | "MAX") "(" ("*" | name) ")"
name ::= text | number
text ::= "day" | "city" | "plan" | "cuisine" | "status" | "payment"
number ::= "id" | "month" | "total" | "tip" | "minutes" | "stars"
where ::= " WHERE " condition (" AND " condition){0,2}
condition ::= text ("=" | "<>") "'" [A-Za-z]+ "'" | number compare [0-9]+ | name " IS " "NOT "? "NULL"
compare ::= "=" | "<>" | "<" | ">" | "<=" | ">="
group ::= " GROUP BY " name
order ::= " ORDER BY " column " DESC"?
limit ::= " LIMIT " [0-9]+
"""


# --- The tasks --------------------------------------------------------------------------------------------------------


def rows_of(file: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def first(n: int, file: str) -> list[dict]:
    """The rows with the n lowest ids: the first ones of the file until its rows were put in another order."""
    return sorted(rows_of(file), key=lambda row: row["id"])[:n]


def dialogue(question: dict, texts: list[str] = ()) -> dict:
    """A question of the handbook as a row."""
    answer = [{"role": "assistant", "content": question["answer"]}]
    return {**question, "prompt": handbook.prompt(question["question"], texts), "completion": answer}


@functools.cache
def part(task: str, split: str) -> list[dict]:
    """The training rows of a task ("train"), or its test set ("test")."""
    if task == "facts":
        return [dialogue(q) for q in rows_of("handbook/questions.jsonl") if q["split"] == split]
    file = f"{task}/{'train' if split == 'train' else 'hand_test'}.jsonl"
    return triage.read(DATA / file) if task == "triage" else rows_of(file)


train_rows, test_rows = (functools.partial(part, split=split) for split in ("train", "test"))
SCORERS = {"facts": handbook.scorer, "ask": ask.scorer, "tidy": tidy.scorer, "triage": triage.scorer}


@functools.cache
def module(task: str, name: str):
    """A script of data/TASK as a module."""
    spec = importlib.util.spec_from_file_location(f"{task}_{name}", DATA / task / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@functools.cache
def index(task: str, of: int | None = None):
    """BM25 over the passages (facts) or the inputs of the training rows, or of the first `of`."""
    from ftlab.retrieve import BM25

    return BM25(pages() if task == "facts" else [row["prompt"][-1]["content"] for row in train_rows(task)[:of]])


@functools.cache
def pages() -> list[str]:
    return [passage["text"] for passage in handbook.passages(rows_of("handbook/pages.jsonl"))]


def prompts(task: str, arm: str, trained: bool = False, of: int | None = None) -> list[list[dict]]:
    """The chats that an arm asks the test set with; a trained model keeps the instruction of its training.

    of: examples are looked up among the first so many training rows.
    """
    chats = []
    for row in test_rows(task):
        question = row["prompt"][-1]["content"]
        system = row["prompt"][0] if trained else {"role": "system", "content": GUIDES[task]}
        if arm == "retrieval" and task == "facts":
            chats.append(handbook.prompt(row["question"], [pages()[i] for i in index(task).search(question, PASSAGES)]))
            continue
        shots = []
        if arm == "few-shot":
            shots = train_rows(task)[:SHOTS]
        elif arm == "retrieval":
            shots = [train_rows(task)[i] for i in index(task, of).search(question, NEAREST)[::-1]]
        turns = [message for shot in shots for message in (shot["prompt"][-1], shot["completion"][-1])]
        chats.append([system, *turns, row["prompt"][-1]])
    return chats


# --- Answers ----------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer(name: str = "smollm2"):
    from transformers import AutoTokenizer

    from ftlab import model_path

    return AutoTokenizer.from_pretrained(model_path(name))


def base(name: str = "smollm2"):
    import torch
    from transformers import AutoModelForCausalLM

    from ftlab import model_path

    return AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32)


def asked(model, task: str, chats: list[list[dict]], tokens: int | None = None) -> dict:
    """The values of a model's answers of at most so many tokens (TOKENS), and what they cost."""
    from ftlab import answers

    start = time.process_time()
    said = answers(model, tokenizer(), chats, tokens or TOKENS[task], batch_size=16)
    return {**valued(task, said), **cost(chats, said), "answer_seconds": round(time.process_time() - start, 1)}


def valued(task: str, said: list[str]) -> dict:
    values = [float(SCORERS[task](*pair)) for pair in zip(said, test_rows(task), strict=True)]
    shown = [answer for _, answer in by_id(zip(test_rows(task), said, strict=True))[:8]]
    return {"values": [round(v, 4) for v in values], "answers": shown}


def by_id(pairs) -> list[tuple]:
    """(row, anything) in the order of the rows' ids."""
    return sorted(pairs, key=lambda pair: pair[0]["id"])


def cost(chats: list, said: list[str]) -> dict:
    """Mean tokens of a prompt and of an answer with its end."""
    texts = [tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    tokens = [tokenizer()(some, add_special_tokens=False)["input_ids"] for some in (texts, said)]
    prompt, answer = (sum(map(len, ids)) / len(ids) for ids in tokens)
    return {"prompt_tokens": round(prompt, 1), "answer_tokens": round(answer + 1, 1)}


def constrained(task: str) -> dict:
    """Answers of llama.cpp under a grammar or a JSON schema, to the prompts of `retrieval`."""
    from openai import OpenAI

    from ftlab import model_path
    from ftlab.export import to_gguf
    from ftlab.serve import serve

    chats = prompts(task, "retrieval")
    schema = {"type": "json_schema", "json_schema": {"name": "triage", "schema": triage.SCHEMA}}
    how = {"response_format": schema} if task == "triage" else {"extra_body": {"grammar": GRAMMAR}}
    with tempfile.TemporaryDirectory() as folder:
        gguf = to_gguf(model_path("smollm2"), Path(folder) / "base.gguf")
        with serve(gguf, n_ctx=2048, parallel=1) as server:
            create = OpenAI(base_url=server.url, api_key="none").chat.completions.create
            common = {"model": "model", "temperature": 0, "max_tokens": 2 * TOKENS[task], **how}  # JSON may be spaced
            start = time.perf_counter()
            said = [create(messages=chat, **common).choices[0].message.content for chat in chats]
            seconds = round(time.perf_counter() - start, 1)
    return {**valued(task, said), **cost(chats, said), "clock_seconds": seconds}


def ruled(task: str) -> dict:
    """Answers without a language model."""
    questions = [row["prompt"][-1]["content"] for row in test_rows(task)]
    start = time.process_time()
    if task == "facts":
        said = list(map(best_sentence, questions))
    elif task == "ask":
        said = list(map(module("ask", "rules").to_sql, questions))
    elif task == "tidy":
        controls = module("tidy", "controls")
        said = list(map(controls.Rules(train_rows("tidy")[: TRAINED["tidy"]]).tidy, questions))
    else:
        controls = module("triage", "controls")
        said = list(map(controls.Classic(train_rows("triage")[: TRAINED["triage"]]).answer, questions))
    return {**valued(task, said), "answer_seconds": round(time.process_time() - start, 1)}


@functools.cache
def sentences() -> tuple[list[str], object]:
    """The sentences and list items of the handbook, each led by its page's title, and BM25 over them."""
    import re

    from ftlab.retrieve import BM25

    found = []
    for text in pages():
        title, body = text.split(": ", 1)
        found += [f"{title}: {part}" for part in re.split(r"(?<=[.!?])\s+|\n", body) if part.strip()]
    return found, BM25(found)


def best_sentence(question: str) -> str:
    """The sentence that BM25 ranks first: search alone, as a help page's search box does it."""
    found, bm25 = sentences()
    hits = bm25.search(question, 1)
    return found[hits[0]] if hits else ""


# --- Training ---------------------------------------------------------------------------------------------------------


def trained(rows: list[dict], seed: int, name: str = "smollm2", lora: bool = True, callbacks=(), **settings):
    """(model, what it took) after SFT on these rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from ftlab import speed_up

    defaults = {"learning_rate": 2e-3, "per_device_train_batch_size": 2, "num_train_epochs": 1, "warmup_steps": 5}
    set_seed(seed)
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    trainer = SFTTrainer(
        base(name),
        train_dataset=dataset,
        processing_class=tokenizer(name),
        args=SFTConfig(
            tempfile.mkdtemp(),
            seed=seed,
            **defaults | settings,
            logging_steps=25,
            save_strategy="no",
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None,
        callbacks=list(callbacks),
    )
    speed_up(trainer)
    start = time.process_time()
    trainer.train()
    spent = {"rows": len(rows), "train_seconds": round(time.process_time() - start, 1)}
    return trainer.model, spent


def closed_book() -> list[dict]:
    """The passages as chats, and the train questions."""
    rows = []
    for text in pages():
        title, body = text.split(": ", 1)
        chat = [{"role": "user", "content": f"What does the handbook say? {title}: {' '.join(body.split()[:3])}"}]
        rows.append({"prompt": chat, "completion": [{"role": "assistant", "content": body}]})
    return rows + train_rows("facts")


def reader_rows() -> list[dict]:
    """The train questions with the passages that BM25 finds; the one that holds the answer takes the last place."""
    rows = []
    for row in train_rows("facts"):
        found = [pages()[i] for i in index("facts").search(row["question"], PASSAGES)]
        if not any(row["evidence"] in text for text in found):
            found[-1] = next(text for text in pages() if row["evidence"] in text)
        rows.append({**row, "prompt": handbook.prompt(row["question"], found)})
    return rows


def fine_tuned(task: str, seed: int) -> list[dict]:
    """The records of `fine-tuning` and of `fine-tuning + retrieval`, which asks the same model."""
    settings = {"learning_rate": 1e-3} if task == "triage" else {}
    model, spent = trained(train_rows(task)[: TRAINED[task]], seed, **settings)
    alone = {**asked(model, task, prompts(task, "zero-shot", True)), **spent}
    if task == "tidy":
        alone["validation"] = validated(model)
    found = {**asked(model, task, prompts(task, "retrieval", True)), **spent}
    return [{"arm": "fine-tuning", **alone}, {"arm": "fine-tuning + retrieval", **found}]


def on_pages(arm: str, seed: int) -> dict:
    """The record of a model of `facts`: trained on pages and questions, or trained to read what the search finds."""
    if arm == "fine-tuning":
        model, spent = trained(closed_book(), seed, num_train_epochs=PASSES, learning_rate=1e-3)
        questions = train_rows("facts")
        taught = [handbook.scorer(*pair) for pair in zip(say(model, questions), questions, strict=True)]
        found = asked(model, "facts", prompts("facts", "zero-shot", True), SHORT)
        return {**found, **spent, "taught": sum(taught) / len(taught)}
    model, spent = trained(reader_rows(), seed, learning_rate=1e-3)
    return {**asked(model, "facts", prompts("facts", "retrieval", True), SHORT), **spent}


def say(model, rows: list[dict], tokens: int = SHORT) -> list[str]:
    from ftlab import answers

    return answers(model, tokenizer(), [row["prompt"] for row in rows], tokens)


def sized(n: int, seed: int) -> dict:
    """SFT on the first n rows of tidy, SHOWN[n] of them in all."""
    model, spent = trained(train_rows("tidy")[:n], seed, max_steps=SHOWN[n] // 2)
    return {**asked(model, "tidy", prompts("tidy", "zero-shot", True)), **spent}


# --- What the rows decide ---------------------------------------------------------------------------------------------


def noisy(arm: str, seed: int) -> dict:
    """SFT on the first NOISY rows of tidy, once; every second one has another row's sentence, or is left out."""
    rows = train_rows("tidy")[:NOISY]
    odd = [row["completion"] for row in rows[1::2]]
    wrong = [{**row, "completion": odd[(i // 2 + 1) % len(odd)]} if i % 2 else row for i, row in enumerate(rows)]
    model, spent = trained(wrong if "wrong" in arm else rows[::2], seed)
    return {**asked(model, "tidy", prompts("tidy", "zero-shot", True)), **spent}


def one_by_one(model, arm: str, is_trained: bool) -> list[float]:
    """Seconds of one thread for each of the TIMED notes of tidy with the lowest ids."""
    from ftlab import answers

    seconds, chats = [], prompts("tidy", arm, is_trained)
    for _, chat in by_id(zip(test_rows("tidy"), chats, strict=True))[:TIMED]:
        start = time.process_time()
        answers(model, tokenizer(), [chat], TOKENS["tidy"])
        seconds.append(round(time.process_time() - start, 3))
    return seconds


def latency(arm: str) -> list[dict]:
    if arm != "fine-tuning":
        return [{"arm": arm, "seconds": one_by_one(base(), arm, False)}]
    model = trained(train_rows("tidy")[:128], 0)[0].merge_and_unload()
    asked_with = {"fine-tuning": "zero-shot", "fine-tuning + retrieval": "retrieval"}
    return [{"arm": arm, "seconds": one_by_one(model, how, True)} for arm, how in asked_with.items()]


def known(seed: int) -> list[dict]:
    """Facts that the model knew against facts that it cannot know."""
    from transformers import TrainerCallback

    everyday = [dialogue(q) for q in rows_of("general/candidates.jsonl")]
    for row in everyday:
        row["prompt"] = [{"role": "user", "content": row["question"]}]
    start = base()
    knows = [handbook.scorer(*pair) for pair in zip(say(start, everyday), everyday, strict=True)]
    shuffled = random.Random(seed).sample(range(len(everyday)), len(everyday))
    taught = {"known": [everyday[i] for i in shuffled if knows[i]][:TAUGHT]}
    unknown = random.Random(seed).sample(train_rows("facts"), TAUGHT)
    taught["unknown"] = [{**row, "prompt": [{"role": "user", "content": row["question"]}]} for row in unknown]
    ids = {row["question"] for row in taught["known"]}
    others = [row for row in everyday if row["question"] not in ids][:OTHERS]

    class Look(TrainerCallback):
        def __init__(self, rows):
            self.rows, self.curve = rows, []

        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            if round(state.epoch) % 2 == 0:
                shares = [
                    sum(handbook.scorer(*p) for p in zip(say(model, rows), rows, strict=True)) / len(rows)
                    for rows in (self.rows, others)
                ]
                self.curve.append({"passes": round(state.epoch), "taught": shares[0], "others": shares[1]})

    before = sum(handbook.scorer(*p) for p in zip(say(start, others), others, strict=True)) / len(others)
    records = []
    for arm, rows in taught.items():
        look = Look(rows)
        settings = {"num_train_epochs": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
        _, spent = trained(rows, seed, callbacks=[look], **settings)
        records.append({"arm": arm, "before": before, "curve": look.curve, **spent})
    return records


def domain(seed: int) -> list[dict]:
    """Forty of the handbook's fifty pages as plain text, once: perplexity before and after, and what it knows."""
    every = rows_of("handbook/pages.jsonl")
    held_out = random.Random(seed).sample(every, 10)
    rows = [{"prompt": f"{page['title']}:", "completion": f" {page['text']}"} for page in every if page not in held_out]
    texts = {
        "pages it reads": [row["completion"] for row in rows[::4]],
        "other pages": [page["text"] for page in held_out],
        "outside the domain": [row["text"] for row in first(10, "general/text.jsonl")],
    }
    before = {name: perplexity(base(), some) for name, some in texts.items()}
    model, spent = trained(rows, seed, learning_rate=5e-4)
    read = {page["id"] for page in every if page not in held_out}
    questions = [row for row in test_rows("facts") if row["page"] in read]
    values = [float(handbook.scorer(*pair)) for pair in zip(say(model, questions), questions, strict=True)]
    after = {name: perplexity(model, some) for name, some in texts.items()}
    return [{"arm": "pages", "before": before, "after": after, "values": values, **spent}]


def perplexity(model, texts: list[str]) -> float:
    """e to the mean loss of a token over all texts."""
    import torch

    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.inference_mode():
            logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)  # (T-1, V)
        total, count = total - logps.gather(1, ids[0, 1:, None]).sum().item(), count + ids.shape[1] - 1
    return round(math.exp(total / count), 3)


def validated(model) -> list[float]:
    """What answers to 60 validation notes of `tidy` are worth; exercise 01.2 tries its prompts on these."""
    rows = first(60, "tidy/validation.jsonl")
    return [round(tidy.scorer(*pair), 4) for pair in zip(say(model, rows, TOKENS["tidy"]), rows, strict=True)]


# --- The runs ---------------------------------------------------------------------------------------------------------


def runs() -> list[tuple[str, str, int]]:
    """(task, arm, seed) of every run, a cheap one first; one run may add several records."""
    tasks = ("tidy", "facts", "triage", "ask")
    cheap = [(task, arm, 0) for task in tasks for arm in ("rules", "zero-shot", "few-shot", "retrieval")]
    cheap.append(("exercise", "instruction alone", 0))
    more = [("facts", "fine-tuning + retrieval", seed) for seed in SEEDS]
    more += [(task, "fine-tuning", seed) for seed in SEEDS for task in tasks]
    more += [("size", f"nearest of {n}", 0) for n in SHOWN if n > SHOTS]
    more += [("size", f"trained on {n}", seed) for seed in SEEDS for n in SHOWN]
    more += [("noise", arm, seed) for seed in range(5) for arm in (f"{NOISY}, half wrong", "the right half alone")]
    more += [("latency", arm, 0) for arm in ("zero-shot", "few-shot", "retrieval", "fine-tuning")]
    more += [(task, arm, seed) for seed in SEEDS for task, arm in FIRST.items()]
    return cheap + more + [(task, "constrained", 0) for task in ("ask", "triage")]  # llama.cpp wants a quiet machine


def measure(task: str, arm: str, seed: int) -> list[dict]:
    if task in FIRST:
        return {"known": known, "domain": domain}[task](seed)
    if task == "exercise":
        return [{"values": validated(base())}]
    if task == "noise":
        return [noisy(arm, seed)]
    if task == "latency":
        return latency(arm)
    if task == "size":
        n = int(arm.rpartition(" ")[2])
        return [sized(n, seed) if "trained" in arm else asked(base(), "tidy", prompts("tidy", "retrieval", of=n))]
    if "fine-tuning" in arm:
        return [on_pages(arm, seed)] if task == "facts" else fine_tuned(task, seed)
    if arm == "constrained":
        return [constrained(task)]
    if arm == "rules":
        return [ruled(task)]
    return [asked(base(), task, prompts(task, arm))]


def arms_of(task: str, arm: str) -> tuple[str, ...]:
    """The arms of the records that a run leaves: some ask one model in two ways, or train two."""
    if task == "known":
        return "known", "unknown"
    if arm == "fine-tuning" and task != "facts":
        return "fine-tuning", "fine-tuning + retrieval"
    return (arm,)


def recorded(task: str, arm: str, seed: int) -> list[dict]:
    """The records of a run; where it leaves several, each has its share of the CPU seconds."""
    import torch

    torch.set_num_threads(1)
    began = cpu_clock()
    found = measure(task, arm, seed)
    spent = cpu_clock() - began
    shared = {"cpu_seconds": round(spent / len(found), 1)} | stamp("float32", questions(task), CHOSEN)
    return [{"task": task, "arm": arm, "seed": seed} | record | shared for record in found]


def questions(task: str) -> list[str]:
    """The name in ids.json of the list of questions that a task asks; of `known` there is none."""
    if task == "known":
        return ["data/general/candidates.jsonl, and train questions of data/handbook, both drawn by the seed"]
    places = json.loads(HERE.with_name("ids.json").read_text(encoding="utf-8"))["records"]["methods/records.jsonl"]
    return [places["seconds"] if task == "latency" else places["values"][task]]


def jobs(tasks: list[str]) -> list[Job]:
    """Every run, or those of the named tasks."""
    found = []
    for task, arm, seed in runs():
        if not tasks or task in tasks:
            names = [{"task": task, "arm": each, "seed": seed} for each in arms_of(task, arm)]
            found.append(Job(tuple(names), (task, arm, seed)))
    return found


if __name__ == "__main__":
    words, how = flags(sys.argv[1:])
    work(FILE, lambda records: jobs(words), recorded, within=("task", "seed"), **how)
