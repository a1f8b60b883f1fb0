"""What you do at work: thin over transformers, peft, trl, unsloth, bitsandbytes and llama.cpp."""
