# One run in one file, alone or under torchrun or accelerate launch: python sft.py --config sft.yaml
from dataclasses import dataclass

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser


@dataclass
class Files:
    model: str
    rows: str
    expects: str = "1 NO"  # processes, and what accelerate calls them


files, args = TrlParser((Files, SFTConfig)).parse_args_and_config()  # --config, or by name
set_seed(args.seed)
dtype = torch.bfloat16 if args.bf16 else torch.float32  # of the frozen base; bf16 is SFTConfig's default
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(files.model, dtype=dtype),
    args=args,
    train_dataset=load_dataset("json", data_files=files.rows, split="train"),
    processing_class=AutoTokenizer.from_pretrained(files.model),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
found = f"{trainer.accelerator.num_processes} {trainer.accelerator.distributed_type.value}"
assert found == files.expects, f"got {found}, wanted {files.expects}"  # before the first step
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
if trainer.is_fsdp_enabled:  # checkpoints lie in shards; the adapter is written whole
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
trainer.save_model()
trainer.save_state()
parts = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters()]
print(f"{type(trainer.model_wrapped).__name__} holds {sum(p.nbytes for p in parts) / 1e6:.2f} MB")
