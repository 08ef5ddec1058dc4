// Documents and videos before they are asked about: small pages to choose from, and the frames that the model sees.

import { preview } from "./api.js";
import { dataUri, randomId } from "./attachments.js";
import { answerOf, byId, element } from "./dom.js";
import { t } from "./language.js";
import { recallKey } from "./prefs.js";

const CHOICE = /^\s*\d{1,5}(\s*-\s*\d{0,5})?(\s*,\s*\d{1,5}(\s*-\s*\d{0,5})?)*\s*$/;

/** Numbers of the pages in a choice such as "1-3,7" or "5-", of a document of `count` pages; an empty one means all. */
export function pagesIn(choice, count) {
  const ranges = (choice || "1-").split(",").map((range) => range.split("-").map((text) => text.trim()));
  return ranges.flatMap(([first, last = first]) => {
    const [from, to] = [Number(first), last === "" ? count : Number(last)];
    return Array.from({ length: Math.max(0, Math.min(to, count) - from + 1) }, (_, i) => from + i).filter((page) => page > 0);
  });
}

/** A choice as short as it can be: [1, 2, 3, 7] → "1-3,7". */
export function choiceOf(numbers) {
  const ranges = [];
  for (const number of numbers) {
    if (ranges.at(-1)?.at(-1) === number - 1) ranges.at(-1).push(number);
    else ranges.push([number]);
  }
  return ranges.map((range) => (range.length > 1 ? `${range[0]}-${range.at(-1)}` : `${range[0]}`)).join(",");
}

/**
 * Let the user choose pages of a document. Resolves with a copy of the attachment with `pages` (a choice; "" means all),
 * `each` (whether every page is asked about separately) and `count`; or with null if nothing changes.
 */
export async function choosePages(file) {
  const [field, status, list] = [byId("page-choice"), byId("document-status"), byId("pages")];
  byId("document-title").textContent = file.name;
  field.value = file.pages ?? "";
  field.setCustomValidity("");
  byId("each-page").checked = file.each ?? false;
  byId("each-page").disabled = true; // until it is known how many pages there are
  status.textContent = t("Reading the document …");
  list.replaceChildren();
  const controller = new AbortController();
  let count = 0;
  const boxes = () => [...list.querySelectorAll("input")];
  const check = () => {
    const isWrong = field.value.trim() && !CHOICE.test(field.value);
    const chosen = isWrong ? [] : pagesIn(field.value.trim(), count || 1e5);
    const beyond = count && !isWrong && (!chosen.length || field.value.match(/\d+/g)?.some((page) => Number(page) > count || Number(page) < 1));
    field.setCustomValidity(isWrong ? t("Expected pages such as 1-3,7.") : beyond ? t("The document has {0} pages.", count) : "");
    return chosen;
  };
  field.oninput = () => {
    const chosen = new Set(check());
    for (const box of boxes()) box.checked = chosen.has(Number(box.value));
  };
  list.onchange = () => {
    const chosen = boxes().filter((box) => box.checked).map((box) => Number(box.value));
    field.value = chosen.length === count ? "" : choiceOf(chosen);
    field.setCustomValidity(chosen.length ? "" : t("Choose a page at least."));
  };
  showPages(file, controller.signal).then(
    (pages) => {
      count = pages.length;
      status.textContent = count === 1 ? t("1 page") : t("{0} pages", count);
      list.replaceChildren(...pages.map(pageBox));
      byId("each-page").disabled = false;
      field.oninput();
    },
    (error) => error.name !== "AbortError" && (status.textContent = error.message),
  );
  const answer = await answerOf(byId("document"));
  controller.abort();
  if (answer !== "save") return null;
  return { ...file, id: randomId(), pages: field.value.replace(/\s/g, ""), each: byId("each-page").checked && !byId("each-page").disabled, count };
}

async function showPages(file, signal) {
  const { pages } = await preview({ kind: file.kind, name: file.name, uri: await dataUri(file) }, recallKey(), signal);
  return pages;
}

function pageBox({ number, picture }) {
  const label = t("Page {0}", number);
  return element(
    "li",
    {},
    element("label", {}, element("img", { src: picture, alt: "" }), element("span", {}, element("input", { type: "checkbox", value: number }), label)),
  );
}

/** A button that shows which frames of a video the model sees, and then these. */
export function storyboard(file) {
  const status = element("p", { role: "status" });
  const show = async () => {
    button.disabled = true;
    status.textContent = t("Choosing frames …");
    try {
      const found = await preview({ kind: file.kind, name: file.name, uri: await dataUri(file) }, recallKey());
      status.textContent = t("The model sees {0} frames in {1} groups.", found.frames, found.groups);
      button.replaceWith(element("img", { src: found.storyboard, alt: t("The frames that the model sees, with their times") }));
    } catch (error) {
      status.textContent = error.message;
      button.disabled = false;
    }
  };
  const button = element("button", { type: "button", onclick: show }, t("Show the frames that the model sees"));
  return element("div", { class: "storyboard" }, status, button);
}
