// The document: parts in reading order, and what can be done with them. No DOM, no network.
//
// A part is one of
//   {kind: "text", text, lead}; lead: space between it and a text before it, if the model made it
//   {kind: "picture", blob, width, height, alt}
//   {kind: "draw", state: "open" | "drawing" | "stopped", step, steps, preview}: a place to draw
// and has an `id`, `by` ("you" or "model"), and if the model made it, `turn`, the id of the turn.
// `place` says that a drawn picture fills a place that the writer asked for.

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID needs a secure context
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function text(words = "", more = {}) {
  return { id: newId(), kind: "text", by: "you", text: words, ...more };
}

export function picture(blob, width, height, more = {}) {
  return { id: newId(), kind: "picture", by: "you", blob, width, height, alt: "", ...more };
}

export function draw(more = {}) {
  return { id: newId(), kind: "draw", by: "you", state: "open", step: 0, steps: 0, ...more };
}

// `family` and `version` group the forks of one document; `turns` holds the settings of each turn;
// `draft` is what stands in the field at the end, and `takes` are two endings that are compared,
// each {parts}; then `parts` is what they have in common.
export function newDocument(more = {}) {
  const id = newId();
  return {
    id, family: id, version: 1, title: "", parts: [], draft: "", turns: {}, takes: null,
    updated: 0, ...more,
  };
}

// All parts, the draft and the kept ending included.
export function allParts(document, take = 0) {
  const end = document.takes ? document.takes[take].parts : [];
  const draft = document.draft.trim() ? [text(document.draft)] : [];
  return [...document.parts, ...end, ...draft];
}

// The draft becomes a part.
export function commitDraft(document) {
  if (document.draft.trim()) document.parts.push(text(document.draft.trim()));
  document.draft = "";
}

export function isBlank(part) {
  return part.kind === "text" && !part.text.trim();
}

export function isEmpty(document) {
  return document.parts.every(isBlank) && !document.takes && !document.draft.trim();
}

// Title, or the first words.
export function titleOf(document) {
  if (document.title.trim()) return document.title.trim();
  const first = allParts(document).find((part) => part.kind === "text" && part.text.trim());
  const line = first ? first.text.trim().split("\n")[0] : "";
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line || "Untitled";
}

export function insertAfter(parts, id, ...added) {
  const at = parts.findIndex((part) => part.id === id);
  parts.splice(at < 0 ? parts.length : at + 1, 0, ...added);
}

export function remove(parts, id) {
  const at = parts.findIndex((part) => part.id === id);
  if (at >= 0) parts.splice(at, 1);
}

// Move a part one place up (-1) or down (+1); false at the border.
export function move(parts, id, by) {
  const from = parts.findIndex((part) => part.id === id);
  const to = from + by;
  if (from < 0 || to < 0 || to >= parts.length) return false;
  parts.splice(to, 0, parts.splice(from, 1)[0]);
  return true;
}

// Put `added` at the caret of a text: the text is cut in two where it has words on both sides.
export function insertAt(parts, id, caret, ...added) {
  const part = parts.find((one) => one.id === id);
  if (!part || part.kind !== "text") return insertAfter(parts, id, ...added);
  const [before, after] = [part.text.slice(0, caret), part.text.slice(caret)];
  if (!after.trim()) return insertAfter(parts, id, ...added);
  if (!before.trim()) {
    parts.splice(parts.indexOf(part), 0, ...added);
    return undefined;
  }
  part.text = before.trimEnd();
  return insertAfter(parts, id, ...added, text(after.trimStart(), { by: part.by, turn: part.turn }));
}

// The tail from index `at` as it was before the turn that made its first part: pictures in places
// that the writer asked for become places again, what the model added goes.
export function before(tail, turn) {
  const kept = [];
  for (const part of tail) {
    if (part.turn !== turn) kept.push(part);
    else if (part.place) kept.push(draw());
  }
  return kept;
}

export function copy(part) {
  return { ...part, id: newId() };
}

// What is sent and saved: blank texts left out, neighbouring texts joined. What the model writes
// continues the text before it; a text of the writer's after another one is a new paragraph.
export function blocks(parts) {
  const joined = [];
  for (const part of parts) {
    const last = joined.at(-1);
    if (isBlank(part)) continue;
    if (part.kind === "text" && last?.kind === "text") {
      const apart = part.by === "you" && !/\s$/.test(last.text) && !/^\s/.test(part.text);
      last.text += (apart ? "\n\n" : part.lead ?? "") + part.text;
    } else if (part.kind === "text") {
      joined.push({ kind: "text", text: part.text });
    } else {
      joined.push(part);
    }
  }
  return joined;
}

// Names of the pictures, as `mmi generate` gives them: picture-01.png, ...
export function pictureNames(parts) {
  const names = new Map();
  for (const part of parts) {
    if (part.kind === "picture") {
      const suffix = { "image/jpeg": "jpg", "image/webp": "webp" }[part.blob.type] || "png";
      names.set(part, `picture-${String(names.size + 1).padStart(2, "0")}.${suffix}`);
    }
  }
  return names;
}

// Alternative text of a drawn picture: the last line before it.
export function wordsBefore(parts, index) {
  let at = index - 1;
  while (at > 0 && isBlank(parts[at])) at -= 1;
  const words = parts[at]?.kind === "text" ? parts[at].text : "";
  const line = words.trim().split("\n").at(-1).trim().replace(/\s+/g, " ");
  return line.length > 120 ? `…${line.slice(-119).trimStart()}` : line;
}

export function count(parts) {
  const words = parts
    .filter((part) => part.kind === "text")
    .reduce((sum, part) => sum + (part.text.match(/\S+/g) || []).length, 0);
  return { words, pictures: parts.filter((part) => part.kind === "picture").length };
}
