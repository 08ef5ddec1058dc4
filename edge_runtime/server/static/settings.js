// Dialogs: settings, the request for a key, confirmations, a picture at full size.

import { storyboard } from "./documents.js";
import { answerOf, byId, element } from "./dom.js";
import { keepsKey, recall, recallKey, remember, rememberKey } from "./prefs.js";

/** Fill and watch the settings; calls `onkey()` after the key has changed, `ondelete()` for "delete all chats". */
export function setUpSettings({ onkey, ondelete }) {
  const dialog = byId("settings");
  byId("open-settings").addEventListener("click", () => {
    byId("system").value = recall("system") ?? "";
    byId("key").value = recallKey();
    byId("keep-key").checked = keepsKey();
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    remember("system", byId("system").value.trim());
    const key = byId("key").value.trim();
    const hasChanged = key !== recallKey();
    rememberKey(key, byId("keep-key").checked);
    if (hasChanged) onkey();
  });
  byId("delete-all").addEventListener("click", () => {
    dialog.close("");
    ondelete();
  });
  for (const input of document.querySelectorAll("input[name=theme]")) {
    input.checked = input.value === (recall("theme") ?? "system");
    input.addEventListener("change", () => {
      remember("theme", input.value === "system" ? "" : input.value);
      dispatchEvent(new Event("theme"));
    });
  }
  // Not buttons that submit: Enter in a field presses the first of those, which must be the one that saves.
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close(""));
  for (const node of document.querySelectorAll("dialog")) {
    // A click outside a dialog closes it, as Escape does.
    node.addEventListener("click", (event) => event.target === node && node.close(""));
  }
}

/** Ask for the key that the server requires; resolves with whether one was given. */
export async function askForKey(reason) {
  byId("asked-key").value = "";
  byId("key-reason").textContent = reason;
  if ((await answerOf(byId("key-dialog"))) !== "save") return false;
  rememberKey(byId("asked-key").value.trim(), byId("asked-keep").checked);
  return true;
}

export async function confirmed(title, text) {
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  return (await answerOf(byId("confirm"))) === "yes";
}

/** Show a picture or video as large as the window. */
export function enlarge(file) {
  const { kind, url, name } = file;
  const shown = kind === "video"
    ? [element("video", { src: url, controls: true, autoplay: true }), storyboard(file)]
    : [element("img", { src: url, alt: name })];
  byId("large").replaceChildren(...shown);
  const dialog = byId("viewer");
  dialog.setAttribute("aria-label", name);
  dialog.addEventListener("close", () => byId("large").replaceChildren(), { once: true });
  dialog.showModal();
}
