// Where a question is composed: text, and files by drop, paste, file dialog or camera. Passes on
// `{text, files, edits}`.

import { ACCEPT, attachmentOf, filesIn, tile } from "./attachments.js";
import { hasCamera, takePicture } from "./camera.js";
import { choosePages } from "./documents.js";
import { byId } from "./dom.js";
import { t } from "./language.js";
import { enlarge } from "./settings.js";
import { say } from "./speech.js";

export class Composer {
  /** Calls `onsend({text, files, edits})` for a question, `edits` being the one that it replaces, if any; and `onstop()` for the button while an answer runs. */
  constructor({ onsend, onstop, onnotice }) {
    Object.assign(this, { onsend, onstop, onnotice });
    this.files = [];
    this.edits = null;
    this.running = false;
    this.text = byId("question");
    this.send = byId("send");
    this.listen();
    this.update();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.onstop();
      else this.submit();
    });
    this.text.addEventListener("input", () => this.update());
    this.text.addEventListener("keydown", (event) => {
      // While a Japanese or Chinese word is being typed, Enter belongs to the input method.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) this.submit();
    });
    byId("stop-editing").addEventListener("click", () => this.stopEditing());
    const picker = byId("files");
    picker.accept = ACCEPT;
    byId("attach").addEventListener("click", () => picker.click());
    picker.addEventListener("change", () => {
      this.add([...picker.files]);
      picker.value = ""; // so that the same file can be chosen again
    });
    this.listenToCamera();
    this.listenToDrops();
    document.addEventListener("paste", (event) => {
      const files = filesIn(event.clipboardData);
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
  }

  listenToCamera() {
    const phone = matchMedia("(pointer: coarse)").matches;
    const capture = byId("capture");
    byId("take").hidden = !phone && !hasCamera();
    byId("take").addEventListener("click", async () => {
      if (phone) return capture.click(); // the phone's own camera app: zoom, flash, focus
      const file = await takePicture();
      if (file) this.add([file]);
      this.text.focus();
    });
    capture.addEventListener("change", () => {
      this.add([...capture.files]);
      capture.value = "";
    });
  }

  listenToDrops() {
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    let depth = 0; // a child is entered before its parent is left
    const show = (change) => {
      depth = Math.max(0, depth + change);
      document.body.classList.toggle("dropping", depth > 0);
    };
    addEventListener("dragenter", (event) => carriesFiles(event) && show(1));
    addEventListener("dragleave", (event) => carriesFiles(event) && show(-1));
    addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      show(-depth);
      this.add(filesIn(event.dataTransfer));
    });
  }

  add(files) {
    for (const file of files) {
      const attachment = attachmentOf(file);
      if (attachment) this.files.push(attachment);
      else this.onnotice(t("{0} is neither a picture, a video nor a PDF, so it cannot be asked about.", file.name));
    }
    if (this.files.length) say(t("{0} attached", this.files.length));
    this.update();
    this.text.focus();
  }

  submit() {
    const text = this.text.value.trim();
    if (!text && !this.files.length) return;
    const question = { text: text || t("What is in this?"), files: this.files, edits: this.edits };
    this.put({ text: "", files: [] });
    this.onsend(question);
  }

  /** Put a question into the composer, to be edited or sent. */
  put({ text, files, edits = null }) {
    this.text.value = text;
    this.files = files;
    this.edits = edits;
    this.update();
  }

  /** Leave a question as it was. */
  stopEditing() {
    if (!this.edits) return;
    this.put({ text: "", files: [] });
    this.text.focus();
  }

  setRunning(running) {
    this.running = running;
    this.update();
  }

  update() {
    byId("attached").replaceChildren(...this.files.map((file) => tile(file, { onremove: () => this.remove(file), onopen: () => this.open(file) })));
    byId("attached").hidden = !this.files.length;
    byId("editing").hidden = !this.edits;
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, 200)}px`;
    this.send.classList.toggle("stop", this.running);
    this.send.setAttribute("aria-label", this.running ? t("Stop the answer") : t("Send"));
    this.send.title = this.running ? t("Stop (Esc)") : t("Send (Enter)");
    this.send.disabled = !this.running && !this.text.value.trim() && !this.files.length;
  }

  /** Choose pages of a document, or look at a picture or a video as large as the window. */
  async open(file) {
    if (file.kind !== "pdf") return enlarge(file);
    const chosen = await choosePages(file);
    if (!chosen) return;
    this.files = this.files.map((other) => (other === file ? chosen : other));
    this.update();
  }

  remove(file) {
    this.files = this.files.filter((other) => other !== file);
    this.update();
    this.text.focus();
  }
}
