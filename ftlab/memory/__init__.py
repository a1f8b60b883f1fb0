"""Predict the peak bytes of a training step, from the settings by the names that the libraries have for them.

    estimate("Llama-3-8B", r=16, load_in_4bit=True, per_device_train_batch_size=4, max_length=2048).peak_bytes

Memory rises and falls within a step, so the peak is the *maximum over the moments*, never a sum of things that do not
live at the same time. The formulas follow what transformers, PEFT, TRL, bitsandbytes and autocast really allocate. Not
counted: the CUDA context (0.3-0.6 GB) and cuBLAS workspaces, for which a GPU's `usable` share in
data/gpus/gpus.json allows, and what the caching allocator reserves but does not use: `verdict` says
"may fit" where that decides. Other stacks than TRL's: estimate(..., preset="Unsloth"), `presets()`.

In reading order: architecture, settings, activations, predict. Sources: Korthikanti et al. 2022,
arXiv:2205.05198 (activations); QLoRA, arXiv:2305.14314 (NF4); ZeRO, arXiv:1910.02054 (16 bytes a parameter, sharding).
"""

from ftlab.memory.architecture import Architecture, architectures
from ftlab.memory.predict import (
    KINDS,
    PHASES,
    VERDICTS,
    Gpu,
    Memory,
    Moment,
    estimate,
    fits,
    gpus,
    margin,
    max_batch,
    max_length,
    verdict,
)
from ftlab.memory.settings import presets, roles, settings_of, states

__all__ = [
    "KINDS",
    "PHASES",
    "VERDICTS",
    "Architecture",
    "Gpu",
    "Memory",
    "Moment",
    "architectures",
    "estimate",
    "fits",
    "gpus",
    "margin",
    "max_batch",
    "max_length",
    "presets",
    "roles",
    "settings_of",
    "states",
    "verdict",
]
