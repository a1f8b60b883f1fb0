"""ftlab.cpu.speed_up against TRL's own SFTTrainer: same losses, same gradients, same logs, same adapter.

DPOTrainer has test_cpu_dpo.py, greedy answers have test_decode.py; sampled answers are at the end of this file.
TRL's non-default flags: gradient_checkpointing=False, use_cpu=True, bf16=False unless said.
"""

import shutil
from collections import Counter
from itertools import pairwise, product, takewhile

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
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
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from ftlab import cpu
from ftlab.paths import DATA
from ftlab.scratch.lora import add_lora

MICRO = DATA / "micro" / "model"
SYSTEM = {"role": "system", "content": "Answer in one word."}
QUESTIONS = ["hi", "Where is my order? It is late.", "2 + 2?", "Say something longer about rain and rivers, please."]
ANSWERS = ["yes", "sorry, it is on its way", "4", "wet"]
ROWS = [
    {
        "prompt": [SYSTEM, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
EVERYTHING = LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear")
LORAS = {
    "all-linear": EVERYTHING,
    "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "some": LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj", "o_proj", "up_proj", "down_proj"]),
    "last layer": LoraConfig(r=3, target_modules=["q_proj", "gate_proj"], layers_to_transform=[1]),
}
pytestmark = pytest.mark.usefixtures("one_thread")
disable_progress_bars()


def two_turns(tokenizer) -> list[dict]:
    """Tokenized rows with two answers each; labels at the answers only, -100 between and before them."""
    rows = []
    for row, again in zip(ROWS, ANSWERS[::-1], strict=True):
        turns = [*row["prompt"], *row["completion"], {"role": "user", "content": "Sure?"}]
        turns.append({"role": "assistant", "content": again})
        ids, labels = [], []
        for end in range(2, len(turns) + 1):
            new = tokenizer.apply_chat_template(turns[:end])["input_ids"][len(ids) :]
            labels += new if turns[end - 1]["role"] == "assistant" else [-100] * len(new)
            ids += new
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def sft_trainer(
    model, folder, rows=ROWS, eval_rows=None, lora=EVERYTHING, dtype=torch.float32, quantization_config=None, **changes
):
    """TRL's, built as a learner builds it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = [Dataset.from_list(part) if part else None for part in (rows, eval_rows)]
    asked = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-3, "logging_steps": 1}
    asked |= {"gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    torch.manual_seed(0)  # lora_A is drawn in SFTTrainer's __init__, before it sets a seed
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=quantization_config),
        args=SFTConfig(str(folder), **asked | {"save_strategy": "no"} | changes),
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        peft_config=lora,
    )


def both(*arguments, **named) -> list[SFTTrainer]:
    trainers = [sft_trainer(*arguments, **named) for _ in range(2)]
    cpu.speed_up(trainers[1])
    assert trainers[1].data_collator is cpu.pack
    return trainers


def loss_and_gradients(trainer, rows: int, training: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    """One step's, before the optimizer, with lora_B moved away from 0 (at 0, lora_A has no gradient)."""
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model.train(training), dict(batch), num_items_in_batch=items)
    loss.backward()
    return loss.item(), {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}


def assert_same_step(plain, quick, rows: int, left_out: frozenset = frozenset()) -> None:
    """left_out: what TRL alone logs.

    Tolerance: sums of log-probs of about -100, where fp32 numbers are 1e-5 apart. A loss squares them or not, so its
    error is of that size, or of as many of its own last places; processors with AVX-512 add in another order.
    """
    (loss, gradients), (quick_loss, quick_gradients) = (loss_and_gradients(t, rows) for t in (plain, quick))
    assert quick_loss == pytest.approx(loss, rel=2e-6, abs=1e-5)
    assert quick_gradients.keys() == gradients.keys() and gradients
    atol = 1e-6 * torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=atol, msg=name)
    assert quick._metrics["train"].keys() == plain._metrics["train"].keys() - left_out
    for name in plain._metrics["train"].keys() - left_out:
        values = plain._metrics["train"][name]
        assert quick._metrics["train"][name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


def assert_same_run(plain, quick, left_out: frozenset = frozenset()) -> set[str]:
    """Trains both; their logs, but for what is left out, and adapters are equal. Returns the names of what is logged.

    Tolerance: Adam divides by the root of a gradient's mean square, so where that is near 0 rounding grows.
    """
    for trainer in (plain, quick):
        trainer.train()
    logs = [trainer.state.log_history for trainer in (plain, quick)]
    assert [record.keys() - left_out for record in logs[0]] == [record.keys() for record in logs[1]]
    seen = set()
    for theirs, ours in zip(*logs, strict=True):
        for name in theirs.keys() - {"total_flos"} - left_out:  # an estimate from the tokens of a batch, padding too
            if not any(word in name for word in ("runtime", "per_second", "step_time")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
                seen.add(name)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(quick.model.state_dict()[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    return seen


def assert_resumes_to_the_same_bytes(build, tmp_path) -> None:
    """Four steps of build(), and the last two of them again from the checkpoint."""
    file, ends = "adapter_model.safetensors", []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = build()
        cpu.speed_up(trainer)
        trainer.train(resume_from_checkpoint=resume)
        assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [1, 2, 3, 4]
        ends.append((tmp_path / "checkpoint-4" / file).read_bytes())
        shutil.rmtree(tmp_path / "checkpoint-4")
    assert ends[0] == ends[1]


def assert_stays_plain(trainer, reason: str, capsys) -> None:
    before, collator = dict(vars(trainer)), trainer.data_collator
    capsys.readouterr()
    cpu.speed_up(trainer)
    said = capsys.readouterr().out
    assert said.startswith("speed_up leaves this trainer as plain TRL: ") and said.count("\n") == 1 and reason in said
    assert vars(trainer) == before and trainer.data_collator is collator


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_loss_gradients_and_metrics_are_trls(tiny, tmp_path, rows, lora):
    plain, quick = both(tiny, tmp_path, lora=lora)
    assert_same_step(plain, quick, rows)


@pytest.mark.parametrize("kind", ["prompt and completion", "messages", "text", "two turns", "nll"])
def test_whatever_the_rows_are(tmp_path, kind):
    """Labels at the answer, at every token, and at two answers with a question between; both of TRL's ways of nll."""
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    rows = {
        "messages": MESSAGES,
        "text": [{"text": f"{q} {a}"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
        "two turns": two_turns(tokenizer),
    }.get(kind, ROWS)
    plain, quick = both(MICRO, tmp_path, rows=rows, loss_type="nll" if kind == "nll" else "chunked_nll")
    labelled = [[x != -100 for x in row["labels"]] for row in plain.train_dataset]
    turns = [sum(b and not a for a, b in pairwise([False, *row])) for row in labelled]  # runs of labels in a row
    assert turns == [2 if kind == "two turns" else 1] * 4
    assert [row[0] for row in labelled] == [kind in ("messages", "text")] * 4
    assert_same_step(plain, quick, 4)


def test_long_rows(tiny, tmp_path):
    rows = [{"text": "Where is my order? " * n} for n in (90, 10, 120)]
    plain, quick = both(tiny, tmp_path, rows=rows, max_length=700)
    assert max(len(row["input_ids"]) for row in plain.train_dataset) == 700
    assert_same_step(plain, quick, 3)


@pytest.mark.parametrize("model", ["tiny", "micro"])
def test_a_whole_run_logs_the_same_and_ends_in_the_same_adapter(tiny, tmp_path, model, capsys):
    """Four optimizer steps of two accumulated batches of uneven size; evaluation in uneven batches."""
    plain, quick = both(
        tiny if model == "tiny" else MICRO, tmp_path, rows=ROWS[:3], eval_rows=ROWS[:3], max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=2,
        eval_strategy="steps", eval_steps=2, eval_on_start=True,
    )  # fmt: skip
    seen = assert_same_run(plain, quick)
    assert seen >= {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_entropy"}
    first, quick_first = (trainer.state.log_history[0]["eval_loss"] for trainer in (plain, quick))
    assert quick_first == pytest.approx(first, rel=1e-6)  # before any step
    assert "speed_up" not in capsys.readouterr().out


def test_evaluate_on_other_rows_goes_the_same_way(tmp_path):
    results = [trainer.evaluate(Dataset.from_list(ROWS[1:])) for trainer in both(MICRO, tmp_path)]
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bf16_it_is_as_near_to_fp32_as_trl_is(tmp_path, monkeypatch, dtype):
    """bf16 has 8 bits: both ways of computing are off, and must be off by about as much (norm over all gradients)."""
    monkeypatch.setattr(cpu, "product_dtype", lambda bf16: torch.bfloat16 if bf16 else torch.float32)
    truth, trl = (sft_trainer(MICRO, tmp_path, dtype=d, bf16=d is not None) for d in (torch.float32, dtype))
    truth.args.bf16 = False
    quick = sft_trainer(MICRO, tmp_path, dtype=dtype, bf16=True)
    cpu.speed_up(quick)
    runs = {}
    for name, trainer in {"fp32": truth, "trl": trl, "quick": quick}.items():
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


def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(tmp_path):
    changes = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    assert_resumes_to_the_same_bytes(lambda: sft_trainer(MICRO, tmp_path, **changes), tmp_path)


def test_afterwards_the_model_is_an_ordinary_peft_model(tmp_path):
    """It answers by generate, is saved under PEFT's own keys and merges, all with the plain run's result."""
    answers = []
    for trainer in both(MICRO, tmp_path, max_steps=3, learning_rate=1e-2):
        trainer.train()
        assert trainer.model.training
        prompt = trainer.processing_class("Where is my order?", return_tensors="pt")
        asked = {**prompt, "max_new_tokens": 12, "do_sample": False}
        model = trainer.model.eval()
        model.save_pretrained(tmp_path / "adapter")
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(saved[n.replace(".default", "")], w) for n, w in model.named_parameters() if "lora" in n)
        answers.append(model.generate(**asked)[0].tolist())
        merged = model.merge_and_unload()
        assert type(merged).__name__ == "LlamaForCausalLM" and cpu.covers(merged)
        answers.append(merged.generate(**asked)[0].tolist())
        length = prompt["input_ids"].shape[1]
        ours = cpu.Decoder(merged).answer(prompt["input_ids"].tolist(), 12, [merged.generation_config.eos_token_id])[0]
        assert answers[-1][length : length + len(ours)] == ours
    assert all(answer == answers[0] for answer in answers)


def test_a_bf16_model_answers_as_its_weights_in_fp32(tmp_path, monkeypatch):
    """Where the CPU does not multiply bf16; where it does, near-ties may fall the other way."""
    monkeypatch.setattr(cpu, "product_dtype", lambda bf16: torch.float32)
    models = [AutoModelForCausalLM.from_pretrained(MICRO, dtype=d) for d in (torch.bfloat16, torch.float32)]
    prompts = [[5, 6, 7, 8], [5, 6, 7], [5, 6, 9, 10, 11, 12]]
    half, full = (cpu.Decoder(model).answer(prompts, 10, [2]) for model in models)
    assert half == full and models[0].lm_head.weight.dtype == torch.bfloat16


# --- What it is not for -----------------------------------------------------------------------------------------------

REFUSED = {
    "gradient_checkpointing=True": {"gradient_checkpointing": True},
    "padding_free=True": {"padding_free": True, "max_length": None},
    "packing=True": {"packing": True, "packing_strategy": "wrapped"},
    "loss_type='dft'": {"loss_type": "dft"},
    "label_smoothing_factor=0.1": {"label_smoothing_factor": 0.1, "loss_type": "nll"},
    "neftune_noise_alpha=5.0": {"neftune_noise_alpha": 5.0},
    "include_num_input_tokens_seen='all'": {"include_num_input_tokens_seen": "all"},
    "lora_dropout=0.1": {"lora": LoraConfig(r=2, lora_dropout=0.1)},
    "a variant (DoRA": {"lora": LoraConfig(r=2, use_dora=True)},
    "different scalings": {"lora": LoraConfig(r=2, target_modules="all-linear", alpha_pattern={"q_proj": 3})},
    "others than the seven": {"lora": LoraConfig(r=2, modules_to_save=["lm_head"]), "loss_type": "nll"},
    "quantized, or others than": {"lora": LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), "loss_type": "nll"},
    "or others": {"lora": LoraConfig(r=2, trainable_token_indices=[1, 2]), "loss_type": "nll"},
    "0 LoRA adapters": {"lora": None},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_is_not_for_stays_plain_trl_and_one_line_says_why(tmp_path, capsys, reason):
    trainer = sft_trainer(MICRO, tmp_path, max_steps=1, **REFUSED[reason])
    assert_stays_plain(trainer, reason, capsys)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        ("args", "device", torch.device("cuda"), "it trains on 'cuda'"),
        ("args", "world_size", 2, "one of 2 processes"),
        ("trainer", "data_collator", list, "its data collator is type"),
        ("trainer", "compute_loss_func", len, "a loss of its own"),
        ("trainer", "compute_metrics", len, "compute_metrics needs all logits"),
    ],
)
def test_other_machines_and_other_plug_ins(tmp_path, capsys, monkeypatch, owner, name, value, reason):
    trainer = sft_trainer(MICRO, tmp_path)
    if owner == "args":
        monkeypatch.setattr(type(trainer.args), name, property(lambda self: value))
    else:
        setattr(trainer, name, value)
    capsys.readouterr()
    cpu.speed_up(trainer)
    assert reason in capsys.readouterr().out and "compute_loss" not in vars(trainer)


def test_a_trainer_with_a_loss_of_its_own_keeps_it(tmp_path, capsys):
    class Mine(SFTTrainer):
        def compute_loss(self, *arguments, **named):
            return super().compute_loss(*arguments, **named)

    trainer = sft_trainer(MICRO, tmp_path)
    trainer.__class__ = Mine
    capsys.readouterr()
    cpu.speed_up(trainer)
    assert "a loss of its own" in capsys.readouterr().out and "compute_loss" not in vars(trainer)


def test_four_bit_weights(tiny, tmp_path, capsys):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = sft_trainer(tiny, tmp_path, quantization_config=quantization, max_steps=1)
    capsys.readouterr()
    cpu.speed_up(trainer)
    assert "some layers are quantized" in capsys.readouterr().out
    trainer.train()


def test_another_architecture(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=8, n_layer=1, n_head=1))
    args = SFTConfig(
        str(tmp_path), max_steps=1, gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none"
    )
    lora = LoraConfig(r=2, target_modules=["c_attn"])
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer, peft_config=lora
    )
    capsys.readouterr()
    cpu.speed_up(trainer)
    assert "the model is a GPT2LMHeadModel, and speed_up is for LlamaForCausalLM" in capsys.readouterr().out
    assert not cpu.covers(model)
    trainer.train()


def test_lora_layers_written_by_hand_are_left_to_generate():
    """They have a base_layer and a lora_A too, but not PEFT's switches."""
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    assert cpu.covers(model)
    add_lora(model, ["up_proj"], 2, 4)
    assert not cpu.covers(model)


def test_another_trainer_is_an_error(tmp_path):
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(MICRO), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="is for SFTTrainer, DPOTrainer, KTOTrainer and GRPOTrainer, got Trainer"):
        cpu.speed_up(trainer)


def test_twice_is_once_and_predict_says_what_it_needs(tmp_path, capsys):
    trainer = sft_trainer(MICRO, tmp_path)
    cpu.speed_up(trainer)
    once = trainer.compute_loss
    cpu.speed_up(trainer)
    assert trainer.compute_loss is once and "speed_up" not in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="a trainer without speed_up"):
        trainer.predict(trainer.train_dataset)


# --- Batches ----------------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@st.composite
def batches(draw):
    """Rows with a common beginning, then turns: a few tokens without labels, a few with."""
    shared = draw(st.lists(st.integers(1, 9), max_size=4))
    rows = []
    for turns in draw(st.lists(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=3), min_size=1, max_size=4)):
        ids, labels = list(shared), [-100] * len(shared)
        for asked, answered in turns:
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        rows.append({"input_ids": ids, "labels": labels} if draw(st.booleans()) else {"input_ids": ids})
    return rows


@settings(max_examples=200, deadline=None)
@given(batches())
def test_a_packed_batch_asks_each_row_for_its_own_labels(rows):
    batch = cpu.pack(rows)
    assert batch["lengths"].tolist() == [len(row["input_ids"]) for row in rows]
    assert next(iter(batch)) == "lengths"  # Trainer takes the batch size from it
    seen, (first, *targets) = contexts(batch), batch["labels"].tolist()
    asked = [
        (row["input_ids"][:i], label)
        for row in rows
        for i, label in enumerate(row.get("labels", row["input_ids"]))
        if i and label != -100
    ]
    got = [(seen[place], target) for place, target in zip(batch["logits_to_keep"].tolist(), targets, strict=True)]
    assert first == -100 and got == asked


ids = st.lists(st.integers(1, 3), max_size=5)


@settings(max_examples=200, deadline=None)
@given(ids, st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=4))
def test_where_beginnings_are_shared_each_row_sees_exactly_itself(first, pairs):
    """Each row alone, in pairs (the second of each in the second half of the rows), and grouped by its last tokens."""
    rows = [[9, *first, *prompt, *pair[side]] for side in (0, 1) for prompt, *pair in pairs]
    for keys in (None, [*range(len(pairs)), *range(len(pairs))], [row[-1:] for row in rows]):
        batch, places = cpu.share_prefixes(rows, keys)
        seen = contexts(batch)
        assert [[seen[place] for place in each] for each in places] == [
            [row[: i + 1] for i in range(len(row))] for row in rows
        ]


def contexts(batch: dict) -> list[list[int]]:
    """For each place, the tokens along the path that attention takes, up to itself; their positions count from 0."""
    ids, positions = (batch[name][0].tolist() for name in ("input_ids", "position_ids"))
    segments = [range(*ends) for ends in pairwise(batch["cu_seqlens"].tolist())]
    assert len(ids) % cpu.ROUND_TO == 0 and [i for segment in segments for i in segment] == list(range(len(ids)))
    padding, seen = max(reversed(range(len(ids))), key=lambda i: ids[i] != 0) + 1, []
    for path in batch["paths"]:
        along = [i for segment in path for i in segments[segment]]
        for i in segments[path[-1]]:
            before = along[: along.index(i) + 1]
            assert i >= padding or [positions[j] for j in before] == list(range(len(before)))
            seen.append([ids[j] for j in before])
    return seen


def test_what_a_pair_begins_with_stands_once():
    """1 2 begins all rows, 3 the first pair (1 2 3 4, 1 2 3 5 6), 7 8 the second, where one answer is all the other
    begins with."""
    batch, places = cpu.share_prefixes([[1, 2, 3, 4], [1, 2, 7, 8], [1, 2, 3, 5, 6], [1, 2, 7, 8, 9]], "abab")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, *[0] * 7]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 4, 6, 8, 16]
    assert batch["paths"] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [0, 4, 5]]
    assert places == [[0, 1, 2, 3], [0, 1, 6, 7], [0, 1, 2, 4, 5], [0, 1, 6, 7, 8]]


# --- Sampled answers --------------------------------------------------------------------------------------------------


def random_llama(vocab_size: int) -> LlamaForCausalLM:
    """Its weights are large, so that the next token depends on the last ones."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.3, **shape, **special)).eval()


@pytest.mark.parametrize("stop", [[], [4], [0, 2, 4]])
def test_what_it_draws_is_distributed_as_softmax_of_the_logits_over_the_temperature(stop):
    """Two tokens out of five, 4,000 times: chi-square over the 25 answers, whose probabilities are enumerated.

    Answers that `stop` ends are one each. Where most of them end at once, the others go on in a smaller batch. With 24
    degrees of freedom 51 is passed once in a thousand seeds; the same draws are far from another temperature's.
    """
    model, n, prompt = random_llama(5), 4000, [1, 2, 3]
    seeded = torch.Generator().manual_seed(0)
    drawn = cpu.Decoder(model).answer([prompt] * n, 2, stop, temperature=2.5, generator=seeded)
    counts = Counter(map(tuple, drawn))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, token] for token in range(5)])).logits[:, 2:].double()

    def chi_square(temperature: float) -> float:
        p, expected = (logits / temperature).softmax(-1), Counter()
        for pair in product(range(5), repeat=2):  # P(first) P(second | first)
            said = tuple(takewhile(lambda token: token not in stop, pair))
            expected[said] += n * (p[0, 0, pair[0]] * p[pair[0], 1, pair[1]]).item()
        assert min(expected.values()) > 5 and counts.keys() <= expected.keys()
        return sum((counts[said] - e) ** 2 / e for said, e in expected.items())

    assert chi_square(2.5) < 51 and chi_square(1.7) > 100 and chi_square(4.5) > 100


def test_the_generator_alone_decides():
    decoder, prompts = cpu.Decoder(random_llama(64)), [[5, 6, 7], [5, 6]]
    state = torch.get_rng_state()
    a, again, b = (
        decoder.answer(prompts, 12, [], temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert a == again != b and torch.equal(torch.get_rng_state(), state)
    assert decoder.answer(prompts, 12, []) == decoder.answer(prompts, 12, [], temperature=1e-4)  # greedy
