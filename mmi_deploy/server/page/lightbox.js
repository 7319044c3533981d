// A picture in the size of the window, and its neighbours.

import { pictureNames } from "./document.js";
import { byId, download, setText } from "./element.js";

export class Lightbox {
  constructor() {
    this.panel = byId("picture-panel");
    this.parts = [];
    this.at = 0;
    this.url = "";
    byId("large-back").addEventListener("click", () => this.show(this.at - 1));
    byId("large-forward").addEventListener("click", () => this.show(this.at + 1));
    byId("large-save").addEventListener("click", () => {
      const part = this.parts[this.at];
      download(part.blob, pictureNames(this.parts).get(part));
    });
    this.panel.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.show(this.at - 1);
      if (event.key === "ArrowRight") this.show(this.at + 1);
    });
    this.panel.addEventListener("close", () => URL.revokeObjectURL(this.url));
  }

  open(part, parts) {
    this.parts = parts.filter((one) => one.kind === "picture");
    this.show(this.parts.indexOf(part));
    this.panel.showModal();
  }

  show(at) {
    if (at < 0 || at >= this.parts.length) return;
    const part = this.parts[at];
    this.at = at;
    URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(part.blob);
    const image = byId("large");
    image.src = this.url;
    image.alt = part.alt || `picture ${at + 1}`;
    image.classList.toggle("small", Math.max(part.width, part.height) <= 256);
    setText(byId("large-words"), `${at + 1} of ${this.parts.length}${part.alt ? ` · ${part.alt}` : ""}`);
    byId("large-back").disabled = at === 0;
    byId("large-forward").disabled = at === this.parts.length - 1;
  }
}
