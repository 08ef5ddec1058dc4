// TeX → MathML; loaded with Temml when an answer holds the first formula.
//
// Temml builds elements of its own from the model's text. They are not shown: a copy is, which holds known elements of
// MathML with known attributes and nothing else, so no formula can become a link, a picture or a script.

import { element } from "./dom.js";
import temml from "./vendor/temml/temml.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const words = (text) => new Set(text.split(" "));
const ELEMENTS = words(
  "math maction menclose merror mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover none",
);
const ATTRIBUTES = words(
  "accent accentunder columnalign columnlines columnspacing columnspan depth dir display displaystyle fence form height largeop linethickness lspace mathsize mathvariant maxsize minsize movablelimits notation rowalign rowlines rowspacing rowspan rspace scriptlevel separator stretchy symmetric voffset width",
);
// Those that vendor/temml/temml.css describes, so that a formula cannot look like a part of the page.
const CLASS = /^(?:tml-|chr-|wbk-|ff-|longdiv-|phasor-)|^(?:mathcal|mathscr|menclose|upstrike|downstrike|sout|circle-pad|textcircle|actuarial|special-fraction)$/;
const STYLES = ["border", "borderBottom", "borderLeft", "borderRight", "borderTop", "display", "fontFamily", "fontStyle", "fontWeight", "justifyContent", "marginLeft", "mathDepth", "padding", "paddingBottom", "paddingLeft", "paddingRight", "paddingTop", "textAlign"];
const MAX_EXPANSIONS = 200; // of macros: TeX can be made to run for ever

const MAX_KEPT = 300;
const kept = new Map(); // while an answer grows, its last paragraph is shown again and again

let styled = false;

/** Replace an element's content by a formula; throws if it is not TeX that is understood. */
export function typeset(node, tex, isDisplay) {
  const key = `${isDisplay}${tex}`;
  if (!kept.has(key)) {
    if (kept.size >= MAX_KEPT) kept.clear();
    kept.set(key, built(tex, isDisplay));
  }
  node.replaceChildren(kept.get(key).cloneNode(true));
}

function built(tex, isDisplay) {
  if (!styled) document.head.append(element("link", { rel: "stylesheet", href: new URL("./vendor/temml/temml.css", import.meta.url).href }));
  styled = true;
  const holder = document.createElement("span");
  const options = { displayMode: isDisplay, throwOnError: true, trust: false, maxExpand: MAX_EXPANSIONS, maxSize: [20, 20], macros: {} };
  temml.render(tex, holder, options);
  const copy = copied(holder);
  if (!copy.firstChild) throw new Error("Nothing to show.");
  return copy;
}

function copied(node) {
  if (node.nodeType === Node.TEXT_NODE) return document.createTextNode(node.data);
  const isKnown = node.namespaceURI === MATHML && ELEMENTS.has(node.localName);
  const copy = isKnown ? document.createElementNS(MATHML, node.localName) : document.createDocumentFragment();
  if (isKnown) {
    for (const { name, value } of node.attributes) if (ATTRIBUTES.has(name)) copy.setAttribute(name, value);
    const classes = [...node.classList].filter((name) => CLASS.test(name));
    if (classes.length) copy.setAttribute("class", classes.join(" "));
    for (const name of STYLES) if (node.style[name]) copy.style[name] = node.style[name];
  }
  copy.append(...[...node.childNodes].map(copied));
  return copy;
}
