// The live view: what the engine is doing, looked at twice a second while somebody looks.

import { get } from "./api.js";
import { byId } from "./dom.js";
import { Gauges } from "./gauges.js";
import { Recent } from "./recent.js";
import { Latency, Memory, Pages, Requests, Steps, Tokens } from "./engine_charts.js";

const LOOK_MS = 500;
const RETRY_MS = 3000; // after a look that failed

export class EngineView {
  constructor() {
    this.#gauges = new Gauges(byId("tiles"));
    this.#charts = [
      new Tokens(),
      new Steps(),
      new Pages(),
      new Requests(),
      new Latency("first_token", "Time to first token", "answer"),
      new Latency("between_tokens", "Time between tokens", "token"),
      new Memory(),
    ];
    byId("charts").append(...this.#charts.map((chart) => chart.node));
    document.addEventListener("visibilitychange", () => this.#schedule(0));
    document.addEventListener("newkey", () => this.#schedule(0));
  }

  #gauges;
  #charts;
  #recent = new Recent();
  #shown = false;
  #looking = false;
  #timer = null;

  start() {
    this.#shown = true;
    this.#schedule(0);
  }

  stop() {
    this.#shown = false;
    clearTimeout(this.#timer);
  }

  #schedule(milliseconds) {
    clearTimeout(this.#timer);
    if (this.#shown && !document.hidden && !this.#looking) this.#timer = setTimeout(() => this.#look(), milliseconds);
  }

  async #look() {
    this.#looking = true;
    let wait = LOOK_MS;
    try {
      const body = await get(`statistics?after=${this.#recent.count}`);
      this.#recent.add(body);
      this.#draw(body);
    } catch (error) {
      // Who would not give a key is not asked again until there is one.
      wait = error.status === 401 ? null : RETRY_MS;
      this.#trouble(error.message);
    }
    this.#looking = false;
    if (wait !== null) this.#schedule(wait);
  }

  #draw(body) {
    const { state, reason, architecture, max_model_len, max_num_seqs } = body.engine;
    this.#trouble(state === "running" ? "" : `There is no engine now: ${reason}. It is being started again.`);
    setText("engine-restarts", restartsOf(body.engine));
    const number = (value) => value.toLocaleString("en");
    const facts = [
      `${body.model} (${architecture})`,
      `context ${number(max_model_len)} tokens`,
      `up to ${number(max_num_seqs)} sequences at once`,
      `${number(body.steps.count)} steps, ${number(body.tokens.generated)} tokens generated`,
    ];
    byId("engine-facts").textContent = facts.join(" \u00b7 ");
    this.#gauges.draw(body, this.#recent);
    for (const chart of this.#charts) chart.draw(body, this.#recent);
  }

  #trouble(text) {
    setText("engine-trouble", text);
    byId("engine-trouble").hidden = !text;
  }
}

/** What no look may have seen: an engine can die and be back between two of them. */
function restartsOf({ restarts, last_death }) {
  if (!restarts) return "";
  const when = new Date(1000 * last_death.time).toLocaleString("en", { dateStyle: "medium", timeStyle: "medium" });
  const count = restarts === 1 ? "once" : `${restarts.toLocaleString("en")} times`;
  return `The engine was started again ${count}. It died last on ${when}: ${last_death.reason}.`;
}

/** Only what changes is said by screen readers. */
function setText(id, text) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
}
