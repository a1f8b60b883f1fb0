"""Sliders over pages of bars: will a training step fit on a card, and what does a rank buy?"""

import html

import ipywidgets

from ftlab import memory
from ftlab.classroom import page, results
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED

METHODS = {
    "full fine-tuning": {},
    "LoRA, 16-bit base": {"r": 16},
    "LoRA, int8 base": {"r": 16, "load_in_8bit": True},
    "QLoRA, NF4": {"r": 16, "load_in_4bit": True},
    "QLoRA, NF4 + double quantization": {"r": 16, "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
KIND_COLOURS = {
    "weights": REFERENCE, "constants": "#8c6bb1", "adapters": POLICY, "gradients": REJECTED, "optimizer": CHOSEN,
    "autocast": "#56B4E9", "activations": "#E69F00", "loss": "#CC79A7", "temporary": "#F0E442", "generation": "#A6761D",
}  # fmt: skip
VLLM = "vllm_gpu_memory_utilization"


def will_it_fit(architecture: str = "Llama-3-8B", gpu: str = "RTX 4090") -> page.Live:
    """Sliders for a training step on a card: bars by phase, the peak, the longest row and the largest batch that fit.

    Without sliders: memory.fits("RTX 4090", "Llama-3-8B", r=16, load_in_4bit=True), max_length(...), max_batch(...).
    """
    lengths = [(f"{2**k:,}", 2**k) for k in range(7, 16)]
    controls = {
        "model": ipywidgets.Dropdown(options=list(memory.architectures()), value=architecture),
        "method": ipywidgets.Dropdown(options=list(METHODS), value=list(METHODS)[-1]),
        "card": ipywidgets.Dropdown(options=list(memory.gpus()), value=gpu),
        "rows": ipywidgets.IntSlider(1, 1, 32),
        "tokens": ipywidgets.SelectionSlider(options=lengths, value=2048),
        "checkpointing": ipywidgets.Checkbox(value=True),
        "stack": ipywidgets.Dropdown(options=list(memory.presets())),
        "vllm": ipywidgets.IntSlider(30, 5, 95),  # its share of the card, in percent
    }
    for name, control in controls.items():
        control.description, control.layout.width = name, "340px"
    return page.panel("Will it fit?", _fit, controls)


def _fit(model: str, method: str, card: str, rows: int, tokens: int, checkpointing: bool, stack: str, vllm: int) -> str:
    settings = METHODS[method] | {"per_device_train_batch_size": rows, "max_length": tokens}
    settings |= {"gradient_checkpointing": checkpointing, "preset": stack}
    if VLLM in memory.presets()[stack]["settings"]:
        settings[VLLM] = vllm / 100
    gpu = memory.gpus()[card]
    try:
        predicted = memory.estimate(model, card=card, **settings)
    except ValueError as error:
        return f'<div role="status">These settings do not go together. {html.escape(str(error))}</div>'
    longest, largest = memory.max_length(card, model, **settings), memory.max_batch(card, model, **settings)
    verdict, margin = gpu.verdict(predicted.peak_bytes), memory.margin()
    reserved = (
        f"The allocator reserves up to {margin['ratio']} times as much, in nine of ten of "
        f"{margin['runs']} published runs ({margin['source']}).<br>"
    )
    return (
        f'<div role="status" style="line-height: 1.5"><b>{model}, {method}, {rows} x {tokens:,} tokens: {verdict}</b> '
        f"on {card}.<br>Peak {predicted.peak_bytes / 1e9:.1f} GB, in the {predicted.peak_phase} phase, of "
        f"{gpu.usable_bytes / 1e9:.1f} usable.<br>{reserved if verdict == 'may fit' else ''}"
        f"{html.escape(memory.presets()[stack]['says'])}<br>Longest rows at this batch: {longest:,} tokens; "
        f"largest batch at this length: {largest:,} rows.</div>{_bars(predicted, gpu.usable_bytes)}"
    )


def _bars(predicted: memory.Memory, usable: int) -> str:
    """A bar for the highest moment of each phase, by kind: HTML, since a slider cannot wait for matplotlib."""
    pixels = 480 / max(predicted.peak_bytes, usable)

    def block(kind: str, size: float) -> str:
        look = f"display: inline-block; height: 1.2em; width: {size * pixels:.1f}px"
        return f'<span title="{kind}" style="{look}; background: {KIND_COLOURS.get(kind, "#999")}"></span>'

    bars, phases = "", {phase: moment.kinds for phase, moment in predicted.moments.items()}
    for name, sizes in {"usable": {"usable": usable}, **phases}.items():
        blocks = "".join(block(kind, size) for kind, size in sizes.items() if size)
        name = f"{name} {sum(sizes.values()) / 1e9:.1f} GB"
        bars += f'{name}<div style="white-space: nowrap; line-height: 0; margin-bottom: 4px">{blocks}</div>'
    key = '<span style="white-space: nowrap">{} {}</span>'.format
    legend = " &nbsp; ".join(key(block(kind, 12 / pixels), kind) for kind in KIND_COLOURS)
    card = "background: white; color: black; padding: 0.5em"  # on which each colour is seen, in dark themes too
    return f'<div style="{card}">{bars}{legend}</div>'


SWEEP_RATES = (4e-5, 1e-4, 3e-4, 1e-3)
SWEEP = {  # LoRA of Llama-3.1-8B: rank -> test loss (nats/token) at these rates; data/published/tinker-sweep.yaml
    4: (0.6120, 0.6005, 0.5925, 0.6021),
    16: (0.6112, 0.5983, 0.5863, 0.5931),
    64: (0.6110, 0.5977, 0.5839, 0.5839),
    128: (0.6109, 0.5976, 0.5834, 0.5847),
}
RANKS = (1, 4, 16, 64)  # of experiments/lora_rank, with alpha at 32


def rank_slider() -> page.Live:
    """A slider for the rank: what micro did with it in experiments/lora_rank, and what it costs and brings an 8B.

    Where nothing runs, a fold for each rank; book/static/course.js makes a slider of these.
    """
    pages = {r: _rank_page(r) for r in RANKS}
    folds = "".join(
        f"<details{' open' if r == 16 else ''}><summary>rank {r}</summary>{inside}</details>"
        for r, inside in pages.items()
    )
    controls = {"rank": ipywidgets.SelectionSlider(options=RANKS, value=16, description="rank")}
    still = f'<div data-slider="rank">{folds}</div>'
    return page.panel("What does a rank buy?", lambda rank: pages[rank], controls, still)


def _rank_page(r: int) -> str:
    runs = [run for run in results.records("lora_rank") if run["phase"] == "final" and run["arm"] == f"r={r}"]

    def mean(task: str, value: str) -> float:
        found = [run[value] for run in runs if run["task"] == task]
        return sum(found) / len(found)

    million = memory.architectures()["Llama-3.1-8B"].lora_params(r) / 1e6
    orders, codes = mean("orders", "test"), mean("codes", "test")
    lines = _line("micro: tickets read", f"{orders:.1%}", orders)
    lines += _line("micro: codes stored", f"{codes:.1%}", codes)
    lines += _line("Llama-3.1-8B: trained weights", f"{million:.1f} million", million / 168)
    lines += _line("Llama-3.1-8B: their training states", f"{16e-3 * million:.2f} GB", million / 168)
    if r not in SWEEP:
        return lines + "<div>Llama-3.1-8B: this rank was not tried in the published sweep.</div>"
    loss = SWEEP[r][SWEEP_RATES.index(3e-4)]
    return lines + _line("Llama-3.1-8B: test loss at 3e-4", f"{loss:.4f} nats/token")


def _line(name: str, value: str, share: float | None = None) -> str:
    """A value, and its bar if it is a share of something."""
    look = f"height: 0.7em; width: {100 * (share or 0):.1f}%; max-width: 100%; background: {POLICY}"
    bar = "" if share is None else f'<div style="{look}"></div>'
    return f'<div style="max-width: 30em; margin: 0.2em 0">{name}: <b>{value}</b>{bar}</div>'
