"""ftlab.cpu.speed_up against TRL's own SFT, DPO, KTO and GRPO trainers: same losses, gradients, logs and adapter.

TRL's non-default flags: gradient_checkpointing=False, use_cpu=True, bf16=False unless said, learning_rate=1e-3;
beta=0.3 (DPO, KTO); num_generations=4, max_completion_length=12 (GRPO); those of the cases. DPO and KTO log no means of
logits and no token accuracy, as under Liger. TRL and ftlab draw answers by other random numbers, so `Fixed` gives both
the same ones; that ftlab's are drawn from the model's distribution is tested in test_decode.py, with greedy answers.
"""

import copy
import functools
import math
import shutil
from itertools import pairwise

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from ftlab import cpu, llama
from ftlab.paths import DATA
from ftlab.scratch.lora import add_lora

SYSTEM = {"role": "system", "content": "Answer in one word."}
QUESTIONS = ["hi", "Where is my order? It is late.", "2 + 2?", "Say something longer about rain and rivers, please."]
CHOSEN = ["yes, gladly", "sorry, it is on its way", "4", "wet"]
REJECTED = ["no", "sorry, it is lost", "4 or 5", "dry " * 9]
PROMPTS = [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]
GOOD, BAD = ([[{"role": "assistant", "content": text}] for text in texts] for texts in (CHOSEN, REJECTED))
ROWS = [{"prompt": p, "completion": good} for p, good in zip(PROMPTS, GOOD, strict=True)]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, GOOD, BAD, strict=True)]
STRINGS = [  # an empty answer is the end token alone; without a system message prompts begin differently
    {"prompt": "2 + 2?", "chosen": "", "rejected": " 5"},
    {"prompt": "Where is my order?", "chosen": " On its way.", "rejected": ""},
    {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 4"},
]
THUMBS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for sides in (("chosen", "rejected"), ("rejected", "chosen"))
    for pair, side in zip(PAIRS, sides * 2, strict=True)
]
EVERYTHING = LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear")
LORAS = {
    "all-linear": EVERYTHING,
    "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "some": LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj", "o_proj", "up_proj", "down_proj"]),
    "last layer": LoraConfig(r=3, target_modules=["q_proj", "gate_proj"], layers_to_transform=[1]),
}
EVERY_DPO_LOSS = [
    *({"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
    *({"loss_type": [name]} for name in ("apo_down", "aot", "aot_unpaired", "sft", "sigmoid_norm")),
    *({"loss_type": [name], "label_smoothing": 0.1} for name in ("robust", "exo_pair")),
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    {"ld_alpha": 0.5},
    {"f_divergence_type": "js_divergence"},
]
GENERATIONS, LENGTH = 4, 12
pytestmark = pytest.mark.usefixtures("one_thread")
disable_progress_bars()


class Fixed(GRPOTrainer):
    """Its answers depend on their number and the step alone; lengths go from one token to LENGTH, which is cut off."""

    def _generate_single_turn(self, prompt_ids, *_):
        generator, (end,) = torch.Generator().manual_seed(self.state.global_step), self.eos_token_ids
        lengths = [1 + (5 * i) % LENGTH for i in range(len(prompt_ids))]
        drawn = [torch.randint(20, 300, (n,), generator=generator).tolist() for n in lengths]
        return [[*ids[:-1], end] if len(ids) < LENGTH else ids for ids in drawn], None


def score(completion_ids, **_) -> list[float]:
    """Any function of the answer will do as a reward."""
    return [len(ids) / 4 + ids[0] % 7 for ids in completion_ids]


KINDS = {  # trainer, its config, rows, what its config says besides, what its constructor needs
    "SFT": (SFTTrainer, SFTConfig, ROWS, {}, {}),
    "DPO": (DPOTrainer, DPOConfig, PAIRS, {"beta": 0.3}, {}),
    "KTO": (KTOTrainer, KTOConfig, THUMBS, {"beta": 0.3}, {}),
    "GRPO": (
        Fixed, GRPOConfig, [{"prompt": prompt} for prompt in PROMPTS * 2],
        {"num_generations": GENERATIONS, "max_completion_length": LENGTH, "per_device_train_batch_size": 8},
        {"reward_funcs": score},
    ),
}  # fmt: skip


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "micro" / "model")


@functools.cache
def base_model() -> LlamaForCausalLM:
    """Random, with grouped queries; its weights are large, so that answers depend on what was read."""
    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **special)).eval()


def peft_model(lora: LoraConfig):
    return get_peft_model(copy.deepcopy(base_model()), lora)


@pytest.fixture
def build(tmp_path):
    """TRL's trainer of a kind, built as a learner builds it."""

    def build(kind: str, rows=None, eval_rows=None, lora=EVERYTHING, model=None, trainer=None, **changes):
        own, config, own_rows, asked, needs = KINDS[kind]
        asked = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1} | asked
        asked |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
        model = model or copy.deepcopy(base_model())
        torch.manual_seed(0)  # lora_A is drawn in the trainer's __init__
        return (trainer or own)(
            model,
            args=config(str(tmp_path), **asked | {"report_to": "none", "save_strategy": "no"} | changes),
            train_dataset=Dataset.from_list(rows or own_rows),
            eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
            processing_class=tokenizer(),
            peft_config=lora,
            **needs,
        )

    return build


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """One trainer of each kind, for tests that change nothing in it."""

    @functools.cache
    def one(kind: str):
        return build.__wrapped__(tmp_path_factory.mktemp(kind))(kind)

    return one


def sped_up(trainer):
    assert cpu.speed_up(trainer)
    return trainer


def loss_and_gradients(trainer, rows: int) -> tuple[float, dict[str, torch.Tensor], dict]:
    """One step's, before the optimizer, with lora_B moved away from 0 (at 0, lora_A has no gradient), and its logs."""
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = trainer.state.num_input_tokens_seen = 0
    if isinstance(trainer, GRPOTrainer):
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # train() sets it
        trainer._buffered_inputs = None  # draw and score again
        batch, items = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))), None
    else:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
        items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    gradients = {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}
    return loss.item(), gradients, dict(trainer._metrics["train"])


def left_out(kind: type, logged) -> set[str]:
    """What speed_up does not log."""
    words = {DPOTrainer: ("logits/", "mean_token_accuracy"), KTOTrainer: ("logits/",)}
    return {name for name in logged if any(word in name for word in words.get(kind, ()))}


def assert_same_step(trainer, rows: int) -> dict:
    """The step by TRL, then sped up, and undone again; returns what is logged.

    Tolerance: sums of log-probs of about -100, where fp32 numbers are 1e-5 apart. A loss squares them or not, so its
    error is of that size, or of as many of its own last places; processors with AVX-512 add in another order.
    """
    loss, gradients, logged = loss_and_gradients(trainer, rows)
    before, callbacks = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    result = cpu.speed_up(trainer)
    quick_loss, quick_gradients, quick_logged = loss_and_gradients(trainer, rows)
    assert result and result.reason == ""  # the step was ours
    for name in vars(trainer).keys() - before:
        delattr(trainer, name)
    trainer.callback_handler.callbacks = callbacks
    assert quick_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert quick_gradients.keys() == gradients.keys() and gradients
    atol = 1e-6 * torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert atol > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=atol, msg=name)
    assert quick_logged.keys() == logged.keys() - left_out(type(trainer), logged) and "entropy" in quick_logged
    for name in quick_logged.keys() - {"step_time"}:
        assert quick_logged[name] == pytest.approx(logged[name], rel=1e-5, abs=1e-5), name
    return quick_logged


def assert_same_logs(plain: dict, quick: dict, kind: type) -> None:
    assert quick.keys() == plain.keys() - left_out(kind, plain)
    for name in quick:
        if not any(word in name for word in ("runtime", "per_second", "step_time")):
            assert quick[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name


# --- The same as TRL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lora"), [*(("SFT", lora) for lora in LORAS), ("DPO", "all-linear"), ("KTO", "some")])
def test_loss_gradients_and_metrics_are_trls(build, kind, lora):
    trainer = build(kind, lora=LORAS[lora])
    for rows in (1, 2, 4) if kind != "KTO" else (4,):
        assert_same_step(trainer, rows)


@pytest.mark.parametrize("kind", ["prompt and completion", "messages", "text", "two turns", "nll", "long"])
def test_whatever_the_rows_of_sft_are(build, kind):
    """Labels at the answer, at every token, and at two answers with a question between; both of TRL's ways of nll."""
    rows = {
        "messages": MESSAGES,
        "text": [{"text": f"{q} {a}"} for q, a in zip(QUESTIONS, CHOSEN, strict=True)],
        "two turns": two_turns(),
        "long": [{"text": "Where is my order? " * n} for n in (90, 10, 120)],
    }.get(kind, ROWS)
    trainer = build("SFT", rows, loss_type="nll" if kind == "nll" else "chunked_nll", max_length=500)
    labelled = [[x != -100 for x in row["labels"]] for row in trainer.train_dataset]
    turns = [sum(b and not a for a, b in pairwise([False, *row])) for row in labelled]  # runs of labels in a row
    assert turns == [2 if kind == "two turns" else 1] * len(rows)
    assert [row[0] for row in labelled] == [kind in ("messages", "text", "long")] * len(rows)
    assert kind != "long" or sum(map(sum, labelled)) > 1.5 * llama.CHUNK_SIZE
    assert_same_step(trainer, len(rows))


def two_turns() -> list[dict]:
    """Tokenized rows with two answers each; labels at the answers only, -100 between and before them."""
    rows = []
    for row, again in zip(ROWS, GOOD[::-1], strict=True):
        turns = [*row["prompt"], *row["completion"], {"role": "user", "content": "Sure?"}, *again]
        ids, labels = [], []
        for end in range(2, len(turns) + 1):
            new = tokenizer().apply_chat_template(turns[:end])["input_ids"][len(ids) :]
            labels += new if turns[end - 1]["role"] == "assistant" else [-100] * len(new)
            ids += new
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("DPO", {"rows": STRINGS}), ("DPO", {"max_length": 20, "lora": LORAS["last layer"]}),
        ("DPO", {"pad_to_multiple_of": 32, "precompute_ref_log_probs": True}),
        ("KTO", {"max_length": 20}), ("KTO", {"pad_to_multiple_of": 32, "precompute_ref_log_probs": True}),
        ("KTO", {"loss_type": "apo_zero_unpaired", "desirable_weight": 3.0}),  # without a KL
        ("KTO", {"rows": [row for row in THUMBS if row["label"]], "desirable_weight": 3.0}),
        ("GRPO", {"lora": LORAS["last layer"]}), ("GRPO", {"beta": 0.3}),
        ("GRPO", {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "grpo"}), ("GRPO", {"num_iterations": 2}),
        ("GRPO", {"importance_sampling_level": "sequence", "loss_type": "dr_grpo", "scale_rewards": "none"}),
        ("GRPO", {"loss_type": "cispo", "epsilon_high": 5.0, "top_entropy_quantile": 0.5}),
        ("GRPO", {"mask_truncated_completions": True, "per_device_train_batch_size": 4, "pad_to_multiple_of": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_whatever_the_rows_and_the_settings_are(build, kind, changes):
    """Answers of one token, equal ones, and cut off; padding; the reference computed ahead; losses; thumbs up alone."""
    trainer = build(kind, **changes)
    assert_same_step(trainer, min(4, len(trainer.train_dataset)))  # TRL drops a row that cutting leaves without answer
    if changes.get("max_length") and kind == "DPO":
        lengths = [len(row["prompt_ids"] + row["rejected_ids"]) for row in trainer.train_dataset]
        assert trainer.data_collator(list(trainer.train_dataset))["input_ids"].shape[1] == 20 < max(lengths)


def test_every_loss_of_dpo(build, tmp_path):
    """Set where DPOTrainer's __init__ puts them."""
    configs = [DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **changes) for changes in EVERY_DPO_LOSS]
    trainer = build("DPO")
    for config in configs:
        trainer.loss_types, trainer.loss_weights = config.loss_type, config.loss_weights or [1.0]
        for name in ("label_smoothing", "ld_alpha", "f_divergence_type"):
            setattr(trainer, name, getattr(config, name))
        assert_same_step(trainer, 3)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("SFT", {"rows": ROWS[:3], "eval_rows": ROWS[:3]}),
        ("DPO", {"rows": PAIRS[:3], "eval_rows": PAIRS[1:]}),
        ("KTO", {"eval_rows": THUMBS[1:7], "precompute_ref_log_probs": True}),
        ("GRPO", {"eval_rows": [{"prompt": prompt} for prompt in PROMPTS[1:3]], "beta": 0.1}),
    ],
    ids=KINDS,
)
def test_a_whole_run_logs_the_same_and_ends_in_the_same_ordinary_adapter(build, tmp_path, recwarn, kind, changes):
    """Three optimizer steps, of two accumulated batches of uneven size but in GRPO; evaluation in uneven batches.

    Tolerance: Adam divides by the root of a gradient's mean square, so where that is near 0 rounding grows.
    """
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    how = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, **(two if kind != "GRPO" else {}), **changes}
    plain, quick = build(kind, **how), sped_up(build(kind, **how))
    for trainer in (plain, quick):
        trainer.train()
        if kind != "GRPO":
            trainer.evaluate(Dataset.from_list(changes["eval_rows"][:2]))  # logged too
    names = set()
    for theirs, ours in zip(plain.state.log_history, quick.state.log_history, strict=True):
        assert_same_logs(theirs, ours, KINDS[kind][0])
        names |= ours.keys()
    assert names >= {"loss", "grad_norm", "entropy", "num_tokens", "total_flos", "eval_loss", "eval_entropy"}
    assert [w.message for w in recwarn if isinstance(w.message, cpu.NotSpedUp)] == []
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(quick.model.state_dict()[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    model = quick.model
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[n.replace(".default", "")], w) for n, w in model.named_parameters() if "lora" in n)
    prompt = tokenizer()("Where is my order?", return_tensors="pt")
    with torch.no_grad():
        adapted, merged = model.eval()(**prompt).logits, model.merge_and_unload()
        torch.testing.assert_close(merged(**prompt).logits, adapted, rtol=1e-4, atol=1e-4)
    assert type(merged) is LlamaForCausalLM and cpu.covers(merged)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_bf16_is_ours_from_the_first_step_to_the_last(build, recwarn, kind):
    """TRL's default: accelerate wraps the model's forward when training begins, after speed_up."""
    trainer = build(kind, bf16=True, max_steps=3)
    result = cpu.speed_up(trainer)
    trainer.train()
    assert result
    assert [w.message for w in recwarn if isinstance(w.message, cpu.NotSpedUp)] == []


def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(build, tmp_path):
    """GRPO's, which samples its own answers here; SFT's: tests/test_resume.py."""
    file, ends = "adapter_model.safetensors", []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = sped_up(build("GRPO", save_strategy="steps", save_steps=1, trainer=GRPOTrainer))
        trainer.train(resume_from_checkpoint=resume)
        assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [1, 2]
        ends.append((tmp_path / "checkpoint-2" / file).read_bytes())
        shutil.rmtree(tmp_path / "checkpoint-2")
    assert ends[0] == ends[1] != (tmp_path / "checkpoint-1" / file).read_bytes()


def test_the_own_answers_of_grpo_end_as_trls_do(build):
    """Each is the decoder's, with the end token that was drawn behind it, one of two here, unless it was cut off."""
    quick = sped_up(build("GRPO", trainer=GRPOTrainer, max_completion_length=12))
    prompts = [tokenizer().apply_chat_template(prompt, return_dict=False) for prompt in PROMPTS for _ in "ab"]
    torch.manual_seed(3)
    free = llama.Decoder(quick.model).generate(prompts, 12, [], 1.0)
    quick.eos_token_ids = [free[0][4], free[1][6]]
    torch.manual_seed(3)
    drawn, logprobs = quick._generate_single_turn(prompts, None, {}, 2)
    torch.manual_seed(3)
    bare = llama.Decoder(quick.model).generate(prompts, 12, quick.eos_token_ids, 1.0)
    ended = [ids[-1] for ids in drawn if ids[-1] in quick.eos_token_ids]
    assert [ids[:-1] if ids[-1] in quick.eos_token_ids else ids for ids in drawn] == bare and logprobs is None
    assert set(ended) == set(quick.eos_token_ids) and drawn[0] == free[0][:5] and drawn[1] == free[1][:7]
    assert all(len(ids) == 12 for ids in drawn if ids[-1] not in quick.eos_token_ids) and len(ended) < len(drawn)


def test_predict_gives_trls_logits(build):
    trainer = build("SFT", loss_type="nll")
    theirs = trainer.predict(trainer.train_dataset).predictions
    ours = sped_up(trainer).predict(trainer.train_dataset).predictions
    assert ours.shape[0] == len(ROWS) and ours.shape[2] == 2048 and (ours == theirs).all()


# --- The first batch twice, and malloc --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", ["gradient", "loss"])
def test_a_mistake_of_ours_raises_in_the_first_step_and_leaves_the_adapter_as_it_was(build, monkeypatch, kind, wrong):
    """A gradient that is 1 % off in one layer, with the right loss; and a loss that is off."""
    trainer = sped_up(build(kind))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    call = llama.StackedLinear.__call__

    def slightly_off(self, x):
        out = call(self, x)
        if wrong == "loss":
            return 1.01 * out
        down = self.projections[0] is trainer.model.get_base_model().model.layers[1].mlp.down_proj
        return out + 0.01 * (out - out.detach()) if down else out

    monkeypatch.setattr(llama.StackedLinear, "__call__", slightly_off)
    with pytest.raises(cpu.SpeedUpError) as raised:
        trainer.train()
    assert raised.value.difference > cpu.TOLERANCE and str(raised.value).startswith("speed_up: ")
    assert (raised.value.parameter is not None) == (wrong == "gradient") or kind == "GRPO"
    if raised.value.parameter:
        assert raised.value.parameter in str(raised.value) and "lora_" in raised.value.parameter
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_first_batch_counts_once(build):
    """It is computed three times; tokens, metrics and random numbers are those of one."""
    plain, quick = build("SFT"), sped_up(build("SFT"))
    states = []
    for trainer in (plain, quick):
        torch.manual_seed(7)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(20))
        states.append((torch.get_rng_state(), trainer._total_train_tokens, dict(trainer._metrics["train"])))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1] > 0
    assert {k: len(v) for k, v in states[0][2].items()} == {k: len(v) for k, v in states[1][2].items()}


def test_what_malloc_is_told_is_taken_back_when_training_ends(build, monkeypatch):
    told = []
    monkeypatch.setattr(cpu, "_mallopt", told.append)
    trainer = sped_up(build("SFT"))
    assert told == []
    trainer.train()
    # Once when training begins, once when it ends
    assert [{value > 1 << 27 for value in settings.values()} for settings in told] == [{True}, {False}]


@pytest.mark.parametrize("when", ["first", "last"])
def test_one_number_of_a_frozen_weight_changed_under_data_is_found(build, when):
    """No version counter moves; at the latest the end of training finds it."""
    trainer = sped_up(build("SFT", max_steps=3))

    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == {"first": 1, "last": 3}[when]:
                layer = trainer.model.get_base_model().model.layers[1]
                layer.self_attn.v_proj.base_layer.weight.data[5, 7] += 20

    trainer.add_callback(Changes())
    with pytest.raises(cpu.SpeedUpError, match=r"1\.self_attn\.v_proj\.base_layer\.weight was changed"):
        trainer.train()


# --- bf16 -------------------------------------------------------------------------------------------------------------


def test_in_bf16_it_is_as_near_to_fp32_as_trl_is(build, monkeypatch):
    """bf16 has 8 bits: both ways of computing are off, and must be off by about as much (norm over all gradients)."""
    monkeypatch.setattr(cpu, "product_dtype", lambda bf16: torch.bfloat16)
    runs = {}
    for name in ("fp32", "trl", "quick"):
        trainer = build("SFT", bf16=name != "fp32")
        trainer = sped_up(trainer) if name == "quick" else trainer
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "fp32"):
            runs[name] = loss_and_gradients(trainer, 4)
    flat = {name: torch.cat([g.flatten().float() for g in run[1].values()]) for name, run in runs.items()}
    off = {name: ((flat[name] - flat["fp32"]).norm() / flat["fp32"].norm()).item() for name in ("trl", "quick")}
    assert 1e-4 < off["quick"] < 1.2 * off["trl"], off
    assert runs["quick"][0] == pytest.approx(runs["fp32"][0], rel=0.01)
    assert all(g.dtype == torch.float32 for g in runs["quick"][1].values())


def test_bf16_is_used_where_the_cpu_multiplies_it(monkeypatch):
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert cpu.product_dtype(True) == (torch.bfloat16 if native else torch.float32)
        assert cpu.product_dtype(False) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dpo_begins_at_ln_2(build, monkeypatch, dtype):
    """The reference is computed as the policy is, so that what bf16 rounds away cancels to the last bit."""
    monkeypatch.setattr(cpu, "product_dtype", lambda bf16: dtype)
    quick = sped_up(build("DPO"))
    batch = quick.data_collator(list(quick.train_dataset))
    assert quick.compute_loss(quick.model.train(), batch).item() == pytest.approx(math.log(2), abs=1e-7)
    assert quick._metrics["train"]["rewards/margins"] == [0.0] == quick._metrics["train"]["rewards/accuracies"]


# --- What it is not for -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused():
    """Asserts that a trainer stays as it is, and that a warning and the value say why."""

    def refused(trainer, reason: str) -> None:
        before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
        with pytest.warns(cpu.NotSpedUp) as warned:
            result = cpu.speed_up(trainer)
        (warning,) = [w.message for w in warned if isinstance(w.message, cpu.NotSpedUp)]
        assert not result and result.reason == warning.reason and reason in result.reason in str(warning)
        assert vars(trainer) == before and trainer.callback_handler.callbacks == callbacks

    return refused


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("SFT", {"gradient_checkpointing": True, "activation_offloading": True, "padding_free": True, "packing": True}),
        ("SFT", {"eval_packing": True, "fp16": True, "use_liger_kernel": True, "torch_compile": True}),
        ("SFT", {"loss_type": "dft", "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0}),
        ("DPO", {"gradient_checkpointing": True, "padding_free": True, "use_weighting": True}),
        ("KTO", {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0}),
        ("GRPO", {"gradient_checkpointing": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1}),
        ("GRPO", {"repetition_penalty": 1.1, "generation_kwargs": {"num_beams": 2}, "use_vllm": True}),
        ("GRPO", {"use_transformers_continuous_batching": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_setting_that_it_is_not_for_is_named(looked_at, refused, monkeypatch, kind, changes):
    trainer = looked_at(kind)
    for name, value in changes.items():
        with monkeypatch.context() as one:
            one.setattr(trainer.args, name, value)
            refused(trainer, f"{KINDS[kind][1].__name__} says {name}={value!r}")


ODD_LORAS = {
    "lora_dropout=0.1": LoraConfig(r=2, lora_dropout=0.1),
    "use_dora=True": LoraConfig(r=2, use_dora=True),
    "lora_bias=True": LoraConfig(r=2, lora_bias=True),
    "not plain LoRA (another method": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "different scalings": LoraConfig(r=2, target_modules="all-linear", alpha_pattern={"q_proj": 3}),
    "modules_to_save=['lm_head']": LoraConfig(r=2, modules_to_save=["lm_head"]),
    "others than the seven": LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    "trainable_token_indices=[1, 2]": LoraConfig(r=2, trainable_token_indices=[1, 2]),
}


@pytest.mark.parametrize("reason", ODD_LORAS)
def test_another_adapter(looked_at, refused, monkeypatch, reason):
    monkeypatch.setattr(looked_at("SFT"), "model", peft_model(ODD_LORAS[reason]))
    refused(looked_at("SFT"), reason)


def test_another_model(looked_at, refused, monkeypatch):
    """No adapter, two, a merged one, a trained norm, biases, four-bit weights; another architecture."""
    two, merged, norm, bias = (peft_model(EVERYTHING) for _ in range(4))
    two.add_adapter("ref", EVERYTHING)
    merged.merge_adapter()
    norm.get_base_model().model.norm.weight.requires_grad = True
    bias.config.attention_bias = True
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=8, n_layer=1, n_head=1))
    gpt2 = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert not cpu.covers(gpt2)
    for model, reason in (
        (base_model(), "the model has 0 LoRA adapters"), (two, "the model has 2 LoRA adapters"),
        (merged, "its adapter is merged"), (norm, "model.norm.weight"), (bias, "biases"),
        (gpt2, "the model is a GPT2LMHeadModel, and speed_up is for LlamaForCausalLM"),
    ):  # fmt: skip
        monkeypatch.setattr(looked_at("SFT"), "model", model)
        refused(looked_at("SFT"), reason)


def test_four_bit_weights(looked_at, refused, monkeypatch, tmp_path):
    base_model().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    monkeypatch.setattr(looked_at("SFT"), "model", get_peft_model(model, EVERYTHING))
    refused(looked_at("SFT"), "quantized")


@pytest.mark.parametrize(
    ("kind", "name", "value", "reason"),
    [
        ("SFT", "data_collator", list, "its data collator is not TRL's"),
        ("SFT", "compute_loss_func", len, "a loss that is not TRL's"),
        ("SFT", "compute_metrics", len, "compute_metrics needs all logits"),
        ("SFT", "preprocess_logits_for_metrics", len, "preprocess_logits_for_metrics needs all logits"),
        ("DPO", "ref_model", torch.nn.Linear(1, 1), "its reference is not the model"),
        ("KTO", "ref_model", torch.nn.Linear(1, 1), "its reference is not the model"),
    ],
)
def test_other_plug_ins(looked_at, refused, monkeypatch, kind, name, value, reason):
    monkeypatch.setattr(looked_at(kind), name, value)
    refused(looked_at(kind), reason)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_with_a_loss_of_its_own_keeps_it(looked_at, refused, monkeypatch, kind):
    name = "compute_loss" if kind == "SFT" else "_compute_loss"
    mine = type("Mine", (KINDS[kind][0],), {name: lambda self, *_, **__: None})
    with monkeypatch.context() as patch:
        patch.setattr(looked_at(kind), "__class__", mine)
        refused(looked_at(kind), "a loss that is not TRL's")
    monkeypatch.setattr(looked_at(kind), name, len, raising=False)
    refused(looked_at(kind), "a loss that is not TRL's")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_changes_nothing(build, kind):
    trainer = build(kind)
    first, before = cpu.speed_up(trainer), dict(vars(trainer))
    callbacks = list(trainer.callback_handler.callbacks)
    assert cpu.speed_up(trainer) is first and first
    assert vars(trainer) == before and trainer.callback_handler.callbacks == callbacks


def test_other_machines_and_other_trainers(looked_at, refused, monkeypatch, tmp_path):
    trainer = looked_at("SFT")
    for name, value, reason in (
        ("device", torch.device("cuda"), "it trains on 'cuda'"), ("world_size", 2, "one of 2 processes")
    ):  # fmt: skip
        with monkeypatch.context() as one:
            one.setattr(type(trainer.args), name, property(lambda self, value=value: value))
            refused(trainer, reason)
    refused(Trainer(base_model(), TrainingArguments(str(tmp_path), use_cpu=True)), "it is a Trainer, and speed_up is")


def test_lora_layers_written_by_hand_are_left_to_generate():
    """They have a base_layer and a lora_A too, but not PEFT's switches."""
    model = copy.deepcopy(base_model())
    assert cpu.covers(model)
    add_lora(model, ["up_proj"], 2, 4)
    assert not cpu.covers(model)


# --- Batches ----------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(1, 3), max_size=5)


@settings(max_examples=60, deadline=None)
@given(ids, st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=4))
def test_where_beginnings_are_shared_each_row_sees_exactly_itself(first, pairs):
    """Each row alone, in pairs (the second of each in the second half of the rows), and grouped by its last token."""
    rows = [[9, *first, *prompt, *pair[side]] for side in (0, 1) for prompt, *pair in pairs]
    for keys in (None, [*range(len(pairs)), *range(len(pairs))], [row[-1] for row in rows]):
        tokens, positions, places = llama.pack_with_shared_prefix(rows, keys)
        assert len(tokens) == len(positions) and len(tokens) % llama.ROUND_TO == 0
        for row, where in zip(rows, places, strict=True):
            assert tokens[where].tolist() == row and positions[where].tolist() == [*range(len(row))]
        table, found = llama.unpack(places, len(tokens))
        assert table.shape == (len(rows), max(map(len, rows)))
        used = sorted({place for row in places for place in row})
        assert table.flatten()[found[used]].tolist() == used
        for place in used:  # in a row that sees, up to this token, what the token's own rows see
            row, i = divmod(int(found[place]), table.shape[1])
            before = table[row, : i + 1].tolist()
            assert before in [where[: i + 1] for where in places if place in where]


def test_what_a_pair_begins_with_stands_once():
    """1 2 begins all rows, 3 the first pair (1 2 3 4, 1 2 3 5 6), 7 8 the second, where one answer is all the other
    begins with."""
    rows = [[1, 2, 3, 4], [1, 2, 7, 8], [1, 2, 3, 5, 6], [1, 2, 7, 8, 9]]
    tokens, positions, places = llama.pack_with_shared_prefix(rows, "abab")
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, *[0] * 7]
    assert positions.tolist() == [0, 1, 2, 3, 3, 4, 2, 3, 4, *[0] * 7]
    assert places == [[0, 1, 2, 3], [0, 1, 6, 7], [0, 1, 2, 4, 5], [0, 1, 6, 7, 8]]


def test_what_rows_begin_with_is_read_once_and_last_tokens_never(build, monkeypatch):
    """Expected: the beginnings of rows, each counted once a pair, and once if all rows begin so."""
    quick, read, forward = sped_up(build("DPO")), [], llama.PackedLlama.forward

    def counted(self, ids, *args, **kwargs):
        read.append(len(ids))
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(llama.PackedLlama, "forward", counted)
    pairs = list(quick.train_dataset)
    for _ in "ab":  # of the first batch there are two
        read.clear()
        quick.compute_loss(quick.model, quick.data_collator(pairs))
    rows = [(i, p["prompt_ids"] + p[side]) for i, p in enumerate(pairs) for side in ("chosen_ids", "rejected_ids")]
    shared = sum(len({tuple(ids[:n]) for _, ids in rows}) == 1 for n in range(1, min(len(ids) for _, ids in rows)))
    once = {(i if n > shared else None, tuple(ids[:n])) for i, ids in rows for n in range(1, len(ids))}
    wanted = math.ceil(len(once) / llama.ROUND_TO) * llama.ROUND_TO
    assert read == [wanted, wanted] and shared > 10 and wanted < 0.6 * sum(len(ids) for _, ids in rows)


turns = st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=2, max_size=8)


@settings(max_examples=25, deadline=None)
@given(ids, st.lists(turns, min_size=1, max_size=4), st.integers(0, 2))
def test_each_label_is_scored_after_its_own_row(first, rows, left):
    """Against the model on each row alone: rows with a common beginning, labels anywhere, padding on both sides."""
    model, packed = base_model(), llama.PackedLlama(base_model(), torch.float32)
    rows = [[(False, 9), *((False, token) for token in first), *row] for row in rows]
    width = left + max(map(len, rows))
    input_ids, read = (torch.zeros(len(rows), width, dtype=kind) for kind in (torch.long, torch.bool))
    asked, wanted = torch.zeros_like(read), torch.zeros(2, len(rows), width)
    for i, row in enumerate(rows):
        at, tokens = slice(left, left + len(row)), torch.tensor([token for _, token in row])
        input_ids[i, at], read[i, at] = tokens, True
        asked[i, left : left + len(row) - 1] = torch.tensor([label for label, _ in row[1:]])
        with torch.no_grad():
            log_p = model(tokens[None]).logits[0].log_softmax(-1)
        wanted[0, i, at][:-1] = log_p[:-1].gather(1, tokens[1:, None])[:, 0]
        wanted[1, i, at] = -(log_p.exp() * log_p).sum(-1)
    with torch.no_grad():
        logps, entropy, _ = llama.per_token_logps(packed, input_ids, read, input_ids.roll(-1, 1), asked)
    torch.testing.assert_close(logps, wanted[0] * asked, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, wanted[1] * asked, rtol=1e-4, atol=1e-4)
