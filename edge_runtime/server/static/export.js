// A chat → a file to keep: JSON with all versions and files, or Markdown of the branch that is shown.

import { dataUri } from "./attachments.js";
import { element } from "./dom.js";
import { t } from "./language.js";
import { branch } from "./tree.js";

/** Everything of a chat; `files` by id. */
export async function asJson(chat, files) {
  const kept = [...files.values()].filter(({ id }) => chat.messages.some((message) => message.files?.includes(id)));
  const data = kept.map(async (file) => ({ id: file.id, name: file.name, type: file.type, data: await dataUri(file) }));
  return JSON.stringify({ format: "edge-runtime chat", version: 1, ...chat, files: await Promise.all(data) }, null, 1);
}

export function asMarkdown(chat, files) {
  const parts = [`# ${chat.title}`];
  for (const { role, text, files: ids = [] } of branch(chat)) {
    const names = ids.map((id) => files.get(id)?.name).filter(Boolean);
    parts.push(`## ${role === "user" ? t("Question") : t("Answer")}`);
    if (names.length) parts.push(names.map((name) => `- ${name}`).join("\n"));
    if (text) parts.push(text);
  }
  return `${parts.join("\n\n")}\n`;
}

/** Let the browser save a text under a name made of a title. */
export function download(text, title, suffix, type) {
  const name = title.replace(/[^\p{L}\p{N} ._-]+/gu, " ").trim().slice(0, 60) || "chat";
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: `${name}.${suffix}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
