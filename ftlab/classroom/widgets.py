"""Will it fit? Sliders for a training step on a card, as text and as bars."""

import html

import ipywidgets

from ftlab import memory
from ftlab.classroom import page
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
