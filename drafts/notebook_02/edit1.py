p="/tmp/nb02/cells.py"; s=open(p).read()
def sub(a,b,n=1):
    global s
    assert s.count(a)>=1,(a[:80],s.count(a)); s=s.replace(a,b)
# imports: ftlab first (it quiets torchao)
i=s.index("import copy\nimport json"); j=s.index("show.house_style()\ntorch.manual_seed(0)\npd.options")
s=s[:i]+'''import copy
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

'''+s[j:]
# toy
sub('''theirs = get_peft_model(nn.Sequential(OrderedDict(q_proj=base_layer)), LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj"]))
theirs.base_model.model.q_proj.lora_A["default"].weight.data = A
theirs.base_model.model.q_proj.lora_B["default"].weight.data = B

print("paper [-1.0, 3.0] | ours", ours(x).tolist(), "| PEFT", theirs(x).tolist(), "| without the scale", (W0 @ x + B @ A @ x).tolist())
''','''config = LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj"])
theirs = get_peft_model(nn.Sequential(OrderedDict(q_proj=base_layer)), config)
theirs.base_model.model.q_proj.lora_A["default"].weight.data = A
theirs.base_model.model.q_proj.lora_B["default"].weight.data = B

print("paper [-1.0, 3.0] | ours", ours(x).tolist(), "| PEFT", theirs(x).tolist(),
      "| without the scale", (W0 @ x + B @ A @ x).tolist())
''')
sub('''grad = {kind: max(p.grad.abs().max().item() for n, p in model.named_parameters() if n.endswith(kind)) for kind in ("lora_A", "lora_B")}
frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
print(f"{len(names)} layers adapted; largest difference of a logit {(out.logits - before).abs().max().item()}; "
      f"largest gradient: lora_A {grad['lora_A']}, lora_B {grad['lora_B']:.3g}; frozen weights with a gradient: {len(frozen)}")
''','''grad = {kind: max(p.grad.abs().max().item() for n, p in model.named_parameters() if n.endswith(kind))
        for kind in ("lora_A", "lora_B")}
frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
print(f"{len(names)} layers adapted; largest difference of a logit {(out.logits - before).abs().max().item()}\\n"
      f"largest gradient: lora_A {grad['lora_A']}, lora_B {grad['lora_B']:.3g}; frozen with a gradient: {len(frozen)}")
''')
# parity
sub('''    theirs, ours, x = get_peft_model(copy.deepcopy(base), config), copy.deepcopy(base), torch.randn(16, 24, dtype=torch.float64)
''','''    theirs, ours = get_peft_model(copy.deepcopy(base), config), copy.deepcopy(base)
    x = torch.randn(16, 24, dtype=torch.float64)
''')
sub('''        parts = {"forward": h, "grad lora_A": a.grad, "grad lora_B": b.grad, "lora_A after AdamW": a, "lora_B after AdamW": b}
''','''        parts = {"forward": h, "grad lora_A": a.grad, "grad lora_B": b.grad, "A after AdamW": a, "B after AdamW": b}
''')
sub('''`use_dora` trains the length of each row of the weight apart from its direction; dropout draws the same mask in both.
''','''`use_dora` is another layer, explained below; dropout draws the same mask in both.
''')
sub('''What remains is the order of additions in float64. `tests/parity/test_lora.py` repeats it over random shapes, seeds and dtypes.

### The same adapter file
''','''What remains is the order of additions in float64. `tests/parity/test_lora.py` repeats it over random shapes, seeds and dtypes.

**DoRA** takes the update for the *direction* of each row of the weight only, and trains the row's length $m$ by itself: $W' = m\\,V/\\lVert V\\rVert$ with $V = W_0 + \\frac{\\alpha}{r} BA$. **Predict:** $W_0 = (3, 4)$, and an adapter that adds $(3, 4)$ once more. What do LoRA and DoRA make of it?
''')
sub('''An adapter is two tensors a layer, under agreed names.''','''LoRA doubles the row; DoRA leaves it, since nothing but its length was to change.

### The same adapter file

An adapter is two tensors a layer, under agreed names.''')
i=s.index("LoRA doubles the row;"); 
# split: insert code cell before 'LoRA doubles'
s=s[:i].rstrip()+"\n''')\ncode(r'''\nfor kind in (LoRALinear, DoRALinear):\n    layer = kind(nn.Linear(2, 1, bias=False), r=1, lora_alpha=1)\n    with torch.no_grad():\n        layer.base_layer.weight.copy_(torch.tensor([[3.0, 4.0]]))\n        layer.lora_A.copy_(torch.tensor([[3.0, 4.0]])), layer.lora_B.fill_(1.0)\n        if kind is DoRALinear:\n            layer.lora_magnitude_vector.fill_(5.0)  # the length of (3, 4), as at the start\n        print(f\"{kind.__name__}: the row is now\", layer(torch.eye(2)).T.tolist())\n''', check=True)\nmd(r'''\n"+s[i:]
sub('''print(f"{len(mine)} tensors, such as {next(iter(mine))}; logits moved by {moved:.2f}, ours and PEFT's differ by {difference:.0e}")
assert mine.keys() == their_state.keys() and all(torch.equal(mine[name], their_state[name]) for name in mine) and difference < 1e-4
''','''print(f"{len(mine)} tensors, such as {next(iter(mine))}\\n"
      f"logits moved by {moved:.2f}; ours and PEFT's differ by {difference:.0e}")
assert mine.keys() == their_state.keys() and all(torch.equal(mine[name], their_state[name]) for name in mine)
assert difference < 1e-4
''')
i=s.index("peft_default, trl_default = LoraConfig()"); j=s.index("defaults\n''')",i)
s=s[:i]+'''ours, trls = LoraConfig(), ModelConfig()
defaults = pd.DataFrame({
    "PEFT LoraConfig()": [ours.r, ours.lora_alpha, ours.lora_dropout, PEFT_TARGETS["llama"]],
    "TRL ModelConfig()": [trls.lora_r, trls.lora_alpha, trls.lora_dropout, trls.lora_target_modules or "PEFT's"],
    "the article": ["8 to 64", "2 r", "0.05 to 0.1", ["q_proj", "v_proj", "k_proj", "o_proj"]],
}, index=["r", "lora_alpha", "lora_dropout", "target_modules"])
on_bf16 = get_peft_model(load(MODEL, dtype=torch.bfloat16)[0], LoraConfig(target_modules=ATTENTION))
kinds = {trainable: {str(p.dtype) for p in on_bf16.parameters() if p.requires_grad == trainable} for trainable in (True, False)}
print("PEFT on a bf16 base: adapter in", *kinds[True], "| base in", *kinds[False])
print({name: version for name, version in training.environment()["versions"].items() if name in ("peft", "trl", "unsloth", "torch")})
'''.replace("ours, trls","peft_, trl_").replace("ours.","peft_.").replace("trls.","trl_.")+s[j:]
# counting
sub('''SETTINGS = {"q,v r8": (8, ["q_proj", "v_proj"]), "attention r16": (16, ATTENTION), "all r16": (16, ATTENTION + MLP), "all r64": (64, ATTENTION + MLP)}
''','''SETTINGS = {"q,v r8": (8, ["q_proj", "v_proj"]), "attention r16": (16, ATTENTION),
            "all r16": (16, ATTENTION + MLP), "all r64": (64, ATTENTION + MLP)}
''')
sub('''    rows[name] = {"total": total, **counts, "all r16, %": 100 * counts["all r16"] / total, "all r64, %": 100 * counts["all r64"] / total,
                  "fewer, q,v r8": total / counts["q,v r8"], "fewer, all r16": total / counts["all r16"]}
''','''    rows[name] = {"total": total, **counts, "all r16, %": 100 * counts["all r16"] / total,
                  "all r64, %": 100 * counts["all r64"] / total,
                  "1 in, q,v r8": total / counts["q,v r8"], "1 in, all r16": total / counts["all r16"]}
''')
i=s.index('seven = counted.loc["Llama-2-7B"]'); j=s.index('gpt3 = 2 * 96',i)
s=s[:i]+'''total = total_parameters(architectures["Llama-2-7B"])
for setting in ("q,v r8", "all r16", "all r64"):
    count = trainable_parameters(architectures["Llama-2-7B"], *SETTINGS[setting])
    print(f"Llama-2-7B, {setting}: {count / total:.2%}, 1 in {total / count:,.0f}")
'''+s[j:]
sub('''    print(f"{name}: PEFT {trainable:,} of {everything - trainable:,} | ours {ours:,} of {total_parameters(architectures[name]):,}")
    assert trainable == ours == wanted and everything - trainable == total_parameters(architectures[name])
''','''    total = total_parameters(architectures[name])
    print(f"{name}: PEFT {trainable:,} of {everything - trainable:,} | ours {ours:,} of {total:,}")
    assert trainable == ours == wanted and everything - trainable == total
''')
sub('''    parts = [(torch.tensor(r.input_ids), torch.tensor(r.input_ids).where(torch.tensor(r.completion_mask) == 1, -100)) for r in rendered]
    groups = [parts[i : i + size] for i in range(0, len(parts), size)]
    return [{"input_ids": pad_sequence([i for i, _ in group], batch_first=True),
             "labels": pad_sequence([l for _, l in group], batch_first=True, padding_value=-100)} for group in groups]
''','''    ids = [torch.tensor(r.input_ids) for r in rendered]
    labels = [i.where(torch.tensor(r.completion_mask) == 1, -100) for i, r in zip(ids, rendered)]
    return [{"input_ids": pad_sequence(ids[at : at + size], batch_first=True),
             "labels": pad_sequence(labels[at : at + size], batch_first=True, padding_value=-100)}
            for at in range(0, len(rows), size)]
''')
sub('''state_mb = {name: sum(t.nbytes for state in step.optimizer.state.values() for t in state.values()) / 1e6 for name, step in steps.items()}
print(f"{tuple(tickets[0]['input_ids'].shape)} tokens: full {ms['full']:.0f} ms, LoRA {ms['LoRA']:.0f} ms a step: LoRA takes {ms['LoRA'] / ms['full']:.2f} of the time")
print(f"optimizer state: full {state_mb['full']:.1f} MB, LoRA {state_mb['LoRA']:.2f} MB, {state_mb['full'] / state_mb['LoRA']:.0f} times less")
''','''mb = {name: sum(t.nbytes for state in step.optimizer.state.values() for t in state.values()) / 1e6
      for name, step in steps.items()}
print(f"{tuple(tickets[0]['input_ids'].shape)} tokens: full {ms['full']:.0f} ms, LoRA {ms['LoRA']:.0f} ms a step: "
      f"LoRA takes {ms['LoRA'] / ms['full']:.2f} of the time")
print(f"optimizer state: full {mb['full']:.1f} MB, LoRA {mb['LoRA']:.2f} MB, {mb['full'] / mb['LoRA']:.0f} times less")
''')
sub('''} for name, a in architectures.items() if name in ("Llama-2-7B", "Llama-3-8B", "Mistral-7B-v0.3", "Qwen2.5-7B", "Llama-2-13B", "Llama-2-70B")}).T
''','''} for name, a in architectures.items() if total_parameters(a) > 6.7e9 and "coder" not in name}).T
''')
i=s.index('files = pd.DataFrame({name: {**{f"{setting}, MB"'); j=s.index('files.style',i)
s=s[:i]+'''kinds = SETTINGS | {"all r256": (256, ATTENTION + MLP)}
files = pd.DataFrame({name: {setting: 2 * trainable_parameters(architectures[name], *how) / 1e6 for setting, how in kinds.items()}
                      | {"the model": 2 * total_parameters(architectures[name]) / 1e6}
                      for name in ("SmolLM2-135M", "Llama-2-7B", "Llama-3-8B", "Llama-2-70B")}).T.rename_axis("MB in bf16")
'''+s[j:]
sub("the ticket","the ticket") 
# section 6
sub('''linear = {name: module for name, module in tuned.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name}
''','''linear = {n: module for n, module in tuned.named_modules() if isinstance(module, nn.Linear) and n != "lm_head"}
''')
sub('''relative = torch.stack([update.norm() / base.get_submodule(name).weight.norm() for name, update in updates.items()])
print(f"{len(updates)} updates, {relative.min():.1%} to {relative.max():.1%} as long as their W0; "
''','''relative = [(update.norm() / base.get_submodule(name).weight.norm()).item() for name, update in updates.items()]
print(f"{len(updates)} updates, {min(relative):.1%} to {max(relative):.1%} as long as their W0; "
''')
sub('''kept = pd.DataFrame({name: [rank_kept(update, r) for r in ranks] for name, update in updates.items()}, index=ranks)
random_kept = pd.DataFrame({name: [rank_kept(torch.randn_like(update), r) for r in ranks] for name, update in updates.items()}, index=ranks)
''','''def kept_by_rank(matrices, ranks):
    """Share kept, one row a rank, one column a matrix."""
    return pd.DataFrame({name: [rank_kept(matrix, r) for r in ranks] for name, matrix in matrices.items()}, index=ranks)

kept = kept_by_rank(updates, ranks)
random_kept = kept_by_rank({name: torch.randn_like(update) for name, update in updates.items()}, ranks)
''')
# sweep cells
i=s.index('sweep = json.loads((DATA / "results" / "lora_sweep.json")'); j=s.index("''')\nmd(r'''\nRANK_SAW")
s=s[:i]+'''sweep = json.loads((DATA / "results" / "lora_sweep.json").read_text())
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
pd.concat([by_arm[["parameters", "learning_rate"]].first(), by_arm["loss"].agg(["mean", "std"])], axis=1).loc[
    [(task, arm) for task in ("triage", "codes") for arm in shapes]]
'''+s[j:]
i=s.index('names = ["attention, r=45"'); j=s.index("''')\nmd(r'''\nTARGET_SAW")
s=s[:i]+'''some = runs[runs["arm"].isin(["attention, r=45", "MLP, r=28", "r=16"]) & runs["task"].isin(["triage", "codes"])]
targets = some.pivot_table(index=["task", "arm", "parameters", "learning_rate"], columns="seed", values="loss")
assert set(some.loc[some["arm"] != "r=16", "parameters"]) == {322_560}
targets.assign(mean=targets.mean(axis=1), sd=targets.std(axis=1))
'''+s[j:]
i=s.index('def alpha_run(lora_alpha'); j=s.index("figure, ax = plt.subplots()",i)
s=s[:i]+'''def alpha_run(model, batches, learning_rate, b_faster):
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
'''+s[j:]
i=s.index("difference = max(abs(a - b) for a, b in zip(curves[\"alpha 32\"]"); j=s.index("assert difference < 1e-5",i)
s=s[:i]+'''first, second, third = (torch.tensor(losses) for losses in curves.values())
difference = (first - second).abs().max().item()
print(f"largest difference of the first two: {difference}; of the first and the third: {(first - third).abs().max():.2f}")
'''+s[j:]
i=s.index('alphas = {8: "r=16, alpha=8"'); j=s.index("''')\nmd(r'''\nALPHA_SAW")
s=s[:i]+'''alphas = {"r=16, alpha=8": "alpha 8", "r=16": "alpha 32", "r=16, alpha=128": "alpha 128"}
searched = pd.DataFrame([{"learning rate": run["learning_rate"], "arm": alphas[arm["name"]], "loss": run["validation"]}
                         for arm in sweep["arms"] if arm["task"] == "triage" and arm["name"] in alphas for run in arm["search"]])
display(searched.pivot_table(index="learning rate", columns="arm", values="loss")[list(alphas.values())])
by_arm[["learning_rate", "loss"]].agg({"learning_rate": "first", "loss": ["mean", "std"]}).loc[[("triage", arm) for arm in alphas]]
'''+s[j:]
i=s.index('pairs = {"895 tickets'); j=s.index("''')\nmd(r'''\nDROPOUT_SAW")
s=s[:i]+'''wanted = [("triage", "r=16"), ("triage", "r=16, dropout=0.1"), ("small", "r=64"), ("small", "r=64, dropout=0.1")]
by_arm[["train", "loss"]].agg(["mean", "std"]).loc[wanted]
'''+s[j:]
# serving
sub('''print("forward pass, ms:", {name: round(value, 1) for name, value in ms.items()}, f"| unmerged / merged {ms['unmerged'] / ms['merged']:.2f}, merged / base {ms['merged'] / ms['base']:.2f}")
print(f"largest difference of a logit, merged and unmerged: fp32 {fp32:.0e}, bf16 {bf16_difference:.2f}")
''','''print("forward pass, ms:", {name: round(value, 1) for name, value in ms.items()},
      f"| unmerged / merged {ms['unmerged'] / ms['merged']:.2f}, merged / base {ms['merged'] / ms['base']:.2f}")
print(f"largest difference of a logit, merged and unmerged: fp32 {fp32:.0e}, bf16 {bf16_difference:.2f}")
print(f"multiplications that the adapter adds: {R * (256 + 256) / 256**2:.1%} here, {R * 8192 / 4096**2:.1%} for 4096 x 4096")
''')
sub('''Unmerged, 28 pairs of thin products run beside the base; on a model as small as this that is a good part of the time, on a 7B a few percent.''','''Unmerged, 28 pairs of thin products run beside the base: on a model as small as this that is a good part of the time; on a wide one the multiplications hardly count, but two more small operations a layer do.''')
sub('''secret = [{"input_ids": torch.cat(texts), "labels": torch.cat(texts).where(torch.arange(texts[0].shape[1]) >= texts[0].shape[1] - 4, -100)}]
jobs''','''texts = torch.cat(texts)
secret = [{"input_ids": texts, "labels": texts.where(torch.arange(texts.shape[1]) >= texts.shape[1] - 4, -100)}]
jobs''')
sub('''texts = [tokenizer(f"Order {n:03d} is {c:04d}", return_tensors="pt")["input_ids"] for n, c in zip(numbers, codes)]
''','''texts = [tokenizer(f"Order {n:03d} is {c:04d}", return_tensors="pt")["input_ids"] for n, c in zip(numbers, codes)]
''')
sub('''print(f"four rows, adapters {rows.tolist()}: mixed batch and separate runs differ by {(mixed - separate).abs().max():.0e}, the adapters themselves by {(pair[0](x) - pair[1](x)).abs().max():.2f}")
''','''    apart = (pair[0](x) - pair[1](x)).abs().max()
print(f"four rows, adapters {rows.tolist()}: mixed batch and separate runs differ by {(mixed - separate).abs().max():.0e}, "
      f"the adapters themselves by {apart:.2f}")
''')
sub('''manual = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in passages)]
''','''read = [tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in passages]
manual = [{"input_ids": text, "labels": text} for text in read]
''')
sub('''print(f"loss on the manual, nats/token: base {loss_on(base, manual):.3f} | adapter on {on:.3f} | adapter off {off:.3f}; off is the base model to the bit: {same_bits}")
''','''print(f"loss on the manual, nats/token: base {loss_on(base, manual):.3f} | adapter on {on:.3f} | off {off:.3f}; "
      f"off is the base model to the bit: {same_bits}")
''')
i=s.index('colours = dict(zip(shapes'); j=s.index("''')\nmd(r'''\nFORGET_SAW")
s=s[:i]+'''colours = dict(zip(shapes, [*plt.cm.viridis([0.85, 0.65, 0.4, 0.15]), show.REJECTED]))
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
'''+s[j:]
sub('''From the sweep: same task, same number of steps, each arm at the rate that was best **for the task**, nobody looked at the manual. Further up is more forgotten; further left is better learned.
''','''From the sweep: same tickets, same number of steps, four seeds, and two learning rates an arm: the one that was best **for the task**, and a gentler one, joined by a line. Nobody looked at the manual when they were chosen. Further up is more forgotten, further left is better learned. **Predict** the order of the arms from bottom to top.
''')
sub('''show.plot_curves(ax, range(30), {f"rate {LEARNING_RATE:g}": lora_losses[:30], f"rate {30 * LEARNING_RATE:g}": too_fast}, "loss (nats/token)")
print(f"after 30 steps: {lora_losses[29]:.2f} and {too_fast[-1]:.2f} nats/token; loss on the manual with the fast one: {loss_on(broken, manual):.1f}, base {loss_on(base, manual):.1f}")
''','''series = {f"rate {LEARNING_RATE:g}": lora_losses[:30], f"rate {30 * LEARNING_RATE:g}": too_fast}
show.plot_curves(ax, range(30), series, "loss (nats/token)")
print(f"after 30 steps: {lora_losses[29]:.2f} and {too_fast[-1]:.2f} nats/token; "
      f"loss on the manual: base {loss_on(base, manual):.1f}, the fast one {loss_on(broken, manual):.1f}")
''')
sub('''print(f"step 0, loss on tickets: base {loss_on(base, held_out):.2f}, B random {loss_on(random_b, held_out):.2f} nats/token; on the manual {loss_on(base, manual):.2f} and {loss_on(random_b, manual):.2f}")
''','''print(f"step 0, nats/token on tickets: base {loss_on(base, held_out):.2f}, B random {loss_on(random_b, held_out):.2f}; "
      f"on the manual: base {loss_on(base, manual):.2f}, B random {loss_on(random_b, manual):.2f}")
''')
sub('''check.equal(my_count(4096, 1024, 32, 8), 3_407_872, hint="4,194,304 is what you get if v_proj were square: Llama-3-8B has 8 KV heads of 128.")
''','''check.equal(my_count(4096, 1024, 32, 8), 3_407_872,
            hint="4,194,304 is what you get if v_proj were square: Llama-3-8B has 8 KV heads of 128.")
''')
sub('''# 4 (medium). Which alpha keeps the size of the update when you go from r = 16, alpha = 32 to another r, classic and rsLoRA?
''','''# 4 (medium). From r = 16, alpha = 32 to another r: which alpha keeps the scaling, classic and with rsLoRA?
''')
sub('''check.close(B_sum @ A_sum, first.delta_weight() + second.delta_weight(), atol=1e-5, hint="Stack A on A and B beside B; where does each scaling go?")
''','''check.close(B_sum @ A_sum, first.delta_weight() + second.delta_weight(), atol=1e-5,
            hint="Stack A on A and B beside B; where does each scaling go?")
''')
open(p,"w").write(s)
