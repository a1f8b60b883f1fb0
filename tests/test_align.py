"""ftlab.pipeline.align: DPO moves its quantities the right way, is resumed bit by bit, and refuses bad input.

On a random Llama with micro's tokenizer. The training loop itself (kills at every moment, Ctrl-C) is in test_train.py.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ftlab.pipeline import data
from ftlab.pipeline.models import load
from ftlab.pipeline.recipe import Recipe, RecipeError
from ftlab.pipeline.train import DONE, train

pytestmark = pytest.mark.usefixtures("one_thread")
LN2 = math.log(2)


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


PAIRS = [
    {
        "prompt": ask(f"Where is order {i}?"),
        "chosen": say(f"Sorry! Order {i} is on its way." + " Thanks." * (i % 3)),
        "rejected": say("No idea." + " Ask again." * (i % 4)),
    }
    for i in range(16)
]
SFT = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


def recipe_for(model: Path, method: str = "dpo", **changes) -> Recipe:
    settings = {"model": str(model), "method": method, "precision": "fp32", "r": 4, "learning_rate": 1e-2}
    if changes.get("r") == 0:
        settings["learning_rate"] = 1e-3
    sizes = {"warmup_steps": 1, "max_steps": 8, "batch_size": 4, "save_steps": 3, "logging_steps": 1}
    return Recipe.from_dict({**settings, **sizes, **changes})


def weights(folder: Path) -> bytes:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return file.read_bytes()


def logps(model, tokenizer, row: dict) -> float:
    """Sum of the log-probabilities of a completion's tokens: a naive loop over positions."""
    rendered = data.render(row, tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([rendered.input_ids])).logits[0].double()
    total = 0.0
    for t in range(1, len(rendered.input_ids)):
        if rendered.completion_mask[t]:
            total += (logits[t - 1, rendered.input_ids[t]] - logits[t - 1].logsumexp(0)).item()
    return total


# --- Learning from pairs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, 0])
def test_the_margin_grows_and_the_loss_begins_where_it_must(r, small, tmp_path):
    """At the start policy = reference: the loss is -log sigmoid(0) = ln 2."""
    run = train(recipe_for(small, r=r), PAIRS, folder=tmp_path)
    losses, margins = run.series("loss")[1], run.series("rewards/margins")[1]
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and run.series("rewards/chosen")[1][0] == 0.0
    assert margins[-1] > margins[0] + 0.01 and losses[-1] < losses[0]
    assert (tmp_path / ("adapter" if r else "model")).is_dir() and (tmp_path / "checkpoint-6" / DONE).is_file()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == run.log


@pytest.mark.parametrize("r", [4, 0])
def test_dpo_rewards_are_those_of_a_naive_loop_against_the_model_it_started_from(r, small, tmp_path):
    recipe = recipe_for(small, r=r, eval_steps=8, beta=0.3)
    run = train(recipe, PAIRS, PAIRS[:4], tmp_path)
    reference, tokenizer = load(small)
    for side in ("chosen", "rejected"):
        rows = [{"prompt": pair["prompt"], "completion": pair[side]} for pair in PAIRS[:4]]
        ours = [0.3 * (logps(run.model, tokenizer, row) - logps(reference, tokenizer, row)) for row in rows]
        assert run.series(f"eval_rewards/{side}")[1][-1] == pytest.approx(sum(ours) / 4, abs=1e-4)
    if r:  # and the reference is the policy with its adapter off
        ids = torch.tensor([data.render(SFT[0], tokenizer).input_ids])
        with torch.no_grad(), run.model.disable_adapter():
            assert torch.equal(run.model(ids).logits, reference(ids).logits)


def test_a_quantized_policy_learns_through_its_adapter(small, tmp_path):
    run = train(recipe_for(small, quantization="nf4"), PAIRS, folder=tmp_path)
    assert run.series("loss")[1][0] == pytest.approx(LN2, abs=1e-3)
    assert run.series("rewards/margins")[1][-1] > 0.01


def test_early_stopping_takes_the_best_checkpoint(small, tmp_path):
    """Evaluated on pairs the other way round, dpo's loss only rises: the first evaluation is the best one."""
    wrong = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    recipe = recipe_for(small, eval_steps=2, eval_file="unused", early_stop_patience=2, max_steps=20)
    run = train(recipe, PAIRS, wrong, tmp_path)
    steps, values = run.series("eval_loss")
    assert steps == [2, 4, 6] and values == sorted(values)
    tokenizer = run.tokenizer
    reference, _ = load(small)
    row = {"prompt": wrong[0]["prompt"], "completion": wrong[0]["chosen"]}
    assert logps(run.model, tokenizer, row) != logps(reference, tokenizer, row)
    assert train(recipe, PAIRS, wrong, tmp_path).log == run.log


# --- Starting from SFT ------------------------------------------------------------------------------------------------


def test_dpo_starts_from_an_sft_result_which_is_then_its_reference(small, tmp_path):
    from ftlab.pipeline import export

    sft = train(recipe_for(small, "sft"), SFT, folder=tmp_path / "sft")
    with pytest.raises(ValueError, match="holds an adapter: merge it first"):
        train(recipe_for(tmp_path / "sft" / "adapter"), PAIRS, folder=tmp_path / "wrong")
    export.merge(sft.folder, small, tmp_path / "merged", [PAIRS[0]["prompt"]], dtype="float32")
    run = train(recipe_for(tmp_path / "merged"), PAIRS, folder=tmp_path / "dpo")
    ids = torch.tensor([data.render(SFT[0], run.tokenizer).input_ids])
    with torch.no_grad(), run.model.disable_adapter():
        torch.testing.assert_close(run.model(ids).logits, sft.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_start_that_was_trained_again_is_not_taken_for_the_old_one(small, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(small, start)
    recipe = recipe_for(start, max_steps=1)
    train(recipe, PAIRS, folder=tmp_path / "run")
    model, _ = load(start)
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(start)
    with pytest.raises(ValueError, match="from other weights"):
        train(recipe, PAIRS, folder=tmp_path / "run")


# --- Going on ---------------------------------------------------------------------------------------------------------


def run_and_die(recipe: Recipe, folder: Path, step: int) -> None:
    def on_log(record: dict) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(recipe, PAIRS, folder=folder, on_log=on_log)


@pytest.fixture(scope="module")
def killed_at():
    """(recipe, folder, step): the run, in a process of its own, is killed after this step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.dpo_trainer", "peft", "ftlab.pipeline.align"])

    def killed_at(*arguments) -> None:
        process = context.Process(target=run_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    return killed_at


@pytest.mark.parametrize(("r", "step"), [(4, 5), (0, 7)])
def test_killed_and_resumed_ends_in_the_same_weights(r, step, small, killed_at, tmp_path):
    """16 pairs in batches of 4: step 5 is in the second epoch, which must come in the order of a run never stopped."""
    recipe = recipe_for(small, r=r)
    whole = train(recipe, PAIRS, folder=tmp_path / "whole")
    killed_at(recipe, tmp_path / "killed", step)
    seen = []
    again = train(recipe, PAIRS, folder=tmp_path / "killed", on_log=lambda record: seen.append(record["step"]))
    assert seen[0] == step // 3 * 3 + 1  # it went on
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert again.series("loss") == whole.series("loss")
    assert train(recipe, PAIRS, folder=tmp_path / "killed", on_log=pytest.fail).log == again.log


@pytest.fixture
def ctrl_c(request):
    """on_log that presses Ctrl-C at a step."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    return lambda step: lambda record: signal.raise_signal(signal.SIGINT) if record["step"] == step else None


def test_ctrl_c_leaves_a_checkpoint(small, ctrl_c, tmp_path):
    run = train(recipe_for(small), PAIRS, folder=tmp_path, on_log=ctrl_c(2))
    assert run.interrupted and run.log[-1]["step"] == 3 and (tmp_path / "checkpoint-3" / DONE).is_file()


def test_other_rows_and_another_recipe_are_refused(small, tmp_path):
    train(recipe_for(small, max_steps=1), PAIRS, folder=tmp_path / "dpo")
    with pytest.raises(ValueError, match="other rows"):
        train(recipe_for(small, max_steps=1), PAIRS[:8], folder=tmp_path / "dpo")
    with pytest.raises(ValueError, match=r"another recipe \(differs in \['beta'\]\)"):
        train(recipe_for(small, max_steps=1, beta=0.2), PAIRS, folder=tmp_path / "dpo")
    train(recipe_for(small, max_steps=1), [{**pair, "id": 7} for pair in PAIRS], folder=tmp_path / "dpo")


# --- Bad input, before anything is trained ----------------------------------------------------------------------------

EQUAL = {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}
EMPTY = {**PAIRS[0], "chosen": say(" ")}
LONG = {**PAIRS[0], "chosen": say("please " * 600)}
LONG_PROMPT = {**PAIRS[0], "prompt": ask("please " * 600)}
STRINGS = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
THUMB = {**SFT[1], "label": True}
BAD_ROWS = [
    ("dpo", [*PAIRS, EQUAL], r"train row 16: chosen equals rejected at rejected"),
    ("dpo", [PAIRS[0], EMPTY], r"train row 1: empty assistant message at chosen\[0\].content"),
    ("dpo", [PAIRS[0], LONG], r"train row 1: prompt and chosen are \d+ tokens .* more than max_length = 512"),
    ("dpo", [LONG_PROMPT], r"train row 0: prompt and chosen are \d+ tokens"),
    ("dpo", [STRINGS], r"train row 0: got strings, wanted lists of messages"),
    ("dpo", SFT, r"row 0: got a row with \['completion', 'prompt'\], but dpo learns from \{prompt, chosen, rejected\}"),
    ("dpo", [THUMB], r"train row 0: got a thumbs row, but dpo learns from"),
    ("sft", PAIRS, r"train row 0: got a pair, but sft learns from \{prompt, completion\}"),
    ("sft", [SFT[0], THUMB], r"train row 1: got a thumbs row, but sft learns from"),
]


@pytest.mark.parametrize(("method", "rows", "message"), BAD_ROWS, ids=[f"{m}-{x[:40]}" for m, _, x in BAD_ROWS])
def test_a_bad_row_is_named_before_training_starts(method, rows, message, small, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(recipe_for(small, method), rows, folder=tmp_path / "run", on_log=pytest.fail)


def test_a_bad_evaluation_row_is_named_too(small, tmp_path):
    with pytest.raises(ValueError, match="eval row 1: chosen equals rejected"):
        train(recipe_for(small, eval_steps=2), PAIRS, [PAIRS[0], EQUAL], tmp_path)


def test_the_command_line_trains_from_files_of_the_methods_kind(small, tmp_path):
    from ftlab.pipeline.train import rows_from

    for method, rows in (("dpo", PAIRS), ("sft", SFT)):
        file = tmp_path / f"{method}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert rows_from(str(file), method) == rows
    with pytest.raises(ValueError, match="16 bad rows"):
        rows_from(str(tmp_path / "sft.jsonl"), "dpo")


# --- Recipes ----------------------------------------------------------------------------------------------------------

BAD_RECIPES = [
    ({"method": "dop"}, "method: .*did you mean"),
    ({"beta": 0.2}, r"beta: got 0.2, wanted its default, 0.1, with method 'sft'"),
    ({"method": "dpo", "beta": 0}, "beta: got 0.0, wanted above 0"),
    ({"method": "dpo", "lora_dropout": 0.1}, "lora_dropout: .* with 'dpo'"),
    ({"method": "dpo", "fast": True}, "fast: got True, wanted False with 'dpo'"),
    ({"method": "dpo", "engine": "unsloth"}, "engine: .* with 'dpo'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES, ids=[str(c)[1:50] for c, _ in BAD_RECIPES])
def test_a_recipe_that_its_method_cannot_run_is_refused_by_name(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**changes)


def test_a_dpo_recipe_comes_back_from_yaml(tmp_path):
    recipe = Recipe(method="dpo", beta=0.5)
    assert Recipe.from_yaml(recipe.to_yaml(tmp_path / "recipe.yaml")) == recipe and recipe.beta == 0.5
