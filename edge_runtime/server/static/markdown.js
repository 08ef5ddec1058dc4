// Markdown as models write it → DOM nodes.
//
// A model's text only ever becomes text nodes, and an address only the target of a link with a harmless scheme.
// Nothing is parsed as HTML and nothing is loaded: a picture in Markdown becomes a link, since fetching it would reveal
// to somebody else what was asked. Grounding tags become numbers that point into the picture. Formulas and the colours of
// code come from modules that are loaded when the first of them is met; until then, their source is shown.

import { element, icon } from "./dom.js";
import { colourOf, findPlaces, pointsOf } from "./grounding.js";
import { t } from "./language.js";

const MAX_DEPTH = 8; // of nested quotes, lists and emphasis; beyond it, marks are plain text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)(.*)$/;
const DELIMITERS = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const FORMULA = /^ {0,3}(\$\$|\\\[)/;
const AUTO = { dir: "auto" }; // every block by its own first letter: answers mix scripts
const MAX_FORMULA = 40; // lines
const SAFE_ADDRESS = /^(?:https?:\/\/|mailto:)/i;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" };

// Lengths are bounded so that hostile text costs time in proportion to its length, not to its square.
const INLINE = new RegExp(
  [
    /\\\((?<tex>[^\n]{1,1000}?)\\\)/,
    /\\\[(?<displayed>[\s\S]{1,2000}?)\\\]/,
    /\$\$(?<dollars>[^$]{1,2000})\$\$/,
    // "$5 and $6" is no formula: no space inside the marks, and neither letter nor digit after them.
    /(?<![\p{L}\p{N}$])\$(?<dollar>[^\s$](?:[^$\n]{0,1000}[^\s$\\])?)\$(?![\p{L}\p{N}$])/,
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!~|<>&$])/,
    /(?<ticks>`+)(?<code>[^`]|[^`][\s\S]{0,2000}?[^`])\k<ticks>(?!`)/,
    /!?\[(?<text>(?:[^[\]]|\[[^[\]]{0,200}\]){0,1000})\]\((?<target>[^\s()]{0,2000}(?:\([^\s()]{0,200}\)[^\s()]{0,200})?)(?:\s+"[^"]{0,200}")?\)/,
    /<?(?<address>https?:\/\/[^\s<>"'`]{0,2000}[^\s<>"'`.,;:!?)\]*_~])>?/,
    /(?<strongMark>\*\*|(?<![\p{L}\p{N}])__)(?=\S)(?<strong>[\s\S]{0,2000}?\S)\k<strongMark>/,
    /~~(?=\S)(?<struck>[\s\S]{0,2000}?\S)~~/,
    /(?<emMark>\*|(?<![\p{L}\p{N}])_)(?=[^\s*_])(?<em>[^*_]{0,2000}?[^\s*_])\k<emMark>(?![\p{L}\p{N}])/,
    /<ref>(?<ref>[\s\S]{0,500}?)<\/ref>/,
    /<(?<kind>box|quad|point)>(?<numbers>[^<]{0,200})(?:<\/?\k<kind>>)?/,
    /&(?<entity>amp|lt|gt|quot|#39|nbsp);/,
    /(?<newline>\n)/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "gu",
);

const sources = new WeakMap();

/**
 * Show a text in a container. Called again with a longer text, it leaves unchanged blocks alone, so a selection
 * survives and a long answer costs no more at its end than at its start.
 */
export function renderMarkdown(container, text) {
  let place = 0;
  let child = container.firstElementChild;
  for (const block of blocksOf(text.split("\n"), 0)) {
    const key = `${place}:${block.source}`;
    if (child && sources.get(child) === key) {
      child = child.nextElementSibling;
    } else {
      const node = block.build({ place });
      sources.set(node, key);
      if (child) {
        const next = child.nextElementSibling;
        child.replaceWith(node);
        child = next;
      } else {
        container.append(node);
      }
    }
    place += findPlaces(block.source).length;
  }
  while (child) {
    const next = child.nextElementSibling;
    child.remove();
    child = next;
  }
}

/** Blocks of some lines: their source, and a function that creates the element. `context.place` counts places. */
function* blocksOf(lines, depth) {
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const begin = at;
    const read = depth < MAX_DEPTH ? READERS.find(({ test }) => test(lines, begin)) : null;
    const [end, build] = (read?.take ?? takeParagraph)(lines, begin, depth);
    at = end;
    yield { source: lines.slice(begin, end).join("\n"), build };
  }
}

const READERS = [
  { test: (lines, at) => FENCE.test(lines[at]), take: takeFence },
  { test: (lines, at) => HEADING.test(lines[at]), take: takeHeading },
  { test: (lines, at) => RULE.test(lines[at]), take: (lines, at) => [at + 1, () => element("hr")] },
  { test: (lines, at) => QUOTE.test(lines[at]), take: takeQuote },
  { test: (lines, at) => ITEM.test(lines[at]), take: takeList },
  { test: startsTable, take: takeTable },
  { test: (lines, at) => endOfFormula(lines, at) > 0, take: takeFormula },
];

function startsTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1]);
}

function takeParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !(depth < MAX_DEPTH && READERS.some(({ test }) => test(lines, end)))) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [end, (context) => inline(element("p", AUTO), text, context)];
}

function takeFence(lines, at) {
  const [, mark, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(mark) && /^[`~]+$/.test(lines[end].trim()))) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => codeBlock(code, language, end < lines.length)];
}

function codeBlock(code, language, isComplete) {
  const copy = element("button", { type: "button", class: "quiet", onclick: () => navigator.clipboard?.writeText(code) }, icon("copy"), t("Copy"));
  const shown = element("code", {}, code);
  if (language && isComplete) import("./highlight.js").then(({ highlight }) => highlight(shown, code, language.toLowerCase()), () => {});
  return element(
    "div",
    { class: "code" },
    element("div", { class: "code-bar" }, element("span", {}, language || t("text")), Boolean(navigator.clipboard) && copy),
    // Focusable, so that the keyboard can scroll it; code reads from left to right in every language.
    element("pre", { tabindex: "0", dir: "ltr", role: "region", "aria-label": t("Code") }, shown),
  );
}

/** Line after a formula that begins in this line and fills its lines; 0 if there is none. */
function endOfFormula(lines, at) {
  const mark = FORMULA.exec(lines[at])?.[1];
  if (!mark) return 0;
  const close = mark === "$$" ? "$$" : "\\]";
  for (let end = at; end < Math.min(lines.length, at + MAX_FORMULA) && lines[end].trim(); end += 1) {
    const rest = (end === at ? lines[end].trim().slice(mark.length) : lines[end]).trimEnd();
    if (rest.includes(close)) return rest.endsWith(close) && rest.indexOf(close) === rest.length - close.length ? end + 1 : 0;
  }
  return 0;
}

function takeFormula(lines, at) {
  const end = endOfFormula(lines, at);
  const source = lines.slice(at, end).join("\n").trim();
  return [end, () => element("div", {}, formula(source.slice(2, -2), source, true))];
}

/** A formula; its source stays if it is not understood, or the module cannot be loaded. */
function formula(tex, source, isDisplay) {
  const node = element("span", { class: isDisplay ? "formula displayed" : "formula" }, element("code", {}, source));
  if (isDisplay) for (const [name, value] of Object.entries({ tabindex: "0", role: "group", "aria-label": t("Formula") })) node.setAttribute(name, value);
  import("./math.js").then(({ typeset }) => typeset(node, tex, isDisplay)).catch(() => {});
  return node;
}

function takeHeading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  // The page's own headings are h1 and h2.
  return [at + 1, (context) => inline(element(`h${Math.min(marks.length + 2, 6)}`, AUTO), text, context)];
}

function takeQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end, (context) => nested(element("blockquote", AUTO), inner, depth + 1, context)];
}

function takeList(lines, at, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const base = ITEM.exec(lines[at])[1].length;
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const indent = lines[end].length - lines[end].trimStart().length;
    if (item && indent < base + 2 && /\d/.test(item[2]) === ordered && !RULE.test(lines[end])) {
      items.push({ first: item[2], width: item[0].length - item[3].length, lines: [item[3]] });
    } else if (!lines[end].trim()) {
      const next = lines[end + 1] ?? "";
      const continues = ITEM.test(next) || (next.trim() && next.startsWith(" ".repeat(base + 2)));
      if (!continues) break;
      items.at(-1).lines.push("");
    } else if (indent >= base + 2) {
      items.at(-1).lines.push(lines[end].slice(Math.min(indent, items.at(-1).width)));
    } else {
      break;
    }
    end += 1;
  }
  const start = ordered ? parseInt(items[0].first, 10) : 1;
  return [end, (context) => listOf(ordered, start, items, depth, context)];
}

function listOf(ordered, start, items, depth, context) {
  const list = element(ordered ? "ol" : "ul", { ...AUTO, ...(start === 1 ? {} : { start }) });
  for (const item of items) list.append(nested(element("li", AUTO), item.lines, depth + 1, context));
  return list;
}

function takeTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const alignments = cellsOf(lines[at + 1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "middle" : "end") : "start"));
  const row = (name, line, context) =>
    element("tr", {}, ...cellsOf(line).slice(0, alignments.length).map((cell, column) => inline(element(name, { ...AUTO, class: alignments[column] }), cell, context)));
  const build = (context) =>
    element(
      "div",
      { class: "table", tabindex: "0", role: "group", "aria-label": t("Table") },
      element(
        "table",
        {},
        element("thead", {}, row("th", lines[at], context)),
        element("tbody", {}, ...lines.slice(at + 2, end).map((line) => row("td", line, context))),
      ),
    );
  return [end, build];
}

function cellsOf(line) {
  return line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
}

/** Add the blocks of some lines to an element; a single paragraph goes in without its `p`. */
function nested(parent, lines, depth, context) {
  const nodes = [];
  for (const { build } of blocksOf(lines, depth)) nodes.push(build(context));
  const [first] = nodes;
  if (first?.tagName === "P" && nodes.every((node, i) => i === 0 || /^[UO]L$/.test(node.tagName))) {
    parent.append(...first.childNodes, ...nodes.slice(1));
  } else {
    parent.append(...nodes);
  }
  return parent;
}

function inline(parent, text, context, depth = 0) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) parent.append(text.slice(end, match.index));
    parent.append(inlineNode(match[0], match.groups, context, depth, match.index + match[0].length === text.length));
    end = match.index + match[0].length;
  }
  if (end < text.length) parent.append(text.slice(end));
  return parent;
}

function inlineNode(whole, found, context, depth, isLast) {
  const within = (name, content) => (depth < MAX_DEPTH ? inline(element(name), content, context, depth + 1) : whole);
  if (found.escaped) return found.escaped;
  const tex = found.tex ?? found.dollar;
  if (tex !== undefined) return formula(tex, whole, false);
  if (found.displayed ?? found.dollars) return formula(found.displayed ?? found.dollars, whole, true);
  if (found.code !== undefined) return element("code", {}, found.code.replace(/\n/g, " "));
  if (found.target !== undefined) return link(found.target, found.text || found.target);
  if (found.address) return link(found.address, found.address);
  if (found.strong) return within("strong", found.strong);
  if (found.struck) return within("del", found.struck);
  if (found.em) return within("em", found.em);
  if (found.ref !== undefined) return element("span", { class: "ref" }, found.ref.trim());
  if (found.kind) return placeNumber(whole, found, context, isLast);
  if (found.entity) return ENTITIES[found.entity];
  return element("br");
}

function link(target, text) {
  const address = target.replace(/^<|>$/g, "");
  if (!SAFE_ADDRESS.test(address)) return text; // javascript:, data:, and anything else a browser might run
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}

function placeNumber(whole, { kind, numbers }, context, isLast) {
  if (!pointsOf(kind, numbers)) return isLast ? "" : whole; // at the end it is still being written
  const number = context.place;
  context.place += 1;
  const node = element("button", { type: "button", class: "place-number", "data-place": number, "aria-label": t("Place {0} in the picture", number + 1) }, `${number + 1}`);
  node.style.setProperty("--place", colourOf(number));
  return node;
}
