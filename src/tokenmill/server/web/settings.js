// The settings panel. A field that is empty is not sent, so the model's own default holds.

import { byId, element } from "./dom.js";

const KEY = "tokenmill.settings";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: "any", hint: "0 always takes the likeliest token" },
  { name: "max_tokens", label: "Longest answer", min: 1, step: 1, whole: true, hint: "in tokens" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: "any", hint: "of the likeliest tokens, this share" },
  { name: "top_k", label: "Top k", min: 0, step: 1, whole: true, hint: "so many tokens; 0 for all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: "any", hint: "relative to the likeliest" },
  { name: "repetition_penalty", label: "Repetition", min: 0.01, max: 2, step: "any", hint: "1 for none" },
  { name: "frequency_penalty", label: "Frequency", min: -2, max: 2, step: "any", hint: "per use of a token" },
  { name: "presence_penalty", label: "Presence", min: -2, max: 2, step: "any", hint: "once a token was used" },
  { name: "seed", label: "Seed", min: 0, step: 1, whole: true, hint: "the same again" },
];
// llama.cpp's names, in which /props tells the defaults.
const DEFAULTS = { repetition_penalty: "repeat_penalty" };

/** The panel. `changed(settings)` is called with every change. */
export class SettingsPanel {
  constructor(changed) {
    this.#changed = changed;
    this.#form = byId("settings-form");
    this.#build();
    this.#form.addEventListener("input", () => this.#take());
    this.#form.addEventListener("submit", (event) => event.preventDefault());
  }

  #changed;
  #form;

  /** Shows the settings of a conversation. */
  show(settings) {
    for (const field of this.#form.elements) {
      if (field.name) field.value = settings[field.name] ?? "";
    }
    this.#mark();
  }

  /** Tells what holds where nothing is given: `params` of /props. */
  showDefaults(params) {
    for (const { name } of NUMBERS) {
      const value = params[DEFAULTS[name] ?? name];
      if (value !== undefined && value !== null) this.#form.elements[name].placeholder = String(value);
    }
  }

  #take() {
    const settings = {};
    for (const field of this.#form.elements) {
      if (field.name && field.value.trim() !== "" && field.validity.valid) settings[field.name] = field.value;
    }
    this.#mark();
    localStorage.setItem(KEY, JSON.stringify(settings));
    this.#changed(settings);
  }

  #mark() {
    for (const field of this.#form.elements) {
      if (field.name) field.setAttribute("aria-invalid", String(!field.validity.valid));
    }
  }

  #build() {
    const area = (name, label, rows, placeholder) => [
      element("label", { for: `set-${name}` }, label),
      element("textarea", { id: `set-${name}`, name, rows, placeholder, spellcheck: "false" }),
    ];
    const number = ({ name, label, min, max, step, hint }) =>
      element(
        "div",
        { class: "field" },
        element("label", { for: `set-${name}` }, label),
        element("input", {
          ...{ id: `set-${name}`, name, type: "number", min, max, step, placeholder: "default" },
          ...{ inputmode: step === 1 ? "numeric" : "decimal", autocomplete: "off", "aria-describedby": `hint-${name}` },
        }),
        element("span", { id: `hint-${name}`, class: "note" }, hint),
      );
    const reset = () => {
      this.show({});
      this.#take();
    };
    this.#form.append(
      element("h2", {}, "Settings"),
      ...area("system", "System prompt", 4, "You are a helpful assistant."),
      element("h3", {}, "Sampling"),
      element("div", { class: "fields" }, ...NUMBERS.map(number)),
      ...area("stop", "Stop at", 2, "One text a line"),
      element("button", { type: "button", class: "button", onclick: reset }, "Reset to defaults"),
    );
  }
}

/** The settings that were used last. */
export function lastSettings() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

/** What settings mean in a request, apart from the system prompt. */
export function parameters(settings) {
  const found = {};
  for (const { name, whole } of NUMBERS) {
    if (settings[name] !== undefined) found[name] = whole ? parseInt(settings[name], 10) : parseFloat(settings[name]);
  }
  const stop = (settings.stop ?? "").split("\n").filter((line) => line !== "");
  if (stop.length) found.stop = stop;
  return found;
}
