// Markdown documents, as mmi_deploy/documents/files.py reads and writes them: an image link is a
// picture, `![]()` a place to draw, everything else literal text.

import { blocks } from "./document.js";

const MARK = "(?=!\\[|<img[\\s/>])";
const BEFORE_MARK = new RegExp(`(?<!\\\\)(\\\\*)${MARK}`, "gi");
const ESCAPED_MARK = new RegExp(`(?<!\\\\)((?:\\\\\\\\)*)\\\\${MARK}`, "gi");
const OPENING =
  "(?:```|~~~|<!--|<\\?|<![a-z]|<(?:script|pre|style|textarea)(?=[\\s>]|$))";
const OPENING_LINE = new RegExp(`^( {0,3})(?=\\\\*${OPENING})`, "gim");
const ESCAPED_LINE = new RegExp(`^( {0,3})\\\\(?=\\\\*${OPENING})`, "gim");

function escape(text) {
  return text.replace(BEFORE_MARK, "$1$1\\").replace(OPENING_LINE, "$1\\");
}

function unescape(text) {
  return text.replace(ESCAPED_LINE, "$1")
    .replace(ESCAPED_MARK, (_, run) => run.slice(0, run.length / 2));
}

// Markdown of parts; `names`: picture part -> file name.
export function toMarkdown(parts, names) {
  const paragraphs = blocks(parts).map((block) => {
    if (block.kind === "text") return escape(block.text.trim());
    if (block.kind === "draw") return "![]()";
    const alt = block.alt.trim().replace(/\s+/g, " ").replace(/[\\`<[\]]/g, "\\$&");
    return `![${alt}](${encodeURIComponent(names.get(block))})`;
  });
  return `${paragraphs.join("\n\n")}\n`;
}

// Entries {text}, {target, alt} and {draw: true} in order. Texts are trimmed, blank ones left out.
export function fromMarkdown(source) {
  const text = source.replace(/^\ufeff/, "").replace(/\r\n?/g, "\n");
  const literal = literalRanges(text);
  const definitions = findDefinitions(text, literal);
  const found = [];
  const used = new Set();
  const link = /!\[((?:\\[^]|[^[\]\\])*)\](?:\(\s*(?:<((?:\\.|[^<>\\\n])*)>|((?:\\.|[^\s()\\]|\((?:\\.|[^\s()\\])*\))*))(?:\s+(?:"(?:\\[^]|[^"\\])*"|'(?:\\[^]|[^'\\])*'|\((?:\\[^]|[^()\\])*\)))?\s*\)|\[((?:\\[^]|[^[\]\\])*)\])?/g;
  for (const match of text.matchAll(link)) {
    const [start, end] = [match.index, match.index + match[0].length];
    const slashes = /\\*$/.exec(text.slice(0, start))[0].length;
    if (slashes % 2 || inside(literal, start)) continue;
    const [, alt, pointed, plain, label] = match;
    let target = pointed ?? plain;
    if (target === undefined) {
      const name = labelOf(label || alt);
      const definition = definitions.get(name);
      if (!definition) continue;
      used.add(name);
      target = definition.target;
    }
    found.push({ start, end, target: decode(target.replace(/\\([!-/:-@[-`{-~])/g, "$1")).trim(), alt });
  }
  for (const name of used) found.push({ ...definitions.get(name), target: null });
  found.sort((a, b) => a.start - b.start);
  const entries = [];
  let words = "";
  const flush = () => {
    if (words.trim()) entries.push({ text: words.trim() });
    words = "";
  };
  let at = 0;
  for (const one of found) {
    words += unescape(text.slice(at, one.start));
    at = one.end;
    if (one.target === null) continue;
    flush();
    if (!one.target) entries.push({ draw: true });
    else entries.push({ target: one.target, alt: one.alt.replace(/\\([!-/:-@[-`{-~])/g, "$1") });
  }
  words += unescape(text.slice(at));
  flush();
  return entries;
}

function decode(target) {
  try {
    return decodeURIComponent(target);
  } catch {
    return target; // a lone % means itself
  }
}

const labelOf = (name) => name.trim().replace(/\s+/g, " ").toLowerCase();

function inside(ranges, at) {
  return ranges.some(([start, end]) => start <= at && at < end);
}

// Code fences, HTML blocks that an empty line does not end, and code spans: no link is in them.
function literalRanges(text) {
  const ranges = [];
  let at = 0;
  let open = null; // {start, closes}
  let paragraph = 0; // start of the run of lines whose code spans are searched next
  const spans = (end) => {
    const part = text.slice(paragraph, end);
    for (const match of part.matchAll(/(?<![`\\])(`+)(?!`)([^]*?[^`])\1(?!`)/g)) {
      if (!/\n\s*\n/.test(match[0])) {
        ranges.push([paragraph + match.index, paragraph + match.index + match[0].length]);
      }
    }
  };
  for (const line of text.split("\n")) {
    if (open) {
      if (open.closes.test(line)) {
        ranges.push([open.start, at + line.length]);
        paragraph = at + line.length;
        open = null;
      }
    } else {
      const closes = closing(line);
      if (closes) {
        spans(at);
        const after = closes.html && closes.pattern.test(line.slice(closes.skip));
        if (after) {
          ranges.push([at, at + line.length]);
          paragraph = at + line.length;
        } else {
          open = { start: at, closes: closes.pattern };
        }
      }
    }
    at += line.length + 1;
  }
  if (open) ranges.push([open.start, text.length]);
  else spans(text.length);
  return ranges;
}

// Pattern of the line that closes what this line opens; null if it opens nothing.
function closing(line) {
  const fence = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})/.exec(line);
  if (fence) {
    return { pattern: new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}[ \\t]*$`) };
  }
  const html = /^ {0,3}(<!--|<\?|<![a-z]|<(?:script|pre|style|textarea)(?=[\s>]|$))/i.exec(line);
  if (!html) return null;
  const end = { "<!--": "-->", "<?": "\\?>" }[html[1]] ??
    (html[1].startsWith("<!") ? ">" : "</(?:script|pre|style|textarea)>");
  return { html: true, pattern: new RegExp(end, "i"), skip: html[0].length };
}

// Link reference definitions: label -> {start, end, target}.
function findDefinitions(text, literal) {
  const found = new Map();
  const line = /^ {0,3}\[((?:\\.|[^[\]\\\n])+)\]:[ \t]*(?:<([^<>\n]*)>|(\S+))(?:[ \t]+(?:"[^"\n]*"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*(?:\n|$)/gm;
  for (const match of text.matchAll(line)) {
    const name = labelOf(match[1]);
    if (!found.has(name) && !inside(literal, match.index)) {
      const [start, end] = [match.index, match.index + match[0].length];
      found.set(name, { start, end, target: match[2] ?? match[3] });
    }
  }
  return found;
}
