"""The same LoRA step in less time on a CPU: a plug-in for TRL's SFT, DPO, KTO and GRPO trainers
that is safe or says no.

    args = SFTConfig(..., gradient_checkpointing=False)
    trainer = SFTTrainer(model, args=args, peft_config=LoraConfig(...), ...)
    assert speed_up(trainer)            # leave it out: the same result, slower
    trainer.train()

Loss, gradients and logged metrics are those of TRL, transformers and PEFT up to the order of
rounding. Four things see to that:

    white lists         ftlab.allowed: models, settings, adapters, plug-ins and releases that were
                        tested; all else is refused with a reason, and the trainer stays as it is
    first batch twice   once by TRL's code, once by ours, in fp32, on a perturbed adapter: the loss
                        and each gradient
    every step          ftlab.watch: what has changed since goes to TRL's code, with a warning (a
                        single number changed under .data may be found at the next save or the end
                        of train() only, and raises there)
    tests/parity        test_cpu.py, test_speed_up_ways.py, test_speed_up_settings.py and others

Where the time went, and what is done about it (ftlab.llama):

    padding             the rows of a batch stand one after another in one sequence, for attention
                        side by side
    shared beginnings   what all rows begin with (the system message) is computed once a batch, what
                        the answers to one prompt begin with (a DPO pair, a group) once a prompt
    the head            at the positions with a label only; its gradient is taken at once
    the last layer      after its attention, at the positions with a label only, as the head
    casts               a copy of the frozen weights is kept in the dtype of the products
    small operations    q, k, v are one product, gate and up are one
    page faults         while it trains, malloc keeps large blocks for the next step
    GRPO's answers      the same layers with the adapters merged in; one cache of the full size

All else is TRL's code: batches, truncation, each loss_type, the reference. DPOTrainer and
KTOTrainer take the path that TRL has for Liger: no means of logits, no token accuracy.
"""

import contextlib
import copy
import ctypes
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ftlab import allowed
from ftlab.allowed import UnsupportedError
from ftlab.llama import Decoder, PackedLlama, per_token_logps, product_dtype, sft_targets
from ftlab.watch import Watch

LOGPS = "_get_per_token_logps_and_entropies"  # of the trainers other than SFTTrainer
TOLERANCE = 1e-4  # relative, of the loss and of each parameter's gradient; in fp32
# The adapter's standard deviation while the first batch is compared: B = 0 hides most mistakes.
PERTURBATION = 0.02
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's parameters (malloc.h)


class NotSpedUp(UserWarning):
    """Why a trainer, or one step of it, is left to TRL's own code; `reason` holds it alone."""

    def __init__(self, reason: str, what: str = "speed_up leaves this trainer as it is") -> None:
        super().__init__(f"{what}: {reason}.")
        self.reason = reason


class SpeedUpError(RuntimeError):
    """A step that would not be TRL's: `reason`, and where one was found the `parameter` and the
    `difference`.
    """

    def __init__(
        self, reason: str, parameter: str | None = None, difference: float | None = None
    ) -> None:
        super().__init__(f"speed_up: {reason}")
        self.reason, self.parameter, self.difference = reason, parameter, difference


class SpeedUp:
    """What `speed_up` did: true while the steps are the fast ones, else `reason` says why not.

    A step that goes to TRL's code makes it false. Where the cause is gone, as an adapter that was
    switched off for one evaluation, the next fast step makes it true again.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def __bool__(self) -> bool:
        return not self.reason

    def __repr__(self) -> str:
        return f"SpeedUp(reason={self.reason!r})" if self.reason else "SpeedUp()"


def speed_up(trainer: Any) -> SpeedUp:
    """Makes the steps of TRL's SFT, DPO, KTO or GRPO trainer faster on a CPU, for a Llama with
    LoRA, before train().

    The value is true if it applies. Where it does not (on a GPU, another architecture, quantized, a
    hook, an unknown setting, ...) the trainer stays as it is, a NotSpedUp warning says why, and the
    value is false with that .reason. Later changes (a hook, a merged adapter, a weight, a setting)
    send the steps to TRL's code, with such a warning.

    With bf16=True, TRL's default, the products are bf16 where the CPU has them, else fp32. While it
    trains, glibc's malloc keeps freed blocks for the whole process; afterwards they go back, and
    its thresholds stand where glibc's own adjustment ends (32 and 64 MiB). A train() that raises
    leaves them.

    Raises SpeedUpError in the first step if loss or a gradient is not TRL's (then report it: it is
    a mistake here).
    """
    if steps := _installed(trainer):
        return steps.result
    try:
        kind, lists = allowed.trainer_kind(trainer)
        check(trainer, kind, lists)
    except UnsupportedError as error:
        warnings.warn(NotSpedUp(str(error)), stacklevel=2)
        return SpeedUp(str(error))
    return FastSteps(trainer, kind, lists).install()


def check(trainer: Any, kind: type, lists: dict) -> None:
    """Raises UnsupportedError, with the reason, for what stands on no list."""
    allowed.check_versions()
    allowed.check_settings(trainer.args, lists)
    allowed.check_trainer(trainer, kind, lists)
    allowed.check_architecture(trainer.model)
    allowed.check_adapter_kind(trainer.model)
    allowed.check_model(trainer.model)
    allowed.check_adapter(trainer.model)
    allowed.check_dtypes(trainer.model, (torch.float32,))


def _installed(trainer: Any) -> "FastSteps | None":
    """The FastSteps of a trainer that is fast already."""
    owner = getattr(vars(trainer).get("compute_loss"), "__self__", None)
    return owner if isinstance(owner, FastSteps) else None


class FastSteps:
    """The methods that stand in for a trainer's own, and what they know of it.

    trainer.compute_loss is `compute_loss`. In it, DPOTrainer and KTOTrainer find `_row_logps` in
    the place of the method that gives log-probs. GRPOTrainer needs its log-probs and answers before
    the loss too, so there these two are replaced for good.
    """

    def __init__(self, trainer: Any, kind: type, lists: dict) -> None:
        self.trainer, self.kind, self.lists = trainer, kind, lists
        self.result = SpeedUp()
        self.llama: PackedLlama | None = None
        self.watch: Watch | None = None
        self.verified = False
        self.mode: str | None = None  # inside compute_loss: "fast" or "plain"

    def install(self) -> SpeedUp:
        trainer = self.trainer
        trainer.compute_loss = self.compute_loss
        if self.kind.__name__ == "GRPOTrainer":
            setattr(trainer, LOGPS, self._grpo_logps)
            if type(trainer)._generate_single_turn is self.kind._generate_single_turn:
                trainer._generate_single_turn = self._generate_single_turn
        trainer.add_callback(_between_steps(self))
        return self.result

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The trainer's compute_loss: by our code, or by TRL's if anything is not as it was."""
        if self._wants_outputs(inputs, return_outputs):
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
        reason = self._unready() or self._batch_reason(model, inputs)
        self._say(reason)
        if reason:
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.verified:
            self._verify(model, inputs, num_items_in_batch)
        loss = self._fast_loss(self.llama, model, inputs, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _wants_outputs(self, inputs: dict, return_outputs: bool) -> bool:
        """Whether somebody wants the model's outputs (predict): TRL's code makes them."""
        if self.kind.__name__ != "SFTTrainer":
            return return_outputs
        loss_only = inputs.get("_prediction_loss_only")
        return loss_only is False or (return_outputs and loss_only is None)

    def _unready(self, may_be_off: bool = False) -> str:
        """Why the trainer is not, or no longer, one that our code is for; "" if it is. Copies
        weights at first.
        """
        if self.watch is not None:
            return self.watch.change(may_be_off)
        try:
            check(self.trainer, self.kind, self.lists)
        except UnsupportedError as error:
            return str(error)
        self.llama = PackedLlama(self.trainer.model, product_dtype(self.trainer.args.bf16))
        self.watch = Watch(self.trainer, self.kind, self.lists, self.llama)
        return ""

    def _say(self, reason: str) -> None:
        """Warns of a new reason to leave the steps to TRL."""
        if reason and reason != self.result.reason:
            warnings.warn(NotSpedUp(reason, "speed_up leaves this step to TRL"), stacklevel=3)
        self.result.reason = reason

    def _batch_reason(self, model: nn.Module, inputs: dict) -> str:
        """What in a batch our code is not for; "" if it is for all of it."""
        if model is not self.trainer.model:
            return "the model of this step is not trainer.model"
        if torch.is_inference_mode_enabled():
            return "torch.inference_mode is on"
        if torch.is_autocast_enabled("cpu") and not self.trainer.args.bf16:
            return "autocast is on around the step, and the config says bf16=False"
        if unknown := sorted(set(inputs) - set(self.lists["batch"])):
            return f"the batch has a column that speed_up does not know: {unknown[0]}"
        if self.kind.__name__ == "GRPOTrainer":
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            return mask_reason("attention_mask", mask)
        for name in ("attention_mask", "KL_attention_mask"):
            if name in inputs and (reason := mask_reason(name, inputs[name])):
                return reason
        if "attention_mask" not in inputs:
            return "the batch has no attention_mask"
        if self.kind.__name__ == "SFTTrainer":
            _, label_mask = sft_targets(inputs["labels"])
            if (label_mask & ~inputs["attention_mask"].bool()).any():
                return "a label stands after a token that is not attended to"
        return ""

    def check_whole_weights(self) -> None:
        """Raises SpeedUpError if a frozen weight is not its copy: a step looks at one row alone."""
        if self.watch is None or self.result.reason or self.watch.change():
            return  # nothing was computed, or the next step will say what has changed
        if reason := self.watch.whole_copy_change():
            raise SpeedUpError(f"{reason} in the middle of training; steps since are not TRL's")

    # --- The loss, by TRL and by us ---

    def _plain_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """TRL's own."""
        with self._as("plain"):
            trainer = self.trainer
            return type(trainer).compute_loss(
                trainer, model, inputs, return_outputs, num_items_in_batch
            )

    def _fast_loss(self, llama: PackedLlama, model, inputs, num_items_in_batch) -> Tensor:
        """The same, by `llama`."""
        trainer = self.trainer
        with self._as("fast", llama):
            if self.kind.__name__ == "SFTTrainer":
                return self._sft_loss(inputs, num_items_in_batch)
            if self.kind.__name__ == "GRPOTrainer":
                return type(trainer).compute_loss(trainer, model, inputs, False, num_items_in_batch)
            with attributes(trainer, **{LOGPS: self._row_logps, "use_liger_kernel": True}):
                return type(trainer).compute_loss(trainer, model, inputs, False, num_items_in_batch)

    @contextlib.contextmanager
    def _as(self, mode: str, llama: PackedLlama | None = None) -> Iterator[None]:
        with attributes(self, mode=mode, llama=llama or self.llama):
            yield

    def _sft_loss(self, inputs: dict, num_items_in_batch) -> Tensor:
        """Mean cross-entropy in nats over the step's labels; logs as SFTTrainer.compute_loss."""
        trainer, read = self.trainer, inputs["attention_mask"].bool()
        targets, label_mask = sft_targets(inputs["labels"])
        scores = per_token_logps(self.llama, inputs["input_ids"], read, targets, label_mask)
        logps, entropy, is_argmax = (each[label_mask] for each in scores)  # (K,) each
        loss = -logps.sum() / (
            max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch
        )
        training = trainer.model.training
        metrics = trainer._metrics["train" if training else "eval"]
        for name, each in {"entropy": entropy, "mean_token_accuracy": is_argmax}.items():
            metrics[name].append(each.mean().item() if len(each) else 0.0)
        if training:
            trainer._total_train_tokens += read.sum().item()
        metrics["num_tokens"] = [trainer._total_train_tokens]
        return loss

    def _row_logps(self, model, model_kwargs, input_ids, completion_mask):
        """The method of DPOTrainer (chosen rows come first) and KTOTrainer: (R, T - 1), 0 outside
        answers.
        """
        self._check_adapter_in_step()
        pairs = self.kind.__name__ == "DPOTrainer"
        groups = [*range(len(input_ids) // 2)] * 2 if pairs else None
        real = model_kwargs["attention_mask"].bool()
        read = real[:, :-1] & real[:, 1:]  # the last token of a row is not read
        answers = completion_mask[:, 1:].bool()
        scores = per_token_logps(
            self.llama, input_ids[:, :-1], read, input_ids[:, 1:], answers, groups
        )
        return scores.logps, scores.entropy, None

    def _grpo_logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """The method of GRPOTrainer: log-probs and entropies of completions, (R, logits_to_keep), 0
        at padding.
        """
        reason = ""
        nothing_known = self.watch is None and not self._adapter_is_on()
        if self.mode is None and not nothing_known:  # before the loss: old and reference log-probs
            reason = self._unready(may_be_off=True)
            reason = reason or mask_reason("attention_mask", attention_mask)
            self._say(reason)
        elif self.mode == "fast":
            self._check_adapter_in_step()
        known = {"batch_size", "compute_entropy"}
        asks_for_more = any(
            kwargs[k] is not None and kwargs[k] is not False for k in kwargs.keys() - known
        )
        if reason or nothing_known or self.mode == "plain" or asks_for_more:
            method = getattr(type(self.trainer), LOGPS)
            return method(
                self.trainer, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        groups = [tuple(prompt) for prompt in input_ids[:, :-logits_to_keep].tolist()]
        real = attention_mask.bool()
        read = real[:, :-1] & real[:, 1:]
        answers = real[:, 1:].clone()
        answers[:, :-logits_to_keep] = False
        scores = per_token_logps(
            self.llama, input_ids[:, :-1], read, input_ids[:, 1:], answers, groups
        )
        logps, entropy, _ = (each[:, -logits_to_keep:] for each in scores)
        return logps, entropy if kwargs.get("compute_entropy") else None, None

    def _adapter_is_on(self) -> bool:
        return not any(layer.disable_adapters for layer in allowed.lora_layers(self.trainer.model))

    def _check_adapter_in_step(self) -> None:
        """Raises SpeedUpError if the adapter is not as it was and a step has begun: TRL's code
        cannot take over.
        """
        if self.mode == "fast" and (reason := self.watch.adapter_change(may_be_off=True)):
            raise SpeedUpError(f"inside a step, {reason}")

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """The method of GRPOTrainer: for each prompt the ids of one completion, its end token with
        it; no log-probs.
        """
        trainer = self.trainer
        reason = self._unready()
        self._say(reason)
        if reason:
            return type(trainer)._generate_single_turn(trainer, prompt_ids, *args, **kwargs)
        length, ends = trainer.max_completion_length, trainer.eos_token_ids
        decoder = Decoder(trainer.model)
        return decoder.generate(prompt_ids, length, ends, trainer.temperature, keep_eos=True), None

    # --- The first batch, twice ---

    def _verify(self, model: nn.Module, inputs: dict, num_items_in_batch) -> None:
        """Raises SpeedUpError unless loss and gradients of this batch are TRL's, in fp32, on a
        perturbed adapter.
        """
        llama = self.llama
        if llama.dtype != torch.float32:
            llama = PackedLlama(self.trainer.model, torch.float32)
        trained = self.watch.trained
        parameters = [p for _, p in trained]
        found = []
        with perturbed(parameters), in_fp32(model), torch.enable_grad():
            for loss_of in (self._plain_for_check, lambda *step: self._fast_loss(llama, *step)):
                with unlogged(self.trainer):
                    loss = loss_of(model, dict(inputs), num_items_in_batch)
                    found.append((loss.item(), gradients(loss, parameters)))
        (plain_loss, plain), (fast_loss, fast) = found
        compare_steps(plain_loss, fast_loss, [name for name, _ in trained], plain, fast)
        self.verified = any(
            gradient.norm() > 0 for gradient in plain
        )  # a batch without labels shows nothing

    def _plain_for_check(self, model, inputs, num_items_in_batch) -> Tensor:
        return self._plain_loss(model, inputs, False, num_items_in_batch)


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """d loss / d parameter of each; zeros where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def compare_steps(
    plain_loss: float, fast_loss: float, names: list[str], plain: list[Tensor], fast: list[Tensor]
) -> None:
    """Raises SpeedUpError if the losses, or one parameter's gradients, differ by more than
    TOLERANCE.

    Of a gradient: ||ours - TRL's|| / ||TRL's||, Euclidean norms. NaN in both is no difference: it
    is TRL's own.
    """
    difference = abs(fast_loss - plain_loss) / max(1.0, abs(plain_loss))
    both_nan = plain_loss != plain_loss and fast_loss != fast_loss
    if not (difference <= TOLERANCE or both_nan or fast_loss == plain_loss):
        text = f"the loss of the first batch is {fast_loss:.6g}, and TRL's is {plain_loss:.6g}"
        raise SpeedUpError(text, difference=difference)
    for name, theirs, ours in zip(names, plain, fast, strict=True):
        difference = relative_difference(ours, theirs)
        if not difference <= TOLERANCE:
            text = f"the gradient of {name} in the first batch differs from TRL's"
            text += f" by {difference:.2g} (relative)"
            raise SpeedUpError(text, parameter=name, difference=difference)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||; 0 where both are 0 or NaN, infinite where theirs is 0."""
    if torch.equal(ours.nan_to_num(), theirs.nan_to_num()) and torch.equal(
        ours.isnan(), theirs.isnan()
    ):
        return 0.0
    norm = theirs.norm().item()
    return (ours - theirs).norm().item() / norm if norm else float("inf")


@contextlib.contextmanager
def perturbed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters drawn from a normal distribution, and given back bit for bit. torch's random
    state is kept.
    """
    kept = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in parameters:
                p.copy_(PERTURBATION * torch.randn(p.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for p, was in zip(parameters, kept, strict=True):
                p.copy_(was)


@contextlib.contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """No autocast, not even the one that accelerate wraps around a model's forward."""
    plain = vars(model).get("_original_forward")
    with torch.autocast("cpu", enabled=False):
        if plain is None:
            yield
        else:
            with attributes(model, forward=plain):
                yield


@contextlib.contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """The trainer's attributes, logged metrics and torch's random state are afterwards what they
    were.
    """
    before, metrics = dict(vars(trainer)), copy.deepcopy(trainer._metrics)
    state = torch.get_rng_state()
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
        for mode, kept in metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(kept)
        torch.set_rng_state(state)


@contextlib.contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """The owner with other attributes; afterwards with its own, or none where it had none of its
    own.
    """
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


def mask_reason(name: str, mask: Tensor) -> str:
    """Why rows of an attention mask (R, T) cannot be packed: a row's ones must stand together; ""
    if they do.
    """
    if mask.dim() != 2:
        return f"{name} has the shape {tuple(mask.shape)}, and wanted is (rows, tokens)"
    mask = mask.bool()
    begins = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)  # (R,)
    return f"a row of {name} has a gap" if (begins > 1).any() else ""


# --- Answers --------------------------------------------------------------------------------------


def unfit_for_decoder(model: nn.Module) -> str:
    """Why `Decoder` cannot stand in for model.generate; "" if it can."""
    try:
        allowed.check_versions()
        allowed.check_architecture(model)
        allowed.check_adapter_kind(model)
        allowed.check_model(model)
        allowed.check_dtypes(model, (torch.float32, torch.bfloat16))
        allowed.check_generation(model.generation_config)
    except UnsupportedError as error:
        return str(error)
    return ""


def covers(model: nn.Module) -> bool:
    """Whether `Decoder` can stand in for model.generate: a plain Llama on a CPU, plain LoRA
    adapters or none.
    """
    return not unfit_for_decoder(model)


# --- Memory ---------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Tells malloc to keep freed blocks for the next step: a new one of the system costs a page
    fault every 4 kB.
    """
    _mallopt({MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: 1 << 30})


def give_memory_back() -> None:
    """Returns what malloc keeps to the system; its thresholds are then where glibc's own adjustment
    ends.
    """
    _mallopt({MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20})


def _mallopt(settings: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than under glibc nothing happens
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _between_steps(steps: FastSteps) -> Any:
    """A callback that holds `keep_memory` to the time of training, and looks at whole weights."""
    from transformers import TrainerCallback

    class BetweenSteps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs) -> None:
            keep_memory()

        def on_save(self, *args, **kwargs) -> None:
            steps.check_whole_weights()

        def on_train_end(self, *args, **kwargs) -> None:
            give_memory_back()
            steps.check_whole_weights()

    return BetweenSteps()
