"""ftlab: what a fine-tuning notebook plugs into the field's own libraries, and nothing that stands before them.

You write `SFTTrainer`, `LoraConfig`, `load_dataset`, `OpenAI` yourself. These names are what cells use every day; each
is fetched from its module at first use, so that `import ftlab` loads nothing heavy and Unsloth can come first.
"""

import importlib
import logging
import os

# They complain about missing GPU kernels on every CPU; the last one, about checkpoints saved within one second.
for _noisy in ("torchao", "torch.utils._pytree", "bitsandbytes", "transformers.trainer_utils"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of tokenizing a few hundred rows

_NAMES = {
    "models": ("model_path",),
    "cpu": ("speed_up",),
    "callbacks": ("LiveCurve", "StopButton", "NanGuard", "last_good_checkpoint"),
    "rewards": ("guarded",),
    "evaluate": ("answers", "score", "compare", "power"),
    "exercises": ("check", "hint", "solution"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"ftlab.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ftlab' has no attribute {name!r}; it has {', '.join(_HOME)} and its modules")


def __dir__() -> list[str]:  # for Tab in a notebook
    return [*globals(), *__all__]
