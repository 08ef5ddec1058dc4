// A sentence that comes up for some seconds, and the banner that stays while the server is away.

import { byId } from "./dom.js";
import { t } from "./language.js";

const SHOWN_MS = 6000;
let timer = 0;

export function notice(text) {
  const node = byId("notice");
  node.textContent = text;
  node.classList.add("shown");
  clearTimeout(timer);
  timer = setTimeout(() => node.classList.remove("shown"), SHOWN_MS);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notice(t("Copied."));
  } catch {
    notice(t("This browser does not let pages copy over plain http; select the text instead."));
  }
}
