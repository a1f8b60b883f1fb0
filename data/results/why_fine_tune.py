"""Prompting, retrieval and fine-tuning on two tasks, and what the training data decide: the numbers of notebook 01.

    python data/results/why_fine_tune.py        every run that why_fine_tune.json lacks (80 minutes, one core)
    python data/results/why_fine_tune.py 3      at most three of them

All on SmolLM2 in fp32, greedy answers, one thread, one draw of the data (random.Random(0)) unless a run says otherwise.
A record holds the 0/1 scores of each example in the order of the test set, so that any two runs can be compared pair by
pair; `seconds` are processor time of the training alone.

**format**: the first 100 of data/triage/hand_test.jsonl, written by hand before any training ticket. Prompted arms get
GUIDE, a short form of the labelling guideline, and k labelled tickets as earlier turns of the chat: the first k of a
draw of 1,000 training tickets; (RAG of n) those 3 of the draw's first n that BM25 ranks nearest to the ticket, which is
what n labels can do in a prompt; or (RAG) the nearest 3 of all training tickets. Trained arms get the one-line
instruction that they were trained with. `adapter` is data/triage_adapter; `n tickets` are arms of our own on the first
n of the draw, LoRA r = 16 at 1e-3, two tickets a step. SHOWN gives each of them more steps than the one before and
fewer passes (6, 4, 2, 1.3, 1): as much training as an afternoon on one core has room for, so that the large sets are
held back more than the small ones. One draw: the intervals are those of the tickets asked, not of the tickets drawn.

**facts**: the 100 test questions of data/handbook; RAG gives the 3 passages that BM25 ranks first, `gold` the one that
holds the answer. `pages + questions` is trained PASSES times on the passages (title in, text out) and the 150 train
questions with one paraphrase each; the second paraphrase is asked afterwards ("new wording"). `pages + questions, no
paraphrase` is trained on the same passages and the same number of rows with the questions as they are. `reader` is
trained once on the train questions with the passages that BM25 found for each, the gold passage in place of the last
one if it is missing. `RAG, 3 shots` shows three answered train questions, each with its gold passage, before the RAG
prompt.

**noise**: on `micro`, since it takes many rows: 2,000 tickets shown in full fine-tuning, 8 a step at 1e-3, for three
seeds, which also draw the tickets: 200 clean ones ten times, 2,000 noisy ones once, and 2,000 clean ones once. In the
noisy set every second ticket carries another one's label. `general, clean` and `general, noisy` are SmolLM2 on 143
everyday questions, three passes; the answers of every second one come from another question of its topic.

**known and unknown**: 60 everyday questions that the model answers right, against 60 of the handbook, which it cannot
know, eight passes each, with the share of them answered right and that of 143 other everyday questions on the way;
`answers` are what the two models then reply to 24 of the latter.
"""

import functools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
RUNS = Path(tempfile.gettempdir()) / "why_fine_tune"  # trained adapters, used by later runs; kept until you remove it
SHOWN = {10: 60, 30: 120, 100: 200, 300: 400, 1000: 1000}  # tickets shown to each arm, repeats counted
SHOTS, NEIGHBOURS, PASSES = 8, 3, 4
GUIDE = """Triage the ticket. Answer with one JSON object with these five keys in this order:
intent: late_delivery, missing_item, wrong_item, quality_issue, payment_issue, cancel_order, rider_behaviour, \
account_issue or other
order_id: the six digits of the order number as a string, or null
urgency: high (health, safety, abuse, a child or sick person waits, not the first contact), low (asks for nothing) or \
normal
refund_amount: the rupees asked back as an integer, or null
language: en or hinglish"""


# --- The two tasks ----------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    from ftlab.paths import DATA

    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@functools.cache
def tickets(name: str) -> list[dict]:
    from ftlab.paths import DATA
    from ftlab.pipeline import data

    rows = data.triage_rows(DATA / "triage" / f"{name}.jsonl")
    return rows if name == "hand_test" else data.deduplicate(rows, lambda row: row["prompt"][-1]["content"])[0]


def drawn(n: int) -> list[dict]:
    """The first n of 1,000 training tickets drawn at random."""
    return random.Random(0).sample(tickets("train"), 1000)[:n]


@functools.cache
def handbook() -> tuple[list[dict], list[dict], list[dict]]:
    """Passages, train questions, test questions."""
    from ftlab.pipeline import retrieve

    questions = read("handbook/questions.jsonl")
    splits = [[question for question in questions if question["split"] == split] for split in ("train", "test")]
    return retrieve.passages(read("handbook/pages.jsonl")), *splits


@functools.cache
def passage_index():
    from ftlab.pipeline import retrieve

    return retrieve.BM25([passage["text"] for passage in handbook()[0]])


def gold(question: dict) -> str:
    """The passage that holds the answer."""
    where = (p for p in handbook()[0] if p["page"] == question["page"] and question["evidence"] in p["text"])
    return next(where)["text"]


def found(question: dict) -> list[str]:
    """The passages that BM25 finds for the question."""
    return [handbook()[0][hit.row]["text"] for hit in passage_index().search(question["question"], NEIGHBOURS)]


def asked(question: dict, texts: list[str] | None = None) -> dict:
    """A question as a row: its prompt, with texts in it, and its answer."""
    from ftlab.pipeline import retrieve

    return {
        "prompt": retrieve.rag_prompt(question["question"], texts or []),
        "completion": [{"role": "assistant", "content": question["answer"]}],
    }


# --- Training and scoring ---------------------------------------------------------------------------------------------


def fit(name: str, rows: list[dict], shown: int, batch_size: int = 2, **more) -> tuple:
    """(model, tokenizer, what to record) of a LoRA on these rows, `shown` of them in all; kept in RUNS / name."""
    from ftlab.pipeline import train
    from ftlab.pipeline.recipe import Recipe

    metric = more.pop("metric", None)
    settings = {"learning_rate": 1e-3, "batch_size": batch_size, "max_steps": shown // batch_size, "fast": True}
    settings |= {"warmup_steps": min(20, shown // batch_size // 4), "logging_steps": 10, "save_steps": 10_000}
    recipe = Recipe(**settings, **more)
    start = time.process_time()
    held_out = rows[:4] if metric else None  # their loss is not used: they make the trainer stop for the metric
    run = train.train(recipe, rows, held_out, RUNS / name, on_log=lambda record: None, metric=metric)
    losses = run.series("loss")[1]
    tail = losses[-max(1, len(losses) // 10) :]
    spent = RUNS / name / "seconds.txt"  # a run that is only read again, for its scores, took as long as it took
    if not spent.is_file():
        spent.write_text(f"{time.process_time() - start:.1f}", encoding="utf-8")
    record = {"rows": len(rows), "shown": shown, "steps": recipe.max_steps, "batch_size": batch_size}
    record |= {
        "learning_rate": recipe.learning_rate,
        "seconds": float(spent.read_text()),
        "train_loss": round(sum(tail) / len(tail), 4),
    }
    return run.model, run.tokenizer, record


@functools.cache
def base() -> tuple:
    from ftlab.pipeline.models import load

    return load("smollm2")


def answers(model, tokenizer, prompts: list, max_new_tokens: int) -> tuple[list[str], dict]:
    """The answers, and what they cost: mean prompt and answer tokens, processor seconds for all of them."""
    from ftlab.pipeline import evaluate

    start = time.process_time()
    replies = evaluate.generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=25)
    seconds = time.process_time() - start
    lengths = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
    out = [len(tokenizer(reply, add_special_tokens=False)["input_ids"]) + 1 for reply in replies]
    cost = {"prompt_tokens": sum(lengths) / len(lengths), "answer_tokens": sum(out) / len(out)}
    return replies, {**cost, "answer_seconds": round(seconds, 1), "replies": replies[:4]}


def format_scores(model, tokenizer, prompts: list | None = None) -> dict:
    """The scores of the 100 hand-written tickets: one list of 0 and 1 a column."""
    from ftlab.pipeline import evaluate

    hand = tickets("hand_test")[:100]
    replies, cost = answers(model, tokenizer, prompts or [row["prompt"] for row in hand], 56)
    frame = evaluate.scores(replies, [json.loads(row["completion"][0]["content"]) for row in hand])
    columns = {name: frame[name].astype(int).tolist() for name in ("valid_json", "exact", *evaluate.FIELDS)}
    return {"scores": columns, **cost}


def fact_scores(model, tokenizer, questions: list[dict], texts=None, shots: list[dict] | None = None) -> dict:
    """The scores of handbook questions; texts(question) gives what stands in the prompt."""
    from ftlab.pipeline import retrieve

    prompts = [retrieve.few_shot(asked(q, texts(q) if texts else None)["prompt"], shots or []) for q in questions]
    replies, cost = answers(model, tokenizer, prompts, 24)
    scored = [retrieve.score_answer(*pair) for pair in zip(replies, questions, strict=True)]
    return {"scores": {name: [int(s[name]) for s in scored] for name in ("exact", "contained")}, **cost}


# --- Runs: format -----------------------------------------------------------------------------------------------------


def format_prompted(shots: int) -> dict:
    from ftlab.pipeline.retrieve import few_shot

    hand = tickets("hand_test")[:100]
    return format_scores(*base(), [few_shot(row["prompt"], drawn(shots), GUIDE) for row in hand])


def nearest_shots(labelled: list[dict]) -> list[list[dict]]:
    """For each of the 100 hand-written tickets the labelled ones nearest to it, the nearest one last, next to it."""
    from ftlab.pipeline import retrieve

    bm25 = retrieve.BM25([row["prompt"][-1]["content"] for row in labelled])
    hand = tickets("hand_test")[:100]
    return [[labelled[h.row] for h in bm25.search(r["prompt"][-1]["content"], NEIGHBOURS)[::-1]] for r in hand]


def format_rag(labelled: list[dict]) -> dict:
    from ftlab.pipeline.retrieve import few_shot

    hand = tickets("hand_test")[:100]
    prompts = [few_shot(row["prompt"], shots, GUIDE) for row, shots in zip(hand, nearest_shots(labelled), strict=True)]
    return {"examples": len(labelled), **format_scores(*base(), prompts)}


def adapter():
    from peft import PeftModel

    from ftlab.paths import DATA
    from ftlab.pipeline.models import load

    model, tokenizer = load("smollm2")
    return PeftModel.from_pretrained(model, str(DATA / "triage_adapter")).eval(), tokenizer


def format_adapter(rag: bool) -> dict:
    from ftlab.pipeline.retrieve import few_shot

    hand = tickets("hand_test")[:100]
    shots = nearest_shots(tickets("train")) if rag else [[]] * len(hand)
    return format_scores(*adapter(), [few_shot(row["prompt"], s) for row, s in zip(hand, shots, strict=True)])


def format_trained(n: int) -> dict:
    model, tokenizer, record = fit(f"{n} tickets", drawn(n), SHOWN[n])
    return {"examples": n, **record, **format_scores(model, tokenizer)}


def noise_on_micro() -> dict:
    """For each of three seeds and three sets of tickets, the scores of the 100 hand-written ones."""
    from ftlab.pipeline.recipe import Recipe
    from ftlab.pipeline.train import train

    runs = []
    for seed in (0, 1, 2):
        rows = random.Random(seed).sample(tickets("train") + tickets("more"), 2000)
        for name, some in {"clean 200": rows[:200], "noisy 2,000": mislabelled(rows), "clean 2,000": rows}.items():
            recipe = Recipe(model="micro", r=0, learning_rate=1e-3, max_steps=250, save_steps=10_000, seed=seed)
            run = train(recipe, some, folder=RUNS / f"micro, {name}, {seed}", on_log=lambda record: None)
            losses = run.series("loss")[1][-5:]
            record = {"set": name, "seed": seed, "rows": len(some), "shown": 2000, "train_loss": sum(losses) / 5}
            runs.append({**record, **format_scores(run.model, run.tokenizer)})
    return {"runs": runs}


def mislabelled(rows: list[dict]) -> list[dict]:
    """Every second row with the completion of another one of them."""
    odd = [row["completion"] for row in rows[1::2]]
    wrong = odd[1:] + odd[:1]
    return [{**row, "completion": wrong[i // 2]} if i % 2 else row for i, row in enumerate(rows)]


# --- Runs: facts ------------------------------------------------------------------------------------------------------


def facts_prompted(shots: int, texts=None) -> dict:
    train = random.Random(0).sample(handbook()[1], SHOTS)[:shots]
    shown = [asked(question, [gold(question)] if texts else None) for question in train]
    return fact_scores(*base(), handbook()[2], texts, shown)


def gold_only(question: dict) -> list[str]:
    return [gold(question)]


def closed_book_rows(paraphrases: bool) -> list[dict]:
    """The passages as chats, and each train question twice: with its first paraphrase, or in the same words."""
    pages, train, _ = handbook()
    rows = []
    for passage in pages:
        title, text = passage["text"].split(": ", 1)
        prompt = [{"role": "user", "content": f"What does the handbook say? {title}: {' '.join(text.split()[:3])}"}]
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": text}]})
    for question in train:
        other = {**question, "question": question["paraphrases"][0]} if paraphrases else question
        rows += [asked(question), asked(other)]
    return random.Random(0).sample(rows, len(rows))


def facts_closed(paraphrases: bool) -> dict:
    """Trained on pages and questions; asked as taught, in new words, and about what only the pages say."""
    rows = closed_book_rows(paraphrases)
    name = "pages + questions" + ("" if paraphrases else ", no paraphrase")
    model, tokenizer, record = fit(name, rows, PASSES * len(rows), batch_size=4)
    _, train, test = handbook()
    taught = train[::2]
    new = [{**question, "question": question["paraphrases"][1]} for question in taught]
    sets = {"taught": taught, "new wording": new}
    more = {name: fact_scores(model, tokenizer, questions) for name, questions in sets.items()}
    with_rag = fact_scores(model, tokenizer, test, found) if paraphrases else None
    return {**record, **fact_scores(model, tokenizer, test), **more, "with RAG": with_rag}


def facts_reader() -> dict:
    """Trained to answer from what retrieval brings."""
    rows = []
    for question in handbook()[1]:
        texts = found(question)
        texts = texts if gold(question) in texts else [*texts[:-1], gold(question)]
        rows.append(asked(question, random.Random(question["id"]).sample(texts, len(texts))))
    model, tokenizer, record = fit("reader", rows, len(rows))
    read, oracle = (fact_scores(model, tokenizer, handbook()[2], texts) for texts in (found, gold_only))
    return {**record, **read, "gold": oracle}


def dense_recall() -> dict:
    """Over all 250 questions, by the mean hidden states of the same SmolLM2: is the passage among the first k?"""
    from ftlab.pipeline import retrieve

    passages, *splits = handbook()
    dense = retrieve.Dense([passage["text"] for passage in passages], *base())
    questions = [question for split in splits for question in split]
    return {
        "recall": {str(k): sum(retrieve.recall(dense, questions, passages, k)) / len(questions) for k in (1, 3, 10)}
    }


# --- Runs: what the model knew ----------------------------------------------------------------------------------------


@functools.cache
def everyday() -> tuple[list[dict], list[dict]]:
    """(143 everyday questions to train on, 143 others to ask)."""
    rows = read("general/candidates.jsonl")
    return rows[1::4], rows[::4]


def right(model, tokenizer, rows: list[dict], column: str = "correct") -> list[int]:
    from ftlab.pipeline import evaluate

    return evaluate.closed_book(model, tokenizer, rows)[column].astype(int).tolist()


def general_base() -> dict:
    pool, others = everyday()
    return {"pool": right(*base(), pool), "others": right(*base(), others)}


def plain_row(question: dict) -> dict:
    return {
        "prompt": [{"role": "user", "content": question["question"]}],
        "completion": [{"role": "assistant", "content": question["answer"]}],
    }


def general_noise(noisy: bool) -> dict:
    pool, others = everyday()
    by_topic = sorted(pool, key=lambda row: row["topic"])
    rows = [plain_row(question) for question in by_topic]
    rows = mislabelled(rows) if noisy else rows
    model, tokenizer, record = fit(f"general, {'noisy' if noisy else 'clean'}", rows, 3 * len(rows))
    return {**record, "others": right(model, tokenizer, others)}


def known_or_not(known: bool) -> dict:
    """The share answered right, of what is taught and of other everyday questions, on the way through 8 passes."""
    pool, others = everyday()
    base_right = load_results()["runs"]["general, base"]["pool"]
    taught = [question for question, r in zip(pool, base_right, strict=True) if r] if known else handbook()[1]
    taught = random.Random(0).sample(taught, 60)
    curve = []

    def metric(model, tokenizer) -> dict[str, float]:
        shares = {
            "taught": sum(right(model, tokenizer, taught, "exact")) / len(taught),
            "others": sum(right(model, tokenizer, others)) / len(others),
        }
        curve.append(shares)
        return shares

    name = "known" if known else "unknown"
    rows = [plain_row(question) for question in taught]
    _, _, record = fit(name, rows, 480, batch_size=4, metric=metric, eval_steps=30)
    return {**record, "passes": [2, 4, 6, 8], "curve": curve}


def everyday_answers() -> dict:
    """What the models trained on known and on unknown facts reply to every sixth of the other everyday questions."""
    from peft import PeftModel

    from ftlab.pipeline import evaluate
    from ftlab.pipeline.models import load

    asked = everyday()[1][::6]
    replies = {}
    for name in ("known", "unknown"):
        model, tokenizer = load("smollm2")
        tuned = PeftModel.from_pretrained(model, str(RUNS / name / "adapter")).eval()
        replies[name] = evaluate.closed_book(tuned, tokenizer, asked)["reply"].tolist()
    return {"questions": [question["question"] for question in asked], **replies}


RUNS_IN_ORDER = {  # the matrix, the curve, what was known, noise, a control
    "facts, zero-shot": lambda: facts_prompted(0),
    "facts, RAG": lambda: facts_prompted(0, found),
    "facts, gold passage": lambda: facts_prompted(0, gold_only),
    "format, zero-shot": lambda: format_prompted(0),
    "format, 3 shots": lambda: format_prompted(3),
    "format, adapter": lambda: format_adapter(False),
    "facts, 3 shots": lambda: facts_prompted(3),
    "facts, pages + questions": lambda: facts_closed(True),
    "facts, reader": facts_reader,
    "format, 8 shots": lambda: format_prompted(8),
    "format, RAG": lambda: format_rag(tickets("train")),
    "format, adapter, RAG": lambda: format_adapter(True),
    "format, 1 shots": lambda: format_prompted(1),
    "facts, 1 shots": lambda: facts_prompted(1),
    "facts, 8 shots": lambda: facts_prompted(8),
    "facts, RAG, 3 shots": lambda: facts_prompted(3, found),
    "format, 10 tickets": lambda: format_trained(10),
    "format, 30 tickets": lambda: format_trained(30),
    "format, 100 tickets": lambda: format_trained(100),
    "format, 300 tickets": lambda: format_trained(300),
    "format, 1000 tickets": lambda: format_trained(1000),
    "format, RAG of 300": lambda: format_rag(drawn(300)),
    "format, RAG of 100": lambda: format_rag(drawn(100)),
    "format, RAG of 30": lambda: format_rag(drawn(30)),
    "retrieval, dense": dense_recall,
    "general, base": general_base,
    "known": lambda: known_or_not(True),
    "unknown": lambda: known_or_not(False),
    "known and unknown, answers": everyday_answers,
    "noise on micro": noise_on_micro,
    "general, clean": lambda: general_noise(False),
    "general, noisy": lambda: general_noise(True),
    "facts, pages + questions, no paraphrase": lambda: facts_closed(False),
}


def load_results() -> dict:
    """What the file holds; ValueError if its prompted runs were made with another guide than GUIDE."""
    results = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"guide": GUIDE, "runs": {}}
    if results["guide"] != GUIDE:
        raise ValueError(
            f"{FILE.name}: its prompted runs had another guide than GUIDE; remove them, and set guide to it"
        )
    return results


def save(results: dict) -> None:
    from lines import write

    order = {name: results["runs"][name] for name in RUNS_IN_ORDER if name in results["runs"]}
    write(FILE, {**results, "runs": order})


def main(at_most: int) -> None:
    import torch

    from ftlab.pipeline.train import environment

    torch.set_num_threads(1)
    todo = [name for name in RUNS_IN_ORDER if name not in load_results()["runs"]][:at_most]
    for name in todo:
        start = time.perf_counter()
        record = RUNS_IN_ORDER[name]()
        results = load_results()
        results["runs"][name] = record
        save({"environment": environment(), "guide": GUIDE, "runs": results["runs"]})
        means = {key: round(sum(v) / len(v), 3) for key, v in record.get("scores", {}).items()}
        print(f"{name}: {time.perf_counter() - start:.0f} s, {means or record.get('curve', '')}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 99)
