"""ftlab: what a fine-tuning notebook plugs into the field's own libraries, and nothing that stands before them.

You write `SFTTrainer`, `LoraConfig`, `load_dataset`, `OpenAI` yourself. These names are what cells use every day; each
is fetched from its module at first use, so that `import ftlab` loads nothing heavy and Unsloth can come first.

For the whole process the import leaves out the messages of QUIET, and no others of these loggers, and sets
HF_DATASETS_DISABLE_PROGRESS_BARS=1 if it is not set. In a running notebook, and nowhere else, two
errors become one line: a stopped training, and a name from a cell that has not been run
(ftlab.notebook).
"""

import importlib
import logging
import os
import sys

QUIET = {  # logger -> how warnings begin that say nothing to a learner
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),  # GPU kernels, on every CPU
    "torch.utils._pytree": ("%s is an Enum subclass",),  # about torchao's own code
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # an optional download
    "transformers.trainer_utils": ("mtime may not be reliable",),  # two checkpoints within one second
}


def _wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(QUIET[record.name])


for _name in QUIET:
    logging.getLogger(_name).addFilter(_wanted)
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of tokenizing a few hundred rows

if "IPython" in sys.modules:
    importlib.import_module("ftlab.notebook").install()

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
