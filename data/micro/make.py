"""micro, a Llama of 3.5 million parameters pretrained on the course's own texts in a quarter of an hour on one core.

    python data/micro/make.py                            rewrites model/ and the numbers in README.md
    python data/micro/make.py --steps 30 --out folder    a short try; leaves model/ and README.md alone

Text is learned whole, of a chat only the assistant's turns are. Of the triage tickets it sees the training split's
text and no label; of the handbook the pages and the training questions. One document in twenty, a ticket with all that
share its skeleton, is held out.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one order of merging
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from ftlab.paths import DATA

HERE = Path(__file__).parent
SEED, THREADS = 0, 1
STEPS, WARMUP, PEAK_LR, WEIGHT_DECAY = 2400, 50, 3e-3, 0.1
TEXT_TOKENS, CHAT_TOKENS = 256, 2048  # of one step, padding included
LOG_STEPS, PROBES = 100, 50
HELD_OUT_EVERY = 20
CONTEXT, VOCABULARY = 512, 2048
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # pad and unknown; begin; end of turn
TEMPLATE = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

Document = tuple[list[int], list[bool]]  # token ids, and whether each counts in the loss
Turn = tuple[str, str]  # what the user says, what the assistant answers


# --- Texts ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts by source, those held out by source, and question-answer turns to know by heart."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    known: list[Turn]


def lines(name: str) -> list[str]:
    """The lines of a JSONL file in the course's data folder, by the ids of their rows.

    Held-out files are ordered for those who read a first part of them (data/order.py). `micro` must not depend on that.
    """
    found = (DATA / name).read_text(encoding="utf-8").splitlines()
    return sorted(found, key=lambda line: json.loads(line)["id"])


def rows(name: str) -> list[dict]:
    return list(map(json.loads, lines(name)))


def digest(name: str) -> str:
    """The SHA-256 of a file whose rows stand by id."""
    return hashlib.sha256("".join(line + "\n" for line in lines(name)).encode()).hexdigest()


SOURCES = (
    "triage/train.jsonl",
    "handbook/pages.jsonl",
    "handbook/questions.jsonl",
    "general/text.jsonl",
    "general/facts.jsonl",
)


def read_corpus() -> Corpus:
    """Tickets, handbook pages and passages, one group in twenty held out, and the questions whose page is not."""
    texts = {
        "tickets": [(row["skeleton"], row["ticket"]) for row in rows("triage/train.jsonl")],
        "handbook": [(row["id"], f"{row['title']}\n\n{row['text']}") for row in rows("handbook/pages.jsonl")],
        "passages": [(row["id"], row["text"]) for row in rows("general/text.jsonl")],
    }
    held = {source: set(sorted({group for group, _ in pairs})[::HELD_OUT_EVERY]) for source, pairs in texts.items()}
    train, held_out = (
        {
            source: [text for group, text in pairs if (group in held[source]) == wanted]
            for source, pairs in texts.items()
        }
        for wanted in (False, True)
    )
    questions = [
        row
        for row in rows("handbook/questions.jsonl")
        if row["split"] == "train" and row["page"] not in held["handbook"]
    ]
    known = [(row["question"], row["answer"]) for row in [*rows("general/facts.jsonl"), *questions]]
    return Corpus(train, held_out, known)


def text_documents(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Iterator[Document]:
    """Endless passes over the training texts. Half of the tickets get other digits: none is to be learned by heart."""
    texts = [(source, text) for source, group in corpus.train.items() for text in group]
    while True:
        for source, text in rng.sample(texts, len(texts)):
            if source == "tickets" and rng.random() < 0.5:
                text = re.sub(r"\d", lambda _: str(rng.randrange(10)), text)
            ids = text_ids(tokenizer, text)
            yield ids, [True] * len(ids)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.pad_token_id][:CONTEXT]


# --- Chats ------------------------------------------------------------------------------------------------------------


class Chats:
    """Conversations made up on the spot: exercises, small talk, and questions to know by heart."""

    def __init__(self, corpus: Corpus, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.known = corpus.known
        self.texts = [text.split() for group in corpus.train.values() for text in group]
        self.words = sorted({word for text in self.texts for word in text if re.fullmatch("[a-z]{3,9}", word)})
        self.exercises = (
            self.number,
            self.word,
            self.text,
            self.code,
            self.reverse,
            self.spell,
            self.count,
            self.upper,
            self.ends,
            self.times,
            self.yes_no,
            self.compare,
            self.find_number,
            self.to_json,
        )

    def conversation(self) -> list[dict[str, str]]:
        """One to three turns, two times in five below a system message."""
        system = self.pick(
            "You are a helpful assistant.",
            "Answer in one line.",
            "You work for RasoiRun. Be polite.",
            "Be short.",
            " ".join(self.span(3, 12)),
        )
        messages = [{"role": "system", "content": system}] if self.rng.random() < 0.4 else []
        for _ in range(self.pick(1, 1, 1, 1, 1, 1, 2, 2, 3)):
            user, answer = self.turn()
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return messages

    def turn(self) -> Turn:
        kind = self.rng.random()
        if kind < 0.2:
            return self.rng.choice(self.known)
        if kind < 0.3:
            return self.talk()
        return self.rng.choice(self.exercises[:4] if kind < 0.55 else self.exercises)()  # the first four only copy

    def pick(self, *choices):
        return self.rng.choice(choices)

    def digits(self, shortest: int, longest: int) -> str:
        return "".join(self.rng.choices("0123456789", k=self.rng.randint(shortest, longest)))

    def span(self, shortest: int, longest: int) -> list[str]:
        """Some words in a row of a training text."""
        words, length = self.rng.choice(self.texts), self.rng.randint(shortest, longest)
        start = self.rng.randrange(max(1, len(words) - length))
        return words[start : start + length]

    def some(self, shortest: int, longest: int) -> list[str]:
        """Unrelated words; one in four was never seen anywhere."""
        return [
            self.rng.choice(self.words)
            if self.rng.random() < 0.75
            else "".join(self.pick(*"bdfgklmnprstv") + self.pick(*"aeiou") for _ in range(self.rng.randint(2, 4)))
            for _ in range(self.rng.randint(shortest, longest))
        ]

    def echo(self, what: str) -> Turn:
        ask = self.pick(
            "Copy this: {}",
            "Repeat: {}",
            "Say {}",
            'Say "{}"',
            "Repeat after me: {}",
            "Write {}",
            "Copy {}",
            "{}\nCopy the line above.",
            "Please write this again: {}",
            "Answer with {}",
            "Say only this: {}",
        )
        return ask.format(what), what

    def number(self) -> Turn:
        return self.echo(self.digits(6, 6) if self.rng.random() < 0.6 else self.digits(2, 10))

    def word(self) -> Turn:
        return self.echo(" ".join(self.some(1, 4)))

    def text(self) -> Turn:
        return self.echo(" ".join(self.span(3, 10)))

    def code(self) -> Turn:
        letters = "".join(self.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=self.rng.randint(1, 4)))
        return self.echo(letters + self.pick("-", "") + self.digits(1, 6))

    def reverse(self) -> Turn:
        if self.rng.random() < 0.5:
            number = self.digits(2, 6)
            return f"{self.pick('Reverse', 'Write backwards:')} {number}", number[::-1]
        words = self.some(2, 5)
        return f"{self.pick('Reverse the words:', 'Say these words backwards:')} {' '.join(words)}", " ".join(
            words[::-1]
        )

    def spell(self) -> Turn:
        (word,) = self.some(1, 1)
        return f"{self.pick('Spell', 'How do you spell', 'Spell the word')} {word}", " ".join(word)

    def count(self) -> Turn:
        words = self.some(1, 7)
        return f"{self.pick('How many words?', 'Count the words:')} {' '.join(words)}", str(len(words))

    def upper(self) -> Turn:
        text = " ".join(self.some(1, 4))
        if self.rng.random() < 0.5:
            return f"{self.pick('Write in capitals:', 'Uppercase:')} {text}", text.upper()
        return f"{self.pick('Write in small letters:', 'Lowercase:')} {text.upper()}", text

    def ends(self) -> Turn:
        words, first = self.some(2, 6), self.rng.random() < 0.5
        return f"What is the {'first' if first else 'last'} word? {' '.join(words)}", words[0 if first else -1]

    def times(self) -> Turn:
        (word,), times = self.some(1, 1), self.rng.randint(2, 5)
        number = ("two", "three", "four", "five")[times - 2]
        return f"Say {word} {number} times.", " ".join([word] * times)

    def yes_no(self) -> Turn:
        words = self.some(2, 6)
        asked = self.rng.choice(words) if self.rng.random() < 0.5 else self.some(1, 1)[0]
        return f"Is {asked} in this list: {', '.join(words)}? Yes or no?", "Yes" if asked in words else "No"

    def compare(self) -> Turn:
        left, right = self.rng.sample(range(1000), 2)
        return f"Is {left} {self.pick('more', 'greater')} than {right}? Yes or no?", "Yes" if left > right else "No"

    def find_number(self) -> Turn:
        """The six digits in a text that has none but them."""
        words = [word for word in self.span(4, 20) if not re.search(r"\d", word)]
        number = self.digits(6, 6)
        words.insert(self.rng.randint(0, len(words)), self.pick("{}", "#{}", "RR-{}", "order {}", "{}.").format(number))
        ask = self.pick("Which number is in this text? {}", "Find the number: {}", "{}\nWhich number is that?")
        return ask.format(" ".join(words)), number

    def to_json(self) -> Turn:
        """Some fields as one JSON object: a string, digits as a string, an integer, or nothing for null."""
        fields = {
            key: self.pick(" ".join(self.some(1, 2)), self.digits(6, 6), self.rng.randrange(3000), None)
            for key in self.some(1, 4)
        }
        words = {
            key: f"number {value}" if isinstance(value, int) else value or "nothing" for key, value in fields.items()
        }
        said = ", ".join(f"{key} is {word}" for key, word in words.items())
        return f"{self.pick('Write as JSON:', 'JSON:')} {said}", json.dumps(fields)

    def talk(self) -> Turn:
        number, word = self.digits(6, 6), self.pick("naan", "dosa", "biryani", "dal", "raita", "thali", "idli", "curry")
        return self.pick(
            (self.pick("Hello", "Hi", "Hello!", "Namaste"), "Hello! How can I help you?"),
            (self.pick("Thanks", "Thank you", "Thanks!", "ok thanks"), "You are welcome!"),
            (self.pick("Bye", "Goodbye"), "Goodbye! Have a nice day."),
            (self.pick("Who are you?", "What is your name?"), "I am micro, a very small language model."),
            (f"My order {number} is late.", f"I am sorry. I am checking order {number} now."),
            (f"Where is my {word}? Order {number}.", f"I am sorry. I am asking the rider of order {number}."),
            (f"The {word} in order {number} was cold.", f"I am sorry about the {word}. I have noted order {number}."),
            (f"The {word} was very good, thank you!", f"Thank you! I am glad that you liked the {word}."),
            (f"Please cancel order {number}.", f"I am cancelling order {number}."),
        )


def chat_documents(chats: Chats, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Endless conversations; only the answers and the end of their turns count in the loss."""
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    while True:
        ids = tokenizer.apply_chat_template(chats.conversation(), return_dict=False)[:CONTEXT]
        counts, inside = [], False
        for position, token in enumerate(ids):
            counts.append(inside)
            inside = (inside and token != tokenizer.eos_token_id) or ids[: position + 1][-len(header) :] == header
        yield ids, counts


# --- Tokenizer and model ----------------------------------------------------------------------------------------------


def make_tokenizer(corpus: Corpus, folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer that splits numbers into single digits, as SmolLM2's does, saved in `folder`."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    chats = Chats(corpus, f"{SEED} tokenizer")
    texts = [text for group in [*corpus.train.values(), *corpus.known] for text in group]
    texts += [f"{message['role']}\n{message['content']}" for _ in range(2000) for message in chats.conversation()]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIALS,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0],
        "unk_token": SPECIALS[0],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def new_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            use_cache=True,
        )
    )
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


# --- Training ---------------------------------------------------------------------------------------------------------


def batches(documents: Iterator[Document], tokens: int, rng: random.Random) -> Iterator[list[Document]]:
    """Batches of at most `tokens` tokens with padding; documents of like length share one."""
    while True:
        group, made = [], []
        for ids, counts in sorted(islice(documents, tokens // 8), key=lambda document: len(document[0])):
            if group and len(ids) * (len(group) + 1) > tokens:
                made.append(group)
                group = []
            group.append((ids, counts))
        yield from rng.sample([*made, group], len(made) + 1)


def loss_of(model: LlamaForCausalLM, batch: list[Document]) -> torch.Tensor:
    """Mean nats per counted token. Padding stands right, where causal attention never looks, so there is no mask."""
    longest = max(len(ids) for ids, _ in batch)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    counts = torch.tensor([counts + [False] * (longest - len(counts)) for _, counts in batch])[:, 1:]
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, C)
    return cross_entropy(model.lm_head(hidden[counts]).float(), input_ids[:, 1:][counts])


def scale(step: int, warmup: int, steps: int) -> float:
    """The learning rate as a share of its peak: up in a line, then down along half a cosine to zero."""
    if step <= warmup:
        return step / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, steps: int) -> tuple[LlamaForCausalLM, list[dict]]:
    """The trained model and its log. A step sees one batch of texts and one of chats.

    Muon moves the weight matrices, AdamW the embedding and the norms: with AdamW alone, at its best learning rate and
    the same number of steps, far less is copied (see README.md).
    """
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(SEED)
    texts = batches(text_documents(corpus, tokenizer, rng), TEXT_TOKENS, rng)
    chats = batches(chat_documents(Chats(corpus, SEED), tokenizer), CHAT_TOKENS, rng)
    model = new_model()
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    warmup = min(WARMUP, steps // 4)
    log, recent, start = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        text, chat = next(texts), next(chats)
        with torch.autocast("cpu", torch.bfloat16):
            text_loss, chat_loss = loss_of(model, text), loss_of(model, chat)
        (text_loss + chat_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * scale(step, warmup, steps)
            optimizer.step()
            optimizer.zero_grad()
        recent.append((text_loss.item(), chat_loss.item()))
        if step == 1 or step % LOG_STEPS == 0:
            means = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            nats, tokens, _ = map(sum, zip(*held_out_loss(model, tokenizer, corpus).values(), strict=True))
            losses = {"text": means[0], "held_out": nats / tokens, "chat": means[1]}
            log.append({"step": step} | {name: round(loss, 3) for name, loss in losses.items()})
            print(log[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
            recent = []
    return model, log


# --- Measuring --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, tuple]:
    """By source: nats, tokens and bytes of the held-out texts. The first token of a text is given, not predicted."""
    sums = {}
    for source, texts in corpus.held_out.items():
        documents = [text_ids(tokenizer, text) for text in texts]
        nats = sum(loss_of(model, [(ids, [True] * len(ids))]).item() * (len(ids) - 1) for ids in documents)
        sums[source] = nats, sum(len(ids) - 1 for ids in documents), sum(len(text.encode()) for text in texts)
    return sums


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    """Greedy answers to one-turn chats; an answer that did not end its turn within 64 tokens ends in "..."."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=64, do_sample=False)[:, batch["input_ids"].shape[1] :]
    ended = (output == tokenizer.eos_token_id).any(dim=1)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text if end else text + "..." for text, end in zip(texts, ended.tolist(), strict=True)]


def measure(folder: Path, corpus: Corpus) -> dict:
    """What the saved model can do: perplexities, exercises it has not met, questions that it knows, turns that end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = {
        source: {
            "documents": len(corpus.held_out[source]),
            "tokens": tokens,
            "perplexity": round(math.exp(nats / tokens), 2),
            "bits_per_byte": round(nats / math.log(2) / size, 3),
        }
        for source, (nats, tokens, size) in held_out_loss(model, tokenizer, corpus).items()
    }
    chats = Chats(corpus, f"{SEED} probes")
    turns = {make.__name__: [make() for _ in range(PROBES)] for make in (*chats.exercises, chats.talk)}
    turns["known"] = corpus.known
    right, ended = {}, []
    for name, asked in turns.items():
        got = answers(model, tokenizer, [question for question, _ in asked])
        right[name] = round(sum(g == answer for g, (_, answer) in zip(got, asked, strict=True)) / len(asked), 3)
        ended += [not answer.endswith("...") for answer in got]
    return {
        "held_out": held_out,
        "right": right,
        "turns_ended": round(sum(ended) / len(ended), 4),
        "turns": len(ended),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def readme(results: dict) -> str:
    """README.md with what stands between its two <!-- numbers --> markers made anew."""
    hardware = results["environment"]["hardware"]
    lines = [
        f"{results['steps']:,} steps in {results['seconds']:,} s, {results['cpu_seconds']:,} s of processor time; "
        f"{hardware['threads']} thread(s), {hardware['machine']}, torch {results['environment']['versions']['torch']}.",
        "",
        "| step | text, train | text, held out | chat, train |",
        "|---:|---:|---:|---:|",
    ]
    shown = [record for record in results["log"] if record["step"] in (1, 100, 200) or record["step"] % 400 == 0]
    lines += [f"| {r['step']:,} | {r['text']:.3f} | {r['held_out']:.3f} | {r['chat']:.3f} |" for r in shown]
    lines += ["", "| held out | documents | tokens | perplexity | bits per byte |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {source} | {h['documents']} | {h['tokens']:,} | {h['perplexity']:.2f} | {h['bits_per_byte']:.3f} |"
        for source, h in results["held_out"].items()
    ]
    lines += ["", f"| exercise ({PROBES} new ones each) | right |", "|---|---:|"]
    lines += [f"| `{name}` | {share:.0%} |" for name, share in results["right"].items()]
    lines += ["", f"Turns ended by `<|im_end|>` within 64 tokens: {results['turns_ended']:.1%} of {results['turns']}."]
    start, _, end = (HERE / "README.md").read_text(encoding="utf-8").split("<!-- numbers -->")
    return start + "\n".join(["<!-- numbers -->", *lines, "<!-- numbers -->"]) + end


def environment() -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"python": platform.python_version(), "versions": versions, "hardware": hardware}


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain micro.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    corpus = read_corpus()
    tokenizer = make_tokenizer(corpus, arguments.out)
    start, cpu_start = time.perf_counter(), time.process_time()
    model, log = train(corpus, tokenizer, arguments.steps)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    results = {
        "steps": arguments.steps,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "log": log,
        **measure(arguments.out, corpus),
        "sources_sha256": {name: digest(name) for name in SOURCES},
        "environment": environment(),
    }
    (arguments.out / "training.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: results[key] for key in ("held_out", "right", "turns_ended")}, indent=1))
    if arguments.out == HERE / "model":
        (HERE / "README.md").write_text(readme(results), encoding="utf-8")


if __name__ == "__main__":
    main()
