"""Notebook 03 knows no model: its GPU file and its training and merging run on a CPU with a Llama-3-shaped base."""

import re

from notebooks import changed, code_of


def test_the_file_for_a_gpu_trains_in_4_bits_and_merges_into_what_it_trained_on(llama, beside_data):
    code = code_of("03_qlora_memory")
    changes = {'"Qwen/Qwen2.5-7B-Instruct"': repr(str(llama)), 'split="train")': 'split="train[:16]")'}
    changes |= {"learning_rate=2e-4": "learning_rate=2e-2"}  # four steps are to be seen
    program = changed(code["copy-train"] + "\n" + code["copy-merge"], changes)
    assert re.findall(r"^(MODEL|OUT)\b", program, re.M) == ["MODEL"] and "cuda" in program  # one file for both
    proof = """
exact = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
def load(**kind):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, **kind)
def merge(base):
    return PeftModel.from_pretrained(base.float(), f"{OUT}/adapter").merge_and_unload()
served = AutoModelForCausalLM.from_pretrained(f"{OUT}/merged", dtype=torch.float32)
trained_on = load(quantization_config=exact)
print("KINDS", type(served.model.layers[0].mlp.up_proj).__name__, type(trained_on.model.layers[0].mlp.up_proj).__name__)
def off(model):
    pairs = zip(served.named_parameters(), model.named_parameters())
    return sum((a - b).square().sum() for (name, a), (_, b) in pairs if "_proj" in name).sqrt().item()
print("OFF", off(merge(trained_on.dequantize())), off(merge(load())), off(load(quantization_config=exact).dequantize()))
"""
    printed = beside_data(program + proof)
    assert "KINDS Linear Linear4bit" in printed
    right, into_the_original, without_adapter = map(float, re.search(r"OFF (\S+) (\S+) (\S+)", printed).groups())
    assert 20 * right < into_the_original and 5 * right < without_adapter  # what is left of `right` is bf16's rounding


def test_training_and_merging_run_with_a_llama_3_shaped_base(llama, beside_data):
    code = code_of("03_qlora_memory")
    code["dial"] = re.sub(r"^(MODEL|SMALL) = .*$", rf"\1 = {str(llama)!r}", code["dial"], flags=re.M)
    code["dial"] = changed(code["dial"], {"40, 8, 3e-3": "6, 8, 1e-2"})
    assert code["merge"].count('["prompt"][:40], 40)') == 2
    code["merge"] = code["merge"].replace('["prompt"][:40], 40)', '["prompt"][:40], 8)')
    names = ("imports", "dial", "load", "train", "equal", "prepare", "merge")
    printed = beside_data("\n".join(code[name] for name in names))
    assert "TRL's adapters are {torch.bfloat16}" in printed
    assert float(re.search(r"relative difference (\S+)$", printed, re.M)[1]) < 1e-4
    off = {name: float(most) for name, most in re.findall(r"^(.+): \d+ of 40 .* logits off by (\S+)", printed, re.M)}
    assert off["dequantized base"] < 1e-3 < 0.01 < min(off["original weights"], off["4-bit base"])
    assert re.search(r"^dequantized base: 40 of 40 answers the same", printed, re.M)
