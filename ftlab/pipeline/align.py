"""Alignment through TRL 1.12: a Recipe becomes the trainer of its method, after every row has been checked.

    reward          a classifier with one label scores an answer; learns from pairs (Bradley-Terry)
    dpo, orpo       learn from pairs, without and with an SFT term; kto from single answers with a thumb up or down
    ppo             policy, reference, reward model and value model: four roles
    grpo, rloo      policy and reference; a reward function, and a baseline from the other answers to the same prompt
    spin            dpo in rounds, the model's own answers being the rejected ones

The reference is the model that the run starts from: with LoRA the same weights with the adapter switched off, else a
frozen copy. `ftlab.pipeline.train.train` runs what is built here. Where TRL's defaults are overridden, a comment says
why. A row that does not fit `max_length` is an error here: TRL would cut it (dpo, kto, orpo) or drop it (reward).
"""

import copy
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftlab.pipeline import data
from ftlab.pipeline.recipe import ONLINE, PAIRS, Recipe
from ftlab.pipeline.train import (
    Reward,
    Run,
    base_model,
    claim,
    lora_config,
    train,
    training_arguments,
    weights_sha256,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Row = data.Row


# --- Rows -------------------------------------------------------------------------------------------------------------

WANTED = {
    "sft": "{prompt, completion}",
    **dict.fromkeys(PAIRS, "{prompt, chosen, rejected}"),
    "kto": "{prompt, completion, label}",
    **dict.fromkeys(ONLINE, "{prompt} and what the reward reads"),
}


def check_kind(recipe: Recipe, train_rows: list[Row], eval_rows: list[Row], rewards: Sequence[Reward]) -> None:
    """Raises ValueError, naming the row, for rows that are not of the method's kind; needs no tokenizer and no TRL."""
    method = recipe.method
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        for i, row in enumerate(rows):
            if fault := _kind_fault(method, row):
                raise ValueError(f"{name} row {i}: {fault}")
    if method == "kto" and len({row["label"] for row in train_rows}) < 2:
        raise ValueError(
            f"all {len(train_rows)} labels are {train_rows[0]['label']}: kto needs answers of both kinds. "
            f"For good answers only, use sft"
        )
    if method == "kto" and len(train_rows) % recipe.batch_size == 1:
        raise ValueError(
            f"{len(train_rows)} rows in batches of {recipe.batch_size} leave a last batch of one row, whose KL "
            f"baseline would be its own reward: leave one row out or change batch_size"
        )
    if method in ONLINE and eval_rows:
        raise ValueError(f"{method} evaluates no rows: give train() a metric, which is called every eval_steps")
    if method in ("grpo", "rloo") and not rewards:
        raise ValueError(f"{method} needs a reward: train(..., reward=function of the answers and the rows' columns)")
    if rewards and method not in ("grpo", "rloo"):
        hint = ": give the recipe a reward_model" if method == "ppo" else ""
        raise ValueError(f"got a reward function, which {method} does not read{hint}")
    if method in ONLINE:
        prompts = recipe.batch_size * recipe.gradient_accumulation_steps
        prompts //= 1 if method == "ppo" else recipe.num_generations
        if len(train_rows) < prompts:  # TRL drops incomplete batches: ppo would wait forever, grpo train nothing
            raise ValueError(f"{len(train_rows)} prompts are less than the {prompts} of one step: smaller batch_size")


def _kind_fault(method: str, row: Row) -> str:
    sides, thumb = {"chosen", "rejected"} & row.keys(), isinstance(row.get("label"), bool)
    kind = "a pair" if sides else "a thumbs row" if thumb else f"a row with {sorted(row)}"
    wanted = f"got {kind}, but {method} learns from {WANTED[method]}"
    if method == "sft":
        return "" if {"prompt", "completion"} <= row.keys() and not thumb else wanted
    if method in ONLINE and "prompt" not in row:
        return wanted
    if method in ONLINE:  # any other column may be meant for the reward
        answer = [{"role": "assistant", "content": "to come"}]
        return data.row_fault({"prompt": row["prompt"], "completion": answer}, "prompt_completion")
    if (method in PAIRS and sides != {"chosen", "rejected"}) or (method == "kto" and (sides or "label" not in row)):
        return wanted + ("; data.thumbs_from_pairs makes them from pairs" if method == "kto" and sides else "")
    return data.row_fault(row, "thumbs" if method == "kto" else "preference") or _string_fault(row)


def _string_fault(row: Row) -> str:
    return "" if isinstance(row["prompt"], list) else "got strings, wanted lists of messages: TRL templates no string"


def _check_lengths(recipe: Recipe, name: str, rows: list[Row], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError, naming the row, if it does not fit max_length, or its two sides become the same tokens."""
    for i, row in enumerate(rows):
        if recipe.method in ONLINE:
            prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if length + recipe.max_completion_length > recipe.max_length:
                raise ValueError(
                    f"{name} row {i}: {length} tokens of prompt and max_completion_length = "
                    f"{recipe.max_completion_length} are more than max_length = {recipe.max_length}"
                )
            continue
        keys = ("completion",) if recipe.method == "kto" else ("chosen", "rejected")
        sides = [data.render({"prompt": row["prompt"], "completion": row[key]}, tokenizer) for key in keys]
        for key, side in zip(keys, sides, strict=True):
            if (length := len(side.input_ids)) > recipe.max_length:
                raise ValueError(
                    f"{name} row {i}: prompt and {key} are {length} tokens ({sum(side.completion_mask)} of them the "
                    f"answer), more than max_length = {recipe.max_length}: its end, or all of it, would be cut off"
                )
        if len(sides) == 2 and sides[0].input_ids == sides[1].input_ids:
            raise ValueError(f"{name} row {i}: chosen and rejected become the same tokens: the pair prefers nothing")


# --- Trainers ---------------------------------------------------------------------------------------------------------


def trainer(
    recipe: Recipe, train_rows: list[Row], eval_rows: list[Row] | None, folder: Path, rewards: Sequence[Reward]
) -> "Trainer":
    """TRL's trainer for the method of a recipe (any but sft), its rows checked with the model's tokenizer.

    Raises ValueError for a row that does not fit, a reward function that fails on the first row, or, for ppo, a reward
    model that is none or has another tokenizer.
    """
    from datasets import disable_progress_bars
    from transformers import EarlyStoppingCallback, set_seed

    disable_progress_bars()  # of tokenizing
    set_seed(recipe.seed)  # before the head of a reward model is drawn, and lora_A
    model, tokenizer = classifier(recipe.model) if recipe.method == "reward" else base_model(recipe)
    eval_rows = eval_rows if recipe.eval_steps and eval_rows else []
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        _check_lengths(recipe, name, rows, tokenizer)
    if recipe.method in ("grpo", "rloo"):
        made = _group_trainer(recipe, model, tokenizer, train_rows, folder, rewards)
        return _answering_faster(made, made.model)
    if recipe.method == "ppo":
        made = _ppo_trainer(recipe, model, tokenizer, train_rows, folder)
        return _answering_faster(made, made.policy_model)
    arguments = training_arguments(recipe, folder, evaluates=bool(eval_rows))
    parts = {"model": model, "processing_class": tokenizer, "peft_config": lora_config(recipe)}
    if recipe.early_stop_patience:
        parts["callbacks"] = [EarlyStoppingCallback(recipe.early_stop_patience)]
    make = {"reward": _reward_trainer, "dpo": _dpo_trainer, "orpo": _orpo_trainer, "kto": _kto_trainer}[recipe.method]
    return make(recipe, parts, train_rows, eval_rows, arguments)


def _dataset(rows: list[Row], keys: Sequence[str]):
    from datasets import Dataset

    return Dataset.from_list([{key: row[key] for key in keys} for row in rows]) if rows else None


def _frozen_copy(recipe: Recipe, model: "PreTrainedModel") -> "PreTrainedModel | None":
    """The reference of full fine-tuning; None with LoRA, which TRL takes as: the policy with its adapter off.

    Left to itself TRL would load the reference anew from `config._name_or_path`, with another attention kernel, and the
    loss would not begin at ln 2 exactly.
    """
    return None if recipe.r else copy.deepcopy(model).eval().requires_grad_(False)


def _dpo_trainer(recipe, parts, train_rows, eval_rows, arguments):
    from trl import DPOConfig, DPOTrainer

    make = DPOTrainer
    if recipe.fast:
        from ftlab.pipeline.fast import fast_dpo_trainer as make
    a_step = recipe.batch_size * recipe.gradient_accumulation_steps
    read = recipe.max_steps * a_step if recipe.max_steps > 0 else recipe.epochs * len(train_rows)
    keys = ("prompt", "chosen", "rejected")
    return make(
        **parts,
        ref_model=_frozen_copy(recipe, parts["model"]),
        train_dataset=_dataset(train_rows, keys),
        eval_dataset=_dataset(eval_rows, keys),
        args=DPOConfig(
            **arguments,
            beta=recipe.beta,
            max_length=recipe.max_length,
            train_sampling_strategy="random",
            precompute_ref_log_probs=recipe.fast and read > len(train_rows),  # it pays from the second pass on
        ),
    )


def _kto_trainer(recipe, parts, train_rows, eval_rows, arguments):
    """Rows are shuffled once and stay in that order: TRL pairs each prompt with its neighbour's answer for the KL.

    Without the shuffle, rows that came from pairs would lie side by side, and the neighbour's answer would be one to
    the same prompt.
    """
    from trl import KTOConfig, KTOTrainer

    keys = ("prompt", "completion", "label")
    train_rows, eval_rows = (random.Random(recipe.seed).sample(rows, len(rows)) for rows in (train_rows, eval_rows))
    return KTOTrainer(
        **parts,
        ref_model=_frozen_copy(recipe, parts["model"]),
        train_dataset=_dataset(train_rows, keys),
        eval_dataset=_dataset(eval_rows, keys),
        args=KTOConfig(
            **arguments,
            beta=recipe.beta,
            desirable_weight=recipe.desirable_weight,
            undesirable_weight=recipe.undesirable_weight,
            max_length=recipe.max_length,
            train_sampling_strategy="sequential",  # kto refuses any other
        ),
    )


def _orpo_trainer(recipe, parts, train_rows, eval_rows, arguments):
    """Gets texts, not messages: after ChatML's last line break TRL's ORPO would write a second end-of-turn."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer = parts["processing_class"]

    def texts(row: Row) -> dict[str, str]:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        sides = {side: _up_to_eos(row["prompt"] + row[side], tokenizer) for side in ("chosen", "rejected")}
        return {"prompt": prompt, **{side: text[len(prompt) :] for side, text in sides.items()}}

    keys = ("prompt", "chosen", "rejected")
    return ORPOTrainer(
        **parts,
        train_dataset=_dataset([texts(row) for row in train_rows], keys),
        eval_dataset=_dataset([texts(row) for row in eval_rows], keys),
        args=ORPOConfig(
            **arguments,
            beta=recipe.beta,  # the paper's lambda
            max_length=recipe.max_length,
            train_sampling_strategy="random",
            remove_unused_columns=False,  # its collator wants them
        ),
    )


def _reward_trainer(recipe, parts, train_rows, eval_rows, arguments):
    """Gets token ids that end with the end-of-turn, at which ppo asks for the score.

    From messages TRL would train the score at ChatML's line break after it, a token that a policy never writes.
    """
    from trl import RewardConfig, RewardTrainer

    tokenizer = parts["processing_class"]

    def ids(row: Row) -> dict[str, list[int]]:
        texts = {side: _up_to_eos(row["prompt"] + row[side], tokenizer) for side in ("chosen", "rejected")}
        return {f"{side}_ids": tokenizer(text, add_special_tokens=False)["input_ids"] for side, text in texts.items()}

    keys = ("chosen_ids", "rejected_ids")
    return RewardTrainer(
        **parts,
        train_dataset=_dataset([ids(row) for row in train_rows], keys),
        eval_dataset=_dataset([ids(row) for row in eval_rows], keys),
        args=RewardConfig(**arguments, max_length=recipe.max_length, train_sampling_strategy="random"),
    )


def _up_to_eos(messages: data.Messages, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The rendered text up to its last end-of-turn, without what a template writes after it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]


def _group_trainer(recipe, model, tokenizer, rows, folder, rewards):
    """GRPO as in its paper, or RLOO. TRL's GRPO is by default another method: DAPO's loss, and no KL at all.

    Prompts are shuffled once and stay in that order: TRL's own shuffling is forgotten by a run that is resumed.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    settings = {
        **training_arguments(recipe, folder, evaluates=False),
        "beta": recipe.beta,
        "num_generations": recipe.num_generations,
        "max_completion_length": recipe.max_completion_length,
        "temperature": recipe.temperature,
        "shuffle_dataset": False,
    }
    parts = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(random.Random(recipe.seed).sample(rows, len(rows))),
        "reward_funcs": [_checked_reward(function, rows) for function in rewards],
        "peft_config": lora_config(recipe),
    }
    if recipe.method == "rloo":
        return RLOOTrainer(**parts, args=RLOOConfig(**settings))
    # "dapo" divides by the tokens of the whole batch; "grpo" takes the mean of each answer, then over answers
    return GRPOTrainer(**parts, args=GRPOConfig(**settings, loss_type="grpo", use_bias_correction_kl=False))


def _answering_faster(made: "Trainer", policy: "PreTrainedModel") -> "Trainer":
    """The trainer; while it trains, the policy samples its answers through ftlab.pipeline.decode, the same ones."""
    from ftlab.pipeline import decode

    plain = made.train

    @functools.wraps(plain)
    def train(*args, **kwargs):
        with decode.sampling(policy, made.processing_class):
            return plain(*args, **kwargs)

    made.train = train
    return made


def _checked_reward(function: Reward, rows: list[Row]) -> Callable[..., list[float]]:
    """The function as TRL calls it: texts instead of messages, the rows' columns alone, and finite numbers or an error.

    It is tried on an empty answer to the first prompt, so that one that cannot work fails before training does.
    """
    name = getattr(function, "__name__", type(function).__name__)
    columns = [key for key in rows[0] if key not in ("prompt", "completion")]

    def reward(prompts, completions, **given) -> list[float]:
        answers = [messages[-1]["content"] for messages in completions]
        values = [float(value) for value in function(answers, prompt=prompts, **{key: given[key] for key in columns})]
        if len(values) != len(answers) or not all(map(math.isfinite, values)):
            raise ValueError(f"reward {name}: got {values!r:.200}, wanted {len(answers)} finite numbers, one an answer")
        return values

    try:
        first = {key: [rows[0][key]] for key in columns}
        reward([rows[0]["prompt"]], [[{"role": "assistant", "content": ""}]], **first)
    except Exception as error:
        message = f"reward {name} failed on an empty answer to the first row ({sorted(rows[0])}): {error!r}"
        raise ValueError(message) from error
    reward.__name__ = name
    return reward


def _ppo_trainer(recipe, policy, tokenizer, rows, folder):
    """PPO with its four models. The value model begins as a copy of the reward model, as in InstructGPT (App. C.4).

    With LoRA only the policy has an adapter: the value model is trained in full.
    """
    import torch
    from datasets import Dataset
    from torch.nn.utils import clip_grad_norm_
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.trainer.utils import pad

    reward_model, reward_tokenizer = load_reward(recipe.reward_model)
    if reward_tokenizer.get_vocab() != tokenizer.get_vocab() or reward_tokenizer.eos_token != tokenizer.eos_token:
        raise ValueError(
            f"{recipe.reward_model} and {recipe.model} have different tokenizers: ppo hands the policy's token ids to "
            f"the reward model, to which they would mean something else"
        )
    value_model = copy.deepcopy(reward_model).requires_grad_(True)  # a merged adapter leaves its base frozen
    reward_model.requires_grad_(False)
    prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    ids = [{"input_ids": tokenizer(prompt, add_special_tokens=False)["input_ids"]} for prompt in prompts]

    def collate(part: list[dict]) -> dict:  # on the left, whatever the tokenizer says: answers follow at the right
        queries = [torch.tensor(row["input_ids"]) for row in part]
        return {"input_ids": pad(queries, padding_value=tokenizer.pad_token_id, padding_side="left")}

    batch = recipe.batch_size * recipe.gradient_accumulation_steps
    settings = {**training_arguments(recipe, folder, evaluates=False), "save_strategy": "no"}
    made = PPOTrainer(
        model=policy,
        ref_model=_frozen_copy(recipe, policy),
        reward_model=reward_model,
        value_model=value_model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(ids),
        data_collator=collate,
        peft_config=lora_config(recipe),
        args=PPOConfig(
            **settings,
            total_episodes=recipe.max_steps * batch if recipe.max_steps > 0 else None,  # it does not read max_steps
            kl_coef=recipe.beta,
            response_length=recipe.max_completion_length,
            temperature=recipe.temperature,
            stop_token="eos",  # by default an answer never ends
            num_sample_generations=0,  # prints tables
        ),
    )

    def clip(optimizer, args, kwargs) -> None:  # TRL's PPO loop does not read max_grad_norm
        clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), recipe.max_grad_norm)

    made.optimizer.optimizer.register_step_pre_hook(clip)
    return made


# --- Models -----------------------------------------------------------------------------------------------------------


def classifier(name: str | Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model with a head of one label in place of its vocabulary, in fp32, and its tokenizer.

    A language model has no such head: it is drawn at random.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    from ftlab.pipeline.models import resolve

    source = resolve(name)
    options = {"use_safetensors": True, "trust_remote_code": False, "num_labels": 1, "dtype": torch.float32}
    if not torch.cuda.is_available():
        options["attn_implementation"] = "eager"  # as in ftlab.pipeline.models.load
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(source, **options)
    model.config.pad_token_id = tokenizer.pad_token_id  # it scores the last token that is not padding
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_reward(folder: str | Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The reward model (fp32, its adapter merged) and tokenizer of a "reward" run, or of a classifier's folder.

    Raises ValueError for a run of another method, or a model without a head of one label.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(folder)
    if (folder / "recipe.yaml").is_file():
        recipe = Recipe.from_yaml(folder / "recipe.yaml")
        result = folder / ("adapter" if recipe.r else "model")
        if recipe.method != "reward" or not result.is_dir():
            state = "unfinished" if recipe.method == "reward" else f"of method {recipe.method!r}"
            raise ValueError(f"{folder} holds a run {state}, wanted a finished one of method 'reward'")
        if recipe.r == 0:
            return classifier(result)
        from peft import PeftModel

        model, _ = classifier(recipe.model)
        model = PeftModel.from_pretrained(model, str(result)).merge_and_unload().eval()
        return model, AutoTokenizer.from_pretrained(result)
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    heads = getattr(config, "architectures", None) or ["no model at all"]
    if not heads[0].endswith("ForSequenceClassification") or config.num_labels != 1:
        labels = f" with {config.num_labels} labels" if heads[0].endswith("ForSequenceClassification") else ""
        raise ValueError(
            f"{folder} holds {heads[0]}{labels}, wanted a run of method 'reward', or a model for sequence "
            f"classification with one label: a language model has no head that scores"
        )
    return classifier(folder)


def reward_scores(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[data.Messages],
    answers: Sequence[str],
    batch_size: int = 16,
) -> list[float]:
    """A reward model's score of each answer to its prompt, taken at the answer's end-of-turn, as ppo takes it."""
    import torch

    scores = []
    for start in range(0, len(answers), batch_size):
        part = zip(prompts[start : start + batch_size], answers[start : start + batch_size], strict=True)
        texts = [_up_to_eos([*prompt, {"role": "assistant", "content": answer}], tokenizer) for prompt, answer in part]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            scores += model(**batch.to(model.device)).logits[:, 0].tolist()
    return scores


def load_policy(recipe: Recipe, result: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The trained policy in a finished run's model/ or adapter/ folder."""
    if recipe.r == 0:
        return base_model(recipe.replace(model=str(result)))
    from peft import PeftModel

    model, tokenizer = base_model(recipe)
    return PeftModel.from_pretrained(model, str(result)).eval(), tokenizer


# --- SPIN -------------------------------------------------------------------------------------------------------------


def spin(
    recipe: Recipe,
    rows: list[Row],
    iterations: int,
    folder: str | Path,
    max_new_tokens: int = 80,
    on_log: Callable[[dict], None] | None = None,
) -> list[Run]:
    """SPIN from {prompt, completion} rows, one dpo Run an iteration: the row's answer is chosen, the model's rejected.

    The model and the reference of iteration t are the result of iteration t - 1 (of t = 0: recipe.model, which should
    have had its SFT). Rows that it already answers word by word, or with nothing that is a text, are left out; once
    these are all, the game is over and the list is shorter. Its answers are the likeliest ones, where the paper
    samples. Each iteration leaves pairs.jsonl and a run in folder/iteration-<t>; called again, it keeps what is done.

    Raises ValueError if the recipe's method is not "dpo", or the folder belongs to another recipe or rows.
    Source: Chen et al. 2024, arXiv:2401.01335, Algorithm 1.
    """
    from ftlab.pipeline import export

    if recipe.method != "dpo":
        raise ValueError(f"got a recipe of method {recipe.method!r}: spin is dpo in rounds, wanted 'dpo'")
    for i, row in enumerate(rows):
        if fault := data.row_fault(row, "prompt_completion") or _string_fault(row):
            raise ValueError(f"row {i}: {fault}")
    folder, runs = Path(folder), []
    claim(folder, recipe, [[[row["prompt"], row["completion"]] for row in rows], weights_sha256(recipe.model)])
    for t in range(iterations):
        here = folder / f"iteration-{t}"
        if not (pairs := _own_answers(recipe, rows, max_new_tokens, here / "pairs.jsonl")):
            break
        runs.append(train(recipe, pairs, folder=here / "run", on_log=on_log))
        if runs[-1].interrupted:
            break
        following = here / "run" / "model"
        if recipe.r:
            following = here / "merged"
            if not following.is_dir():
                checks = [row["prompt"] for row in rows[:4]]
                export.merge(here / "run", recipe.model, following, checks, dtype="float32")
        recipe = recipe.replace(model=str(following))
    return runs


def _own_answers(recipe: Recipe, rows: list[Row], max_new_tokens: int, file: Path) -> list[Row]:
    """Pairs of each row's answer and the model's own; read from the file if it was written before."""
    from ftlab.pipeline.evaluate import generate

    if not file.is_file():
        model, tokenizer = base_model(recipe)
        answers = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens)
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{"role": "assistant", "content": said}]}
            for row, said in zip(rows, answers, strict=True)
            if said.strip() != row["completion"][0]["content"].strip()
        ]
        pairs = [pair for pair in pairs if not data.row_fault(pair, "preference")]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        part.replace(file)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
