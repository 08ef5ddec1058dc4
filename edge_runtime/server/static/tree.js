// The messages of a chat as a tree: a question that was edited and an answer that was asked again stay beside the new
// ones. `chat.messages` holds all messages, each with its `id` and its `parent`'s (null for a first question), oldest
// first; `chat.leaf` is the last message of the branch that is shown.

import { randomId } from "./attachments.js";

/** Give the messages of a chat from before there were branches their places. */
export function upgrade(chat) {
  let parent = null;
  for (const message of chat.messages) {
    message.id ??= randomId();
    if (message.parent === undefined) message.parent = parent;
    parent = message.id;
  }
  chat.leaf ??= parent;
  return chat;
}

/** The branch that is shown, from the first question on. */
export function branch(chat) {
  const byId = new Map(chat.messages.map((message) => [message.id, message]));
  const found = [];
  for (let message = byId.get(chat.leaf); message; message = byId.get(message.parent)) found.unshift(message);
  return found;
}

/** Add a message below another one (null: as a first question), and show it. */
export function append(chat, message, parent) {
  Object.assign(message, { id: randomId(), parent });
  chat.messages.push(message);
  chat.leaf = message.id;
  return message;
}

/** The versions of a message, itself included, oldest first. */
export const versions = (chat, { parent }) => chat.messages.filter((other) => other.parent === parent);

/** Show the branch of a message: to its end, along its newest messages. */
export function show(chat, message) {
  let leaf = message;
  for (let next; (next = chat.messages.findLast(({ parent }) => parent === leaf.id)); ) leaf = next;
  chat.leaf = leaf.id;
}

/** Forget a message that nothing follows, such as an answer that never began. */
export function drop(chat, message) {
  chat.messages = chat.messages.filter((other) => other !== message);
  if (chat.leaf === message.id) chat.leaf = message.parent;
}
