// The panel beside the conversation, which a phone shows above it, and scrolling along with a growing answer.

import { byId } from "./dom.js";

const narrow = matchMedia("(max-width: 800px)");

function setSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  byId("menu").setAttribute("aria-expanded", isOpen);
  // Tab must not reach what cannot be seen.
  byId("side").inert = narrow.matches && !isOpen;
  byId("main").inert = narrow.matches && isOpen;
}

export const isSideOpen = () => document.body.classList.contains("side-open");

export function closeSide() {
  if (!narrow.matches) return;
  const hadFocus = byId("side").contains(document.activeElement);
  setSide(false);
  if (hadFocus) byId("menu").focus();
}

export function setUpSide() {
  setSide(false);
  narrow.addEventListener("change", () => setSide(false));
  byId("menu").addEventListener("click", () => {
    setSide(true);
    byId("new").focus();
  });
  byId("scrim").addEventListener("click", closeSide);
}

const log = byId("log");
let followsEnd = true; // until the user scrolls up, and again once they are back at the end

export function scrollToEnd() {
  followsEnd = true;
  log.scrollTop = log.scrollHeight;
}

/** Unfolded text is read from its start. */
export const stayHere = () => (followsEnd = false);

export function setUpScrolling() {
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
