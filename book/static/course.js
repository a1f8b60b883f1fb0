// A quiz's choices can be clicked, or chosen with Tab and Enter: each shows its own explanation, taken from the solution
// that is folded away below them. Without JavaScript the solution still opens.
document.querySelectorAll(".cell_output > details").forEach((solution) => {
  const letter = (item) => item.querySelector("strong")?.textContent;
  const whys = new Map([...solution.querySelectorAll("li")].map((item) => [letter(item), item]));
  const list = solution.previousElementSibling;
  if (list?.tagName !== "UL") return;
  for (const choice of list.children) {
    const why = whys.get(letter(choice));
    if (!why) continue;
    const said = Object.assign(document.createElement("div"), { className: "why", innerHTML: why.innerHTML, hidden: true });
    said.classList.toggle("right", /^\s*\w is right/.test(why.textContent));
    said.setAttribute("role", "status");
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

// The search quotes the pages it finds, which a browser does not read from a folder, only from a server.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
