# ---------------------------------------------------------------- time and vendors
md(r"""
## 11 · Hours, vendors, quality: what can only be quoted

"Llama 3 8B on a single 3090/4090 in a few hours" (claim C52): memory you have just computed; hours are tokens divided by tokens per second. The only throughputs here are published ones (LLaMA-Factory's wiki, one A100, Llama-2-7B, April 2024: QLoRA 2,415 tokens/s with transformers, 3,726 with Unsloth). **Predict:** hours for 10,000 examples of 500 tokens, three epochs.
""")
code(r"""
hours = pd.DataFrame({f"{tokens / 1e6:.0f} million tokens": {f"{speed:,} tokens/s": f"{tokens / speed / 3600:.1f} h" for speed in (2415, 3726)}
              for tokens in (10_000_000, 10_000 * 500 * 3, 100_000_000)})
display(hours)
print(f"Unsloth against transformers, that wiki: {3726 / 2415:.2f} times as fast, {1 - 7 / 9:.0%} less memory (9 -> 7 GB)")
print(f"LoRA against QLoRA, same wiki: 2,392 and 2,415 tokens/s: {2415 / 2392 - 1:+.0%} for QLoRA; memory 18 -> 9 GB: {18 / 9:.0f} x")
print(f"LoRA against QLoRA as quoted by secondary notes on Raschka's experiments: 1.85 h and 2.79 h, {2.79 / 1.85 - 1:+.0%}; 21.33 and 14.18 GB, {14.18 / 21.33 - 1:+.0%}")
print(f"MMLU, mean over four sizes and two data sets, QLoRA paper Table 4: bf16 53.0, NF4 + double quantization 53.1: {53.1 - 53.0:+.1f}")
""", LOCK)

md(r"""
Read baselines, not factors. "2x faster, 50 % less" (C50, C51) is a vendor's number; the independent one above is about one and a half times and a fifth less, and a factor against *what* decides everything. The notes on Raschka's runs speak of 39 % more time; the hours they quote make it 51 % (original not opened here). QLoRA was equally fast in one place and half again as slow in another: so measure on your machine, as section 6 did.

On **quality** (C47, C48): the QLoRA paper found no loss on MMLU (above) and none on GLUE and Super-NaturalInstructions (its Table 3). Tülu 2 (arXiv:2311.10702) found that QLoRA falls behind *full* fine-tuning on long open-ended answers, by about 10 % on average at 7B and 3 % at 70B. "Negligible for most tasks" is true of tests with short answers and open for long ones; for "bf16 is slightly better on complex tasks" no direct measurement of LoRA against QLoRA was found. And a small model rounds worse than a large one: section 5.

## Exercises

Each runs as shipped, because it starts from the answer. Replace the lines marked `<-` by your own code.

1. **(easy) Bits.** Constants in fp16 instead of fp32, no double quantization: how many bits a weight in blocks of 32 and of 64?
2. **(medium) FP4 E3M0.** Three exponent bits, no mantissa: ± powers of two from 1 down to 1/64, and zero. Build its 15 levels, ascending. Look at its error, then at its perplexity in the paper's table (29.48, better than Int4's and E2M1's). What do you conclude about choosing a format by its error on normal weights?
3. **(medium) A fair fight.** With fp16 constants, NF4 in blocks of 32 and asymmetric INT4 in blocks of 64 both cost 4.5 bits. Who wins?
4. **(hard) The merge in closed form.** Why 1/64? Write `my_kept(weight, delta)` for a *tiny* update without quantizing twice: no code changes, and each block's absmax grows by the update of its largest weight, in that weight's direction.
5. **(open) Your card.** Take the widget's recipe for your own GPU, train one step there, and hold `torch.cuda.max_memory_allocated()` against `memory.estimate`.
""")
code(r"""
my_bits = lambda block_size: 4 + 16 / block_size                  # <- exercise 1
check.close(my_bits(32), 4.5, hint="16 bits of constant are shared by block_size weights, not by 64.")
check.close(my_bits(64), 4.25, hint="Did you divide by the number of blocks instead of the block size?")

powers = 2.0 ** torch.arange(-6, 1)
my_e3m0 = torch.cat([-powers.flip(0), torch.zeros(1), powers])    # <- exercise 2
check.shape(my_e3m0, (15,), hint="+0 and -0 are one level.")
values = quant.dequantize_blockwise(*quant.quantize_blockwise(normal, my_e3m0, 64), my_e3m0, 64)
check.close(((values - normal) ** 2).mean(), 0.0353, rtol=0.02, hint="The largest level is 1, the smallest above zero 1/64.")
print(f"E2M1 {errors.loc[64, 'FP4 E2M1']:.4f}, INT4 symmetric {errors.loc[64, 'INT4 symmetric']:.4f}: E3M0 is the worst here, and not in the paper's perplexities")
""")
code(r"""
my_winner = "NF4" if errors.loc[32, "NF4"] < errors.loc[64, "INT4 asymmetric"] else "INT4 asymmetric"   # <- exercise 3
check.equal(my_winner, "NF4", hint="Compare at equal bits, not at equal block size: which rows of `errors` cost 4.5 bits each?")

def my_kept(weight, delta):                                       # <- exercise 4: the body
    levels = quant.nf4_levels()[quant.quantize_blockwise(weight, quant.nf4_levels(), 64)[0].int()].view(-1, 64)
    moved = delta.view(-1, 64) * levels                           # the update in the direction of each weight
    growth = moved.masked_fill(levels.abs() < 1, -torch.inf).amax(1, keepdim=True)
    survived = (levels * growth).view(weight.shape)               # the whole block grows with its largest weight
    return ((survived * delta).sum() / delta.norm() ** 2).item()

tiny_update = random_update(gaussian, 0.001)
check.close(my_kept(gaussian, tiny_update), quant.kept_after_requantization(gaussian, tiny_update)[0], atol=2e-3,
            hint="Weights whose level is 1 or -1 carry the constant; the others follow it.")
""")

md(r"""
## Interview questions

Say it aloud first; the evidence is in the cell named.

- **What is QLoRA and how does it differ from LoRA?** The same LoRA on a base that is stored in 4 bits and dequantized at each use: NF4, double quantization, paged optimizers, and adapters on every linear layer. *Section 7: the gradients are equal to LoRA's on the rounded weights.*
- **Why NF4 and not INT4?** Its levels are normal quantiles, so more information per code and less error at equal bits; but asymmetric INT4 has less error at equal block size up to 64. *Section 4.*
- **4-bit means 4x less memory, right?** 3.88 for linear layers against 16 bits, 2.8 for the weights of Llama-3-8B, less for the peak of a step. *Section 10, "Reducing memory by 4x".*
- **Is QLoRA faster?** No: the same products plus a lookup. It saves memory and costs time. *Section 6.*
- **What does double quantization save?** 0.5 - 0.127 = 0.373 bits a weight; 3 GB at 65B; the error hardly moves. *Section 3.*
- **Are the adapters in full precision?** Depends who you ask: PEFT fp32, TRL with a quantized base bf16, the paper bf16. *Section 7, printed.*
- **Can you merge a QLoRA adapter?** Into 16 bits, yes. Into NF4 a small update is rounded away; 1/64 of it is left. *Section 9.*
- **Paged optimizers?** Adam's states in unified memory as a safety net for spikes; CUDA only; bitsandbytes pages only tensors of 100,000 numbers or more. *Section 8.*
- **Can I fine-tune 70B on 48 GB?** Short rows, batch 1, checkpointing: Llama-2-70B yes, Llama-3-70B is tighter because of its vocabulary. *Section 10, exercise 5.*
- **Your QLoRA loss does not fall, on a CPU server. First suspicion?** The model was evaluated before training and bitsandbytes repacked it. *Section 6.*

## Every claim of the article, answered

| claim | verdict | where |
|---|---|---|
| C32 4-bit base + LoRA adapters | holds; saves memory, not arithmetic | section 6: equal to dequantize-then-multiply |
| C33, X3 "full precision", "BF16" | contradiction; fp32 (PEFT), bf16 (TRL, paper) | section 7: `p.dtype` |
| C34 "by 4x" | 3.88 for linear layers; 2.4 to 3.8 for whole models; less against LoRA's states | section 10 |
| C35 65B on 48 GB | holds: batch 1, short rows, checkpointing | section 10: states and predicted peak |
| C36 "4-8 A100s" before | wrong for full fine-tuning: at least 10 of 80 GB | section 10 |
| C37 NF4 better than INT4 | conditional: against symmetric yes; asymmetric wins in blocks of 32 and 64, not at equal bits | section 4 |
| C38 made for normal weights | holds; 7 negative levels, zero, 8 positive; not of least error | sections 2, 5 |
| C39 saves 0.4 bits | holds, rounded: 0.373 | section 3 |
| C40 quantizes the constants | holds | section 3: equal to bitsandbytes; error hardly moves |
| C41 paged optimizers move states to the CPU | holds on CUDA; falls back on a CPU | section 8 |
| C42 full fine-tuning 120 / 220 / 1,200 GB | about right; the label "FP16" is not | section 10 |
| C43, X1 LoRA 30 / 55 / 300 GB | wrong by two: the fp32-base numbers | section 10 |
| C44 QLoRA 7B 10, 13B 18 GB | comfortable, not minimal | section 10 |
| C45, X7 70B on 48 GB | conditional: vocabulary, length, optimizer | section 10, exercise 5 |
| C46 (left out) merge, then deploy | only in 16 bits; into NF4 1/64 of a small update is left | section 9 |
| C47 quality difference negligible | conditional | sections 7, 11 |
| C48 bf16 LoRA slightly better | no direct source found | section 11 |
| C49 (left out) QLoRA is slower | measured on a CPU; published figures disagree | sections 6, 11 |
| C50, C51 Unsloth 2x, 50 % less | vendor's; independent: 1.54x, 22 % less | section 11 |
| C52 8B on a 24 GB card in a few hours | memory yes; hours depend on tokens | sections 10, 11 |
| C53 the key ideas | hold; a fourth is missing: adapters on every linear layer | section 8 |

## Five facts to take along

@FACTS@

**References.** Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, *QLoRA*, arXiv:2305.14314: section 3 (NF4, double quantization, paged optimizers, Eq. 5 and 6), Table 2 (perplexity by type), Tables 3 and 4 (quality), Appendix E (the 16 values). Dettmers et al. 2022, *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861, section 2 (blocks, dynamic type). Dettmers et al. 2022, *LLM.int8()*, arXiv:2208.07339, sections 2 and 3. Hu et al. 2021, *LoRA*, arXiv:2106.09685, section 4.2 and Table 7. Ivison et al. 2023, *Camels in a Changing Climate* (Tülu 2), arXiv:2311.10702. Korthikanti et al. 2022, arXiv:2205.05198 (activation memory). Rajbhandari et al. 2019, *ZeRO*, arXiv:1910.02054, section 3 (16 bytes per parameter). LLaMA-Factory, README (hardware table) and wiki (performance comparison, April 2024). Unsloth, documentation (requirements). bitsandbytes 0.50, `optim/optimizer.py`, `nn/modules.py`. TRL 1.12, `trainer/sft_trainer.py`.
""")
