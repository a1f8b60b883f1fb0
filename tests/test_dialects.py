"""ftlab.dialects: every field is told, excused or refused; files are as the tools read them; a vanishing key is named.

What the tools themselves make of the files: tests/peers.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, SFTConfig

from ftlab import dialects
from ftlab.paths import DATA

MICRO = str(DATA / "micro" / "model")
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
ABSENT = "no such key"
WRITERS = {"Axolotl": dialects.write_axolotl, "LLaMA-Factory": dialects.write_llamafactory}


def args_of(kind=SFTConfig, **changed):
    return kind("runs", **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | changed)


def files(tool: str, args, lora=LORA, model=MICRO) -> dict:
    """What is written, without any rows."""
    if tool == "OpenAI":
        return dialects.openai_job(args, "gpt-4.1-mini-2025-04-14", "file-1")
    with tempfile.TemporaryDirectory() as folder:
        return yaml.safe_load(WRITERS[tool](args, lora, model, [], folder).read_text())


@pytest.fixture(scope="module")
def ask_rows() -> list[dict]:
    lines = (DATA / "ask" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    return [json.loads(line) for line in lines]


# --- Fields -----------------------------------------------------------------------------------------------------------

ANOTHER = {
    "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 7, "optim": "sgd", "weight_decay": 0.1,
    "max_grad_norm": 0.3, "num_train_epochs": 2, "max_steps": 9, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "max_length": 256, "bf16": True, "fp16": True, "gradient_checkpointing": True,
    "seed": 1, "beta": 0.3, "logging_steps": 2, "save_strategy": "epoch", "save_steps": 7, "save_total_limit": 1,
    "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"],
}  # fmt: skip
OF_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules")


@pytest.mark.parametrize("field", ANOTHER)
def test_a_changed_field_changes_the_file_or_is_excused_or_refused(field):
    kind, change = DPOConfig if field == "beta" else SFTConfig, {field: ANOTHER[field]}
    args = args_of(kind, **({} if field in OF_LORA else change))
    lora = LoraConfig(
        **{"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} | (change if field in OF_LORA else {})
    )
    for tool, key in zip(dialects.TOOLS, dialects.TABLE["fields"][field], strict=True):
        if tool == "OpenAI" and field == "max_steps":
            with pytest.raises(ValueError, match=r"^max_steps: got 9"):
                files(tool, args)
            continue
        changed = files(tool, args, lora) != files(tool, args_of(kind))
        assert changed == bool(key)
        assert changed or field in dialects.TABLE["not_told"][tool] or field in OF_LORA  # of these OpenAI is not told


@pytest.mark.parametrize(
    ("field", "args", "lora"),
    [
        ("packing", args_of(packing=True), LORA),
        ("loss_type", args_of(loss_type="dft"), LORA),
        ("neftune_noise_alpha", args_of(neftune_noise_alpha=5), LORA),
        ("completion_only_loss", args_of(completion_only_loss=False), LORA),
        ("lr_scheduler_kwargs", args_of(lr_scheduler_kwargs={"num_cycles": 2}), LORA),
        ("loss_type", args_of(DPOConfig, loss_type=["ipo"]), LORA),
        ("bias", args_of(), LoraConfig(bias="all", target_modules="all-linear")),
        ("rank_pattern", args_of(), LoraConfig(rank_pattern={"q_proj": 2}, target_modules="all-linear")),
        ("target_modules, lora_alpha", args_of(), LoraConfig(lora_alpha=8.5, target_modules="all-linear")),
        ("target_modules, lora_alpha", args_of(), LoraConfig(target_modules=".*q_proj")),
        ("target_modules, lora_alpha", args_of(), LoraConfig()),
    ],
    ids=str,
)
def test_what_no_tool_can_be_told_is_refused_by_name(field, args, lora):
    for tool in WRITERS:
        with pytest.raises(ValueError, match=f"^{field}"):
            files(tool, args, lora)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("warmup_steps: got 1", lambda: files("Axolotl", args_of(warmup_steps=1))),
        ("warmup_steps: got 0.1", lambda: files("Axolotl", args_of(warmup_steps=0.1))),
        ("num_train_epochs: got 1.5", lambda: files("OpenAI", args_of(num_train_epochs=1.5))),
    ],
)  # fmt: skip
def test_what_one_tool_does_not_do_is_refused_by_name(words, make):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("tool", WRITERS)
def test_no_lora_is_refused(tool):
    with pytest.raises(ValueError, match=f"got '{tool}', lora=None, wanted .* with a LoraConfig"):
        files(tool, args_of(), None)


@pytest.mark.parametrize("lora", [None, LORA])
def test_an_unknown_tool_is_refused_with_the_names_that_there_are(lora):
    with pytest.raises(ValueError, match=r"got 'axolotl', lora=\w+, wanted one of \('Axolotl', 'LLaMA-"):
        dialects.to_keys("axolotl", args_of(), lora)


@pytest.mark.parametrize("tool", WRITERS)
def test_no_limit_on_the_length_cannot_be_told_to_tools_that_have_one(tool):
    with pytest.raises(ValueError, match=f"max_length: got None, wanted 1024, for {tool} cannot be told None"):
        files(tool, args_of(max_length=None))


def test_openai_cannot_be_told_of_lora():
    with pytest.raises(ValueError, match=r"got 'OpenAI', lora=LoraConfig, wanted .* all but OpenAI with a LoraConfig"):
        dialects.to_keys("OpenAI", args_of(), LORA)


SAID = [  # tool, (args, lora), what then stands in the file: from the tools' documentation
    ("Axolotl", (args_of(max_steps=5, lr_scheduler_type="cosine"),),
     {"micro_batch_size": 8, "max_steps": 5, "lr_scheduler": "cosine", "optimizer": "adamw_torch_fused", "rl": ABSENT,
      "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "lora_target_modules": ABSENT,
      "plugins": ["seed_first.SeedFirst"], "save_steps": 500, "save_strategy": ABSENT,
      "excess_length_strategy": "raise", "base_model": "model", "bf16": False}),
    ("Axolotl", (args_of(save_strategy="no"),), {"save_strategy": "no", "save_steps": ABSENT, "max_steps": ABSENT}),
    ("Axolotl", (args_of(DPOConfig, beta=0.3),),
     {"rl": "dpo", "rl_beta": 0.3, "dpo_loss_type": ["sigmoid"], "skip_prepare_dataset": True,
      "datasets": [{"path": "train.jsonl", "split": "train"}], "excess_length_strategy": ABSENT}),
    ("LLaMA-Factory", (args_of(),),
     {"stage": "sft", "finetuning_type": "lora", "lora_target": "all", "disable_gradient_checkpointing": True,
      "use_cpu": True, "template": ABSENT, "pref_loss": ABSENT, "max_steps": -1, "num_train_epochs": 3.0}),
    ("LLaMA-Factory", (args_of(gradient_checkpointing=True), LoraConfig(target_modules={"v_proj", "q_proj"})),
     {"disable_gradient_checkpointing": False, "lora_target": "q_proj,v_proj", "lora_rank": 8}),
    ("LLaMA-Factory", (args_of(DPOConfig, beta=0.3),), {"stage": "dpo", "pref_loss": "sigmoid", "pref_beta": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "configs", "wanted"), SAID, ids=lambda value: str(value)[:20])
def test_a_setting_stands_in_the_file_as_the_tool_means_it(tool, configs, wanted):
    config = files(tool, *configs)
    assert {key: config.get(key, ABSENT) for key in wanted} == wanted


def test_configs_of_a_trainer_that_was_built_say_the_same(small, ask_rows):
    """PEFT writes the layers' names, the model's and a task into the LoraConfig that it is given."""
    from datasets import Dataset
    from trl import SFTTrainer

    args, lora = args_of(report_to="none"), copy.deepcopy(LORA)
    SFTTrainer(str(small), args=args, train_dataset=Dataset.from_list(ask_rows), peft_config=lora)
    for tool in WRITERS:
        told, names = files(tool, args, lora), {"lora_target_modules", "lora_target", "lora_target_linear"}
        before = files(tool, args_of(report_to="none"))
        assert {k: v for k, v in told.items() if k not in names} == {k: v for k, v in before.items() if k not in names}


# --- Keys that vanish -------------------------------------------------------------------------------------------------


def test_keys_that_axolotl_would_drop_are_found_with_the_nearest_name():
    config = files("Axolotl", args_of(DPOConfig))
    assert dialects.unknown_keys(config) == dialects.unknown_keys(files("Axolotl", args_of())) == []
    config["num_train_epochs"] = 3
    config["datasets"][0]["ds_type"] = "json"  # known in an sft data set only
    config["trl"] = {"beat": 0.1}
    near = "num_train_epochs (did you mean num_epochs?)"
    found = dialects.unknown_keys(config)
    assert found == [near, "datasets[0].ds_type (did you mean type?)", "trl.beat (did you mean beta?)"]


def test_the_keys_of_a_data_set_are_those_of_the_method():
    config = {"base_model": "m", "datasets": [{"path": "d", "trust_remote_code": False}]}
    assert dialects.unknown_keys(config | {"rl": "kto"}) == dialects.unknown_keys(config | {"rl": None}) == []
    assert dialects.unknown_keys(config | {"rl": "dpo"}) == ["datasets[0].trust_remote_code"]
    of_pairs = config | {"datasets": [{"path": "d", "field_chosen": "good"}]}
    assert dialects.unknown_keys(of_pairs | {"rl": "dpo"}) == []
    assert dialects.unknown_keys(of_pairs | {"rl": "kto"})[0].startswith("datasets[0].field_chosen")
    assert dialects.unknown_keys({"base_model": "m", "pretraining_dataset": [{"path": "d"}]}) == []


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", WRITERS)
def test_a_folder_is_whole_and_names_no_path_of_this_machine(tool, ask_rows, tmp_path):
    (tmp_path / "axolotl_prepared").mkdir()
    for _ in range(2):  # the second time over the first
        file = WRITERS[tool](args_of(bf16=True), LORA, MICRO, ask_rows, tmp_path)
    assert yaml.safe_load(file.read_text()) == files(tool, args_of(bf16=True))
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 12
    assert all(str(DATA) not in path.read_text() for path in tmp_path.glob("*.*"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert tool != "Axolotl" or (tmp_path / "seed_first.py").is_file()
    assert tool != "Axolotl" or not (tmp_path / "axolotl_prepared").exists()


def test_a_model_of_the_hub_is_named_and_not_linked(monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: None)
    assert files("Axolotl", args_of(), LORA, "owner/name")["base_model"] == "owner/name"
    assert files("LLaMA-Factory", args_of(), LORA, "owner/name")["model_name_or_path"] == "owner/name"


def test_the_segments_are_the_text_that_the_template_makes(ask_rows, tmp_path):
    """By hand for ChatML: the first segment ends where the answer begins, the second with a line break."""
    dialects.write_axolotl(args_of(), LORA, MICRO, ask_rows, tmp_path)
    prompt, answer = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["segments"]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in ask_rows[0]["prompt"]]
    assert prompt == {"label": False, "text": "".join(turns) + "<|im_start|>assistant\n"}
    assert answer == {"label": True, "text": ask_rows[0]["completion"][0]["content"] + "<|im_end|>\n"}


PAIR = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Cold tea"}],
    "chosen": [{"role": "assistant", "content": "Sorry."}],
    "rejected": [{"role": "assistant", "content": "So what?"}],
}
PROMPT = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Cold tea"}]'
YES, NO = '{"role": "assistant", "content": "Sorry."}', '{"role": "assistant", "content": "So what?"}'
LINES = {
    "Axolotl": f'{{"prompt": {PROMPT}, "chosen": [{YES}], "rejected": [{NO}]}}',
    "LLaMA-Factory": f'{{"messages": {PROMPT}, "chosen": {YES}, "rejected": {NO}}}',
    "OpenAI": f'{{"input": {{"messages": {PROMPT}, "tools": [], "parallel_tool_calls": true}}, '
    f'"preferred_output": [{YES}], "non_preferred_output": [{NO}]}}',
}


@pytest.mark.parametrize("tool", LINES)
def test_a_pair_is_written_as_the_tool_reads_it(tool, tmp_path):
    if tool == "OpenAI":
        dialects.write_openai(args_of(DPOConfig), MICRO, [PAIR] * 10, tmp_path)
    else:
        WRITERS[tool](args_of(DPOConfig), LORA, MICRO, [PAIR] * 10, tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == f"{LINES[tool]}\n" * 10
    if tool == "LLaMA-Factory":
        entry = json.loads((tmp_path / "dataset_info.json").read_text())["train"]
        assert entry["ranking"] is True and list(entry["columns"]) == ["messages", "chosen", "rejected"]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_row_as_long_as_allowed_is_written_and_a_longer_one_is_not(longer, tmp_path):
    """Both sides are measured: the other one is shorter."""
    row = {**PAIR, longer: [{"role": "assistant", "content": "Sorry, sorry, sorry, sorry."}]}
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    length = len(tokenizer.apply_chat_template(row["prompt"] + row[longer], return_dict=False))
    with pytest.raises(ValueError, match=f"row 0: {length} tokens, max_length is {length - 1}"):
        dialects.write_llamafactory(args_of(DPOConfig, max_length=length - 1), LORA, MICRO, [row], tmp_path)
    assert not list(tmp_path.iterdir())
    dialects.write_llamafactory(args_of(DPOConfig, max_length=length), LORA, MICRO, [row], tmp_path)


def test_rows_and_models_that_do_not_fit_are_refused(ask_rows, tmp_path):
    with pytest.raises(ValueError, match="row 1: completion is missing or empty"):
        dialects.write_axolotl(args_of(), LORA, MICRO, [ask_rows[0], PAIR], tmp_path / "a")
    model = shutil.copytree(MICRO, tmp_path / "space")
    AutoTokenizer.from_pretrained(model, add_prefix_space=True).save_pretrained(model)  # as Llama 2's did
    with pytest.raises(ValueError, match="other tokens apart than together"):
        dialects.write_axolotl(args_of(), LORA, str(model), ask_rows, tmp_path / "c")
    dialects.write_axolotl(args_of(), LORA, MICRO, ask_rows, tmp_path / "d")
    held = (tmp_path / "d" / "model" / "model.safetensors").resolve()
    model = shutil.copytree(MICRO, tmp_path / "e" / "model")
    with pytest.raises(ValueError, match="holds files of its own"):
        dialects.write_llamafactory(args_of(), LORA, str(model), ask_rows, tmp_path / "e")
    assert held.is_file() and not (tmp_path / "e" / "model" / "model.safetensors").is_symlink()


# --- OpenAI -----------------------------------------------------------------------------------------------------------


def strictly(kind, value, where="body"):
    """Faults of a value held against a TypedDict of the `openai` package: keys it has not, and types."""
    from pydantic import TypeAdapter
    from typing_extensions import get_type_hints

    hints = get_type_hints(kind)
    faults = [f"{where}.{key}" for key in value if key not in hints]
    for key, inner in value.items():
        if isinstance(inner, dict) and hasattr(hints.get(key), "__annotations__"):
            faults += strictly(hints[key], inner, f"{where}.{key}")
    TypeAdapter(kind).validate_python(value, strict=True)
    return faults


@pytest.mark.parametrize(("kind", "name"), [(SFTConfig, "supervised"), (DPOConfig, "dpo")])
def test_the_job_body_is_what_the_openai_package_declares(kind, name):
    from openai.types.fine_tuning import JobCreateParams

    body = files("OpenAI", args_of(kind, per_device_train_batch_size=4, gradient_accumulation_steps=3, seed=7))
    assert strictly(JobCreateParams, body) == []
    assert strictly(JobCreateParams, {**body, "learning_rate": 1e-3}) == ["body.learning_rate"]
    settings = body["method"][name]["hyperparameters"]
    assert body["method"]["type"] == name and (settings["n_epochs"], settings["batch_size"], body["seed"]) == (3, 12, 7)
    assert settings.get("beta") == (0.1 if name == "dpo" else None)


def test_the_lines_hold_chat_messages_of_the_openai_package(ask_rows, tmp_path):
    from openai.types.chat import ChatCompletionMessageParam
    from pydantic import TypeAdapter

    file = dialects.write_openai(args_of(), MICRO, ask_rows, tmp_path)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line, row in zip(lines, ask_rows, strict=True):
        TypeAdapter(list[ChatCompletionMessageParam]).validate_python(line["messages"])
        assert line == {"messages": row["prompt"] + row["completion"]}
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_every_reason_is_a_sentence_and_every_field_of_the_table_is_one_of_trl_or_peft():
    names = {*vars(args_of()), *vars(args_of(DPOConfig)), *vars(LORA)}
    reasons = [dialects.TABLE["not_told"][name] for name in ("everywhere", *dialects.TOOLS)]
    assert dialects.TABLE["fields"].keys() == {*ANOTHER, "use_cpu"}  # use_cpu=False is refused where there is no GPU
    assert names >= {*dialects.TABLE["fields"], *(field for part in reasons for field in part)}
    assert all(len(reason) > 8 for part in reasons for reason in part.values())
    assert (Path(dialects.KEYS_FILE)).is_file()


def test_a_config_of_another_trainer_is_refused(tmp_path):
    from trl import KTOConfig

    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="got a KTOConfig, wanted an SFTConfig or a DPOConfig"):
        files("Axolotl", args)


def test_the_files_of_somebody_else_are_never_replaced_by_links(tmp_path, ask_rows):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds files of its own"):
        dialects.write_llamafactory(args_of(), LORA, str(DATA / "micro" / "model"), ask_rows[:2], tmp_path)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]  # nothing was written before it refused


@pytest.mark.parametrize("tool", WRITERS)
def test_a_second_run_in_the_same_folder_has_the_files_of_its_own_model_alone(tool, tmp_path):
    other = shutil.copytree(MICRO, tmp_path / "other", ignore=shutil.ignore_patterns("*.jinja", "*.safetensors"))
    (other / "model-00001-of-00001.safetensors").write_bytes(b"")  # sharded, and its template elsewhere
    for model in (MICRO, other):
        path = WRITERS[tool](args_of(), LORA, str(model), [], tmp_path / "run")
    assert {file.name for file in (path.parent / "model").iterdir()} == {file.name for file in other.iterdir()}
    held = [file for file in (path.parent / "model").iterdir() if file.name != "config.json"]
    assert {file.resolve().parent for file in held} == {other.resolve()}


def test_earlier_answers_in_a_prompt_do_not_count(tmp_path, ask_rows):
    """As in TRL, where the completion alone counts; OpenAI and LLaMA-Factory count each answer unless they are told."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = [{**row, "prompt": turns + row["prompt"][-1:]} for row in ask_rows[:10]]
    path = dialects.write_openai(args_of(), str(DATA / "micro" / "model"), rows, tmp_path)
    for line in path.read_text(encoding="utf-8").splitlines():
        assert [m.get("weight") for m in json.loads(line)["messages"]] == [None, 0, None, None]
    assert files("LLaMA-Factory", args_of())["mask_history"] is True
    assert "mask_history" not in files("LLaMA-Factory", args_of(DPOConfig))  # which refuses it for pairs
