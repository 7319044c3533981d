// A menu that a button opens: arrow keys, Home, End, Escape; focus goes back to the button.

import { h } from "./element.js";

export class Menu {
  constructor(element) {
    this.element = element;
    this.button = null;
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("toggle", (event) => {
      if (event.newState === "closed") this.button?.setAttribute("aria-expanded", "false");
    });
  }

  // items: [words, action] each; null entries are left out.
  open(button, name, items) {
    this.button = button;
    this.element.setAttribute("aria-label", name);
    this.element.replaceChildren(...items.filter(Boolean).map(([words, action]) => h("button", {
      type: "button", role: "menuitem", tabindex: "-1",
      onclick: () => {
        this.close();
        action();
      },
    }, words)));
    this.element.showPopover();
    button.setAttribute("aria-expanded", "true");
    const place = button.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const left = Math.max(8, Math.min(place.right - width, innerWidth - width - 8));
    const below = place.bottom + height + 8 < innerHeight;
    this.element.style.left = `${left}px`;
    this.element.style.top = `${Math.max(8, below ? place.bottom + 4 : place.top - height - 4)}px`;
    this.element.firstElementChild.focus({ preventScroll: true });
  }

  close() {
    this.element.hidePopover();
    if (this.button?.isConnected) this.button.focus({ preventScroll: true });
  }

  key(event) {
    const items = [...this.element.children];
    const at = items.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
    if (to !== undefined) items.at(to % items.length).focus();
    else if (event.key === "Tab" || event.key === "Escape") this.close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
