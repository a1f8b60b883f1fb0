"""ftlab.pipeline.align: each method moves its quantity the right way, is resumed bit by bit, and refuses bad input.

On a random Llama with micro's tokenizer. The training loop itself (kills at every moment, Ctrl-C) is in test_train.py.
"""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ftlab.pipeline import align, data
from ftlab.pipeline.models import load
from ftlab.pipeline.recipe import ONLINE, Recipe, RecipeError
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
THUMBS = data.thumbs_from_pairs(PAIRS)
PROMPTS = [{"prompt": pair["prompt"], "number": i} for i, pair in enumerate(PAIRS)]
SFT = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
ROWS = {"reward": PAIRS, "dpo": PAIRS, "orpo": PAIRS, "kto": THUMBS, **dict.fromkeys(ONLINE, PROMPTS)}


def early_letters(completions: list[str], prompt: list, number: list[int]) -> list[float]:
    """Share of letters before n: every token that is sampled has some, so there is a slope to climb."""
    return [sum(c in "abcdefghijklm" for c in text) / max(1, len(text)) for text in completions]


def recipe_for(model: Path, method: str, **changes) -> Recipe:
    settings = {"model": str(model), "method": method, "precision": "fp32", "r": 4, "learning_rate": 1e-2}
    if changes.get("r") == 0:
        settings["learning_rate"] = 1e-3
    sizes = {"warmup_steps": 1, "max_steps": 8, "batch_size": 4, "save_steps": 3, "logging_steps": 1}
    if method in ONLINE:
        sizes |= {"batch_size": 8, "max_completion_length": 8}
    return Recipe.from_dict({**settings, **sizes, **changes})


def weights(folder: Path) -> bytes:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return file.read_bytes()


@pytest.fixture(scope="module")
def reward_run(small, tmp_path_factory):
    """A finished reward run with an adapter, evaluated at its end on four of its pairs."""
    recipe = recipe_for(small, "reward", eval_steps=8, max_steps=16)
    return train(recipe, PAIRS, PAIRS[:4], tmp_path_factory.mktemp("reward"))


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


# --- Learning from pairs and thumbs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, 0])
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_the_margin_grows_and_the_loss_begins_where_it_must(method, r, small, tmp_path):
    """At the start policy = reference: dpo's loss is -log sigmoid(0) = ln 2, kto's 1 - sigmoid(0) = 1/2."""
    run = train(recipe_for(small, method, r=r), ROWS[method], folder=tmp_path)
    losses, margins = run.series("loss")[1], run.series("rewards/margins")[1]
    if method != "orpo":
        assert losses[0] == pytest.approx({"dpo": LN2, "kto": 0.5}[method], abs=1e-6)
        assert run.series("rewards/chosen")[1][0] == 0.0
    assert margins[-1] > margins[0] + 0.01 and losses[-1] < losses[0]
    assert (tmp_path / ("adapter" if r else "model")).is_dir() and (tmp_path / "checkpoint-6" / DONE).is_file()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == run.log


@pytest.mark.parametrize("r", [4, 0])
def test_dpo_rewards_are_those_of_a_naive_loop_against_the_model_it_started_from(r, small, tmp_path):
    recipe = recipe_for(small, "dpo", r=r, eval_steps=8, beta=0.3)
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


def test_the_reward_model_prefers_what_was_chosen_and_is_found_again(reward_run):
    """TRL's margin at the last evaluation is that of the model loaded from the run folder, adapter and head merged."""
    assert reward_run.series("accuracy")[1][-1] == 1.0
    margins = reward_run.series("margin")[1]
    assert margins[-1] > margins[0] + 1
    model, tokenizer = align.load_reward(reward_run.folder)
    prompts = [pair["prompt"] for pair in PAIRS[:4]]
    chosen, rejected = (
        align.reward_scores(model, tokenizer, prompts, [pair[side][0]["content"] for pair in PAIRS[:4]])
        for side in ("chosen", "rejected")
    )
    margin = sum(a - b for a, b in zip(chosen, rejected, strict=True)) / 4
    assert reward_run.series("eval_margin")[1][-1] == pytest.approx(margin, abs=1e-4)


def test_the_reward_is_read_at_the_end_of_turn_where_ppo_reads_it(reward_run):
    """TRL's own get_reward on the ids of one answer that ends with <|im_end|>, padded as in ppo."""
    from trl.experimental.utils import get_reward

    model, tokenizer = align.load_reward(reward_run.folder)
    rendered = data.render(SFT[3], tokenizer)
    ids = rendered.input_ids[: len(rendered.input_ids) - rendered.input_ids[::-1].index(tokenizer.eos_token_id)]
    assert len(rendered.input_ids) - len(ids) == 1 and tokenizer.decode(rendered.input_ids[-1]) == "\n"
    prompt = len(ids) - (sum(rendered.completion_mask) - 1)
    padded = torch.tensor([[0, 0, 0, *ids, 0, 0]])
    with torch.no_grad():
        _, score, _ = get_reward(model, padded, tokenizer.pad_token_id, 3 + prompt)
    ours = align.reward_scores(model, tokenizer, [SFT[3]["prompt"]], [SFT[3]["completion"][0]["content"]])
    assert score.tolist() == pytest.approx(ours, abs=1e-5)


def test_full_reward_training_leaves_a_model_folder_that_scores(small, tmp_path):
    run = train(recipe_for(small, "reward", r=0, max_steps=4), PAIRS, folder=tmp_path)
    model, tokenizer = align.load_reward(tmp_path)
    again, _ = align.load_reward(tmp_path / "model")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) and torch.equal(value, again.state_dict()[name]), name
    assert len(align.reward_scores(model, tokenizer, [PAIRS[0]["prompt"]] * 3, ["Yes.", "No.", "Maybe."])) == 3


def test_orpo_and_reward_answers_end_with_one_end_of_turn(small, tmp_path):
    """From messages TRL's ORPO would end with <|im_end|>, line break, <|im_end|>."""
    for method, key in (("orpo", "chosen_input_ids"), ("reward", "chosen_ids")):
        trainer = align.trainer(recipe_for(small, method), PAIRS, None, tmp_path, [])
        tokenizer = trainer.processing_class
        for row, pair in zip(trainer.train_dataset, PAIRS, strict=True):
            text = tokenizer.decode(row[key])
            assert text.endswith(f"assistant\n{pair['chosen'][0]['content']}<|im_end|>"), text
            assert text.count("<|im_end|>") == 2


def test_kto_neighbours_are_not_two_answers_to_one_prompt(small, tmp_path):
    dataset = align.trainer(recipe_for(small, "kto"), THUMBS, None, tmp_path, []).train_dataset
    prompts = list(dataset["prompt_ids"])
    same = sum(a == b for a, b in itertools.pairwise(prompts))
    assert len(dataset) == 32 and same <= 4  # of 31; in the order of thumbs_from_pairs it is 16


def test_kto_weights_scale_the_loss_of_their_class(small, tmp_path):
    """At the start every row's loss is 1/2: with weights 3 and 1 and equal classes the mean is 1/2 (3 + 1) / 2 = 1."""
    rows = THUMBS[:4]  # one batch
    recipe = recipe_for(small, "kto", desirable_weight=3, max_steps=1)
    assert train(recipe, rows, folder=tmp_path).series("loss")[1] == pytest.approx([1.0], abs=1e-6)


def test_a_quantized_policy_learns_through_its_adapter(small, tmp_path):
    run = train(recipe_for(small, "dpo", quantization="nf4"), PAIRS, folder=tmp_path)
    assert run.series("loss")[1][0] == pytest.approx(LN2, abs=1e-3)
    assert run.series("rewards/margins")[1][-1] > 0.01


def test_early_stopping_takes_the_best_checkpoint(small, tmp_path):
    """Evaluated on pairs the other way round, dpo's loss only rises: the first evaluation is the best one."""
    wrong = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    recipe = recipe_for(small, "dpo", eval_steps=2, eval_file="unused", early_stop_patience=2, max_steps=20)
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
        train(recipe_for(tmp_path / "sft" / "adapter", "dpo"), PAIRS, folder=tmp_path / "wrong")
    export.merge(sft.folder, small, tmp_path / "merged", [PAIRS[0]["prompt"]], dtype="float32")
    run = train(recipe_for(tmp_path / "merged", "dpo"), PAIRS, folder=tmp_path / "dpo")
    ids = torch.tensor([data.render(SFT[0], run.tokenizer).input_ids])
    with torch.no_grad(), run.model.disable_adapter():
        torch.testing.assert_close(run.model(ids).logits, sft.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_start_that_was_trained_again_is_not_taken_for_the_old_one(small, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(small, start)
    recipe = recipe_for(start, "dpo", max_steps=1)
    train(recipe, PAIRS, folder=tmp_path / "run")
    model, _ = load(start)
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(start)
    with pytest.raises(ValueError, match="from other weights"):
        train(recipe, PAIRS, folder=tmp_path / "run")


# --- Going on ---------------------------------------------------------------------------------------------------------


def run_and_die(recipe: Recipe, rows: list[dict], folder: Path, step: int) -> None:
    def on_log(record: dict) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(recipe, rows, folder=folder, on_log=on_log, reward=early_letters if recipe.method == "grpo" else None)


@pytest.fixture(scope="module")
def killed_at():
    """(recipe, rows, folder, step): the run, in a process of its own, is killed after this step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "peft", "ftlab.pipeline.align"]
    )

    def killed_at(*arguments) -> None:
        process = context.Process(target=run_and_die, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    return killed_at


@pytest.mark.parametrize(
    ("method", "r", "step"),
    [("dpo", 4, 5), ("dpo", 0, 7), ("kto", 4, 7), ("reward", 4, 5), ("orpo", 4, 5), ("grpo", 4, 5)],
)
def test_killed_and_resumed_ends_in_the_same_weights(method, r, step, small, killed_at, tmp_path):
    """16 pairs in batches of 4: step 5 is in the second epoch, which must come in the order of a run never stopped."""
    recipe, rows = recipe_for(small, method, r=r), ROWS[method]
    reward = early_letters if method == "grpo" else None
    whole = train(recipe, rows, folder=tmp_path / "whole", reward=reward)
    killed_at(recipe, rows, tmp_path / "killed", step)
    seen = []
    again = train(recipe, rows, folder=tmp_path / "killed", reward=reward, on_log=lambda r: seen.append(r["step"]))
    assert seen[0] == step // 3 * 3 + 1  # it went on
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert again.series("loss") == whole.series("loss")
    assert train(recipe, rows, folder=tmp_path / "killed", reward=reward, on_log=pytest.fail).log == again.log


@pytest.fixture
def ctrl_c(request):
    """on_log that presses Ctrl-C at a step."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    return lambda step: lambda record: signal.raise_signal(signal.SIGINT) if record["step"] == step else None


def test_ctrl_c_leaves_a_checkpoint(small, ctrl_c, tmp_path):
    run = train(recipe_for(small, "kto"), THUMBS, folder=tmp_path, on_log=ctrl_c(2))
    assert run.interrupted and run.log[-1]["step"] == 3 and (tmp_path / "checkpoint-3" / DONE).is_file()


def test_other_rows_another_recipe_and_another_reward_are_refused(small, tmp_path):
    train(recipe_for(small, "dpo", max_steps=1), PAIRS, folder=tmp_path / "dpo")
    with pytest.raises(ValueError, match="other rows"):
        train(recipe_for(small, "dpo", max_steps=1), PAIRS[:8], folder=tmp_path / "dpo")
    with pytest.raises(ValueError, match=r"another recipe \(differs in \['beta'\]\)"):
        train(recipe_for(small, "dpo", max_steps=1, beta=0.2), PAIRS, folder=tmp_path / "dpo")
    train(recipe_for(small, "dpo", max_steps=1), [{**pair, "id": 7} for pair in PAIRS], folder=tmp_path / "dpo")
    rloo = recipe_for(small, "rloo", max_steps=1)
    train(rloo, PROMPTS, folder=tmp_path / "rloo", reward=early_letters)
    with pytest.raises(ValueError, match="another reward"):
        train(
            rloo, PROMPTS, folder=tmp_path / "rloo", reward=lambda completions, prompt, number: [0.0] * len(completions)
        )


# --- Learning from one's own answers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(small, tmp_path_factory) -> Path:
    """The folder of the model after SFT on SFT: it says "Thanks." no, one or two times, as its rows do."""
    folder = tmp_path_factory.mktemp("talker")
    train(recipe_for(small, "sft", r=0, learning_rate=5e-3, max_steps=60, batch_size=8), SFT, folder=folder)
    return folder / "model"


def is_training(model, tokenizer) -> dict[str, float]:
    return {"training": float(model.training)}


@pytest.mark.parametrize(("method", "r"), [("grpo", 4), ("rloo", 0)])
def test_the_mean_reward_of_a_learnable_task_rises(method, r, talker, tmp_path):
    seen = []

    def thanks(completions: list[str], prompt: list, number: list[int]) -> list[float]:
        seen.append((prompt, number))
        return [min(text.count("Thanks"), 3) for text in completions]

    recipe = recipe_for(talker, method, r=r, max_steps=12, batch_size=16, max_completion_length=24, eval_steps=5)
    run = train(recipe, PROMPTS, folder=tmp_path, reward=thanks, metric=is_training)
    rewards = run.series("reward")[1]
    assert len(rewards) == 12 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert run.series("rewards/thanks/mean")[1] == pytest.approx(rewards)
    assert run.series("eval_training") == ([5, 10], [0.0, 0.0])
    for prompts, numbers in seen[1:]:  # answers to one prompt lie side by side, with their columns
        assert [PROMPTS[number]["prompt"] for number in numbers] == prompts
        assert numbers == [numbers[i // 4 * 4] for i in range(16)]


def test_two_rewards_are_added(small, tmp_path):
    def one(completions, prompt, number):
        return [1.0] * len(completions)

    def two(completions, prompt, number):
        return [2.0] * len(completions)

    run = train(recipe_for(small, "grpo", max_steps=1), PROMPTS, folder=tmp_path, reward=[one, two])
    assert run.series("reward")[1] == [3.0]


@pytest.mark.parametrize("r", [4, 0])
def test_ppo_raises_the_score_of_its_reward_model_with_four_models(r, small, reward_run, tmp_path, monkeypatch):
    built, build = [], align.trainer
    monkeypatch.setattr(align, "trainer", lambda *arguments: built.append(build(*arguments)) or built[0])
    start, _ = align.load_reward(reward_run.folder)
    steps = {"max_steps": 24, "batch_size": 16, "eval_steps": 6, "learning_rate": 3e-2 if r else 1e-3}
    recipe = recipe_for(small, "ppo", r=r, reward_model=str(reward_run.folder), **steps)
    run = train(recipe, PROMPTS, folder=tmp_path, metric=is_training)
    scores, kl = run.series("objective/scores")[1], run.series("objective/kl")[1]
    assert kl[0] == pytest.approx(0, abs=1e-4) and len(kl) == 24
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3
    assert run.series("eval_training") == ([6, 12, 18, 24], [0.0] * 4)

    reward, value, reference = built[0].reward_model, built[0].value_model, built[0].ref_model
    assert type(run.model).__name__ == ("PeftModelForCausalLM" if r else "LlamaForCausalLM")
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), reward.parameters(), strict=True))
    # the value model begins as the reward model, and all of it is trained
    assert not any(torch.equal(a, b) for a, b in zip(start.parameters(), value.parameters(), strict=True))
    if r:
        assert reference is None  # the policy with its adapter off
    else:
        wanted = load(small)[0].state_dict()
        assert all(torch.equal(weight, wanted[name]) for name, weight in reference.state_dict().items())


def test_ppo_clips_the_gradient_which_trl_forgets(small, reward_run, tmp_path):
    """sgd with rate 1 moves the weights by at most rate x max_grad_norm at each of its four optimizer steps."""
    recipe = recipe_for(small, "ppo", r=0, reward_model=str(reward_run.folder), max_steps=1, max_grad_norm=1e-3)
    recipe = recipe.replace(optimizer="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0)
    run = train(recipe, PROMPTS, folder=tmp_path)
    start = dict(load(small)[0].named_parameters())
    moved = sum((value - start[name]).pow(2).sum() for name, value in run.model.named_parameters()).sqrt().item()
    assert 0 < moved <= 4 * 0.5 * 1e-3 * 1.001


def test_ppo_starts_over_after_an_interruption_and_a_finished_run_is_kept(small, reward_run, ctrl_c, tmp_path):
    recipe = recipe_for(small, "ppo", reward_model=str(reward_run.folder), max_steps=3)
    whole = train(recipe, PROMPTS, folder=tmp_path / "whole")
    stopped = train(recipe, PROMPTS, folder=tmp_path / "again", on_log=ctrl_c(1))
    assert stopped.interrupted and [record["step"] for record in stopped.log] == [1]
    assert not list((tmp_path / "again").glob("checkpoint-*"))
    again = train(recipe, PROMPTS, folder=tmp_path / "again")
    assert not again.interrupted and weights(tmp_path / "again") == weights(tmp_path / "whole")
    kept = train(recipe, PROMPTS, folder=tmp_path / "again", on_log=pytest.fail)
    assert kept.log == again.log and again.series("objective/kl") == whole.series("objective/kl")
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, kept.model.state_dict()[name]), name


# --- SPIN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, 0])
def test_spin_plays_against_the_model_of_the_round_before(r, small, tmp_path):
    from ftlab.pipeline.evaluate import generate

    recipe = recipe_for(small, "dpo", r=r, max_steps=4)
    first, second = align.spin(recipe, SFT, 2, tmp_path, max_new_tokens=6)
    start, tokenizer = load(small)
    for t, opponent in enumerate((start, first.model)):
        pairs = [json.loads(line) for line in (tmp_path / f"iteration-{t}" / "pairs.jsonl").open(encoding="utf-8")]
        said = dict(zip(map(str, [row["prompt"] for row in SFT]), generate(
            opponent, tokenizer, [row["prompt"] for row in SFT], max_new_tokens=6), strict=True))  # fmt: skip
        assert pairs and all(pair["rejected"][0]["content"] == said[str(pair["prompt"])] for pair in pairs)
        assert all({"prompt": pair["prompt"], "completion": pair["chosen"]} in SFT for pair in pairs)
    assert second.series("loss")[1][0] == pytest.approx(LN2, abs=1e-6)  # its reference is where it starts
    assert first.series("rewards/margins")[1][-1] > 0 and second.series("rewards/margins")[1][-1] > 0
    log = []
    again = align.spin(recipe, SFT, 2, tmp_path, max_new_tokens=6, on_log=log.append)
    assert [run.log for run in again] == [first.log, second.log] and not log
    with pytest.raises(ValueError, match="other rows"):
        align.spin(recipe, SFT[:8], 2, tmp_path)


def test_spin_ends_when_the_model_says_what_the_data_say(small, tmp_path, monkeypatch):
    answers = {str(row["prompt"]): row["completion"][0]["content"] for row in SFT}
    monkeypatch.setattr(
        "ftlab.pipeline.evaluate.generate",
        lambda model, tokenizer, prompts, n: [answers[str(p)] + "\n" for p in prompts],
    )
    assert align.spin(recipe_for(small, "dpo"), SFT, 3, tmp_path) == []


def test_spin_wants_dpo_and_messages(small, tmp_path):
    with pytest.raises(ValueError, match="spin is dpo in rounds"):
        align.spin(recipe_for(small, "kto"), SFT, 1, tmp_path)
    with pytest.raises(ValueError, match="row 0: missing key at completion"):
        align.spin(recipe_for(small, "dpo"), PAIRS, 1, tmp_path)
    with pytest.raises(ValueError, match="row 0: got strings"):
        align.spin(recipe_for(small, "dpo"), [{"prompt": "Hi", "completion": "Hello"}], 1, tmp_path)
    assert not list(tmp_path.iterdir())


# --- Bad input, before anything is trained ----------------------------------------------------------------------------

EQUAL = {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}
EMPTY = {**PAIRS[0], "chosen": say(" ")}
LONG = {**PAIRS[0], "chosen": say("please " * 600)}
LONG_PROMPT = {**PAIRS[0], "prompt": ask("please " * 600)}
STRINGS = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
BAD_ROWS = [
    ("dpo", [*PAIRS, EQUAL], r"train row 16: chosen equals rejected at rejected"),
    ("orpo", [EQUAL], r"train row 0: chosen equals rejected"),
    ("reward", [PAIRS[0], EMPTY], r"train row 1: empty assistant message at chosen\[0\].content"),
    ("dpo", [PAIRS[0], LONG], r"train row 1: prompt and chosen are \d+ tokens .* more than max_length = 512"),
    ("reward", [LONG], r"train row 0: prompt and chosen are"),
    ("orpo", [LONG], r"train row 0: prompt and chosen are"),
    ("kto", [*THUMBS[:3], data.thumbs_from_pairs([LONG])[0]], r"train row 3: prompt and completion are"),
    ("dpo", [LONG_PROMPT], r"train row 0: prompt and chosen are \d+ tokens"),
    (
        "grpo",
        [{"prompt": PAIRS[0]["prompt"]}, {"prompt": LONG_PROMPT["prompt"]}],
        r"train row 1: \d+ tokens of prompt and",
    ),
    ("dpo", [STRINGS], r"train row 0: got strings, wanted lists of messages"),
    ("sft", PAIRS, r"train row 0: got a pair, but sft learns from \{prompt, completion\}"),
    ("sft", [SFT[0], THUMBS[1]], r"train row 1: got a thumbs row, but sft learns from"),
    (
        "dpo",
        SFT,
        r"train row 0: got a row with \['completion', 'prompt'\], but dpo learns from \{prompt, chosen, rejected\}",
    ),
    ("reward", THUMBS, r"train row 0: got a thumbs row, but reward learns from"),
    ("kto", PAIRS, r"train row 0: got a pair, but kto learns from .*data.thumbs_from_pairs makes them"),
    ("kto", SFT, r"train row 0: got a row with .* but kto learns from \{prompt, completion, label\}"),
    ("kto", [THUMBS[0], {**THUMBS[1], "label": 0}], r"train row 1: label is not true or false"),
    ("kto", THUMBS[::2], r"all 16 labels are True: kto needs answers of both kinds"),
    ("kto", THUMBS[:9], r"9 rows in batches of 4 leave a last batch of one row"),
    ("rloo", [{"question": "Where?"}], r"train row 0: got a row with \['question'\], but rloo learns from \{prompt\}"),
    ("rloo", [{"prompt": []}], r"train row 0: no messages at prompt"),
    ("rloo", PROMPTS[:1], r"1 prompts are less than the 2 of one step"),
    ("ppo", PROMPTS[:4], r"4 prompts are less than the 8 of one step"),
]


@pytest.mark.parametrize(("method", "rows", "message"), BAD_ROWS, ids=[f"{m}-{x[:40]}" for m, _, x in BAD_ROWS])
def test_a_bad_row_is_named_before_training_starts(method, rows, message, small, reward_run, tmp_path):
    reward = (lambda completions, prompt: [0.0] * len(completions)) if method in ("grpo", "rloo") else None
    more = {"reward_model": str(reward_run.folder)} if method == "ppo" else {}
    with pytest.raises(ValueError, match=message):
        train(recipe_for(small, method, **more), rows, folder=tmp_path / "run", reward=reward, on_log=pytest.fail)


def test_a_bad_evaluation_row_is_named_too(small, tmp_path):
    with pytest.raises(ValueError, match="eval row 1: chosen equals rejected"):
        train(recipe_for(small, "dpo", eval_steps=2), PAIRS, [PAIRS[0], EQUAL], tmp_path)
    with pytest.raises(ValueError, match="rloo evaluates no rows"):
        train(recipe_for(small, "rloo", eval_steps=2), PROMPTS, PROMPTS, tmp_path, reward=early_letters)


BAD_REWARDS = [
    (None, "rloo needs a reward"),
    (lambda completions: [0.0], r"failed on an empty answer to the first row.*TypeError"),
    (lambda completions, **columns: [0.0, 1.0], r"wanted 1 finite numbers"),
    (lambda completions, **columns: [math.nan], r"\[nan\], wanted 1 finite"),
    (lambda completions, **columns: [None], r"TypeError"),
    (lambda completions, **columns: [1 / len(completions[0])], r"ZeroDivisionError"),
]


@pytest.mark.parametrize(("reward", "message"), BAD_REWARDS, ids=[m[-20:] for _, m in BAD_REWARDS])
def test_a_reward_function_that_cannot_work_fails_before_training_starts(reward, message, small, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(recipe_for(small, "rloo"), PROMPTS, folder=tmp_path, reward=reward, on_log=pytest.fail)


def test_a_reward_function_where_none_is_read_is_refused(small, reward_run, tmp_path):
    with pytest.raises(ValueError, match="which dpo does not read"):
        train(recipe_for(small, "dpo"), PAIRS, folder=tmp_path, reward=early_letters)
    with pytest.raises(ValueError, match="give the recipe a reward_model"):
        recipe = recipe_for(small, "ppo", reward_model=str(reward_run.folder))
        train(recipe, PROMPTS, folder=tmp_path, reward=early_letters)


def test_a_reward_model_with_the_wrong_head_or_tokenizer_is_refused(small, reward_run, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with pytest.raises(ValueError, match="holds LlamaForCausalLM, wanted a run of method 'reward'"):
        align.load_reward(small)
    with pytest.raises(ValueError, match="holds no model at all"):
        align.load_reward(tmp_path)
    dpo = train(recipe_for(small, "dpo", max_steps=1), PAIRS, folder=tmp_path / "dpo")
    with pytest.raises(ValueError, match="holds a run of method 'dpo', wanted a finished one"):
        align.load_reward(dpo.folder)
    model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=2)
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification with 2 labels"):
        align.load_reward(tmp_path / "two")

    model, tokenizer = align.load_reward(reward_run.folder)
    model.save_pretrained(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    recipe = recipe_for(small, "ppo", reward_model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="different tokenizers"):
        train(recipe, PROMPTS, folder=tmp_path / "ppo", on_log=pytest.fail)


def test_the_command_line_trains_from_files_of_the_methods_kind(small, tmp_path):
    from ftlab.pipeline.train import rows_from

    for method, rows in (("dpo", PAIRS), ("kto", THUMBS), ("sft", SFT)):
        file = tmp_path / f"{method}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert rows_from(str(file), method) == rows
    with pytest.raises(ValueError, match="16 bad rows"):
        rows_from(str(tmp_path / "sft.jsonl"), "dpo")


def test_thumbs_keep_the_other_keys_and_lose_the_pairing():
    pair = {**PAIRS[1], "id": 7}
    assert data.thumbs_from_pairs([pair]) == [
        {"prompt": pair["prompt"], "id": 7, "completion": pair["chosen"], "label": True},
        {"prompt": pair["prompt"], "id": 7, "completion": pair["rejected"], "label": False},
    ]
    assert all(data.row_fault(row, "thumbs") == "" for row in THUMBS)
    assert data.row_fault({"prompt": "a"}, "preference").startswith("missing key at chosen: ")


# --- Recipes ----------------------------------------------------------------------------------------------------------

BAD_RECIPES = [
    ({"method": "dop"}, "method: .*did you mean"),
    ({"beta": 0.2}, r"beta: got 0.2, wanted its default, 0.1, with method 'sft': only dpo, orpo, kto"),
    ({"method": "reward", "beta": 0.2}, "beta"),
    ({"method": "dpo", "beta": 0}, "beta: got 0.0, wanted above 0"),
    ({"method": "dpo", "desirable_weight": 2}, "desirable_weight: .* only kto read"),
    ({"method": "kto", "undesirable_weight": 0}, "undesirable_weight"),
    ({"method": "kto", "batch_size": 1}, "batch_size: got 1, wanted 2 or more"),
    ({"method": "dpo", "lora_dropout": 0.1}, "lora_dropout: .* with 'dpo'"),
    ({"method": "kto", "fast": True}, "fast: got True, wanted False with 'kto': only sft and dpo"),
    ({"method": "dpo", "engine": "unsloth"}, "engine: .* with 'dpo'"),
    ({"method": "dpo", "num_generations": 2}, "num_generations: .* only grpo, rloo read"),
    ({"method": "grpo", "num_generations": 1}, "num_generations: got 1"),
    ({"method": "grpo", "num_generations": 3}, "batch_size: got 8, wanted .* a multiple of num_generations = 3"),
    ({"method": "rloo", "max_completion_length": 512}, "max_completion_length: .* the prompt needs room"),
    ({"method": "rloo", "temperature": 0}, "temperature"),
    ({"method": "grpo", "eval_file": "x"}, "eval_file"),
    ({"method": "grpo", "eval_file": "x", "eval_steps": 1, "early_stop_patience": 1}, "early_stop_patience"),
    ({"method": "grpo", "reward_model": "x"}, "reward_model: .* only ppo read"),
    ({"method": "ppo"}, "reward_model: got None"),
    ({"method": "ppo", "reward_model": "x", "precision": "bf16"}, "precision: .* whatever is asked for"),
    ({"method": "ppo", "reward_model": "x", "quantization": "nf4"}, "quantization"),
    ({"method": "reward", "quantization": "int8"}, "quantization"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES, ids=[str(c)[1:50] for c, _ in BAD_RECIPES])
def test_a_recipe_that_its_method_cannot_run_is_refused_by_name(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "orpo", "beta": 0.5},
        {"method": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"method": "ppo", "reward_model": "runs/reward", "beta": 0.0, "temperature": 0.7, "max_completion_length": 32},
        {"method": "grpo", "num_generations": 8, "beta": 0.04},
    ],
)
def test_a_recipe_of_each_kind_comes_back_from_yaml(changes, tmp_path):
    recipe = Recipe(**changes)
    assert Recipe.from_yaml(recipe.to_yaml(tmp_path / "recipe.yaml")) == recipe
    assert {key: getattr(recipe, key) for key in changes} == changes
