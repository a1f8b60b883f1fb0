"""Sets the seed before lora_A is drawn. Axolotl 0.19 leaves it to the trainer, which is made later."""

from axolotl.integrations.base import BasePlugin
from transformers import set_seed


class SeedFirst(BasePlugin):
    def pre_lora_load(self, cfg, model):
        set_seed(cfg.seed)
