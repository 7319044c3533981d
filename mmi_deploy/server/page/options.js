// Settings of a turn, kept in this browser, and their panel.

import { byId, h } from "./element.js";

const KEPT = "mmi-options";

export const DEFAULTS = {
  seed: "", images: 4, tokens: 256, sampler: "", guidance: 3.5, fullEvery: 1, temperature: 1, topP: 0.9,
};

export class Options {
  constructor() {
    this.values = { ...DEFAULTS };
    try {
      const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
      for (const name of Object.keys(DEFAULTS)) {
        if (typeof kept[name] === typeof DEFAULTS[name]) this.values[name] = kept[name];
      }
    } catch { /* unreadable: the defaults */ }
  }

  set(values) {
    Object.assign(this.values, values);
    try {
      localStorage.setItem(KEPT, JSON.stringify(this.values));
    } catch { /* full, or not allowed */ }
  }

  // Settings of the next turn: a seed is drawn where none is given, limits are the server's.
  forTurn(model, previews) {
    const { seed, images, tokens, sampler, ...rest } = this.values;
    const known = model.samplers.some((one) => one.name === sampler);
    const chosen = known ? sampler : model.samplers[0]?.name ?? "";
    return {
      ...rest,
      seed: seed === "" ? Math.floor(Math.random() * 1e6) : Number(seed),
      images: model.pictures === null ? images : Math.min(images, model.pictures),
      tokens: model.tokens === null ? tokens : Math.min(tokens, model.tokens),
      guidance: model.guidance ?? this.values.guidance,
      sampler: chosen,
      steps: model.samplers.find((one) => one.name === chosen)?.steps ?? 0,
      previews,
    };
  }

  summary() {
    const { seed, images } = this.values;
    const pictures = images === 0 ? "no pictures" : images === 1 ? "1 picture" : `${images} pictures`;
    return `${pictures} · ${seed === "" ? "new seed" : `seed ${seed}`}`;
  }
}

// Connects the panel with the options; `changed` is called when it closes.
export function settingsPanel(options, model, changed) {
  const panel = byId("settings-panel");
  const { elements } = panel.querySelector("form");
  const fill = (values) => {
    for (const [name, value] of Object.entries(values)) elements[name].value = value;
    elements.sampler.replaceChildren(...model().samplers.map(({ name, steps }) => h(
      "option", { value: name }, steps ? `${name.split(":")[0]}, ${steps} steps` : name)));
    elements.sampler.value = values.sampler;
    elements.guidance.disabled = typeof model().guidance === "number"; // distilled: no choice
    if (elements.sampler.selectedIndex < 0) elements.sampler.selectedIndex = 0;
  };
  byId("defaults").addEventListener("click", () => fill(DEFAULTS));
  panel.addEventListener("close", () => {
    const values = {};
    for (const [name, usual] of Object.entries(DEFAULTS)) {
      const field = elements[name];
      if (!field.checkValidity() || (name === "sampler" && !field.value)) continue;
      values[name] = typeof usual === "number" ? Number(field.value) : field.value.trim();
    }
    options.set(values);
    changed();
  });
  return () => {
    fill(options.values);
    panel.showModal();
  };
}
