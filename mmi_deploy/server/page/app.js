// The page: connects the document, its view, the server and the controls.

import {
  allParts, before, commitDraft, copy, draw, insertAfter, insertAt, isEmpty, move, newId, picture,
  pictureNames, remove, text, titleOf,
} from "./document.js";
import { byId, copyText, download, grow, h, icon, setText } from "./element.js";
import { example } from "./examples.js";
import { FileError, open as openFiles, save as saveFiles } from "./files.js";
import { Library } from "./library.js";
import { Lightbox } from "./lightbox.js";
import { Menu } from "./menu.js";
import { Options, settingsPanel } from "./options.js";
import { PictureError, readPicture } from "./pictures.js";
import { curl, python } from "./request.js";
import { Run } from "./run.js";
import { key, readiness, servedModel } from "./server.js";
import { Store } from "./store.js";
import { nameOf, PartsView, still } from "./view.js";
import { drawing, ending, errorWords, plural, READINESS, settingsLine } from "./words.js";

const SAY_EVERY = 5000; // milliseconds between two words about progress
const ASK_EVERY = 10_000; // milliseconds between two looks at a server that is not ready

let model = {
  name: "the model", samplers: [], side: 64, pictures: null, tokens: null, previews: true, keepAlive: 15,
  picture: { bytes: 20 * 2 ** 20, pixels: 64e6 },
};
let ready = "starting";
let run = null;
let wentAt = 0;
let said = { words: "", at: 0 };
let again = null; // repeats what failed
let looked = null; // the first look at the server
let frame = 0;

const options = new Options();
const library = new Library(await Store.open(), () => note(
  "This browser does not keep documents. Save all before you leave the page."));
const lightbox = new Lightbox();
const menu = new Menu(byId("menu"));
const draft = byId("draft");
const handlers = {
  edited: () => changed({ render: false }),
  menu: partMenu,
  enlarge: (part) => lightbox.open(part, shownParts()),
  again: otherSeed,
  copySettings: async (turn) => {
    await copyText(`${turn.model} · ${settingsLine(turn, { all: true })}`);
    say("Settings copied.");
  },
};
const view = new PartsView(byId("parts"), handlers);
const takeViews = new Map(); // take -> {element, view}

// ---- what is shown -----------------------------------------------------------------------------

function render() {
  frame = 0;
  const { document } = library;
  const atEnd = innerHeight + scrollY > documentHeight() - 80;
  const working = run?.state.now ?? null;
  const about = { document, model: model.name, side: model.side, working };
  view.render(document.parts, about);
  renderTakes(about);
  byId("composer").hidden = Boolean(document.takes);
  byId("examples").hidden = !isEmpty(document) || Boolean(run);
  byId("main").classList.toggle("empty", isEmpty(document) && !run);
  renderBar();
  if (run && atEnd) scrollTo({ top: documentHeight(), behavior: "instant" });
}

const documentHeight = () => window.document.documentElement.scrollHeight;

function renderTakes(about) {
  const { takes, parts } = about.document;
  const container = byId("takes");
  container.hidden = !takes;
  for (const [take, { element }] of takeViews) {
    if (!takes?.includes(take)) {
      element.remove();
      takeViews.delete(take);
    }
  }
  takes?.forEach((take, index) => {
    if (!takeViews.has(take)) {
      const words = h("h2", {});
      const keep = h("button", { type: "button", onclick: () => keepTake(take) }, "Keep this one");
      const list = h("div", { class: "parts" });
      const element = h("section", { class: "take" }, h("header", {}, words, keep), list);
      takeViews.set(take, { element, words, keep, view: new PartsView(list, handlers) });
      container.append(element);
    }
    const shown = takeViews.get(take);
    const seed = about.document.turns[take.turn]?.seed;
    setText(shown.words, seed === undefined ? `Ending ${index + 1}` : `Seed ${seed}`);
    shown.keep.disabled = Boolean(run);
    shown.view.render(take.parts, {
      ...about, shown: parts,
      from: {
        text: parts.filter((part) => part.kind === "text").length,
        picture: parts.filter((part) => part.kind !== "text").length,
      },
    });
  });
}

function renderBar() {
  setText(byId("go-words"), run ? "Stop" : "Write");
  setText(byId("go-key"), run ? "Esc" : "Ctrl ↵");
  byId("go").classList.toggle("stop", Boolean(run));
  byId("go").closest(".bar").classList.toggle("running", Boolean(run));
  byId("go").disabled = Boolean(library.document.takes) && !run;
  setText(byId("settings-words"), options.summary());
  byId("settings").title = "Settings";
  setText(byId("progress-words"), run ? progressWords() : "");
  const part = run?.state.now;
  const done = part?.kind === "draw" && part.steps ? part.step / part.steps : 0;
  byId("progress").classList.toggle("busy", Boolean(run));
  byId("progress").firstElementChild.style.transform = `scaleX(${done})`;
  setText(byId("state-words"), `${model.name} · ${READINESS[ready]}`);
  byId("state").dataset.state = ready;
}

function pictureNumber(part) {
  return shownParts().filter((one) => one.kind !== "text").indexOf(part) + 1;
}

function progressWords() {
  const { state } = run;
  const part = state.now;
  if (state.place) {
    const { place, seconds } = state.place;
    return `place ${place} in the queue${seconds ? `, about ${plural(Math.ceil(seconds), "second")}` : ""}`;
  }
  if (part?.kind === "draw") {
    const step = part.steps ? ` · step ${part.step} of ${part.steps}` : "";
    return `picture ${pictureNumber(part)}${step}`;
  }
  if (part) return "writing";
  if (state.items.size) return "reading";
  const seconds = Math.round((performance.now() - run.started) / 1000);
  const others = run.others ? ` · ${plural(run.others, "document")} at the server` : "";
  return seconds > 1 ? `waiting, ${plural(seconds, "second")}${others}` : "waiting";
}

// Progress for screen readers: a change of what is made at once, steps at most every 5 seconds.
function sayProgress() {
  const { state } = run;
  const part = state.now;
  let words = "Waiting for the server.";
  if (state.place) words = `${progressWords()[0].toUpperCase()}${progressWords().slice(1)}.`;
  else if (part?.kind === "draw") words = drawing(pictureNumber(part), part.step, part.steps);
  else if (part) words = "Writing.";
  else if (state.items.size) return;
  const due = performance.now() - said.at >= SAY_EVERY;
  if (words !== said.words && due) say(words);
}

function say(words) {
  said = { words, at: performance.now() };
  setText(byId("status"), words);
}

function note(words) {
  byId("note").hidden = !words;
  setText(byId("note").firstElementChild, words);
  if (words) say(words);
}

function changed({ render: all = true } = {}) {
  library.changed();
  if (all && !frame) frame = requestAnimationFrame(render);
  if (!all) {
    byId("examples").hidden = !isEmpty(library.document) || Boolean(run);
    byId("main").classList.toggle("empty", isEmpty(library.document) && !run);
  }
}

// Shows the whole document anew, after another one was opened.
async function show() {
  const { document } = library;
  view.clear();
  byId("title").value = document.title;
  draft.value = document.draft;
  alertOf(null);
  render();
  grow(draft);
  await showVersions();
}

async function showVersions() {
  const versions = await library.versions();
  const at = versions.findIndex((one) => one.id === library.document.id);
  byId("versions").hidden = versions.length < 2 || at < 0;
  setText(byId("version-words"), `Version ${at + 1} of ${versions.length}`);
  byId("version-back").disabled = at <= 0;
  byId("version-forward").disabled = at === versions.length - 1;
  window.document.title = `${titleOf(library.document)} · mmi`;
  setText(byId("heading"), titleOf(library.document));
}

function shownParts() {
  const { document } = library;
  return [...document.parts, ...(document.takes ?? []).flatMap((take) => take.parts)];
}

// The list that holds a part.
function listOf(part) {
  const { document } = library;
  const lists = [document.parts, ...(document.takes ?? []).map((take) => take.parts)];
  return lists.find((list) => list.includes(part)) ?? document.parts;
}

// ---- errors ------------------------------------------------------------------------------------

function alertOf(error, actions = []) {
  const place = byId("alert");
  place.replaceChildren();
  if (!error) return;
  const { title, text: words } = errorWords(error);
  place.append(h("div", { class: "error" },
    h("div", {}, h("p", {}, h("strong", {}, `${title}.`), h("span", {}, ` ${words}`)),
      error.requestId ? h("p", { class: "quiet" }, `Request ${error.requestId}`) : null),
    h("div", { class: "error-tools" }, ...actions.map(([name, action]) => h(
      "button", { type: "button", onclick: action }, name)))));
}

// A click on a button that goes away leaves the focus at the writing field.
function retry() {
  alertOf(null);
  draft.focus({ preventScroll: true });
  again?.();
}

// ---- writing -----------------------------------------------------------------------------------

async function write() {
  const { document } = library;
  if (document.takes) return say("Keep one of the two endings first.");
  if (isEmpty(document)) {
    draft.focus();
    return say("Write something first, or add a picture.");
  }
  commitDraft(document);
  draft.value = "";
  grow(draft);
  return generate(document.parts, [], write);
}

// Previews of each picture: with little motion one, in the middle.
function previews() {
  if (!model.previews) return 0;
  return still.matches ? 1 : 3;
}

// Let the model go on after `parts`, into `parts`. `repeat` is what "Try again" does.
async function generate(parts, prefix, repeat, more = {}) {
  await looked; // samplers and limits of the model belong into the request
  if (run) return;
  const { document } = library;
  const chosen = { ...options.forTurn(model, previews()), ...more };
  const turn = { id: newId(), model: model.name, running: true, ...chosen };
  document.turns[turn.id] = turn;
  const take = document.takes?.find((one) => one.parts === parts);
  if (take) take.turn = turn.id;
  again = repeat;
  alertOf(null);
  note("");
  let silent = false;
  run = new Run({
    model: model.name, parts, before: prefix, turn, keepAlive: model.keepAlive,
    changed: (whole) => {
      if (whole) say(`Picture ${pictureNumber(whole)} finished.`);
      else if (run) sayProgress();
      changed();
    },
    silent: (seconds) => {
      if (seconds === null && silent) alertOf(null);
      if (seconds !== null && !silent) {
        alertOf({ code: "silent", seconds, requestId: run.requestId }, [["Stop", stop]]);
      }
      silent = seconds !== null;
    },
  });
  wentAt = performance.now();
  said = { words: "", at: 0 };
  sayProgress();
  changed();
  const mine = run;
  const failure = await mine.go();
  turn.running = false;
  run = null;
  if (failure) await fail(failure, mine);
  else say(ending(mine.made(), mine.state.reason, mine.stopped));
  changed();
  await library.save(document);
  await showVersions();
}

async function fail(failure, failed) {
  say("");
  if (failure.status === 401) return askForKey(again);
  const fixed = [400, 404, 413, 422].includes(failure.status); // the same again fails again
  const name = failed.state.items.size ? "Go on" : "Try again";
  alertOf(failure, fixed ? [] : [[name, retry]]);
  if (failure.status === 0 || failure.status >= 500) await look();
  return undefined;
}

function stop() {
  run?.stop();
}

function askForKey(then) {
  const panel = byId("key-panel");
  byId("key").value = "";
  panel.returnValue = "";
  panel.addEventListener("close", async () => {
    if (panel.returnValue !== "use") {
      alertOf({ status: 401 }, [["Give a key", () => askForKey(then)]]);
      return;
    }
    key.set(byId("key").value);
    byId("key").value = "";
    alertOf(null);
    if (await look()) then?.();
  }, { once: true });
  if (!panel.open) panel.showModal();
}

// The document up to a part becomes a version of its own, and the model goes on from there.
async function continueFrom(part) {
  const { document } = library;
  const list = listOf(part);
  const kept = [...(list === document.parts ? [] : document.parts),
    ...list.slice(0, list.indexOf(part) + 1)];
  await library.save();
  const fork = await library.fork(kept.map(copy));
  const { version } = document;
  await library.switchTo(fork);
  await show();
  note(`This is a new version. Version ${version} is kept as it was.`);
  await generate(fork.parts, [], write);
}

// The ending from a part on, and beside it another one with another seed.
async function otherSeed(part) {
  const { document } = library;
  if (run) return;
  let list = listOf(part);
  if (list !== document.parts) { // the other ending makes place, and is kept as a version
    const take = document.takes.find((one) => one.parts === list);
    await keepTake(take);
    list = document.parts;
  }
  const at = list.findIndex((one) => one.turn === part.turn);
  const tail = list.splice(at);
  commitDraft(document);
  draft.value = "";
  const other = before(tail, part.turn).map(copy);
  document.takes = [{ parts: tail, turn: part.turn }, { parts: other, turn: null }];
  // The seed of the settings, unless this turn had it: then the next one.
  const { seed: had } = document.turns[part.turn];
  const seed = Number(options.values.seed || "NaN") === had ? { seed: had + 1 } : {};
  const go = () => generate(other, document.parts, go, seed);
  changed();
  await go();
}

async function keepTake(take) {
  const { document } = library;
  const other = document.takes.find((one) => one !== take);
  if (other.parts.length) {
    await library.save(await library.fork([...document.parts, ...other.parts].map(copy)));
  }
  document.parts.push(...take.parts);
  document.takes = null;
  changed();
  await library.save();
  await showVersions();
  draft.focus({ preventScroll: true });
  say("Kept. The other ending is a version of its own.");
}

// ---- editing -----------------------------------------------------------------------------------

function partMenu(part, button) {
  const list = listOf(part);
  const at = list.indexOf(part);
  const focus = (id) => {
    render();
    window.document.querySelector(`[data-part="${id}"] :is(textarea, .more)`)?.focus();
  };
  const busy = part.turn && library.document.turns[part.turn]?.running;
  const shift = (by) => () => {
    if (move(list, part.id, by)) say(`Moved ${by < 0 ? "up" : "down"}.`);
    changed();
    render();
  };
  menu.open(button, nameOf(part, list, model.name, { text: 0, picture: 0 }), [
    !run && ["Continue from here", () => continueFrom(part)],
    !run && part.turn && ["Another seed", () => otherSeed(part)],
    part.kind === "picture" && ["Download", () => download(
      part.blob, pictureNames(shownParts()).get(part))],
    at > 0 && ["Move up", shift(-1)],
    at < list.length - 1 && ["Move down", shift(1)],
    ["Text after this", () => {
      const added = text();
      insertAfter(list, part.id, added);
      changed();
      focus(added.id);
    }],
    ["Picture after this", () => choosePictures((files) => addPictures(files, { list, after: part.id }))],
    ["Draw after this", () => {
      insertAfter(list, part.id, draw());
      changed();
    }],
    !busy && ["Remove", () => {
      const name = nameOf(part, list, model.name, { text: 0, picture: 0 });
      const next = list[at + 1] ?? list[at - 1];
      remove(list, part.id);
      changed();
      undoable(`${name.split(",")[0]} removed.`, () => list.splice(Math.min(at, list.length), 0, part));
      if (next) focus(next.id);
      else draft.focus();
    }],
  ]);
}

function undoable(words, undo) {
  note(words);
  const button = h("button", { type: "button", onclick: () => {
    undo();
    note("");
    changed();
    render();
  } }, "Undo");
  byId("note").firstElementChild.append(" ", button);
}

// Pictures go after a part of a list, to the caret of a text, or to the end.
async function addPictures(files, { list, after, at } = {}) {
  const { document } = library;
  const notes = [];
  const added = [];
  for (const file of files) {
    try {
      const { blob, width, height, note: words } = await readPicture(file, model.picture);
      added.push(picture(blob, width, height));
      if (words) notes.push(words);
    } catch (error) {
      if (!(error instanceof PictureError)) throw error;
      notes.push(error.message);
    }
  }
  if (added.length) {
    if (list && at !== undefined) insertAt(list, after, at, ...added);
    else if (list) insertAfter(list, after, ...added);
    else {
      const [start, end] = [draft.value.slice(0, at ?? draft.value.length),
        draft.value.slice(at ?? draft.value.length)];
      document.draft = start;
      commitDraft(document);
      document.parts.push(...added);
      document.draft = end.trimStart();
      draft.value = document.draft;
      grow(draft);
    }
    say(`${plural(added.length, "picture")} added.`);
  }
  if (notes.length) note(notes.join(" "));
  changed();
}

let chosenFor = addPictures;
function choosePictures(then = addPictures) {
  chosenFor = then;
  byId("picture-files").click();
}

function imagesOf(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

// The place of a text that has the focus: {list, after, at}; {at} for the writing field.
function caretOf(target) {
  if (target === draft) return { at: draft.selectionStart };
  const id = target.closest?.("[data-part]")?.dataset.part;
  const part = shownParts().find((one) => one.id === id);
  if (!part) return {};
  const words = target.classList.contains("words");
  return { list: listOf(part), after: id, at: words ? target.selectionStart : undefined };
}

async function openChosen(files) {
  stop();
  try {
    const { document, notes } = await openFiles(files, model.picture);
    await library.switchTo(document);
    await show();
    note(notes.join(" "));
    say(`${titleOf(document)} opened.`);
  } catch (error) {
    if (error instanceof FileError || error instanceof PictureError) note(error.message);
    else throw error;
  }
}

// ---- the server --------------------------------------------------------------------------------

// Look at the server; false if it needs a key.
async function look() {
  ready = (await readiness()).state;
  if (ready === "ready" || ready === "draining") {
    try {
      model = await servedModel();
    } catch (error) {
      if (error.status === 401) {
        renderBar();
        askForKey(again);
        return false;
      }
    }
  }
  if (library.document) render();
  return true;
}

async function watch() {
  if (ready !== "ready" && !run && !window.document.hidden) await look();
  setTimeout(watch, ASK_EVERY);
}

// ---- controls ----------------------------------------------------------------------------------

const on = (id, event, action) => byId(id).addEventListener(event, action);

on("go", "click", () => {
  if (!run) write();
  else if (performance.now() - wentAt > 500) stop(); // the second half of a double click
});
on("new", "click", async () => {
  stop();
  await library.save();
  await library.create();
  await show();
  draft.focus();
});
on("save", "click", async () => {
  const parts = allParts(library.document);
  const name = titleOf(library.document).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "").slice(0, 40);
  download(await saveFiles(parts), `${library.document.title ? name : "story"}.zip`);
  say("Saved as a zip of story.md and its pictures.");
});
on("open", "click", () => byId("document-files").click());
on("document-files", "change", async (event) => {
  const files = [...event.target.files];
  event.target.value = "";
  if (files.length) await openChosen(files);
});
on("add-picture", "click", () => choosePictures());
on("add-photo", "click", () => byId("photo-file").click());
for (const id of ["picture-files", "photo-file"]) {
  on(id, "change", async (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    await (id === "photo-file" ? addPictures : chosenFor)(files);
  });
}
on("add-draw", "click", () => {
  commitDraft(library.document);
  draft.value = "";
  grow(draft);
  library.document.parts.push(draw());
  changed();
  say("A place to draw was added.");
});
on("title", "input", () => {
  library.document.title = byId("title").value;
  window.document.title = `${titleOf(library.document)} · mmi`;
  changed({ render: false });
});
on("draft", "input", () => {
  library.document.draft = draft.value;
  grow(draft);
  changed({ render: false });
});
on("settings", "click", settingsPanel(options, () => model, () => changed()));
byId("note").querySelector(".icon").addEventListener("click", () => {
  note("");
  draft.focus({ preventScroll: true });
});
for (const button of window.document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", async () => {
    const { images, ...content } = await example(button.dataset.example);
    options.set({ images });
    Object.assign(library.document, content);
    draft.value = content.draft;
    changed();
    draft.focus();
  });
}
for (const button of window.document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const button of window.document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    await copyText(byId(button.dataset.copy).textContent);
    setText(button.lastElementChild, "Copied");
    setTimeout(() => setText(button.lastElementChild, "Copy"), 2000);
    say("Copied.");
  });
}
on("show-help", "click", () => byId("help-panel").showModal());
on("show-request", "click", () => {
  const parts = allParts(library.document);
  const chosen = options.forTurn(model, previews());
  const about = [location.origin, model.name, parts, chosen, Boolean(key.get())];
  setText(byId("curl-text"), curl(...about));
  setText(byId("python-text"), python(...about));
  byId("request-panel").showModal();
});
on("documents", "click", async () => {
  await library.save();
  await listDocuments();
  byId("documents-panel").showModal();
});
for (const [id, by] of [["version-back", -1], ["version-forward", 1]]) {
  on(id, "click", async () => {
    const versions = await library.versions();
    const at = versions.findIndex((one) => one.id === library.document.id);
    await openKept(versions[at + by]);
  });
}

async function openKept(document) {
  stop();
  if (await library.open(document.id)) {
    await show();
    say(`${titleOf(library.document)} opened.`);
  } else note("That document is open in another tab.");
}

async function listDocuments() {
  const all = await library.store.all();
  const families = new Map();
  for (const one of all) families.set(one.family, (families.get(one.family) ?? 0) + 1);
  byId("documents-list").replaceChildren(...all.map((one) => {
    const words = [new Date(one.updated).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })];
    if (families.get(one.family) > 1) words.push(`version ${one.version}`);
    if (one.id === library.document.id) words.push("open now");
    const last = h("button", { type: "button", class: "icon", "aria-label": `Delete ${titleOf(one)}`,
      onclick: async () => {
        if (last.dataset.sure === undefined) { // the first click asks
          last.dataset.sure = "";
          last.replaceChildren("Delete?");
          return;
        }
        await library.store.delete(one.id);
        if (one.id === library.document.id) {
          await library.create();
          await show();
        } else await showVersions();
        await listDocuments();
        byId("documents-panel").querySelector("button").focus();
      } }, icon("close"));
    return h("li", {},
      h("button", { type: "button", class: "row", onclick: async () => {
        byId("documents-panel").close();
        await openKept(one);
      } }, h("b", {}, titleOf(one)), h("span", { class: "quiet" }, words.join(" · "))), last);
  }));
  if (!all.length) byId("documents-list").append(h("li", { class: "quiet" }, "None yet."));
}

window.document.addEventListener("keydown", (event) => {
  const open = window.document.querySelector("dialog[open], [popover]:popover-open");
  if (open) return;
  if (event.key === "Escape" && run) {
    event.preventDefault();
    stop();
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !run) {
    event.preventDefault();
    write();
  }
  if (event.altKey && event.shiftKey && /^Arrow(Up|Down)$/.test(event.key)) {
    const id = event.target.closest?.("[data-part]")?.dataset.part;
    const part = shownParts().find((one) => one.id === id);
    if (part && move(listOf(part), id, event.key === "ArrowUp" ? -1 : 1)) {
      event.preventDefault();
      const { target } = event;
      render();
      target.focus();
      changed();
      say(`Moved ${event.key === "ArrowUp" ? "up" : "down"}.`);
    }
  }
});
window.document.addEventListener("paste", (event) => {
  const files = imagesOf(event.clipboardData);
  if (!files.length || window.document.querySelector("dialog[open]")) return;
  event.preventDefault();
  addPictures(files, caretOf(event.target));
});
for (const name of ["dragenter", "dragover"]) {
  window.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    byId("main").classList.add("dropping");
  });
}
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("main").classList.remove("dropping");
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("main").classList.remove("dropping");
  const files = [...(event.dataTransfer?.files ?? [])];
  if (files.some((file) => /\.(zip|md|markdown|txt)$/i.test(file.name))) openChosen(files);
  else if (files.length) {
    const place = caretOf(event.target);
    addPictures(files, event.target === draft ? {} : { ...place, at: undefined });
  }
});
window.document.addEventListener("visibilitychange", () => {
  if (window.document.hidden) library.save();
});

await library.start();
await show();
if (!library.store.works) library.failed();
looked = look();
await looked;
watch();
