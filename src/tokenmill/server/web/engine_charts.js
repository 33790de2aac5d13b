// The live view's pictures. Each has a `node`, and `draw(body, recent)`: the last answer and the last minute.

import { Picture, area, line, rectangles, roundUp, shareOut } from "./charts.js";
import { element } from "./dom.js";
import { MINUTE, STEPS_SECONDS, quantile } from "./recent.js";

const WIDTH = 600;
const HEIGHT = 150;
const CELL = 10; // of the page map, with GAP around
const GAP = 2;
const COLUMNS = 48;
const MOST_CELLS = 480;
const MOST_REQUESTS = 8;

const number = (value) => value.toLocaleString("en");

function seconds(value) {
  if (value < 0.01) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return `${value.toFixed(value < 10 ? 1 : 0)} s`;
}

/** A titled place: legend entries are [class, text], `aside` is text that changes. */
class Card {
  constructor(title, { legend = [], wide = false } = {}) {
    this.aside = element("p", { class: "note" });
    const entries = legend.map(([layer, text]) => element("li", {}, element("i", { class: `key ${layer}` }), text));
    this.node = element(
      "section",
      { class: wide ? "card whole" : "card", "aria-label": title },
      element(
        "header",
        {},
        element("h3", {}, title),
        ...(entries.length ? [element("ul", { class: "legend" }, ...entries)] : []),
        this.aside,
      ),
    );
  }
}

/** A card whose picture has a scale: `top` is the text at its upper edge, `below` those under it from left to right. */
class Plot extends Card {
  constructor(title, layers, below, options) {
    super(title, options);
    this.picture = new Picture(WIDTH, HEIGHT, ["grid", ...layers]);
    this.picture.draw("grid", line([[0, 0.5], [WIDTH, 0.5]]) + line([[0, HEIGHT / 2], [WIDTH, HEIGHT / 2]]));
    this.top = element("span", { class: "top" });
    const marks = element("div", { class: "below", "aria-hidden": "true" }, ...below.map((text) => element("span", {}, text)));
    this.node.append(element("div", { class: "plot" }, this.top, this.picture.node), marks);
  }
}

export class Tokens extends Plot {
  constructor() {
    const legend = [["decode", "generated"], ["prefill", "read from prompts"]];
    super("Tokens per second", ["prefill area", "decode area", "prefill line", "decode line"], ["1 minute ago", "30 s", "now"], { legend });
  }

  draw(_, recent) {
    const perSecond = recent.perSecond();
    const top = roundUp(Math.max(10, ...perSecond.map(({ prompt, generated }) => Math.max(prompt, generated))));
    const points = (name) =>
      perSecond.map((second, index) => [
        (WIDTH * (index + 1 + MINUTE - perSecond.length)) / MINUTE,
        HEIGHT - (HEIGHT * second[name]) / top,
      ]);
    this.top.textContent = number(top);
    for (const [layer, name] of [["prefill", "prompt"], ["decode", "generated"]]) {
      this.picture.draw(`${layer} area`, area(points(name), HEIGHT));
      this.picture.draw(`${layer} line`, line(points(name)));
    }
    const { prompt, generated } = recent.rate();
    this.picture.describe(`Now ${Math.round(generated)} generated and ${Math.round(prompt)} read from prompts a second`);
  }
}

export class Steps extends Plot {
  constructor() {
    const legend = [["decode", "decode"], ["prefill", "prefill"], ["target", "target"]];
    super("Steps", ["prefill", "decode", "target"], [`${STEPS_SECONDS} s ago`, `${STEPS_SECONDS / 2} s`, "now"], { legend });
    this.picture.node.addEventListener("pointermove", (event) => this.#point(event));
    this.picture.node.addEventListener("pointerleave", () => (this.#at = null));
  }

  #at = null; // seconds ago that the pointer is at

  draw(body, recent) {
    const target = body.engine.step_target;
    const longest = Math.max(0.001, 1.5 * (target ?? 0), ...recent.steps.map((step) => step.seconds));
    const top = roundUp(longest);
    const prefill = [];
    const decode = [];
    for (const step of recent.steps) {
      const x = WIDTH * (1 - (recent.now - step.begin) / STEPS_SECONDS);
      const width = Math.max(0.8, (WIDTH * step.seconds) / STEPS_SECONDS - 0.3);
      const height = (HEIGHT * step.seconds) / top;
      const decodes = (height * step.decoded) / Math.max(1, step.decoded + step.prompt_tokens);
      decode.push([x, HEIGHT - decodes, width, decodes]);
      prefill.push([x, HEIGHT - height, width, height - decodes]);
    }
    this.picture.draw("decode", rectangles(decode));
    this.picture.draw("prefill", rectangles(prefill));
    const y = target === null ? -1 : HEIGHT - (HEIGHT * target) / top;
    this.picture.draw("target", line([[0, y], [WIDTH, y]]));
    this.top.textContent = seconds(top);
    this.aside.textContent = this.#tell(recent);
    this.picture.describe(`The steps of the last ${STEPS_SECONDS} seconds by their time. ${this.aside.textContent}`);
  }

  #point(event) {
    const { left, width } = this.picture.node.getBoundingClientRect();
    this.#at = STEPS_SECONDS * (1 - (event.clientX - left) / width);
  }

  /** The step under the pointer, else the last one. */
  #tell(recent) {
    const moment = recent.now - (this.#at ?? 0);
    const step = recent.steps.findLast(({ begin }) => begin <= moment);
    if (!step) return "idle";
    const which = this.#at === null ? "last" : `${seconds(recent.now - step.begin)} ago`;
    return `${which}: ${seconds(step.seconds)} for ${number(step.decoded)} decode and ${number(step.prompt_tokens)} prefill rows`;
  }
}

export class Pages extends Card {
  constructor() {
    super("KV pages", { legend: [["used", "used"], ["cached", "cached"], ["free", "free"]] });
    this.#maps = element("div", { class: "maps" });
    this.node.append(this.#maps);
  }

  #maps;
  #groups = [];

  draw({ kv }) {
    while (this.#groups.length < kv.groups.length) this.#add(this.#groups.length);
    kv.groups.forEach(({ used, cached, free, total }, index) => {
      const { picture, text } = this.#groups[index];
      const cells = Math.min(total, MOST_CELLS);
      const columns = Math.min(cells, COLUMNS);
      picture.resize(columns * CELL - GAP, Math.ceil(cells / columns) * CELL - GAP);
      let next = 0;
      shareOut([used, cached, free], total, cells).forEach((count, state) => {
        const places = Array.from({ length: count }, () => next++);
        const cell = (place) => [(place % columns) * CELL, Math.floor(place / columns) * CELL, CELL - GAP, CELL - GAP];
        picture.draw(["used", "cached", "free"][state], rectangles(places.map(cell)));
      });
      const counts = `${number(used)} used, ${number(cached)} cached, ${number(free)} free`;
      text.textContent = kv.groups.length > 1 ? `Group ${index}: ${counts}` : counts;
      picture.describe(text.textContent);
    });
    this.aside.textContent = `${kv.page_tokens} tokens a page`;
  }

  #add() {
    const picture = new Picture(1, 1, ["used", "cached", "free"], { stretch: false });
    const text = element("p", { class: "note" });
    this.#groups.push({ picture, text });
    this.#maps.append(element("div", {}, picture.node, text));
  }
}

export class Requests extends Card {
  constructor() {
    super("Requests");
    this.#rows = element("tbody");
    const heads = ["Request", "Phase", "Prompt", "Generated", "Age"].map((head) => element("th", { scope: "col" }, head));
    this.#table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), this.#rows);
    this.#none = element("p", { class: "note none" }, "Nothing runs and nothing waits.");
    this.node.append(this.#table, this.#none);
  }

  #rows;
  #table;
  #none;

  draw({ requests }) {
    const row = ({ id_task, is_processing, n_prompt_tokens, n_decoded, seconds: age }) =>
      element(
        "tr",
        {},
        element("td", { class: "id" }, id_task),
        element("td", {}, element("i", { class: `key ${is_processing ? "decode" : "prefill"}` }), is_processing ? "decode" : "prompt"),
        ...[number(n_prompt_tokens), number(n_decoded), seconds(age)].map((text) => element("td", {}, text)),
      );
    this.#rows.replaceChildren(...requests.slice(0, MOST_REQUESTS).map(row));
    this.#table.hidden = !requests.length;
    this.#none.hidden = requests.length > 0;
    const more = requests.length - MOST_REQUESTS;
    this.aside.textContent = more > 0 ? `oldest ${MOST_REQUESTS} of ${requests.length}` : "";
  }
}

export class Latency extends Plot {
  constructor(name, title, what) {
    super(title, ["bars"], ["1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s"]);
    this.node.classList.add("latency");
    this.#name = name;
    this.#what = what;
  }

  #name;
  #what;

  draw({ latency }, recent) {
    const found = recent.latencies(this.#name, latency);
    const most = Math.max(1, ...found.counts);
    const width = WIDTH / found.counts.length;
    const bars = found.counts.map((count, index) => {
      const height = count ? Math.max(2, ((HEIGHT - 4) * count) / most) : 0;
      return [index * width + 1, HEIGHT - height, width - 2, height];
    });
    this.picture.draw("bars", rectangles(bars));
    const when = found.lately ? "last minute" : "since the start";
    const [half, most95, most99] = [0.5, 0.95, 0.99].map((share) => seconds(quantile(found, share)));
    this.aside.textContent = found.count
      ? `${when}, ${number(found.count)} ${this.#what}${found.count === 1 ? "" : "s"}: half within ${half}, 95 % ${most95}, 99 % ${most99}`
      : "none yet";
    this.picture.describe(this.aside.textContent);
  }
}

export class Memory extends Card {
  constructor() {
    super("Memory", { wide: true, legend: [["weights", "weights"], ["used", "KV pages"], ["scratch", "scratch"], ["free", "left"]] });
    this.#picture = new Picture(WIDTH, 10, ["weights", "used", "scratch", "free"]);
    this.node.append(element("div", { class: "strip" }, this.#picture.node));
  }

  #picture;

  draw({ memory: { weights, kv, scratch, budget } }) {
    const size = (bytes) => (bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`);
    let x = 0;
    const parts = { weights, used: kv, scratch, free: Math.max(0, budget - weights - kv - scratch) };
    for (const [layer, bytes] of Object.entries(parts)) {
      const width = (WIDTH * bytes) / budget;
      this.#picture.draw(layer, rectangles([[x, 0, width, 10]]));
      x += width;
    }
    this.aside.textContent =
      `${size(weights)} weights, ${size(kv)} KV pages, ${size(scratch)} scratch, ${size(parts.free)} left of ${size(budget)}`;
    this.#picture.describe(this.aside.textContent);
  }
}
