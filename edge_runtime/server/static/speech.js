// What a screen reader says while an answer arrives: whole sentences once they are complete, not every token.

import { byId } from "./dom.js";

const SENTENCE = /^[\s\S]*?(?:[.!?。！？](?=\s)|\n)/;

/** Say something now. */
export function say(text) {
  const node = document.createElement("p");
  node.textContent = text;
  const region = byId("said");
  region.append(node);
  while (region.childElementCount > 20) region.firstElementChild.remove();
}

/** Follows one answer. */
export class Speaker {
  #said = 0;

  /** Say the sentences that have become complete. */
  follow(text) {
    for (let found; (found = SENTENCE.exec(text.slice(this.#said))); this.#said += found[0].length) {
      if (found[0].trim()) say(plain(found[0]));
    }
  }

  finish(text) {
    const rest = text.slice(this.#said).trim();
    if (rest) say(plain(rest));
    this.#said = text.length;
  }
}

function plain(text) {
  return text.replace(/<(box|quad|point)>[^<]*(<\/?\1>)?/g, "").replace(/<\/?ref>/g, "").replace(/[*_`#>|~]+/g, "").trim();
}
