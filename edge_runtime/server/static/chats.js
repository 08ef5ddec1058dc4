// The list of chats beside the conversation: searched, opened, renamed, exported and deleted.

import { answerOf, byId, element, iconButton } from "./dom.js";
import { asJson, asMarkdown, download } from "./export.js";
import { t } from "./language.js";

const DAY = 24 * 3600 * 1000;
const MAX_TITLE = 60;

/**
 * Show chats under "Today", "Yesterday", …, only those that hold what is searched for; `onopen(chat)`, `onmore(chat)`
 * and `ondelete(chat)` report the user's choice.
 */
export function showChats(chats, current, { onopen, onmore, ondelete }) {
  const list = byId("chats");
  const wanted = byId("search").value.trim().toLowerCase();
  const found = wanted ? chats.filter((chat) => holds(chat, wanted)) : chats;
  list.replaceChildren();
  let heading = null;
  for (const chat of found) {
    const group = groupOf(chat.updated);
    if (group !== heading) list.append(element("li", { class: "group" }, element("h3", {}, t(group))));
    heading = group;
    const open = element("button", { type: "button", class: "open", dir: "auto", title: chat.title, onclick: () => onopen(chat) }, chat.title);
    if (chat === current) open.setAttribute("aria-current", "page");
    const more = iconButton("pencil", t("Rename or export the chat “{0}”", chat.title), () => onmore(chat));
    list.append(element("li", { class: "chat" }, open, more, iconButton("trash", t("Delete the chat “{0}”", chat.title), () => ondelete(chat))));
  }
  byId("search").parentElement.hidden = !chats.length;
  byId("no-chats").hidden = found.length > 0;
  byId("no-chats").textContent = chats.length ? t("No chat holds that.") : t("Chats are kept in this browser only.");
}

function holds(chat, wanted) {
  return [chat.title, ...chat.messages.map(({ text }) => text)].some((text) => text.toLowerCase().includes(wanted));
}

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 7 * DAY ? "This week" : "Earlier";
}

export const shortened = (title) => (title.length > MAX_TITLE ? `${title.slice(0, MAX_TITLE - 1)}…` : title);

export function titleOf({ text, files }) {
  const line = text.replace(/<[^>]*>/g, "").replace(/\s+/g, " ").trim();
  return shortened(line || files[0]?.name || t("New chat"));
}

/** Rename or export a chat in a dialog; `files` are the chat's, by id. Resolves with whether it was renamed. */
export async function more(chat, files) {
  const dialog = byId("more");
  byId("title").value = chat.title;
  byId("as-json").onclick = async () => download(await asJson(chat, files), chat.title, "json", "application/json");
  byId("as-markdown").onclick = () => download(asMarkdown(chat, files), chat.title, "md", "text/markdown");
  const wanted = (await answerOf(dialog)) === "save" && shortened(byId("title").value.trim());
  if (!wanted || wanted === chat.title) return false;
  chat.title = wanted;
  return true;
}
