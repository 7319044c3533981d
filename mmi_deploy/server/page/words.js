// Plain words for errors, states and progress.

const ABOUT = {
  unreachable: ["The server cannot be reached",
    "Look whether it is running, and whether this machine is connected."],
  lost: ["The connection was lost", "What had come until then is kept."],
  silent: ["The server is silent", "Nothing has come from it for {seconds} seconds."],
  queue_full: ["The server is busy", "Its queue is full.{retry}"],
  queue_timeout: ["The server is busy", "The request waited too long in its queue.{retry}"],
  draining: ["The server is shutting down", "It takes nothing new. What you wrote stays here."],
  starting: ["The server is starting", "It is loading the model.{retry}"],
  engine_died: ["The engine stopped", "The server starts it again. What had come until then is kept."],
  deadline: ["The time of one request is over", "What had come until then is kept."],
  unauthorized: ["The server needs a key", "Give it, and try again."],
  too_large: ["This document is too large for the server", "{message}"],
};

// {title, text} of an error of the server or of the connection.
export function errorWords(error) {
  const code = error.code in ABOUT ? error.code : byStatus(error.status);
  const retry = error.retryAfter
    ? ` It expects room in about ${plural(error.retryAfter, "second")}.` : "";
  const [title, text] = ABOUT[code] ?? ["The server refused this", "{message}"];
  const message = sentence(error.message) || "It gave no reason.";
  return {
    title,
    text: text.replace("{retry}", () => retry).replace("{message}", () => message)
      .replace("{seconds}", () => error.seconds),
  };
}

function byStatus(status) {
  return { 401: "unauthorized", 413: "too_large", 429: "queue_full", 504: "deadline" }[status] ?? "";
}

function sentence(message) {
  const text = (message ?? "").trim();
  if (!text) return "";
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export const READINESS = {
  ready: "ready",
  starting: "starting",
  draining: "shutting down",
  down: "not ready",
  unreachable: "not reachable",
};

const ENDINGS = {
  max_images: "that is as many pictures as it may draw",
  max_tokens: "that is as many words as it may write",
  max_output_tokens: "that is as many words as it may write",
  context: "the document is as long as the model can read",
  deadline: "its time is over",
};

export function plural(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

// Said at the end of a turn.
export function ending(counts, reason, stopped) {
  const made = [plural(counts.words, "word"), plural(counts.pictures, "picture")].join(", ");
  const limited = ENDINGS[reason] && !(reason === "max_images" && !counts.pictures);
  const why = limited ? `; ${ENDINGS[reason]}` : "";
  return `${stopped ? "Stopped" : "Finished"}: ${made}${stopped ? "" : why}.`;
}

const PARTS = ["just begun", "a quarter done", "half done", "three quarters done", "nearly done"];

// Progress for a screen reader.
export function drawing(number, step, steps) {
  const done = steps ? PARTS[Math.min(4, Math.round((4 * step) / steps))] : PARTS[0];
  return `Drawing picture ${number}, ${done}.`;
}

// Settings of a turn in one line: those of pictures, or all of them.
export function settingsLine(turn, { all = false } = {}) {
  const words = [`seed ${turn.seed}`];
  if (turn.sampler) words.push(turn.sampler.split(":")[0]);
  if (turn.steps) words.push(plural(turn.steps, "step"));
  words.push(`guidance ${turn.guidance}`);
  if (turn.fullEvery > 1) words.push(`whole U-Net every ${turn.fullEvery} steps`);
  if (all) {
    words.push(`temperature ${turn.temperature}`, `top-p ${turn.topP}`,
      `at most ${plural(turn.tokens, "token")} and ${plural(turn.images, "picture")}`);
  }
  return words.join(" · ");
}
