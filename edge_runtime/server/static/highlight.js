// Code → coloured spans; loaded when the first block of code with a known language is complete.
//
// One expression per language, whose alternatives cannot overlap, so hostile code costs time in proportion to its
// length; grammars of highlighting libraries backtrack (a tag with forty attributes takes a browser minutes). Colours
// are a help for the eye, no proof that the code is right.

import { element } from "./dom.js";

const LIMIT = 60_000; // characters; longer code stays plain

const words = (text) => new Set(text.split(" "));
const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASH = String.raw`(?<![^\s])#[^\n]*`;
const DOUBLE = String.raw`"(?:[^"\\\n]|\\[\s\S])*"?`;
const SINGLE = String.raw`'(?:[^'\\\n]|\\[\s\S])*'?`;
const TICKS = "`(?:[^`\\\\]|\\\\[\\s\\S])*`?";
const THREE = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)`;

const C = "auto bool break case char class const constexpr continue default delete do double else enum extern false final float for if include inline int int32_t int64_t long namespace new null nullptr operator override private protected public return short signed sizeof size_t static std struct switch template this throw true try catch typedef typename uint8_t uint32_t uint64_t union unsigned using virtual void volatile while";
const JS = "abstract any as async await boolean break case catch class const continue debugger declare default delete do else enum export extends false finally for from function if implements import in infer instanceof interface keyof let namespace never new null number of private protected public readonly return satisfies set get static string super switch this throw true try type typeof undefined unknown var void while with yield";
const JAVA = "abstract assert boolean break byte case catch char class companion const continue data default defer do double else enum extends false final finally float for fun func go if implements import in instanceof int interface internal let long map mut namespace new nil null object open override package private protected public range readonly record return sealed select short static string struct super switch synchronized this throw throws true try type using val var void when while chan fallthrough guard";
const RUST = "as async await bool break char const continue crate dyn else enum extern f32 f64 false fn for i8 i16 i32 i64 if impl in let loop match mod move mut pub ref return self Self static str struct super trait true type u8 u16 u32 u64 unsafe use usize isize where while String Vec Option Result Some None Ok Err";
const PYTHON = "and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield";
const SHELL = "case do done elif else esac exit export fi for function if in local read return set source then unset until while cd echo sudo";
const SQL = "add all alter and as asc between by case check column commit constraint create cross default delete desc distinct drop else end exists false foreign from full group having if in index inner insert integer into is join key left like limit not null offset on or order outer primary references replace right rollback select set table text then true union unique update using values varchar view when where with";
const RUBY = "alias and begin break case class def defined do else elsif end ensure false for function if in local module next nil not or redo repeat require rescue retry return self super then true undef unless until when while yield puts";
const R = "break else FALSE for function if in Inf NA NaN next NULL repeat return TRUE while library";

const LANGUAGES = {
  c: { comment: SLASHES, string: `${DOUBLE}|${SINGLE}`, keywords: words(C) },
  css: { comment: String.raw`\/\*[\s\S]*?(?:\*\/|$)`, string: `${DOUBLE}|${SINGLE}`, keywords: words("important auto none inherit"), keys: true, dashes: true },
  diff: { inserted: String.raw`(?<![^\n])\+[^\n]*`, deleted: String.raw`(?<![^\n])-[^\n]*`, comment: String.raw`(?<![^\n])@@[^\n]*` },
  ini: { comment: String.raw`(?<![^\s])[#;][^\n]*`, string: `${THREE}|${DOUBLE}|${SINGLE}`, keywords: words("true false on off yes no"), keys: true, dashes: true },
  java: { comment: SLASHES, string: `${DOUBLE}|${SINGLE}|${TICKS}`, keywords: words(JAVA) },
  js: { comment: SLASHES, string: `${DOUBLE}|${SINGLE}|${TICKS}`, keywords: words(JS) },
  json: { comment: SLASHES, string: DOUBLE, keywords: words("true false null"), keys: true },
  markup: { comment: String.raw`<!--[\s\S]*?(?:-->|$)`, string: String.raw`(?<==)(?:"[^"]*"?|'[^']*'?)`, keyword: String.raw`<[/!?]?[A-Za-z][\w:.-]*|[/?]?>` },
  py: { comment: String.raw`#[^\n]*`, string: `${THREE}|${DOUBLE}|${SINGLE}`, keywords: words(PYTHON) },
  r: { comment: String.raw`#[^\n]*`, string: `${DOUBLE}|${SINGLE}`, keywords: words(R) },
  ruby: { comment: String.raw`#[^\n]*|--[^\n]*`, string: `${DOUBLE}|${SINGLE}`, keywords: words(RUBY) },
  rust: { comment: SLASHES, string: DOUBLE, keywords: words(RUST) },
  sh: { comment: HASH, string: `${DOUBLE}|'[^']*'?`, keywords: words(SHELL), dashes: true },
  sql: { comment: String.raw`--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`, string: `${DOUBLE}|'[^']*'?`, keywords: words(SQL), anyCase: true },
  tex: { comment: String.raw`(?<!\\)%[^\n]*`, keyword: String.raw`\\(?:[A-Za-z]+|.)` },
  yaml: { comment: HASH, string: `${DOUBLE}|'[^'\n]*'?`, keywords: words("true false null yes no"), keys: true, dashes: true },
};

const ALIASES = {
  bash: "sh", console: "sh", shell: "sh", zsh: "sh", powershell: "sh", dockerfile: "sh", docker: "sh", make: "sh", makefile: "sh",
  cpp: "c", "c++": "c", cc: "c", h: "c", hpp: "c", objc: "c", cuda: "c",
  csharp: "java", "c#": "java", cs: "java", go: "java", golang: "java", kotlin: "java", kt: "java", scala: "java", swift: "java", dart: "java", php: "java",
  html: "markup", xml: "markup", svg: "markup", vue: "markup", xhtml: "markup", javascript: "js", jsx: "js", mjs: "js", node: "js", ts: "js", tsx: "js", typescript: "js",
  json5: "json", jsonc: "json", jsonl: "json", latex: "tex", less: "css", scss: "css", lua: "ruby", rb: "ruby", patch: "diff",
  python: "py", python3: "py", pycon: "py", rs: "rust", toml: "ini", conf: "ini", properties: "ini", env: "ini", yml: "yaml",
  sqlite: "sql", mysql: "sql", postgresql: "sql", psql: "sql",
};

const languageOf = (name) => LANGUAGES[ALIASES[name] ?? name];

function expressionOf(language) {
  const word = language.dashes ? String.raw`[\p{L}_$@.-][\p{L}\p{N}_$.-]*` : String.raw`[\p{L}_$@][\p{L}\p{N}_$]*`;
  const kinds = ["comment", "inserted", "deleted", "string", "keyword"].filter((kind) => language[kind]);
  const parts = kinds.map((kind) => `(?<${kind}>${language[kind]})`);
  return new RegExp([...parts, String.raw`(?<number>(?<![\p{L}\p{N}_])\d[\p{L}\p{N}_.]*)`, `(?<word>${word})`].join("|"), "gu");
}

/** Colour an element's code, if the language is known; the text stays the same. */
export function highlight(node, code, name) {
  const language = Object.hasOwn(LANGUAGES, ALIASES[name] ?? name) ? languageOf(name) : null;
  if (!language || code.length > LIMIT) return;
  language.expression ??= expressionOf(language);
  const nodes = [];
  let end = 0;
  for (const match of code.matchAll(language.expression)) {
    const kind = kindOf(match, language, code);
    if (!kind) continue;
    if (match.index > end) nodes.push(code.slice(end, match.index));
    nodes.push(element("span", { class: `code-${kind}` }, match[0]));
    end = match.index + match[0].length;
  }
  node.replaceChildren(...nodes, code.slice(end));
}

function kindOf({ 0: text, index, groups }, language, code) {
  if (groups.word === undefined) {
    const kind = Object.keys(groups).find((name) => groups[name] !== undefined);
    return kind === "string" && language.keys && isKey(code, index + text.length) ? "name" : kind;
  }
  if (language.keywords?.has(language.anyCase ? text.toLowerCase() : text) || text.startsWith("@")) return "keyword";
  const next = index + text.length;
  return code[next] === "(" || (language.keys && isKey(code, next)) ? "name" : null;
}

/** Whether a colon or an equals sign follows soon. */
const isKey = (code, at) => /^[ \t]{0,20}[:=]/.test(code.slice(at, at + 21));
