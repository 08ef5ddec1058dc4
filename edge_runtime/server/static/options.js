// What a chat asks of its answers besides its words: instructions, sampling, slices, thinking, a JSON schema.
//
// Options are `{system, temperature, top_p, top_k, seed, max_tokens, max_slices, thinking_budget, schema}`, each only if
// the user has chosen it; numbers as numbers, the schema as the text that was typed.

import { answerOf, byId } from "./dom.js";
import { number, t } from "./language.js";
import { recall, remember } from "./prefs.js";

const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens", "max_slices", "thinking_budget"];
const DEFAULTS = "chat-options"; // in the browser's storage

/** Options that new chats begin with. */
export function usualOptions() {
  try {
    return JSON.parse(recall(DEFAULTS) ?? "{}") ?? {};
  } catch {
    return {};
  }
}

/** Fields of a request for chat completions. */
export function fieldsOf(options) {
  const fields = Object.fromEntries(NUMBERS.filter((name) => options[name] !== undefined).map((name) => [name, options[name]]));
  if (options.schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(options.schema), strict: true } };
  return fields;
}

/** Why a text is no JSON schema; "" if it may be one. The server has the last word. */
export function troubleOf(text) {
  if (!text.trim()) return "";
  let schema;
  try {
    schema = JSON.parse(text);
  } catch (error) {
    return t("This is not JSON: {0}.", error.message);
  }
  if (typeof schema !== "object" || schema === null || Array.isArray(schema)) return t("A schema is an object, such as {0}.", '{"type": "object", "properties": {"total": {"type": "number"}}}');
  const kinds = ["object", "array", "string", "number", "integer", "boolean", "null"];
  const wrong = [schema.type ?? []].flat().find((kind) => !kinds.includes(kind));
  if (wrong !== undefined) return t("“{0}” is no type of JSON; expected one of {1}.", String(wrong), kinds.join(", "));
  return "";
}

/**
 * Let the user change the options of a chat; `context` is `{used, size}` in tokens, as far as known. Resolves with the
 * new options, or null if they stay.
 */
export async function editOptions(options, { used, size, thinks }) {
  const field = (name) => byId(`option-${name}`);
  field("system").value = options.system ?? "";
  field("system").placeholder = recall("system") ?? "";
  field("schema").value = options.schema ?? "";
  for (const name of NUMBERS) field(name).value = options[name] ?? "";
  field("thinking_budget").parentElement.hidden = !thinks;
  byId("usual").checked = false;
  byId("context").textContent = contextText(used, size);
  checkSchema();
  if ((await answerOf(byId("options"))) !== "save") return null;
  const chosen = {};
  for (const name of ["system", "schema"]) if (field(name).value.trim()) chosen[name] = field(name).value.trim();
  for (const name of NUMBERS) if (field(name).value !== "") chosen[name] = Number(field(name).value);
  if (byId("usual").checked) remember(DEFAULTS, Object.keys(chosen).length ? JSON.stringify(chosen) : "");
  return chosen;
}

function contextText(used, size) {
  if (!size) return used ? t("This chat fills {0} tokens.", number(used)) : t("How much fits is told once the model is loaded.");
  return t("The model reads {0} tokens at a time; this chat fills {1} of them ({2} %).", number(size), number(used), number((used / size) * 100));
}

function checkSchema() {
  const trouble = troubleOf(byId("option-schema").value);
  byId("option-schema").setCustomValidity(trouble);
  byId("option-schema").setAttribute("aria-invalid", Boolean(trouble));
  byId("schema-trouble").textContent = trouble;
}

export function setUpOptions() {
  byId("option-schema").addEventListener("input", checkSchema);
  byId("options-reset").addEventListener("click", () => {
    for (const name of [...NUMBERS, "system", "schema"]) byId(`option-${name}`).value = "";
    checkSchema();
  });
}
