// One answer of the model: the request, and its text as it comes.

import { call, events } from "./api.js";
import { parameters } from "./settings.js";

/**
 * Asks for the answer to `conversation`, whose last message is the one to fill. `changed()` is called as it grows.
 * When it ends, `ended` of the message says how: "stop", "length", "stopped" (by `signal`) or "failed" (with `error`).
 */
export async function answer(model, conversation, signal, changed) {
  const message = conversation.messages.at(-1);
  try {
    const begin = performance.now();
    const response = await call("v1/chat/completions", { body: request(model, conversation), signal });
    await follow(message, response, begin, changed);
  } catch (error) {
    if (error.name === "AbortError") {
      message.ended = "stopped";
    } else {
      message.ended = "failed";
      message.error = error.message;
    }
  }
}

function request(model, { settings, messages }) {
  const said = messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
  if (settings.system) said.unshift({ role: "system", content: settings.system });
  const stream = { stream: true, stream_options: { include_usage: true } };
  return { model, messages: said, ...stream, ...parameters(settings) };
}

async function follow(message, response, begin, changed) {
  let first = null;
  let last = null;
  let reason = null;
  for await (const event of events(response)) {
    const [choice] = event.choices;
    const content = choice?.delta?.content ?? "";
    const reasoning = choice?.delta?.reasoning ?? "";
    if (content || reasoning) {
      last = performance.now();
      first ??= last;
      message.content += content;
      message.reasoning = (message.reasoning ?? "") + reasoning;
      changed();
    }
    reason = choice?.finish_reason ?? reason;
    if (event.usage) {
      const tokens = event.usage.completion_tokens;
      const seconds = (last - first) / 1000;
      const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
      message.stats = { tokens, rate, firstSeconds: ((first ?? performance.now()) - begin) / 1000 };
    }
  }
  message.ended = reason === "length" ? "length" : "stop";
}
