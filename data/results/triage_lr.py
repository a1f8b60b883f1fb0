"""Which learning rate? The same number of steps at each, scored on the validation tickets (about 3 minutes an arm).

    python data/results/triage_lr.py [learning rate ...]

Writes triage_lr.json beside this file: recipe, versions, hardware, and one row a run. Notebook 05, step 3, reads it.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from ftlab.paths import DATA
from ftlab.pipeline import data, evaluate
from ftlab.pipeline.recipe import Recipe
from ftlab.pipeline.train import environment, train

RECIPE = Recipe(max_steps=88, max_length=256, save_steps=88, seed=0)
LEARNING_RATES = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)


def main() -> None:
    rows = {name: data.triage_rows(DATA / "triage" / f"{name}.jsonl") for name in ("train", "validation")}
    prompts = [row["prompt"] for row in rows["validation"]]
    labels = [json.loads(row["completion"][0]["content"]) for row in rows["validation"]]
    runs = []
    for learning_rate in [float(a) for a in sys.argv[1:]] or LEARNING_RATES:
        recipe = RECIPE.replace(learning_rate=learning_rate)
        with tempfile.TemporaryDirectory() as folder:
            run = train(recipe, rows["train"], folder=Path(folder) / "run")
        answers = evaluate.generate(run.model, run.tokenizer, prompts, max_new_tokens=64)
        scores = evaluate.scores(answers, labels)[["valid_json", "exact", "fields"]].mean().to_dict()
        nats = evaluate.perplexity(run.model, run.tokenizer, rows["validation"]).texts
        loss = float(nats["nll"].sum() / nats["tokens"].sum())
        seconds = round(run.seconds, 1)
        runs.append({"learning_rate": learning_rate, "seed": recipe.seed, **scores, "eval_loss": loss, "seconds": seconds})
        print(runs[-1], flush=True)
    result = {"recipe": dataclasses.asdict(RECIPE), "environment": environment(), "runs": runs}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
