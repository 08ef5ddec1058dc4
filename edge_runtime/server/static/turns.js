// One turn of a chat → its elements, created once and then updated while an answer grows.

import { tile } from "./attachments.js";
import { element, icon, iconButton } from "./dom.js";
import { drawPlaces, findPlaces } from "./grounding.js";
import { number, t } from "./language.js";
import { renderMarkdown } from "./markdown.js";

/**
 * A question with its pictures; `place` says which of `count` versions it is.
 */
export function questionTurn(message, files, { place, count, onopen, onedit, onversion }) {
  const tiles = message.files.map((id) => files.get(id)).filter(Boolean);
  return element(
    "li",
    { class: "turn question" },
    element("h2", { class: "unseen" }, t("You asked")),
    tiles.length > 0 && element("ul", { class: "tiles", "aria-label": t("Attached") }, ...tiles.map((file) => tile(file, { onopen: file.kind !== "pdf" && (() => onopen(file)) }))),
    message.text && element("p", { class: "bubble", dir: "auto" }, message.text),
    element("div", { class: "actions" }, versionsNav(place, count, onversion), textButton("pencil", t("Edit"), onedit)),
  );
}

/** Buttons that lead to the other versions of a turn; null if there is one only. */
function versionsNav(place, count, onversion) {
  if (count < 2) return null;
  const step = (name, label, to) => iconButton(name, label, () => onversion(to), { disabled: to < 0 || to >= count });
  return element(
    "div",
    { class: "versions", role: "group", "aria-label": t("Versions") },
    step("back", t("Earlier version"), place - 1),
    element("span", {}, t("{0} of {1}", place + 1, count)),
    step("chevron", t("Later version"), place + 1),
  );
}

/** An answer: `node` and `update()`, which shows what the message has become. */
export class AnswerTurn {
  constructor(message, picture, { place, count, isLast, onretry, oncontinue, oncopy, onsave, onunfold, onversion }) {
    Object.assign(this, { message, picture, isLast });
    this.body = element("div", { class: "prose" });
    this.thought = element("div", { class: "prose" });
    this.thinkingLabel = element("span", {}, t("Thinking"));
    this.thinking = element("details", { class: "thinking", hidden: true }, element("summary", {}, icon("chevron"), this.thinkingLabel), this.thought);
    this.thinking.firstElementChild.addEventListener("click", onunfold);
    this.waitingLabel = element("span");
    this.bar = element("progress", { max: "1", hidden: true, "aria-label": t("Progress") });
    this.waiting = element("div", { class: "waiting" }, element("span", { class: "pulse", "aria-hidden": "true" }), this.waitingLabel, this.bar);
    this.drawing = element("div");
    this.trouble = element("p", { class: "trouble", role: "alert", dir: "auto", hidden: true });
    this.timings = element("p", { class: "timings" });
    this.buttons = [
      (this.continue = textButton("play", t("Continue"), oncontinue)),
      (this.copy = textButton("copy", t("Copy as Markdown"), oncopy)),
      (this.save = textButton("file", t("Save as Markdown"), onsave)),
      textButton("retry", t("Ask again"), onretry),
    ];
    this.footer = element("div", { class: "actions" }, versionsNav(place, count, onversion), this.timings, ...this.buttons);
    this.node = element(
      "li",
      { class: "turn answer" },
      element("h2", { class: "unseen" }, t("Answer")),
      this.thinking, this.waiting, this.body, this.drawing, this.trouble, this.footer,
    );
    this.node.addEventListener("pointerover", (event) => this.point(event.target, true));
    this.node.addEventListener("pointerout", (event) => this.point(event.target, false));
    this.node.addEventListener("focusin", (event) => this.point(event.target, true));
    this.node.addEventListener("focusout", (event) => this.point(event.target, false));
    this.update();
  }

  update() {
    const { text, thinking, state, error, timings } = this.message;
    const running = state === "running";
    renderMarkdown(this.body, text);
    this.thinking.hidden = !thinking;
    if (thinking) renderMarkdown(this.thought, thinking);
    this.thinkingLabel.textContent = thinking && !text && running ? t("Thinking …") : thoughtLabel(timings);
    this.thinking.classList.toggle("alive", running && !text);
    this.waiting.hidden = !running || Boolean(text || thinking);
    this.node.setAttribute("aria-busy", running);
    this.trouble.hidden = !error;
    this.trouble.textContent = error ?? "";
    for (const button of this.buttons) button.hidden = running;
    this.copy.hidden ||= !text;
    this.save.hidden ||= !this.message.paged;
    this.continue.hidden ||= !this.isLast || !isCut(this.message);
    this.timings.textContent = timingsText(this.message);
    this.footer.hidden = running && !this.timings.textContent;
    this.drawPlaces(text);
  }

  /** What the model does before its first word, and the share that is done, if known. */
  wait(label, share = null) {
    this.waitingLabel.textContent = label;
    this.bar.hidden = share === null;
    if (share !== null) this.bar.value = share;
  }

  drawPlaces(text) {
    const places = this.picture ? findPlaces(text) : [];
    const key = JSON.stringify(places);
    if (key === this.drawn) return;
    this.drawn = key;
    this.drawing.replaceChildren(...(places.length ? [drawPlaces(this.picture.url, places)] : []));
  }

  /** Highlight the place whose number or mark has the pointer or the focus. */
  point(target, on) {
    const place = target.closest?.("[data-place]")?.dataset.place;
    if (place === undefined) return;
    for (const node of this.node.querySelectorAll(`[data-place="${place}"]`)) node.classList.toggle("pointed", on);
    this.drawing.classList.toggle("pointing", on);
  }
}

/** Whether an answer broke off and can go on. */
const isCut = ({ text, state, reason, paged }) => Boolean(text) && !paged && (state === "stopped" || state === "failed" || reason === "length");

function textButton(name, label, onclick) {
  return element("button", { type: "button", class: "quiet", title: label, onclick }, icon(name), element("span", {}, label));
}

function seconds(value) {
  if (value < 0.095) return `${Math.max(1, Math.round(value * 1000))} ms`;
  return `${number(value, value < 9.95 ? 1 : 0)} s`;
}

function thoughtLabel(timings) {
  return timings?.thinking ? t("Thought for {0}", seconds(timings.thinking)) : t("Thoughts");
}

/** "First word 0.6 s · picture 0.4 s · 23 tokens/s · 12 tokens"; only the rate while the answer grows. */
function timingsText({ timings, state, reason }) {
  const parts = [];
  const rate = timings?.rate && t("{0} tokens/s", number(timings.rate, timings.rate < 10 ? 1 : 0));
  if (state === "running") return rate || "";
  if (state === "stopped") parts.push(t("Stopped"));
  // The API says only "length" when the context was full or the answer repeated itself.
  else if (reason === "length") parts.push(t("Ended early"));
  if (timings?.first) parts.push(t("First word {0}", seconds(timings.first)));
  if (timings?.image) parts.push(t("picture {0}", seconds(timings.image)));
  if (rate) parts.push(rate);
  if (timings?.tokens) parts.push(timings.tokens === 1 ? t("1 token") : t("{0} tokens", number(timings.tokens)));
  return parts.join(" · ");
}
