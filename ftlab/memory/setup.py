"""What decides the memory: a recipe, what it leaves open, the models that its method holds, and every dtype."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ftlab.memory.architecture import Architecture, check_fields
from ftlab.pipeline.recipe import Recipe


@dataclass(frozen=True)
class Setup:
    """What decides the memory and is not in a Recipe. The defaults are those of ftlab.pipeline.train on one GPU.

    loss, of sft: "chunked" is TRL's default, "full" its loss_type="nll" (all logits, and their entropy), "fused"
    Liger's. The other methods always make all logits.
    padded: a batch with padding; sdpa then repeats keys and values and holds a mask per layer.
    weights: dtype in which unquantized weights are held; "auto" is fp32 for full fine-tuning, else that of precision.
    sharding, with gpus > 1: "ddp" copies all on each GPU, "fsdp" gives each its share of weights, gradients and states.
    The batch is that of one GPU.

    Raises ValueError for a value that is not allowed, saying which are.
    """

    loss: Literal["chunked", "full", "fused"] = "chunked"
    attention: Literal["sdpa", "eager"] = "sdpa"
    padded: bool = False
    weights: Literal["auto", "fp32"] = "auto"
    gpus: int = 1
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Role:
    """A model that a method holds. shared: the policy's own weights with its adapter switched off, so no bytes."""

    name: str
    trained: bool
    shared: bool = False


def roles(method: str, lora: bool) -> tuple[Role, ...]:
    """The models that are really in memory while training.

    PPO has four: policy, reference, reward model and value model, of which two are trained (the value model in full,
    even when the policy has an adapter). DPO and KTO have two; with LoRA the reference is the base itself (TRL: a PEFT
    model and ref_model=None). ORPO and SFT have one. The papers' accounting gives a frozen model 2 bytes a parameter:
    18 for DPO. TRL holds the reference of full fine-tuning in fp32 as it does the policy: 20.

    Raises ValueError for another method.
    """
    reference = Role("reference", trained=False, shared=lora)
    others = {
        "sft": (),
        "orpo": (),
        "dpo": (reference,),
        "kto": (reference,),
        "ppo": (reference, Role("reward", trained=False), Role("value", trained=True)),
    }
    if method not in others:
        raise ValueError(f"method: got {method!r}, wanted one of {tuple(others)}")
    return (Role("policy", trained=True), *others[method])


@dataclass(frozen=True)
class Plan:
    """Every decision about dtypes, once. All formulas of this package read a plan, called p.

    n = rows * max_length tokens. Bytes per number: `held` of unquantized weights, R of the residual stream (that of the
    embedding), c of a matrix product (2 under autocast), w of what a linear layer gives out, `adapter` of adapters.
    In the docstrings also d = hidden_size, q = heads * head_dim, k = kv_heads * head_dim, f = intermediate_size,
    V = vocab_size, L layers.
    """

    a: Architecture
    recipe: Recipe
    setup: Setup
    rows: int  # of one forward pass: twice the batch for pairs
    amp: bool
    held: int
    R: int
    c: int
    w: int
    adapter: int
    adapter_params: int
    critic: "Plan | None"  # of PPO's value model

    @property
    def full(self) -> bool:
        return self.recipe.r == 0

    @property
    def quantized(self) -> bool:
        return self.recipe.quantization != "none"

    @property
    def int8(self) -> bool:
        return self.recipe.quantization == "int8"

    @property
    def checkpointed(self) -> bool:
        return self.recipe.gradient_checkpointing

    @property
    def accumulates(self) -> bool:
        return self.recipe.gradient_accumulation_steps > 1

    @property
    def dropout(self) -> bool:
        return not self.full and self.recipe.lora_dropout > 0

    @cached_property
    def n(self) -> int:
        return self.rows * self.recipe.max_length

    @cached_property
    def targets(self) -> frozenset[str]:
        return frozenset(self.a.linears if self.full else self.recipe.target_modules)

    @property
    def shards(self) -> int:
        return self.setup.gpus if self.setup.sharding == "fsdp" else 1


def plan(architecture: Architecture, recipe: Recipe, setup: Setup | None = None) -> Plan:
    """Dtypes as the libraries choose them.

    Full fine-tuning trains fp32 weights under autocast. LoRA loads 16-bit weights and keeps fp32 adapters (PEFT's
    autocast_adapter_dtype). Quantized: prepare_model_for_kbit_training turns embedding, head and norms into fp32, so
    the residual stream is fp32 and bitsandbytes' layers answer in fp32 (w = 4); TRL makes those adapters bf16. TRL's
    PPO has no autocast: all of it is taken in fp32, as ftlab.pipeline.align loads its models on a CPU.

    Raises ValueError for settings that do not go together.
    """
    setup = setup or Setup()
    roles(recipe.method, lora=recipe.r > 0)  # refuses other methods
    if recipe.fast or recipe.engine != "trl":
        raise ValueError(
            f"engine: got {recipe.engine!r}, fast: {recipe.fast}, wanted 'trl' and False: the others have other layers"
        )
    amp = recipe.precision != "fp32" and recipe.method != "ppo"
    quantized = recipe.quantization != "none"
    if quantized and not amp:
        raise ValueError("precision: got 'fp32', wanted 'auto', 'bf16' or 'fp16' with a quantized model")
    if recipe.quantization == "int8" and setup.sharding == "fsdp" and setup.gpus > 1:
        raise ValueError("sharding: got 'fsdp', wanted 'ddp' with int8: accelerate's FSDP knows only 4-bit weights")
    held = 4 if recipe.r == 0 or not amp or setup.weights == "fp32" else 2
    critic = None
    if recipe.method == "ppo":  # the policy alone is checkpointed
        same = ("batch_size", "max_length", "gradient_accumulation_steps", "optimizer", "weight_decay")
        full = Recipe(r=0, precision="fp32", **{field: getattr(recipe, field) for field in same})
        critic = plan(replace(architecture, tie_word_embeddings=True), full, setup)  # its head is one column
    return Plan(
        architecture,
        recipe,
        setup,
        rows=recipe.batch_size * (2 if recipe.method in ("dpo", "orpo") else 1),
        amp=amp,
        held=held,
        R=4 if quantized else held,
        c=2 if amp else 4,
        w=4 if quantized or not amp else 2,
        adapter=2 if quantized else 4,
        adapter_params=architecture.lora_params(recipe.r, recipe.target_modules) if recipe.r else 0,
        critic=critic,
    )
