// The list of chats beside the conversation.

import { byId, element, iconButton } from "./dom.js";

const DAY = 24 * 3600 * 1000;

/** Show chats under "Today", "Yesterday", …; `onopen(chat)` and `ondelete(chat)` report the user's choice. */
export function showChats(chats, current, { onopen, ondelete }) {
  const list = byId("chats");
  list.replaceChildren();
  let heading = null;
  for (const chat of chats) {
    const group = groupOf(chat.updated);
    if (group !== heading) list.append(element("li", { class: "group" }, element("h3", {}, group)));
    heading = group;
    const open = element("button", { type: "button", class: "open", title: chat.title, onclick: () => onopen(chat) }, chat.title);
    if (chat === current) open.setAttribute("aria-current", "page");
    list.append(element("li", { class: "chat" }, open, iconButton("trash", `Delete the chat “${chat.title}”`, () => ondelete(chat))));
  }
  byId("no-chats").hidden = chats.length > 0;
}

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 7 * DAY ? "This week" : "Earlier";
}

export function titleOf({ text, files }) {
  const line = text.replace(/<[^>]*>/g, "").replace(/\s+/g, " ").trim();
  const title = line || files[0]?.name || "New chat";
  return title.length > 60 ? `${title.slice(0, 59)}…` : title;
}
