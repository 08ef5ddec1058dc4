// Files a user gives → attachments `{id, name, type, kind, blob, url}` and their tiles.

import { element, icon, iconButton } from "./dom.js";
import { t } from "./language.js";

export const ACCEPT = "image/*,video/*,application/pdf,.heic,.heif,.avif";
// Some systems' browsers report no type for these.
const TYPES = { heic: "image/heic", heif: "image/heif", avif: "image/avif", pdf: "application/pdf", mkv: "video/x-matroska" };

/** An attachment, or null if the model cannot look at such a file. */
export function attachmentOf(file) {
  const name = file.name || "picture.png";
  const type = file.type || TYPES[name.split(".").pop().toLowerCase()] || "";
  const kind = kindOf(type);
  if (!kind) return null;
  return withUrl({ id: crypto.randomUUID?.() ?? randomId(), name, type, kind, blob: file });
}

export const kindOf = (type) =>
  type === "application/pdf" ? "pdf" : ["image", "video"].find((kind) => type.startsWith(`${kind}/`));

/** An attachment from the store, with a URL to show it. */
export function withUrl(attachment) {
  return { ...attachment, kind: kindOf(attachment.type), url: URL.createObjectURL(attachment.blob) };
}

// crypto.randomUUID exists only in secure contexts, and a phone may use plain http.
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function dataUri(attachment) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    // The type from the name if the browser gave none; the server relies on it.
    reader.onload = () => resolve(reader.result.replace(/^data:[^;,]*/, `data:${attachment.type}`));
    reader.onerror = () => reject(new Error(t("{0} can no longer be read; attach it again.", attachment.name)));
    reader.readAsDataURL(attachment.blob);
  });
}

/** A thumbnail of an attachment; with `onremove`, a button to remove it. */
export function tile(attachment, { onremove, onopen } = {}) {
  const { name, kind } = attachment;
  const face = faceOf(attachment);
  const label = kind === "pdf" ? t("Choose pages of {0}", name) : t("Enlarge {0}", name);
  const open = onopen ? element("button", { type: "button", class: "open", "aria-label": label, title: label, onclick: onopen }, face) : face;
  const remove = onremove && iconButton("close", t("Remove {0}", name), onremove, { class: "remove" });
  return element("li", { class: `tile ${kind}` }, open, remove);
}

function faceOf({ name, kind, url, pages, each }) {
  if (kind === "pdf") return named("file", name, [pages && t("pages {0}", pages), each && t("each page")].filter(Boolean).join(", "));
  if (kind === "video") {
    const video = element("video", { src: url, muted: true, playsinline: true, preload: "metadata", "aria-label": name });
    return element("span", { class: "film" }, video, icon("play"));
  }
  const image = element("img", { src: url, alt: name });
  // The server can read HEIC, for example, but most browsers cannot show it.
  image.addEventListener("error", () => image.replaceWith(named("image", name)));
  return image;
}

/** A tile for files without a picture; a long name is shortened, and shown in full under the pointer. */
const named = (symbol, name, more = "") =>
  element("span", { class: "document", title: name }, icon(symbol), element("span", {}, name, more && element("small", {}, more)));

/** Files in a drop or paste, in order. */
export function filesIn(transfer) {
  return [...(transfer?.files ?? [])];
}
