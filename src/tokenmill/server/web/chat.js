// The playground: conversations, the message box, and answers on their way.

import { answer } from "./answer.js";
import { conversations, keep, newConversation, onChange, remove, titleOf } from "./conversations.js";
import { announce, byId, element } from "./dom.js";
import { MessageView } from "./messages.js";
import { SettingsPanel, lastSettings } from "./settings.js";

const REDRAW_MS = 60; // a stream is drawn this often
const KEEP_MS = 1000; // and kept this often
const NEAR_END = 80; // pixels from which on the newest text is followed
const SUGGESTIONS = [
  "Explain how a bicycle stays upright",
  "Write a Python function that finds prime numbers",
  "Compare tea and coffee in a small table",
];

/** Connects the chat's part of the page. */
export class Chat {
  constructor() {
    this.#settings = new SettingsPanel((settings) => this.#settingsChanged(settings));
    this.#connect();
    this.#open(newConversation(lastSettings()));
    onChange(() => this.#list());
  }

  #settings;
  #model = null;
  #context = null;
  #shown = null; // the conversation that is shown
  #views = []; // of its messages
  #running = new Map(); // AbortController by the id of the conversation

  /** Tells what answers: the model's name, its context in tokens, and the defaults of /props. */
  introduce(model, context, defaults) {
    this.#model = model;
    this.#context = context;
    this.#settings.showDefaults(defaults);
    if (!this.#shown.messages.length) this.#draw();
  }

  // ---- conversations ------------------------------------------------------------------------------------------------

  #open(conversation) {
    this.#shown = conversation;
    this.#settings.show(conversation.settings);
    this.#draw();
    this.#list();
  }

  #settingsChanged(settings) {
    this.#shown.settings = settings;
    if (this.#shown.messages.length) this.#keep(this.#shown);
  }

  #keep(conversation) {
    try {
      keep(conversation);
      this.#trouble("");
    } catch (error) {
      this.#trouble(error.message);
    }
  }

  #trouble(text) {
    byId("history-trouble").textContent = text;
  }

  #delete(conversation) {
    if (!window.confirm(`Delete "${titleOf(conversation)}"?`)) return;
    this.#running.get(conversation.id)?.abort();
    this.#running.delete(conversation.id);
    remove(conversation);
    if (conversation.id === this.#shown.id) this.#open(newConversation(lastSettings()));
    this.#list();
    byId("new-conversation").focus();
  }

  #list() {
    const entry = (conversation) => {
      const title = titleOf(conversation);
      const current = conversation.id === this.#shown.id;
      const open = () => {
        // A conversation that is being answered lives here, not in the store.
        if (!current) this.#open(this.#answered.get(conversation.id) ?? conversation);
        byId("prompt").focus();
        byId("history").dispatchEvent(new Event("done"));
      };
      return element(
        "li",
        {},
        element("button", { type: "button", class: "entry", "aria-current": current && "true", onclick: open }, title),
        element(
          "button",
          { type: "button", class: "quiet", "aria-label": `Delete: ${title}`, onclick: () => this.#delete(conversation) },
          "\u00d7",
        ),
      );
    };
    byId("conversations").replaceChildren(...conversations().map(entry));
  }

  // ---- messages -----------------------------------------------------------------------------------------------------

  #draw() {
    const { messages } = this.#shown;
    const last = messages.length - 1;
    this.#views = messages.map((message, index) => this.#view(message, index, last));
    byId("messages").replaceChildren(...(messages.length ? this.#views.map((view) => view.node) : [this.#welcome()]));
    this.#showState();
    this.#follow(true);
  }

  #view(message, index, last) {
    return new MessageView(message, {
      edit: (text) => this.#say(text, index),
      again: index === last ? () => this.#answer(index) : null,
    });
  }

  #welcome() {
    const suggest = (text) =>
      element("button", { type: "button", class: "button", onclick: () => this.#say(text) }, text);
    const context = this.#context ? `It reads up to ${this.#context.toLocaleString("en")} tokens. ` : "";
    return element(
      "div",
      { class: "welcome" },
      element("h2", {}, this.#model ? `Talk to ${this.#model}` : "Talk to the model"),
      element("p", {}, `${context}Write below, or begin with one of these:`),
      element("div", { class: "suggestions" }, ...SUGGESTIONS.map(suggest)),
    );
  }

  /** Keeps the newest text in sight of a reader who is at the end. */
  #follow(always = false) {
    const area = byId("messages");
    if (always || area.scrollHeight - area.scrollTop - area.clientHeight < NEAR_END) area.scrollTop = area.scrollHeight;
  }

  #showState() {
    const runs = this.#running.has(this.#shown.id);
    const focused = document.activeElement;
    byId("messages").classList.toggle("running", runs);
    byId("send").hidden = runs;
    byId("stop").hidden = !runs;
    if (focused === byId("send") && runs) byId("stop").focus();
    if (focused === byId("stop") && !runs) byId("prompt").focus();
  }

  // ---- asking -------------------------------------------------------------------------------------------------------

  /** Says `text`, in place of the message `index` and all after it if that is given. */
  #say(text, index = this.#shown.messages.length) {
    if (this.#running.has(this.#shown.id)) return;
    this.#shown.messages.length = index;
    this.#shown.messages.push({ role: "user", content: text.trim() });
    this.#answer(index + 1);
    byId("prompt").focus();
  }

  /** Answers what was said before the message `index`. */
  async #answer(index) {
    const conversation = this.#shown;
    if (this.#running.has(conversation.id)) return;
    conversation.messages.length = index;
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    const controller = new AbortController();
    this.#running.set(conversation.id, controller);
    this.#answered.set(conversation.id, conversation);
    this.#keep(conversation);
    this.#draw();
    this.#list();
    announce("Answering");

    const redraw = atMost(REDRAW_MS, () => this.#update(conversation));
    const store = atMost(KEEP_MS, () => this.#keep(conversation));
    await answer(this.#model, conversation, controller.signal, () => {
      redraw();
      store();
    });
    redraw.cancel();
    store.cancel();
    this.#answered.delete(conversation.id);
    if (this.#running.get(conversation.id) !== controller) return; // deleted meanwhile
    this.#running.delete(conversation.id);
    this.#keep(conversation);
    this.#update(conversation);
    this.#list();
    if (conversation === this.#shown) announce(message.content || message.error || "No answer");
  }

  #answered = new Map(); // conversations by id, while an answer comes

  #update(conversation) {
    if (conversation !== this.#shown) return;
    this.#views.at(-1).update();
    this.#showState();
    this.#follow();
  }

  #stop() {
    this.#running.get(this.#shown.id)?.abort();
  }

  // ---- the message box ----------------------------------------------------------------------------------------------

  #connect() {
    const prompt = byId("prompt");
    const touch = window.matchMedia("(pointer: coarse)");
    const fit = () => {
      prompt.style.height = "auto";
      prompt.style.height = `${prompt.scrollHeight}px`;
    };
    const send = () => {
      if (!prompt.value.trim() || this.#running.has(this.#shown.id)) return;
      this.#say(prompt.value);
      prompt.value = "";
      fit();
    };
    prompt.addEventListener("input", fit);
    prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
      event.preventDefault();
      send();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    byId("stop").addEventListener("click", () => this.#stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !byId("key-dialog").open) this.#stop();
    });
    window.addEventListener("pagehide", () => this.#answered.forEach((conversation) => this.#keep(conversation)));
    byId("new-conversation").addEventListener("click", () => {
      this.#open(newConversation(lastSettings()));
      byId("history").dispatchEvent(new Event("done"));
      prompt.focus();
    });
  }
}

/** `work`, at most once in so many milliseconds, and not at all after `cancel()`. */
function atMost(milliseconds, work) {
  let timer = null;
  const ask = () => {
    timer ??= setTimeout(() => {
      timer = null;
      work();
    }, milliseconds);
  };
  ask.cancel = () => clearTimeout(timer);
  return ask;
}
