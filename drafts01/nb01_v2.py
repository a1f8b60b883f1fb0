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

About **90 seconds** on two CPU cores, 3 GB of memory, no GPU, no network. Reading time: 35 minutes. You need notebook [00](00_start_here.ipynb). Checked in November 2026 with trl 1.14, peft 0.21 and transformers 5.17.

![Four columns, each from a question to an answer. Prompt: an instruction and examples go before the question. Retrieval: search finds the right page. Rules: a program answers, without a model. Fine-tuning: a short instruction, and the model itself was trained on rows.](../data/pictures/why_fine_tune.svg)

Think of a bright graduate in a new job. You can hand over an instruction with worked cases, or open the right page of the handbook each time. You can write a program instead. Or you let the graduate practise until the work is second nature. Nobody *practises* a refund limit that changes next month. Nobody *looks up*, for every ticket, how a form is filled in.
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
from IPython.display import HTML, display
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
ROWS, RATE = 48, 2e-3
INPUT, OUTPUT = 0.20, 0.80          # dollars for a million tokens, read and written; an example
GPU = torch.cuda.is_available()
RUNS = Path("runs/why_fine_tune")   # everything that this notebook writes
show.house_style(), pd.set_option("display.max_colwidth", None);
""")
md("idea", """
## 1 · Four tasks, seven methods

RasoiRun is a food-delivery company that does not exist. Its four tasks are of four kinds. Their test sets were written by hand, and nothing was chosen on them. (The live run of section 2 uses other notes, made by a script. They are a bit easier.)

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

- **zero-shot**: an instruction that spells the task out. **few-shot**: the same, and the first eight training examples.
- **retrieval**: the same, and what a search finds for this input: pages of the handbook, or the four nearest examples.
- **constrained**: like retrieval, but at each step only tokens are allowed that fit a *grammar* or a *JSON schema*, a written description of the form (section 4).
- **rules**: any program without a language model. Facts: a search that returns one sentence. `ask`: an expert's parser of 460 lines. `tidy`: a spelling library, and habits counted in the same rows. `triage`: a classifier (a regression on pieces of words) and two patterns, learned from the same rows.
- **fine-tuning**: 450 (`ask`), 600 (`triage`) or 1,054 (`tidy`) examples, seen once, three seeds. For facts: the pages and 150 questions, four times.
- **fine-tuning + retrieval**: the trained model gets what the search finds. For facts it was trained to *read* found pages.

**Predict** the winner of each task before you look. In the picture the best method of a task is green. Of the others, trained ones are blue, those without a language model grey, and those that ask the base model orange. A dash: not tried.
""")
code("matrix", """
runs = methods.records()
figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharey=True)
methods.plot_matrix(axes.flat, runs)
""")
md("differences-says", """
**No method wins everywhere.** On facts a reader that was trained on found pages and a plain search are ahead. `ask` goes to the parser that an expert wrote, and training on 450 rows stays far behind it. The shipped adapter saw 7,500 rows, twice, and reached 0.932: between it and the parser [no clear difference](../data/ask_adapter/README.md) was measured. `tidy` goes to training. `triage` goes to a classifier of the old kind, which learned from the same 600 tickets in seconds. The shipped adapter was shown more than ten times as many and reached 0.593, about the level of the classifier.

A bar at 0 says that this model is too small for the prompt, and not that prompting fails. On `tidy` examples brought it about as far as the dotted line, which is what a note scores if nobody touches it. On `ask` and `tidy` a trained model got *worse* when examples came into its prompt. A likely reason is that it was never trained on such prompts. We did not test this. ([The same](https://arxiv.org/abs/2308.15363) was seen with larger models on public SQL questions.) The reader of the handbook pages was trained on such prompts.

Which differences are more than chance? We take the best method of each task and the best one of another *family*, and compare them on the *same* examples. (On facts, all that answers from found pages is one family, retrieval.) The 95 % interval draws the examples anew, and the *seeds*: trainings that differ only in their random numbers. A star marks an interval that excludes 0.
""")
code("differences", """
display(methods.winners(runs).round(2))
for name, other in (("minus search alone", "rules"), ("minus the same without pages", "fine-tuning")):
    gap = methods.compare(runs, "facts", "fine-tuning + retrieval", other)
    print(f"facts, the reader of found pages {name}: {seeds.shown(gap)}")
""")
md("scale-says", """
**Four tasks, three winners: retrieval, rules twice, fine-tuning.** They are clear *at these amounts of training*. (The best ones were picked on these examples, which flatters them a little.)

Within retrieval, the reader and the plain search use the same pages, and which of them is better stays open. (The search returns a whole sentence, the reader two or three words, so they do not do the same service.) The last line shows what finding the page, and learning to read it, brought.

The interval does not count another model, or a better idea for a prompt.

### And a larger model?

All this is one model of 135 million parameters. Its numbers for *prompting* say little about larger ones. [GPT-3's paper](https://arxiv.org/abs/2005.14165) shows that the use of examples grows with size. On the public SQL questions of Spider, GPT-4 with a good prompt and a vote over several answers reached [86.6 %](https://arxiv.org/abs/2308.15363). Small tuned models can still win: over 31 tasks, LoRA models of 2 to 8 billion parameters were [10 points above GPT-4](https://arxiv.org/abs/2405.00732) on average, in a report by a company that sells such training. Facts stayed with retrieval at 7 billion parameters too. On multiple-choice questions about recent news, found texts gave [0.875](https://arxiv.org/abs/2312.05934), training on the texts 0.504, and neither of the two 0.481.

So carry the *questions* over to your model: which test, which controls, which difference. Measure the levels yourself.
""")
md("train-says", """
## 2 · Train one of them

Now you do it. The task is `tidy`, with 48 notes, which is what one person can write in an afternoon. Then 24 other notes are answered, with the same one-line instruction, by the trained model, and with the adapter switched off. *Left as they are* is somebody who changes nothing.

**Predict** the three shares of words right.
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
some = read("tidy/test.jsonl")[:24]
asked = [row["prompt"] for row in some]
tuned = score(answers(trainer.model, tokenizer, asked, 40), some, tidy.scorer)
with trainer.model.disable_adapter():               # exactly the base model
    before = score(answers(trainer.model, tokenizer, asked, 40), some, tidy.scorer)
same = score([prompt[-1]["content"] for prompt in asked], some, tidy.scorer)
for name, one in {"left as they are": same, "before": before, "trained on 48": tuned}.items():
    print(f"{name:18}", one)
print("trained minus before:          ", compare(tuned, before))
print("trained minus left as they are:", compare(tuned, same))
pd.DataFrame([{"note": row["prompt"][-1]["content"], "before": before.answers[i],
               "trained": tuned.answers[i]} for i, row in enumerate(some[:4])])
""")
md("exercise-1-says", """
Before, the model *talks about* the note, so even what was right in it is lost. After 48 rows it does the work, with the same instruction. Read the four notes. Where does each answer fail?

That instruction is one line, and a better prompt may do without training. **Your turn.** Write a prompt that does better. In: the note, and 40 rows of `data/tidy/train.jsonl`. Out: the messages to send. The check lets SmolLM2 answer 16 fresh notes with it. You pass if it gets 0.1 more of the words right than with the bare instruction. It also shows what models reached that were trained on 1,054 notes. `hint("01.1")` helps one step at a time.
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

People speak of four kinds. They differ in what a row holds, and in which tokens count in the loss, the model's surprise at the right tokens.

| kind | a row | counts in the loss |
|---|---|---|
| supervised fine-tuning (SFT) | one input, one output | the output and its end mark |
| instruction tuning | the same, with all sorts of requests | the same |
| alignment | one input, a better and a worse output | both outputs, the worse one with a minus sign |
| domain adaptation | plain text | every token but the first |

The first, second and fourth are next-token prediction. Alignment as shown here compares two answers ([04](04_rlhf_vs_dpo.ipynb)).

**Your turn.** Colour the loss mask of a chat: 1 for each token that counts, 0 for each that is only read. A chat may hold several turns. The model writes the words of each assistant turn and the `<|im_end|>` after them. All else is given to it.
""")
code("exercise-2", """
# 01.2 In: tokens, the pieces of a chat as strings. Out: a list with a 1 or a 0 for each of them.
# A turn is "<|im_start|>", its role, "\\n", its words, "<|im_end|>", "\\n".
# Example: after "<|im_start|>", "assistant", "\\n" the pieces "Hello", "<|im_end|>" get a 1.
def my_colours(tokens):
    ...                                   # your lines

check("01.2", my_colours)
""")
md("four-kinds-says", """
Now look at one row of each kind. The marked tokens count.
""")
code("four-kinds", """
def row(question, answer):
    return {"prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}]}

everyday, pair = read("general/rehearsal.jsonl")[0], read("replies/train.jsonl")[0]
kinds = {"SFT": notes[0], "instruction tuning": row(everyday["question"], everyday["answer"]),
         "alignment, chosen": row(pair["ticket"], pair["chosen"]),
         "alignment, rejected": row(pair["ticket"], pair["rejected"])}
for kind, one in kinds.items():
    display(HTML(f"<b>{kind}</b>"), data.show_mask(one, tokenizer))
ids = tokenizer(pages[0]["text"][:160])["input_ids"]
bits = [0] + [1] * (len(ids) - 1)
pieces = [(tokenizer.decode([i]), bit) for i, bit in zip(ids, bits)]
display(HTML("<b>domain adaptation</b>"), data.Mask(ids, bits, pieces))
""")
md("chat-ready-says", """
Only the marked tokens count. In a pair both answers are marked, and the loss compares them.

People say that instruction tuning makes a base model "chat-ready". What does that mean? SmolLM2 was instruction-tuned by its makers. So we ask the other way round: four easy questions, once as bare text, once in its chat template, which says whose turn it is. **Predict:** will it answer without the template?
""")
code("chat-ready", """
def continued(text, limit=24):
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    out = trainer.model.generate(**ids, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1]:])

def chat(question):
    return tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                         tokenize=False, add_generation_prompt=True)

easy = [fact["question"] for fact in read("general/facts.jsonl")[::30]]
with trainer.model.disable_adapter():
    replies = [{"question": q, "as bare text": continued(q), "in its template": continued(chat(q))}
               for q in easy]
pd.DataFrame(replies)
""")
md("form-says", """
As bare text it stops at once. It was tuned on chats, and in a chat a question ends a turn. So turns and stopping depend on the template. (We cannot show the model as it was before this tuning.) In [InstructGPT](https://arxiv.org/abs/2203.02155) a later stage made the answers more *preferred*. The first tuning had begun that.

## 4 · Force the form: constrained decoding

Must you train for valid JSON? The server can forbid every token that a schema does not allow. That is *constrained decoding*, or structured output. With most hosted models the option has the same name, `response_format`. Here the prompt says only that the ticket is to be triaged. **Predict:** will the forced object be valid, and will it be right?
""")
code("constrained", """
gguf = Path(MODEL).with_name("smollm2-original.gguf")      # the file that MODEL was made from
# for another model: gguf = export.to_gguf(MODEL, RUNS / "base.gguf")
schema = {"type": "json_schema", "json_schema": {"name": "triage", "schema": triage.SCHEMA}}
ticket = tickets[1]
with serve(gguf, parallel=1) as server:
    client = OpenAI(base_url=server.url, api_key="none")
    for name, form in (("free", {}), ("forced", {"response_format": schema})):
        reply = client.chat.completions.create(
            model="model", messages=ticket["prompt"], temperature=0, max_tokens=96, **form)
        said = reply.choices[0].message.content
        verdict = f"valid {triage.is_valid(said)}, right {triage.scorer(said, ticket)}"
        print(f"{name}: {said!r}\\n  {verdict}")
print("label:", ticket["completion"][0]["content"])
""")
md("facts-says", """
**The schema forces the form. The values are still the model's own.** Over all tickets, with the nearest examples in the prompt, the schema helped a little: 0.17 right with it, 0.12 without. On `ask` the grammar changed hardly anything.

## 5 · Facts: found, and read

Retrieval can fail in two places. The right passage is not *found*, or it is found and not *read*. [BM25](https://doi.org/10.1561/1500000019) is a search that counts words: a passage ranks high if it holds the question's rare words.

A passage is a paragraph with its page's title, and there are 192. **Predict:** of 100 questions, for how many is the right passage among the first three? Below stand the first question that the base model then read right, and the first that it misread.
""")
code("retrieval", """
passages = handbook.passages(pages)
search = BM25([passage["text"] for passage in passages])
test = [question for question in questions if question["split"] == "test"]

def found(question, k=3):
    return [passages[i]["text"] for i in search.search(question["question"], k)]

hit = [any(q["evidence"] in text for text in found(q)) for q in test]
print(f"found among the first three: {sum(hit)} of {len(hit)}")
was_right = methods.values(runs, "facts", "retrieval")[0]      # of the base model, with the pages
picked = [next(q for q, h, r in zip(test, hit, was_right) if h and r == right) for right in (1, 0)]
prompts = [handbook.prompt(q["question"], texts) for q in picked for texts in ([], found(q))]
with trainer.model.disable_adapter():
    said = answers(trainer.model, tokenizer, prompts, 24)
for i, question in enumerate(picked):              # the first that it read, and that it misread
    print(f"\\n{question['question']}\\n  from memory: {said[2 * i]}")
    print(f"  with the page: {said[2 * i + 1]}\\n  right: {question['answer']}")
""")
md("reading-says", """
(The first of the two counts as right, since the answer stands in the reply. A wrong number stands there too: this score is kind to long replies.)

Who reads well? We count only the questions whose passage was found. **Predict** the share for the base model, and for the one that was trained to read.
""")
code("reading", """
who_reads = {"retrieval": "the base model", "fine-tuning + retrieval": "trained to read"}
for arm, who in who_reads.items():
    right = methods.values(runs, "facts", arm).mean(0)[hit]
    print(f"{who:16}{right.mean():.0%} of the {len(right)} questions with a found passage")
shares = [run["taught"] for run in runs if "taught" in run]
taught = sum(shares) / len(shares)
print(f"trained on the pages: {taught:.0%} of the 150 questions it was taught,",
      f"{methods.values(runs, 'facts', 'fine-tuning').mean():.0%} of 100 others")
""")
md("exercise-3-says", """
Both readers saw the same passages. **The base model had the answer before its eyes, and often did not say it.** 150 questions with their pages taught it to find the place, and to answer in two words. So here fine-tuning helped retrieval, and it did not replace it. That need not hold elsewhere: fine-tuned *on the texts*, Mistral 7B answered 81 % with retrieval, and 87.5 % without fine-tuning ([Ovadia et al.](https://arxiv.org/abs/2312.05934)).

Training on the pages and on 150 questions taught it some of those answers, and next to nothing about the rest of the pages. It had not even learned all of its own questions, so longer training might bring more. So do more wordings: with ten paraphrases of each text Mistral reached 0.588 without retrieval.

**Your turn: debug this.** A colleague scores replies with `answer.lower() in reply.lower()`. Her model looks much too good, because a wrong reply counts: `"Rs 650"` holds `"Rs 65"`. Fix it: the answer's *words* must stand in the reply, in a row. Case and punctuation do not count.
""")
code("exercise-3", """
# 01.3 In: reply and answer, strings. Out: True or False.
# Example: ("It is Rs 650.", "rs 650") gives True; ("Rs 650", "Rs 65") gives False.
def my_contains(reply, answer):
    ...                                   # the colleague: return answer.lower() in reply.lower()

check("01.3", my_contains)
""")
md("cost-says", """
## 6 · What a call costs

A prompt is read on every call, and an answer is written token by token. APIs charge several times more for a written token than for a read one. *Latency* is how long a call takes: here of one core, for 20 notes asked one at a time, half of which take less than **p50** and 95 % less than **p95**. **Predict:** which method of `tidy` is the cheapest, and which comes last?
""")
code("cost", """
def cost(arm):
    run = only("tidy", arm)
    price = (run["prompt_tokens"] * INPUT + run["answer_tokens"] * OUTPUT) / 1000
    waits = pd.Series(only("latency", arm)["seconds"])
    return {"tokens in": run["prompt_tokens"], "tokens out": run["answer_tokens"],
            "price of 1,000 calls": price, "latency p50, s": waits.quantile(0.5),
            "latency p95, s": waits.quantile(0.95), "right": sum(run["values"]) / len(run["values"])}

def only(task, arm):                                # the run with seed 0
    return next(run for run in runs if (run["task"], run["arm"], run["seed"]) == (task, arm, 0))

arms = ("zero-shot", "few-shot", "retrieval", "fine-tuning", "fine-tuning + retrieval")
pd.DataFrame({arm: cost(arm) for arm in arms}).T.round(2)
""")
md("break-even-says", """
**The trained model is the cheapest, the quickest and the best.** Its instruction is one line, and it stops when the sentence is done. The eight examples cost the most to read. Zero-shot is the odd one: it reads little and *writes* much, because the base model goes on talking. That is why its p95 is so far from its p50.

Three things are left out. Many servers keep the beginning of a prompt that all calls share, and charge less for it, so eight fixed examples get cheaper. A hosted model that you tuned may cost more per token than the same model untuned. And a server of your own costs money while nobody asks.

### Break-even

A saving counts only if the cheaper way is at least *as good*. So take two ways to use the same eight examples of `tidy`. They stand in the prompt, or the model is trained on them. **Predict:** after how many calls is the training paid for?
""")
code("break-even", """
prompted, trained = only("tidy", "few-shot"), only("size", "trained on 8")
gap = methods.compare([*runs, {**prompted, "task": "size"}], "size", "trained on 8", "few-shot")
saved = (prompted["answer_seconds"] - trained["answer_seconds"]) / len(prompted["values"])
print("trained on eight minus eight in the prompt:", seeds.shown(gap))
print(f"training: {trained['train_seconds']:.0f} s; a call saves {saved:.2f} s;",
      f"paid after {trained['train_seconds'] / saved:.0f} calls")
""")
md("data-size-says", """
The trained model is better here, so nothing is lost by the shorter prompt. In computing time, its training is paid back after fewer than a hundred calls. (The seconds are of one seed and one core, 16 notes at a time.) What costs is labelling, and both ways need the same eight labels.

## 7 · How many examples does it take?

A common rule says: below 100 examples, show them in the prompt. We can test that on `tidy`. The same n rows are trained on, or the prompt may choose from them: all of eight, the four nearest of more. Small sets are seen up to eight times in training. Prompts with 32 and more examples were not tried. **Predict** where the two lines cross.
""")
code("data-size", """
figure, ax = plt.subplots(figsize=(6, 3.4))
methods.plot_sizes(ax, runs);
""")
md("exercise-4-says", """
**On this model and this task the lines do not cross.** Training is ahead at every size that we measured. But the prompt stays near the dotted line at all sizes, so this model hardly uses its examples. A larger one may. [A comparison](https://arxiv.org/abs/2305.16938) of equal models, from 125 million to 30 billion parameters, with equally many examples, found both ways similar on unfamiliar data. [Another](https://arxiv.org/abs/2205.05638) found training ahead: a model of 11 billion parameters, trained on 50 examples a task, reached 75.8 % on the RAFT tasks, and the sixteen times larger GPT-3 with examples in its prompt 62.7 %. So "below 100 examples, prompt" is no rule. Try both.

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

You can skip this section. Three questions about training rows: the first with three seeds, the other two with one seed each.

**Do wrong rows harm, or are they lost among the right ones?** The task is `tidy` again. 128 rows are right, and in one arm 128 wrong ones stand between them. A wrong row has the sentence of *another* note. **Predict** the order of the four.
""")
code("noise", """
methods.noise_table(runs)
""")
md("known-says", """
**The wrong rows did harm.** The first two lines differ in them alone, and the interval excludes 0, if only just. Now and then the model writes a sentence that has nothing to do with the note. Rows can also be right and still not fit the goal: 9,000 chosen answers beat 450,000 of another collection [in chat, and lost on MMLU](https://arxiv.org/abs/2305.14314), a test of school and university questions.

**Facts that the model knew, or facts that it cannot know?** A paper taught a model both. Here SmolLM2 learns 60 questions, eight passes. We ask the taught questions, and 143 others that it was not taught. **Predict:** which of the two is learned later, and what does each cost the others?
""")
code("known-unknown", """
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
methods.plot_known(axes, runs)
""")
md("domain-says", """
**What the model knew was there after two passes. What it could not know took six.** Most of the harm to other questions comes from the training itself: sixty short questions, eight times over. The unknown facts cost more. But they differ in more than being unknown, since the other questions are everyday ones too. This is one seed on one small model. [Gekhman et al.](https://arxiv.org/abs/2405.05904) kept such things equal. There, too, unknown facts came later, and a model that had taken them in invented more.

**Plain text of the field.** Forty pages of the handbook, read once (*domain adaptation*, or continued pre-training). *Perplexity* is e to the mean loss of a token: 10 is the surprise of a choice among ten equally likely tokens. **Predict:** on which texts does it fall, and how many questions about the pages can the model answer then?
""")
code("domain", """
answered = methods.values(runs, "domain", "pages")
print(f"questions about these pages answered: {answered.mean():.0%} of {answered.shape[1]}")
methods.domain_table(runs)
""")
md("decide-says", """
The pages surprise the model less than before. So do the ten pages that it never read, nearly as much: it learned how the handbook *speaks*. Text from elsewhere hardly changed. But it answered none of the questions about the pages that it had read once (one seed). **Less surprise is not yet knowledge.**

## 9 · So what do you do?

Six questions. The first line of the table that fits is the answer, and each line names the cells that it rests on.
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
assert compare(tuned, before).low > 0, "48 rows should change what the model does"
""", hidden=True)
md("facts", """
## Five facts to take along

1. **The test comes first.** Every method answers the same examples, and differences are paired.
2. **Facts belong in the prompt.** Search found the page, and training taught the model to read it. Our short training on the pages taught hardly a fact that could be asked for.
3. **Race against simple programs.** Here a parser beat the model at SQL, and a small classifier at tickets. Training won where whole sentences had to be written.
4. **Few examples are no reason not to train.** On this small model eight trained examples beat eight shown ones. On yours, try both. And use the same kind of prompt in training and afterwards.
5. **A schema forces the form and not the content.**

**You can write now:** a few-shot and a retrieval prompt, a schema for the decoder, a short SFT run, and a table in which every method answers the same examples.

**To read:** [RAG](https://arxiv.org/abs/2005.11401), [fine-tuning or retrieval](https://arxiv.org/abs/2312.05934), [unknown facts](https://arxiv.org/abs/2405.05904), [TRL's SFTTrainer](https://huggingface.co/docs/trl/sft_trainer), [llama.cpp's grammars](https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md).

**Next:** [02 · LoRA](02_lora_math.ipynb).
""")
nb=new_notebook(cells=cells, metadata={"kernelspec":{"display_name":"Python 3 (ipykernel)","language":"python","name":"python3"},"language_info":{"name":"python"}})
nbformat.write(nb, sys.argv[1]); print(len(cells))
