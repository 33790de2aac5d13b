// The row of large numbers, each with its last minute behind it.

import { Picture, area, line } from "./charts.js";
import { element } from "./dom.js";
import { MINUTE } from "./recent.js";

const WIDTH = 120;
const HEIGHT = 30;

const rate = (value) => (value < 10 && value > 0 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
const percent = (share) => (share > 0 && share < 0.1 ? `${(100 * share).toFixed(1)} %` : `${Math.round(100 * share)} %`);

const GAUGES = [
  {
    label: "Running",
    unit: "sequences",
    value: (body) => body.running.toLocaleString("en"),
    history: (recent) => recent.moments.map(({ time, running }) => [time, running]),
  },
  {
    label: "Waiting",
    unit: "sequences",
    value: (body) => body.waiting.toLocaleString("en"),
    history: (recent) => recent.moments.map(({ time, waiting }) => [time, waiting]),
  },
  {
    label: "Generating",
    unit: "tokens/s",
    layer: "decode",
    value: (_, recent) => rate(recent.rate().generated),
    history: (recent) => recent.perSecond().map(({ time, generated }) => [time + 1, generated]),
  },
  {
    label: "Reading prompts",
    unit: "tokens/s",
    layer: "prefill",
    value: (_, recent) => rate(recent.rate().prompt),
    history: (recent) => recent.perSecond().map(({ time, prompt }) => [time + 1, prompt]),
  },
  {
    label: "KV pages in use",
    unit: "of all",
    value: (_, recent) => percent(recent.moments.at(-1).used),
    history: (recent) => recent.moments.map(({ time, used }) => [time, used]),
    top: 1,
  },
  {
    label: "Prompts from cache",
    unit: "of tokens",
    value: ({ prefix_cache: { queries, hits } }) => (queries ? percent(hits / queries) : "\u2013"),
    history: () => [],
  },
];

export class Gauges {
  constructor(place) {
    this.#tiles = GAUGES.map((gauge) => {
      const value = element("span", { class: "value" }, "\u2013");
      const amount = element("dd", {}, value, " ", element("span", { class: "note" }, gauge.unit));
      const picture = new Picture(WIDTH, HEIGHT, ["under", "over"]);
      picture.node.setAttribute("class", `spark ${gauge.layer ?? ""}`);
      picture.node.setAttribute("role", "presentation");
      const node = element("div", { class: "tile" }, element("dl", {}, element("dt", {}, gauge.label), amount), picture.node);
      return { gauge, value, picture, node };
    });
    place.append(...this.#tiles.map((tile) => tile.node));
  }

  #tiles;

  draw(body, recent) {
    for (const { gauge, value, picture } of this.#tiles) {
      value.textContent = gauge.value(body, recent);
      const history = gauge.history(recent);
      const top = gauge.top ?? Math.max(1, ...history.map(([, height]) => height));
      const points = history.map(([time, height]) => [
        WIDTH * (1 - (recent.now - time) / MINUTE),
        HEIGHT - 1 - (height / top) * (HEIGHT - 2),
      ]);
      picture.draw("under", area(points, HEIGHT));
      picture.draw("over", line(points));
    }
  }
}
