"""Every library name and keyword of the course is there; and one that is not would be found, wherever it hides."""

import ast
import importlib.metadata
import json
import sys

import drift
import pytest

Missing, Source, Use, read, uses = drift.Missing, drift.Source, drift.Use, drift.read, drift.uses


def source(code: str, module: str = "ftlab.x") -> Source:
    return Source(module.replace(".", "/") + ".py", ast.parse(code), module)


def asked(code: str) -> dict[str, tuple[str, ...]]:
    """Name -> keywords of each use that has some, or has no other."""
    return {use.name: use.keywords for use in uses([source(code)])}


@pytest.fixture(scope="module")
def course() -> list[Use]:
    return uses(map(read, drift.files()))


# --- The course as it is ----------------------------------------------------------------------------------------------


def test_every_name_and_keyword_of_the_course_is_installed_and_nothing_else_passes(course):
    """Those of Unsloth, whose import changes TRL, are looked up in tests/peers/test_peers.py."""
    others = [use for use in course if not use.name.startswith("unsloth")]
    made_up = Use("there", "trl.SFTConfig", ("max_seq_length",))  # its name before TRL 0.20
    assert drift.missing([*others, made_up]) == [Missing("there", "trl.SFTConfig", "max_seq_length")]


def test_what_is_unsloths_is_looked_up_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Here a stand-in for it, which takes no `lora_alfa`."""
    code = "class FastLanguageModel:\n    def get_peft_model(model, lora_alpha, random_state): ..."
    (tmp_path / "unsloth.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    name = "unsloth.FastLanguageModel.get_peft_model"
    assert drift.missing([Use("here", name, ("lora_alfa", "random_state"))]) == [Missing("here", name, "lora_alfa")]
    assert "unsloth" not in sys.modules


def test_what_matters_is_read_from_ftlab_and_from_the_notebooks(course):
    """The learner's own calls, those of a wrapper in a cell of 02, and what `ftlab` asks of the libraries."""
    of = {}
    for use in course:
        place = use.where.split(":")[0].split("#")[0]
        of.setdefault((place, use.name), set()).update(use.keywords)
    assert {"learning_rate", "max_steps", "gradient_checkpointing"} <= of["05_practical_pipeline", "trl.SFTConfig"]
    assert {"beta", "learning_rate"} <= of["04_rlhf_vs_dpo", "trl.DPOConfig"]
    assert {"loss_type", "num_generations"} <= of["04_rlhf_vs_dpo", "trl.GRPOConfig"]
    assert {"lora_alpha", "use_dora"} <= of["02_lora_math", "peft.LoraConfig"]
    assert {"pad_token_id", "repetition_penalty"} <= of["ftlab/evaluate.py", "model.generate"]
    unsloth = "08_modern_stack", "unsloth.FastLanguageModel.from_pretrained"  # in a script that a cell writes
    assert {"dtype", "load_in_4bit"} <= of[unsloth]
    lora = {"r", "lora_alpha", "use_gradient_checkpointing", "random_state"}
    assert lora <= of["08_modern_stack", "unsloth.FastLanguageModel.get_peft_model"]
    everywhere = {name.split(".")[0] for _, name in of}
    assert everywhere >= {
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "gguf",
        "openai",
        "pandas",
    }


def test_few_calls_are_read_only_in_part(course):
    """Models get their batch by **; wrong answers change one argument."""
    partly = {use.name for use in course if use.unread and not use.name.startswith(".")}
    assert partly <= {
        "model.__call__",
        "policy.__call__",
        "reward_model.__call__",
        "trl.SFTConfig",  # ftlab/exercises/nb05.py: wrong answers, each run by tests/test_exercises.py
        "trl.DPOConfig",  # ftlab/exercises/nb04_preferences.py: the same
        "trl.KTOConfig",  # ftlab/exercises/nb06.py: the same
        "trl.GRPOConfig",  # ftlab/exercises/nb07.py: the same
        "peft.LoraConfig",
        "transformers.BitsAndBytesConfig",  # ftlab/exercises/nb03.py: wrong answers
        "model.generate",
        "policy.generate",
        "ipywidgets.Dropdown",
        "transformers.LlamaConfig",  # of a model that transformers has read
    }


# --- It would be found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "keyword"),
    [
        ("from transformers import AutoModelForCausalLLM", "transformers.AutoModelForCausalLLM", ""),
        ("import torch.nn.functional as F\nF.crossentropy(x, y)", "torch.nn.functional.crossentropy", ""),
        ("import torch\ndef f():\n    return torch.backends.no.such.thing", "torch.backends.no.such.thing", ""),
        ("from trl import DPOConfig\nDPOConfig(beta=1, max_prompt_len=2)", "trl.DPOConfig", "max_prompt_len"),
        ("import peft as p\np.LoraConfig(**{'r': 1, 'lora_alfa': 2})", "peft.LoraConfig", "lora_alfa"),
        ("import torch\ntorch.zeros(2, dtyp=int)", "torch.zeros", "dtyp"),  # in C, without a signature
        ("from torch import nn\nclass L(nn.Linear):\n    pass\nL(1, 2, biased=1)", "torch.nn.Linear", "biased"),
        ("import ipywidgets\nipywidgets.Dropdown(option=[])", "ipywidgets.Dropdown", "option"),  # **kwargs swallows it
        (
            "from transformers import AutoModelForCausalLM as A\nA.from_pretrained(x, atn_implementation='eager')",
            "transformers.AutoModelForCausalLM.from_pretrained",
            "atn_implementation",
        ),
        (
            "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(x, trust_remote=False)",
            "transformers.AutoTokenizer.from_pretrained",
            "trust_remote",
        ),
        ("def f(model, x):\n    return model.generate(x, max_new_token=3)", "model.generate", "max_new_token"),
        ("def f(model, x):\n    return model(input_id=x)", "model.__call__", "input_id"),
        (
            "def f(tokenizer, x):\n    tokenizer.apply_chat_template(x, enable_thinking=False, add_generation=True)",
            "tokenizer.apply_chat_template",
            "add_generation",
        ),
        ("def f(trainer):\n    return trainer.acelerator", "trainer.acelerator", ""),
        ("def f(ax):\n    ax.plot([1], colour='red')", "ax.plot", "colour"),
        ("frame.pivot_table(index='a', column='b')", ".pivot_table", "column"),
        ("(x * 2).sum(dimm=1)", ".sum", "dimm"),
        ("frame.pivot_tables(index='a')", ".pivot_tables", ""),
    ],
)
def test_a_name_or_keyword_that_is_not_there_is_found(code, name, keyword):
    assert {(gone.name, gone.keyword) for gone in drift.missing(uses([source(code)]))} == {(name, keyword)}


def test_what_is_missing_is_told_with_its_place():
    (gone,) = drift.missing(uses([source("import trl\n\ntrl.SFTConfig(max_seq_length=8)")]))
    assert str(gone) == "ftlab/x.py:3: trl.SFTConfig takes no keyword 'max_seq_length'"
    (gone,) = drift.missing(uses([source("import trl\ntrl.SFTConfigs")]))
    assert str(gone) == "ftlab/x.py:2: trl.SFTConfigs is not there"


def test_a_library_that_is_not_installed_is_left_out():
    assert drift.missing([Use("here", "no_such_library.f", ("x",))]) == []


def test_the_command_prints_versions_and_what_is_missing_and_fails_if_anything_is(monkeypatch, capsys):
    used = [Use("here", "trl.DPOConfig", ("beta", "loss_type")), Use("there", "trl.PPO"), Use("there", "nowhere.f")]
    monkeypatch.setattr(drift, "uses", lambda sources: used)
    monkeypatch.setattr(drift, "missing", lambda found: [])
    assert drift.main() == 0
    told = f"nowhere is not installed: left out\ntrl {importlib.metadata.version('trl')}\n"
    assert capsys.readouterr().out == told + "3 names used, with 2 keywords: 0 missing\n"
    monkeypatch.setattr(drift, "missing", lambda found: [Missing("04#a:1", "trl.PPO")])
    assert drift.main() == 1
    assert capsys.readouterr().out == told + "3 names used, with 2 keywords: 1 missing\n04#a:1: trl.PPO is not there\n"


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_imports_in_functions_aliases_and_names_that_hide_an_import():
    code = """
import torch
from torch import nn as layers
def f(torch):
    return torch.nothing(x=1)
def g():
    import numpy as np
    make = layers.Linear
    make(1, 2, bias=False)
    return np.zeros(3, dtype=int), torch.ones(2)
def h():
    torch = 3
    return torch.real
"""
    found = asked(code)
    assert found["torch.nn.Linear"] == ("bias",) and found["numpy.zeros"] == ("dtype",) and "torch.ones" in found
    assert not any("nothing" in name or "real" in name for name in found if name.startswith("torch"))


@pytest.mark.parametrize(
    "code",
    [
        "lib.C(a=1, **{'b': 2, **{'c': 3}})",
        "lib.C(**dict(a=1, b=2), c=3)",
        "kept = {'a': 1}\nkept['b'] = 2\nkept.update(c=3)\nlib.C(**kept)",
        "def f():\n    x, y = {'a': 1, 'b': 2}, 0\n    return lib.C(**x, c=3)",
        "def made():\n    return {'a': 1} | {'b': 2}\ndef f():\n    return lib.C(**made(), c=3)",
        "def f(x):\n    lib.C(**x)\ndef g():\n    x = {'a': 1, 'b': 2, 'c': 3}\n    f(x)",
        "def f(n, **x):\n    lib.C(**x)\nf(n=0, a=1, b=2, c=3)",
        "for name, x in {'one': {'a': 1, 'b': 2, 'c': 3}}.items():\n    lib.C(**x)",
        "each = {'one': {'a': 1}, 'two': {'b': 2, 'c': 3}}\n[lib.C(**x) for _, x in each.items()]",
        "K = {'one': {'a': 1, 'b': 2}, 'two': {'c': 3}}\nlib.C(**K[name])",
        "import functools\nf = functools.partial(lib.C, a=1, b=2, c=3)",
    ],
)
def test_keywords_behind_two_stars_are_read(code):
    (use,) = [use for use in uses([source("import lib\n" + code)]) if use.name == "lib.C" and use.keywords]
    assert sorted(use.keywords) == ["a", "b", "c"] and not use.unread


@pytest.mark.parametrize("code", ["lib.C(**{key: 1 for key in keys})", "def f(x):\n    lib.C(**x)", "lib.C(**other())"])
def test_two_stars_that_cannot_be_read_are_told(code):
    assert [use.name for use in uses([source("import lib\n" + code)]) if use.unread] == ["lib.C"]


def test_a_notebooks_place_is_its_cell_and_the_last_dict_before_the_call_counts(tmp_path):
    cells = [
        ("a", "import lib\n%pip install lib\nx = {'early': 1}\nlib.C(**x)"),
        ("b", "%%time\nlib.never()"),
        ("s", "%%writefile runs/s.py\nlib.D(x=1)"),
        ("t", "%%writefile -a runs/s.py\nlib.E(y=2)"),
        ("y", "%%writefile -a runs/s.yaml\nlib: never"),
        ("c", "x = {'late': 1}\n\nlib.C(**x)"),
    ]
    written = [{"cell_type": "code", "id": name, "source": code.splitlines(keepends=True)} for name, code in cells]
    file = tmp_path / "notebooks" / "n.ipynb"
    file.parent.mkdir()
    file.write_text(json.dumps({"cells": [{"cell_type": "markdown", "id": "m", "source": ["lib.no"]}, *written]}))
    found = [
        (use.where, use.name, use.keywords) for use in uses([read(path, tmp_path) for path in drift.files(tmp_path)])
    ]
    assert found == [
        ("n#a:1", "lib", ()), ("n#a:4", "lib.C", ("early",)), ("n#s:2", "lib.D", ("x",)),
        ("n#t:2", "lib.E", ("y",)), ("n#c:3", "lib.C", ("late",)),
    ]  # fmt: skip
