// The models of the server: which one answers, and what the page tells about it.

import { contexts, listModels } from "./api.js";
import { byId, element } from "./dom.js";
import { t } from "./language.js";
import { notice } from "./notice.js";
import { recall, recallKey, remember } from "./prefs.js";

export const shortName = (name) => name.replace(/:latest$/, "");

export class Models {
  #usualNote = byId("note").textContent;

  /** `onkey(reason)` asks the user for the key of the server. */
  constructor({ onkey }) {
    this.onkey = onkey;
    this.all = [];
    byId("model").addEventListener("change", () => this.choose(byId("model").value));
  }

  choose(name) {
    byId("model").value = name;
    remember("model", name);
    this.show();
  }

  async load() {
    try {
      this.all = await listModels(recallKey());
    } catch (error) {
      if (error.status === 401 && (await this.onkey(error.message))) return this.load();
      if (error.status) notice(error.message); // a server that is not there has its banner
      return;
    }
    const select = byId("model");
    const label = ({ name, notice: toy }) => (toy ? t("{0} (toy)", shortName(name)) : shortName(name));
    select.replaceChildren(...this.all.map((model) => element("option", { value: model.name }, label(model))));
    const wanted = recall("model");
    if (this.all.some(({ name }) => name === wanted)) select.value = wanted;
    this.show();
  }

  /** The model that answers; undefined while the server has told none. */
  get chosen() {
    return this.all.find(({ name }) => name === byId("model").value);
  }

  get thinks() {
    return this.chosen?.thinks ?? false;
  }

  /** Update what depends on the model: whether it thinks, and the notice about its answers. */
  show() {
    const warning = this.chosen?.notice ?? "";
    byId("think").hidden = !this.thinks;
    byId("toy").hidden = !warning;
    byId("note").textContent = warning || this.#usualNote;
  }

  /** Tokens that the model reads at a time; 0 while it is not loaded. */
  async contextSize() {
    const sizes = await contexts(recallKey()).catch(() => new Map());
    return sizes.get(this.chosen?.name) ?? 0;
  }
}
