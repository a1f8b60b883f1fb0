"""ftlab.pipeline.recipe: what goes into YAML comes out again, and what cannot be run is refused by name."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.pipeline.recipe import ALL_LINEAR, Recipe, RecipeError

POSITIVE = st.floats(min_value=1e-12, max_value=1e12)
NAME = st.text(min_size=1, max_size=30)
FIELDS = {
    "model": NAME,
    "engine": st.sampled_from(["trl", "unsloth"]),
    "train_file": NAME,
    "eval_file": st.none() | NAME,
    "r": st.integers(1, 512),
    "lora_alpha": POSITIVE,
    "lora_dropout": st.floats(0, 1, exclude_max=True),
    "target_modules": st.lists(NAME, min_size=1, max_size=7),
    "quantization": st.sampled_from(["none", "int8", "nf4", "nf4-double"]),
    "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    "gradient_checkpointing": st.booleans(),
    "fast": st.booleans(),
    "optimizer": st.sampled_from(["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd"]),
    "learning_rate": st.floats(min_value=1e-12, max_value=1, exclude_max=True),
    "schedule": st.sampled_from(["cosine", "linear", "constant"]),
    "warmup_steps": st.integers(0, 10**6),
    "weight_decay": st.floats(0, 10),
    "max_grad_norm": POSITIVE,
    "epochs": POSITIVE,
    "max_steps": st.just(-1) | st.integers(1, 10**9),
    "batch_size": st.integers(1, 4096),
    "gradient_accumulation_steps": st.integers(1, 4096),
    "max_length": st.integers(1, 10**6),
    "logging_steps": st.integers(1, 10**6),
    "eval_steps": st.integers(0, 10**6),
    "save_steps": st.integers(1, 10**6),
    "seed": st.integers(0, 2**32 - 1),
}
FAST_COVERS = {
    "engine": "trl",
    "quantization": "none",
    "lora_dropout": 0.0,
    "gradient_checkpointing": False,
    "target_modules": list(ALL_LINEAR),
}


@settings(max_examples=200, deadline=None)
@given(changes=st.fixed_dictionaries({}, optional=FIELDS))
def test_yaml_gives_back_the_same_recipe(changes, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    if changes.get("fast"):
        changes |= FAST_COVERS
    recipe = Recipe(**changes)
    assert Recipe.from_yaml(recipe.to_yaml(file)) == recipe
    assert list(yaml.safe_load(file.read_text(encoding="utf-8"))) == [
        field.name for field in dataclasses.fields(Recipe)
    ]
    for key, value in changes.items():
        assert getattr(recipe, key) == (tuple(value) if key == "target_modules" else value)


def test_every_field_is_in_the_round_trip():
    """beta, which only dpo reads, is in tests/test_align.py; early_stop_patience needs an evaluation: the next test."""
    left_out = {field.name for field in dataclasses.fields(Recipe)} - FIELDS.keys()
    assert left_out == {"method", "early_stop_patience", "beta"}


def test_a_file_of_every_kind_of_field_is_read_as_written(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: micro\nengine: unsloth\neval_file: null\nr: 8\nlora_alpha: 16\nlearning_rate: 2e-4\nepochs: 1\n"
        "target_modules: [q_proj, v_proj]\ngradient_checkpointing: true\n"
    )
    recipe = Recipe.from_yaml(file)
    wanted = Recipe("micro", "sft", "unsloth", r=8, lora_alpha=16.0, learning_rate=0.0002, epochs=1.0)
    assert recipe == wanted.replace(target_modules=("q_proj", "v_proj"), gradient_checkpointing=True)
    assert isinstance(recipe.lora_alpha, float) and isinstance(recipe.r, int)
    watched = {"eval_steps": 5, "eval_file": "x.jsonl", "early_stop_patience": 2}
    assert Recipe.from_yaml(Recipe(**watched).to_yaml(file)) == Recipe(**watched)


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "0.0002", "2E-04", "'2e-4'", '"0.0002"'])
def test_a_rate_may_be_written_as_people_write_it(text, tmp_path):
    """YAML 1.1 takes 2e-4, without a dot, for a string."""
    (tmp_path / "recipe.yaml").write_text(f"learning_rate: {text}\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").learning_rate == 0.0002


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("lr_schedule", "schedule"),
        ("loraalpha", "lora_alpha"),
        ("batchsize", "batch_size"),
        ("per_device_batch_size", "batch_size"),
        ("max_seq_length", "max_length"),
        ("grad_accumulation_steps", "gradient_accumulation_steps"),
        ("Seed", "seed"),
        ("target_module", "target_modules"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key, near, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"seed: 1\n{key}: 1\n")
    with pytest.raises(RecipeError, match=f"unknown key '{key}', did you mean '{near}'\\?"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"unknown key 'zzz'; known: \['model', 'method'"):
        Recipe.from_dict({"zzz": 1})
    with pytest.raises(RecipeError, match="unknown key 3"):
        Recipe.from_dict({3: 1})
    with pytest.raises(RecipeError, match="did you mean 'seed'"):
        Recipe().replace(sed=1)


WRONG = [
    ("model", None),
    ("model", 3),
    ("train_file", ["a"]),
    ("eval_file", 3),
    ("method", "dop"),
    ("engine", "TRL"),
    ("engine", None),
    ("engine", ["trl"]),
    ("r", -1),
    ("r", 1.5),
    ("r", "16"),
    ("r", True),
    ("r", None),
    ("lora_alpha", 0),
    ("lora_alpha", -1),
    ("lora_alpha", "much"),
    ("lora_alpha", 10**400),
    ("lora_dropout", 1),
    ("lora_dropout", -0.1),
    ("target_modules", []),
    ("target_modules", "q_proj"),
    ("target_modules", ["q_proj", 3]),
    ("target_modules", None),
    ("quantization", "nf5"),
    ("precision", "bf32"),
    ("precision", 16),
    ("gradient_checkpointing", "yes"),
    ("gradient_checkpointing", 1),
    ("optimizer", "adam"),
    ("learning_rate", 0),
    ("learning_rate", -2e-4),
    ("learning_rate", 1),
    ("learning_rate", 2.0),
    ("learning_rate", "fast"),
    ("learning_rate", None),
    ("learning_rate", True),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("learning_rate", [2e-4]),
    ("schedule", "cosin"),
    ("warmup_steps", -1),
    ("warmup_steps", 0.1),
    ("weight_decay", -0.1),
    ("max_grad_norm", 0),
    ("epochs", 0),
    ("epochs", float("inf")),
    ("max_steps", 0),
    ("max_steps", -2),
    ("batch_size", 0),
    ("batch_size", 8.0),
    ("gradient_accumulation_steps", 0),
    ("max_length", 0),
    ("logging_steps", 0),
    ("eval_steps", -1),
    ("save_steps", 0),
    ("early_stop_patience", -1),
    ("early_stop_patience", 2),  # without an evaluation
    ("seed", -1),
    ("seed", 2**32),  # more than numpy's generator takes
    ("seed", "0"),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={value!r:.20}" for key, value in WRONG])
def test_a_wrong_value_is_refused_naming_its_key_and_what_was_got(key, value):
    with pytest.raises(RecipeError) as refused:
        Recipe.from_dict({key: value})
    message = str(refused.value)
    assert message.startswith(f"{key}: got ") and "wanted" in message
    assert repr(tuple(value) if value == [] else value) in message


def test_a_choice_near_to_a_right_one_is_suggested():
    with pytest.raises(RecipeError, match="did you mean 'cosine'"):
        Recipe(schedule="cosin")
    with pytest.raises(RecipeError, match="did you mean 'adamw_torch'"):
        Recipe(optimizer="adamw-torch")


def test_settings_that_contradict_each_other_are_refused():
    assert Recipe(r=0, target_modules=()).r == 0
    with pytest.raises(RecipeError, match="quantized weights cannot be trained"):
        Recipe(r=0, quantization="nf4")
    with pytest.raises(RecipeError, match="early_stop_patience"):
        Recipe(early_stop_patience=2, eval_steps=5)
    with pytest.raises(RecipeError, match="early_stop_patience"):
        Recipe(early_stop_patience=2, eval_file="x.jsonl")


@pytest.mark.parametrize(
    ("text", "cause"),
    [("a: [1", "not valid YAML"), ("", "got NoneType"), ("- r\n- 8\n", "got list"), ("r", "got str")],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_path(text, cause, tmp_path):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(RecipeError, match=rf"broken\.yaml: .*{cause}"):
        Recipe.from_yaml(tmp_path / "broken.yaml")


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "evil.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_yaml(tmp_path / "evil.yaml")
    assert not (tmp_path / "made").exists()


def test_a_recipe_cannot_be_changed_only_replaced():
    recipe = Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1
    assert recipe.replace(seed=1) == Recipe(seed=1) and recipe.seed == 0
    assert hash(recipe) == hash(Recipe()) and recipe != Recipe(seed=1)
    with pytest.raises(RecipeError, match=r"^seed: got -1"):
        recipe.replace(seed=-1)


def test_the_defaults_are_those_of_the_articles_pipeline():
    recipe = Recipe()
    assert (recipe.r, recipe.lora_alpha, recipe.learning_rate, recipe.target_modules) == (16, 32, 2e-4, ALL_LINEAR)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "unsloth"},
        {"quantization": "nf4"},
        {"lora_dropout": 0.1},
        {"gradient_checkpointing": True},
        {"r": 0},
        {"target_modules": ("q_proj",)},
    ],
)
def test_what_the_fast_step_does_not_cover_is_refused_by_name(change):
    Recipe(**change)
    with pytest.raises(RecipeError, match=f"{next(iter(change))}: got .* with fast: true"):
        Recipe(fast=True, **change)
