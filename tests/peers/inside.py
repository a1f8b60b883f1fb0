"""The part of `runner.ask` that runs in .venv-axolotl or .venv-llamafactory: asks the tool, writes what it says.

It imports nothing of ftlab: those environments have the tool, not the course.
"""

import json
import sys
import typing

import yaml


class Axolotl:
    """Axolotl's names, validation and preprocessing."""

    @staticmethod
    def keys(config: None) -> dict[str, list[str]]:
        """Known names by place: "" the configuration, "datasets sft" and so on, "trl" a nested one."""
        from axolotl.utils.schemas import datasets
        from axolotl.utils.schemas.config import AxolotlInputConfig
        from pydantic import AliasChoices, BaseModel

        def names(model) -> list[str]:
            found = set(model.model_fields)
            for field in model.model_fields.values():
                alias = field.validation_alias
                found |= set(alias.choices if isinstance(alias, AliasChoices) else [alias] if alias else [])
            return sorted(found)

        def models(hint) -> list:
            if isinstance(hint, type):
                return [hint] if issubclass(hint, BaseModel) else []
            return [model for part in typing.get_args(hint) for model in models(part)]

        known = {"": names(AxolotlInputConfig)}
        for kind, model in (("sft", "SFTDataset"), ("dpo", "DPODataset"), ("kto", "KTODataset")):
            known[f"datasets {kind}"] = names(getattr(datasets, model))
        for name, field in AxolotlInputConfig.model_fields.items():
            if "datasets" not in name and "dataset" not in name and len(found := models(field.annotation)) == 1:
                known[name] = names(found[0])
        return known

    @staticmethod
    def validate(config: str) -> dict:
        """The settings after Axolotl's own validation, those that are JSON."""
        from axolotl.cli.config import load_cfg

        return _json(load_cfg(config).to_dict())

    @staticmethod
    def tokens(config: str) -> list[dict]:
        """Axolotl's rows: ids and labels (sft), or what its DPO trainer makes of them."""
        from axolotl.cli.config import load_cfg
        from axolotl.common.datasets import load_datasets, load_preference_datasets

        cfg = load_cfg(config)
        if not cfg.rl:
            rows = load_datasets(cfg=cfg).train_dataset
            return [{key: list(row[key]) for key in ("input_ids", "labels")} for row in rows]
        from axolotl.train import setup_model_and_tokenizer
        from axolotl.utils.trainer import setup_trainer

        dataset = load_preference_datasets(cfg=cfg)
        model, tokenizer, peft_config, _ = setup_model_and_tokenizer(cfg)
        trainer = setup_trainer(
            cfg=cfg, train_dataset=dataset.train_dataset, eval_dataset=None, model=model, tokenizer=tokenizer,
            processor=None, total_num_steps=dataset.total_num_steps, peft_config=peft_config,
        )  # fmt: skip
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [{key: list(row[key]) for key in keys} for row in trainer.train_dataset]


class LlamaFactory:
    """LLaMA-Factory's names, validation and preprocessing."""

    @staticmethod
    def _arguments(config: str):
        from llamafactory.hparams import get_train_args

        with open(config, encoding="utf-8") as file:
            return get_train_args(yaml.safe_load(file))

    @classmethod
    def validate(cls, config: str) -> dict:
        """All settings after LLaMA-Factory's own validation, and what it leaves unread of dataset_info.json."""
        from llamafactory.data.parser import get_dataset_list

        model, data, training, finetuning, generating = cls._arguments(config)
        with open("dataset_info.json", encoding="utf-8") as file:
            info = {name: _Read(entry) for name, entry in json.load(file).items()}
        get_dataset_list([*info], info)
        unread = [f"{name}.{key}" for name, entry in info.items() for key in entry.unread()]
        settings = {}
        for part in (generating, finetuning, training, data, model):
            settings |= vars(part)
        return {**_json(settings), "unread": unread}

    @classmethod
    def tokens(cls, config: str) -> list[dict]:
        """LLaMA-Factory's rows: ids and labels, in dpo of each side."""
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.model import load_tokenizer

        model, data, training, finetuning, _ = cls._arguments(config)
        module = load_tokenizer(model)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data)
        stage = "rm" if finetuning.stage == "dpo" else finetuning.stage
        rows = get_dataset(template, model, data, training, stage=stage, **module)["train_dataset"]
        keys = [key for key in rows.column_names if key.endswith(("input_ids", "labels"))]
        return [{key: list(row[key]) for key in keys} for row in rows]


class _Read(dict):
    """A dict that knows which of its keys were asked for."""

    def __init__(self, settings: dict) -> None:
        super().__init__({k: _Read(v) if isinstance(v, dict) else v for k, v in settings.items()})
        self.asked = set()

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def unread(self) -> list[str]:
        inner = [f"{k}.{name}" for k, v in self.items() if isinstance(v, _Read) for name in v.unread()]
        return [key for key in self if key not in self.asked] + inner


def _json(settings: dict) -> dict:
    """The settings that JSON can hold."""
    kept = {}
    for key, value in settings.items():
        try:
            json.dumps(value)
        except TypeError:
            value = str(value)
        kept[key] = value
    return kept


if __name__ == "__main__":
    name, what, config, result = sys.argv[1:]
    tool = {"axolotl": Axolotl, "llamafactory": LlamaFactory}[name]
    value = getattr(tool, what)(config or None)
    with open(result, "w", encoding="utf-8") as stream:
        json.dump(value, stream)
