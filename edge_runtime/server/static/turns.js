// One turn of a chat → its elements, created once and then updated while an answer grows.

import { tile } from "./attachments.js";
import { element, icon } from "./dom.js";
import { drawPlaces, findPlaces } from "./grounding.js";
import { renderMarkdown } from "./markdown.js";

/** A question with its pictures. */
export function questionTurn(message, files, { onopen, onedit }) {
  const tiles = message.files.map((id) => files.get(id)).filter(Boolean);
  return element(
    "li",
    { class: "turn question" },
    element("h2", { class: "unseen" }, "You asked"),
    tiles.length > 0 && element("ul", { class: "tiles", "aria-label": "Attached" }, ...tiles.map((file) => tile(file, { onopen: () => onopen(file) }))),
    message.text && element("p", { class: "bubble" }, message.text),
    element("div", { class: "actions" }, textButton("pencil", "Edit", onedit)),
  );
}

/** An answer: `node` and `update()`, which shows what the message has become. */
export class AnswerTurn {
  constructor(message, picture, { onretry, oncopy, onunfold }) {
    this.message = message;
    this.picture = picture;
    this.body = element("div", { class: "prose" });
    this.thought = element("div", { class: "prose" });
    this.thinkingLabel = element("span", {}, "Thinking");
    this.thinking = element("details", { class: "thinking", hidden: true }, element("summary", {}, icon("chevron"), this.thinkingLabel), this.thought);
    this.thinking.firstElementChild.addEventListener("click", onunfold);
    this.waiting = element("p", { class: "waiting" }, element("span", { class: "pulse", "aria-hidden": "true" }), (this.waitingLabel = element("span")));
    this.drawing = element("div");
    this.trouble = element("p", { class: "trouble", role: "alert", hidden: true });
    this.timings = element("p", { class: "timings" });
    this.copy = textButton("copy", "Copy", oncopy);
    this.retry = textButton("retry", "Ask again", onretry);
    this.footer = element("div", { class: "actions" }, this.timings, this.copy, this.retry);
    this.node = element(
      "li",
      { class: "turn answer" },
      element("h2", { class: "unseen" }, "Answer"),
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
    this.thinkingLabel.textContent = thinking && !text && running ? "Thinking …" : thoughtLabel(timings);
    this.thinking.classList.toggle("alive", running && !text);
    this.waiting.hidden = !running || Boolean(text || thinking);
    this.node.setAttribute("aria-busy", running);
    this.trouble.hidden = !error;
    this.trouble.textContent = error ?? "";
    this.footer.hidden = running;
    this.copy.hidden = !text;
    this.timings.textContent = timingsText(this.message);
    this.drawPlaces(text);
  }

  wait(label) {
    this.waitingLabel.textContent = label;
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
    const number = target.closest?.("[data-place]")?.dataset.place;
    if (number === undefined) return;
    for (const node of this.node.querySelectorAll(`[data-place="${number}"]`)) node.classList.toggle("pointed", on);
    this.drawing.classList.toggle("pointing", on);
  }
}

function textButton(name, label, onclick) {
  return element("button", { type: "button", class: "quiet", title: label, onclick }, icon(name), element("span", {}, label));
}

function seconds(value) {
  if (value < 0.095) return `${Math.max(1, Math.round(value * 1000))} ms`;
  return value < 9.95 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

function thoughtLabel(timings) {
  return timings?.thinking ? `Thought for ${seconds(timings.thinking)}` : "Thoughts";
}

// The API says only "length" when the context was full or the answer repeated itself.
const ENDS = { stopped: "Stopped", length: "Ended early" };

/** "First word 0.6 s · picture 0.4 s · 23 tokens/s · 12 tokens" */
function timingsText({ timings, state, reason }) {
  const parts = [];
  if (state === "stopped" || ENDS[reason]) parts.push(ENDS[reason] ?? ENDS.stopped);
  if (timings?.first) parts.push(`First word ${seconds(timings.first)}`);
  if (timings?.image) parts.push(`picture ${seconds(timings.image)}`);
  if (timings?.rate) parts.push(`${timings.rate < 10 ? timings.rate.toFixed(1) : Math.round(timings.rate)} tokens/s`);
  if (timings?.tokens) parts.push(timings.tokens === 1 ? "1 token" : `${timings.tokens} tokens`);
  return parts.join(" · ");
}
