// The models on the server, in a dialog: which fit its memory, and getting and deleting them.

import { deleteModel, modelFacts, pullModel } from "./api.js";
import { byId, element } from "./dom.js";
import { number, t } from "./language.js";
import { shortName } from "./models.js";
import { recallKey } from "./prefs.js";
import { confirmed } from "./settings.js";
import { say } from "./speech.js";

const GB = 1e9;
const gigabytes = (bytes) => (bytes < GB / 10 ? t("{0} MB", number(bytes / 1e6)) : t("{0} GB", number(bytes / GB, 1)));

export class ModelPage {
  #pulling = null; // AbortController

  /** `models` lists and chooses; this dialog changes what there is. */
  constructor(models) {
    this.models = models;
    byId("open-models").addEventListener("click", () => {
      byId("models").showModal();
      this.show();
    });
    byId("pull").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.#pulling) this.pull(byId("pull-name").value.trim());
    });
    byId("pull-cancel").addEventListener("click", () => this.#pulling?.abort());
  }

  async show() {
    await this.models.load();
    let facts = { models: [], offered: [], memory: null };
    try {
      facts = await modelFacts(recallKey());
    } catch (error) {
      byId("pull-trouble").textContent = error.message;
    }
    const { memory, models, offered } = facts;
    byId("memory").textContent = memory ? t("This machine has {0} of memory, of which models can have {1} now.", gigabytes(memory.total), gigabytes(memory.free)) : "";
    const known = new Map(models.map((each) => [each.name, each]));
    byId("model-list").replaceChildren(...this.models.all.map((model) => this.entry(model, known.get(model.name) ?? {}, memory)));
    byId("offered").replaceChildren(...offered.map(({ name }) => element("option", { value: name })));
    byId("pull-hint").textContent = offered.map(({ name, needs }) => t("{0} needs about {1} of memory: {2}.", name, gigabytes(needs), fitText(needs, memory))).join(" ");
  }

  entry(model, { needs, loaded, kept }, memory) {
    const isChosen = model === this.models.chosen;
    const facts = [
      model.parameters && t("{0} parameters", model.parameters),
      model.type,
      t("{0} on disk", gigabytes(model.bytes)),
      needs && t("needs about {0} of memory: {1}", gigabytes(needs), fitText(needs, memory)),
    ];
    const name = shortName(model.name);
    const use = element("button", { type: "button", class: "quiet", "aria-label": t("Use {0}", name), onclick: () => this.use(model) }, t("Use"));
    const remove = element("button", { type: "button", class: "quiet", "aria-label": t("Delete {0}", name), onclick: () => this.remove(model) }, t("Delete"));
    return element(
      "li",
      {},
      element("h3", {}, name),
      model.notice && element("span", { class: "badge bad", title: model.notice }, t("Toy")),
      loaded && element("span", { class: "badge" }, t("In memory")),
      isChosen && element("span", { class: "badge" }, t("Answers in this page")),
      element("span", { class: "space" }),
      !isChosen && use,
      kept === false && remove,
      element("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
      model.notice && element("p", { class: "facts" }, model.notice),
    );
  }

  use(model) {
    this.models.choose(model.name);
    byId("models").close("");
  }

  async remove({ name }) {
    const short = shortName(name);
    if (!(await confirmed(t("Delete “{0}”?", short), t("Its files leave the disk, unless another name needs them; it can be fetched again.")))) return;
    try {
      await deleteModel(name, recallKey());
      say(t("Deleted."));
    } catch (error) {
      byId("pull-trouble").textContent = error.message;
    }
    await this.show();
  }

  async pull(name) {
    this.#pulling = new AbortController();
    byId("pulling").hidden = false;
    byId("pull-trouble").textContent = "";
    tellStep({ status: t("Looking for {0}", name), share: null });
    try {
      let last = "";
      for await (const step of pullModel(name, recallKey(), this.#pulling.signal)) {
        tellStep(step);
        last = step.status;
      }
      if (last !== "success") throw new Error(t("The connection ended before the model was here; get it again, it goes on where it was."));
      byId("pull-name").value = "";
      say(t("{0} is here.", name));
    } catch (error) {
      byId("pull-trouble").textContent = error.name === "AbortError" ? t("Cancelled. What has arrived is kept for the next time.") : error.message;
    } finally {
      this.#pulling = null;
      byId("pulling").hidden = true;
      await this.show();
    }
  }
}

function tellStep({ status, share, done, total }) {
  const bar = byId("pull-bar");
  if (share === null) bar.removeAttribute("value");
  else bar.value = share;
  const parts = share === null ? [] : [`${Math.floor(share * 100)} %`, t("{0} of {1}", gigabytes(done), gigabytes(total))];
  byId("pull-status").textContent = [status, ...parts].join(" · ");
}

function fitText(needs, memory) {
  if (!memory) return "";
  if (needs <= memory.free) return t("fits");
  return needs <= memory.total ? t("fits once other programs are closed") : t("too large for this machine");
}
