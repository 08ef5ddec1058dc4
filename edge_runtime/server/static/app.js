// The page: which chat is shown, what is being answered, and what is saved. Read this first, then answering.js.

import { emptyAnswer, fillAnswer } from "./answering.js";
import { listModels } from "./api.js";
import { randomId, withUrl } from "./attachments.js";
import { showChats, titleOf } from "./chats.js";
import { Composer } from "./composer.js";
import { byId, element } from "./dom.js";
import { recall, recallKey, remember } from "./prefs.js";
import { askForKey, confirmed, enlarge, setUpSettings } from "./settings.js";
import { Speaker, say } from "./speech.js";
import * as store from "./store.js";
import { AnswerTurn, questionTurn } from "./turns.js";

const SAVE_EVERY_MS = 2000; // while an answer grows
const USUAL_NOTE = byId("note").textContent;

let chats = []; // newest first
let current = newChat();
let files = new Map(); // of the current chat, by id
let running = null; // {chat, controller}: one answer at a time
let models = [];
const shown = new Map(); // message → its AnswerTurn, in the current chat

const composer = new Composer({ onsend: ask, onstop: stop, onnotice: notice });

function newChat() {
  return { id: randomId(), title: "New chat", updated: Date.now(), messages: [] };
}

// --- The conversation ---

async function ask({ text, files: attached }) {
  const chat = current;
  if (!chat.messages.length) {
    chat.title = titleOf({ text, files: attached });
    if (!chats.includes(chat)) chats.unshift(chat); // already there if its first question was edited
    remember("chat", chat.id);
  }
  for (const file of attached) files.set(file.id, file);
  chat.messages.push({ role: "user", text, files: attached.map(({ id }) => id) });
  await keep(() => store.saveFiles(attached.map(({ id, name, type, blob }) => ({ id, name, type, blob, chat: chat.id }))));
  await answer(chat);
}

async function answer(chat) {
  if (running) return;
  const message = emptyAnswer();
  const history = chat.messages.filter(({ role, state, text }) => role === "user" || (state !== "failed" && text));
  const theFiles = files;
  chat.messages.push(message);
  chat.updated = Date.now();
  running = { chat, controller: new AbortController() };
  composer.setRunning(true);
  showConversation();
  scrollToEnd();
  const follow = follower(chat, message, history.at(-1).files?.length > 0);
  await keep(() => store.saveChat(chat));
  if (!models.length) await loadModels(); // the server was down when the page was opened
  const error = await fillAnswer(message, history, theFiles, {
    model: byId("model").value,
    think: thinks() && byId("think").getAttribute("aria-pressed") === "true",
    system: recall("system") ?? "",
    key: recallKey(),
    signal: running.controller.signal,
    onchange: follow.change,
  });
  follow.end();
  running = null;
  composer.setRunning(false);
  chat.updated = Date.now();
  await keep(() => store.saveChat(chat));
  listChats();
  if (error?.status === 401 && (await askForKey(error.message))) {
    await loadModels();
    if (current === chat) await retry(message);
  }
}

/** Shows, speaks and saves a growing message; draws at most once per frame. */
function follower(chat, message, hasFiles) {
  const speaker = new Speaker();
  const begin = performance.now();
  const label = hasFiles ? "Looking at it" : "Reading";
  let saved = begin;
  let frame = 0;
  const draw = () => {
    frame = 0;
    shown.get(message)?.update();
    speaker.follow(message.text);
  };
  const tick = () => shown.get(message)?.wait(`${label} … ${Math.round((performance.now() - begin) / 1000)} s`);
  const timer = setInterval(tick, 1000);
  shown.get(message)?.wait(`${label} …`);
  say(`${label}.`);
  return {
    change() {
      frame ||= requestAnimationFrame(draw);
      if (performance.now() - saved > SAVE_EVERY_MS) {
        saved = performance.now();
        keep(() => store.saveChat(chat));
      }
    },
    end() {
      clearInterval(timer);
      cancelAnimationFrame(frame);
      draw();
      speaker.finish(message.text);
      say({ done: "End of the answer.", stopped: "Stopped.", failed: "No answer." }[message.state]);
    },
  };
}

function stop() {
  running?.controller.abort();
}

/** Ask the question before a message again, replacing what followed it. */
async function retry(message) {
  if (running) return notice("Another answer is being written; stop it first.");
  current.messages.splice(current.messages.indexOf(message));
  await answer(current);
}

/** Move a question back into the composer, and remove everything that followed it. */
async function edit(message) {
  if (running) return notice("An answer is being written; stop it first.");
  const { text, files: ids } = message;
  current.messages.splice(current.messages.indexOf(message));
  composer.put({ text, files: ids.map((id) => files.get(id)).filter(Boolean) });
  await keep(() => store.saveChat(current));
  showConversation();
  byId("question").focus();
}

function showConversation() {
  shown.clear();
  const turns = [];
  let picture = null; // the picture that an answer's places refer to: the last one before it
  for (const message of current.messages) {
    if (message.role === "user") {
      const attached = message.files.map((id) => files.get(id)).filter(Boolean);
      picture = attached.findLast(({ kind }) => kind === "image") ?? (attached.length ? null : picture);
      turns.push(questionTurn(message, files, { onopen: enlarge, onedit: () => edit(message) }));
    } else {
      const turn = new AnswerTurn(message, picture, {
        onretry: () => retry(message),
        oncopy: () => copy(message.text),
        onunfold: () => (followsEnd = false), // unfolded text is read from its start
      });
      shown.set(message, turn);
      turns.push(turn.node);
    }
  }
  byId("turns").replaceChildren(...turns);
  byId("welcome").hidden = turns.length > 0;
  document.title = current.messages.length ? `${current.title} – edge-runtime` : "edge-runtime";
  listChats();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notice("Copied.");
  } catch {
    notice("This browser does not let pages copy over plain http; select the text instead.");
  }
}

// --- Chats ---

/** Release pictures that are no longer shown, unless the composer still holds them. */
function release() {
  for (const file of files.values()) {
    if (!composer.files.includes(file)) URL.revokeObjectURL(file.url);
  }
}

async function open(chat) {
  const kept = await keep(() => store.filesOf(chat.id));
  if (chat !== current) {
    release();
    files = new Map();
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
  current = newChat();
  files = new Map();
  remember("chat", "");
  closeSide();
  showConversation();
  byId("question").focus();
}

async function remove(chat) {
  if (!(await confirmed(`Delete “${chat.title}”?`, "Its pictures are deleted, too. Nothing of it exists elsewhere."))) return;
  if (running?.chat === chat) stop();
  chats = chats.filter((other) => other !== chat);
  await keep(() => store.deleteChat(chat.id));
  say("Deleted.");
  if (chat === current) begin();
  else listChats();
}

async function removeAll() {
  if (!(await confirmed("Delete all chats?", "Their pictures are deleted, too. Nothing of them exists elsewhere."))) return;
  stop();
  chats = [];
  await keep(() => store.deleteEverything());
  begin();
}

function listChats() {
  chats.sort((a, b) => b.updated - a.updated);
  showChats(chats, current, { onopen: open, ondelete: remove });
}

/** Do something with the store; without one (private windows, full disks) the page still works, but forgets. */
async function keep(work) {
  try {
    return await work();
  } catch (error) {
    notice(`This browser does not keep the chat: ${error?.message ?? "storage is not available"}.`);
    return null;
  }
}

// --- Models ---

async function loadModels() {
  const select = byId("model");
  try {
    models = await listModels(recallKey());
  } catch (error) {
    if (error.status === 401 && (await askForKey(error.message))) return loadModels();
    notice(error.message);
    return;
  }
  select.replaceChildren(...models.map(({ name }) => element("option", { value: name }, name.replace(/:latest$/, ""))));
  const wanted = recall("model");
  if (models.some(({ name }) => name === wanted)) select.value = wanted;
  select.disabled = models.length < 2;
  showModel();
}

const chosen = () => models.find(({ name }) => name === byId("model").value);
const thinks = () => chosen()?.thinks ?? false;

/** Update what depends on the model: whether it thinks, and the notice about its answers. */
function showModel() {
  const warning = chosen()?.notice ?? "";
  byId("think").hidden = !thinks();
  byId("toy").hidden = !warning;
  byId("note").textContent = warning || USUAL_NOTE;
}

// --- The rest of the page ---

let noticeTimer = 0;

function notice(text) {
  const node = byId("notice");
  node.textContent = text;
  node.classList.add("shown");
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => node.classList.remove("shown"), 6000);
}

const log = byId("log");
let followsEnd = true; // until the user scrolls up, and again once they are back at the end

function scrollToEnd() {
  followsEnd = true;
  log.scrollTop = log.scrollHeight;
}

function setUpScrolling() {
  let height = 0;
  log.addEventListener("scroll", () => {
    // If the height is unchanged, the user scrolled; a growing answer fires scroll events, too.
    if (log.scrollHeight === height) followsEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    height = log.scrollHeight;
  });
  // New text, pictures that load and a growing composer all move the end.
  const observer = new ResizeObserver(() => followsEnd && scrollToEnd());
  observer.observe(log);
  observer.observe(byId("turns"));
}

const narrow = matchMedia("(max-width: 800px)");

function setSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  byId("menu").setAttribute("aria-expanded", isOpen);
  // Tab must not reach what cannot be seen.
  byId("side").inert = narrow.matches && !isOpen;
  byId("main").inert = narrow.matches && isOpen;
}

function closeSide() {
  if (!narrow.matches) return;
  const hadFocus = byId("side").contains(document.activeElement);
  setSide(false);
  if (hadFocus) byId("menu").focus();
}

function setUp() {
  setSide(false);
  narrow.addEventListener("change", () => setSide(false));
  byId("menu").addEventListener("click", () => {
    setSide(true);
    byId("new").focus();
  });
  byId("scrim").addEventListener("click", closeSide);
  for (const id of ["new", "new-small"]) byId(id).addEventListener("click", begin);
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("side-open")) closeSide();
    else stop();
  });
  byId("model").addEventListener("change", () => {
    remember("model", byId("model").value);
    showModel();
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
  setUpScrolling();
  setUpSettings({ onkey: loadModels, ondelete: removeAll });
  // If closing the page cuts an answer off, the part so far is saved.
  addEventListener("pagehide", () => running && store.saveChat(running.chat).catch(() => {}));
}

async function restore() {
  chats = (await keep(store.allChats)) ?? [];
  for (const message of chats.flatMap((chat) => chat.messages)) {
    if (message.state === "running") message.state = "stopped";
  }
  const last = chats.find(({ id }) => id === recall("chat"));
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
await Promise.all([restore(), loadModels()]);
keepShell();
