"""RLHF against DPO on `micro` and data/replies: same pairs, same seeds, same processor time; and reward hacking.

    python data/results/rlhf_vs_dpo.py        every run that rlhf_vs_dpo.json lacks (about half an hour on one core)
    python data/results/rlhf_vs_dpo.py 6      at most six of them

One SFT model (micro on the chosen replies of the first 1,000 training pairs) is where everything starts. Each seed has
a reward model of its own, which begins as its copy (Bradley-Terry on the same pairs), another order of the data and
other draws. Then every arm gets BUDGET seconds of one core:

    sft     goes on with SFT          dpo    beta 0.1, 8 pairs a step, the reference computed in each step
    ppo     policy, reference, reward and value model; 16 answers, 2 epochs on them; KL penalty 0.05 in the reward
    rloo    16 answers, 4 to a prompt; KL penalty 0.05 in the reward       grpo    the same; 0.04 times k3 in the loss

The losses are those of ftlab.scratch, which equal TRL's (tests/parity). All train in full, AdamW, no weight decay, 5
steps of warm-up, then a constant rate; products in bf16 where the processor has it. Answers in training are sampled at
temperature 1, up to 64 tokens; one that is cut off is scored as if it ended there. The time is processor time of one
thread, measuring left out, so that a busy machine takes nothing from anybody.

Learning rates: three, a factor of about 3 apart, and on until a worse one stands on either side of the best or LADDER
ends, by seed 0 and the gold reward of greedy answers to the last 100 training tickets, on which nothing is trained.
dpo at 3e-6 was run as well and left out: it scored 0.727 there, as the SFT model itself does, and LADDER was made to
begin at 1e-5 afterwards. Seeds 1 to 4 are then reported at that rate: greedy answers to the 180 test and the 115
hand-written tickets, and sampled ones to 90 of the test tickets for gold, proxy and KL.

"hacking": the reward model of confounded.jsonl, where nearly always the longer reply was chosen, as the proxy. grpo
with and without the KL term, and dpo on the same pairs with beta 0.01, each too long and with a high rate on purpose;
proxy, gold, KL and words of sampled answers on the way. Its rates are fixed, not searched.
"""

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
LADDER = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
FIRST = {"sft": [1e-4, 3e-4, 1e-3], "dpo": [3e-5, 1e-4, 3e-4], "ppo": [3e-5, 1e-4, 3e-4]}  # where the search starts
ARMS = ["sft", "dpo", "ppo", "rloo", "grpo"]
SEEDS = [1, 2, 3, 4]
BUDGET = 20.0  # seconds of one core an arm
SFT_STEPS, REWARD_STEPS, CONFOUNDED_STEPS = 260, 50, 25
PROMPTS, GENERATIONS, LENGTH = 4, 4, 64  # of one step of rloo and grpo; ppo has 16 prompts, one answer each
BETA = {"dpo": 0.1, "ppo": 0.05, "rloo": 0.05, "grpo": 0.04}
HACKS = {  # arm -> (method, beta, learning rate, steps)
    "grpo, beta 0": ("grpo", 0.0, 2e-4, 24),
    "grpo, beta 0.2": ("grpo", 0.2, 2e-4, 24),
    "dpo, beta 0.01": ("dpo", 0.01, 1e-4, 48),
}


# --- Tokens and log-probs ---------------------------------------------------------------------------------------------


def sequences(rows: list[dict], side: str, tokenizer) -> list[tuple[list[int], int]]:
    """(token ids of prompt, answer and end-of-turn; how many of them are the prompt's), one a row."""
    return [with_answer(prompt_ids(row, tokenizer), row[side][0]["content"], tokenizer) for row in rows]


def prompt_ids(row: dict, tokenizer) -> list[int]:
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_answer(prompt: list[int], answer: str, tokenizer) -> tuple[list[int], int]:
    return prompt + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], len(prompt)


def collate(rows: list[tuple[list[int], int]]) -> dict:
    """input_ids, attention_mask and completion_mask, (B, T), padded on the right with 0."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    place = torch.arange(ids.shape[1])
    length, prompt = (torch.tensor(numbers)[:, None] for numbers in ([len(r[0]) for r in rows], [r[1] for r in rows]))
    return {
        "input_ids": ids,
        "attention_mask": (place < length).long(),
        "completion_mask": ((place >= prompt) & (place < length)).long(),
    }


def autocast():
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def logits_of(model, batch: dict):
    with autocast():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return out.logits.float()


def token_logps(model, batch: dict):
    from ftlab.scratch.logps import per_token_logps

    return per_token_logps(logits_of(model, batch), batch["input_ids"])


def values_of(value_model, batch: dict):
    """What the value model expects before each next token, (B, T-1)."""
    with autocast():
        hidden = value_model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return value_model.score(hidden).squeeze(-1)[:, :-1].float()


def scores_of(reward_model, sequences: list[tuple[list[int], int]], eos: int):
    """The reward of each sequence at its end-of-turn, (B,), which is added where an answer was cut off."""
    import torch

    batch = collate([(ids if ids[-1] == eos else [*ids, eos], n) for ids, n in sequences])
    with torch.no_grad():
        return logits_of(reward_model, batch)[:, 0]


# --- Sampling ---------------------------------------------------------------------------------------------------------


def sample(model, prompts: list[list[int]], eos: int, length: int) -> list[tuple[list[int], int]]:
    """One answer to each prompt, drawn at temperature 1 from the fp32 model, as (prompt + answer, prompt length)."""
    import torch

    from ftlab.pipeline.decode import Decoder

    class Sampler(Decoder):
        """Decoder takes the largest logit; the largest of logits + Gumbel noise is a draw from their softmax."""

        def choose(self, logits):
            return super().choose(logits - torch.empty_like(logits).exponential_().log())

    sampler = Sampler(model)
    answers = sampler.answer(prompts, length, [eos])
    ended = [[*answer, eos] if len(answer) < length else answer for answer in answers]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, ended, strict=True)]


def texts_of(rows: list[tuple[list[int], int]], tokenizer) -> list[str]:
    return tokenizer.batch_decode([ids[n:] for ids, n in rows], skip_special_tokens=True)


# --- One optimizer step of each method --------------------------------------------------------------------------------


class Step:
    """Calling it does one step of a method and returns what it saw. `held` are the models in memory, policy first."""

    def __init__(self, method: str, start: dict, rate: float, beta: float, seed: int, **more) -> None:
        """more: `length` of answers, `generations` of a prompt, `decay`, the steps in which the rate falls to 0."""
        import torch

        self.method, self.beta = method, beta
        self.length, self.generations = more.get("length", LENGTH), more.get("generations", GENERATIONS)
        self.tokenizer, self.rows, self.reward_model = start["tokenizer"], start["rows"], start["reward"]
        self.policy = copy.deepcopy(start["policy"])
        self.held = {"policy": self.policy}
        if method not in ("sft", "reward"):
            self.held["reference"] = self.ref = start["policy"]
        if method in ("ppo", "rloo", "grpo"):
            self.held["reward"] = self.reward_model
        if method == "ppo":
            self.held["value"] = self.value = copy.deepcopy(self.reward_model)
        trained = [p for name in ("policy", "value") if name in self.held for p in self.held[name].parameters()]
        for p in trained:
            p.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        decay = more.get("decay", float("inf"))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / 5, 1 - step / decay)
        )
        torch.manual_seed(1000 + seed)
        self.order = [i for _ in range(30) for i in torch.randperm(len(self.rows)).tolist()]

    def __call__(self) -> dict:
        return getattr(self, f"_{'group' if self.method in ('rloo', 'grpo') else self.method}")()

    def _take(self, n: int) -> list[dict]:
        taken, self.order = self.order[:n], self.order[n:]
        return [self.rows[i] for i in taken]

    def _update(self, loss) -> float:
        import torch

        loss.backward()
        torch.nn.utils.clip_grad_norm_((p for g in self.optimizer.param_groups for p in g["params"]), 1.0)
        self.optimizer.step(), self.optimizer.zero_grad()
        return loss.item()

    def _sft(self) -> dict:
        from ftlab.scratch.losses import sft_loss

        batch = collate(sequences(self._take(16), "chosen", self.tokenizer))
        mask = batch["completion_mask"]
        loss = self._update(sft_loss(token_logps(self.policy, batch), mask).sum() / mask[:, 1:].sum())
        self.schedule.step()
        return {"loss": loss}

    def _reward(self) -> dict:
        """policy is the classifier here."""
        from ftlab.scratch.losses import reward_loss

        pairs = self._take(16)
        both = [s for side in ("chosen", "rejected") for s in sequences(pairs, side, self.tokenizer)]
        loss = self._update(reward_loss(*logits_of(self.policy, collate(both))[:, 0].chunk(2)).mean())
        self.schedule.step()
        return {"loss": loss}

    def _dpo(self) -> dict:
        import torch

        from ftlab.scratch.logps import sequence_logps
        from ftlab.scratch.losses import dpo_loss

        pairs = self._take(8)
        batch = collate([s for side in ("chosen", "rejected") for s in sequences(pairs, side, self.tokenizer)])
        logps = sequence_logps(token_logps(self.policy, batch), batch["completion_mask"]).chunk(2)
        with torch.no_grad():
            refs = sequence_logps(token_logps(self.ref, batch), batch["completion_mask"]).chunk(2)
        loss = self._update(dpo_loss(*logps, *refs, self.beta).mean())
        self.schedule.step()
        chosen, rejected = ((p - r).mean().item() for p, r in zip(logps, refs, strict=True))
        return {"loss": loss, "chosen": chosen, "rejected": rejected}

    def _rollout(self, rows: list[dict]) -> dict:
        """Answers of the policy to the rows, with log-probs, reference log-probs, scores and what they are worth."""
        import torch

        from ftlab.scratch.logps import per_token_logps

        eos = self.tokenizer.eos_token_id
        answers = sample(self.policy, [prompt_ids(row, self.tokenizer) for row in rows], eos, self.length)
        batch = collate(answers)
        with torch.no_grad():
            old, ref = logits_of(self.policy, batch), logits_of(self.ref, batch)
        mask = batch["completion_mask"][:, 1:].bool()
        kl = kl_by_position(old, ref)[mask].sum() / len(rows)
        old, ref = (per_token_logps(logits, batch["input_ids"]).where(mask, 0) for logits in (old, ref))
        scores = scores_of(self.reward_model, answers, eos)
        seen = worth(texts_of(answers, self.tokenizer), rows) | {"proxy": scores.mean().item(), "kl": kl.item()}
        return {"batch": batch, "mask": mask, "old": old, "ref": ref, "scores": scores, "seen": seen}

    def _group(self) -> dict:
        import torch

        from ftlab.scratch.logps import masked_mean
        from ftlab.scratch.rl import group_advantages, grpo_loss, kl_k1, ppo_loss, rloo_advantages

        r = self._rollout([row for row in self._take(PROMPTS) for _ in range(self.generations)])
        logps = token_logps(self.policy, r["batch"]).where(r["mask"], 0)
        if self.method == "grpo":
            advantages = group_advantages(r["scores"], self.generations)
            loss = grpo_loss(logps, r["old"], advantages, r["mask"], 0.2, r["ref"], self.beta)
            loss = masked_mean(loss, r["mask"], dim=1).mean()
        else:
            rewards = r["scores"] - self.beta * kl_k1(r["old"], r["ref"]).sum(1)
            columns = logps.sum(1), r["old"].sum(1), rloo_advantages(rewards, self.generations)
            ones = torch.ones(len(rewards), 1)
            loss = ppo_loss(*(column[:, None] for column in columns), ones).mean()
        self._update(loss)
        self.schedule.step()
        return r["seen"]

    def _ppo(self) -> dict:
        import torch

        from ftlab.scratch.logps import masked_mean
        from ftlab.scratch.rl import gae, kl_k1, ppo_loss, token_rewards, value_loss, whiten

        r = self._rollout(self._take(PROMPTS * GENERATIONS))
        mask = r["mask"]
        with torch.no_grad():
            old_values = values_of(self.value, r["batch"])
        rewards = token_rewards(r["scores"], kl_k1(r["old"], r["ref"]), mask, self.beta)
        advantages, returns = gae(rewards, old_values, mask)
        advantages = whiten(advantages, mask)
        for _ in range(2):
            logps = token_logps(self.policy, r["batch"]).where(mask, 0)
            loss = masked_mean(ppo_loss(logps, r["old"], advantages, mask), mask)
            critic = masked_mean(value_loss(values_of(self.value, r["batch"]), old_values, returns, mask), mask)
            self._update(loss + 0.1 * critic)
        self.schedule.step()
        return r["seen"]


# --- What answers are worth -------------------------------------------------------------------------------------------


def kl_by_position(logits, ref_logits):
    """KL(policy || reference) of each prediction, over the whole vocabulary, (B, T-1), nats."""
    logps, refs = (x[:, :-1].log_softmax(-1) for x in (logits, ref_logits))
    return (logps.exp() * (logps - refs)).sum(-1)


def worth(answers: list[str], rows: list[dict]) -> dict:
    from ftlab.pipeline.gold import gold_reward

    golds = [gold_reward(answer, row["ticket_label"]) for answer, row in zip(answers, rows, strict=True)]
    return {"gold": sum(golds) / len(golds), "words": sum(len(a.split()) for a in answers) / len(answers)}


def greedy_golds(policy, tokenizer, rows: list[dict]) -> list[float]:
    from ftlab.pipeline.evaluate import generate
    from ftlab.pipeline.gold import gold_reward

    answers = generate(policy, tokenizer, [row["prompt"] for row in rows], max_new_tokens=LENGTH)
    return [gold_reward(answer, row["ticket_label"]) for answer, row in zip(answers, rows, strict=True)]


def sampled(policy, start: dict, rows: list[dict], length: int = LENGTH) -> dict:
    """gold, words, proxy, and KL to the SFT model (nats an answer) of one sampled answer to each row."""
    import torch

    tokenizer, eos, kl, proxy, texts = start["tokenizer"], start["tokenizer"].eos_token_id, 0.0, 0.0, []
    torch.manual_seed(7)
    for at in range(0, len(rows), 45):
        prompts = [prompt_ids(row, tokenizer) for row in rows[at : at + 45]]
        answers = sample(policy, prompts, eos, length)
        batch = collate(answers)
        with torch.no_grad():
            each = kl_by_position(logits_of(policy, batch), logits_of(start["policy"], batch))
        kl += each[batch["completion_mask"][:, 1:].bool()].sum().item()
        proxy += scores_of(start["reward"], answers, eos).sum().item()
        texts += texts_of(answers, tokenizer)
    return worth(texts, rows) | {"kl": kl / len(rows), "proxy": proxy / len(rows), "texts": texts}


def accuracy(reward_model, pairs: list[dict], tokenizer) -> list[bool]:
    both = [
        [
            score
            for at in range(0, len(pairs), 45)
            for score in scores_of(reward_model, part[at : at + 45], tokenizer.eos_token_id).tolist()
        ]
        for part in (sequences(pairs, side, tokenizer) for side in ("chosen", "rejected"))
    ]
    return [chosen > rejected for chosen, rejected in zip(*both, strict=True)]


# --- Runs -------------------------------------------------------------------------------------------------------------


def data_sets() -> dict[str, list[dict]]:
    from ftlab.paths import DATA
    from ftlab.pipeline.data import reply_pairs

    files = {name: reply_pairs(DATA / "replies" / f"{name}.jsonl") for name in ("train", "test", "hand_test")}
    confounded = reply_pairs(DATA / "replies" / "confounded.jsonl")
    return files | {"train": files["train"][:1000], "validation": files["train"][-100:], "confounded": confounded}


def start_of(seed: int, sets: dict, folder: Path) -> dict:
    """The SFT model, which all seeds share, and both reward models of a seed; trained if the folder lacks them."""
    import torch

    from ftlab.pipeline.align import classifier
    from ftlab.pipeline.models import load

    names = {"policy": "sft", "reward": f"reward-{seed}", "confounded": f"confounded-{seed}"}
    base, tokenizer = load("micro")
    start = {"tokenizer": tokenizer, "rows": sets["train"], "policy": base, "reward": None, "seconds": {}}
    for role, name in names.items():
        here = folder / name
        if not (here / "done").exists():
            began = time.process_time()
            steps = {"policy": SFT_STEPS, "reward": REWARD_STEPS, "confounded": CONFOUNDED_STEPS}[role]
            if role == "policy":
                step = Step("sft", start, 1e-3, 0.0, 0, decay=steps)
            else:
                rows = sets["train" if role == "reward" else "confounded"]
                torch.manual_seed(seed)
                head = {**start, "policy": classifier(folder / names["policy"])[0], "rows": rows}
                step = Step("reward", head, 3e-4, 0.0, seed, decay=steps)
            for _ in range(steps):
                step()
            step.policy.save_pretrained(here)
            tokenizer.save_pretrained(here)
            (here / "done").write_text(str(round(time.process_time() - began, 1)))
        start["seconds"][role] = float((here / "done").read_text())
        start[role] = (load if role == "policy" else classifier)(here)[0].requires_grad_(False)
    return start


def report_of(start: dict, seed: int, sets: dict) -> dict:
    """How good the SFT model and both reward models are, and the seconds that they took."""
    tokenizer = start["tokenizer"]
    return {
        "seed": seed,
        "seconds": start["seconds"],
        "greedy_gold": {name: greedy_golds(start["policy"], tokenizer, sets[name]) for name in ("test", "hand_test")},
        "validation": mean(greedy_golds(start["policy"], tokenizer, sets["validation"])),
        "accuracy": {
            role: {name: mean(accuracy(start[role], sets[name], tokenizer)) for name in ("test", "hand_test")}
            for role in ("reward", "confounded")
        },
        "sampled": {k: v for k, v in sampled(start["policy"], start, sets["test"][:90]).items() if k != "texts"},
    }


def mean(values: list) -> float:
    return sum(values) / len(values)


def run(arm: str, start: dict, rate: float, seed: int, sets: dict, reports: bool) -> dict:
    """BUDGET seconds of one arm; then its scores: on validation alone, or on what is reported."""
    step = Step(arm, start, rate, BETA.get(arm, 0.0), seed)
    began, steps, log = time.process_time(), 0, []
    while time.process_time() - began < BUDGET:
        log.append(step())
        steps += 1
    policy, tokenizer = step.policy.eval(), start["tokenizer"]
    found = {"arm": arm, "rate": rate, "seed": seed, "steps": steps, "models": len(step.held)}
    found["seconds_a_step"] = (time.process_time() - began) / steps
    found["log"] = [{k: round(v, 4) for k, v in record.items()} for record in log[:: max(1, steps // 20)]]
    if not reports:
        return found | {"validation": mean(greedy_golds(policy, tokenizer, sets["validation"]))}
    greedy = {name: greedy_golds(policy, tokenizer, sets[name]) for name in ("test", "hand_test")}
    some = sampled(policy, start, sets["test"][:90])
    texts = some.pop("texts")[:6]
    return found | {"greedy_gold": greedy, "sampled": some, "texts": texts}


def peak(arm: str, start: dict, seed: int = 0) -> dict:
    """Peak bytes of one step with its optimizer states there, every storage counted; and the bytes of the weights."""
    sys.path.insert(0, str(FILE.parents[2] / "tests"))
    from oracles.tracker import tracker

    step = Step(arm, start, 1e-6, BETA.get(arm, 0.0), seed)
    step()
    recorder = tracker(None)
    with recorder:
        for model in step.held.values():
            for p in model.parameters():
                recorder.see(p)
        for state in step.optimizer.state.values():
            for tensor in state.values():
                recorder.see(tensor)
        recorder.start()
        step()
    weights = {name: sum(p.nbytes for p in model.parameters()) for name, model in step.held.items()}
    return {"arm": arm, "weights": weights, "peak_bytes": max(m.total for m in recorder.moments.values())}


def hack(name: str, start: dict, seed: int, sets: dict) -> dict:
    """One arm of the over-optimisation: every few steps proxy, gold, KL and words of 45 sampled answers."""
    method, beta, rate, steps = HACKS[name]
    start = {**start, "reward": start["confounded"], "rows": sets["confounded"]}
    step = Step(method, start, rate, beta, seed, length=96, generations=2)
    curve, log, texts = [], [], []
    for i in range(steps + 1):
        if i % (steps // 4) == 0:
            seen = sampled(step.policy, start, sets["test"][:45], 96)
            texts.append(seen.pop("texts")[0])
            curve.append({"step": i, **{k: round(v, 4) for k, v in seen.items()}})
        if i < steps:
            log.append(step())
    found = {"arm": name, "seed": seed, "rate": rate, "beta": beta, "curve": curve, "texts": texts}
    if method == "dpo":
        found["log"] = [{k: round(v, 4) for k, v in record.items()} for record in log[::4]]
    return found


def main() -> None:
    import torch

    from ftlab.pipeline import fast
    from ftlab.pipeline.train import environment

    torch.set_num_threads(1)
    fast.keep_memory()
    sets, left = data_sets(), int((sys.argv[1:] or [10**6])[0])
    folder = Path(tempfile.gettempdir()) / "rlhf_vs_dpo"
    empty = {"starts": [], "search": [], "runs": [], "peaks": [], "hacking": []}
    result = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"environment": environment(), **empty}

    def add(part: str, key: dict, make) -> None:
        """Makes the record unless it is there, and writes the file."""
        nonlocal left
        if left <= 0 or any(all(record.get(k) == v for k, v in key.items()) for record in result[part]):
            return
        left -= 1
        began = time.perf_counter()
        record = make()
        result[part].append(record)
        FILE.write_text(json.dumps(result) + "\n", encoding="utf-8")
        shown = {k: v for k, v in record.items() if isinstance(v, str | int | float)}
        shown |= {k: round(mean(v), 3) for k, v in record.get("greedy_gold", {}).items()} | record.get("sampled", {})
        print(part, shown, f"{time.perf_counter() - began:.0f} s", flush=True)

    for seed in [0, *SEEDS]:
        start = start_of(seed, sets, folder)
        add("starts", {"seed": seed}, lambda s=start, i=seed: report_of(s, i, sets))
        for arm in ARMS if seed == 0 else []:
            add("peaks", {"arm": arm}, lambda s=start, a=arm: peak(a, s))
            wanted = FIRST.get(arm, [1e-5, 3e-5, 1e-4])
            while wanted and left > 0:
                for rate in wanted:
                    key = {"arm": arm, "rate": rate}
                    add("search", key, lambda s=start, a=arm, r=rate: run(a, s, r, 0, sets, reports=False))
                tried = {record["rate"]: record["validation"] for record in result["search"] if record["arm"] == arm}
                at = LADDER.index(max(tried, key=tried.get))
                wanted = [rate for rate in LADDER[max(at - 1, 0) : at + 2] if rate not in tried]
        for arm in ARMS if seed else []:
            tried = [record for record in result["search"] if record["arm"] == arm]
            best = max(tried, key=lambda record: record["validation"])["rate"]
            key = {"arm": arm, "seed": seed}
            add("runs", key, lambda s=start, a=arm, r=best, i=seed: run(a, s, r, i, sets, reports=True))
        for name in HACKS if seed else []:
            add("hacking", {"arm": name, "seed": seed}, lambda s=start, n=name, i=seed: hack(n, s, i, sets))


if __name__ == "__main__":
    main()
