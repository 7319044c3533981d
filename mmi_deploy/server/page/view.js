// Parts of a document on the page. Elements are kept by part, so that focus and scroll stay.

import { wordsBefore } from "./document.js";
import { grow, h, icon, setAttribute, setText } from "./element.js";
import { noise } from "./pictures.js";
import { settingsLine } from "./words.js";

// Pictures up to this side are shown enlarged, with sharp pixels.
const SMALL = 256;

export const still = matchMedia("(prefers-reduced-motion: reduce)");

// Name of a part for readers, such as "Picture 2, drawn".
export function nameOf(part, parts, model, from) {
  const kind = (one) => (one.kind === "text" ? "text" : "picture");
  const before = parts.slice(0, parts.indexOf(part)).filter((one) => kind(one) === kind(part));
  const number = from[kind(part)] + before.length + 1;
  if (part.kind === "text") return `Text ${number}, ${part.by === "you" ? "yours" : `by ${model}`}`;
  if (part.kind === "picture") return `Picture ${number}, ${part.by === "you" ? "yours" : "drawn"}`;
  return `Picture ${number}, ${part.state === "drawing" ? "being drawn" : "to be drawn"}`;
}

export class PartsView {
  // handlers: {edited(part), menu(part, button), enlarge(part), again(part), copySettings(turn)}
  constructor(container, handlers) {
    this.container = container;
    this.handlers = handlers;
    this.elements = new Map(); // id -> {element, update, close}
  }

  // from: numbers of texts and pictures before these parts. shown: parts before them.
  render(parts, { document, model, side, working = null, from = { text: 0, picture: 0 },
    shown = [] }) {
    const wanted = [];
    const ends = new Map(parts.map((part) => [part.turn, part])); // last part of each turn
    parts.forEach((part, index) => {
      const name = nameOf(part, parts, model, from);
      const view = this.view(`${part.kind}-${part.id}`, () => this.make(part));
      view.update({
        part, name, side, busy: part === working,
        alt: part.kind === "picture"
          ? part.alt || wordsBefore([...shown, ...parts], shown.length + index) : "",
      });
      wanted.push(view.element);
      const turn = ends.get(part.turn) === part && document.turns[part.turn];
      if (turn && !turn.running) {
        const foot = this.view(`foot-${part.id}`, () => this.makeFoot());
        foot.update({ part, turn, model });
        wanted.push(foot.element);
      }
    });
    this.place(wanted);
  }

  view(key, make) {
    if (!this.elements.has(key)) this.elements.set(key, make());
    return this.elements.get(key);
  }

  // Bring the elements into order; what is in its place is not touched.
  place(wanted) {
    const keep = new Set(wanted);
    for (const [key, view] of this.elements) {
      if (!keep.has(view.element)) {
        view.element.remove();
        view.close?.();
        this.elements.delete(key);
      }
    }
    let next = this.container.firstElementChild;
    for (const element of wanted) {
      if (element === next) next = next.nextElementSibling;
      else this.container.insertBefore(element, next);
    }
  }

  clear() {
    this.place([]);
  }

  make(part) {
    return { text: () => this.makeText(part), picture: () => this.makePicture(part),
      draw: () => this.makeDraw(part) }[part.kind]();
  }

  frame(part, ...content) {
    const heading = h("h2", { id: `name-${part.id}`, class: "visually-hidden" });
    const more = h("button", {
      type: "button", class: "icon more", "aria-haspopup": "menu",
      onclick: () => this.handlers.menu(part, more),
    }, icon("more"));
    const element = h("article", {
      class: `part ${part.kind} by-${part.by}`, "aria-labelledby": heading.id, "data-part": part.id,
    }, heading, ...content, more);
    const update = ({ name, busy }) => {
      setText(heading, name);
      setAttribute(more, "aria-label", `More for ${name}`);
      setAttribute(element, "aria-busy", busy ? "true" : null);
      element.classList.toggle("by-model", part.by === "model");
      element.classList.toggle("by-you", part.by === "you");
    };
    return { element, heading, update };
  }

  makeText(part) {
    const area = h("textarea", {
      class: "words", rows: "1", "aria-labelledby": `name-${part.id}`, spellcheck: "false",
      oninput: () => {
        part.text = area.value;
        grow(area);
        this.handlers.edited(part);
      },
    });
    const { element, update } = this.frame(part, area);
    return {
      element,
      update: (state) => {
        update(state);
        if (area.value !== part.text) {
          area.value = part.text;
          grow(area);
        }
        area.readOnly = state.busy;
      },
    };
  }

  makePicture(part) {
    const url = URL.createObjectURL(part.blob);
    const image = h("img", { src: url, width: part.width, height: part.height, decoding: "async" });
    const enlarge = h("button", {
      type: "button", class: "enlarge", title: "Enlarge",
      onclick: () => this.handlers.enlarge(part),
    }, image);
    const kind = h("span", { class: "kind" });
    const alt = h("textarea", {
      rows: "1", id: `alt-${part.id}`,
      oninput: () => {
        part.alt = alt.value.replace(/\n/g, " ");
        grow(alt);
        this.handlers.edited(part);
      },
    });
    const label = h("label", { for: alt.id }, "Alt text");
    const figure = h("figure", { class: Math.max(part.width, part.height) <= SMALL ? "small" : null },
      enlarge, h("figcaption", {}, kind, label, alt));
    figure.style.setProperty("--ratio", part.width / part.height);
    figure.style.setProperty("--side", `${part.width}px`);
    const { element, update } = this.frame(part, figure);
    return {
      element,
      close: () => URL.revokeObjectURL(url),
      update: (state) => {
        update(state);
        const size = `${part.width} × ${part.height}`;
        setText(kind, `${state.name.split(",")[0]} · ${part.by === "you" ? "yours" : "drawn"} · ${size}`);
        setAttribute(image, "alt", state.alt || state.name);
        if (alt.value !== part.alt) {
          alt.value = part.alt;
          grow(alt);
        }
        setAttribute(alt, "placeholder",
          state.alt && !part.alt ? state.alt : "Say what it shows, for those who do not see it");
        element.classList.toggle("without-alt", !part.alt && part.by === "you");
      },
    };
  }

  makeDraw(part) {
    const canvas = h("canvas", { width: "32", height: "32", "aria-hidden": "true" });
    const image = h("img", { alt: "", hidden: true });
    const words = h("span", { class: "kind", "aria-hidden": "true" });
    const hint = h("span", { class: "hint" });
    const bar = h("progress", { max: "1", value: "0" });
    const figure = h("figure", {}, h("div", { class: "frame" }, canvas, image),
      h("figcaption", {}, words, bar, hint));
    figure.style.setProperty("--ratio", 1);
    const { element, update } = this.frame(part, figure);
    let timer = 0;
    let seen = null;
    let url = "";
    const close = () => {
      clearInterval(timer);
      URL.revokeObjectURL(url);
      timer = 0;
    };
    return {
      element,
      close,
      update: (state) => {
        update(state);
        const drawing = part.state === "drawing";
        const done = part.steps ? part.step / part.steps : 0;
        setAttribute(element, "data-state", part.state);
        setAttribute(element, "aria-busy", drawing ? "true" : null);
        setText(words, `${state.name.split(",")[0]} · ${
          { drawing: part.steps ? `step ${part.step} of ${part.steps}` : "drawing",
            stopped: `stopped${part.steps ? ` at step ${part.step} of ${part.steps}` : ""}`,
            open: "to be drawn" }[part.state]}`);
        setText(hint, drawing ? "" : part.state === "open" ? "The model draws a picture here."
          : "It is drawn anew when the model writes again.");
        setAttribute(bar, "aria-label", `Drawing ${state.name.split(",")[0].toLowerCase()}`);
        bar.hidden = !drawing;
        bar.value = done;
        figure.classList.toggle("small", state.side <= SMALL);
        figure.style.setProperty("--side", `${state.side}px`);
        // The noise fades as the picture comes out of it.
        canvas.style.opacity = part.preview ? String(1 - 0.85 * done) : drawing ? "1" : "0";
        if (drawing && !timer) {
          noise(canvas);
          timer = setInterval(() => still.matches || noise(canvas), 90);
        } else if (!drawing && timer) {
          clearInterval(timer);
          timer = 0;
        }
        const due = part.preview && part.preview !== seen;
        if (due && !(still.matches && seen && done < 1)) { // still: start, middle, end
          seen = part.preview;
          URL.revokeObjectURL(url);
          url = URL.createObjectURL(part.preview);
          image.src = url;
        }
        image.hidden = !part.preview;
      },
    };
  }

  makeFoot() {
    let now = {};
    const words = h("p");
    const copy = h("button", { type: "button", onclick: () => this.handlers.copySettings(now.turn) },
      icon("copy"), h("span", {}, "Copy settings"));
    const again = h("button", { type: "button", onclick: () => this.handlers.again(now.part) },
      icon("seed"), h("span", {}, "Another seed"));
    return {
      element: h("div", { class: "foot" }, words, h("div", { class: "foot-tools" }, again, copy)),
      update: (state) => {
        now = state;
        const seconds = state.turn.seconds ? ` · ${state.turn.seconds.toFixed(1)} s` : "";
        setText(words, `${state.turn.model || state.model} · ${settingsLine(state.turn)}${seconds}`);
      },
    };
  }
}
