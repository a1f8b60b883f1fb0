"""ftlab.pipeline.faults, train and export under a full disk, too little memory, nan, damaged files and SIGKILL.

The faults are real where the system has them: /dev/full, limits of a process, a folder below a file. A run is asked
three things: what was said, what is still there, and whether the same call then ends as if nothing had happened.
Kills at a step, and in the middle of one file of a checkpoint, are in test_train.py; random ones in bench/kills.py.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlab.pipeline import export, faults
from ftlab.pipeline.models import load
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import DONE, Run, claim, last_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")
KILL = -signal.SIGKILL
STEPS = 8  # checkpoints after 3, 6 and 8
FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


PAIRS = [
    {"prompt": ask(f"Order {i}?"), "chosen": say("Sorry!" + " Soon." * (i % 3)), "rejected": say("No." * (1 + i % 4))}
    for i in range(16)
]
SFT = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
LONG = [{"prompt": ask("Where?" + " please" * 30), "completion": say("Here.")}] * 2
ROWS = {"sft": SFT, "dpo": PAIRS}


def recipe_for(model: Path, method: str = "sft", **changes) -> Recipe:
    settings = {"model": str(model), "method": method, "precision": "fp32", "r": 4, "learning_rate": 1e-2}
    sizes = {"warmup_steps": 1, "max_steps": STEPS, "batch_size": 4, "save_steps": 3, "logging_steps": 1}
    return Recipe.from_dict({**settings, **sizes, **changes})


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ends_as(whole: Path, folder: Path, recipe: Recipe, rows: list[dict] = SFT) -> list[int]:
    """Calls train again; the weights and the log are then those of the run that nothing happened to. The steps made."""
    made = []
    train(recipe, rows, folder=folder, on_log=lambda record: made.append(record["step"]))
    assert weights(folder) == weights(whole)
    assert losses(folder) == losses(whole) and [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert not [name for name in names(folder) if name.startswith(".")]  # no .part, no .old
    return made


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The folder of `recipe_for(tiny)` that nothing happened to."""
    return train(recipe_for(tiny), SFT, folder=tmp_path_factory.mktemp("faults") / "whole").folder


# --- Processes that die -----------------------------------------------------------------------------------------------


def run(recipe: Recipe, rows: list[dict], folder: Path) -> None:
    train(recipe, rows, folder=folder)


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_from_outside_inside_a_checkpoint_and_resumed_ends_in_the_same_weights(small, start, tmp_path):
    recipe, rows = recipe_for(small, "dpo", save_steps=2), ROWS["dpo"]
    train(recipe, rows, folder=tmp_path / "whole")
    process, folder = start(run, recipe, rows, tmp_path / "killed"), tmp_path / "killed"
    while not any(unfinished := [path for path in folder.glob("checkpoint-*") if not (path / DONE).exists()]):
        assert process.is_alive(), "no checkpoint was caught while it was written"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    caught = [path for path in unfinished if not (path / DONE).exists()]  # now nothing changes any more
    process.kill()
    process.join()
    assert caught and process.exitcode == KILL
    ends_as(tmp_path / "whole", folder, recipe, rows)


def run_and_die_deleting(recipe: Recipe, rows: list[dict], folder: Path, name: str) -> None:
    """Trains; of a checkpoint that is deleted to keep two, one file is gone when the process dies."""
    real = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if Path(path) == folder / name:
            (folder / name / "optimizer.pt").unlink()
            die()
        real(path, *args, **kwargs)

    shutil.rmtree = rmtree
    run(recipe, rows, folder)


def test_killed_while_an_old_checkpoint_is_deleted_goes_on_from_the_newest_whole_one(tiny, apart, whole, tmp_path):
    assert apart(run_and_die_deleting, recipe_for(tiny), SFT, tmp_path, "checkpoint-3") == KILL
    assert (tmp_path / "checkpoint-3" / DONE).is_file() and not (tmp_path / "checkpoint-8" / DONE).exists()
    assert ends_as(whole, tmp_path, recipe_for(tiny))[0] == 7


def run_and_die_saving(recipe: Recipe, rows: list[dict], folder: Path) -> None:
    """Trains, and dies before the last file of the result is written."""
    real = torch.save

    def save(thing, path, *args, **kwargs):
        if "adapter" in Path(path).parent.name:
            die()
        real(thing, path, *args, **kwargs)

    torch.save = save
    run(recipe, rows, folder)


def test_killed_while_the_result_is_saved_leaves_the_one_before_or_none(tiny, apart, whole, tmp_path):
    assert apart(run_and_die_saving, recipe_for(tiny), SFT, tmp_path / "new") == KILL
    assert not (tmp_path / "new" / "adapter").exists()
    ends_as(whole, tmp_path / "new", recipe_for(tiny))
    before = {path.name: path.read_bytes() for path in (tmp_path / "new" / "adapter").iterdir()}
    assert apart(run_and_die_saving, recipe_for(tiny), SFT, tmp_path / "new") == KILL  # a finished run, asked again
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "adapter").iterdir()} == before
    ends_as(whole, tmp_path / "new", recipe_for(tiny))
    for file in (tmp_path / "new" / "adapter").glob("*.json"):
        assert ".part" not in file.read_text()


def claim_and_die_writing(recipe: Recipe, folder: Path, name: str) -> None:
    """Claims the folder, and dies with half of a file written."""
    real = Path.write_text

    def write_text(path, data, *args, **kwargs):
        if name not in path.name:
            return real(path, data, *args, **kwargs)
        real(path, data[: len(data) // 2], *args, **kwargs)
        die()

    Path.write_text = write_text
    claim(folder, recipe, ["rows"])


@pytest.mark.parametrize("name", ["recipe.yaml", "rows.sha256", "environment.json"])
def test_killed_while_a_folder_is_claimed_leaves_it_to_the_same_recipe(name, tiny, apart, tmp_path):
    folder = tmp_path / "run"
    for ends in ([KILL], [KILL, 0]):  # nothing is there yet; then everything is, and the recipe is not written again
        assert apart(claim_and_die_writing, recipe_for(tiny), folder, name) in ends
        claim(folder, recipe_for(tiny), ["rows"])
        assert Recipe.from_yaml(folder / "recipe.yaml") == recipe_for(tiny)


# --- Checkpoints that are not what was written ------------------------------------------------------------------------


def run_and_die_at(recipe: Recipe, rows: list[dict], folder: Path, step: int) -> None:
    train(recipe, rows, folder=folder, on_log=lambda record: die() if record["step"] == step else None)


@pytest.fixture(scope="module")
def stopped(tiny, apart, tmp_path_factory) -> Path:
    """The folder of a run that was killed after step 7: checkpoints 3 and 6 are whole."""
    folder = tmp_path_factory.mktemp("stopped")
    assert apart(run_and_die_at, recipe_for(tiny), SFT, folder, 7) == KILL
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def one_bit(file: Path) -> None:
    """Of the last byte: a file of weights is read as before, and one weight is another one."""
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("name", "hurt", "said"),
    [
        ("adapter_model.safetensors", one_bit, "is not what was written"),
        ("optimizer.pt", garbage, "is not what was written"),
        ("trainer_state.json", cut, "is not what was written"),
        ("scheduler.pt", Path.unlink, "cannot be read: No such file"),
        (DONE, garbage, "is not what was written"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(name, hurt, said, tiny, stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    hurt(folder / "checkpoint-6" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is damaged \({name} {said}.*goes on from checkpoint-3"):
        assert ends_as(whole, folder, recipe_for(tiny))[0] == 4
    assert (folder / "broken-checkpoint-6").is_dir() and last_checkpoint(folder) == str(folder / "checkpoint-8")


def test_with_no_good_checkpoint_left_the_run_says_so_and_starts_over(tiny, stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    cut(folder / "checkpoint-6" / "optimizer.pt")
    cut(folder / "checkpoint-3" / "rng_state.pth")
    with pytest.warns(UserWarning, match=r"checkpoint-6 is damaged.*checkpoint-3 is damaged.*starts over"):
        assert ends_as(whole, folder, recipe_for(tiny))[0] == 1


def test_a_damaged_last_checkpoint_of_a_finished_run_is_made_again(tiny, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    cut(folder / "checkpoint-8" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="goes on from checkpoint-6"):
        assert ends_as(whole, folder, recipe_for(tiny))[0] == 7


def test_a_checkpoint_needs_the_best_one_too(tmp_path):
    """Early stopping gives back the best one at the end: without it, going on would end in other weights."""
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors").write_text(f"weights {step}")
        faults.seal(tmp_path / f"checkpoint-{step}", best=Path(f"/elsewhere/checkpoint-{min(step, 4)}"))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-2")  # which 6 does not need: its best is 4
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    one_bit(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"checkpoint-6 is damaged \(../checkpoint-4/adapter.*checkpoint-4 is damaged"):
        assert last_checkpoint(tmp_path) is None
    assert names(tmp_path) == {"broken-checkpoint-4", "broken-checkpoint-6"}


def test_a_run_that_stops_early_seals_its_best_checkpoint_with_each_later_one(tiny, tmp_path):
    recipe = recipe_for(tiny, eval_steps=1, eval_file="unused", early_stop_patience=2, max_steps=20, learning_rate=0.1)
    train(recipe, SFT, [{**row, "completion": say("Never " * 5)} for row in SFT[:4]], folder=tmp_path)
    last = Path(last_checkpoint(tmp_path))
    best = Path(json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"]).name
    assert best != last.name and f"../{best}/adapter_model.safetensors" in json.loads((last / DONE).read_text())


# --- A disk that is full, a folder that refuses -----------------------------------------------------------------------


@needs_dev_full
@pytest.mark.parametrize("name", ["tokenizer.json", "optimizer.pt", "log.jsonl"])
def test_a_full_disk_says_so_and_costs_the_steps_since_the_last_checkpoint(name, tiny, whole, tmp_path):
    """One file of checkpoint-6, or the log, lies on a device that is always full."""
    place = tmp_path / "run" / ("." if name == "log.jsonl" else "checkpoint-6") / name

    def fill(record: dict) -> None:
        if record["step"] == 5:
            place.parent.mkdir(exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(FULL)

    with pytest.raises(OSError, match=r"was not written .* MB are free .*checkpoint-3 is kept; .* same call again"):
        train(recipe_for(tiny), SFT, folder=tmp_path / "run", on_log=fill)
    assert not (tmp_path / "run" / "adapter").exists()
    place.unlink()
    assert ends_as(whole, tmp_path / "run", recipe_for(tiny))[0] == 4


def run_with_limit(recipe: Recipe, rows: list[dict], folder: Path, kind: int, more: int, last: int, told: Path) -> None:
    """Trains; after step `last` the process may have `more` bytes of memory, or in a file. Leaves what was said."""

    def limit(record: dict) -> None:
        if record["step"] >= last and (last < STEPS or "train_runtime" in record):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = more + (pages * resource.getpagesize() if kind == resource.RLIMIT_AS else 0)
            resource.setrlimit(kind, (most, resource.RLIM_INFINITY))

    try:
        train(recipe, rows, folder=folder, on_log=limit)
    except Exception as error:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        told.write_text(f"{type(error).__name__}: {error}")


def test_a_full_disk_at_the_very_end_leaves_no_half_result(tiny, apart, whole, tmp_path):
    told = tmp_path / "told"
    arguments = (recipe_for(tiny), SFT, tmp_path / "run", resource.RLIMIT_FSIZE, 10_000, STEPS, told)
    assert apart(run_with_limit, *arguments) == 0
    assert "was not written" in told.read_text() and "checkpoint-8 is kept" in told.read_text()
    assert not (tmp_path / "run" / "adapter").exists()
    assert ends_as(whole, tmp_path / "run", recipe_for(tiny)) == []


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run was not written .* the folder cannot be written.*no checkpoint yet"):
        train(recipe_for(tmp_path / "no such model"), SFT, folder=tmp_path / "file" / "run")


def test_checkpoints_of_another_program_are_not_removed(tiny, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.pt").write_text("a week of work")
    with pytest.raises(ValueError, match=r"holds checkpoints but no recipe.yaml"):
        train(recipe_for(tiny), SFT, folder=tmp_path)
    assert (tmp_path / "checkpoint-500" / "optimizer.pt").read_text() == "a week of work"


def write_torch(path: Path) -> None:
    torch.save({"x": torch.zeros(100_000)}, path)


def write_text(path: Path) -> None:
    path.write_text("x" * 100_000)


@needs_dev_full
@pytest.mark.parametrize("write", [write_torch, write_text])
def test_each_library_has_its_own_words_for_a_full_disk(write, tmp_path):
    (tmp_path / "file").symlink_to(FULL)
    with pytest.raises(Exception) as caught:
        write(tmp_path / "file")
    told = faults.cannot_write(caught.value, tmp_path)
    assert told.errno in (errno.ENOSPC, errno.EIO) and "full" in str(told) and str(tmp_path) in str(told)


def test_other_errors_pass_as_they_are(tmp_path):
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "rows.jsonl"))
    for error in (elsewhere, missing, ValueError("bad row"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        with pytest.raises(type(error)) as caught, faults.explained(Recipe(), tmp_path):
            raise error
        assert caught.value is error


# --- No number, no memory ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(small, tmp_path_factory) -> Path:
    """A model that is nan for every text with a "Z" in it, as after a bad download; for others it is `small`."""
    model, tokenizer = load(small)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    (token,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    folder = tmp_path_factory.mktemp("poisoned")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_nan_stops_the_run_before_it_reaches_the_weights(method, poisoned, tmp_path):
    """One row of sixteen has the bad token: four rows a step, the seed decides in which of the first four it comes."""
    rows = [{**row, "prompt": ask("Z?")} if i == 1 else row for i, row in enumerate(ROWS[method])]
    recipe = recipe_for(poisoned, method, save_steps=1)
    for _ in range(2 if method == "sft" else 1):  # a second call does no harm either
        with pytest.raises(FloatingPointError, match=r"the gradient is nan .*rate = 0.01 .* is kept") as caught:
            train(recipe, rows, folder=tmp_path)
        step = int(re.match(r"step (\d+):", str(caught.value))[1])
        assert step in (2, 3, 4) and f"checkpoint-{step - 1} is kept" in str(caught.value)
        assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step - 1}")
        kept = load_file(tmp_path / f"checkpoint-{step - 1}" / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in kept.values()) and not (tmp_path / "adapter").exists()
        assert [made for made, _ in losses(tmp_path)] == list(range(1, step))


def test_a_gradient_too_large_for_its_norm_is_not_clipped_to_nothing(small, tmp_path):
    """lora_alpha = 1e20: its square is more than fp32 holds, and clipping to norm 1 would divide by infinity."""
    with pytest.raises(FloatingPointError, match=r"step 1: the grad_norm is nan or infinite"):
        train(recipe_for(small, lora_alpha=1e20), SFT, folder=tmp_path)


def test_rows_that_the_trainer_leaves_out_are_told(tiny, tmp_path):
    """TRL drops a row whose answer lies behind max_length, and says nothing."""
    rows = [*SFT[:6], *LONG]
    with pytest.warns(UserWarning, match=r"2 of 8 rows have no answer within max_length = 64 tokens"):
        train(recipe_for(tiny, max_length=64, max_steps=1), rows, folder=tmp_path / "some")
    with pytest.raises(ValueError, match=r"2 of 2 rows have no answer .*: nothing to learn from"):
        train(recipe_for(tiny, max_length=64, max_steps=1), LONG, folder=tmp_path / "none")


def test_a_loss_that_is_no_number_stops_fp16_too(tiny, tmp_path):
    """There the scaler leaves out steps without a word, until the end: only the logged loss tells."""
    from types import SimpleNamespace

    from ftlab.pipeline.train import _watcher, training_arguments

    assert training_arguments(recipe_for(tiny), tmp_path, evaluates=False)["logging_nan_inf_filter"] is False
    recipe = recipe_for(tiny, precision="fp16")
    watcher = _watcher(None, recipe, tmp_path, None, None)
    state = SimpleNamespace(global_step=5, max_steps=8, is_world_process_zero=True)
    args = SimpleNamespace(fp16=True)
    watcher.on_log(args, state, None, {"loss": 0.5, "grad_norm": float("nan")})  # a step that was left out
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is nan or infinite.*precision is 'fp16'"):
        watcher.on_log(args, state, None, {"loss": float("nan")})
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory hold on Linux")
def test_too_little_memory_names_what_to_change_and_keeps_the_checkpoint(tiny, apart, tmp_path):
    """Forty thousand logits a token: some 50 MB, which malloc asks the system for each time and gives back."""
    model, tokenizer = load(tiny)
    model.resize_token_embeddings(40_000, mean_resizing=False)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    recipe, told = recipe_for(tmp_path / "wide", batch_size=16), tmp_path / "told"
    train(recipe, SFT, folder=tmp_path / "whole")
    assert apart(run_with_limit, recipe, SFT, tmp_path / "run", resource.RLIMIT_AS, 1_000_000, 4, told) == 0
    said = told.read_text()
    assert said.startswith(
        "MemoryError: out of memory with batch_size = 16, max_length = 512, gradient_checkpointing = "
    )
    for words in ("false", "gradient_accumulation_steps", "ftlab.memory.estimate", "checkpoint-3 is kept"):
        assert words in said
    assert ends_as(tmp_path / "whole", tmp_path / "run", recipe)[0] == 4


def test_a_gpu_that_is_full_says_the_same(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    said = r"batch_size = 8, .*\(CUDA out of memory. Tried to allocate 2.00 GiB.\)"
    with pytest.raises(MemoryError, match=said), faults.explained(Recipe(), tmp_path):
        raise error


# --- Exports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(whole, tiny) -> Run:
    return train(recipe_for(tiny), SFT, folder=whole)


def half(path: Path) -> None:
    path.write_bytes(b"half a file")
    die()


def do_export(kind: str, model: Path, adapter: Path, folder: Path, killed: bool) -> None:
    """One export, its quantizer and converter replaced by what writes a file, or half of one and dies."""

    def convert(script: str, *arguments: str) -> None:
        file = Path(arguments[arguments.index("--outfile") + 1])
        half(file) if killed else file.write_bytes(b"whole")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_convert", convert)
        patch.setattr(export, "_pre_tokenizer", lambda file: "smollm")
        if kind == "gguf":
            export.to_gguf(model, folder / kind)
        elif kind == "adapter":
            export.adapter_to_gguf(adapter, model, folder / kind)
        else:
            if killed:
                patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", die)
            export.merge(adapter, model, folder / kind, [ask("Order 1?")])


def content(path: Path) -> dict[str, bytes] | bytes:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("kind", ["merge", "gguf", "adapter"])
def test_a_killed_export_leaves_nothing_or_what_was_there_and_the_next_tidies_up(kind, trained, tiny, apart, tmp_path):
    adapter = trained.folder / "adapter"
    assert apart(do_export, kind, tiny, adapter, tmp_path, True) == KILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{kind}-") and any(left.iterdir())  # it was in the middle of it
    do_export(kind, tiny, adapter, tmp_path, False)
    assert names(tmp_path) == {kind}
    before = content(tmp_path / kind)
    assert before and apart(do_export, kind, tiny, adapter, tmp_path, True) == KILL
    assert content(tmp_path / kind) == before


def test_a_gguf_file_does_not_take_the_place_of_a_model_folder(tiny, tmp_path):
    before = content(shutil.copytree(tiny, tmp_path / "gguf"))
    with pytest.raises(FileExistsError, match="is a folder, wanted the name of a file"):
        do_export("gguf", tiny, tiny, tmp_path, False)
    assert content(tmp_path / "gguf") == before and names(tmp_path) == {"gguf"}


@needs_dev_full
def test_an_export_to_a_full_disk_says_so(tmp_path):
    with (
        pytest.raises(OSError, match=r"merged was not written .*No space left on device.* MB are free there: the disk"),
        export._whole(tmp_path / "merged") as new,
    ):
        new.mkdir()
        (new / "model.safetensors").symlink_to(FULL)
        write_text(new / "model.safetensors")
    assert names(tmp_path) == set()
