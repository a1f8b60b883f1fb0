"""Fills the placeholders of /tmp/nb01.py -> /tmp/nb01_full.py"""
t=open('/tmp/nb01.py').read()
def put(old,new):
    global t
    assert t.count(old)==1,(old,t.count(old)); t=t.replace(old,new)
put("MATRIX-SAYS","""MATRIX_TEXT

Two things were no surprise. Without the page, nobody knows the facts. And examples in the prompt helped only where the model could copy something useful from them.

Which differences are real? We take the best method of each task and the second best, on the *same* examples. The interval is 95 %, over examples and seeds. A star says that it leaves out 0.""")
put("SCALE","""SCALE_TEXT

### And a larger model?

All this is one model of 135 million parameters. Its numbers for *prompting* say little about larger ones. [GPT-3's paper](https://arxiv.org/abs/2005.14165) shows that the use of examples grows with size. On the public SQL questions of Spider, GPT-4 with a good prompt reached [86.6 %](https://arxiv.org/abs/2308.15363). Small tuned models can still win: over 31 tasks, LoRA models of 2 to 8 billion parameters were [10 points above GPT-4](https://arxiv.org/abs/2405.00732) on average. Facts stayed with retrieval at 7 billion parameters too: [0.875 against 0.504](https://arxiv.org/abs/2312.05934) after training on the texts.

So carry the *questions* over to your model: which test, which controls, which difference. Measure the levels yourself.""")
put("AFTER-SAYS","""The examples already showed the model what to do. Training did it better, with a prompt of a tenth of the length. Read the four lines: where does each of them fail?""")
put("Blue is only read. [MASK COLOURS]","""Only the marked tokens count. In a pair both answers are marked, and the loss compares them.

"Instruction tuning makes base models chat-ready", says the article. What does that mean? SmolLM2 was instruction-tuned by its makers. So we ask the other way round: four easy questions, once as bare text, once in its chat template, which says whose turn it is. **Predict:** will it answer without the template?""")
put("""FORM

## 4""","""As bare text it stops at once: a question is, for this model, a user's whole turn. Turns, form and stopping come from instruction tuning, and they hang on the template. That answers are *preferred* or *harmless* came from a later stage in [InstructGPT](https://arxiv.org/abs/2203.02155).

## 4""")
put("## 4 · Force the form: constrained decoding","""## 4 · Force the form: constrained decoding

Must you train for valid JSON? The server can forbid every token that a schema does not allow. That is *constrained decoding*, or structured output. `response_format` is the same with hosted models. **Predict:** will the forced object be valid, and will it be right?""")
put("CONSTRAINED-SAYS","""CONSTRAINED_TEXT""")
put("READING-SAYS","""READING_TEXT""")
put("COST-SAYS","""COST_TEXT""")
put("BREAK-SAYS","""BREAK_TEXT""")
put("""BREAK
\"\"\")""","""def only(task, arm):
    return next(run for run in runs if (run["task"], run["arm"], run["seed"]) == (task, arm, 0))

prompted, trained = only("tidy", "few-shot"), only("size", "trained on 8")
gap = methods.compare([*runs, {**prompted, "task": "size"}], "size", "trained on 8", "few-shot")
saved = (prompted["answer_seconds"] - trained["answer_seconds"]) / len(prompted["values"])
print("trained on eight minus eight in the prompt:", seeds.shown(gap))
print(f"training: {trained['train_seconds']:.0f} s; a call saves {saved:.2f} s;",
      f"paid after {trained['train_seconds'] / saved:.0f} calls")
\"\"\")""")
put("SIZE-SAYS","SIZE_TEXT")
put("""NOISE
\"\"\")""","""methods.noise_table(runs)
\"\"\")""")
put("NOISE-SAYS","NOISE_TEXT"); put("KNOWN-SAYS","KNOWN_TEXT"); put("DOMAIN-SAYS","DOMAIN_TEXT")
put("FACTS\n","""## Five facts to take along

FACTS_TEXT

**You can write now:** a few-shot and a retrieval prompt, a schema for the decoder, a short SFT run, and a table in which every method answers the same examples.

**To read:** [RAG](https://arxiv.org/abs/2005.11401), [fine-tuning or retrieval](https://arxiv.org/abs/2312.05934), [unknown facts](https://arxiv.org/abs/2405.05904), [TRL's SFTTrainer](https://huggingface.co/docs/trl/sft_trainer), [llama.cpp's grammars](https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md).
""")
put('''everyday, pair = read("general/rehearsal.jsonl")[0], read("replies/train.jsonl")[0]
say = lambda role, text: [{"role": role, "content": text}]
sft_row = {"prompt": say("user", everyday["question"]), "completion": say("assistant", everyday["answer"])}
chosen, rejected = ({"prompt": say("user", pair["ticket"]), "completion": say("assistant", pair[side])}
                    for side in ("chosen", "rejected"))
for row in (notes[0], sft_row, chosen, rejected):
    display(data.show_mask({key: row[key] for key in ("prompt", "completion")}, tokenizer))
''','''def row(question, answer):
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
''')
put('''easy = [row["question"] for row in read("general/facts.jsonl")[::30]]
chat = [tokenizer.apply_chat_template(say("user", q), tokenize=False, add_generation_prompt=True) for q in easy]
with trainer.model.disable_adapter():
    found = {"as bare text": map(continued, easy), "in the chat template": map(continued, chat)}
    replies = pd.DataFrame({name: list(texts) for name, texts in found.items()}, index=easy)
replies
''','''def chat(question):
    return tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                         tokenize=False, add_generation_prompt=True)

easy = [fact["question"] for fact in read("general/facts.jsonl")[::30]]
with trainer.model.disable_adapter():
    replies = [{"question": q, "as bare text": continued(q), "in its template": continued(chat(q))}
               for q in easy]
pd.DataFrame(replies)
''')
put('''    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    out = model.generate(**ids, max_new_tokens=limit, do_sample=False)
''','''    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    out = trainer.model.generate(**ids, max_new_tokens=limit, do_sample=False)
''')
put("import matplotlib.pyplot as plt\n","import matplotlib.pyplot as plt\n")
put("from datasets import load_dataset\nfrom openai","from datasets import load_dataset\nfrom IPython.display import HTML, display\nfrom openai")
put("temperature=0, max_tokens=64, **form)","temperature=0, max_tokens=128, **form)")
put('''with serve(gguf) as server:''','''with serve(gguf, parallel=1) as server:''')
for name,val in {
"MATRIX_TEXT":"TODO", "SCALE_TEXT":"TODO","CONSTRAINED_TEXT":"TODO","READING_TEXT":"TODO","COST_TEXT":"TODO","BREAK_TEXT":"TODO","SIZE_TEXT":"TODO","NOISE_TEXT":"TODO","KNOWN_TEXT":"TODO","DOMAIN_TEXT":"TODO","FACTS_TEXT":"TODO"}.items(): put(name,val)
open('/tmp/nb01_full.py','w').write(t)
