// One turn of the model: events of /v1/responses change the parts of a document.

import { draw, text, wordsBefore } from "./document.js";
import { fromBase64 } from "./pictures.js";

export class Turn {
  // parts: the list that grows. id: of the turn. before: parts that come before the list.
  constructor(parts, id, before = []) {
    this.parts = parts;
    this.before = before;
    this.places = this.all().filter((part) => part.kind === "draw"); // as they are in the request
    this.id = id;
    this.items = new Map(); // output_index -> part
    this.ended = false; // the last event has come
    this.reason = "";
    this.seed = null;
    this.seconds = null;
    this.place = null; // in the queue
    this.error = null;
    this.now = null; // the part that is being made
  }

  // Returns {part, source} when a picture is whole; source: {url} or {base64, type}.
  apply(event) {
    switch (event.type) {
      case "response.queued":
        this.place = event.response?.mmi ?? event.mmi ?? null;
        break;
      case "response.created":
      case "response.in_progress":
        this.place = null;
        this.seed = event.response?.mmi?.seed ?? this.seed;
        break;
      case "response.output_item.added":
        if (event.item.type === "image_generation_call") {
          this.begin(event.output_index, event.item.mmi?.place);
        }
        break;
      case "response.output_text.delta":
        this.write(event.output_index, event.delta);
        break;
      case "response.image_generation_call.generating": {
        const part = this.begin(event.output_index);
        part.step = event.mmi?.step ?? part.step;
        part.steps = event.mmi?.steps ?? part.steps;
        break;
      }
      case "response.image_generation_call.partial_image":
        this.begin(event.output_index).preview = fromBase64(
          event.partial_image_b64, `image/${event.output_format || "png"}`);
        break;
      case "response.output_item.done":
        if (event.item.type === "image_generation_call") return this.whole(event);
        break;
      case "response.completed":
      case "response.incomplete":
      case "response.failed":
        this.end(event);
        break;
      case "error":
        this.error = event.error ?? event;
        this.ended = true;
        break;
      default:
        if (event.error) {
          this.error = event.error;
          this.ended = true;
        }
    }
    return null;
  }

  all() {
    return [...this.before, ...this.parts];
  }

  write(index, delta) {
    let part = this.items.get(index);
    if (!part) {
      part = text("", { by: "model", turn: this.id });
      this.items.set(index, part);
      this.parts.push(part);
    }
    // Space before the first word joins it to the text before, and is not shown.
    if (!part.text) part.lead = (part.lead ?? "") + /^\s*/.exec(delta)[0];
    part.text += part.text ? delta : delta.trimStart();
    this.now = part;
  }

  // The part of a picture: a place that the request asked to be drawn, or a new one at the end.
  begin(index, place = null) {
    let part = this.items.get(index);
    if (!part) {
      part = this.places[place ?? -1];
      if (part) part.place = true;
      else {
        part = draw({ by: "model" });
        this.parts.push(part);
      }
      Object.assign(part, { state: "drawing", turn: this.id, step: 0, steps: 0, preview: null });
      this.items.set(index, part);
    }
    this.now = part;
    return part;
  }

  whole(event) {
    const part = this.begin(event.output_index);
    const { result, output_format: format, mmi } = event.item;
    part.step = part.steps;
    part.seed = mmi?.seed;
    const type = `image/${format || "png"}`;
    if (result) return { part, source: { base64: result, type } };
    return mmi?.url ? { part, source: { url: mmi.url } } : null;
  }

  end(event) {
    const { response } = event;
    this.ended = true;
    this.reason = response?.mmi?.reason ?? response?.incomplete_details?.reason ?? "";
    this.seed = response?.mmi?.seed ?? this.seed;
    const { error } = response ?? {};
    this.error = error ? { ...error, code: error.mmi?.code ?? error.code } : null;
  }

  // A drawn picture takes the place of its frame.
  finish(part, blob, width, height) {
    const all = this.all();
    const alt = wordsBefore(all, all.indexOf(part));
    Object.assign(part, { kind: "picture", by: "model", blob, width, height, alt, preview: null });
    if (this.now === part) this.now = null;
  }

  // Unfinished pictures become places to draw, with what was seen of them.
  stop() {
    for (const part of this.items.values()) {
      if (part.kind === "draw" && part.state === "drawing") {
        part.state = "stopped";
      }
    }
    this.now = null;
  }
}
