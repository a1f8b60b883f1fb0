"""What the alignment notebooks start from: `micro`, fine-tuned on the old team's log, data/replies/log.jsonl.

    python data/replies_start/make.py     rewrites this folder, five minutes on two quiet cores

It is a whole model and no adapter: the embeddings are trained too, since those of `micro` know little of support.
"""

import json
import sys
from pathlib import Path

from ftlab.paths import DATA
from ftlab.tasks import replies

sys.path.insert(0, str(DATA))
import starts

HERE = Path(__file__).parent
LOG = DATA / "replies" / "log.jsonl"
SETTINGS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "max_steps": 450,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
}


def rows() -> list[dict]:
    """The log as demonstrations: {prompt, completion}, lists of messages."""
    log = map(json.loads, LOG.read_text(encoding="utf-8").splitlines())
    return [
        {"prompt": replies.prompt(row), "completion": [{"role": "assistant", "content": row["reply"]}]} for row in log
    ]


if __name__ == "__main__":
    starts.write(HERE, rows(), SETTINGS, {LOG.name: LOG})
