import nbformat, sys
from nbformat.v4 import new_notebook, new_markdown_cell, new_code_cell
cells=[]
def md(id, text): c=new_markdown_cell(text.strip("\n")); c["id"]=id; cells.append(c)
def code(id, text, hidden=False, tags=None):
    c=new_code_cell(text.strip("\n")); c["id"]=id
    if hidden: c.metadata["jupyter"]={"source_hidden": True}
    if tags: c.metadata["tags"]=tags
    cells.append(c)

md("title", """
# 01 · Why fine-tune, and when not

**Prompt, retrieve, write rules, or train: which of them gets your task done, and how do you find out?**

At the end you can *write* a few-shot prompt, a retrieval prompt, constrained decoding and a short training run for one task. You can compare them on the same examples, and say what a call costs.

About **2 minutes** on two CPU cores, 3 GB of memory, no GPU, no network. Reading time: 35 minutes. You need notebook [00](00_start_here.ipynb). Checked in November 2026 with trl 1.14, peft 0.21 and transformers 5.17.

![Four columns, each from a question to an answer. Prompt: an instruction and examples go before the question. Retrieval: search finds the right page. Rules: a program answers, without a model. Fine-tuning: a short instruction, and the model itself was trained on rows.](../data/pictures/why_fine_tune.svg)

Think of a bright graduate in a new job. You can hand over an instruction with worked cases, or open the right page of the handbook each time. You can write a program instead. Or you let the graduate practise until the work sits. Nobody *practises* a refund limit that changes next month. Nobody *looks up*, for every ticket, how a form is filled in.
""")
code("colab", """
# On Colab: installs the course, about 3 minutes, once a session. Elsewhere: nothing.
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "ftlab[all] @ git+https://github.com/OWNER/NAME"
""", hidden=True, tags=["remove-cell"])
code("imports", """
import ftlab  # first: it silences warnings about missing GPU kernels
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd, torch
from datasets import load_dataset
from openai import OpenAI
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer
""")
code("dial", """
from ftlab import LiveCurve, answers, check, compare, data, export, hint, model_path, score
from ftlab import solution, speed_up
from ftlab.classroom import decide, methods, quiz, seeds, show
from ftlab.retrieve import BM25
from ftlab.serve import serve
from ftlab.tasks import handbook, tidy, triage

MODEL = model_path("smollm2")       # on a GPU: the hub id of a chat model
ROWS, RATE = 80, 2e-3
INPUT, OUTPUT = 0.20, 0.80          # an API's price of a million tokens; an example, nobody's offer
GPU = torch.cuda.is_available()
RUNS = Path("runs/why_fine_tune")   # everything that this notebook writes
show.house_style(), pd.set_option("display.max_colwidth", None);
""")
md("idea", """
## 1 · Four tasks, seven methods

RasoiRun is a food-delivery company that does not exist. Its four tasks are of four kinds. All test sets were written by hand, before any training row, and nothing was chosen on them.

| task | in | out | right |
|---|---|---|---|
| **facts** | a question about the staff handbook | a few words | the answer stands in the reply |
| **ask** | a question about orders | an SQL query | it returns the right rows on ten databases |
| **tidy** | a colleague's hasty note | the clean sentence | the share of words right |
| **triage** | a customer's ticket | a JSON object | all five fields are right |

The handbook was invented for this course, so no model can know it.
""")
code("tasks", """
def read(path):
    return load_dataset("json", data_files=f"../data/{path}", split="train").to_list()

notes, hand = read("tidy/train.jsonl"), read("tidy/hand_test.jsonl")
pages, questions = read("handbook/pages.jsonl"), read("handbook/questions.jsonl")
tickets = triage.read("../data/triage/hand_test.jsonl")
sql = read("ask/hand_test.jsonl")
shown = {"facts": (questions[4]["question"], questions[4]["answer"])}
for task, row in (("ask", sql[8]), ("tidy", hand[0]), ("triage", tickets[1])):
    shown[task] = row["prompt"][-1]["content"], row["completion"][0]["content"]
pd.DataFrame(shown, index=["in", "out"]).T
""")
md("matrix-says", """
Seven methods answered each test set with SmolLM2, a model of 135 million parameters:

- **zero-shot**: the best instruction that we could write. **few-shot**: the same, and eight examples.
- **retrieval**: the same, and what a search finds for this input: pages of the handbook, or the four nearest examples.
- **constrained**: like retrieval, but the decoder may only write what a grammar or a JSON schema allows.
- **rules**: no language model. A search that returns one sentence, a parser by an expert, a spelling library, a regression on pieces of words.
- **fine-tuning**: 450 to 1,054 examples, seen once, three seeds. For facts: the pages and 150 questions, four times.
- **fine-tuning + retrieval**: the trained model gets what the search finds. For facts it was trained to *read* found pages.

**Predict** the winner of each task before you look.
""")
code("matrix", """
runs = methods.records()
figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharey=True)
methods.plot_matrix(axes.flat, runs)
""")
md("differences-says", """
MATRIX-SAYS
""")
code("differences", """
rows = {}
for task, name in methods.TASKS.items():
    best, second = methods.arms(runs, task)[:2]
    gap = seeds.shown(methods.compare(runs, task, best, second))
    rows[name] = {"best": best, "second": second, "best minus second": gap}
pd.DataFrame(rows).T
""")
md("scale-says", """
SCALE
""")
md("train-says", """
## 2 · Train one of them

Now you do it. The task is `tidy`, with eighty notes, which is what one person can write in an afternoon. Before training, the base model gets four of them as examples in its prompt.

**Predict:** will twenty seconds of training beat the four examples?
""")
code("train", """
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto" if GPU else torch.float32)
set_seed(0)
trainer = SFTTrainer(
    model, train_dataset=load_dataset("json", data_files="../data/tidy/train.jsonl",
                                      split=f"train[:{ROWS}]"), processing_class=tokenizer,
    args=SFTConfig(str(RUNS / "tidy"), learning_rate=RATE, num_train_epochs=1, warmup_steps=3,
                   per_device_train_batch_size=4, logging_steps=2, save_strategy="no",
                   gradient_checkpointing=False, report_to="none", use_cpu=not GPU),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[LiveCurve("tidy:")])
speed_up(trainer)
trainer.train();
""")
code("after", """
some = read("tidy/test.jsonl")[:40]
asked = [row["prompt"] for row in some]
examples = [m for row in notes[:4] for m in (row["prompt"][-1], row["completion"][0])]
with_examples = [[*prompt[:-1], *examples, prompt[-1]] for prompt in asked]
tuned = score(answers(trainer.model, tokenizer, asked, 48), some, tidy.scorer)
with trainer.model.disable_adapter():               # exactly the base model
    few = score(answers(trainer.model, tokenizer, with_examples, 48), some, tidy.scorer)
print("four examples in the prompt:", few, "\\ntrained on eighty:         ", tuned)
print("trained minus four examples:", compare(tuned, few))
pd.DataFrame([{"note": row["prompt"][-1]["content"], "four examples": few.answers[i],
               "trained": tuned.answers[i]} for i, row in enumerate(some[:4])])
""")
md("exercise-1-says", """
AFTER-SAYS

**Your turn.** Write a prompt that does better. In: the note, and 40 rows of `data/tidy/train.jsonl`. Out: the messages to send. The check lets SmolLM2 answer 16 fresh notes with it, and tells you how far the trained models are ahead. `hint("01.1")` helps one step at a time.
""")
code("exercise-1", """
# 01.1 In: note, a string; examples, 40 rows with "prompt" and "completion". Out: a list of messages
# like [{"role": "user", "content": "..."}]; each example is two messages. It takes a minute.
def my_prompt(note, examples):
    ...                                   # your lines

check("01.1", my_prompt)
""")
md("kinds-says", """
## 3 · Four kinds of fine-tuning are four kinds of rows

The article names four kinds. They differ in what a row holds, and in which tokens count in the loss.

| kind | a row | counts in the loss |
|---|---|---|
| supervised fine-tuning (SFT) | one input, one output | the output and its end mark |
| instruction tuning | the same, with all sorts of requests | the same |
| alignment | one input, a better and a worse output | both outputs, the worse one with a minus sign |
| domain adaptation | plain text | every token but the first |

The first, second and fourth are next-token prediction. Alignment compares two answers ([04](04_rlhf_vs_dpo.ipynb)). **Predict** for the rows below: which tokens are marked?
""")
code("four-kinds", """
everyday, pair = read("general/rehearsal.jsonl")[0], read("replies/train.jsonl")[0]
say = lambda role, text: [{"role": role, "content": text}]
sft_row = {"prompt": say("user", everyday["question"]), "completion": say("assistant", everyday["answer"])}
chosen, rejected = ({"prompt": say("user", pair["ticket"]), "completion": say("assistant", pair[side])}
                    for side in ("chosen", "rejected"))
for row in (notes[0], sft_row, chosen, rejected):
    display(data.show_mask({key: row[key] for key in ("prompt", "completion")}, tokenizer))
""")
md("chat-ready-says", """
Blue is only read. [MASK COLOURS]
""")
code("chat-ready", """
def continued(text, limit=24):
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    out = model.generate(**ids, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1]:])

easy = [row["question"] for row in read("general/facts.jsonl")[::30]]
chat = [tokenizer.apply_chat_template(say("user", q), tokenize=False, add_generation_prompt=True) for q in easy]
with trainer.model.disable_adapter():
    found = {"as bare text": map(continued, easy), "in the chat template": map(continued, chat)}
    replies = pd.DataFrame({name: list(texts) for name, texts in found.items()}, index=easy)
replies
""")
md("form-says", """
FORM

## 4 · Force the form: constrained decoding
""")
code("constrained", """
gguf = export.to_gguf(MODEL, RUNS / "base.gguf")
schema = {"type": "json_schema", "json_schema": {"name": "triage", "schema": triage.SCHEMA}}
ticket = tickets[1]
with serve(gguf) as server:
    client = OpenAI(base_url=server.url, api_key="none")
    for name, form in (("free", {}), ("forced", {"response_format": schema})):
        reply = client.chat.completions.create(
            model="model", messages=ticket["prompt"], temperature=0, max_tokens=64, **form)
        said = reply.choices[0].message.content
        verdict = f"valid {triage.is_valid(said)}, right {triage.scorer(said, ticket)}"
        print(f"{name}: {said!r}\\n  {verdict}")
print("label:", ticket["completion"][0]["content"])
""")
md("facts-says", """
CONSTRAINED-SAYS

## 5 · Facts: found, and read

Retrieval can fail in two places. The right passage is not *found*, or it is found and not *read*. [BM25](https://doi.org/10.1561/1500000019) is a search that counts words: a passage ranks high if it holds the question's rare words.

**Predict:** of 100 questions, for how many is the right passage among the first three?
""")
code("retrieval", """
passages = handbook.passages(pages)
search = BM25([passage["text"] for passage in passages])
test = [question for question in questions if question["split"] == "test"]

def found(question, k=3):
    return [passages[i]["text"] for i in search.search(question["question"], k)]

hit = [any(q["evidence"] in text for text in found(q)) for q in test]
question = test[31]
prompt = handbook.prompt(question["question"], found(question))
with trainer.model.disable_adapter():
    both = [handbook.prompt(question["question"]), prompt]
    closed, opened = answers(trainer.model, tokenizer, both, 24)
print(f"found among the first three: {sum(hit)} of {len(hit)}\\n\\n{question['question']}")
print(f"  from memory: {closed}\\n  with the page: {opened}\\n  right: {question['answer']}")
""")
md("reading-says", """
Who reads well? We count only the questions whose passage was found.
""")
code("reading", """
for arm, who in {"retrieval": "the base model", "fine-tuning + retrieval": "trained to read"}.items():
    right = methods.values(runs, "facts", arm).mean(0)[hit]
    print(f"{who:16}{right.mean():.0%} of {len(right)} questions with a found passage")
shares = [run["taught"] for run in runs if "taught" in run]
taught = sum(shares) / len(shares)
print(f"trained on the pages: {taught:.0%} of the 150 questions it was taught,",
      f"{methods.values(runs, 'facts', 'fine-tuning').mean():.0%} of 100 others")
""")
md("exercise-2-says", """
READING-SAYS

**Your turn: debug this.** A colleague scores replies with `answer.lower() in reply.lower()`. Her model looks much too good, because a wrong reply counts: `"Rs 650"` holds `"Rs 65"`. Mend it: the answer's *words* must stand in the reply, in a row. Case and punctuation do not count.
""")
code("exercise-2", """
# 01.2 In: reply and answer, strings. Out: True or False.
# Example: ("It is Rs 650.", "rs 650") gives True; ("Rs 650", "Rs 65") gives False.
def my_contains(reply, answer):
    ...                                   # the colleague: return answer.lower() in reply.lower()

check("01.2", my_contains)
""")
md("cost-says", """
## 6 · What a call costs

A prompt is read on every call, and an answer is written token by token. APIs charge several times more for a written token than for a read one. **Predict:** which method of `triage` is the cheapest?
""")
code("cost", """
def cost(run):
    price = (run["prompt_tokens"] * INPUT + run["answer_tokens"] * OUTPUT) / 1000
    return {"tokens in": run["prompt_tokens"], "tokens out": run["answer_tokens"],
            "seconds a call": run["answer_seconds"] / len(run["values"]),
            "price of 1,000 calls": price, "right": sum(run["values"]) / len(run["values"])}

arms = ("zero-shot", "few-shot", "retrieval", "fine-tuning", "fine-tuning + retrieval")
one_seed = {run["arm"]: run for run in runs if run["task"] == "triage" and run["seed"] == 0}
pd.DataFrame({arm: cost(one_seed[arm]) for arm in arms}).T.round(2)
""")
md("break-even-says", """
COST-SAYS

### Break-even

A saving counts only between methods that are *equally good*. So take two ways to use the same eight examples of `tidy`. They stand in the prompt, or they are trained on.
""")
code("break-even", """
BREAK
""")
md("exercise-3-says", """
BREAK-SAYS

**Your turn.** Write the price of 1,000 calls. Prices are for a million tokens.
""")
code("exercise-3", """
# 01.3 In: tokens of a prompt and of an answer, the prices of a million tokens read and written.
# Out: the price of 1,000 calls. Example: (500, 20, 0.2, 0.8) gives 0.116.
def my_cost(prompt_tokens, answer_tokens, input_price, output_price):
    ...                                   # your lines

check("01.3", my_cost)
""")
md("data-size-says", """
## 7 · How many examples does it take?

A common rule says: below 100 examples, show them in the prompt. We can test that on `tidy`. The *same* n examples are trained on, or stand in the prompt, where the four nearest of the n are shown. **Predict** where the two lines cross.
""")
code("data-size", """
figure, ax = plt.subplots(figsize=(6, 3.4))
methods.plot_sizes(ax, runs)
""")
md("exercise-4-says", """
SIZE-SAYS

**Your turn: train one arm.** Write the trainer of an arm with the first n rows. Each arm sees its rows once. The check trains it for 24 steps on the small model. Afterwards you can run it on SmolLM2: `my_arm(model, tokenizer, notes, 40).train()`.
""")
code("exercise-4", """
# 01.4 In: a model, its tokenizer, rows with "prompt" and "completion", n. Out: an SFTTrainer, not
# started, on the first n rows: one pass, batch 2, rate 2e-3, no checkpointing, LoRA with r=16 and
# lora_alpha=32 on all linear layers.
def my_arm(model, tokenizer, rows, n):
    ...                                   # your lines

check("01.4", my_arm)
""")
md("deep", """
## 8 · Deep dive: what the rows decide

You can skip this section. Three questions about training rows, with three seeds each.

**Few clean rows, or many of which half are wrong?** The small model `micro` learns `ask`. It sees 5,000 rows in every arm.
""")
code("noise", """
NOISE
""")
md("known-says", """
NOISE-SAYS

**Facts that the model knew, or facts that it cannot know?** [Gekhman et al.](https://arxiv.org/abs/2405.05904) taught a model both. Here SmolLM2 learns 60 questions, eight passes. We ask the taught questions, and 143 others that it was not taught.
""")
code("known-unknown", """
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
methods.plot_known(axes, runs)
""")
md("domain-says", """
KNOWN-SAYS

**Plain text of the field.** Forty pages of the handbook, read once (*domain adaptation*, or continued pre-training).
""")
code("domain", """
methods.domain_table(runs)
""")
md("decide-says", """
DOMAIN-SAYS

## 9 · So what do you do?

Five questions. The first line of the table that fits is the answer, and each line names the cells that it rests on.
""")
code("decide", """
decide.decision_helper()
""")
md("quiz-says", """
## Quiz
""")
code("quiz", """
quiz.show("01_why_fine_tune")             # choose an option, then press Check: each is explained
""")
code("ci", """
# For the course's own tests: you can skip this cell.
assert compare(tuned, few).low > 0, "eighty examples should beat four in the prompt"
""", hidden=True)
md("facts", """
FACTS

**Next:** [02 · LoRA](02_lora_math.ipynb).
""")
nb=new_notebook(cells=cells, metadata={"kernelspec":{"display_name":"Python 3 (ipykernel)","language":"python","name":"python3"},"language_info":{"name":"python"}})
nbformat.write(nb, sys.argv[1]); print(len(cells))
