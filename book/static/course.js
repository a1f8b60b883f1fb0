// A quiz's choices can be clicked, or chosen with Tab and Enter: each shows its own explanation, taken from the solution
// that is folded away below them. A number, or an order of letters, is typed. Without JavaScript the solution still opens.
const spoken = (html, right) => {
  const said = Object.assign(document.createElement("div"), { className: right ? "why right" : "why", innerHTML: html });
  said.setAttribute("role", "status");
  return said;
};
document.querySelectorAll(".cell_output > details").forEach((solution) => {
  if (solution.dataset.answer || solution.dataset.order) return typed(solution);
  const letter = (item) => item.querySelector("strong")?.textContent;
  const whys = new Map([...solution.querySelectorAll("li")].map((item) => [letter(item), item]));
  const list = solution.previousElementSibling;
  if (list?.tagName !== "UL") return;
  for (const choice of list.children) {
    const why = whys.get(letter(choice));
    if (!why) continue;
    const said = spoken(why.innerHTML, /^\s*\w is right/.test(why.textContent));
    said.hidden = true;
    const button = choice.firstElementChild;
    Object.assign(button, { className: "choice", tabIndex: 0, role: "button" });
    button.setAttribute("aria-expanded", "false");
    button.onclick = () => button.setAttribute("aria-expanded", !(said.hidden = !said.hidden));
    button.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      button.click();
    };
    choice.append(said);
  }
});

// A field to type the answer into. As in ftlab/classroom/quiz.py 0,69 is 0.69, and 1,234 is 1234 or 1.234.
function typed(solution) {
  const { answer, tolerance, order } = solution.dataset;
  const form = Object.assign(document.createElement("form"), { className: "typed" });
  const hint = order ? `in order, like ${[...order].sort().reverse().join("")}` : "a number";
  form.innerHTML = `<label>Answer: <input placeholder="${hint}" autocomplete="off"></label> <button>Check</button>`;
  const said = form.appendChild(spoken("", false));
  const why = solution.querySelector("p").innerHTML.replace(/^<strong>.*?<\/strong>/, "");
  form.onsubmit = (event) => {
    event.preventDefault();
    const [right, text] = grade(form.querySelector("input").value);
    said.innerHTML = `<b>${right ? "Right." : "Not yet."}</b> ${text}`;
    said.classList.toggle("right", right);
  };
  solution.before(form);

  function grade(written) {
    if (order) return written.toUpperCase().replace(/[^A-Z]/g, "") === order ? [true, why] : [false, "Another order."];
    const values = readings(written);
    if (!values.length) return [false, "Not a number: write it like 0.69, 1,234.5 or 1.2e6."];
    const close = (number) => values.some((value) => Math.abs(value - number) <= tolerance * Math.abs(number) + 1e-12);
    if (close(Number(answer))) return [true, why];
    for (const item of solution.querySelectorAll("li")) {
      const [, slip, text] = item.innerHTML.match(/Not ([-\d.,e+]+): ([^]*)/) ?? [];
      if (slip && close(Number(slip.replaceAll(",", "")))) return [false, text];
    }
    return [false, "Work it out once more, then open the solution."];
  }
}

function readings(written) {
  const text = written.trim().replace(/\s*[a-z%]+$/i, "");
  const texts = text.includes(",") ? [] : [text];
  if (/^-?[1-9]\d{0,2}(,\d{3})+(\.\d*)?$/.test(text)) texts.push(text.replaceAll(",", ""));
  if (/^-?\d+,\d+$/.test(text)) texts.push(text.replace(",", "."));
  return texts.filter((one) => one !== "" && Number.isFinite(Number(one))).map(Number);
}

// The folds of a widget with data-slider become pages of which a slider shows one. Without JavaScript they still open.
for (const box of document.querySelectorAll("[data-slider]")) {
  const pages = [...box.querySelectorAll(":scope > details")];
  const names = pages.map((page) => page.querySelector("summary").textContent);
  const label = Object.assign(document.createElement("label"), { className: "slider" });
  label.innerHTML = `<input type="range" min="0" max="${pages.length - 1}" step="1"> <output></output>`;
  const [input, output] = label.children;
  input.setAttribute("aria-label", box.dataset.slider);
  input.value = pages.findIndex((page) => page.open);
  const turn = () => {
    pages.forEach((page, i) => Object.assign(page, { hidden: i !== Number(input.value), open: true }));
    output.textContent = names[input.value];
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.oninput = turn;
  turn();
  for (const page of pages) page.querySelector("summary").hidden = true;
  box.prepend(label);
}

// The search quotes the pages it finds, which a browser does not read from a folder, only from a server.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// Code folds: each cell gets a line that closes it, and the page a button for all. The choice is kept for the next page.
const cells = [...document.querySelectorAll(".cell_input")];
const remember = (folded) => { try { localStorage.setItem("code-folded", folded ? "yes" : ""); } catch { /* not allowed */ } };
const remembered = () => { try { return localStorage.getItem("code-folded") === "yes"; } catch { return false; } };
for (const cell of cells) {
  if (cell.closest("details")) continue;
  const lines = cell.textContent.trim().split("\n");
  const fold = Object.assign(document.createElement("details"), { className: "code", open: true });
  const line = Object.assign(document.createElement("span"), { className: "line", textContent: `, ${lines.length} ${lines.length > 1 ? "lines" : "line"}: ` });
  line.append(Object.assign(document.createElement("code"), { textContent: lines[0] }));
  const summary = document.createElement("summary");
  summary.append("Code", line);
  cell.before(fold);
  fold.append(summary, cell);
}
if (cells.length) {
  const folds = [...document.querySelectorAll("details.code, details.hide.above-input")];
  const button = Object.assign(document.createElement("button"), { className: "button", type: "button" });
  const label = () => {
    const open = folds.some((fold) => fold.open);
    button.textContent = open ? "Fold all code" : "Unfold all code";
    button.setAttribute("aria-expanded", open);
  };
  const set = (open) => folds.forEach((fold) => (fold.open = open));
  button.onclick = () => { const open = !folds.some((fold) => fold.open); set(open); remember(!open); };
  folds.forEach((fold) => fold.addEventListener("toggle", label));
  if (remembered()) set(false);
  label();
  document.querySelector(".buttons")?.append(button);
}
