"""Merge an adapter into the weights that it was trained on, and check that nothing changed.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*"
    python merge.py --adapter runs/qlora_8b/adapter --out runs/qlora_8b/merged
    python evaluate.py --model runs/qlora_8b/merged --file test.jsonl --out merged.json \
        --against tuned.json

An adapter of qlora_8b.py was trained on rounded weights. So its base is rounded to 4 bits again
and turned back into 16-bit numbers (record.json beside the adapter says so): merged into 4-bit
weights, most of a small update would be lost, and the original weights it has never seen.
--device cpu merges where the card has no room for the model in 16 bits. There is no --tiny: give
it the adapter of sft.py --tiny or of qlora_8b.py --tiny.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common import base_of, loading, now, write_record

GPU = torch.cuda.is_available()
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)
DTYPE = torch.bfloat16 if BF16 else torch.float16 if GPU else torch.float32


def load(name, revision, load_in_4bit, device):
    """The weights that the adapter was trained on, in 16 bits."""
    how = {"revision": revision, "dtype": DTYPE, "device_map": {"": device}}
    if load_in_4bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        )
    model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **how)
    return model.dequantize() if load_in_4bit else model


def logps(model, ids):
    return model(**ids).logits.float().log_softmax(-1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="the folder that training has written")
    parser.add_argument("--out", required=True, help="a new folder for the merged model")
    parser.add_argument("--device", default="cuda" if GPU else "cpu")
    parser.add_argument("--text", default="How many orders were late in Pune in March?")
    asked = parser.parse_args(arguments)
    if Path(asked.out).exists():
        sys.exit(f"{asked.out} is there already: name a new folder")

    name, revision, load_in_4bit = base_of(asked.adapter)
    begin = now()
    tokenizer = AutoTokenizer.from_pretrained(asked.adapter)
    with loading(name, revision):
        base = load(name, revision, load_in_4bit, asked.device)
    model = PeftModel.from_pretrained(base, asked.adapter).eval()
    ids = tokenizer(asked.text, return_tensors="pt").to(model.device)
    with torch.inference_mode(), model.disable_adapter():
        without = logps(model, ids)
    with torch.inference_mode():
        before = logps(model, ids)
    merged = model.merge_and_unload(safe_merge=True)  # safe: refuses nan and infinity
    with torch.inference_mode():
        after = logps(merged, ids)
    moved, rounded = (before - without).abs().max().item(), (after - before).abs().max().item()
    print(f"largest change of a log-probability: by the adapter {moved:.4f} nats, by the merge")
    print(f"{rounded:.4f} (rounding; it should be far smaller)")
    if moved == 0:
        sys.exit(f"{asked.adapter} changes nothing: was it trained?")
    if rounded > moved / 2:
        sys.exit("the merge loses what the adapter has learned: nothing is written")
    merged.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    record = write_record(
        Path(asked.out, "record.json"),
        recipe=Path(__file__).stem,
        base=name,
        revision=revision,
        load_in_4bit=load_in_4bit,
        seconds=now() - begin,
        moved_nats=moved,
        rounded_nats=rounded,
    )
    print(record)


if __name__ == "__main__":
    main()
