// Conversations, kept in the browser: each under a key of its own, so that two tabs do not overwrite each other's.

const PREFIX = "tokenmill.conversation.";

/** A new conversation, not yet kept. `messages` are {role, content, ...}, `settings` those it runs with. */
export function newConversation(settings) {
  const now = Date.now();
  const id = `${now.toString(36)}-${Math.floor(Math.random() * 2 ** 32).toString(36)}`;
  return { id, updated: now, settings: { ...settings }, messages: [] };
}

/** All that are kept, the last used first. What cannot be read is left out. */
export function conversations() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map(read)
    .filter((conversation) => conversation !== null)
    .sort((one, other) => other.updated - one.updated);
}

/** Keeps a conversation. Throws an Error with a sentence for people if the browser has no room for it. */
export function keep(conversation) {
  conversation.updated = Date.now();
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    throw new Error("The browser has no more room for conversations. Delete some to have this one kept.");
  }
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

/** What a list shows of it. */
export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 80) : "New conversation";
}

/** Calls `changed` when another tab has changed a conversation. */
export function onChange(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed();
  });
}

function read(key) {
  try {
    const found = JSON.parse(localStorage.getItem(key));
    const sound = typeof found.id === "string" && Array.isArray(found.messages) && Number.isFinite(found.updated);
    if (!sound) return null;
    for (const message of found.messages) {
      if (message.role === "assistant") message.ended ??= "stopped"; // the page was closed while it came
    }
    return { ...found, settings: found.settings ?? {} };
  } catch {
    return null;
  }
}
