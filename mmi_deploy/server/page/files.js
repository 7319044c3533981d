// Documents as files: one zip of story.md and its pictures, or these files beside each other.

import { draw, newDocument, picture, pictureNames, text } from "./document.js";
import { fromMarkdown, toMarkdown } from "./markdown.js";
import { readPicture } from "./pictures.js";
import { unzip, zip, ZipError } from "./zip.js";

export class FileError extends Error {}

const NAME = "story.md";
const TYPES = {
  png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", webp: "image/webp", gif: "image/gif",
  bmp: "image/bmp",
};

export async function save(parts) {
  const names = pictureNames(parts);
  const files = [[NAME, new TextEncoder().encode(toMarkdown(parts, names))]];
  for (const [part, name] of names) files.push([name, new Uint8Array(await part.blob.arrayBuffer())]);
  return zip(files);
}

// {document, notes} of the chosen files: one zip, or one Markdown file and pictures.
export async function open(files, limits) {
  const named = new Map();
  for (const file of files) {
    const bytes = new Uint8Array(await file.arrayBuffer());
    if (/\.zip$/i.test(file.name)) {
      try {
        for (const [name, content] of await unzip(bytes)) named.set(name, content);
      } catch (error) {
        if (error instanceof ZipError) throw new FileError(`${file.name}: ${error.message}.`);
        throw error;
      }
    } else named.set(file.name, bytes);
  }
  const documents = [...named.keys()].filter(
    (name) => /\.(md|markdown|txt)$/i.test(name) && !/(^|\/)(__MACOSX|\.)/.test(name));
  if (documents.length !== 1) {
    throw new FileError(documents.length
      ? `There are ${documents.length} documents in these files: choose one, with its pictures.`
      : "There is no document in these files: a .md, or a .zip of one and its pictures.");
  }
  return parse(documents[0], named, limits, files[0].name);
}

async function parse(name, named, limits, title) {
  const folder = name.slice(0, name.lastIndexOf("/") + 1);
  let source;
  try {
    source = new TextDecoder("utf-8", { fatal: true }).decode(named.get(name));
  } catch {
    throw new FileError(`${name} is not UTF-8 text.`);
  }
  const parts = [];
  const notes = [];
  for (const entry of fromMarkdown(source)) {
    if (entry.draw) parts.push(draw());
    else if (entry.text !== undefined) parts.push(text(entry.text));
    else {
      const target = entry.target.replace(/^\.\//, "");
      const bytes = named.get(folder + target) ?? named.get(target.split("/").at(-1));
      if (/^[a-z][a-z0-9+.-]*:|^\/\//i.test(entry.target)) {
        throw new FileError(`${name} links ${entry.target}: a picture must be a file beside it.`);
      }
      if (!bytes) {
        throw new FileError(
          `${name} links ${entry.target}, which is not among the files: choose it as well.`);
      }
      const type = TYPES[target.split(".").at(-1).toLowerCase()] ?? "";
      const read = await readPicture(new File([bytes], target, { type }), limits);
      if (read.note) notes.push(read.note);
      parts.push(picture(read.blob, read.width, read.height, { alt: entry.alt }));
    }
  }
  const stem = title.replace(/\.[^.]*$/, "");
  return { document: newDocument({ parts, title: stem === "story" ? "" : stem }), notes };
}
