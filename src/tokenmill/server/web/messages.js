// How one message of a conversation looks.

import { copyButton } from "./clipboard.js";
import { element } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/**
 * A message {role, content, reasoning, ended, error, stats}. `actions` are `edit(text)` for what the user said and `again()` for an
 * answer; either may be missing.
 */
export class MessageView {
  constructor(message, actions) {
    this.#message = message;
    this.#actions = actions;
    this.#body = element("div", { class: "body" });
    this.#foot = element("footer", {});
    const user = message.role === "user";
    this.node = element(
      "article",
      { class: `message ${message.role}`, "aria-label": user ? "You" : "Answer" },
      this.#body,
      this.#foot,
    );
    if (!user) this.node.prepend(this.#reasoning);
    this.#markdown = user ? null : new MarkdownView(this.#body);
    this.update();
  }

  #message;
  #actions;
  #body;
  #foot;
  #markdown;
  #thoughts = element("p", { class: "plain" });
  #reasoning = element("details", { class: "reasoning" }, element("summary", {}, "Reasoning"), this.#thoughts);

  /** Shows what the message has become. */
  update() {
    const { content, reasoning, error, stats, ended } = this.#message;
    this.#thoughts.textContent = reasoning ?? "";
    this.#reasoning.hidden = !reasoning;
    if (this.#markdown) this.#markdown.update(content);
    else this.#body.textContent = content;
    const waits = this.#markdown !== null && !ended;
    this.node.classList.toggle("waits", waits);
    this.node.setAttribute("aria-busy", String(waits));
    if (waits) {
      this.#foot.replaceChildren();
      return;
    }
    const notes = [ENDS[ended], stats && describe(stats)].filter(Boolean).join(" \u00b7 ");
    this.#foot.replaceChildren(
      ...(error ? [element("p", { class: "trouble", role: "alert" }, error)] : []),
      ...this.#buttons(),
      ...(notes ? [element("span", { class: "note" }, notes)] : []),
    );
  }

  #buttons() {
    const { role, content, ended } = this.#message;
    const buttons = content ? [copyButton(() => this.#message.content)] : [];
    if (role === "user") buttons.push(quiet("Edit", () => this.#edit()));
    else if (this.#actions.again) buttons.push(quiet(ended === "failed" ? "Try again" : "Regenerate", this.#actions.again));
    return buttons;
  }

  /** Turns the message into a field; saving it asks again from here. */
  #edit() {
    const field = element("textarea", { rows: 3, "aria-label": "Your message" });
    field.value = this.#message.content;
    const leave = () => {
      this.update();
      this.#foot.querySelector("button:last-of-type")?.focus();
    };
    const save = () => (field.value.trim() ? this.#actions.edit(field.value) : leave());
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") leave();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    this.#body.replaceChildren(field);
    this.#foot.replaceChildren(quiet("Send", save), quiet("Cancel", leave));
    field.focus();
  }
}

const ENDS = { stopped: "stopped", length: "cut off at its longest length" };

const quiet = (text, onclick) => element("button", { type: "button", class: "quiet", onclick }, text);

function describe({ tokens, firstSeconds, rate }) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  parts.push(`first after ${firstSeconds.toFixed(2)} s`);
  return parts.join(" \u00b7 ");
}
