"""ftlab.pipeline.train against a naive loop, uninterrupted runs, and its second engine; on a tiny random Llama.

Runs that must die run in processes of their own, forked from one that has imported the libraries already (forkserver).
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from ftlab.pipeline.models import load
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import (
    DONE,
    LONG,
    base_model,
    last_checkpoint,
    resolve_precision,
    rows_from,
    sft_trainer,
    train,
    train_in_process,
    training_arguments,
)

# 24 rows of many lengths, 4 a step: 6 steps an epoch, 18 in all; checkpoints at 3, 6, 9, ...: within epochs and between
ROWS = [
    {"prompt": f"Order {i}" + " please" * (7 * i % 20), "completion": f" Answer {i}" + " ok" * (3 * i % 8 + 1)}
    for i in range(24)
]
STEPS = 18
KILL = -signal.SIGKILL
pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_for(model: Path, **changes) -> Recipe:
    settings = {
        "model": str(model),
        "precision": "fp32",
        "r": 4,
        "lora_dropout": 0.05,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
    }
    lengths = {"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3, "logging_steps": 1}
    return Recipe.from_dict({**settings, **lengths, **changes})


def weights(folder: Path) -> bytes:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return file.read_bytes()


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in log_of(folder) if "loss" in record]


# --- Runs in processes of their own -----------------------------------------------------------------------------------


def run(recipe: Recipe, rows: list[dict], folder: Path, eval_rows: list[dict] | None = None, die_at: int = 0) -> None:
    """Trains, noting in folder/seen the steps made *here*; dies after step `die_at`, before its checkpoint."""
    folder.mkdir(exist_ok=True)
    with (folder / "seen").open("w") as seen:

        def on_log(record: dict) -> None:
            print(record["step"], file=seen, flush=True)
            if record["step"] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        train(recipe, rows, eval_rows, folder, on_log=on_log)


def run_and_die_writing(recipe: Recipe, rows: list[dict], folder: Path, step: int, name: str) -> None:
    """Trains, and is gone when half of one file of one checkpoint is written (of DONE: just before it is)."""
    save, replace, victim = torch.save, os.replace, folder / f"checkpoint-{step}" / name

    def half_save(thing, path, *args, **kwargs):
        if Path(path) != victim:
            return save(thing, path, *args, **kwargs)
        save(thing, buffer := io.BytesIO())
        victim.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def no_replace(source, target, *args, **kwargs):
        if Path(target) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, *args, **kwargs)

    torch.save, os.replace = half_save, no_replace
    run(recipe, rows, folder)


def first_seen(folder: Path) -> int:
    return int((folder / "seen").read_text().split()[0])


@pytest.fixture(scope="module")
def whole(tiny, apart, tmp_path_factory) -> Path:
    """The run folder of `recipe_for(tiny)` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert apart(run, recipe_for(tiny), ROWS, folder) == 0
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert losses(folder) == losses(whole)
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))


def test_the_seed_decides_the_whole_run_whatever_was_drawn_before(tiny, whole, tmp_path):
    """TRL draws lora_A before transformers sets the seed. (Second half: these equalities can fail.)"""
    torch.rand(3)
    run(recipe_for(tiny), ROWS, tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)
    starts = []
    for seed in (0, 1):
        started = train(recipe_for(tiny, seed=seed, warmup_steps=9, max_steps=1), ROWS, folder=tmp_path / str(seed))
        starts.append(
            started.model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
        )
    assert not torch.equal(*starts)


@pytest.mark.parametrize("step", [2, 5, 7, 11, 13, 17])
def test_killed_at_a_step_and_resumed_ends_in_the_same_weights(step, tiny, apart, whole, tmp_path):
    """2: no checkpoint yet. 5, 11, 17: it goes on within epochs 1, 2, 3. 7, 13: it goes on between two epochs."""
    assert apart(run, recipe_for(tiny), ROWS, tmp_path, None, step) == KILL
    assert log_of(tmp_path)[-1]["step"] == step
    assert apart(run, recipe_for(tiny), ROWS, tmp_path) == 0
    assert first_seen(tmp_path) == step // 3 * 3 + 1  # it went on; starting over would give the same weights too
    assert_same_run(tmp_path, whole)


def test_killed_from_outside_at_any_moment_and_resumed_ends_in_the_same_weights(tiny, start, apart, whole, tmp_path):
    step = random.SystemRandom().randrange(1, STEPS - 6)
    process = start(run, recipe_for(tiny), ROWS, tmp_path)
    while not (tmp_path / "log.jsonl").is_file() or len(log_of_torn(tmp_path)) < step:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == KILL, f"the run was over before the kill at step {step}"
    assert apart(run, recipe_for(tiny), ROWS, tmp_path) == 0
    assert_same_run(tmp_path, whole)


def log_of_torn(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


def test_killed_three_times_ends_in_the_same_weights(tiny, apart, whole, tmp_path):
    for step in (5, 10, 17):
        assert apart(run, recipe_for(tiny), ROWS, tmp_path, None, step) == KILL
    assert apart(run, recipe_for(tiny), ROWS, tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_full_fine_tuning_killed_and_resumed_ends_in_the_same_weights(tiny, apart, tmp_path):
    recipe = recipe_for(tiny, r=0, learning_rate=1e-3, max_steps=8)
    assert apart(run, recipe, ROWS, tmp_path / "whole") == 0
    assert apart(run, recipe, ROWS, tmp_path / "killed", None, 7) == KILL
    assert apart(run, recipe, ROWS, tmp_path / "killed") == 0
    assert first_seen(tmp_path / "killed") == 7
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("step", "name"),
    [(3, "rng_state.pth"), (6, "training_args.bin"), (9, "optimizer.pt"), (12, "scheduler.pt"), (15, DONE)],
)
def test_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(step, name, tiny, apart, whole, tmp_path):
    assert apart(run_and_die_writing, recipe_for(tiny), ROWS, tmp_path, step, name) == KILL
    assert (tmp_path / f"checkpoint-{step}").is_dir() and not (tmp_path / f"checkpoint-{step}" / DONE).exists()
    assert apart(run, recipe_for(tiny), ROWS, tmp_path) == 0
    assert first_seen(tmp_path) == step - 3 + 1
    assert_same_run(tmp_path, whole)


def test_a_half_written_checkpoint_is_removed_and_the_newest_complete_one_taken(tmp_path):
    for number in (3, 9, 12, 15):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "adapter_model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path / "nowhere") is None
    for number in (3, 9, 12):
        (tmp_path / f"checkpoint-{number}" / DONE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")  # by number, not by name
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-9", "checkpoint-12"}


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_on_the_command_line_leaves_a_checkpoint_and_no_traceback(tiny, apart, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = recipe_for(tiny, epochs=5, save_steps=1000, train_file=str(rows))
    folder, file = tmp_path / "run", recipe.to_yaml(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "ftlab.pipeline.train", str(file), "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (folder / "log.jsonl").is_file() or len(log_of_torn(folder)) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "interrupted, go on with the same command" in said and "Traceback" not in said
    stopped = log_of(folder)[-1]["step"]
    assert 3 <= stopped < 30 and last_checkpoint(folder) == str(folder / f"checkpoint-{stopped}")
    assert apart(run, recipe, ROWS, folder) == 0
    assert first_seen(folder) == stopped + 1
    assert apart(run, recipe, ROWS, tmp_path / "whole") == 0
    assert weights(folder) == weights(tmp_path / "whole") and losses(folder) == losses(tmp_path / "whole")


def test_one_ctrl_c_ends_the_run_after_the_step_and_a_second_one_raises(tiny, tmp_path, request):
    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, started_with))
    before = signal.getsignal(signal.SIGINT)

    def press(times):
        return lambda record: [signal.raise_signal(signal.SIGINT) for _ in range(times) if record["step"] == 2]

    once = train(recipe_for(tiny), ROWS, folder=tmp_path / "once", on_log=press(1))
    # step 2 is logged at its end, so the step that is finished is the third
    assert once.interrupted and once.log[-1]["step"] == 3 and (tmp_path / "once" / "checkpoint-3" / DONE).is_file()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        train(recipe_for(tiny), ROWS, folder=tmp_path / "twice", on_log=press(2))
    assert signal.getsignal(signal.SIGINT) is before
    assert not train(recipe_for(tiny), ROWS, folder=tmp_path / "once").interrupted
    assert signal.getsignal(signal.SIGINT) is before  # also of a run in which nobody pressed it


def test_training_works_outside_the_main_thread_where_no_signal_can_be_caught(tiny, tmp_path):
    runs = []
    recipe = recipe_for(tiny, max_steps=2)
    thread = threading.Thread(target=lambda: runs.append(train(recipe, ROWS, folder=tmp_path)))
    thread.start()
    thread.join()
    assert [step for step, _ in losses(tmp_path)] == [1, 2] and not runs[0].interrupted


# --- Whose folder it is -----------------------------------------------------------------------------------------------


def test_a_folder_of_another_recipe_is_refused_naming_what_differs(tiny, tmp_path):
    recipe_for(tiny).to_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match=r"another recipe \(differs in \['lora_alpha', 'seed'\]\)"):
        train(recipe_for(tiny, seed=3, lora_alpha=8), ROWS, folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_no_rows_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="train_rows is empty"):
        train(recipe_for(tiny), [], folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"epochs": 0.5}, {"epochs": 1}, {"max_steps": 2, "r": 0}])
def test_a_finished_run_asked_again_trains_no_step_more(length, tiny, tmp_path):
    """transformers 5.17 would take a sixth step after max_steps=5: it looks for the end only at the end of a step."""
    recipe = recipe_for(tiny, **length)
    first = train(recipe, ROWS, folder=tmp_path)
    adapter = weights(tmp_path)
    again = train(recipe, ROWS, folder=tmp_path, on_log=lambda record: pytest.fail(f"trained: {record}"))
    assert weights(tmp_path) == adapter and again.log == first.log == log_of(tmp_path)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_the_same_recipe_with_other_rows_is_refused(tiny, tmp_path):
    """Otherwise a learner who halves the rows and runs the cell again would be shown the old result."""
    recipe = recipe_for(tiny, max_steps=2)
    train(recipe, ROWS, folder=tmp_path)
    with pytest.raises(ValueError, match="other rows"):
        train(recipe, ROWS[:12], folder=tmp_path)
    train(recipe, [{**row, "id": 7} for row in ROWS], folder=tmp_path)  # only prompt and completion count


# --- The numbers ------------------------------------------------------------------------------------------------------

CHATS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in ROWS
]


def naive_loss(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """Mean of -log p over completion tokens only, row by row and token by token: no batch, no padding, no mask."""
    terms = []
    for row in rows:
        if isinstance(row["prompt"], str):
            prompt, text = row["prompt"], row["prompt"] + row["completion"] + "<|im_end|>"
        else:
            prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["prompt"])
            prompt += "<|im_start|>assistant\n"
            text = prompt + row["completion"][0]["content"] + "<|im_end|>\n"
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(text)["input_ids"]
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
        terms += [-logps[t - 1, ids[t]] for t in range(start, len(ids))]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("rows", [ROWS[:8], CHATS[:8]], ids=["text", "chat"])
@pytest.mark.parametrize("batch", [(8, 1), (2, 4)], ids=["8x1", "2x4"])
def test_first_loss_equals_a_naive_loop_over_completion_tokens(rows, batch, tiny, tmp_path):
    """lora_B is 0 at the start, so the first loss is the base model's."""
    sizes = {"batch_size": batch[0], "gradient_accumulation_steps": batch[1]}
    run = train(recipe_for(tiny, max_steps=1, lora_dropout=0.0, **sizes), rows, folder=tmp_path)
    with torch.no_grad():
        expected = naive_loss(*load(tiny), rows).item()
    assert run.series("loss")[0] == [1]
    assert run.series("loss")[1][0] == pytest.approx(expected, abs=1e-5)


def test_one_step_of_full_fine_tuning_equals_plain_gradient_descent_by_hand(tiny, tmp_path):
    """sgd, constant rate 0.5, no clipping: every parameter is w - 0.5 dL/dw, with L from the naive loop."""
    settings = {"r": 0, "optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0}
    sizes = {"batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1, "max_grad_norm": 1e9}
    run = train(recipe_for(tiny, **settings, **sizes), CHATS[:8], folder=tmp_path)
    model, tokenizer = load(tiny)
    naive_loss(model, tokenizer, CHATS[:8]).backward()
    trained = dict(run.model.named_parameters())
    assert trained.keys() == dict(model.named_parameters()).keys()
    for name, before in model.named_parameters():
        torch.testing.assert_close(trained[name].detach(), before.detach() - 0.5 * before.grad, atol=1e-6, rtol=1e-5)
        assert not torch.equal(trained[name], before), f"{name} was not trained"
    saved, _ = load(tmp_path / "model")
    assert all(torch.equal(value, trained[name]) for name, value in saved.named_parameters())


def test_accumulating_four_batches_of_2_equals_one_of_8(tiny, tmp_path):
    """After 9 steps of sgd, to 1e-5: the sums run in another order. (AdamW makes full steps of such differences.)"""
    runs = []
    for size, accumulation in ((2, 4), (8, 1)):
        sizes = {"batch_size": size, "gradient_accumulation_steps": accumulation}
        recipe = recipe_for(tiny, lora_dropout=0.0, optimizer="sgd", learning_rate=0.5, **sizes)
        runs.append(train(recipe, CHATS, folder=tmp_path / f"{size}x{accumulation}"))
    accumulated, at_once = runs
    assert accumulated.series("loss")[0] == list(range(1, 10))
    assert accumulated.series("loss")[1] == pytest.approx(at_once.series("loss")[1], abs=1e-5)
    assert at_once.series("loss")[1][-1] < at_once.series("loss")[1][0] - 0.5  # and it did move
    for name, value in at_once.model.state_dict().items():
        torch.testing.assert_close(accumulated.model.state_dict()[name], value, atol=1e-5, rtol=0)


def test_rows_that_may_be_long_are_read_without_weights_of_t_x_t_and_learned_from_as_the_others(tiny, tmp_path):
    ways = {"eager": LONG, "sdpa": LONG + 1} if not torch.cuda.is_available() else {"sdpa": LONG}
    logged = []
    for way, max_length in ways.items():
        recipe = recipe_for(tiny, max_length=max_length, max_steps=3)
        assert base_model(recipe)[0].config._attn_implementation == way
        train(recipe, ROWS, folder=tmp_path / way)
        logged.append([loss for _, loss in losses(tmp_path / way)])
    assert logged[-1] == pytest.approx(logged[0], rel=1e-5) and len(set(logged[0])) > 1


def test_only_the_adapter_is_trained(tiny, tmp_path):
    run = train(recipe_for(tiny, max_steps=3, target_modules=["q_proj", "v_proj"]), ROWS, folder=tmp_path)
    base = load(tiny)[0].state_dict()
    trained = [name for name, value in run.model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all(
        "lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained
    )
    for name, value in run.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name


def test_what_is_trained_is_held_in_fp32_whatever_the_machine_holds_weights_in(tiny, tmp_path, monkeypatch):
    """A T4 holds weights in fp16, whose gradients cannot be unscaled; AdamW at 2e-4 is below half a bf16 step."""
    monkeypatch.setattr("ftlab.pipeline.models.best_dtype", lambda: torch.bfloat16)
    for r in (0, 4):
        run = train(recipe_for(tiny, r=r, max_steps=1), ROWS, folder=tmp_path / str(r))
        assert {value.dtype for value in run.model.parameters() if value.requires_grad} == {torch.float32}


def test_every_setting_reaches_the_trainer(tiny, tmp_path):
    what = {"precision": "bf16", "r": 8, "lora_alpha": 24, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    how = {"optimizer": "sgd", "learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 7, "weight_decay": 0.1}
    much = {"epochs": 2, "max_steps": 9, "batch_size": 3, "gradient_accumulation_steps": 4, "max_length": 256}
    watched = {"logging_steps": 3, "eval_file": "x", "eval_steps": 2, "save_steps": 6, "seed": 5, "max_grad_norm": 0.3}
    recipe = recipe_for(tiny, **what, **how, **much, **watched, gradient_checkpointing=True, early_stop_patience=4)
    trainer = sft_trainer(recipe, ROWS, ROWS[:4], tmp_path)
    wanted = {
        "bf16": True, "fp16": False, "gradient_checkpointing": True,
        "optim": "sgd", "learning_rate": 3e-3, "lr_scheduler_type": "constant", "warmup_steps": 7, "weight_decay": 0.1,
        "max_grad_norm": 0.3, "num_train_epochs": 2, "max_steps": 9, "max_length": 256, "seed": 5,
        "per_device_train_batch_size": 3, "per_device_eval_batch_size": 6, "gradient_accumulation_steps": 4,
        "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "use_cpu": not torch.cuda.is_available(), "report_to": [], "output_dir": str(tmp_path),
    }  # fmt: skip
    assert {key: getattr(trainer.args, key) for key in wanted} == wanted
    lora = trainer.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (8, 24, 0.1, {"q_proj"})
    (stopper,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
    assert stopper.early_stopping_patience == 4
    plain = training_arguments(recipe.replace(early_stop_patience=0, precision="fp16"), tmp_path, evaluates=False)
    wanted = {"fp16": True, "bf16": False, "save_steps": 6, "load_best_model_at_end": False, "eval_strategy": "no"}
    assert {key: plain[key] for key in wanted} == wanted


def test_a_folder_with_an_adapter_is_no_start(tiny, tmp_path):
    start = train(recipe_for(tiny, max_steps=1), ROWS, folder=tmp_path / "start").folder / "adapter"
    with pytest.raises(ValueError, match=r"holds an adapter: merge it first"):
        train(recipe_for(start, max_steps=1), ROWS, folder=tmp_path / "run")


def test_a_folder_of_the_readers_own_may_be_called_triage(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    (tmp_path / "triage").mkdir()
    (tmp_path / "triage" / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert rows_from(str(tmp_path / "triage" / "train.jsonl")) == rows
    assert {"prompt", "completion"} < rows_from("triage/validation.jsonl")[0].keys()  # the course's: tickets, rendered


def test_bad_rows_of_a_file_are_refused_by_line(tmp_path):
    rows = [*ROWS[:2], {"prompt": "What?", "completion": ""}, ROWS[3]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"1 bad rows, first ones:\n.*3"):
        rows_from(str(tmp_path / "rows.jsonl"))


# --- What is watched --------------------------------------------------------------------------------------------------

YES = [{"prompt": f"Question {i}?", "completion": " yes"} for i in range(16)]
NO = [{"prompt": f"Question {i}?", "completion": " no"} for i in range(16, 24)]


def test_a_run_leaves_its_recipe_versions_hardware_and_metrics_and_learns_an_easy_task(tiny, tmp_path):
    calls, records = [], []

    def metric(model, tokenizer) -> dict[str, float]:
        calls.append((model.training, torch.is_autocast_enabled("cpu"), tokenizer.eos_token_id))
        return {"exact": 0.25 * len(calls)}

    recipe = recipe_for(tiny, precision="bf16", eval_steps=4, eval_file="unused", learning_rate=2e-2)
    run = train(recipe, YES, YES[:4], tmp_path, on_log=records.append, metric=metric)

    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["hardware"]["cores"] == os.cpu_count()
    assert {"transformers", "trl", "peft", "datasets", "accelerate"} <= environment["versions"].keys()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {
        file.name for file in (tmp_path / "adapter").iterdir()
    }

    assert log_of(tmp_path) == run.log
    assert [{**record, "max_steps": 12} for record in run.log] == records
    steps, values = run.series("loss")
    assert steps == list(range(1, 13)) and values[0] > 6 and values[-1] < 2  # from about ln 1024 = 6.93
    assert calls == [(False, False, 2)] * 3  # in eval mode, without autocast
    assert run.series("eval_exact") == ([4, 8, 12], [0.25, 0.5, 0.75])
    assert run.series("eval_loss")[0] == [4, 8, 12]
    with torch.no_grad():
        assert run.series("eval_loss")[1][-1] == pytest.approx(
            naive_loss(run.model, run.tokenizer, YES[:4]).item(), abs=0.02
        )
    assert not run.model.training and run.seconds > 0 and not run.interrupted


def test_who_watches_by_on_log_sees_no_progress_bar(tiny, tmp_path, capsys):
    recipe, seen = recipe_for(tiny, max_steps=1), []
    train(recipe, ROWS, folder=tmp_path / "watched", on_log=seen.append)
    assert seen and "1/1" not in capsys.readouterr().err
    train(recipe, ROWS, folder=tmp_path / "alone")
    assert "1/1" in capsys.readouterr().err


def test_watching_does_not_change_the_training(tiny, tmp_path):
    """With dropout it does: each evaluation draws a number for its data loader."""
    plain = recipe_for(tiny, max_steps=9, lora_dropout=0.0)
    watched = plain.replace(eval_steps=2, eval_file="unused")
    train(watched, ROWS, ROWS[:4], tmp_path / "watched", metric=lambda model, tokenizer: {"one": 1.0})
    train(plain, ROWS, folder=tmp_path / "alone")
    assert weights(tmp_path / "watched") == weights(tmp_path / "alone")


EARLY = {"eval_steps": 2, "eval_file": "unused", "early_stop_patience": 2, "epochs": 20, "save_steps": 100}


def test_early_stop_ends_the_run_and_gives_back_the_best_checkpoint(tiny, tmp_path):
    """Trained on yes and evaluated on no, the eval loss falls while the end of turn is learned, then climbs."""
    run = train(recipe_for(tiny, **EARLY), YES, NO, tmp_path)
    steps, values = run.series("eval_loss")
    best = values.index(min(values))
    assert steps[-1] < 80 and len(values) - 1 - best == 2  # two evaluations without a better one, then the end
    assert run.log[-1]["step"] == steps[-1]
    with torch.no_grad():
        assert naive_loss(run.model, run.tokenizer, NO).item() == pytest.approx(values[best], abs=1e-4)
    adapter = weights(tmp_path)
    again = train(recipe_for(tiny, **EARLY), YES, NO, tmp_path)
    assert again.log == run.log and weights(tmp_path) == adapter  # the best one's again, not the last one's
    with torch.no_grad():
        assert naive_loss(again.model, again.tokenizer, NO).item() == pytest.approx(values[best], abs=1e-4)


def test_early_stop_remembers_its_patience_when_resumed(tiny, apart, tmp_path):
    recipe = recipe_for(tiny, **EARLY)
    assert apart(run, recipe, YES, tmp_path / "whole", NO) == 0
    end = log_of(tmp_path / "whole")[-1]["step"]
    assert apart(run, recipe, YES, tmp_path / "killed", NO, end - 1) == KILL
    assert apart(run, recipe, YES, tmp_path / "killed", NO) == 0
    assert first_seen(tmp_path / "killed") == end - 1
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


# --- Precision and quantization ---------------------------------------------------------------------------------------


def test_auto_precision_follows_the_hardware(monkeypatch):
    auto = Recipe()
    for amx, avx512, wanted in (
        (True, True, "bf16"),
        (False, True, "bf16"),
        (True, False, "bf16"),
        (False, False, "fp32"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert resolve_precision(auto) == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, wanted in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        assert resolve_precision(auto) == wanted
    assert resolve_precision(Recipe(precision="fp32")) == "fp32"


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_a_quantized_model_learns_through_its_adapter(quantization, tiny, tmp_path):
    recipe = recipe_for(tiny, quantization=quantization, epochs=6)
    run = train(recipe, YES, folder=tmp_path)
    values = run.series("loss")[1]
    assert values[0] > 6 and values[-1] < 2


# --- Engines ----------------------------------------------------------------------------------------------------------


def test_unsloth_after_trl_in_one_process_is_refused(tiny, tmp_path):
    import trl  # noqa: F401

    with pytest.raises(RuntimeError, match="train_in_process"):
        train(recipe_for(tiny, engine="unsloth"), ROWS, folder=tmp_path)


def test_train_in_process_says_why_it_failed(tiny, tmp_path):
    with pytest.raises(RuntimeError, match=r"trl ended with exit code 1:(.|\n)*no-such-file.jsonl"):
        train_in_process(recipe_for(tiny, train_file="no-such-file.jsonl"), tmp_path)


def test_unsloth_may_neither_install_nor_report_nor_write_into_the_readers_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_AUTO_INSTALL", "1")
    asked = []

    def run(command, env, **kwargs):
        asked.append(env)
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    assert train_in_process(recipe_for(tiny), tmp_path) == [{"step": 1}]
    assert (asked[0]["UNSLOTH_AUTO_INSTALL"], asked[0]["UNSLOTH_DISABLE_STATISTICS"]) == ("0", "1")
    assert Path(asked[0]["UNSLOTH_COMPILE_LOCATION"]).is_relative_to(tempfile.gettempdir())


def test_trl_and_unsloth_train_the_same_adapter(tiny, tmp_path, monkeypatch):
    """5 steps in fp32: losses to 1e-5 and weights to 1e-5 (measured: 8e-7). The slow one: each engine starts a process.

    Both draw lora_A from the recipe's seed. No dropout: Unsloth would draw its masks in another order.
    """
    rows, said, real = tmp_path / "rows.jsonl", {}, subprocess.run
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    for engine in ("trl", "unsloth"):

        def run(*args, engine=engine, **kwargs):
            done = real(*args, **kwargs)
            said[engine] = done.stdout
            return done

        monkeypatch.setattr(subprocess, "run", run)
        recipe = recipe_for(tiny, engine=engine, train_file=str(rows), max_steps=5, lora_dropout=0.0)
        assert train_in_process(recipe, tmp_path / engine) == log_of(tmp_path / engine)
    assert "Unsloth" in said["unsloth"] and "Unsloth" not in said["trl"]
    trl, unsloth = (dict(losses(tmp_path / engine)) for engine in ("trl", "unsloth"))
    assert list(trl) == [1, 2, 3, 4, 5] and unsloth == pytest.approx(trl, rel=1e-5)
    assert max(trl.values()) - min(trl.values()) > 0.5  # and they did move
    theirs, ours = (
        load_file(tmp_path / engine / "adapter" / "adapter_model.safetensors") for engine in ("unsloth", "trl")
    )
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)
