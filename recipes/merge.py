"""Merge an adapter into the weights that it was trained on, and check that nothing changed.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*"
    python merge.py --adapter runs/qlora_8b/adapter --out runs/qlora_8b/merged
    python evaluate.py --model runs/qlora_8b/merged --file test.jsonl --out merged.json \
        --against tuned.json

An adapter of qlora_8b.py was trained on rounded weights. So its base is rounded to 4 bits again
and turned back into 16-bit numbers (record.json beside the adapter says so): merged into 4-bit
weights, most of a small update would be lost, and the original weights it has never seen.
--tiny needs an adapter of sft.py --tiny or qlora_8b.py --tiny.
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

GPU = torch.cuda.is_available()
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)
DTYPE = torch.bfloat16 if BF16 else torch.float16 if GPU else torch.float32


def base_of(adapter):
    """The base that the adapter was trained on: its name, its revision, whether it was in 4 bits.

    sft.py and qlora_8b.py leave the last two in the adapter's record.json.
    """
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        sys.exit(f"no adapter_config.json in {adapter}: is it the folder of an adapter?")
    config = json.loads((folder / "adapter_config.json").read_text())
    record = folder / "record.json"
    record = json.loads(record.read_text()) if record.is_file() else {}
    revision = record.get("revision") or config.get("revision")
    return config["base_model_name_or_path"], revision, record.get("load_in_4bit", False)


def load(name, revision, load_in_4bit):
    how = {"dtype": DTYPE, "device_map": {"": torch.cuda.current_device() if GPU else "cpu"}}
    if load_in_4bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, use_safetensors=True, **how
        )
    except OSError as error:
        if "gated" in str(error):
            sys.exit(
                f"{name} is gated: accept its licence on https://huggingface.co/{name}, then "
                "log in with `hf auth login`"
            )
        sys.exit(f"cannot load {name} at {revision}: {' '.join(str(error).split())}")
    return model.dequantize() if load_in_4bit else model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="the folder that training has written")
    parser.add_argument("--out", required=True, help="a new folder for the merged model")
    parser.add_argument("--text", default="How many orders were late in Pune in March?")
    asked = parser.parse_args(arguments)
    if Path(asked.out).exists():
        sys.exit(f"{asked.out} is there already: name a new folder")

    name, revision, load_in_4bit = base_of(asked.adapter)
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(asked.adapter)
    model = PeftModel.from_pretrained(load(name, revision, load_in_4bit), asked.adapter).eval()
    ids = tokenizer(asked.text, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        with model.disable_adapter():
            base = model(**ids).logits.float().log_softmax(-1)
        before = model(**ids).logits.float().log_softmax(-1)
    merged = model.merge_and_unload(safe_merge=True)  # safe: refuses nan and infinity
    with torch.inference_mode():
        after = merged(**ids).logits.float().log_softmax(-1)
    moved, rounded = (before - base).abs().max().item(), (after - before).abs().max().item()
    print(f"largest change of a log-probability: by the adapter {moved:.4f} nats, by the merge")
    print(f"{rounded:.4f} (rounding; it should be far smaller)")
    if moved == 0:
        sys.exit(f"{asked.adapter} changes nothing: was it trained?")
    if rounded > moved / 2:
        sys.exit("the merge loses what the adapter has learned: nothing is written")
    merged.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    record = {
        "recipe": Path(__file__).stem,
        "card": torch.cuda.get_device_name() if GPU else None,
        "date": date.today().isoformat(),
        "base": name,
        "revision": revision,
        "load_in_4bit": load_in_4bit,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "seconds": time.perf_counter() - begin,
        "moved_nats": moved,
        "rounded_nats": rounded,
    }
    Path(asked.out, "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
