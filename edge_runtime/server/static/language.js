// The page's own words in the browser's language. English stands where it is used and is the key of the table; what has
// no entry stays English, as do the server's sentences.

const KNOWN = ["en", "de", "zh"];

/** Of the languages that the user reads, the first one the page has. */
export const language = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => KNOWN.includes(tag)) ?? "en";

const column = KNOWN.indexOf(language) - 1;
// English needs no table. Without one (a cut connection) the page is English.
const { TEXTS } = column < 0 ? { TEXTS: {} } : await import("./texts.js").catch(() => ({ TEXTS: {} }));

/** A text in the user's language; `{0}`, `{1}`, … are replaced by the values. */
export function t(text, ...values) {
  return (TEXTS[text]?.[column] ?? text).replace(/\{(\d)\}/g, (_, number) => values[number]);
}

export const number = (value, digits = 0) => value.toLocaleString(language, { maximumFractionDigits: digits, minimumFractionDigits: digits });

const ATTRIBUTES = ["aria-label", "title", "placeholder", "alt", "data-question"];

/** Translate what stands in the page's HTML. */
export function translate(root) {
  if (column < 0) return;
  document.documentElement.lang = language;
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim();
    if (text) walker.currentNode.data = walker.currentNode.data.replace(text, () => t(text));
  }
  for (const node of root.querySelectorAll(ATTRIBUTES.map((name) => `[${name}]`).join())) {
    for (const name of ATTRIBUTES) if (node.hasAttribute(name)) node.setAttribute(name, t(node.getAttribute(name)));
  }
}
