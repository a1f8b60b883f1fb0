// Every piece of text in `root` whose contrast with what is behind it is below `least`: [contrast, text, colours].
// Contrast as in WCAG 2.2: (L1 + 0.05) / (L2 + 0.05), L the relative luminance of sRGB. Controls that are switched off
// and text over a picture are left out, as in WCAG's criterion 1.4.3; so is JupyterLab's own number of an output.
(root, least) => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return colour.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.push(parse(getComputedStyle(at).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const opacity = (element) => {
    let product = 1;
    for (let at = element; at; at = at.parentElement) product *= Number(getComputedStyle(at).opacity);
    return product;
  };
  const poor = [];
  let looked = 0;
  const look = (element, text, pseudo) => {
    if (!text.trim() || element.closest(":disabled, svg, mjx-assistive-mml, .jp-mod-hidden, .jp-OutputPrompt")) return;
    if (!element.checkVisibility({ checkVisibilityCSS: true, checkOpacity: true })) return;
    looked += 1;
    const background = behind(element);
    const [r, g, b, a] = parse(getComputedStyle(element, pseudo).color);
    const front = over([r, g, b, a * opacity(element)], background);
    const [high, low] = [luminance(front), luminance(background)].sort((x, y) => y - x);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least) poor.push([Math.round(contrast * 100) / 100, text.trim().slice(0, 60), `${element.tagName} ${front.map(Math.round)} on ${background.map(Math.round)}`]);
  };
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (element && !["STYLE", "SCRIPT", "OPTION"].includes(element.tagName)) look(element, node.textContent);
  }
  for (const element of root.querySelectorAll("input, select, textarea")) {
    look(element, element.value ?? "");
    if (!element.value && element.placeholder) look(element, element.placeholder, "::placeholder");
  }
  return { looked, poor };
}
