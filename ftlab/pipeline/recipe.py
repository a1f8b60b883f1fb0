"""Recipe: everything that decides a training run, in one frozen dataclass and one YAML file, whatever the engine."""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from ftlab.reading import read_yaml, short

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RecipeError(ValueError):
    """A recipe that cannot be run: says which key, what was got and what is allowed."""


@dataclass(frozen=True)
class Recipe:
    """One training run. Names are those of peft and trl, defaults those of the course's practical pipeline.

    r = 0 means full fine-tuning. `learning_rate` is the peak after the warm-up. `epochs` counts passes over the data
    unless `max_steps` > 0. One optimizer step sees `batch_size * gradient_accumulation_steps` rows. Lengths in tokens.
    The defaults of rate and epochs are those of SFT with LoRA: dpo wants a tenth or less of that rate.

    Raises RecipeError for a value out of range, naming the key.
    """

    # what
    model: str = "smollm2"
    method: Literal["sft", "dpo"] = "sft"
    engine: Literal["trl", "unsloth"] = "trl"
    train_file: str = "triage/train.jsonl"  # a path, or one below the course's data folder
    eval_file: str | None = None
    # LoRA: h = W0 x + (lora_alpha / r) B A x
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEAR
    # how the frozen weights are held, and in what dtype the products are computed
    quantization: Literal["none", "int8", "nf4", "nf4-double"] = "none"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    fast: bool = False  # packed batches and fused layers: Llama models with LoRA, on a CPU (ftlab.cpu)
    # optimizer and schedule
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw_torch"
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    # how long
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int = 512
    beta: float = 0.1  # dpo: the temperature; sft does not read it
    # how it is watched
    logging_steps: int = 5
    eval_steps: int = 0  # 0: no evaluation during training
    save_steps: int = 50
    early_stop_patience: int = 0  # evaluations without a better eval loss, then the best is taken; 0: never stop early
    seed: int = 0

    def __post_init__(self) -> None:
        for field, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, field, _checked(field, getattr(self, field), hint))
        for field in (
            "learning_rate",
            "epochs",
            "batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "save_steps",
            "logging_steps",
            "lora_alpha",
            "max_grad_norm",
        ):
            _require(getattr(self, field) > 0, field, getattr(self, field), "a number above 0")
        for field in ("r", "warmup_steps", "weight_decay", "eval_steps", "early_stop_patience", "seed", "beta"):
            _require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a probability in [0, 1)")
        _require(self.learning_rate < 1, "learning_rate", self.learning_rate, "below 1 (LoRA likes 1e-4 to 1e-3)")
        _require(self.seed < 2**32, "seed", self.seed, "below 2**32, as numpy wants it")
        _require(bool(self.target_modules) or self.r == 0, "target_modules", (), "at least one module name")
        _require(
            self.max_steps == -1 or self.max_steps > 0, "max_steps", self.max_steps, "-1 (go by epochs) or above 0"
        )
        _require(
            self.quantization == "none" or self.r > 0,
            "quantization",
            self.quantization,
            "'none' for full fine-tuning (r = 0): quantized weights cannot be trained",
        )
        if self.fast:  # what ftlab.cpu does not cover
            for field, wanted in {
                "engine": "trl",
                "quantization": "none",
                "lora_dropout": 0.0,
                "gradient_checkpointing": False,
            }.items():
                _require(getattr(self, field) == wanted, field, getattr(self, field), f"{wanted!r} with fast: true")
            _require(self.r > 0, "r", self.r, "above 0 with fast: true")
            covered = set(self.target_modules) == set(ALL_LINEAR)
            _require(covered, "target_modules", self.target_modules, f"{ALL_LINEAR} with fast: true")
        self._check_method()
        watches = self.early_stop_patience == 0 or (self.eval_steps > 0 and self.eval_file is not None)
        _require(watches, "early_stop_patience", self.early_stop_patience, "0, or eval_steps > 0 and an eval_file")

    def _check_method(self) -> None:
        """RecipeError for a setting that the method does not read, or that cannot go with it."""
        if self.method == "sft":
            _require(self.beta == 0.1, "beta", self.beta, "its default, 0.1, with method 'sft': only dpo reads it")
            return
        for field, wanted in {"engine": "trl", "lora_dropout": 0.0, "fast": False}.items():
            _require(getattr(self, field) == wanted, field, getattr(self, field), f"{wanted!r} with 'dpo'")
        _require(self.beta > 0, "beta", self.beta, "above 0 with 'dpo'")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """The recipe in a YAML file.

        Raises RecipeError for what is no YAML, a key that stands twice, a key that is not a field (with the nearest
        name) and a value out of range; OSError if there is no such file.
        """
        settings = read_yaml(path, RecipeError)
        if not isinstance(settings, dict):
            raise RecipeError(f"{path}: got {type(settings).__name__}, wanted lines of the form `key: value`")
        return cls.from_dict(settings)

    @classmethod
    def from_dict(cls, settings: dict) -> "Recipe":
        names = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1) if isinstance(key, str) else []
                raise RecipeError(
                    f"unknown key {short(key)}" + (f", did you mean {near[0]!r}?" if near else f"; known: {names}")
                )
        return cls(**settings)

    def to_yaml(self, path: str | Path) -> Path:
        """Writes every field, defaults too: a run must not change when a default does."""
        settings = {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}
        Path(path).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return Path(path)

    def replace(self, **changes) -> "Recipe":
        """The same recipe with some fields changed."""
        return Recipe.from_dict({**dataclasses.asdict(self), **changes})


def _require(holds: bool, field: str, got: object, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"{field}: got {short(got)}, wanted {wanted}")


def _checked(field: str, value: object, hint: object) -> object:
    """The value as its type hint wants it (5 -> 5.0, "2e-4" -> 0.0002, a list -> a tuple), or RecipeError."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
            wanted = f"one of {choices}" + (f" (did you mean {near[0]!r}?)" if near else "")
            _require(False, field, value, wanted)
        return value
    if typing.get_origin(hint) is types.UnionType:  # X | None
        return None if value is None else _checked(field, value, typing.get_args(hint)[0])
    if hint is float:
        try:  # YAML 1.1 reads 2e-4 (without a dot) as a string: a classic that should not cost anyone an hour
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        _require(math.isfinite(number), field, value, "a finite number")
        return number
    if typing.get_origin(hint) is tuple:
        _require(
            isinstance(value, list | tuple) and all(isinstance(v, str) for v in value), field, value, "a list of names"
        )
        return tuple(value)  # type: ignore[arg-type]
    _require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)), field, value, f"{hint.__name__}"
    )
    _require(hint is not int or abs(value) < 2**63, field, value, "a whole number of 64 bits")  # type: ignore[operator]
    return value
