// The last minute of the engine, gathered from the answers of /statistics.

export const MINUTE = 60;
export const STEPS_SECONDS = 10; // steps are shown one by one so far back
const RATE_SECONDS = 2; // a rate "now" is over so many
const LATENCY_SECONDS = 2; // latencies are noted this often

export class Recent {
  constructor() {
    this.reset(null);
  }

  reset(started) {
    this.started = started;
    this.count = 0; // steps known of
    this.now = 0; // by the engine's clock, in seconds, as all times here
    this.steps = []; // of the last seconds
    this.moments = []; // {time, running, waiting, used} at each look, over a minute
    this.knownSince = 0; // steps before it may be missing
    this.#perSecond = new Map();
    this.#latencies = [];
  }

  #perSecond;
  #latencies;

  /** Adds what a call with `after=count` answered. */
  add(body) {
    if (body.server_started !== this.started) this.reset(body.server_started);
    const { count, latest } = body.steps;
    if (count - this.count > latest.length && latest.length) {
      this.knownSince = latest[0].begin;
      this.#perSecond.clear();
    }
    this.count = count;
    this.now = body.time;
    for (const step of latest) this.#note(step);
    this.steps = this.steps.filter((step) => step.end > this.now - STEPS_SECONDS);
    const [total, used] = ["total", "used"].map((name) => body.kv.groups.reduce((sum, group) => sum + group[name], 0));
    const { running, waiting } = body;
    this.moments.push({ time: this.now, running, waiting, used: total ? used / total : 0 });
    this.moments = this.moments.filter((moment) => moment.time > this.now - MINUTE);
    this.#noteLatency(body.latency);
  }

  #note(step) {
    const seconds = step.schedule + step.forward + step.sample;
    const end = step.begin + seconds;
    this.steps.push({ ...step, seconds, end });
    const second = Math.floor(end);
    const sum = this.#perSecond.get(second) ?? { prompt: 0, generated: 0 };
    sum.prompt += step.prompt_tokens;
    sum.generated += step.sampled;
    this.#perSecond.set(second, sum);
    this.#perSecond.delete(second - MINUTE - 2);
  }

  #noteLatency(latency) {
    if (this.#latencies.length && this.now - this.#latencies.at(-1).time < LATENCY_SECONDS) return;
    this.#latencies.push({ time: this.now, latency });
    while (this.#latencies.length > 1 && this.#latencies[1].time <= this.now - MINUTE) this.#latencies.shift();
  }

  /** Tokens of each whole second of the last minute, oldest first: {time, prompt, generated}. */
  perSecond() {
    const last = Math.floor(this.now);
    const seconds = Array.from({ length: MINUTE }, (_, index) => last - MINUTE + index);
    return seconds
      .filter((time) => time >= Math.floor(this.knownSince))
      .map((time) => ({ time, ...(this.#perSecond.get(time) ?? { prompt: 0, generated: 0 }) }));
  }

  /** Tokens per second just now: {prompt, generated}. */
  rate() {
    const latest = this.steps.filter((step) => step.end > this.now - RATE_SECONDS);
    const sum = (name) => latest.reduce((total, step) => total + step[name], 0) / RATE_SECONDS;
    return { prompt: sum("prompt_tokens"), generated: sum("sampled") };
  }

  /** Latencies `name` of the last minute, or of all the time if there were none: {counts, bounds, count, lately}. */
  latencies(name, latency) {
    const { bounds, counts } = latency[name];
    const before = this.#latencies[0].latency[name].counts;
    const lately = counts.map((count, index) => count - before[index]);
    const sum = (list) => list.reduce((total, count) => total + count, 0);
    if (sum(lately)) return { bounds, counts: lately, count: sum(lately), lately: true };
    return { bounds, counts, count: sum(counts), lately: false };
  }
}

/** The value that a share of those in a histogram do not exceed, as near as its bounds tell. */
export function quantile({ bounds, counts, count }, share) {
  let left = share * count;
  for (const [index, here] of counts.entries()) {
    if (left <= here && here) {
      const low = index ? bounds[index - 1] : 0;
      const high = bounds[index] ?? low;
      return low + (high - low) * (left / here);
    }
    left -= here;
  }
  return bounds.at(-1);
}
