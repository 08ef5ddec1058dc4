// Files a user gives → attachments `{id, name, type, kind, blob, url}` and their tiles.

import { element, icon, iconButton } from "./dom.js";

export const ACCEPT = "image/*,video/*,application/pdf,.heic,.heif,.avif";
// Browsers on some systems know no type for these.
const TYPES = { heic: "image/heic", heif: "image/heif", avif: "image/avif", pdf: "application/pdf", mkv: "video/x-matroska" };

/** An attachment, or null when it is nothing the model could look at. */
export function attachmentOf(file) {
  const name = file.name || "picture.png";
  const type = file.type || TYPES[name.split(".").pop().toLowerCase()] || "";
  const kind = kindOf(type);
  if (!kind) return null;
  return withUrl({ id: crypto.randomUUID?.() ?? randomId(), name, type, kind, blob: file });
}

export const kindOf = (type) =>
  type === "application/pdf" ? "pdf" : ["image", "video"].find((kind) => type.startsWith(`${kind}/`));

/** What came back from the store, with an address to show it by. */
export function withUrl(attachment) {
  return { ...attachment, kind: kindOf(attachment.type), url: URL.createObjectURL(attachment.blob) };
}

// crypto.randomUUID exists in secure contexts only, and a phone may reach the server by plain http.
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function dataUri(attachment) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    // The type by name where the browser told none; the server goes by it.
    reader.onload = () => resolve(reader.result.replace(/^data:[^;,]*/, `data:${attachment.type}`));
    reader.onerror = () => reject(new Error(`${attachment.name} can no longer be read; attach it again.`));
    reader.readAsDataURL(attachment.blob);
  });
}

/** A small picture of an attachment; with `onremove`, a button to take it away. */
export function tile(attachment, { onremove, onopen } = {}) {
  const { name, kind } = attachment;
  const face = faceOf(attachment);
  const open = onopen && kind !== "pdf"
    ? element("button", { type: "button", class: "open", "aria-label": `Enlarge ${name}`, onclick: onopen }, face)
    : face;
  const remove = onremove && iconButton("close", `Remove ${name}`, onremove, { class: "remove" });
  return element("li", { class: `tile ${kind}` }, open, remove);
}

function faceOf({ name, kind, url }) {
  if (kind === "pdf") return named("file", name);
  if (kind === "video") {
    const video = element("video", { src: url, muted: true, playsinline: true, preload: "metadata", "aria-label": name });
    return element("span", { class: "film" }, video, icon("play"));
  }
  const image = element("img", { src: url, alt: name });
  // HEIC, for one, the server can read but most browsers cannot show.
  image.addEventListener("error", () => image.replaceWith(named("image", name)));
  return image;
}

/** What has no picture to be shown by; a long name is cut there, and whole under the pointer. */
const named = (symbol, name) => element("span", { class: "document", title: name }, icon(symbol), element("span", {}, name));

/** Files in a drop or paste, in order. */
export function filesIn(transfer) {
  return [...(transfer?.files ?? [])];
}
