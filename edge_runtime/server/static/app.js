// The page: which chat is shown, what is being answered, and what is saved. Read this first, then answering.js.

import { emptyAnswer, fillAnswer, fillPages, reopen } from "./answering.js";
import { randomId, withUrl } from "./attachments.js";
import { more, showChats, titleOf } from "./chats.js";
import { Composer } from "./composer.js";
import { pagesIn } from "./documents.js";
import { byId } from "./dom.js";
import { download } from "./export.js";
import { t, translate } from "./language.js";
import { ModelPage } from "./model_page.js";
import { Models } from "./models.js";
import { copy, notice } from "./notice.js";
import { editOptions, fieldsOf, setUpOptions, usualOptions } from "./options.js";
import { recall, recallKey, remember } from "./prefs.js";
import { watchServer } from "./reach.js";
import { askForKey, confirmed, enlarge, setUpSettings } from "./settings.js";
import { closeSide, isSideOpen, scrollToEnd, setUpScrolling, setUpSide, stayHere } from "./side.js";
import { Speaker, say } from "./speech.js";
import * as store from "./store.js";
import * as tree from "./tree.js";
import { AnswerTurn, questionTurn } from "./turns.js";

const SAVE_EVERY_MS = 2000; // while an answer grows
const STAGES = { decode: t("Reading the video"), encode: t("Looking at it"), prefill: t("Reading") };

translate(document.body);
let chats = []; // newest first
let current = newChat();
let files = new Map(); // of the current chat, by id
let running = null; // {chat, controller}: one answer at a time
const shown = new Map(); // message → its AnswerTurn, in the current chat

const composer = new Composer({ onsend: ask, onstop: stop, onnotice: notice });
const models = new Models({ onkey: askForKey });
new ModelPage(models);

function newChat() {
  return { id: randomId(), title: t("New chat"), updated: Date.now(), messages: [], leaf: null, options: usualOptions() };
}

// --- The conversation ---

/** Answer a question; `edits` is the question that it replaces, if any. */
async function ask({ text, files: attached, edits }) {
  const chat = current;
  if (!chat.messages.length) {
    chat.title = titleOf({ text, files: attached });
    chats.unshift(chat);
    remember("chat", chat.id);
  }
  for (const file of attached) files.set(file.id, file);
  const parent = edits ? edits.parent : (tree.branch(chat).at(-1)?.id ?? null);
  tree.append(chat, { role: "user", text, files: attached.map(({ id }) => id) }, parent);
  await keep(() => store.saveFiles(attached.map(({ url, kind, ...kept }) => ({ ...kept, chat: chat.id }))));
  await answer(chat);
}

/** Answer the last question of a chat, or go on with an answer. */
async function answer(chat, continued = null) {
  if (running) return;
  const history = tree.branch(chat).filter(({ role, text }) => role === "user" || text);
  const message = continued ? reopen(continued) : tree.append(chat, emptyAnswer(), history.at(-1).id);
  const theFiles = files;
  chat.updated = Date.now();
  running = { chat, controller: new AbortController() };
  composer.setRunning(true);
  showConversation();
  scrollToEnd();
  const follow = follower(chat, message, history.at(-1).files?.length > 0);
  await keep(() => store.saveChat(chat));
  if (!models.chosen) await models.load(); // the server was down when the page was opened
  const document = continued ? null : history.at(-1).files?.map((id) => theFiles.get(id)).find((file) => file?.each);
  const fill = document
    ? (...rest) => fillPages(...rest.slice(0, 3), document, pagesIn(document.pages, document.count), rest[3])
    : fillAnswer;
  const error = await fill(message, history, theFiles, {
    model: byId("model").value,
    think: !continued && models.thinks && byId("think").getAttribute("aria-pressed") === "true",
    continues: Boolean(continued),
    system: [recall("system"), chat.options?.system].filter(Boolean).join("\n\n"),
    fields: fieldsOf(chat.options ?? {}),
    key: recallKey(),
    signal: running.controller.signal,
    onchange: follow.change,
    onprogress: follow.progress,
  });
  follow.end();
  running = null;
  composer.setRunning(false);
  chat.updated = Date.now();
  await keep(() => store.saveChat(chat));
  listChats();
  if (error?.status === 401 && (await askForKey(error.message))) {
    await models.load();
    if (current === chat) await retry(message);
  }
}

/** Shows, speaks and saves a growing message; draws at most once per frame. */
function follower(chat, message, hasFiles) {
  const speaker = new Speaker();
  const begin = performance.now();
  const spoken = message.text;
  let stage = hasFiles ? "encode" : "prefill";
  let share = null;
  let saved = begin;
  let frame = 0;
  const draw = () => {
    frame = 0;
    shown.get(message)?.update();
    speaker.follow(message.text.slice(spoken.length));
  };
  const tell = () => {
    const seconds = Math.round((performance.now() - begin) / 1000);
    const parts = [share !== null && `${Math.floor(share * 100)} %`, seconds > 0 && `${seconds} s`].filter(Boolean);
    shown.get(message)?.wait(`${STAGES[stage]} … ${parts.join(" · ")}`.trim(), share);
  };
  const timer = setInterval(tell, 1000);
  tell();
  say(`${STAGES[stage]}.`);
  return {
    change() {
      frame ||= requestAnimationFrame(draw);
      if (performance.now() - saved > SAVE_EVERY_MS) {
        saved = performance.now();
        keep(() => store.saveChat(chat));
      }
    },
    progress(newStage, newShare) {
      [stage, share] = [newStage, newShare];
      tell();
    },
    end() {
      clearInterval(timer);
      cancelAnimationFrame(frame);
      draw();
      speaker.finish(message.text.slice(spoken.length));
      say({ done: t("End of the answer."), stopped: t("Stopped."), failed: t("No answer.") }[message.state]);
      if (message.state === "done" && shown.has(message)) showConversation(); // the last turn gets its buttons
    },
  };
}

function stop() {
  running?.controller.abort();
}

/** Whether a new answer may begin; tells why not. */
function isFree() {
  if (running) notice(t("Another answer is being written; stop it first."));
  return !running;
}

/** Ask the question before an answer again; the old answer stays beside the new one, unless it never began. */
async function retry(message) {
  if (!isFree()) return;
  if (message.text || message.thinking) current.leaf = message.parent;
  else tree.drop(current, message);
  await answer(current);
}

/** Put a question into the composer; what is sent becomes another version of it. */
function edit(message) {
  if (!isFree()) return;
  composer.put({ text: message.text, files: message.files.map((id) => files.get(id)).filter(Boolean), edits: message });
  byId("question").focus();
}

/** Show another version of a message, with what followed it. */
async function showVersion(message, place) {
  if (!isFree()) return;
  tree.show(current, tree.versions(current, message)[place]);
  showConversation();
  await keep(() => store.saveChat(current));
}

function showConversation() {
  shown.clear();
  const turns = [];
  const messages = tree.branch(current);
  let picture = null; // the picture that an answer's places refer to: the last one before it
  for (const message of messages) {
    const all = tree.versions(current, message);
    const version = { place: all.indexOf(message), count: all.length, onversion: (place) => showVersion(message, place) };
    if (message.role === "user") {
      const attached = message.files.map((id) => files.get(id)).filter(Boolean);
      picture = attached.findLast(({ kind }) => kind === "image") ?? (attached.length ? null : picture);
      turns.push(questionTurn(message, files, { ...version, onopen: enlarge, onedit: () => edit(message) }));
    } else {
      const turn = new AnswerTurn(message, picture, {
        ...version,
        isLast: message === messages.at(-1),
        onretry: () => retry(message),
        oncontinue: () => isFree() && answer(current, message),
        oncopy: () => copy(message.text),
        onsave: () => download(message.text, current.title, "md", "text/markdown"),
        onunfold: stayHere,
      });
      shown.set(message, turn);
      turns.push(turn.node);
    }
  }
  byId("turns").replaceChildren(...turns);
  byId("welcome").hidden = turns.length > 0;
  document.title = current.messages.length ? `${current.title} – edge-runtime` : "edge-runtime";
  byId("open-options").classList.toggle("in-use", Object.keys(current.options ?? {}).length > 0);
  listChats();
}

// --- Chats ---

/** Release pictures that are no longer shown, unless the composer still holds them. */
function release() {
  for (const file of files.values()) {
    if (!composer.files.includes(file)) URL.revokeObjectURL(file.url);
  }
}

/** Files of a chat, by id. */
async function filesOf(chat) {
  if (chat === current) return files;
  return new Map(((await keep(() => store.filesOf(chat.id))) ?? []).map((file) => [file.id, file]));
}

async function open(chat) {
  const kept = await keep(() => store.filesOf(chat.id));
  if (chat !== current) {
    release();
    files = new Map();
    composer.stopEditing();
  }
  for (const file of kept ?? []) if (!files.has(file.id)) files.set(file.id, withUrl(file));
  current = chat;
  remember("chat", chat.id);
  closeSide();
  showConversation();
  scrollToEnd();
}

function begin() {
  release();
  composer.stopEditing();
  current = newChat();
  files = new Map();
  remember("chat", "");
  closeSide();
  showConversation();
  byId("question").focus();
}

async function change(chat) {
  if (!(await more(chat, await filesOf(chat)))) return;
  await keep(() => store.saveChat(chat));
  showConversation();
}

async function changeOptions() {
  const used = tree.branch(current).findLast(({ timings }) => timings?.context)?.timings.context ?? 0;
  const chosen = await editOptions(current.options ?? {}, { used, size: await models.contextSize(), thinks: models.thinks });
  if (!chosen) return;
  current.options = chosen;
  if (current.messages.length) await keep(() => store.saveChat(current));
  showConversation();
}

async function remove(chat) {
  if (!(await confirmed(t("Delete “{0}”?", chat.title), t("Its pictures are deleted, too. Nothing of it exists elsewhere.")))) return;
  if (running?.chat === chat) stop();
  chats = chats.filter((other) => other !== chat);
  await keep(() => store.deleteChat(chat.id));
  say(t("Deleted."));
  if (chat === current) begin();
  else listChats();
}

async function removeAll() {
  if (!(await confirmed(t("Delete all chats?"), t("Their pictures are deleted, too. Nothing of them exists elsewhere.")))) return;
  stop();
  chats = [];
  await keep(() => store.deleteEverything());
  begin();
}

function listChats() {
  chats.sort((a, b) => b.updated - a.updated);
  showChats(chats, current, { onopen: open, onmore: change, ondelete: remove });
}

/** Do something with the store; without one (private windows, full disks) the page still works, but forgets. */
async function keep(work) {
  try {
    return await work();
  } catch (error) {
    notice(t("This browser does not keep the chat: {0}.", error?.message ?? t("storage is not available")));
    return null;
  }
}

// --- The page as a whole ---

function setUp() {
  setUpSide();
  setUpScrolling();
  setUpOptions();
  setUpSettings({ onkey: () => models.load(), ondelete: removeAll });
  for (const id of ["new", "new-small"]) byId(id).addEventListener("click", begin);
  byId("open-options").addEventListener("click", changeOptions);
  byId("search").addEventListener("input", listChats);
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    if (isSideOpen()) closeSide();
    else if (running) stop();
    else composer.stopEditing();
  });
  const think = byId("think");
  const setThink = (on) => think.setAttribute("aria-pressed", on);
  setThink(recall("think") === "yes");
  think.addEventListener("click", () => {
    setThink(think.getAttribute("aria-pressed") !== "true");
    remember("think", think.getAttribute("aria-pressed") === "true" ? "yes" : "");
  });
  for (const button of document.querySelectorAll("[data-question]")) {
    button.addEventListener("click", () => {
      composer.put({ text: button.dataset.question, files: composer.files });
      byId("question").focus();
    });
  }
  watchServer({ onback: () => models.load() });
  // If closing the page cuts an answer off, the part so far is saved.
  addEventListener("pagehide", () => running && store.saveChat(running.chat).catch(() => {}));
}

async function restore() {
  const kept = ((await keep(store.allChats)) ?? []).filter(({ id }) => id !== current.id).map(tree.upgrade);
  for (const message of kept.flatMap((chat) => chat.messages)) {
    if (message.state === "running") message.state = "stopped";
  }
  chats.push(...kept); // whoever is quick has asked already
  const last = current.messages.length ? null : chats.find(({ id }) => id === recall("chat"));
  if (last) await open(last);
  else showConversation();
}

async function keepShell() {
  if (!("serviceWorker" in navigator)) return; // plain http from another machine: the page works, but not offline
  // Under Trusted Types a script's address must come from a policy; this one allows a single address.
  const policy = globalThis.trustedTypes?.createPolicy("page", { createScriptURL: () => "sw.js" });
  await navigator.serviceWorker.register(policy ? policy.createScriptURL("") : "sw.js").catch(() => {});
}

setUp();
await Promise.all([restore(), models.load()]);
keepShell();
