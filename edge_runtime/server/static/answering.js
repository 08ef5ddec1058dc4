// A chat and its files → the growing last message of that chat.
//
// An answer is a message `{role, text, thinking, state, reason, error, timings}`; the state is "running", "done",
// "stopped" or "failed". Times are what the user of this page waited, except the model's own speed.

import { streamAnswer } from "./api.js";
import { dataUri } from "./attachments.js";
import { t } from "./language.js";

/** The message that an answer starts as. */
export const emptyAnswer = () => ({ role: "assistant", text: "", thinking: "", state: "running", timings: {} });

/** Let an answer that broke off go on. */
export const reopen = (message) => Object.assign(message, { state: "running", error: undefined, reason: undefined, timings: {} });

/**
 * Fill the message until the answer ends, calling `onchange()` after every change, and `onprogress(stage, share)` before the
 * first word. Never throws: an error is stored in the message and returned.
 */
export async function fillAnswer(message, history, files, { model, think, continues, system, fields, key, signal, onchange, onprogress }) {
  const begin = performance.now();
  const since = (start) => (performance.now() - start) / 1000;
  let thoughtAt = null;
  try {
    const messages = await toApi(history, files, system);
    for await (const event of streamAnswer({ model, messages, think, continues, fields, key, signal })) {
      if (event.kind === "end") {
        finish(message, event);
        break;
      }
      if (event.kind === "progress") {
        onprogress(event.stage, event.share);
        continue;
      }
      if (event.rate) message.timings.rate = event.rate;
      message.timings.first ??= since(begin);
      if (event.kind === "thinking") {
        thoughtAt ??= performance.now();
        message.thinking += event.text;
      } else {
        if (thoughtAt !== null) message.timings.thinking ??= since(thoughtAt);
        message.text += event.text;
      }
      onchange();
    }
    return null;
  } catch (error) {
    if (error.name === "AbortError") {
      message.state = "stopped";
      return null;
    }
    message.state = "failed";
    message.error = error.message;
    return error;
  } finally {
    onchange();
  }
}

/**
 * Answer the last question once for every page of a document, one below the other under the pages' numbers; otherwise as
 * `fillAnswer`. A page that cannot be answered leaves its error in its place, unless the server is gone.
 */
export async function fillPages(message, history, files, document, pages, options) {
  message.paged = true;
  const timings = {};
  for (const page of pages) {
    const part = emptyAnswer();
    const begun = message.text ? `${message.text}\n\n` : "";
    const theFiles = new Map(files).set(document.id, { ...document, pages: String(page) });
    const onchange = () => {
      message.text = `${begun}## ${t("Page {0}", page)}\n\n${part.error ?? part.text}`;
      message.timings = { ...timings, first: timings.first ?? part.timings.first, rate: part.timings.rate };
      options.onchange();
    };
    const error = await fillAnswer(part, history, theFiles, { ...options, onchange });
    timings.first ??= part.timings.first;
    timings.rate = part.timings.rate;
    timings.tokens = (timings.tokens ?? 0) + (part.timings.tokens ?? 0);
    message.timings = { ...timings };
    if (part.state === "stopped" || (error && !(error.status >= 400 && error.status !== 401))) {
      Object.assign(message, { state: part.state, error: error?.message });
      options.onchange();
      return error;
    }
  }
  message.state = "done";
  options.onchange();
  return null;
}

function finish(message, { reason, tokens, context, seconds }) {
  message.state = "done";
  message.reason = reason;
  message.timings.tokens = tokens;
  message.timings.context = context;
  if (seconds.image >= 0.05) message.timings.image = seconds.image; // less: it was in the cache
  // The first token takes no step of its own, and very short times give no rate.
  if (seconds.decode >= 0.1 && tokens > 1) message.timings.rate = (tokens - 1) / seconds.decode;
  else delete message.timings.rate;
}

async function toApi(history, files, system) {
  const messages = system ? [{ role: "system", text: system }] : [];
  for (const { role, text, files: ids = [] } of history) {
    // The browser may have deleted a file to save space; an answer without its picture would be made up.
    const missing = ids.find((id) => !files.has(id));
    if (missing) throw new Error(t("A picture of this chat is no longer in this browser; begin a new chat with it."));
    const attached = ids.map((id) => files.get(id)).map(async (file) => ({ kind: file.kind, name: file.name, pages: file.pages, uri: await dataUri(file) }));
    messages.push({ role, text, files: await Promise.all(attached) });
  }
  return messages;
}
