// Elements from data. Text becomes text nodes, nothing is ever parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, attributes) and children (nodes or texts). */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Sets a text only where it differs: a page that stands still costs nothing. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function set(element, attribute, value) {
  if (element.getAttribute(attribute) !== value) element.setAttribute(attribute, value);
}

/** A bar of parts `[class, amount]` of `whole`; what it shows is also its name. */
export function bar(parts, whole, name) {
  const element = el("span", { class: "bar", role: "img" });
  fillBar(element, parts, whole, name);
  return element;
}

export function fillBar(element, parts, whole, name) {
  set(element, "aria-label", name);
  set(element, "title", name);
  while (element.children.length < parts.length) element.append(el("i"));
  parts.forEach(([kind, amount], part) => {
    const piece = element.children[part];
    set(piece, "class", kind);
    piece.style.width = `${whole > 0 ? Math.min(100, (100 * amount) / whole) : 0}%`;
    piece.hidden = amount <= 0;
  });
}
