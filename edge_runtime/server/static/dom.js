// Creates elements without HTML.

const SVG = "http://www.w3.org/2000/svg";

/** `element("a", {class: "x", onclick: f}, child, "text")`: attributes, handlers by `on…`, children that are nodes or text. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

/** A symbol from the page's icon sprite; always beside a label, so hidden from screen readers. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

export function iconButton(name, label, onclick, attributes = {}) {
  return element("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Show a dialog and wait until it is closed; resolves with the value of the button, or "". */
export async function answerOf(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue;
}
