// Whether the server is there: asked once a second while somebody looks at the page, and told in a banner.

import { byId } from "./dom.js";
import { t } from "./language.js";
import { say } from "./speech.js";

const EVERY_MS = 800;
const PATIENCE_MS = 5000; // a server that loads a model may be slow to answer; one that has ended refuses at once

let away = false;
let timer = 0;

export const isAway = () => away;

/** Watch the server; `onback()` is called when it is there again. */
export function watchServer({ onback }) {
  const look = async () => {
    clearTimeout(timer);
    if (document.hidden) return; // nobody looks; a phone in a pocket saves its battery
    const is = await answers();
    if (is === away) tell(!is, onback);
    timer = setTimeout(look, EVERY_MS);
  };
  document.addEventListener("visibilitychange", look);
  addEventListener("online", look);
  addEventListener("offline", look);
  look();
}

async function answers() {
  try {
    await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    return true; // whatever it says: it is there
  } catch (error) {
    return error.name === "TimeoutError"; // slow, not gone
  }
}

function tell(isGone, onback) {
  away = isGone;
  byId("away").hidden = !away;
  byId("away").textContent = away ? t("The server does not answer. Start “edge-runtime serve” again; this page goes on by itself.") : "";
  document.body.classList.toggle("away", away);
  if (away) return;
  say(t("The server is back."));
  onback();
}
