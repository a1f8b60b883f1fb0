// The page of the memory calculator: a form, and what ftlab.memory says to it. Python runs in this page, by Pyodide, which
// lies beside it; nothing is asked of other servers. What it says of the first choice was worked out when the page was built.
const HERE = document.currentScript.src;
const given = JSON.parse(document.getElementById("calculator-data").textContent);
const place = document.getElementById("calculator");
const COLOURS = {
  weights: "#7f7f7f", constants: "#8c6bb1", adapters: "#0072b2", gradients: "#d55e00", optimizer: "#009e73",
  autocast: "#56b4e9", activations: "#e69f00", loss: "#cc79a7", temporary: "#f0e442", generation: "#a6761d",
};
const SIGNS = { fits: "✓", "may fit": "?", "does not fit": "✗" };
const FIELDS = [ // name, label, how it is asked
  ["architecture", "Model", "list"], ["gpu", "Card", "list"], ["trained", "What is trained", "list"],
  ["r", "LoRA rank r", 1024], ["rows", "Rows a batch", 1024], ["tokens", "Tokens a row", "list"],
  ["preset", "Stack", "list"], ["method", "Trainer", "list"], ["optim", "Optimizer", "list"],
  ["share", "vLLM's share of the card, %", 95], ["gpus", "Number of such cards", 512],
  ["checkpointing", "gradient checkpointing", "check"], ["fsdp", "FSDP, shared among the cards", "check"],
];
const escaped = (text) => String(text).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
const gb = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;
const count = (number) => Number(number).toLocaleString("en");

place.innerHTML = `<form>${FIELDS.map(field).join("")}</form><p role="status" class="state"></p><div class="answer" aria-live="polite"></div>`;
const form = place.querySelector("form");
const say = (text) => (place.querySelector(".state").textContent = text);

function field([name, label, kind]) {
  if (kind === "check") return `<label class="check"><input type="checkbox" name="${name}"> ${label}</label>`;
  if (kind !== "list") return `<label>${label} <input type="number" name="${name}" min="1" max="${kind}" required></label>`;
  const options = given.lists[name].map((one) => `<option value="${escaped(one)}">${escaped(name === "tokens" ? count(one) : one)}</option>`);
  return `<label>${label} <select name="${name}">${options.join("")}</select></label>`;
}

const fill = (chosen) => {
  for (const [name, , kind] of FIELDS) form.elements[name][kind === "check" ? "checked" : "value"] = chosen[name];
};
const chosen = () => Object.fromEntries(FIELDS.map(([name, , kind]) => {
  const input = form.elements[name];
  return [name, kind === "check" ? input.checked : kind === "list" && name !== "tokens" ? input.value : Number(input.value)];
}));

function show(report, { gpu, gpus, architecture, trained, rows, tokens }) {
  const answer = place.querySelector(".answer");
  if (report.wrong) {
    answer.innerHTML = `<p class="verdict">These settings do not go together. ${escaped(report.wrong)}</p>`;
    return;
  }
  const sums = Object.entries(report.phases).map(([phase, kinds]) => [phase, kinds, Object.values(kinds).reduce((a, b) => a + b)]);
  const top = 1.03 * Math.max(report.usable, report.peak), width = (bytes) => `${(100 * bytes / top).toFixed(2)}%`;
  const { ratio, runs, source } = report.margin;
  const reserved = `Beside the tensors the allocator reserves room: up to ${ratio} times as much in nine of ten of ${runs} published runs (${source}).`;
  const kinds = Object.keys(COLOURS).filter((kind) => sums.some(([, of]) => of[kind] > 0.002 * report.peak));
  const bars = sums.map(([phase, of, sum]) => `<div class="phase"><span>${phase}</span><span class="stack">${kinds.map((kind) =>
    `<i style="width: ${width(of[kind])}; background: ${COLOURS[kind]}" title="${kind}: ${gb(of[kind])}"></i>`).join("")
    }<i class="limit" style="left: ${width(report.usable)}"></i></span><b>${gb(sum)}</b></div>`);
  const cards = Object.entries(report.cards).map(([name, verdict]) =>
    `<li class="${verdict === "fits" ? "fits" : "not"}" title="${verdict}">${SIGNS[verdict]} ${escaped(name)}</li>`);
  const rowsOfTable = kinds.map((kind) => `<tr><th>${kind}</th>${sums.map(([, of]) => `<td>${(of[kind] / 1e9).toFixed(2)}</td>`).join("")}</tr>`);
  answer.innerHTML = `
    <p class="verdict ${report.verdict === "fits" ? "fits" : ""}"><b>It ${report.verdict}.</b> ${escaped(architecture)}, ${escaped(trained)}, ${count(rows)} × ${count(tokens)} tokens:
      the peak is ${gb(report.peak)}, in the ${escaped(report.peak_phase)} phase${gpus > 1 ? ", on each card" : ""}. ${escaped(gpu)} has ${gb(report.usable)} to use.</p>
    ${report.verdict === "may fit" ? `<p class="margin">${escaped(reserved)}</p>` : ""}
    <p class="stack-says">${escaped(report.says)}</p>
    <p>Longest rows at this batch: ${count(report.longest)} tokens. Largest batch at this length: ${count(report.largest)} rows.</p>
    <div class="bars">${bars.join("")}</div>
    <ul class="legend">${kinds.map((kind) => `<li><i style="background: ${COLOURS[kind]}"></i>${kind}</li>`).join("")}<li>the line: usable memory</li></ul>
    <p>The same settings on other cards (✓ fits, ? may fit, ✗ does not fit):</p><ul class="cards">${cards.join("")}</ul>
    <details><summary>The numbers, in GB</summary><div class="table-wrapper"><table class="docutils"><thead><tr><th>kind</th>${sums.map(([phase]) => `<th>${phase}</th>`).join("")}</tr></thead><tbody>${rowsOfTable.join("")}</tbody></table></div></details>
    <p>In Python, after <code class="literal">from ftlab import memory</code>:</p><div class="highlight"><pre tabindex="0">${escaped(report.code)}</pre></div>`;
}

async function start() {
  const { loadPyodide } = await import(new URL("pyodide/pyodide.mjs", HERE));
  const python = await loadPyodide();
  const packed = await fetch(new URL("memory.zip", HERE));
  python.unpackArchive(await packed.arrayBuffer(), "zip", { extractDir: "/course" });
  python.runPython("import sys; sys.path.insert(0, '/course'); import calculator");
  return python.globals.get("sys").modules.get("calculator").report;
}

// The choice stands in the address, so that it can be sent to somebody.
const linked = new URLSearchParams(location.hash.slice(1));
const first = { ...given.first };
for (const [name, , kind] of FIELDS)
  if (linked.has(name)) first[name] = kind === "check" ? linked.get(name) === "true" : linked.get(name);
fill(given.first);
show(given.report, given.first);
form.inert = true;
form.onsubmit = (event) => event.preventDefault();

if (location.protocol === "file:") say("This page calculates where a server shows it: run python3 -m http.server --bind 127.0.0.1 in this folder. As a file, it shows one example.");
else if (!given.runs) say("This copy was built without Pyodide, Python for the browser. So it shows one example; notebook 03 has the calculator.");
else {
  say("Starting Python in this page: 13 MB, once …");
  start().then((report) => {
    const update = () => {
      if (!form.checkValidity()) return say("Wanted: whole numbers from 1 up.");
      const now = chosen();
      say("");
      show(JSON.parse(report(JSON.stringify(now))), now);
      history.replaceState(null, "", `#${new URLSearchParams(now)}`);
    };
    fill(first);
    form.inert = false;
    form.oninput = update;
    say("");
    if (linked.size) update();
    place.dataset.ready = "true";
  }).catch((error) => say(`Python did not start here, so this is one example; notebook 03 has the calculator. (${error.message})`));
}
