md(r'''
# 02 · LoRA math

**Question:** why may two thin matrices stand in for the update of a whole model, what do they really save, and what do they not?

Paper: *LoRA: Low-Rank Adaptation of Large Language Models*, Hu et al. 2021, arXiv:2106.09685. You will work one rank by hand, prove a 60-line LoRA layer equal to PEFT's (outputs, gradients, an optimizer step, merging, files), count every model's adapters exactly, and measure what rank, alpha, target modules and dropout do, what they cost, and how much the model forgets.
About **MINUTES** on two CPU cores, PEAK GB at the peak. You need notebook 00, matrix products and the chain rule.
''')
md(r'''
## The idea

Fine-tuning adds an update $\Delta W$ to each weight matrix $W_0$. LoRA bets that this update is *simple*: that few directions of the input matter, and few directions of the output react. A matrix like that is a product of two thin ones:

$$h = W_0 x + \frac{\alpha}{r}\, B A\, x \qquad W_0\,(\text{out, in})\ \text{frozen},\quad A\,(r, \text{in}),\quad B\,(\text{out}, r)$$

`base_layer.weight` is $W_0$, `lora_A` is $A$, `lora_B` is $B$, `lora_alpha` is $\alpha$, `scaling` is $\alpha / r$. $A$ *reads* $r$ numbers off the input, $B$ *writes* $r$ directions into the output. Think of a restaurant chain whose central kitchen is never rebuilt: each branch gets a spice rack. A rack is small, it can be exchanged between two orders, and it still changes every dish that leaves the kitchen. Keep that last half-sentence in mind when somebody tells you that LoRA cannot forget.

The article that this course follows makes 28 claims about LoRA (C04 to C31). Each gets a verdict here, from a cell that you can run; the table stands near the end.
''')
code(r'''
import copy
import json
import statistics
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from ftlab.classroom import check, show
from ftlab.classroom.widgets import plot_singular_values, rank_explorer, rank_kept
from ftlab.paths import DATA
from ftlab.pipeline import data, train as training
from ftlab.pipeline.models import load
from ftlab.scratch.lora import (
    DoRALinear, LoRALinear, add_lora, batched_lora, load_lora_state_dict, lora_flops_ratio, lora_state_dict, merge_lora,
    total_parameters, trainable_parameters)

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

show.house_style()
torch.manual_seed(0)
pd.options.display.precision = 3
''')
md(r'''
## The dial
''')
code(r'''
MODEL = "micro"            # the course's own model of 3.5 million parameters; "smollm2" works too, slower
R, LORA_ALPHA = 16, 32     # the article's recipe: alpha = 2 r
LEARNING_RATE = 3e-3       # of LoRA on micro; section 7 says how it was found
FULL_LEARNING_RATE = 1e-3  # of full fine-tuning
STEPS = 60                 # of 8 short tickets each
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
''')
md(r'''
## 1 · A rank by hand

Take a 2 x 3 update with six numbers in it, $M$. Its *rank* is the number of independent rows: two here. Every matrix is a sum of rank-1 pieces, each a column times a row, ordered by size: the singular value decomposition $M = \sigma_1 u_1 v_1^\top + \sigma_2 u_2 v_2^\top$.

$$M = \begin{pmatrix} 3 & 2 & 2\\ 2 & 3 & -2\end{pmatrix} \qquad M M^\top = \begin{pmatrix} 17 & 8\\ 8 & 17\end{pmatrix}$$

On paper: $M M^\top$ has the eigenvalues 17 + 8 = 25 and 17 - 8 = 9, so $\sigma = 5, 3$. $u_1 = (1, 1)/\sqrt 2$, and $v_1 = M^\top u_1 / 5 = (1, 1, 0)/\sqrt 2$. The first piece is $5\,u_1 v_1^\top$, every entry 2.5 or 0. **Predict** what it misses: the squared error must be $\sigma_2^2 = 9$ out of $25 + 9 = 34$.
''')
code(r'''
M = torch.tensor([[3.0, 2.0, 2.0], [2.0, 3.0, -2.0]])
u, sigma, v = torch.linalg.svd(M, full_matrices=False)
best = sigma[0] * torch.outer(u[:, 0], v[0])
by_hand = torch.tensor([[2.5, 2.5, 0.0], [2.5, 2.5, 0.0]])
torch.testing.assert_close(best, by_hand)
torch.testing.assert_close(sigma, torch.tensor([5.0, 3.0]))
print(f"singular values {sigma[0]:.3f} {sigma[1]:.3f}; squared error of the rank-1 piece {(M - best).square().sum():.3f}; "
      f"kept {rank_kept(M, 1):.3f} = 25/34")
''', check=True)
md(r'''
**Eckart and Young (1936):** no rank-1 matrix comes closer. Do not believe it: let gradient descent look for a better $BA$, from five random starts. **Predict** the best squared error that it can reach.
''')
code(r'''
def best_found(M, r, seed, steps=400):
    """The squared error of the nearest B A of rank r that Adam finds from a random start."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((r, M.shape[1]), (M.shape[0], r)))
    optimizer = torch.optim.Adam([A, B], lr=0.05)
    for _ in range(steps):
        error = (M - B @ A).square().sum()
        optimizer.zero_grad(), error.backward(), optimizer.step()
    return error.item()

found = [best_found(M, 1, seed) for seed in range(5)]
print("squared errors found:", *(f"{error:.4f}" for error in found), "| the bound: 9")
assert min(found) > 9 - 1e-4 and max(found) < 9 + 1e-2
''')
md(r'''
Never below 9. So singular values are the right ruler for "how much of an update does rank $r$ keep", and section 6 lays it on a real update.

### The article's example

A 4096 x 4096 matrix, $r = 16$. **Predict** both counts before you run it.
''')
code(r'''
full, lora = 4096 * 4096, 16 * (4096 + 4096)
print(f"{full:,} numbers in W0, {lora:,} in A and B: {full // lora} times fewer, {1 - lora / full:.3%} fewer")
assert (full, lora, full / lora) == (16_777_216, 131_072, 128)
''', check=True)
md(r'''
C08 holds to the digit. But "16M instead of 131K" is about *one square matrix*. What it means for a whole model is counted in section 4.

## 2 · The layer

This is all of it. Look for three things: which of the two starts at zero, where `scaling` enters, and what `merge` keeps.
''')
code(r'''
show.show_source(LoRALinear)
''')
md(r'''
### The forgotten scale

The article writes $W + BA$ (C09). With the numbers below, on paper: $W_0 x = (7, 15)$, $A x = 1 - 3 = -2$, $B A x = (-4, -6)$. With `lora_alpha = 2`, `r = 1` the addition counts twice: $h = (-1, 3)$. Without the scale it would be $(3, 9)$. Three altitudes, one number: paper, our layer, PEFT.
''')
code(r'''
W0, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 3.0])
A, B = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]])

base_layer = nn.Linear(2, 2, bias=False)
base_layer.load_state_dict({"weight": W0})
ours = LoRALinear(copy.deepcopy(base_layer), r=1, lora_alpha=2)
ours.load_state_dict({"base_layer.weight": W0, "lora_A": A, "lora_B": B})
config = LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj"])
theirs = get_peft_model(nn.Sequential(OrderedDict(q_proj=base_layer)), config)
theirs.base_model.model.q_proj.lora_A["default"].weight.data = A
theirs.base_model.model.q_proj.lora_B["default"].weight.data = B

print("paper [-1.0, 3.0] | ours", ours(x).tolist(), "| PEFT", theirs(x).tolist(),
      "| without the scale", (W0 @ x + B @ A @ x).tolist())
assert ours(x).tolist() == theirs(x).tolist() == [-1, 3]
''', check=True)
md(r'''
### Step 0 is the base model

$B$ starts at 0, so $BA = 0$: the adapted model *is* the base model, to the last bit. And which of the two moves first? $\partial L/\partial B \propto g\,(A x)^\top$ and $\partial L/\partial A \propto (B^\top g)\, x^\top$. **Predict** which gradient is zero in the first step.
''')
code(r'''
model, tokenizer = load(MODEL)
ids = tokenizer("Where is my order 482193? It was due at 8.", return_tensors="pt")["input_ids"]
before = model(ids).logits
names = add_lora(model, ATTENTION + MLP, R, LORA_ALPHA)
out = model(ids, labels=ids)
out.loss.backward()
grad = {kind: max(p.grad.abs().max().item() for n, p in model.named_parameters() if n.endswith(kind))
        for kind in ("lora_A", "lora_B")}
frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
print(f"{len(names)} layers adapted; largest difference of a logit {(out.logits - before).abs().max().item()}\n"
      f"largest gradient: lora_A {grad['lora_A']}, lora_B {grad['lora_B']:.3g}; frozen with a gradient: {len(frozen)}")
assert torch.equal(out.logits, before) and grad["lora_A"] == 0 < grad["lora_B"] and not frozen
''')
md(r'''
Difference 0.0, and only $B$ moves in the first step (C06 holds). Were both zero, neither would ever move; were both random, the model would be damaged before it has learned anything (section 10 does it).

## 3 · Equal to PEFT

Our layer and PEFT's, same weights, same input, moved off their start. One table, each entry the largest difference, in float64. `use_rslora` replaces $\alpha/r$ by $\alpha/\sqrt r$; `use_dora` is another layer, explained below; dropout draws the same mask in both.
''')
code(r'''
def against_peft(lora_dropout=0.0, **flags):
    """Largest |ours - PEFT| for one layer: forward, both gradients, A and B after an AdamW step, merged, unmerged."""
    base = nn.Sequential(OrderedDict(up_proj=nn.Linear(24, 40, dtype=torch.float64)))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"], lora_dropout=lora_dropout, **flags)
    theirs, ours = get_peft_model(copy.deepcopy(base), config), copy.deepcopy(base)
    x = torch.randn(16, 24, dtype=torch.float64)
    nn.init.normal_(theirs.base_model.model.up_proj.lora_B["default"].weight)
    add_lora(ours, ["up_proj"], 4, 8, lora_dropout, **flags)
    load_lora_state_dict(ours, get_peft_model_state_dict(theirs))
    seen = []
    for model, layer in ((ours, ours.up_proj), (theirs, theirs.base_model.model.up_proj)):
        torch.manual_seed(1)  # the same dropout mask
        h = model.train()(x)
        h.square().mean().backward()
        a, b = (p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
        parts = {"forward": h, "grad lora_A": a.grad, "grad lora_B": b.grad, "A after AdamW": a, "B after AdamW": b}
        layer.merge()
        parts["merged weight"] = layer.base_layer.weight.clone()
        layer.unmerge()
        parts["unmerged weight"] = layer.base_layer.weight
        seen.append(parts)
    for name in seen[0]:
        torch.testing.assert_close(seen[0][name], seen[1][name])
    return {name: (seen[0][name] - seen[1][name]).abs().max().item() for name in seen[0]}

table = pd.DataFrame({"LoRA": against_peft(), "rsLoRA": against_peft(use_rslora=True),
                      "dropout 0.3": against_peft(lora_dropout=0.3), "DoRA": against_peft(use_dora=True)})
assert table.max().max() < 1e-12
table.style.format("{:.0e}")
''')
md(r'''
What remains is the order of additions in float64. `tests/parity/test_lora.py` repeats it over random shapes, seeds and dtypes.

**DoRA** takes the update for the *direction* of each row of the weight only, and trains the row's length $m$ by itself: $W' = m\,V/\lVert V\rVert$ with $V = W_0 + \frac{\alpha}{r} BA$. **Predict:** $W_0 = (3, 4)$, and an adapter that adds $(3, 4)$ once more. What do LoRA and DoRA make of it?
''')
code(r'''
for kind in (LoRALinear, DoRALinear):
    layer = kind(nn.Linear(2, 1, bias=False), r=1, lora_alpha=1)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.lora_A.copy_(torch.tensor([[3.0, 4.0]])), layer.lora_B.fill_(1.0)
        if kind is DoRALinear:
            layer.lora_magnitude_vector.fill_(5.0)  # the length of (3, 4), as at the start
        print(f"{kind.__name__}: the row is now", layer(torch.eye(2)).T.tolist())
''', check=True)
md(r'''
LoRA doubles the row; DoRA leaves it, since nothing but its length was to change.

### The same adapter file

An adapter is two tensors a layer, under agreed names. PEFT writes, we read; we write, PEFT reads. `lora_alpha` is **not** among the tensors: it stands in `adapter_config.json` beside them (section 10 forgets it).
''')
code(r'''
folder = Path(tempfile.mkdtemp(prefix="lora-"))
config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules=ATTENTION + MLP, task_type="CAUSAL_LM")
theirs = get_peft_model(load(MODEL)[0], config).eval()
for name, parameter in theirs.named_parameters():
    if "lora_B" in name:
        nn.init.normal_(parameter, std=0.02)
theirs.save_pretrained(folder / "peft")

ours = load(MODEL)[0]
add_lora(ours, ATTENTION + MLP, R, LORA_ALPHA)
load_lora_state_dict(ours, load_file(folder / "peft" / "adapter_model.safetensors"))
mine, their_state = lora_state_dict(ours), get_peft_model_state_dict(theirs)
with torch.no_grad():
    difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    moved = (ours(ids).logits - before).abs().max().item()
print(f"{len(mine)} tensors, such as {next(iter(mine))}\n"
      f"logits moved by {moved:.2f}; ours and PEFT's differ by {difference:.0e}")
assert mine.keys() == their_state.keys() and all(torch.equal(mine[name], their_state[name]) for name in mine)
assert difference < 1e-4
''')
md(r'''
### What the libraries do besides

Defaults differ from the paper, from the article and from each other. **Predict:** which layers does PEFT adapt in a Llama if you name none?
''')
code(r'''
peft_, trl_ = LoraConfig(), ModelConfig()
defaults = pd.DataFrame({
    "PEFT LoraConfig()": [peft_.r, peft_.lora_alpha, peft_.lora_dropout, PEFT_TARGETS["llama"]],
    "TRL ModelConfig()": [trl_.lora_r, trl_.lora_alpha, trl_.lora_dropout, trl_.lora_target_modules or "PEFT's"],
    "the article": ["8 to 64", "2 r", "0.05 to 0.1", ["q_proj", "v_proj", "k_proj", "o_proj"]],
}, index=["r", "lora_alpha", "lora_dropout", "target_modules"])
on_bf16 = get_peft_model(load(MODEL, dtype=torch.bfloat16)[0], LoraConfig(target_modules=ATTENTION))
kinds = {trains: {str(p.dtype) for p in on_bf16.parameters() if p.requires_grad == trains} for trains in (True, False)}
print("PEFT on a bf16 base: adapter in", *kinds[True], "| base in", *kinds[False])
versions = training.environment()["versions"]
print({name: versions.get(name) for name in ("torch", "transformers", "peft", "trl", "unsloth")})
defaults
''')
md(r'''
"Alpha is usually 2 r" (C13) is one convention among several: PEFT's default is $\alpha = r$, TRL's command line has 2 r, the LoRA paper sets $\alpha$ to the first $r$ it tries and leaves it (section 4.1), Thinking Machines use 32 for every $r$, QLoRA is quoted with $r = 64$, $\alpha = 16$. And PEFT's default targets are the 2021 ones, q and v: section 7 shows why you should name all linear layers.
Two more habits: PEFT initialises $A$ from a uniform distribution where the paper says Gaussian, and it unmerges by *subtracting* the update again, so the base comes back up to rounding; ours keeps $W_0$ and gives it back bit by bit.

## 4 · Counting

$r(\text{in} + \text{out})$ for each adapted matrix, nothing else. Below, 14 architectures; the article says 0.1 % of the parameters (C04), 100 to 1000 times fewer (C07), 0.1 to 1 % (C31). **Predict** which models break which claim.
''')
code(r'''
architectures = {a["name"]: a for a in json.loads((DATA / "architectures" / "architectures.json").read_text())}
SETTINGS = {"q,v r8": (8, ["q_proj", "v_proj"]), "attention r16": (16, ATTENTION),
            "all r16": (16, ATTENTION + MLP), "all r64": (64, ATTENTION + MLP)}
rows = {}
for name, a in architectures.items():
    counts = {setting: trainable_parameters(a, *how) for setting, how in SETTINGS.items()}
    total = total_parameters(a)
    assert total == a["total_params"]
    rows[name] = {"total": total, **counts, "all r16, %": 100 * counts["all r16"] / total,
                  "all r64, %": 100 * counts["all r64"] / total,
                  "1 in, q,v r8": total / counts["q,v r8"], "1 in, all r16": total / counts["all r16"]}
counted = pd.DataFrame(rows).T
counted.style.format("{:,.0f}").format("{:.2f}", subset=["all r16, %", "all r64, %"])
''')
md(r'''
All from the shapes, no model loaded. Is it what PEFT would train? Build two of them for real, on torch's *meta* device (shapes without memory), and let PEFT count. (`tests/parity/test_lora.py` does all fourteen.)
''')
code(r'''
def peft_count(architecture, r, target_modules):
    """(trainable, all) as PEFT counts them on a model without memory."""
    keys = {k: v for k, v in architecture.items() if k not in ("name", "qk_norm", "total_params")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
        peft_model = get_peft_model(model, LoraConfig(r=r, target_modules=target_modules), low_cpu_mem_usage=True)
    return peft_model.get_nb_trainable_parameters()

for name, wanted in (("Llama-3-8B", 41_943_040), ("Qwen3-0.6B", 10_092_544)):
    trainable, everything = peft_count(architectures[name], 16, "all-linear")
    ours = trainable_parameters(architectures[name], 16, ATTENTION + MLP)
    total = total_parameters(architectures[name])
    print(f"{name}: PEFT {trainable:,} of {everything - trainable:,} | ours {ours:,} of {total:,}")
    assert trainable == ours == wanted and everything - trainable == total
''', check=True)
md(r'''
**Verdicts.** C04, "0.1 %": depends on rank, targets and size. Llama-2-7B has 0.06 % with q,v and $r = 8$, 0.59 % with all linear layers and $r = 16$; SmolLM2-135M has 3.63 %. C31, "0.1 to 1 %": right for 7B to 70B up to $r = 16$; all-linear $r = 64$ on a 7B is 2.37 %. C07, "100 to 1000 times fewer": the same 7B has 1,607 times fewer, or 169, or with $r = 64$ about 42. The famous *10,000 times* of the abstract is GPT-3 with q and v and $r = 4$.
''')
code(r'''
total = total_parameters(architectures["Llama-2-7B"])
for setting in ("q,v r8", "all r16", "all r64"):
    count = trainable_parameters(architectures["Llama-2-7B"], *SETTINGS[setting])
    print(f"Llama-2-7B, {setting}: {count / total:.2%}, 1 in {total / count:,.0f}")
gpt3 = 2 * 96 * 4 * (12288 + 12288)
print(f"GPT-3, q,v r4: 2 x 96 x 4 x (12288 + 12288) = {gpt3:,}, 1 in {175_255.8e6 / gpt3:,.0f} of the paper's 175,255.8 M")
''', check=True)
md(r'''
## 5 · What it costs, and what it does not save

### Speed: "2 to 5 times faster" (C20, C26)

A training step of one linear layer is three products: forward, gradient of $x$, gradient of $W$. LoRA leaves out the third and adds three thin ones: $(2n^2 + 6nr)/3n^2$. So the gain is **below 3/2 whatever you do**. **Predict** the ratio for $n = 4096$, $r = 16$, then see what torch counts and what the clock says.
''')
code(r'''
def median_ms(calls, repeats):
    """Median milliseconds of each call; the calls take turns, so that a busy moment of the machine hits all of them."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}

def training_step(layers, x):
    """A function that does one training step of these layers on x."""
    optimizer = torch.optim.AdamW([p for p in layers.parameters() if p.requires_grad], lr=1e-5)
    def step():
        layers(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step

n = 1536
x = torch.randn(512, n, requires_grad=True)
stacks = {"full": nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(3))),
          "LoRA": nn.Sequential(*(LoRALinear(nn.Linear(n, n, bias=False), R, LORA_ALPHA) for _ in range(3)))}
steps = {name: training_step(layers, x) for name, layers in stacks.items()}
flops = {}
for name, step in steps.items():
    with FlopCounterMode(display=False) as counter:
        step()
    flops[name] = counter.get_total_flops()
ms = median_ms(steps, 5)
print("formula, n = 4096:", {f"r={r}": round(lora_flops_ratio(4096, r), 3) for r in (16, 64, 256)})
print(f"n = {n}, r = {R}: formula {lora_flops_ratio(n, R):.3f} | torch counts {flops['LoRA'] / flops['full']:.3f} | "
      f"clock {ms['LoRA'] / ms['full']:.2f} ({ms['full']:.0f} -> {ms['LoRA']:.0f} ms a step, AdamW included)")
assert abs(flops["LoRA"] / flops["full"] - lora_flops_ratio(n, R)) < 1e-3
''')
md(r'''
That was the best case: large square matrices. Now a whole model, where small products, norms and attention count too.
''')
code(r'''
def to_batches(rows, tokenizer, size=8):
    """Batches {"input_ids", "labels"} (B, T): answers count, -100 does not; padding on the right, which no token sees."""
    rendered = [data.render(row, tokenizer) for row in rows]
    ids = [torch.tensor(r.input_ids) for r in rendered]
    labels = [i.where(torch.tensor(r.completion_mask) == 1, -100) for i, r in zip(ids, rendered)]
    return [{"input_ids": pad_sequence(ids[at : at + size], batch_first=True),
             "labels": pad_sequence(labels[at : at + size], batch_first=True, padding_value=-100)}
            for at in range(0, len(rows), size)]

def short_tickets(split, tokenizer, longest):
    """Tickets of at most so many tokens, the answer included; without the system message."""
    rows = [{**row, "prompt": row["prompt"][1:]} for row in data.triage_rows(DATA / "triage" / f"{split}.jsonl")]
    return [row for row in rows if len(data.render(row, tokenizer).input_ids) <= longest]

tickets = to_batches(short_tickets("train", tokenizer, 96)[: 8 * STEPS], tokenizer)
held_out = to_batches(short_tickets("test", tokenizer, 128), tokenizer, 16)
models = {"full": load(MODEL)[0].train(), "LoRA": load(MODEL)[0].train()}
add_lora(models["LoRA"], ATTENTION + MLP, R, LORA_ALPHA)

def model_step(model, batch):
    """A function that does one training step of a language model on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step.optimizer = optimizer
    return step

steps = {name: model_step(model, tickets[0]) for name, model in models.items()}
ms = median_ms(steps, 9)
mb = {name: sum(t.nbytes for state in step.optimizer.state.values() for t in state.values()) / 1e6
      for name, step in steps.items()}
print(f"{tuple(tickets[0]['input_ids'].shape)} tokens: full {ms['full']:.0f} ms, LoRA {ms['LoRA']:.0f} ms a step: "
      f"LoRA takes {ms['LoRA'] / ms['full']:.2f} of the time")
print(f"optimizer state: full {mb['full']:.1f} MB, LoRA {mb['LoRA']:.2f} MB, {mb['full'] / mb['LoRA']:.0f} times less")
assert ms["full"] / ms["LoRA"] < 2, "the claimed lower end"
''')
md(r'''
**Verdict on C20 and C26: wrong.** The bound is 1.5, and small layers give some of it back. The published measurements say the same: the LoRA paper reports 43.1 instead of 32.5 tokens/s on GPT-3 (its footnote 5; the text calls it a 25 % speedup); Biderman et al. find LoRA about 15 % *slower* on Llama-2-7B (section 4.7). More is possible only indirectly: the memory that LoRA frees may spare you offloading, or let you use a larger batch.

### Memory: "100 times less" (C27, C12, C18, C19, C22)

Count bytes per parameter. Full fine-tuning in mixed precision with Adam: weight 2 + gradient 2 + fp32 master 4 + two moments 8 = **16**. LoRA: the frozen base at **2**, and 16 for the few parameters of the adapter (fp32 weight 4, gradient 4, moments 8). **Predict** the ratio for a 7B. No activations here: notebook 03 has the whole calculator, by phase.
''')
code(r'''
memory = pd.DataFrame({name: {
    "weights bf16, GB": 2 * total_parameters(a) / 1e9,
    "full, GB": 16 * total_parameters(a) / 1e9,
    **{f"adapter r{r}, GB": 16 * trainable_parameters(a, r, ATTENTION + MLP) / 1e9 for r in (8, 16, 64, 256)},
    "LoRA r16, GB": (2 * total_parameters(a) + 16 * trainable_parameters(a, 16, ATTENTION + MLP)) / 1e9,
} for name, a in architectures.items() if total_parameters(a) > 6.7e9 and "coder" not in name}).T
memory["full / LoRA"] = memory["full, GB"] / memory["LoRA r16, GB"]
assert memory["full / LoRA"].round(1).between(7.6, 7.8).all()
memory.round(2)
''', check=True)
md(r'''
**Verdicts.** C27, "100 times less memory": wrong. 7.6 to 7.8 times by accounting (the base itself does not shrink), and less at the peak, where activations join in; the paper says 3 times for GPT-3 (section 4.2). 100 times is right for the *trainable parameters* and for the *file*. C12, "higher rank needs more memory": true and small, 2.56 GB at $r = 64$ beside 13.48 GB of frozen weights. C18, a 7B on a 24 GB card: holds, 14.12 GB leave room for activations if the batch is small. C19, "instead of 4 A100s": 107.81 GB are two cards of 80 GB, tightly, or four of 40 GB. C22, "14+ GB for the full model": holds for these 7B and 8B models, 13.48 to 16.06 GB.

### The file (C21)
''')
code(r'''
theirs.save_pretrained(folder / "peft")
size = (folder / "peft" / "adapter_model.safetensors").stat().st_size
trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
print(f"micro r{R}: {trainable:,} parameters x 4 bytes = {4 * trainable:,}; on disk {size:,}, "
      f"of which names and shapes {size - 4 * trainable:,}")
assert 0 < size - 4 * trainable < 20_000
kinds = SETTINGS | {"all r256": (256, ATTENTION + MLP)}
some = {name: architectures[name] for name in ("SmolLM2-135M", "Llama-2-7B", "Llama-3-8B", "Llama-2-70B")}
files = pd.DataFrame({name: {setting: 2 * trainable_parameters(a, *how) / 1e6 for setting, how in kinds.items()}
                      | {"the model": 2 * total_parameters(a) / 1e6} for name, a in some.items()}).T.rename_axis("MB in bf16")
files.style.format("{:,.0f}")
''')
md(r'''
C21, "10 to 100 MB": for a 7B in bf16 from 8 MB (q,v, $r = 8$) through 80 MB (all, $r = 16$) to 320 MB (all, $r = 64$); saved in fp32, as PEFT does after training, twice that.

## 6 · How much of a *real* update does rank r keep?

The bet of section 1, tested. First train all linear layers of `micro` **fully**, without LoRA, on short support tickets (JSON out; embeddings and norms frozen, so that the update is these 28 matrices and nothing else). Then look at the singular values of what changed.
''')
code(r'''
def fit(model, batches, learning_rate, steps):
    """The loss of each step, nats/token. AdamW without weight decay, 5 steps of warm-up, then linear to 0."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / 5, (steps - step) / (steps - 5))
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses

@torch.no_grad()
def loss_on(model, batches):
    """Nats per scored token over all batches."""
    scored = [(b["labels"][:, 1:] != -100).sum().item() for b in batches]
    return sum(model(**b).loss.item() * n for b, n in zip(batches, scored)) / sum(scored)

tuned, base = load(MODEL)[0], load(MODEL)[0]
linear = {n: module for n, module in tuned.named_modules() if isinstance(module, nn.Linear) and n != "lm_head"}
tuned.requires_grad_(False)
for module in linear.values():
    module.requires_grad_(True)
full_losses = fit(tuned, tickets, FULL_LEARNING_RATE, STEPS)
updates = {name: (module.weight - base.get_submodule(name).weight).detach() for name, module in linear.items()}
relative = [(update.norm() / base.get_submodule(name).weight.norm()).item() for name, update in updates.items()]
print(f"{len(updates)} updates, {min(relative):.1%} to {max(relative):.1%} as long as their W0; "
      f"held-out loss {loss_on(base, held_out):.3f} -> {loss_on(tuned, held_out):.3f} nats/token")
''')
md(r'''
One of them, drawn, and beside it what rank $r$ keeps of all of them. For comparison, random matrices of the same shapes, which have no structure that a low rank could use. **Predict:** is the real update nearer to rank 4 or to random?
''')
code(r'''
ranks = [1, 2, 4, 8, 16, 32, 64, 128]
def kept_by_rank(matrices, ranks):
    """Share kept, one row a rank, one column a matrix."""
    return pd.DataFrame({name: [rank_kept(matrix, r) for r in ranks] for name, matrix in matrices.items()}, index=ranks)

kept = kept_by_rank(updates, ranks)
random_kept = kept_by_rank({name: torch.randn_like(update) for name, update in updates.items()}, ranks)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
plot_singular_values(left, updates["model.layers.2.mlp.up_proj"], R).set_title("layer 2, up_proj", fontsize=10)
right.plot(ranks, kept, color=show.POLICY, alpha=0.25)
right.plot(ranks, kept.mean(axis=1), "o-", color=show.POLICY, label="28 real updates, and their mean")
right.plot(ranks, random_kept.mean(axis=1), "--", color=show.REFERENCE, label="random matrices")
right.set(xscale="log", xticks=ranks, xticklabels=ranks, xlabel="rank r", ylabel="share of squared length kept", ylim=(0, 1.02))
right.legend()
assert (kept.mean(axis=1) > random_kept.mean(axis=1)).all()
pd.DataFrame({"real": kept.mean(axis=1), "random": random_kept.mean(axis=1)}).T
''')
md(r'''
Move the slider. The cost in parameters and megabytes is shown for the layer and, at the same rank, for all of Llama-3-8B. Without a slider, the same is one line: `rank_kept(updates[name], r)` and `trainable_parameters(architecture, r, ATTENTION + MLP)`.
''')
code(r'''
rank_explorer(updates, architectures["Llama-3-8B"], r=R)
''')
md(r'''
Squared length is only a ruler. What counts is the function: cut every update to rank $r$, add it to $W_0$, measure the held-out loss. **Predict:** at which $r$ does the truncated model do what the fully tuned one does?
''')
code(r'''
@torch.no_grad()
def truncated(base, updates, r):
    """The base model plus the best rank-r approximation of each update."""
    model = copy.deepcopy(base)
    for name, update in updates.items():
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        model.get_submodule(name).weight += u[:, :r] * s[:r] @ v[:r]
    return model

by_rank = {r: loss_on(truncated(base, updates, r), held_out) for r in (0, 1, 2, 4, 8, 16, 64)}
figure, ax = plt.subplots()
ax.plot([str(r) for r in by_rank], by_rank.values(), "o-", color=show.POLICY, label="update cut to rank r")
ax.axhline(loss_on(tuned, held_out), color=show.REFERENCE, linestyle="--", label="the whole update")
ax.set(xlabel="rank r", ylabel="held-out loss (nats/token)", ylim=(0, None))
ax.legend()
print({r: round(loss, 3) for r, loss in by_rank.items()}, "whole:", round(loss_on(tuned, held_out), 3))
''')
md(r'''
TRUNCATION_SAW

## 7 · What r, target modules, alpha and dropout do

Now LoRA itself, against full fine-tuning. A fair comparison needs the learning rate tuned *for each arm*, and several seeds. That is SWEEPRUNS training runs of `micro`, about SWEEPMINUTES minutes, so they were made once by `data/results/lora_sweep.py`; this notebook reads their results. Two tasks: **triage**, where the answer can be worked out from the ticket, scored on held-out tickets; and **codes**, 128 random numbers that nothing but memory can hold (chance is ln 10 = 2.303 nats a digit). **Predict:** on which of the two does rank matter?
''')
code(r'''
sweep = json.loads((DATA / "results" / "lora_sweep.json").read_text())
runs = pd.DataFrame([{"task": arm["task"], "arm": arm["name"], "loss": run.get("test", run["validation"]), **run}
                     for arm in sweep["arms"] for run in arm["runs"]])
by_arm = runs.groupby(["task", "arm"])
shapes = ["r=1", "r=4", "r=16", "r=64", "full"]

figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for ax, task, ylabel in zip(axes, ("triage", "codes"), ("held-out loss (nats/token)", "loss on the codes (nats/digit)")):
    for i, arm in enumerate(shapes):
        losses = by_arm.get_group((task, arm))["loss"]
        colour = show.REFERENCE if arm == "full" else show.POLICY
        ax.errorbar(i, losses.mean(), losses.std(), fmt="o", color=colour, capsize=4)
    ax.set(xticks=range(5), xticklabels=shapes, ylabel=ylabel, ylim=(0, None), title=f"{task}: mean and sd of 4 seeds")
axes[1].axhline(2.303, color=show.REFERENCE, linewidth=0.8)
table = pd.concat([by_arm[["parameters", "learning_rate"]].first(), by_arm["loss"].agg(["mean", "std"])], axis=1)
table = table.loc[[(task, arm) for task in ("triage", "codes") for arm in shapes]]
untrained = pd.Series({"triage": sweep["base"]["triage"]["test"], "codes": 2.303})  # codes: knowing only that digits come
gain = untrained[table.index.get_level_values("task")].values - table["mean"]
table["share of full's gain"] = gain / gain.xs("full", level="arm")[table.index.get_level_values("task")].values
table
''')
md(r'''
RANK_SAW

### Attention or MLP (C15, C16)

The article names the attention layers. Give both sides the *same* number of parameters: $r = 45$ on q, k, v, o and $r = 28$ on gate, up, down are 322,560 each on `micro`. All linear layers with $r = 16$ have 299,008. **Predict** the order.
''')
code(r'''
some = runs[runs["arm"].isin(["attention, r=45", "MLP, r=28", "r=16"]) & runs["task"].isin(["triage", "codes"])]
targets = some.pivot_table(index=["task", "arm", "parameters", "learning_rate"], columns="seed", values="loss")
assert set(some.loc[some["arm"] != "r=16", "parameters"]) == {322_560}
targets.assign(mean=targets.mean(axis=1), sd=targets.std(axis=1))
''')
md(r'''
TARGET_SAW

### Alpha (C13, C14)

$\alpha$ multiplies the update; the learning rate multiplies each step of it. How different are the two? Under Adam, which divides each gradient by its own size: divide $\alpha$ by 4, let $B$ learn 4 times as fast, and $\frac{\alpha}{r} B$ is the same at every step. (Adam's $\varepsilon$ must be next to 0, weight decay 0, and no clipping: those know about sizes.) **Predict:** how near are the two curves?
''')
code(r'''
def alpha_run(model, batches, learning_rate, b_faster):
    """The loss of one step a batch, lora_B learning b_faster times as fast as lora_A."""
    groups = [{"params": [p for n, p in model.named_parameters() if n.endswith(kind)], "lr": learning_rate * factor}
              for kind, factor in (("lora_A", 1), ("lora_B", b_faster))]
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses

curves = {}
for name, lora_alpha, b_faster in (("alpha 32", 32, 1), ("alpha 8, B four times as fast", 8, 4), ("alpha 8", 8, 1)):
    torch.manual_seed(0)  # the same A
    model = load(MODEL)[0]
    add_lora(model, ATTENTION + MLP, R, lora_alpha)
    curves[name] = alpha_run(model, tickets[:10], LEARNING_RATE, b_faster)
figure, ax = plt.subplots()
ax.plot(curves["alpha 32"], color=show.POLICY, linewidth=4, alpha=0.5, label="alpha 32")
ax.plot(curves["alpha 8, B four times as fast"], ".", color=show.LIBRARY, label="alpha 8, B four times as fast")
ax.plot(curves["alpha 8"], color=show.REJECTED, label="alpha 8")
ax.set(xlabel="step", ylabel="loss (nats/token)")
ax.legend()
first, second, third = (torch.tensor(losses) for losses in curves.values())
difference = (first - second).abs().max().item()
print(f"largest difference of the first two: {difference}; of the first and the third: {(first - third).abs().max():.2f}")
assert difference < 1e-5
''')
md(r'''
The same curve: $\alpha$ is a second knob for the learning rate of $B$, which is what the LoRA paper says too (section 4.1). So "alpha controls the influence" (C14) is true at a *fixed* learning rate, and nearly empty once the rate is tuned. The sweep shows both: read a column (fixed alpha, the rate moves) and a row (fixed rate, alpha moves).
''')
code(r'''
alphas = {"r=16, alpha=8": "alpha 8", "r=16": "alpha 32", "r=16, alpha=128": "alpha 128"}
searched = pd.DataFrame([{"learning rate": run["learning_rate"], "arm": alphas[arm["name"]], "loss": run["validation"]}
                         for arm in sweep["arms"] if arm["task"] == "triage" and arm["name"] in alphas
                         for run in arm["search"]])
display(searched.pivot_table(index="learning rate", columns="arm", values="loss")[list(alphas.values())])
by_arm.agg({"learning_rate": "first", "loss": ["mean", "std"]}).loc[[("triage", arm) for arm in alphas]]
''')
md(r'''
ALPHA_SAW

### Dropout (C17)

"0.05 to 0.1 prevents overfitting on small datasets." So give it a small dataset: 32 tickets over and over, $r = 64$; and the ordinary one. Mean over four seeds, the rate tuned for each arm.
''')
code(r'''
wanted = [("triage", "r=16"), ("triage", "r=16, dropout=0.1"), ("small", "r=64"), ("small", "r=64, dropout=0.1")]
by_arm[["train", "loss"]].agg(["mean", "std"]).loc[wanted]
''')
md(r'''
DROPOUT_SAW

## 8 · Serving: merged, unmerged, many adapters

### Merged costs nothing, unmerged costs something (C10)

Train an adapter, then serve it both ways. **Predict** two things: the time of one forward pass, merged against unmerged; and whether the logits agree.
''')
code(r'''
adapted = load(MODEL)[0]
add_lora(adapted, ATTENTION + MLP, R, LORA_ALPHA)
lora_losses = fit(adapted, tickets, LEARNING_RATE, STEPS)
merged = copy.deepcopy(adapted)
merge_lora(merged)
batch = {"input_ids": held_out[0]["input_ids"][:4, :64]}
with torch.inference_mode():
    ms = median_ms({"base": lambda: base(**batch), "unmerged": lambda: adapted(**batch), "merged": lambda: merged(**batch)}, 30)
    fp32 = (merged(**batch).logits - adapted(**batch).logits).abs().max().item()
    in_bf16 = [copy.deepcopy(m).to(torch.bfloat16)(**batch).logits.float() for m in (merged, adapted)]
bf16_difference = (in_bf16[0] - in_bf16[1]).abs().max().item()
print("forward pass, ms:", {name: round(value, 1) for name, value in ms.items()},
      f"| unmerged / merged {ms['unmerged'] / ms['merged']:.2f}, merged / base {ms['merged'] / ms['base']:.2f}")
print(f"largest difference of a logit, merged and unmerged: fp32 {fp32:.0e}, bf16 {bf16_difference:.2f}")
print(f"multiplications that the adapter adds: {R * (256 + 256) / 256**2:.1%} here, {R * 8192 / 4096**2:.1%} for 4096 x 4096")
assert fp32 < 1e-3 < bf16_difference and ms["unmerged"] > ms["merged"]
''')
md(r'''
Merged, the model has the base's shape and therefore the base's speed: C10's "zero additional latency" holds **when merged, into a base of the same precision**. In bf16 merging rounds the sum, and the logits move visibly; into a 4-bit base it would lose most of the update (notebook 03). Unmerged, 28 pairs of thin products run beside the base: on a model as small as this that is a good part of the time; on a wide one the multiplications hardly count, but two more small operations a layer do. And the article promises both zero latency *and* many adapters on one base: not at the same moment, a merged base belongs to one adapter.

### Many adapters on one base (C23)

A second adapter, for another job: sixteen secret codes. Swap by copying two tensors a layer; batch by row with `batched_lora`, which does *one* product with the base for all rows and a thin one per row. **Predict** the 2 x 2 table of losses.
''')
code(r'''
numbers, codes = torch.randperm(1000)[:16].tolist(), torch.randint(10**4, (16,)).tolist()
texts = [tokenizer(f"Order {n:03d} is {c:04d}", return_tensors="pt")["input_ids"] for n, c in zip(numbers, codes)]
texts = torch.cat(texts)
secret = [{"input_ids": texts, "labels": texts.where(torch.arange(texts.shape[1]) >= texts.shape[1] - 4, -100)}]
jobs = {"tickets": held_out, "codes": secret}
adapters = {"tickets": lora_state_dict(adapted)}
torch.manual_seed(1)
other = load(MODEL)[0]
add_lora(other, ATTENTION + MLP, R, LORA_ALPHA)
fit(other, secret, LEARNING_RATE, 100)
adapters["codes"] = lora_state_dict(other)

served, table, swap_ms = other, {}, []
for name, adapter in adapters.items():
    start = time.perf_counter()
    load_lora_state_dict(served, adapter)
    swap_ms.append(1e3 * (time.perf_counter() - start))
    table[f"adapter {name}"] = {f"loss on {job}": loss_on(served, batches) for job, batches in jobs.items()}
table["base"] = {f"loss on {job}": loss_on(base, batches) for job, batches in jobs.items()}
print(f"a swap takes {max(swap_ms):.1f} ms")
pd.DataFrame(table).T
''')
code(r'''
layer = adapted.model.layers[0].mlp.up_proj
pair = [layer, other.model.layers[0].mlp.up_proj]          # two adapters; their base layers hold the same W0
x, rows = torch.randn(4, 10, layer.base_layer.in_features), torch.tensor([0, 1, 1, 0])
with torch.no_grad():
    separate = torch.stack([pair[row](x[i]) for i, row in enumerate(rows)])
    mixed = batched_lora(x, layer.base_layer, pair, rows)
    apart = (pair[0](x) - pair[1](x)).abs().max()
print(f"four rows, adapters {rows.tolist()}: mixed batch and separate runs differ by {(mixed - separate).abs().max():.0e}, "
      f"the adapters themselves by {apart:.2f}")
torch.testing.assert_close(mixed, separate, rtol=1e-5, atol=1e-5)
''')
md(r'''
C23 holds, *unmerged*: this is what S-LoRA and Punica do on GPUs for thousands of adapters. `tests/parity/test_lora.py` holds the mixed batch against PEFT's own `adapter_names`.

## 9 · Forgetting (C28, C29, C30)

"No catastrophic forgetting, since the original weights are frozen." The *weights* are. The *function* is $W_0 x + \frac{\alpha}{r} B A x$. `micro` was pretrained on passages of Python's manual; measure its loss on them with the ticket adapter on, and off. **Predict** both.
''')
code(r'''
passages = [json.loads(line)["text"] for line in (DATA / "general" / "text.jsonl").open(encoding="utf-8")][:16]
read = [tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in passages]
manual = [{"input_ids": text, "labels": text} for text in read]
peft_config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules=ATTENTION + MLP)
theirs = get_peft_model(load(MODEL)[0], peft_config).eval()
for name, parameter in theirs.named_parameters():
    if "lora_" in name:
        parameter.data.copy_(adapters["tickets"][name.replace(".default", "")])
on = loss_on(theirs, manual)
with theirs.disable_adapter():
    off = loss_on(theirs, manual)
    same_bits = torch.equal(theirs(ids).logits, before)
print(f"loss on the manual, nats/token: base {loss_on(base, manual):.3f} | adapter on {on:.3f} | off {off:.3f}; "
      f"off is the base model to the bit: {same_bits}")
assert same_bits and on > off + 0.01
''')
md(r'''
C28 is **wrong as stated**: frozen weights are not a frozen function. What *is* true: the adapter can be taken off, and then nothing was ever lost.

Does LoRA at least forget *less* than full fine-tuning, as Biderman et al. found ("LoRA learns less and forgets less")? From the sweep: same tickets, same number of steps, four seeds, and two learning rates an arm: the one that was best **for the task**, and a gentler one, joined by a line. Nobody looked at the manual when they were chosen. Further up is more forgotten, further left is better learned. **Predict** the order of the arms from bottom to top.
''')
code(r'''
colours = dict(zip(shapes, [*plt.cm.viridis([0.85, 0.65, 0.4, 0.15]), show.REJECTED]))
figure, ax = plt.subplots(figsize=(6, 3.6))
for arm in shapes:
    pair = runs[(runs["task"] == "triage") & runs["arm"].isin([f"{arm}, gentle", arm])].groupby("learning_rate")
    mean, sd = pair[["loss", "text"]].mean(), pair[["loss", "text"]].std()
    ax.errorbar(mean["loss"], mean["text"], sd["text"], sd["loss"], fmt="s-" if arm == "full" else "o-",
                color=colours[arm], capsize=2, linewidth=1, label=arm)
ax.axhline(sweep["base"]["triage"]["text"], color=show.REFERENCE, linestyle="--", linewidth=0.8, label="before")
ax.set(xlabel="learned: held-out loss on tickets (nats/token)", ylabel="forgotten: loss on the manual")
ax.legend(fontsize=8)
both = [("triage", arm + suffix) for arm in shapes for suffix in (", gentle", "")]
by_arm.agg({"learning_rate": "first", "loss": ["mean", "std"], "text": ["mean", "std"], "facts": ["mean", "std"]}).loc[both]
''')
md(r'''
FORGET_SAW

## 10 · Break it

**The learning rate x 30.** **Predict** the shape of the curve.
''')
code(r'''
torch.manual_seed(0)
broken = load(MODEL)[0]
add_lora(broken, ATTENTION + MLP, R, LORA_ALPHA)
too_fast = fit(broken, tickets, 30 * LEARNING_RATE, 30)
figure, ax = plt.subplots()
series = {f"rate {LEARNING_RATE:g}": lora_losses[:30], f"rate {30 * LEARNING_RATE:g}": too_fast}
show.plot_curves(ax, range(30), series, "loss (nats/token)")
print(f"after 30 steps: {lora_losses[29]:.2f} and {too_fast[-1]:.2f} nats/token; "
      f"loss on the manual: base {loss_on(base, manual):.1f}, the fast one {loss_on(broken, manual):.1f}")
assert too_fast[-1] > 2 * lora_losses[29]
''')
md(r'''
**B not zero at the start**, and **the scale forgotten**: an adapter trained with alpha = 32 is loaded with other values, as happens when only the tensors travel and `adapter_config.json` stays behind. Nothing raises. **Predict** which error is the worse one.
''')
code(r'''
torch.manual_seed(0)
random_b = load(MODEL)[0]
add_lora(random_b, ATTENTION + MLP, R, LORA_ALPHA)
for module in random_b.modules():
    if isinstance(module, LoRALinear):
        nn.init.kaiming_uniform_(module.lora_B, a=5**0.5)
print(f"step 0, nats/token on tickets: base {loss_on(base, held_out):.2f}, B random {loss_on(random_b, held_out):.2f}; "
      f"on the manual: base {loss_on(base, manual):.2f}, B random {loss_on(random_b, manual):.2f}")

loaded = {}
for lora_alpha in (8, 16, 32, 64, 128):
    model = load(MODEL)[0]
    add_lora(model, ATTENTION + MLP, R, lora_alpha)
    load_lora_state_dict(model, adapters["tickets"])
    loaded[lora_alpha] = round(loss_on(model, held_out), 3)
print("trained with alpha 32, loaded with alpha:", loaded)
assert min(loaded, key=loaded.get) in (16, 32, 64) and loaded[128] > 1.5 * loaded[32]
''')
md(r'''
BREAK_SAW

## 11 · Exercises

They run as shipped, because each starts from the answer. Replace the right-hand side by your own function and run the cell again.
''')
code(r'''
# 1 (easy). h of a LoRA layer from x, W0, A, B, lora_alpha, r. Remember: nn.Linear's weight is (out, in).
def answer_1(x, W0, A, B, lora_alpha, r):
    return x @ W0.T + lora_alpha / r * (x @ A.T @ B.T)

my_forward = answer_1                      # <- replace with your own
W0, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 3.0]])
check.close(my_forward(x, W0, torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]]), 2, 1), [[-1.0, 3.0]],
            hint="[[3, 9]] means that lora_alpha / r is missing; a shape error means that a transpose is.")

# 2 (easy). Trainable parameters of an adapter on q_proj and v_proj of a model with grouped-query attention.
def answer_2(hidden, kv_width, layers, r):
    return layers * r * ((hidden + hidden) + (hidden + kv_width))

my_count = answer_2                        # <- replace with your own
check.equal(my_count(4096, 1024, 32, 8), 3_407_872,
            hint="4,194,304 is what you get if v_proj were square: Llama-3-8B has 8 KV heads of 128.")

# 3 (medium). The best rank-r approximation of a matrix.
def answer_3(matrix, r):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * s[:r] @ v[:r]

my_truncate = answer_3                     # <- replace with your own
update = updates["model.layers.2.mlp.up_proj"]
check.close((update - my_truncate(update, 8)).square().sum() / update.square().sum(), 1 - rank_kept(update, 8), rtol=1e-3,
            hint="torch.linalg.svd returns V transposed: its first r rows, not columns.")
''')
code(r'''
# 4 (medium). From r = 16, alpha = 32 to another r: which alpha keeps the scaling, classic and with rsLoRA?
def answer_4(new_r, use_rslora):
    return 2 * new_r if not use_rslora else 32 / 16**0.5 * new_r**0.5

my_alpha = answer_4                        # <- replace with your own
check.close([my_alpha(64, False), my_alpha(64, True)], [128, 64],
            hint="scaling is alpha / r, or alpha / sqrt(r) with rsLoRA; keep it equal.")

# 5 (hard). Two adapters merged into one: return A and B of rank r1 + r2 with B A = s1 B1 A1 + s2 B2 A2, without any SVD.
def answer_5(A1, B1, s1, A2, B2, s2):
    return torch.cat([A1, A2]), torch.cat([s1 * B1, s2 * B2], dim=1)

my_sum = answer_5                          # <- replace with your own
first, second = (model.model.layers[0].self_attn.q_proj for model in (adapted, other))
A_sum, B_sum = my_sum(first.lora_A, first.lora_B, first.scaling, second.lora_A, second.lora_B, second.scaling)
check.close(B_sum @ A_sum, first.delta_weight() + second.delta_weight(), atol=1e-5,
            hint="Stack A on A and B beside B; where does each scaling go?")
''')
md(r'''
## 12 · Interview questions

Answer aloud first, with a number; then open.

<details><summary><b>Explain LoRA in one minute.</b></summary>
Freeze W0, train h = W0 x + (alpha / r) B A x with A (r, in), B (out, r), B = 0 at the start, so step 0 is the base model (section 2, difference 0.0). It trains r (in + out) numbers a matrix: 131,072 instead of 16,777,216 for 4096 x 4096 and r = 16 (section 1). It can be merged, and then costs nothing at inference (section 8).</details>

<details><summary><b>Why is B zero and A not? What if both were zero, or both random?</b></summary>
grad A is proportional to B, grad B to A. With B = 0, step 0 is the base model and B moves first (section 2). Both zero: no gradient ever. Both random: the model is damaged at step 0 (section 10).</details>

<details><summary><b>Is LoRA 2 to 5 times faster to train?</b></summary>
No. Two of the three products of a training step stay: (2n² + 6nr)/3n² = 0.674 for n = 4096, r = 16, so at most 1.5 times (section 5, formula = torch's count, and the clock). It saves optimizer memory, which may then allow a larger batch.</details>

<details><summary><b>How much memory does it save on a 7B?</b></summary>
States 107.8 GB to 14.1 GB, 7.6 times, not 100 (section 5). The bf16 base stays; to shrink that you need 4 bits (notebook 03). Activations come on top in both cases.</details>

<details><summary><b>What does alpha do?</b></summary>
It scales the update by alpha / r. Under Adam, dividing alpha by q and multiplying B's rate by q gives the *same* curve (section 7). So fix a convention and tune the learning rate; what matters is that the scale does not change silently when you change r, or when you load the file (section 10).</details>

<details><summary><b>Which modules would you adapt, and which rank?</b></summary>
All linear layers; start with r = 16 and raise it when the data needs capacity (section 7: INTERVIEW_RANK). Adapting attention only is the 2021 habit.</details>

<details><summary><b>Does LoRA prevent catastrophic forgetting?</b></summary>
No. Frozen weights are not a frozen function: with the adapter on, the loss on what the model knew rises (section 9). INTERVIEW_FORGET The real protection is that the adapter can be removed, bit by bit.</details>

<details><summary><b>Zero latency and a hundred adapters on one GPU?</b></summary>
One or the other. Merged: the base's speed, one adapter. Unmerged: swapped in milliseconds or batched by row, with a cost per forward pass (section 8).</details>

<details><summary><b>How do you know your own LoRA layer is right?</b></summary>
Against an independent oracle: same weights into PEFT, compare outputs, both gradients, the parameters after an optimizer step, merged weights, and exchange files both ways (section 3).</details>
''')
md(r'''
## 13 · The article's claims

| claim | the article says | verdict | where |
|---|---|---|---|
| C04 | trains 0.1 % of the parameters | depends on r, targets and size | section 4 |
| C05 | 95 % of full fine-tuning's quality | no source gives that number; depends on task and rank | section 7, and below |
| C06 | freezes the weights, adds small matrices | holds; step 0 is the base model | section 2 |
| C07 | 100 to 1000 times fewer parameters | depends: 42 to 1,607 on one 7B | section 4 |
| C08 | 4096 x 4096, r = 16: 131K, 99.2 % fewer | holds, exactly | section 1 |
| C09 | W + BA | the scale alpha / r is missing | section 2 |
| C10 | merged, zero additional latency | holds when merged in the same precision; not unmerged, not into 4 bits | section 8, notebook 03 |
| C11 | r = 8 for simple tasks, 64 for complex | rank is capacity: tune it with its learning rate | section 7 |
| C12 | higher rank, more memory | true and small | section 5 |
| C13 | alpha usually 2 r | one convention of several | section 3 |
| C14 | alpha controls the influence | at a fixed rate; else redundant with it | section 7 |
| C15, C16 | attention layers; some tasks also MLP | outdated advice: all linear layers | section 7 |
| C17 | dropout 0.05 to 0.1 prevents overfitting | DROPOUT_VERDICT | section 7 |
| C18 | a 7B on one 24 GB card | holds with a small batch | section 5 |
| C19 | instead of four A100s | four of 40 GB or two of 80 GB | section 5 |
| C20, C26 | 2 to 5 times faster | **wrong**: at most 1.5 | section 5 |
| C21 | adapter of 10 to 100 MB | depends: 8 to 320 MB on one 7B | section 5 |
| C22 | 14+ GB for the full model | holds | section 5 |
| C23 | many adapters on one base | holds, unmerged | section 8 |
| C24 | the default method in 2025-26 | no source measures it | none |
| C25 | supported by every major framework | holds for those used here: PEFT (section 3), TRL (notebook 05), Unsloth, Axolotl, LLaMA-Factory (notebook 07) | |
| C27 | 100 times less memory | **wrong**: 7.6 to 7.8 times the states | section 5 |
| C28 | no forgetting since weights are frozen | **wrong**: the function changes; the adapter can be removed | section 9 |
| C29 | LoRA prevents it naturally | **wrong**: FORGET_VERDICT | section 9 |
| C30 | full fine-tuning can erase knowledge | holds | section 9 |
| C31 | 0.1 to 1 % | right for 7B to 70B up to r = 16 | section 4 |

On C05, what was published: LoRA's own Table 4 has GPT-3 at 100 % of full fine-tuning or better on three tasks. Biderman et al. (section 4.1, Llama-2-7B) have code instruction tuning at 0.358 with $r = 16$ against 0.497 full, which is 72 %, and continued pretraining on mathematics at 0.203 against 0.293 with $r = 256$, 69 %. Thinking Machines find equality when all layers are adapted and the data fits the adapter's capacity. So: one number for all cases does not exist.
''')
md(r'''
## Five facts to take along

FACTS

**References.** Hu et al. 2021, arXiv:2106.09685: Eq. 3 (the layer), section 4.1 (initialisation, alpha, merging), section 4.2 (memory, speed), Tables 4 to 6 (rank, targets). Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, arXiv:2405.09673, sections 4.1 to 4.7. Schulman et al. (Thinking Machines) 2025, *LoRA Without Regret* (targets, capacity, FLOPs, invariance). Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA). Liu et al. 2024, arXiv:2402.09353, Eq. 5 (DoRA). Eckart and Young 1936. Chen et al. 2023, arXiv:2310.18547 (Punica); Sheng et al. 2023, arXiv:2311.03285 (S-LoRA).
''')
