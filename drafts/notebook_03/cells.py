# ---------------------------------------------------------------- opening
md(r"""
# 03 · QLoRA: what four bits cost, and what fits on which card

**Question:** a frozen weight needs no gradient. Does it need 16 bits? And which model can be fine-tuned on which card, *computed* instead of remembered?

The paper is *QLoRA* (Dettmers et al. 2023, arXiv:2305.14314). You will build NF4 from the normal distribution, pack it bit for bit like bitsandbytes, quantize a real model, take a QLoRA step by hand, lose a trained adapter by merging it the wrong way, and check a memory table number by number.
About **@MIN@** on two CPU cores, **@GB@** at the peak, no GPU, no network. You need notebook 02 for LoRA.
""")

md(r"""
## The idea

LoRA (notebook 02) freezes the big matrix $W$ and trains two thin ones. What is frozen is only *read*, so it may be stored roughly: **16 levels, 4 bits a weight**. Cut the weights into blocks of 64, divide each block by its largest magnitude, and write down for each weight the number of the nearest level. To compute, look the level up, multiply by the block's constant, and go on in 16 bits as if nothing had happened:

$$Y = X\,\hat W^\top + \text{scaling}\; X A^\top B^\top, \qquad \hat W = \text{absmax}_{\text{block}} \cdot \text{level}[\text{code}]$$

A kitchen that measures every spice with one of 16 spoons and keeps one note per shelf ("largest spoon here: 40 g") needs a very small recipe book. The adapter, $A$ and $B$, is the pencilled correction, and it stays in 16 bits.

| symbol | in the code | shape |
|---|---|---|
| codes | `codes`, two to a byte: `packed` | uint8, one per weight |
| largest magnitude of a block | `absmax` | fp32, one per `block_size` weights |
| the 16 numbers in [-1, 1] | `levels` | (16,) |
| trained | `lora_A (r, in)`, `lora_B (out, r)` | 16 or 32 bits |

Four bits save **memory, not arithmetic**: every product is still one of 16- or 32-bit numbers, and looking the levels up comes on top.
""")

code(r"""
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import NormalDist

import matplotlib.pyplot as plt
import pandas as pd
import torch

from ftlab import memory
from ftlab.classroom import check, show, widgets
from ftlab.paths import DATA
from ftlab.pipeline import data, evaluate
from ftlab.pipeline.models import load
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import train
from ftlab.scratch import lora, quant

import bitsandbytes as bnb
from bitsandbytes import functional as bnb_f
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.utils import logging

logging.set_verbosity_error()
show.house_style()
torch.manual_seed(0)
pd.options.display.precision = 3
print("torch", torch.__version__, "· bitsandbytes", bnb.__version__, "· GPU:", torch.cuda.is_available())
""")

code(r"""
# The dial. On a GPU, take a hub id for MODEL; the cells below stay as they are.
MODEL = "smollm2"                       # the real model whose weights are rounded
SMALL = "micro"                         # 3.5 million parameters: for the training runs
BLOCK_SIZE = 64                         # the paper's, and bitsandbytes' default
STEPS = 40                              # of 8 tickets each, for the short QLoRA run
TEXTS, QUESTIONS = 12, 24               # how much to measure the damage with
RUNS = Path(tempfile.mkdtemp(prefix="qlora-"))
""")

# ---------------------------------------------------------------- by hand
md(r"""
## 1 · Rounding eight weights on paper

**absmax int8.** Find the largest magnitude, here 1.4. It becomes 127. Everything else is scaled along and rounded to a whole number: 0.8 becomes round(127 · 0.8 / 1.4) = round(72.57) = 73. **Predict** the code of -0.45 and the largest error that any weight can have. Then the sixth weight becomes 400: how many of the other seven survive?
""")
code(r"""
toy = torch.tensor([[0.8, -1.0, 0.35, 0.05, -0.45, 0.0, 1.4, -0.2]])
on_paper = [73, -91, 32, 5, -41, 0, 127, -18]

codes, absmax = quant.quantize_absmax(toy)                       # ours
library, library_absmax, _ = bnb_f.int8_vectorwise_quant(toy)    # bitsandbytes, the same in LLM.int8()
stored = quant.dequantize_absmax(codes, absmax)
assert codes.tolist() == library.tolist() == [on_paper] and absmax == library_absmax
print(f"half a step is {absmax.item() / 127 / 2:.4f}; largest error here {(stored - toy).abs().max():.4f}")
for name, row in {"weight": toy, "on paper": torch.tensor([on_paper]), "ours": codes, "bitsandbytes": library, "stored": stored}.items():
    print(f"{name:13}", *(f"{value:7.4g}" for value in row[0].tolist()))

outlier = toy.clone()
outlier[0, 5] = 400.0
print()
print("one int8 constant for all: ", quant.quantize_absmax(outlier)[0].tolist()[0])
in_blocks = outlier.view(2, 4)                                   # two blocks of four, a constant each
print("one constant per block of 4:", quant.quantize_absmax(in_blocks)[0].tolist())
""", LOCK)

md(r"""
Paper, ours and bitsandbytes agree on every code. And one outlier flattens everything that shares its constant: all seven became 0. In blocks, the damage stays inside the block. That is the whole case for blocks, and their price is one constant each. (LLM.int8() keeps one constant per row and takes columns with outlying *activations* out instead.)

## 2 · Sixteen levels

With 4 bits there are 16 codes. Where should the 16 levels stand?

- **INT4, symmetric**: evenly spaced, -7/7 ... 7/7; the sixteenth code goes unused.
- **INT4, asymmetric**: 16 even steps from the block's smallest to its largest weight; *two* constants per block.
- **FP4**: a tiny float, E2M1. bitsandbytes' FP4 differs from it in the number next to zero.
- **NF4**: where the weights are. Trained weights look normally distributed, so the levels are quantiles of the normal distribution: about as many weights fall to each.

By hand: cut the probability from 1/2 up to an offset into 8 equal steps, and from 1/2 down into 7, take the normal quantile at each cut, divide by the largest. **Predict** how many levels lie below zero and how many above.
""")
code(r"""
offset, quantile = 0.9677083, NormalDist().inv_cdf               # offset: from the authors' code, not in the paper
above = [quantile(0.5 + (offset - 0.5) * k / 8) for k in range(1, 9)]
below = [-quantile(0.5 + (offset - 0.5) * k / 7) for k in range(1, 8)]
by_hand = torch.tensor(sorted([*below, 0.0, *above])) / max(above)

library = bnb_f.get_4bit_type("nf4", "cpu")
assert (by_hand - library).abs().max() < 1e-6                    # paper arithmetic
assert torch.equal(quant.nf4_levels(), library)                  # ours, in fp32 like theirs: equal to the bit
print([round(level, 4) for level in by_hand.tolist()])
print(f"{(by_hand < 0).sum()} below zero, zero itself, {(by_hand > 0).sum()} above")
""", LOCK)

md(r"""
Seven below, zero, eight above. The halves differ because zero itself must be a level (padding and pruned weights have to stay exactly 0), which leaves 15 codes for two sides; so `-x` is not quantized like `x`. The paper's equation 4 would give minus infinity for its first quantile; what everyone runs is the authors' code, and that is what stands here.

Left, the levels under what they have to cover: normal weights, in blocks of 64, each divided by its absmax. Right, how often each code is used. If NF4 were "equal mass", each code would take 1/16. **Predict:** does it, and what do the outermost codes of INT4 get?
""")
code(r"""
weights = torch.randn(2**14, 64)
scaled = weights / weights.abs().amax(1, keepdim=True)
tables = {"NF4": quant.nf4_levels(), "FP4 of bitsandbytes": quant.fp4_levels(1 / 32), "FP4 E2M1": quant.fp4_levels(),
          "INT4 symmetric": quant.int4_levels()}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(3, 2))
left.hist(scaled.flatten().numpy(), bins=160, density=True, color="#dddddd")
for row, (name, levels) in enumerate(tables.items(), 1):
    left.scatter(levels, [-0.4 * row] * len(levels), marker="|", s=160, linewidths=2, color=show.POLICY if row == 1 else show.REFERENCE)
    left.text(1.08, -0.4 * row, name, va="center", fontsize=8)
left.axhline(0, color="black", linewidth=0.5)
left.set(xlabel="weight / absmax of its block", ylabel="density", yticks=[0, 0.5, 1], ylim=(-1.9, 1.3))
for name, colour, shift in (("NF4", show.POLICY, -0.2), ("INT4 symmetric", show.REFERENCE, 0.2)):
    codes, _ = quant.quantize_blockwise(weights, tables[name], BLOCK_SIZE)
    share = torch.bincount(codes.flatten().int(), minlength=16) / codes.numel()
    bits = -(share[share > 0] * share[share > 0].log2()).sum().item()
    right.bar(torch.arange(16) + shift, share, width=0.4, color=colour, label=f"{name}: {bits:.2f} bits of information")
right.axhline(1 / 16, color="black", linewidth=0.8)
right.set(xlabel="code", ylabel="share of the weights", ylim=(0, 0.22))
right.legend(loc="upper left", fontsize=8);
""")

md(r"""
NF4 crowds its levels where the hill is and leaves wide gaps at the edge; the spikes at ±1 are the largest weights themselves, one per block, stored exactly. bitsandbytes' FP4 has a hole next to zero, where most weights lie. The codes of NF4 are not used quite equally, since dividing by absmax changes the distribution that the quantiles were made for, but they carry more information than evenly spaced ones. And equal mass is not least error: hold that thought for section 4.

## 3 · The real thing: codes, bytes, and equal to bitsandbytes

`quantize_nf4` is `quantize_blockwise` with NF4's levels, two codes packed to a byte. The definition:
""")
code("show.show_source(quant.quantize_blockwise)")
code(r"""
W = torch.randn(256, 512)                                        # 131,072 weights: 2,048 blocks of 64

packed, state = bnb_f.quantize_4bit(W, blocksize=BLOCK_SIZE, quant_type="nf4")
codes, absmax = quant.quantize_nf4(W, BLOCK_SIZE)
assert torch.equal(codes, packed.flatten()) and torch.equal(absmax, state.absmax)
W_hat = quant.dequantize_nf4(codes, absmax, W.shape, BLOCK_SIZE)
assert torch.equal(W_hat, bnb_f.dequantize_4bit(packed, state))

_, state = bnb_f.quantize_4bit(W, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True)
absmax_codes, absmax2, mean = quant.double_quantize(absmax)      # the constants, quantized in their turn
assert torch.equal(absmax_codes, state.absmax) and torch.equal(absmax2, state.state2.absmax) and torch.equal(mean, state.offset)
W_hat_double = quant.dequantize_nf4(codes, quant.double_dequantize(absmax_codes, absmax2, mean), W.shape, BLOCK_SIZE)
assert torch.equal(W_hat_double, bnb_f.dequantize_4bit(packed, state))
print(f"equal to bitsandbytes, bit for bit: {codes.numel():,} bytes of codes, {absmax.numel():,} constants, {W.numel():,} values; "
      f"double: {absmax_codes.numel():,} one-byte constants, {absmax2.numel()} second constants, 1 mean, {W.numel():,} values")
""", LOCK)

md(r"""
Not "close": equal, with and without double quantization (on a CPU; the repository's parity tests repeat it over random shapes, dtypes and blocks on the thresholds). Two facts about the library came out of that comparison. Its CPU kernel for the second level rounds to a table first, so about one constant in 700 gets the neighbouring code; and `dequantize_4bit` on a CPU with AVX-512 is *wrong* for matrices whose width is a multiple of 16 but not of the block size, so keep toy matrices a multiple of 64 wide.

### How many bits is that?

4 for the code. One fp32 constant, 32 bits, is shared by 64 weights. With double quantization the constant takes 8 bits, and 256 of them share one fp32. **Work both out on paper**; the cell then counts the bytes of a real layer of SmolLM2's shape. **Predict** also what double quantization saves on a 65B model, in GB, and by how much the error grows.
""")
code(r"""
layer = bnb.nn.Linear4bit(576, 1536, bias=False, quant_type="nf4", compress_statistics=True)
layer.weight = bnb.nn.Params4bit(torch.randn(1536, 576), requires_grad=False, quant_type="nf4", compress_statistics=True)
state = layer.to("cpu").weight.quant_state
n = 576 * 1536
held = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes

single, double = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)
assert single == quant.bits_per_param(64) and double == quant.bits_per_param(64, double=True) == 8 * held / n
print(f"on paper: {single} and {double} bits a weight; double quantization saves {single - double:.6f}")
print(f"a real 576 x 1,536 layer: {layer.weight.nbytes:,} + {state.absmax.nbytes:,} + {state.state2.absmax.nbytes:,} bytes = {8 * held / n} bits a weight")
print(f"in bytes: {single / 8:.4f} and {double / 8:.4f} a weight")

zoo = memory.architectures()
for name in ("Llama-2-7B", "LLaMA-1 65B"):
    print(f"{name}: {zoo[name].linear_params / 1e9:.2f} billion weights in linear layers, double quantization saves "
          f"{zoo[name].linear_params * (single - double) / 8 / 1e9:.2f} GB")
mse = [((version - W) ** 2).mean().item() for version in (W_hat, W_hat_double)]
print(f"mean squared error of NF4 {mse[0]:.6f}, with double quantization {mse[1]:.6f}: {mse[1] / mse[0] - 1:+.2%}")
""", LOCK)

# ---------------------------------------------------------------- block size
md(r"""
"An additional 0.4 bits per parameter" is 0.373, rounded up (claim C39), and the error hardly notices (claim C40).

## 4 · Where NF4 wins, and where it does not

"Better quality than standard INT4," says the article (claim C37). Measured on normal weights: mean squared error against the block size. **Predict** first: does asymmetric INT4, which stores two constants, ever beat NF4?
""")
code(r"""
def rounding_error(x, block_size):
    '''Mean squared error of each 4-bit type on x, in blocks of this size.'''
    values = {name: quant.dequantize_blockwise(*quant.quantize_blockwise(x, levels, block_size), levels, block_size)
              for name, levels in {"NF4": quant.nf4_levels(), "FP4 E2M1": quant.fp4_levels(),
                                   "FP4 of bitsandbytes": quant.fp4_levels(1 / 32), "INT4 symmetric": quant.int4_levels()}.items()}
    values["INT4 asymmetric"] = quant.dequantize_int4_asymmetric(*quant.quantize_int4_asymmetric(x, block_size), block_size)
    return {name: ((value - x) ** 2).mean().item() for name, value in values.items()}

normal = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
sizes = [32, 64, 128, 256, 512]
errors = pd.DataFrame([rounding_error(normal, size) for size in sizes], index=pd.Index(sizes, name="block size"))
errors.insert(0, "bits, one constant", [4 + 32 / size for size in sizes])
errors.insert(1, "bits, two constants", [4 + 64 / size for size in sizes])
assert (errors.loc[[32, 64], "INT4 asymmetric"] < errors.loc[[32, 64], "NF4"]).all()
assert (errors.loc[128:].drop(columns=errors.columns[:2]).idxmin(axis=1) == "NF4").all()
display(errors.style.format("{:.5f}").format("{:.3f}", subset=errors.columns[:2]))

looks = {"NF4": (show.POLICY, "-"), "INT4 asymmetric": (show.REJECTED, "-"), "INT4 symmetric": (show.REFERENCE, "--"),
         "FP4 E2M1": (show.CHOSEN, "-"), "FP4 of bitsandbytes": (show.CHOSEN, "--")}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for name, (colour, line) in looks.items():
    left.plot(sizes, errors[name], line, color=colour, marker=".", label=name)
    bits = errors["bits, two constants" if name == "INT4 asymmetric" else "bits, one constant"]
    right.plot(bits, errors[name], line, color=colour, marker=".")
left.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="block size", ylabel="mean squared error, N(0, 1)", ylim=(0, None))
left.minorticks_off()
right.axvline(4.5, color="black", linewidth=0.8)
right.set(xlabel="bits per weight, fp32 constants counted")
left.legend(fontsize=8)
at_equal_bits = errors.loc[64, "NF4"], errors.loc[128, "INT4 asymmetric"]
print(f"at 4.5 bits: NF4 in blocks of 64 {at_equal_bits[0]:.5f}, asymmetric INT4 in blocks of 128 {at_equal_bits[1]:.5f}")
assert at_equal_bits[0] < at_equal_bits[1]
""")

md(r"""
**NF4 does not always win.** At equal *block size* (left) plain asymmetric INT4 beats it in blocks of 32 and 64, because there it fits both ends of each block. But it pays for two constants. At equal *bits* (right, the line at 4.5) NF4 is ahead: blocks of 64 against blocks of 128. Against *symmetric* INT4 and both FP4s NF4 wins everywhere. So the article's sentence holds for the INT4 that the paper compared with; "standard INT4" in llama.cpp's Q4_1 is the asymmetric one.

Error on weights is not quality of text. The paper's own test, mean perplexity on Pile Common Crawl (its Table 2): Int4 34.34, FP4 E2M1 31.07, FP4 E3M0 29.48, NF4 + double quantization 27.41. Exercise 2 shows why you should not guess one from the other.

## 5 · The weights of a real model

SmolLM2's linear layers, every third block. Error relative to the weights' own size, |Ŵ - W| / |W|. **Predict** NF4's: the last section gave a mean squared error of about 0.0085 for weights of variance 1, so about the square root of it.
""")
code(r"""
base, tokenizer = load(MODEL)
linear = {name: module.weight.detach() for name, module in base.named_modules()
          if isinstance(module, torch.nn.Linear) and name != "lm_head"}

def relative_errors(w):
    '''|stored - w| / |w| for one matrix and each way of storing it.'''
    ways = {
        "INT8 rows": quant.dequantize_absmax(*quant.quantize_absmax(w)),
        "NF4": quant.dequantize_nf4(*quant.quantize_nf4(w), w.shape),
        "INT4 symmetric": quant.dequantize_blockwise(*quant.quantize_blockwise(w, quant.int4_levels(), 64), quant.int4_levels(), 64),
        "INT4 asymmetric, blocks of 32": quant.dequantize_int4_asymmetric(*quant.quantize_int4_asymmetric(w, 32), 32),
    }
    return {way: ((stored - w).norm() / w.norm()).item() for way, stored in ways.items()}

some = [name for name in linear if int(name.split(".")[2]) % 3 == 0]
per_layer = pd.DataFrame([{"block": int(name.split(".")[2]), "layer": name.split(".")[-1], **relative_errors(linear[name])} for name in some])
display(per_layer.drop(columns="block").groupby("layer").mean().style.format("{:.4f}"))

figure, ax = plt.subplots(figsize=(6, 3))
for layer_name, rows in per_layer.groupby("layer"):
    ax.plot(rows["block"], rows["NF4"], marker=".", linewidth=0.8, label=layer_name)
ax.axhline(errors.loc[64, "NF4"] ** 0.5, color="black", linewidth=0.8)
ax.text(0, errors.loc[64, "NF4"] ** 0.5, " normal weights", va="bottom", fontsize=8)
ax.set(xlabel="block of the model", ylabel="|Ŵ - W| / |W|, NF4")
ax.legend(ncols=2, fontsize=7)
print(f"NF4 over {len(per_layer)} matrices: {per_layer['NF4'].min():.3f} to {per_layer['NF4'].max():.3f}; "
      f"normal weights {errors.loc[64, 'NF4'] ** 0.5:.3f}")
""")

md(r"""
Close to the line for normal weights in every layer: "normally distributed" describes these weights well enough (claim C38). NF4's noise is about a tenth of the weight's length. Remember that number; section 9 sets it against the size of a LoRA update.

And the last column of the table? INT4 asymmetric in blocks of 32 is not magic. This copy of SmolLM2 was *shipped* in that format (llama.cpp's Q4_1; `ftlab/pipeline/models.py` says so), its weights lie on that grid already, and rounding twice to one grid is free. **Before you compare formats on a downloaded model, ask what it has been through.** So that column is no result, and the perplexities below say what is lost *on top of* Q4_1.

### Perplexity, a task, and bytes really held

Now bitsandbytes itself, on a CPU: the same model in fp32, int8, NF4 and NF4 with double quantization. Three measurements for each: perplexity on 12 passages of text; 24 easy questions asked without context; and every byte of the weights, constants included. **Predict:** (a) which step costs quality, (b) whether the model is really 8 times smaller than in fp32.
""")
code(r"""
def bytes_held(model):
    '''Bytes of (linear layers, their quantization constants, the rest): each tensor once.'''
    tensors = lambda s: [] if s is None else [s.absmax, s.code, s.offset, *tensors(s.state2)]
    linear = [p for name, p in model.named_parameters() if "_proj." in name]
    constants = [t for p in linear for t in tensors(getattr(p, "quant_state", None)) if t is not None]
    constants += [m.state.SCB if m.state.SCB is not None else m.weight.SCB for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    parts = sum(p.nbytes for p in linear), sum(t.nbytes for t in constants)
    return *parts, sum(p.nbytes for p in model.parameters()) - parts[0]

texts = [json.loads(line)["text"] for line in (DATA / "general" / "text.jsonl").open(encoding="utf-8")][:TEXTS]
facts = [json.loads(line) for line in (DATA / "general" / "candidates.jsonl").open(encoding="utf-8")][::23][:QUESTIONS]
weights_of = sum(w.numel() for w in linear.values())
table, nll, answers = {}, {}, {}
for name in ("none", "int8", "nf4", "nf4-double"):
    model = base if name == "none" else load(MODEL, quantization=name)[0]
    held, said = bytes_held(model), model.get_memory_footprint()
    result = evaluate.perplexity(model, tokenizer, texts, batch_size=4)
    nll[name], tokens = result.texts["nll"], result.texts["tokens"].sum()
    if name.startswith("nf4"):
        model = model.dequantize()                               # the same weights spelled out in fp32: faster answers
    answers[name] = evaluate.closed_book(model, tokenizer, facts)[["correct"]]
    table[name] = {"perplexity": result.ppl, "questions right": answers[name]["correct"].mean(), "linear layers MB": held[0] / 1e6,
                   "constants MB": held[1] / 1e6, "embeddings, norms MB": held[2] / 1e6, "all MB": sum(held) / 1e6,
                   "get_memory_footprint MB": said / 1e6, "bytes per linear weight": (held[0] + held[1]) / weights_of}
    del model
quality = pd.DataFrame(table).T
assert abs(quality.loc["nf4", "bytes per linear weight"] - 0.5625) < 1e-3 and abs(quality.loc["nf4-double", "bytes per linear weight"] - 0.5159) < 3e-3
display(quality.style.format("{:.1f}").format("{:.2f}", subset=["perplexity"]).format("{:.0%}", subset=["questions right"]).format("{:.4f}", subset=["bytes per linear weight"]))

rows = []
for name in ("int8", "nf4", "nf4-double"):
    more = evaluate.summary(pd.DataFrame({"nats": nll[name] - nll["none"]})).loc["nats"] * TEXTS / tokens
    right = evaluate.summary(answers[name], base=answers["none"]).loc["correct"]
    rows.append({"against fp32": name, "nats per token more": more["mean"], "low": more["low"], "high": more["high"],
                 "questions, difference": right["difference"], "q low": right["difference_low"], "q high": right["difference_high"]})
differences = pd.DataFrame(rows).set_index("against fp32")
assert differences.loc["nf4", "low"] > 0
differences
""")

md(r"""
@QUALITY@

## 6 · One type to store, another to compute

Claim C32 in one line: a 4-bit layer is *dequantize, then multiply*. **Predict:** is a 4-bit layer faster or slower than a plain one?
""")
code(r"""
plain = torch.nn.Linear(576, 1536, bias=False)
four_bit = bnb.nn.Linear4bit(576, 1536, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
four_bit.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
four_bit = four_bit.to("cpu").train()
packed, absmax = quant.quantize_nf4(plain.weight.data)
W_hat = quant.dequantize_nf4(packed, quant.double_dequantize(*quant.double_quantize(absmax)), plain.weight.shape)
x = torch.randn(256, 576)
assert torch.equal(four_bit(x), x @ W_hat.T)                     # ours, on codes of our own

def milliseconds(f, repeats=30):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]

with torch.no_grad():
    speed = pd.DataFrame({"plain fp32, ms": [milliseconds(lambda: plain(x[:n])) for n in (16, 64, 256)],
                          "4-bit, ms": [milliseconds(lambda: four_bit(x[:n])) for n in (16, 64, 256)]}, index=pd.Index([16, 64, 256], name="tokens"))
speed.assign(slower=(speed["4-bit, ms"] / speed["plain fp32, ms"]).map("{:.1f} x".format))
""")

md(r"""
Equal to the bit, and slower: the lookup comes on top of the same product. It weighs less the more tokens share it. On a GPU it is the same story with other factors (claim C49, which the article leaves out): QLoRA buys memory with time.

### A trap: the model that was evaluated cannot be trained any more

On a CPU with AVX-512 BF16, bitsandbytes 0.50 repacks a 4-bit layer *for good* in its first `eval()` forward pass without gradients; `train()` does not undo it, and the repacked product has no backward pass. Nothing fails: layers below simply get no gradient, and the loss stays high. Measure the model before training, as this course tells you to, and QLoRA is broken. Here is the gradient that reaches a layer *below* a 4-bit one:
""")
code(r"""
def gradient_below(evaluated_first, repack=True):
    torch.manual_seed(0)
    below, above = torch.nn.Linear(16, 128), bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    above.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4")
    above = above.to("cpu")
    above.support_avx512bf16_for_cpu &= repack                   # what ftlab.pipeline.models.load sets to False
    if evaluated_first:
        with torch.no_grad():
            above.eval()(below(torch.randn(5, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        above.train()(below(torch.ones(5, 16))).square().mean().backward()
    return None if below.weight.grad is None else f"{below.weight.grad.norm():.3f}"

print("this CPU has AVX-512 BF16:", bool(bnb_f.has_avx512bf16()))
print("never evaluated:           ", gradient_below(False))
print("evaluated, then trained:   ", gradient_below(True))
print("the same, repacking is off:", gradient_below(True, repack=False))
assert (gradient_below(True) is None) == bool(bnb_f.has_avx512bf16()) and gradient_below(True, repack=False) == gradient_below(False)
""")

md(r"""
`load(..., quantization="nf4")` in this course switches the repacking off. Elsewhere, set `support_avx512bf16_for_cpu = False` on every `Linear4bit` before the first forward pass.

## 7 · A QLoRA step, by hand and by the library

By hand: take `micro`, replace every linear weight by its own NF4 round trip, and put notebook 02's LoRA on it. By the library: bitsandbytes' 4-bit layers under PEFT. The same adapter numbers in both. **Predict:** what will differ in the loss, in the gradients?
""")
code(r"""
tickets = data.triage_rows(DATA / "triage" / "train.jsonl")
ours, small_tokenizer = load(SMALL, dtype=torch.float32)
for name, module in ours.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
        packed, absmax = quant.quantize_nf4(module.weight.data)
        constants = quant.double_dequantize(*quant.double_quantize(absmax))
        module.weight.data = quant.dequantize_nf4(packed, constants, module.weight.shape)
targets = list(zoo["Llama-2-7B"].linears)                        # q, k, v, o, gate, up, down: every linear layer
lora.add_lora(ours, targets, r=16, lora_alpha=32)

theirs, _ = load(SMALL, dtype=torch.float32, quantization="nf4-double")
theirs = get_peft_model(theirs, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
adapter = {name: torch.randn_like(value) * 0.02 for name, value in lora.lora_state_dict(ours).items()}  # B = 0 would hide A's gradient
lora.load_lora_state_dict(ours, adapter)
theirs.load_state_dict({name.replace(".weight", ".default.weight"): value for name, value in adapter.items()}, strict=False)

row = data.render(tickets[0], small_tokenizer)
input_ids = torch.tensor([row.input_ids])
labels = torch.where(torch.tensor([row.completion_mask]).bool(), input_ids, -100)
losses = [m.train()(input_ids=input_ids, labels=labels).loss for m in (ours, theirs)]
for loss in losses:
    loss.backward()
print(f"loss by hand {losses[0].item():.6f}, PEFT + bitsandbytes {losses[1].item():.6f}")

library_grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
our_grads = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
worst = max((library_grads[f"base_model.model.{name}.weight"] - grad).norm() / grad.norm() for name, grad in our_grads.items())
torch.testing.assert_close(*losses)
assert worst < 1e-4
print(f"{len(our_grads)} gradients of lora_A and lora_B, largest relative difference {worst:.1e}")
frozen = theirs.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
print("frozen weight: stored as", frozen.dtype, "· gradient:", frozen.grad, "· adapter:", {str(p.dtype) for p in theirs.parameters() if p.requires_grad})
""")

md(r"""
The same loss and the same gradients: QLoRA **is** LoRA on a rounded base. The frozen weight has no gradient and needs no optimizer state; gradients flow *through* it, by dequantizing it once more in the backward pass.

Look at the adapter's dtype. "Adapters trained in full precision (BF16)" contradicts itself (claims C33, X3): bf16 has 8 significant bits, fp32 has 24. PEFT holds adapters in **fp32**. The paper computes in bf16. And TRL turns the adapters of a quantized model into **bf16**, as the next cell shows: three answers, and the only way to know is to print `p.dtype`.

### A short run

`micro` on 40 x 8 tickets, LoRA on the fp32 base and QLoRA on NF4 with double quantization. **Predict:** how far apart will the curves be?
""")
code(r"""
validation = data.triage_rows(DATA / "triage" / "validation.jsonl")[:32]
runs, held_out = {}, {}
for name in ("none", "nf4-double"):
    recipe = Recipe(model=SMALL, quantization=name, precision="fp32", learning_rate=3e-3, batch_size=8, max_steps=STEPS, warmup_steps=5, logging_steps=2)
    runs[name] = train(recipe, tickets[: 8 * STEPS], folder=RUNS / name, on_log=lambda record: None)
    held_out[name] = evaluate.perplexity(runs[name].model, runs[name].tokenizer, validation).texts
    print(f"{name:10}  adapter", {str(p.dtype) for n, p in runs[name].model.named_parameters() if "lora_" in n},
          f" held-out loss {held_out[name]['nll'].sum() / held_out[name]['tokens'].sum():.4f} nats/token  ({runs[name].seconds:.0f} s)")
show.plot_curves(plt.subplots()[1], runs["none"].series("loss")[0], {"LoRA on fp32": runs["none"].series("loss")[1],
                 "QLoRA on NF4": runs["nf4-double"].series("loss")[1]}, "loss (nats/token)");
""")

md(r"""
@RUNS@

## 8 · Paged optimizers, honestly

The third idea of the paper, next to NF4 and double quantization (and a fourth that the article drops: adapters on *every* linear layer, claim C53). A paged optimizer keeps Adam's two moments in NVIDIA *unified memory*: an address that both GPU and CPU can see. While there is room, the pages stay on the GPU. At a spike, say one long batch with its activations, the driver evicts pages to main memory and brings them back when the optimizer step touches them. It is a safety net against one bad batch, not a way to train a model that never fits. The paper gives no table for it, one sentence only: at batch size 16, 65B on 48 GB ran as fast as with a regular optimizer (section 3).

Unified memory is CUDA's, so a CPU cannot do it. What does bitsandbytes do then, and *which* states does it page at all? Its own code says both:
""")
code("show.show_source(bnb.optim.optimizer.Optimizer8bit.get_state_buffer)")
code(r"""
device = "cuda" if torch.cuda.is_available() else "cpu"
big = torch.nn.Parameter(torch.randn(500, 512, device=device))   # 256,000 numbers: large enough to be paged
optimizers = {"AdamW, fp32": torch.optim.AdamW([big]), "AdamW8bit": bnb.optim.AdamW8bit([big]), "PagedAdamW8bit": bnb.optim.PagedAdamW8bit([big])}
for name, optimizer in optimizers.items():
    big.grad = torch.ones_like(big)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    tensors = [t for key, t in optimizer.state[big].items() if torch.is_tensor(t) and not key.startswith("qmap")]
    paged = sum(t.nbytes for t in tensors if getattr(t, "is_paged", False))
    print(f"{name:15} {sum(t.nbytes for t in tensors) / big.numel():.3f} bytes per parameter, {paged:,} of them paged on {device}")
    for message in {str(w.message) for w in caught if "aged" in str(w.message)}:
        print("   warning:", message)

rows = {}
for name in ("Llama-2-7B", "Llama-3-8B", "Llama-2-70B"):
    for r in (16, 64):
        sides = [r * side for shape in zoo[name].linears.values() for side in shape]
        rows[f"{name}, r = {r}"] = {"adapter tensors per block": len(sides), "of 100,000 numbers or more": sum(n >= 1e5 for n in sides),
                                    "share of the states that is paged": sum(n for n in sides if n >= 1e5) / sum(sides)}
pd.DataFrame(rows).T.style.format("{:.0f}").format("{:.0%}", subset=["share of the states that is paged"])
""")

md(r"""
On this machine: the warning, no page, and ordinary memory; the *8 bits* are real. (With a GPU the same cell prints the paged bytes.) And the table holds a surprise: bitsandbytes pages only tensors of 100,000 numbers or more, so with r = 16 a good part of a LoRA's optimizer state is never paged. Claim C41 holds, for CUDA; but for LoRA the states are small anyway, and the pages matter most in full fine-tuning.

## 9 · The trap: merging back into four bits

The adapter is trained, now merge it: $W + \Delta$. If the base is NF4, the sum must be *rounded to NF4 again*. **Predict:** the update is 2 % of the weight's length, NF4's rounding noise is 9 %. What is left of the update?

On paper, for a very small update: no weight moves past a threshold, so no code changes. But absmax is not rounded: the largest weight of each block of 64 moves freely, and only it. So **1/64 = 1.6 %** survives, and it drags its whole block along. `kept` is the share of the update that is still there (its projection), `error` what was done wrong, relative to the update.
""")
code(r"""
def random_update(weight, ratio, r=16):
    '''A random B A of rank r whose length is `ratio` times the weight's.'''
    delta = torch.randn(weight.shape[0], r) @ torch.randn(r, weight.shape[1])
    return delta * ratio * weight.norm() / delta.norm()

torch.manual_seed(0)
gaussian, up = torch.randn(512, 512), linear["model.layers.15.mlp.up_proj"]
ratios = [0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.07, 0.1, 0.14, 0.2]
kept = pd.DataFrame({
    name: {ratio: quant.kept_after_requantization(w, random_update(w, ratio)) for ratio in ratios}
    for name, w in (("normal weights", gaussian), ("SmolLM2, block 15, up_proj", up))})
assert all(abs(kept["normal weights"][ratio][0] - 1 / 64) < 0.006 for ratio in (0.002, 0.005, 0.01))
kept.map("kept {0[0]:.3f}, error {0[1]:.2f}".format).rename_axis("|Δ| / |W|").T
""")

md(r"""
Up to an update of about 2 % of the weight, **the merge keeps 1.6 % of it**, as predicted, with an error as large as the update: the adapter is gone. Around 5 % a quarter survives; only at 20 % nearly all does.

So how large *is* a trained update? Here are three: the QLoRA adapter of section 7, on the NF4 base that it was trained on; this course's triage adapter for SmolLM2 (three epochs, `data/triage_adapter`); and, from the LoRA paper's Table 7, $\|\Delta W_q\|/\|W_q\|$ = 6.91/61.95 = 11 % (r = 4) and 3.57/61.95 = 6 % (r = 64).
""")
code(r"""
def delta_of(layer):
    '''scaling * B A of a PEFT layer, fp32.'''
    return layer.scaling["default"] * layer.lora_B["default"].weight.detach().float() @ layer.lora_A["default"].weight.detach().float()

def adapted(model):
    return {name.removeprefix("base_model.model."): module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}

triage = adapted(PeftModel.from_pretrained(base, str(DATA / "triage_adapter")))
small_weights = {name: module.weight.detach() for name, module in load(SMALL, dtype=torch.float32)[0].named_modules() if isinstance(module, torch.nn.Linear)}
measured = []
for kind, weights_by_name, layers in (("micro, 40 QLoRA steps", small_weights, adapted(runs["nf4-double"].model)),
                                      ("SmolLM2, triage adapter", linear, {name: triage[name] for name in list(triage)[::9]})):
    for name, layer in layers.items():
        w, delta = weights_by_name[name], delta_of(layer)
        measured.append((kind, (delta.norm() / w.norm()).item(), quant.kept_after_requantization(w, delta)[0]))
measured = pd.DataFrame(measured, columns=["adapter", "ratio", "kept"])

figure, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(ratios, [kept["normal weights"][ratio][0] for ratio in ratios], color=show.REFERENCE, linestyle="--", label="random update, normal weights")
for (kind, rows), colour in zip(measured.groupby("adapter"), (show.REJECTED, show.POLICY)):
    ax.scatter(rows["ratio"], rows["kept"], s=14, color=colour, label=kind)
ax.axhline(1 / 64, color="black", linewidth=0.8)
ax.set(xscale="log", xlabel="|Δ| / |W|", ylabel="kept by a merge into NF4", ylim=(0, 1.05))
ax.legend(fontsize=8)
measured.groupby("adapter").agg(["min", "median", "max"])
""")

md(r"""
@TRAINED@

### What that does to the model

Seven ways to deploy, for both adapters: mean loss of the right answer on held-out tickets, lower is better. The first five start from the base that QLoRA trains on, $\hat W$ = NF4($W$); the last two from the original weights. PEFT's own `merge_and_unload` on bitsandbytes layers runs once beside ours. **Predict** the order, and whether the last row, which ends in NF4 too, is as bad as the third.
""")
code(r"""
def nf4(w):
    packed, absmax = quant.quantize_nf4(w)
    return quant.dequantize_nf4(packed, quant.double_dequantize(*quant.double_quantize(absmax)), w.shape)

WAYS = {                                                          # w original, q = nf4(w), d the update
    "NF4 base, no adapter": lambda w, q, d: q,
    "NF4 base + adapter, unmerged": lambda w, q, d: q + d,
    "merged back into NF4": lambda w, q, d: nf4(q + d),
    "merged into the dequantized base, bf16": lambda w, q, d: (q + d).bfloat16().float(),
    "merged into the dequantized base, then int8": lambda w, q, d: quant.dequantize_absmax(*quant.quantize_absmax(q + d)),
    "merged into the original weights": lambda w, q, d: w + d,
    "merged into the original weights, then NF4": lambda w, q, d: nf4(w + d),
}

def held_out_loss(model, tokenizer, rows):
    texts = evaluate.perplexity(model, tokenizer, rows).texts
    return texts["nll"].sum() / texts["tokens"].sum()

def deploy(model, tokenizer, deltas, rows):
    '''The loss of each way; the model gets its own weights back at the end.'''
    layers = {name: model.get_submodule(name).weight for name in deltas}
    w = {name: weight.data for name, weight in layers.items()}
    q = {name: nf4(value) for name, value in w.items()}
    losses = {}
    for way, merged in WAYS.items():
        for name, weight in layers.items():
            weight.data = merged(w[name], q[name], deltas[name])
        losses[way] = held_out_loss(model, tokenizer, rows)
    for name, weight in layers.items():
        weight.data = w[name]
    return losses

micro_deltas = {name: delta_of(layer) for name, layer in adapted(runs["nf4-double"].model).items()}
deployed = pd.DataFrame({
    "micro, QLoRA run": deploy(load(SMALL, dtype=torch.float32)[0], small_tokenizer, micro_deltas, validation),
    "SmolLM2, triage adapter": deploy(load(MODEL)[0], tokenizer, {name: delta_of(layer) for name, layer in triage.items()}, validation[:8])})

on_nf4 = PeftModel.from_pretrained(load(SMALL, dtype=torch.float32, quantization="nf4-double")[0], str(RUNS / "nf4-double" / "adapter")).eval()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    peft_merged = held_out_loss(on_nf4.merge_and_unload(), small_tokenizer, validation)
print("PEFT says:", *{str(w.message) for w in caught if "4-bit" in str(w.message)})
print(f"merged back into NF4 by PEFT and bitsandbytes {peft_merged:.4f}, by us {deployed.loc['merged back into NF4', 'micro, QLoRA run']:.4f}")
assert abs(peft_merged - deployed.loc["merged back into NF4", "micro, QLoRA run"]) < 1e-3
deployed.style.format("{:.4f}")
""")

md(r"""
@DEPLOY@

**The right order** (claims C46, C95): keep the adapter; dequantize the base that it was *trained on* (or take the 16-bit original and measure); merge in 16 bits; evaluate; only then quantize the *merged* weights with the format of your server (GGUF, AWQ), and evaluate again. Or do not merge at all: vLLM and llama.cpp serve adapters unmerged.

## 10 · Will it fit? Counting before buying

Memory in training is of two kinds. **States** are held all the time: weights, gradients, optimizer. The papers count 16 bytes per *trained* parameter (2 + 2 in 16 bits, and 12 for Adam: a 32-bit copy and two moments) and 2, 1 or about 0.52 per *frozen* one. What comes and goes, activations, logits, temporaries, depends on batch and length. `memory.states` counts the first by the papers' rule; `memory.estimate` predicts the *peak* of a step as the libraries really do it. The article's table (claims C42-C45), recomputed for Llama-2 with r = 16 on all linear layers, 2,048 tokens, checkpointing. **Predict** which row is wrong by a factor of two.
""")
code(r"""
def compared(method, quantization, article):
    '''One row of the article's table, in GB: states by the papers' rule, peak as the libraries do it.'''
    recipe = Recipe(r=0 if method == "full" else 16, quantization=quantization, batch_size=1, max_length=2048, gradient_checkpointing=True)
    row = {}
    for name, said in zip(("Llama-2-7B", "Llama-2-13B", "Llama-2-70B"), article):
        row |= {(name, "article"): said, (name, "states"): memory.states(zoo[name], recipe) / 1e9, (name, "peak, b = 1"): memory.estimate(zoo[name], recipe).peak_bytes / 1e9}
    return row

articles = pd.DataFrame({"full fine-tuning": compared("full", "none", (120, 220, 1200)), "LoRA, 16-bit base": compared("lora", "none", (30, 55, 300)),
                         "QLoRA": compared("lora", "nf4-double", (10, 18, 48))}).T
lora_states = articles.loc["LoRA, 16-bit base"].xs("states", level=1)
assert [round(v, 1) for v in lora_states] == [14.1, 27.0, 141.3] and [round(v, 1) for v in articles.loc["QLoRA"].xs("states", level=1)] == [4.5, 8.2, 39.7]
display(articles.style.format("{:.1f}"))

llama2 = [zoo[name] for name in ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B")]
fp32_base = [(4 * a.params + 16 * a.lora_params(16)) / 1e9 for a in llama2]
pure_16_bit = [8 * a.params / 1e9 for a in llama2]
print("LoRA on an fp32 base, states in GB:     ", [round(v, 1) for v in fp32_base])
print("full fine-tuning, everything in 16 bits:", [round(v, 1) for v in pure_16_bit])
with_16_bit = memory.estimate(zoo["Llama-2-7B"], Recipe(r=16, batch_size=1, max_length=2048, gradient_checkpointing=True)).peak_bytes
longer = memory.estimate(zoo["Llama-2-7B"], Recipe(r=16, quantization="nf4-double", batch_size=4, max_length=2048, gradient_checkpointing=True)).peak_bytes
print(f"LoRA 7B, 16-bit base, one row of 2,048: peak {with_16_bit / 1e9:.1f} GB;   QLoRA 7B, four rows: peak {longer / 1e9:.1f} GB")
""")

md(r"""
@TABLE@

### "Reducing memory by 4x"

16 / 4.127 = 3.88 is the ratio for the *linear layers*. Embeddings, head and norms stay in 16 bits (or become 32: `prepare_model_for_kbit_training` casts them up, see the last column). **Predict** the ratio for Llama-3-8B, whose vocabulary has 128,256 entries.
""")
code(r"""
def ratios_of(a):
    '''Times smaller than 16 bits: linear layers, whole model, LoRA states, and the predicted peaks of two real recipes.'''
    small = a.linear_params * quant.bits_per_param(double=True) / 8 + 2 * (a.params - a.linear_params)
    lora16, qlora = (Recipe(r=16, quantization=q, batch_size=1, max_length=512, gradient_checkpointing=True) for q in ("none", "nf4-double"))
    peaks = [memory.estimate(a, recipe).peak_bytes for recipe in (lora16, qlora)]
    return {"vocabulary": a.vocab_size, "linear layers": 16 / quant.bits_per_param(double=True), "whole model": 2 * a.params / small,
            "states, LoRA / QLoRA": memory.states(a, lora16) / memory.states(a, qlora), "peak, LoRA / QLoRA": peaks[0] / peaks[1]}

names = ["Llama-2-7B", "Llama-2-70B", "Llama-3-8B", "Qwen2.5-7B", "Llama-3.2-1B", "SmolLM2-135M"]
smaller = pd.DataFrame({name: ratios_of(zoo[name]) for name in names}).T
assert [round(v, 2) for v in smaller["whole model"][:5]] == [3.49, 3.79, 2.82, 2.75, 2.41]
smaller.style.format("{:.2f}").format("{:,.0f}", subset=["vocabulary"])
""")

md(r"""
@RATIOS@

### 65B on one 48 GB card, and what stood there before

The paper: "from more than 780 GB to less than 48 GB" (section 1). Can we get both numbers, and the article's "4-8 A100s"?
""")
code(r"""
big = zoo["LLaMA-1 65B"]
r64 = big.lora_params(64)
nf4 = memory.states(big, Recipe(r=16, quantization="nf4-double")) - 16 * big.lora_params(16)
print(f"weights in NF4 + double quantization {nf4 / 1e9:.1f} GB, adapters r = 64: {r64 / 1e6:.1f} million parameters, {2 * r64 / 1e9:.1f} GB in bf16")
print(f"full fine-tuning: 12 bytes x {big.params / 1e9:.2f} billion = {12 * big.params / 1e9:.0f} GB (the paper's 780), 16 bytes = {16 * big.params / 1e9:.0f} GB")
print(f"780 GB / 80 GB = {780 / 80:.2f}: at least 10 A100-80GB, before one activation; 16-bit LoRA: states {memory.states(big, Recipe(r=16)) / 1e9:.0f} GB")

card48 = memory.Gpu("48 GB", 48 * 2**30, 0.92, True, "A6000, L40S: 48 GiB")
on48 = {}
for name, r in (("LLaMA-1 65B", 16), ("LLaMA-1 65B", 64), ("Llama-2-70B", 16), ("Llama-3-70B", 16), ("Llama-3-70B", 64)):
    recipe = Recipe(r=r, quantization="nf4-double", optimizer="paged_adamw_8bit", batch_size=1, max_length=512, gradient_checkpointing=True)
    estimate = memory.estimate(zoo[name], recipe)
    on48[f"{name}, r = {r}"] = {"peak GB, 1 x 512 tokens": estimate.peak_bytes / 1e9,
                                "usable GB": card48.usable_bytes / 1e9, "longest row that fits": memory.max_length(card48, zoo[name], recipe)}
pd.DataFrame(on48).T.style.format("{:.1f}").format("{:,.0f}", subset=["longest row that fits"])
""")

md(r"""
@SIXTYFIVE@

### How good is this calculator?

A calculator without a published error is a rumour. `data/results/memory_error.json` holds estimate / measured for many configurations, and `data/results/memory_error.py` makes it again.
""")
code(r"""
published = json.loads((DATA / "results" / "memory_error.json").read_text(encoding="utf-8"))["fake"]
rules = {"ours": "ftlab.memory", "eleuther": "EleutherAI's formula", "llama_factory": "LLaMA-Factory's table", "accelerate": "accelerate estimate-memory"}
accuracy = pd.DataFrame(published["summary"]).T.rename(index=rules)
assert accuracy.loc["ftlab.memory", "median_absolute_percent"] <= 2 and accuracy.loc["ftlab.memory", "worst_absolute_percent"] <= 8
assert accuracy.loc["ftlab.memory", "lowest_percent"] >= -3
accuracy.style.format("{:+.1f}").format("{:.0f}", subset=["configurations"])
""")
md(r"""
@ERRORS@

### Will it fit? Try it

Sliders for the architecture, the method, batch, length, checkpointing and the card. Bars by phase, because the peak is the *highest phase*, never the sum.
""")
code(r"""
widgets.will_it_fit("Llama-3-8B", gpu="RTX 4090")
""")
code(r"""
llama3, card = zoo["Llama-3-8B"], memory.gpus()["RTX 4090"]      # the same, in one line of Python each
recipe = Recipe(quantization="nf4-double", gradient_checkpointing=True, batch_size=1, max_length=2048)
figure, ax = plt.subplots(figsize=(6, 3.2))
widgets.plot_phases(ax, memory.estimate(llama3, recipe), card.usable_bytes)
print("fits:", memory.fits(card, llama3, recipe), "· longest row:", memory.max_length(card, llama3, recipe), "tokens · largest batch:", memory.max_batch(card, llama3, recipe))
""")
